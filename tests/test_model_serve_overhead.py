"""What serving costs: CPU time of an answer by ``serve``, its rounds reported, against the same by ``generate``."""

import json
import os
import subprocess
import sys
import urllib.request
from statistics import mean

import psutil
import pytest

from bench.setup.prompts import OWN_PROMPTS
from tests.device_service import DeviceService, device_command, device_service

pytestmark = [pytest.mark.model, pytest.mark.endurance]

PROMPTS = OWN_PROMPTS[:10]
SHORT, LONG = 1, 65
"""Most tokens of an answer. The short one is taken first: ``generate`` starts, loads and prefills in both, ``serve``
prefills in the first alone.
"""
OPTIONS = ("--mode", "ids", "--draft-len", "4")
MOST = 1.05


def generate_seconds(station_address: str, prompt: str, max_tokens: int) -> tuple[int, float]:
    """Tokens and CPU seconds of ``generate``."""
    command = device_command("generate", station_address, *OPTIONS, "--max-new-tokens", str(max_tokens), "--json")
    with subprocess.Popen([*command, prompt], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        answer = json.loads(process.stdout.read())
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return len(answer["token_ids"]), usage.ru_utime + usage.ru_stime


def serve_seconds(service: DeviceService, prompt: str, max_tokens: int) -> tuple[int, float]:
    """Tokens and CPU seconds of an answer by ``serve``, as the chat page asks for it."""
    fields = {"messages": [{"role": "user", "content": prompt}], "max_tokens": max_tokens, "stream": True}
    body = json.dumps(fields | {"edgedraft": {"rounds": True}}).encode()
    before = cpu_seconds(service.process.pid)
    with urllib.request.urlopen(f"{service.url}/v1/chat/completions", body, timeout=300) as response:  # noqa: S310
        events = response.read().decode().split("\n\n")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events if event.startswith("data: {")]
    tokens = sum(len(chunk["edgedraft"]["tokens"]) for chunk in chunks if "edgedraft" in chunk)
    return tokens, cpu_seconds(service.process.pid) - before


def cpu_seconds(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


@pytest.mark.timeout(1800)
def test_a_token_by_serve_costs_at_most_a_twentieth_more_than_by_generate(station_address: str) -> None:
    generated, served = [], []
    with device_service(station_address, *OPTIONS) as service:
        for prompt in PROMPTS:  # in turn, so that both see the same load
            (short, short_seconds), (long, long_seconds) = (
                generate_seconds(station_address, prompt, count) for count in (SHORT, LONG)
            )
            generated.append((long_seconds - short_seconds) / (long - short))
            _, (long, long_seconds) = (serve_seconds(service, prompt, count) for count in (SHORT, LONG))
            served.append(long_seconds / long)
    ratio = mean(served) / mean(generated)
    figures = f"generate {1000 * mean(generated):.1f}, serve {1000 * mean(served):.1f}, ratio {ratio:.3f}"
    sys.stdout.write(f"CPU milliseconds per token: {figures}\n")
    assert ratio <= MOST
