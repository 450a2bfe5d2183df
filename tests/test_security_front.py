"""A hostile enrolled device that ends the front's process: honest devices' answers stay the same."""

import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import torch

from basestation.devices.key_folder import KeyFolder
from basestation.logs import LogFormat
from basestation.replicas.front import FrontOptions
from basestation.replicas.front_process import FrontProcess, FrontSettings
from basestation.replicas.inner_link import InnerKey
from basestation.replicas.replica_settings import ReplicaOptions
from basestation.target.segment import Segment
from device.link.curve_keys import CurveKeys, new_key
from device.link.link import Link
from device.session.client import Client
from device.settings import Timeouts
from protocol.frames import FrameCodec
from protocol.limits import Limits
from tests.fakes import DRAFT, TARGET, VOCAB, FakeDraftModel, FakeTarget, target_alone
from tests.front_attack import attack, run_front_with_known_ids
from tests.front_site import RunningReplica
from tests.link_pair import IDS, open_session
from tests.serving import ANY_PORT

HONEST, TOKENS = 8, 40
QUIET_SECONDS = 3
"""After which the honest devices' handshakes are no longer the latest."""


class SlowTarget(FakeTarget):
    """Takes a while for each pass, so that answers are under way when the front ends."""

    def forward(self, segments: Sequence[Segment]) -> torch.Tensor:
        time.sleep(0.02)
        return super().forward(segments)


def prompt_of(number: int) -> list[int]:
    return [number + 1, 1, 4, 1, 5]


def answer_until(ended: threading.Event, address: str, keys: CurveKeys, number: int) -> list[list[int]]:
    """Answers of one device over one connection, at least one after ``ended``."""
    model, answers = FakeDraftModel.make(DRAFT), list[list[int]]()
    link = Link.connect(address, FrameCodec(VOCAB), keys)
    try:
        client, last = Client(link, model.manifest, Timeouts(connect=20, resend=1, retry=60)), False
        while not last:
            last = ended.is_set()
            session = open_session(client, IDS, FakeDraftModel.make(DRAFT), prompt_of(number))
            answers.append([token.token_id for token in session.answer(TOKENS)])
            session.close()
    finally:
        link.close()
    return answers


def enrolled(path: Path, folder: KeyFolder, name: str) -> CurveKeys:
    folder.enroll(name, new_key(path / name))
    return CurveKeys.read(path / name, folder.public_key)


@pytest.fixture
def folder(tmp_path: Path) -> KeyFolder:
    return KeyFolder.create(tmp_path / "keys")


def test_a_device_that_aborts_the_front_is_quarantined_and_answers_stay_the_same(
    tmp_path: Path, folder: KeyFolder, caplog: pytest.LogCaptureFixture
) -> None:
    key = InnerKey.new()
    listening = FrontOptions(ANY_PORT, ANY_PORT, key, 1, Limits())
    settings = FrontSettings(listening, "table", folder, False, 2**30, None, LogFormat.TEXT)
    hostile = enrolled(tmp_path, folder, "hostile")
    honest = [enrolled(tmp_path, folder, f"honest{number}") for number in range(HONEST)]
    ended = threading.Event()
    with closing(FrontProcess(settings, run_front_with_known_ids)) as front:
        link = ReplicaOptions("replica-0", front.start(), key, keyed=True)
        target = SlowTarget.make(TARGET)
        replica = RunningReplica(target, link, Limits())
        address = front.address(30)
        with ThreadPoolExecutor(HONEST) as pool:
            running: list[Future[list[list[int]]]] = [
                pool.submit(answer_until, ended, address, keys, number) for number, keys in enumerate(honest)
            ]
            time.sleep(QUIET_SECONDS)
            admitted = 0
            while admitted < 10 and attack(address, hostile, 3):
                admitted += 1
            ended.set()
            answers = [one.result(60) for one in running]
        replica.stop()
        replica.thread.join()
    aborts = [line for line in caplog.messages if f"exit code {-signal.SIGABRT}" in line]
    assert len(aborts) == 2, caplog.messages
    assert [line for line in caplog.messages if "is quarantined" in line]
    assert admitted == 2
    for number, given in enumerate(answers):
        assert given == [target_alone(TARGET, prompt_of(number), TOKENS)] * len(given)
