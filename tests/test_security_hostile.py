"""Hostile peers against a live base station: two honest devices get the right answers meanwhile."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import zmq

from basestation.key_folder import KeyFolder
from basestation.server import Server
from bench.setup.bench_setup import BenchSetup
from bench.setup.prompts import OWN_PROMPTS
from common.key_files import write_pair
from device.answer import Conversation
from device.client import Client, Timeouts
from device.curve_keys import LinkKeys
from device.draft_model import DraftModel
from device.link import Link
from device.session import DraftSettings
from device.tokenizer import Tokenizer
from protocol.frames import FrameCodec
from protocol.messages import PROTOCOL_VERSION, Hello, Mode, Sampling
from tests.fakes import FakeDraftModel, FakeTarget, blend, random_table, target_alone
from tests.hostile import HARMS, Ground, attacked
from tests.raw_device import hello
from tests.sample import BUNDLE, SAMPLE
from tests.serving import serving

IDS = DraftSettings(Mode.IDS, Sampling(), 4, 4)
PATIENCE = Timeouts(repeat=0.5)


def keys_of(folder: KeyFolder, path: Path, enroll: bool = True) -> LinkKeys:
    public, secret = zmq.curve_keypair()
    write_pair(path, public.decode(), secret.decode())
    if enroll:
        folder.enroll(path.name, public.decode())
    return LinkKeys.read(path, folder.public_key)


def honest(answers: Callable[[], Iterator[bool]], seconds: float) -> list[bool]:
    """Whether each answer that an honest device got was right, until the time is over."""
    end, right = time.monotonic() + seconds, []
    for answer in answers():
        right.append(answer)
        if time.monotonic() > end:
            break
    return right


def both_honest(devices: list[Callable[[], Iterator[bool]]], seconds: float) -> list[list[bool]]:
    results: list[list[bool]] = [[], []]

    def work(place: int) -> None:
        results[place] = honest(devices[place], seconds)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


# -- models that are tables --

VOCAB = 300
TARGET = random_table(VOCAB, seed=1)
DRAFT = blend(TARGET, random_table(VOCAB, seed=2), 0.7)


def table_device(address: str, keys: LinkKeys | None, cleanup: ExitStack) -> Callable[[], Iterator[bool]]:
    link = Link.connect(address, FrameCodec(VOCAB), keys)
    cleanup.callback(link.close)
    model = FakeDraftModel.make(DRAFT)
    client = Client(link, model.manifest, PATIENCE, first_session=0)

    def answers() -> Iterator[bool]:
        for start in range(10_000):
            prompt = [start % VOCAB, 1, 2]
            session = client.open(IDS, model, prompt)
            yield [token.token_id for token in session.answer(40)] == target_alone(TARGET, prompt, 40)
            session.close()

    return answers


@pytest.mark.parametrize("keyed", [True, False], ids=["keys", "no keys"])
def test_honest_devices_get_right_answers_among_hostile_peers(keyed: bool, tmp_path: Path) -> None:
    folder = KeyFolder.create(tmp_path / "keys")
    names = ("attacker", "one", "other")
    attacker, *others = (keys_of(folder, tmp_path / name) if keyed else None for name in names)
    server = Server(FakeTarget.make(TARGET), "tcp://127.0.0.1:0", keys=folder if keyed else None)
    with serving(server), ExitStack() as cleanup:
        ground = Ground(server.address, hello(VOCAB), attacker, keys_of(folder, tmp_path / "strange", enroll=False))
        devices = [table_device(server.address, keys, cleanup) for keys in others]
        with attacked(ground) as done:
            results = both_honest(devices, seconds=6)
    for right in results:
        assert len(right) > 3
        assert all(right)
    assert min(done[harm.__name__] for harm in HARMS) > 0


# -- the sample model, and a process with keys --


def sample_device(
    place: BenchSetup, address: str, keys: LinkKeys, expected: list[list[int]], cleanup: ExitStack
) -> Callable[[], Iterator[bool]]:
    model = DraftModel(BUNDLE, threads=1)
    link = Link.connect(address, FrameCodec(model.manifest.vocab_size), keys)
    cleanup.callback(link.close)
    client = Client(link, model.manifest)

    def answers() -> Iterator[bool]:
        for number in range(10_000):
            prompt = OWN_PROMPTS[number % len(expected)]
            conversation = Conversation(link, client, model, Tokenizer(BUNDLE, model.manifest), IDS)
            stream = conversation.ask(place.prompt_ids(prompt), 48)
            for _ in stream:
                pass
            yield stream.answer.token_ids == expected[number % len(expected)]
            conversation.close()

    return answers


@pytest.mark.model
@pytest.mark.endurance
def test_two_minutes_of_hostile_peers_change_no_answer_of_the_sample_model(place: BenchSetup, tmp_path: Path) -> None:
    folder = KeyFolder.create(tmp_path / "keys")
    attacker, *others = (keys_of(folder, tmp_path / name) for name in ("attacker", "one", "other"))
    expected = [place.answer(place.prompt_ids(prompt), 48, IDS).token_ids for prompt in OWN_PROMPTS[:3]]
    command = [sys.executable, "-m", "basestation", "serve", "--target", str(SAMPLE), "--dtype", "float32"]
    command += ["--keys", str(tmp_path / "keys"), "--bind", "tcp://127.0.0.1:0"]
    log = tmp_path / "log"
    with log.open("w") as file, subprocess.Popen(command, stderr=file) as station, ExitStack() as cleanup:
        cleanup.callback(station.terminate)
        while " serving " not in log.read_text(encoding="utf-8"):
            time.sleep(0.2)
        line = next(line for line in log.read_text(encoding="utf-8").splitlines() if " serving " in line)
        address, manifest = line.split()[-1], place.model.manifest
        words = Hello(PROTOCOL_VERSION, manifest.vocab_size, bytes.fromhex(manifest.vocabulary_hash), manifest.stop_ids)
        ground = Ground(address, words, attacker, keys_of(folder, tmp_path / "strange", enroll=False))
        devices = [sample_device(place, address, keys, expected, cleanup) for keys in others]
        with attacked(ground) as done:
            results = both_honest(devices, seconds=120)
        assert station.poll() is None
    for right in results:
        assert len(right) > 3
        assert all(right)
    assert min(done[harm.__name__] for harm in HARMS) > 0
