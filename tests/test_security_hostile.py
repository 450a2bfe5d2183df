"""Hostile peers do not change the answers of two honest devices on the same base station."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import zmq

from basestation.devices.key_folder import KeyFolder
from basestation.server import Server
from bench.setup.bench_setup import BenchSetup
from bench.setup.prompts import OWN_PROMPTS
from common.key_files import write_pair
from device.answers.answer import Conversation
from device.drafting.draft_model import DraftModel
from device.link.curve_keys import CurveKeys
from device.link.link import Link
from device.planning.planners import Planners
from device.session.client import Client
from device.settings import Timeouts
from device.text.tokenizer import Tokenizer
from protocol.frames import FrameCodec
from protocol.messages import PROTOCOL_VERSION, Hello
from tests.fakes import FakeDraftModel, FakeTarget, blend, random_table, target_alone
from tests.hostile import ATTACKS, AttackedStation, attacked
from tests.link_pair import IDS, open_session
from tests.raw_device import hello
from tests.sample import BUNDLE, SAMPLE
from tests.serving import ANY_PORT, serving

TIMEOUTS = Timeouts(resend=0.5)


def keys_of(folder: KeyFolder, path: Path, enroll: bool = True) -> CurveKeys:
    public, secret = zmq.curve_keypair()
    write_pair(path, public.decode(), secret.decode())
    if enroll:
        folder.enroll(path.name, public.decode())
    return CurveKeys.read(path, folder.public_key)


def honest(answers: Callable[[], Iterator[bool]], seconds: float) -> list[bool]:
    """Whether each answer of an honest device is correct, for ``seconds``."""
    end, correct = time.monotonic() + seconds, []
    for is_correct in answers():
        correct.append(is_correct)
        if time.monotonic() > end:
            break
    return correct


def both_honest(devices: list[Callable[[], Iterator[bool]]], seconds: float) -> list[list[bool]]:
    results: list[list[bool]] = [[], []]

    def work(index: int) -> None:
        results[index] = honest(devices[index], seconds)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


# -- models that are tables --

VOCAB = 300
TARGET = random_table(VOCAB, seed=1)
DRAFT = blend(TARGET, random_table(VOCAB, seed=2), 0.7)


def table_device(address: str, keys: CurveKeys | None, cleanup: ExitStack) -> Callable[[], Iterator[bool]]:
    link = Link.connect(address, FrameCodec(VOCAB), keys)
    cleanup.callback(link.close)
    model = FakeDraftModel.make(DRAFT)
    client = Client(link, model.manifest, TIMEOUTS, first_session=0)

    def answers() -> Iterator[bool]:
        for start in range(10_000):
            prompt = [start % VOCAB, 1, 2]
            session = open_session(client, IDS, model, prompt)
            yield [token.token_id for token in session.answer(40)] == target_alone(TARGET, prompt, 40)
            session.close()

    return answers


@pytest.mark.parametrize("keyed", [True, False], ids=["keys", "no keys"])
def test_hostile_peers_change_no_answer(keyed: bool, tmp_path: Path) -> None:
    folder = KeyFolder.create(tmp_path / "keys")
    names = ("attacker", "one", "other")
    attacker, *others = (keys_of(folder, tmp_path / name) if keyed else None for name in names)
    server = Server(FakeTarget.make(TARGET), ANY_PORT, keys=folder if keyed else None)
    with serving(server), ExitStack() as cleanup:
        site = AttackedStation(
            server.address, hello(VOCAB), attacker, keys_of(folder, tmp_path / "unknown", enroll=False)
        )
        devices = [table_device(server.address, keys, cleanup) for keys in others]
        with attacked(site) as runs:
            results = both_honest(devices, seconds=6)
    for correct in results:
        assert len(correct) > 3
        assert all(correct)
    assert min(runs[attack.__name__] for attack in ATTACKS) > 0


# -- the sample model, and a process with keys --


def sample_device(
    sample_setup: BenchSetup, address: str, keys: CurveKeys, expected: list[list[int]], cleanup: ExitStack
) -> Callable[[], Iterator[bool]]:
    model = DraftModel(BUNDLE, threads=1)
    link = Link.connect(address, FrameCodec(model.manifest.vocab_size), keys)
    cleanup.callback(link.close)
    client = Client(link, model.manifest)

    def answers() -> Iterator[bool]:
        for number in range(10_000):
            prompt = OWN_PROMPTS[number % len(expected)]
            conversation = Conversation(
                client, Planners(model.manifest.quality), model, Tokenizer(BUNDLE, model.manifest), IDS
            )
            stream = conversation.ask(sample_setup.prompt_ids(prompt), 48)
            for _ in stream:
                pass
            yield stream.answer.token_ids == expected[number % len(expected)]
            conversation.close()

    return answers


@pytest.mark.model
@pytest.mark.endurance
def test_two_minutes_of_hostile_peers_change_no_answer_of_the_sample_model(
    sample_setup: BenchSetup, tmp_path: Path
) -> None:
    folder = KeyFolder.create(tmp_path / "keys")
    attacker, *others = (keys_of(folder, tmp_path / name) for name in ("attacker", "one", "other"))
    expected = [sample_setup.answer(sample_setup.prompt_ids(prompt), 48, IDS).token_ids for prompt in OWN_PROMPTS[:3]]
    command = [sys.executable, "-m", "basestation", "serve", "--target", str(SAMPLE), "--dtype", "float32"]
    command += ["--keys", str(tmp_path / "keys"), "--bind", "tcp://127.0.0.1:0"]
    log = tmp_path / "log"
    with log.open("w") as file, subprocess.Popen(command, stderr=file) as station, ExitStack() as cleanup:
        cleanup.callback(station.terminate)
        while " serving " not in log.read_text(encoding="utf-8"):
            time.sleep(0.2)
        line = next(line for line in log.read_text(encoding="utf-8").splitlines() if " serving " in line)
        address, manifest = line.split()[-1], sample_setup.model.manifest
        greeting = Hello(
            PROTOCOL_VERSION, manifest.vocab_size, bytes.fromhex(manifest.vocabulary_hash), manifest.stop_ids
        )
        site = AttackedStation(address, greeting, attacker, keys_of(folder, tmp_path / "unknown", enroll=False))
        devices = [sample_device(sample_setup, address, keys, expected, cleanup) for keys in others]
        with attacked(site) as runs:
            results = both_honest(devices, seconds=120)
        assert station.poll() is None
    for correct in results:
        assert len(correct) > 3
        assert all(correct)
    assert min(runs[attack.__name__] for attack in ATTACKS) > 0
