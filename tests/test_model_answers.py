"""End to end with the sample model: processes, sockets, ONNX Runtime, PyTorch."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import zmq

from bench.exact import TargetAlone, Transformers, differences
from bench.setup.bench_setup import BenchSetup, bench_setup
from bench.setup.prompts import OWN_PROMPTS
from bench.setup.station_process import running_station
from device.settings import DraftSettings
from protocol.errors import ContextLengthError
from protocol.frames import FrameCodec
from protocol.messages import Fault, Mode, Sampling
from tests.relay import CountingRelay, port_of
from tests.sample import BUNDLE, DEVICE_PYTHON, SAMPLE

pytestmark = pytest.mark.model

IDS = DraftSettings(Mode.IDS, Sampling(), uplink_k=1, draft_len=8)


def test_greedy_answers_equal_those_of_transformers(sample_setup: BenchSetup) -> None:
    found = differences(
        sample_setup, Transformers(str(SAMPLE)), OWN_PROMPTS[:3], 32, Sampling(), (1, 4, 8), lambda: None
    )
    assert [difference for difference in found if not difference.is_tie] == []


def test_coupled_answers_equal_the_targets_own_with_the_same_seed(sample_setup: BenchSetup) -> None:
    sampling = Sampling(1.0, seed=5)
    assert (
        differences(
            sample_setup, TargetAlone(sample_setup, sampling), OWN_PROMPTS[:2], 32, sampling, (1, 8), lambda: None
        )
        == []
    )


def test_mode_target_gives_the_same_tokens(sample_setup: BenchSetup) -> None:
    ids = sample_setup.prompt_ids(OWN_PROMPTS[3])
    alone = DraftSettings(Mode.TARGET, Sampling(), uplink_k=1, draft_len=8)
    assert sample_setup.answer(ids, 32, alone).token_ids == sample_setup.answer(ids, 32, IDS).token_ids


@pytest.mark.parametrize("mode", [Mode.TOPK, Mode.FULL])
def test_a_sampled_answer_is_a_function_of_prompt_and_seed(sample_setup: BenchSetup, mode: Mode) -> None:
    ids = sample_setup.prompt_ids(OWN_PROMPTS[1])
    settings = DraftSettings(mode, Sampling(1.2, top_k=5000, seed=7), uplink_k=4, draft_len=4)
    first = sample_setup.answer(ids, 48, settings)
    assert sample_setup.answer(ids, 48, settings).token_ids == first.token_ids
    assert first.accepted > 0
    assert mode is Mode.FULL or first.accepted < first.drafted  # K = 4 truncates the distribution


def test_drafts_stay_within_their_byte_budget(sample_setup: BenchSetup) -> None:
    ids = sample_setup.prompt_ids(OWN_PROMPTS[0])
    opening = 2 * len(ids) + 64
    answer = sample_setup.answer(ids, 48, IDS)
    assert answer.uplink_bytes - opening <= 3 * answer.drafted + 24 * answer.rounds
    sampled = DraftSettings(Mode.TOPK, Sampling(1.0, seed=1), uplink_k=32, draft_len=4)
    answer = sample_setup.answer(ids, 48, sampled)
    assert answer.uplink_bytes - opening <= 130 * answer.drafted


def test_a_conversation_sends_only_new_tokens(sample_setup: BenchSetup) -> None:
    conversation = sample_setup.conversation(IDS)
    first = conversation.ask(sample_setup.prompt_ids("Name three rivers."), 24)
    text = "".join(piece.text for piece in first)
    messages = [
        {"role": "user", "content": "Name three rivers."},
        {"role": "assistant", "content": text},
        {"role": "user", "content": "Which is the longest?"},
    ]
    ids = sample_setup.tokenizer.encode_chat(messages)  # type: ignore[arg-type]
    second = conversation.ask(ids, 16)
    for _ in second:
        pass
    conversation.close()
    assert second.answer.token_ids == sample_setup.answer(ids, 16, IDS).token_ids
    assert second.answer.uplink_bytes < 2 * len(ids) + 3 * second.answer.drafted + 24 * second.answer.rounds


def test_a_prompt_longer_than_the_context_is_refused(sample_setup: BenchSetup) -> None:
    with pytest.raises(ContextLengthError, match="at most 8191"):
        sample_setup.answer([5] * 8192, 8, IDS)


def test_invariant_6_the_counted_bytes_are_those_a_relay_forwards(station_address: str) -> None:
    port = port_of(station_address)
    with CountingRelay(port) as relay, bench_setup(BUNDLE, f"tcp://127.0.0.1:{relay.port}") as setup:
        link, before = setup.client.link, relay.wait_until_idle()
        uplink, downlink = link.uplink_bytes, link.downlink_bytes
        setup.answer(setup.prompt_ids(OWN_PROMPTS[2]), 24, IDS)
        after = relay.wait_until_idle()
        counted = (link.uplink_bytes - uplink, link.downlink_bytes - downlink)
    assert counted == (after[0] - before[0], after[1] - before[1])


def test_garbage_does_not_end_another_session(station_address: str, sample_setup: BenchSetup) -> None:
    expected = sample_setup.answer(sample_setup.prompt_ids(OWN_PROMPTS[4]), 16, IDS).token_ids
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.connect(station_address)
    conversation = sample_setup.conversation(IDS)
    tokens = conversation.ask(sample_setup.prompt_ids(OWN_PROMPTS[4]), 16)
    for count, _ in enumerate(tokens):
        dealer.send(b"\xc1garbage" * (count + 1))
    fault = FrameCodec(sample_setup.model.manifest.vocab_size).decode(dealer.recv())
    context.destroy(linger=0)
    conversation.close()
    assert isinstance(fault, Fault)
    assert fault.code == "frame"
    assert tokens.answer.token_ids == expected


def test_generate_needs_only_the_device_extra(station_address: str, sample_setup: BenchSetup) -> None:
    assert DEVICE_PYTHON.exists(), "make test creates this environment with the device extra alone"
    script = "import sys, device.cli; print([m for m in ('torch', 'transformers', 'optimum') if m in sys.modules])"
    assert _run([str(DEVICE_PYTHON), "-c", script]).stdout.strip() == "[]"
    assert _run([str(DEVICE_PYTHON), "-c", "import torch"]).returncode != 0
    command = [str(DEVICE_PYTHON), "-m", "device", "generate", "--bundle", str(BUNDLE), "--server", station_address]
    finished = _run([*command, "--prompt", OWN_PROMPTS[7], "--max-new-tokens", "12", "--json"])
    assert finished.returncode == 0, finished.stderr
    answer = json.loads(finished.stdout)
    expected = sample_setup.answer(sample_setup.prompt_ids(OWN_PROMPTS[7]), 12, IDS)
    assert answer["token_ids"] == expected.token_ids
    assert len(answer["origins"]) == 12
    assert answer["finish_reason"] == "length"


def test_the_device_gives_up_when_the_base_station_stops() -> None:
    with running_station(str(SAMPLE), "float32") as address:
        device = _generate(address, "--max-new-tokens", "4000", "--retry-timeout", "4")
        assert device.stdout is not None
        device.stdout.read(20)
    waiting, error = device.communicate(timeout=60)[1].splitlines()
    assert device.returncode == 1
    assert waiting == "waiting for up to 4 s: the base station is shutting down"
    assert error.startswith(f"error: no base station answers at {address} (waited ")


def test_ctrl_c_ends_the_device_cleanly(station_address: str) -> None:
    device = _generate(station_address, "--max-new-tokens", "4000")
    assert device.stdout is not None
    device.stdout.read(20)
    device.send_signal(signal.SIGINT)
    errors = device.communicate(timeout=30)[1]
    assert (device.returncode, errors) == (130, "interrupted\n")


def _generate(address: str, *options: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "device", "generate", "--bundle", str(BUNDLE), "--server", address]
    return subprocess.Popen(
        [*command, "--raw", "--prompt", "Once upon a time", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        preexec_fn=_restore_sigint,
    )


def _restore_sigint() -> None:
    """A shell's background jobs ignore SIGINT, and child processes inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _run(command: list[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=Path(__file__).parent)
