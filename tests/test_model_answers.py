"""The whole path with the real sample model: processes, sockets, ONNX Runtime, PyTorch."""

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
from device.session import DraftSettings
from protocol.errors import ContextLengthError
from protocol.frames import FrameCodec
from protocol.messages import Fault, Mode, Sampling
from tests.relay import CountingRelay
from tests.sample import BUNDLE, DEVICE_PYTHON, SAMPLE

pytestmark = pytest.mark.model

IDS = DraftSettings(Mode.IDS, Sampling(), uplink_k=1, draft_len=8)


def test_greedy_answers_are_what_transformers_generates(place: BenchSetup) -> None:
    found = differences(place, Transformers(str(SAMPLE)), OWN_PROMPTS[:3], 32, Sampling(), (1, 4, 8), lambda: None)
    assert [one for one in found if not one.is_tie] == []


def test_coupled_answers_are_what_the_target_alone_samples_with_that_seed(place: BenchSetup) -> None:
    sampling = Sampling(1.0, seed=5)
    assert differences(place, TargetAlone(place, sampling), OWN_PROMPTS[:2], 32, sampling, (1, 8), lambda: None) == []


def test_the_target_alone_gives_the_same_tokens(place: BenchSetup) -> None:
    ids = place.prompt_ids(OWN_PROMPTS[3])
    alone = DraftSettings(Mode.TARGET, Sampling(), uplink_k=1, draft_len=8)
    assert place.answer(ids, 32, alone).token_ids == place.answer(ids, 32, IDS).token_ids


@pytest.mark.parametrize("mode", [Mode.TOPK, Mode.FULL])
def test_a_sampled_answer_is_a_function_of_prompt_and_seed(place: BenchSetup, mode: Mode) -> None:
    ids = place.prompt_ids(OWN_PROMPTS[1])
    settings = DraftSettings(mode, Sampling(1.2, top_k=5000, seed=7), uplink_k=4, draft_len=4)
    first = place.answer(ids, 48, settings)
    assert place.answer(ids, 48, settings).token_ids == first.token_ids
    assert first.accepted > 0
    assert mode is Mode.FULL or first.accepted < first.drafted  # four entries leave out much of what the target says


def test_drafts_fit_their_budget_of_bytes(place: BenchSetup) -> None:
    ids = place.prompt_ids(OWN_PROMPTS[0])
    opening = 2 * len(ids) + 64
    answer = place.answer(ids, 48, IDS)
    assert answer.uplink_bytes - opening <= 3 * answer.drafted + 24 * answer.rounds
    sampled = DraftSettings(Mode.TOPK, Sampling(1.0, seed=1), uplink_k=32, draft_len=4)
    answer = place.answer(ids, 48, sampled)
    assert answer.uplink_bytes - opening <= 130 * answer.drafted


def test_a_conversation_runs_only_what_is_new(place: BenchSetup) -> None:
    conversation = place.conversation(IDS)
    first = conversation.ask(place.prompt_ids("Name three rivers."), 24)
    text = "".join(piece.text for piece in first)
    messages = [
        {"role": "user", "content": "Name three rivers."},
        {"role": "assistant", "content": text},
        {"role": "user", "content": "Which is the longest?"},
    ]
    ids = place.tokenizer.encode_chat(messages)  # type: ignore[arg-type]
    second = conversation.ask(ids, 16)
    for _ in second:
        pass
    conversation.close()
    assert second.answer.token_ids == place.answer(ids, 16, IDS).token_ids
    assert second.answer.uplink_bytes < 2 * len(ids) + 3 * second.answer.drafted + 24 * second.answer.rounds


def test_a_prompt_longer_than_the_context_is_refused(place: BenchSetup) -> None:
    with pytest.raises(ContextLengthError, match="at most 8191"):
        place.answer([5] * 8192, 8, IDS)


def test_invariant_6_bytes_are_counted_as_a_relay_sees_them(station_address: str) -> None:
    port = int(station_address.rpartition(":")[2])
    with CountingRelay(port) as relay, bench_setup(BUNDLE, f"tcp://127.0.0.1:{relay.port}") as place:
        before = relay.settled()
        uplink, downlink = place.link.uplink_bytes, place.link.downlink_bytes
        place.answer(place.prompt_ids(OWN_PROMPTS[2]), 24, IDS)
        after = relay.settled()
        counted = (place.link.uplink_bytes - uplink, place.link.downlink_bytes - downlink)
    assert counted == (after[0] - before[0], after[1] - before[1])


def test_garbage_ends_nobody_elses_session(station_address: str, place: BenchSetup) -> None:
    expected = place.answer(place.prompt_ids(OWN_PROMPTS[4]), 16, IDS).token_ids
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.connect(station_address)
    conversation = place.conversation(IDS)
    tokens = conversation.ask(place.prompt_ids(OWN_PROMPTS[4]), 16)
    for count, _ in enumerate(tokens):
        dealer.send(b"\xc1garbage" * (count + 1))
    fault = FrameCodec(place.model.manifest.vocab_size).decode(dealer.recv())
    context.destroy(linger=0)
    conversation.close()
    assert isinstance(fault, Fault)
    assert fault.code == "frame"
    assert tokens.answer.token_ids == expected


def test_generate_runs_where_only_the_device_is_installed(station_address: str, place: BenchSetup) -> None:
    assert DEVICE_PYTHON.exists(), "make test sets up a second environment with [device] alone"
    script = "import sys, device.cli; print([m for m in ('torch', 'transformers', 'optimum') if m in sys.modules])"
    assert _run([str(DEVICE_PYTHON), "-c", script]).stdout.strip() == "[]"
    assert _run([str(DEVICE_PYTHON), "-c", "import torch"]).returncode != 0
    command = [str(DEVICE_PYTHON), "-m", "device", "generate", "--bundle", str(BUNDLE), "--server", station_address]
    finished = _run([*command, "--prompt", OWN_PROMPTS[7], "--max-new-tokens", "12", "--json"])
    assert finished.returncode == 0, finished.stderr
    answer = json.loads(finished.stdout)
    expected = place.answer(place.prompt_ids(OWN_PROMPTS[7]), 12, IDS)
    assert answer["token_ids"] == expected.token_ids
    assert len(answer["origins"]) == 12
    assert answer["finish_reason"] == "length"


def test_a_device_notices_that_the_base_station_is_stopped() -> None:
    with running_station(str(SAMPLE), "float32") as address:
        device = _generate(address, "--max-new-tokens", "4000", "--patience", "10")
        assert device.stdout is not None
        device.stdout.read(20)
    waiting, error = device.communicate(timeout=60)[1].splitlines()
    assert device.returncode == 1
    assert waiting == "waiting for up to 10 s: the base station is shutting down"
    assert error.startswith(f"error: no base station answers at {address} (waited 1")


def test_ctrl_c_ends_a_device_cleanly(station_address: str) -> None:
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
        preexec_fn=_heed_interrupts,
    )


def _heed_interrupts() -> None:
    """A shell makes what it runs in the background ignore them, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _run(command: list[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=Path(__file__).parent)
