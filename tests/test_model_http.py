"""The device's HTTP service with the sample model, and OpenAI's own client."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import APIError, APIStatusError, OpenAI

from bench.setup.prompts import OWN_PROMPTS
from tests.sample import BUNDLE

pytestmark = pytest.mark.model

_SERVING_LINE = re.compile(r"serving sample at (http://\S+)")


def device_command(name: str, station_address: str, *options: str) -> list[str]:
    return [sys.executable, "-m", "device", name, "--bundle", str(BUNDLE), "--server", station_address, *options]


@pytest.fixture
def record_file(tmp_path: Path) -> Path:
    return tmp_path / "rounds.jsonl"


@pytest.fixture
def serving(station_address: str, record_file: Path) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    command = device_command("serve", station_address, "--bind", "http://127.0.0.1:0", "--record", str(record_file))
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "loaded" in process.stderr.readline()
        match = _SERVING_LINE.search(process.stderr.readline())
        assert match, process.stderr.read()
        try:
            yield process, match.group(1)
        finally:
            process.kill()


def test_streamed_text_equals_the_output_of_generate(
    station_address: str, serving: tuple["subprocess.Popen[str]", str], record_file: Path
) -> None:
    prompt, options = OWN_PROMPTS[1], ("--temperature", "0.8", "--seed", "4", "--max-new-tokens", "24")
    generated = subprocess.run(
        device_command("generate", station_address, "--prompt", prompt, *options),
        capture_output=True,
        text=True,
        check=True,
    )
    with OpenAI(base_url=f"{serving[1]}/v1", api_key="none", max_retries=0) as client:
        model = client.models.list().data[0].id
        with client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": prompt}],
            temperature=0.8,
            seed=4,
            max_tokens=24,
            stream=True,
        ) as chunks:
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == generated.stdout.removesuffix("\n")
        with pytest.raises(APIStatusError, match="tools"):
            client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": prompt}],
                tools=[{"type": "function", "function": {"name": "look"}}],
            )
    rounds = [json.loads(line) for line in record_file.read_text(encoding="utf-8").splitlines()]
    assert sum(record["accepted"] + 1 for record in rounds) == 24
    assert re.search("prompt tokens, 24 new tokens", serving[0].stderr.readline())  # type: ignore[union-attr]


def test_sigterm_stops_the_service_during_an_answer(serving: tuple["subprocess.Popen[str]", str]) -> None:
    process, url = serving
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        chunks = client.chat.completions.create(
            model="sample",
            messages=[{"role": "user", "content": OWN_PROMPTS[0]}],
            max_tokens=2000,
            stream=True,
        )
        next(iter(chunks))
        process.send_signal(signal.SIGTERM)
        with pytest.raises(APIError, match="shutting down") as error:
            list(chunks)
        assert error.value.code == "closing"
        assert process.wait(timeout=30) == 0
    assert process.stderr is not None
    log = process.stderr.read().splitlines()
    assert log[-1].endswith("stopped")
    assert [line for line in log if " INFO " not in line] == []
