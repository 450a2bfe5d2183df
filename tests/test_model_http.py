"""The device's HTTP service with the sample model, and OpenAI's own client."""

import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import APIError, APIStatusError, OpenAI

from bench.setup.prompts import OWN_PROMPTS
from tests.device_service import DeviceService, device_command, device_service
from tests.record_file import lines_of

pytestmark = pytest.mark.model


@pytest.fixture
def record_file(tmp_path: Path) -> Path:
    return tmp_path / "rounds.jsonl"


@pytest.fixture
def serving(station_address: str, record_file: Path) -> Iterator[DeviceService]:
    with device_service(station_address, "--record", str(record_file)) as service:
        yield service


def test_streamed_text_equals_the_output_of_generate(
    station_address: str, serving: DeviceService, record_file: Path
) -> None:
    prompt, options = OWN_PROMPTS[1], ("--temperature", "0.8", "--seed", "4", "--max-new-tokens", "24")
    generated = subprocess.run(
        device_command("generate", station_address, "--prompt", prompt, *options),
        capture_output=True,
        text=True,
        check=True,
    )
    with OpenAI(base_url=f"{serving.url}/v1", api_key="none", max_retries=0) as client:
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
    rounds = lines_of(record_file)
    assert sum(record["accepted"] + 1 for record in rounds) == 24
    assert re.search("prompt tokens, 24 new tokens", serving.process.stderr.readline())  # type: ignore[union-attr]


def test_sigterm_stops_the_service_during_an_answer(serving: DeviceService) -> None:
    process, url = serving.process, serving.url
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
