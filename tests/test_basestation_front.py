"""A front and its replicas on real sockets: answers, losses, restarts, counted bytes."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any

import pytest

from basestation.devices.peer import Peer
from basestation.monitoring.monitor import Monitor
from basestation.monitoring.snapshot import Snapshot
from basestation.replicas import front, front_process
from basestation.replicas.front import Front
from basestation.replicas.front_process import FrontProcess
from basestation.replicas.inner_link import Delivery, InnerSocket
from basestation.server import Server
from basestation.target.target_model import TargetModel
from device.link.link import Link
from device.session.client import Client
from device.session.session import DeviceSession
from device.settings import DraftSettings, Timeouts
from protocol.frames import FrameHead
from protocol.messages import Close, Draft, Fault, Message, Mode, Open, Opened, Sampling, Verdict, Welcome
from protocol.zmtp import socket_bytes
from tests.fakes import DRAFT, PROMPT, TARGET, VOCAB, FakeDraftModel, FakeTarget, target_alone
from tests.front_site import FrontSite, RunningReplica, front_settings, front_site, start_replica, two_replicas
from tests.link_pair import IDS, open_session
from tests.raw_device import CODEC, hello
from tests.raw_peer import RawPeer
from tests.relay import CountingRelay
from tests.serving import ANY_PORT, serving
from tests.wait import wait_for

TOKENS = 60
COUPLED = DraftSettings(Mode.COUPLED, Sampling(1.0, seed=7), 4, 4)
TOPK = DraftSettings(Mode.TOPK, Sampling(1.0, seed=7), 4, 4)
TIMEOUTS = Timeouts(connect=10, resend=1, retry=20)


def target() -> TargetModel:
    return FakeTarget.make(TARGET)


@pytest.fixture
def site() -> Iterator[FrontSite]:
    with two_replicas() as site:
        yield site


@pytest.fixture
def cleanup() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def session_at(address: str, settings: DraftSettings, cleanup: ExitStack) -> DeviceSession:
    model = FakeDraftModel.make(DRAFT)
    link = Link.connect(address, CODEC)
    cleanup.callback(link.close)
    return open_session(Client(link, model.manifest, TIMEOUTS), settings, model, PROMPT)


def serving_replica(site: FrontSite) -> RunningReplica:
    """The replica that has the only session."""
    wait_for(lambda: sum(one.open_sessions for one in site.replicas.values()) == 1)
    return next(one for one in site.replicas.values() if one.open_sessions)


def undisturbed(settings: DraftSettings) -> list[int]:
    with serving(Server(target(), ANY_PORT)) as server, ExitStack() as cleanup:
        return [token.token_id for token in session_at(server.address, settings, cleanup).answer(TOKENS)]


# -- answers --


def test_a_greedy_answer_is_the_targets_own(site: FrontSite, cleanup: ExitStack) -> None:
    answer = [token.token_id for token in session_at(site.address, IDS, cleanup).answer(TOKENS)]
    assert answer == target_alone(TARGET, PROMPT, TOKENS)


def test_a_coupled_answer_is_that_of_a_single_process(site: FrontSite, cleanup: ExitStack) -> None:
    answer = [token.token_id for token in session_at(site.address, COUPLED, cleanup).answer(TOKENS)]
    assert answer == undisturbed(COUPLED)


def test_the_welcome_is_that_of_a_single_process(site: FrontSite, cleanup: ExitStack) -> None:
    with serving(Server(target(), ANY_PORT)) as server:
        expected = RawPeer(server.address, cleanup).request(hello(VOCAB))
    assert isinstance(expected, Welcome)
    assert RawPeer(site.address, cleanup).request(hello(VOCAB)) == expected


def test_a_draft_model_that_does_not_match_is_refused(site: FrontSite, cleanup: ExitStack) -> None:
    refusal = RawPeer(site.address, cleanup).request(hello(VOCAB + 1))
    assert isinstance(refusal, Fault)
    assert refusal.code == "mismatch"


def test_sessions_of_many_devices_are_at_both_replicas(site: FrontSite, cleanup: ExitStack) -> None:
    for number in range(24):
        peer = RawPeer(site.address, cleanup)
        assert isinstance(peer.request(hello(VOCAB)), Welcome)
        assert peer.request(Open(number, 0, Mode.IDS, Sampling(), tuple(PROMPT))) == Opened(number, 0)
    counts = [replica.open_sessions for replica in site.replicas.values()]
    assert sum(counts) == 24
    assert min(counts) > 0


def test_a_replica_reports_what_its_busy_sessions_require(site: FrontSite, cleanup: ExitStack) -> None:
    peer = RawPeer(site.address, cleanup)
    assert isinstance(peer.request(hello(VOCAB)), Welcome)
    assert peer.request(Open(0, 0, Mode.IDS, Sampling(), tuple(PROMPT))) == Opened(0, 0)
    wait_for(lambda: sum(one.load.kv_share > 0 for one in site.front.routing.replicas.values()) == 1)


# -- losses --


@pytest.mark.parametrize("settings", [IDS, COUPLED, TOPK], ids=lambda one: str(one.mode))
def test_an_answer_survives_the_loss_of_each_replica_in_turn(
    site: FrontSite, cleanup: ExitStack, settings: DraftSettings
) -> None:
    answer = list[int]()
    for token in session_at(site.address, settings, cleanup).answer(TOKENS):
        answer.append(token.token_id)
        if len(answer) in (10, 30):
            lost = serving_replica(site)
            lost.kill()
            del site.replicas[lost.name]
            site.start_replica(lost.name, target())
            wait_for(lambda: sum(one.open_sessions for one in site.replicas.values()) == 0)
    if settings is TOPK:
        assert len(answer) == TOKENS
    else:
        assert answer == undisturbed(settings)


def test_a_session_whose_replica_lives_never_moves(site: FrontSite, cleanup: ExitStack) -> None:
    answer = list[int]()
    for token in session_at(site.address, IDS, cleanup).answer(TOKENS):
        answer.append(token.token_id)
        if len(answer) == 10:
            home = serving_replica(site)
            opened = home.open_sessions
            next(one for one in site.replicas.values() if one is not home).kill()
        if len(answer) == 30:
            site.restart_front()
    assert answer == target_alone(TARGET, PROMPT, TOKENS)
    assert home.open_sessions == opened == 1


def test_an_answer_survives_the_restart_of_the_front_without_opening_a_session(
    site: FrontSite, cleanup: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    answer = list[int]()
    for token in session_at(site.address, COUPLED, cleanup).answer(TOKENS):
        answer.append(token.token_id)
        if len(answer) in (10, 30):
            site.restart_front()
    assert answer == undisturbed(COUPLED)
    opened = [line.partition("coupled, ")[2] for line in caplog.messages if "coupled, " in line]
    assert opened == ["5 tokens"] * 2  # one at the replica, one undisturbed


def test_a_replica_is_back_after_a_connection_of_which_only_its_end_broke(cleanup: ExitStack) -> None:
    with front_site(expected=1) as site:
        relay = site.cleanup.enter_context(CountingRelay(int(site.options.inner_bind.rpartition(":")[2])))
        site.options = replace(site.options, inner_bind=f"tcp://127.0.0.1:{relay.port}")
        site.start_replica("replica-0", target())
        site.wait_for_replicas(1)
        peer, opening = RawPeer(site.address, cleanup), Open(0, 0, Mode.IDS, Sampling(), tuple(PROMPT))
        assert isinstance(peer.request(hello(VOCAB)), Welcome)
        relay.drop_ends_at_devices()
        wait_for(lambda: peer.request(opening) == Opened(0, 0), seconds=30)


def test_the_front_tells_which_replicas_there_are(site: FrontSite) -> None:
    assert site.told == {"replica-0", "replica-1"}
    site.start_replica("replica-2", target())
    wait_for(lambda: site.told == {"replica-0", "replica-1", "replica-2"})
    site.replicas["replica-0"].kill()
    wait_for(lambda: site.told == {"replica-1", "replica-2"})


def test_a_session_that_no_replica_has_is_unknown(site: FrontSite, cleanup: ExitStack) -> None:
    peer = RawPeer(site.address, cleanup)
    assert isinstance(peer.request(hello(VOCAB)), Welcome)
    refusal = peer.request(Draft(5, 1, ()))
    assert isinstance(refusal, Fault)
    assert (refusal.session_id, refusal.code) == (5, "unknown_session")


def test_without_a_replica_an_open_is_refused_until_one_is_back(site: FrontSite, cleanup: ExitStack) -> None:
    peer = RawPeer(site.address, cleanup)
    assert isinstance(peer.request(hello(VOCAB)), Welcome)
    for replica in list(site.replicas.values()):
        replica.kill()
    wait_for(lambda: not site.front.routing.replicas)
    opening = Open(0, 0, Mode.IDS, Sampling(), tuple(PROMPT))
    refusal = peer.request(opening)
    assert isinstance(refusal, Fault)
    assert (refusal.code, refusal.retry_seconds) == ("full", 1)
    site.start_replica("replica-0", target())
    wait_for(lambda: len(site.front.routing.replicas) == 1)
    assert peer.request(opening) == Opened(0, 0)


# -- bytes --


def counts_all_of(site: FrontSite, *messages: Message) -> Callable[[], bool]:
    """Whether front and replicas have counted the bytes of these messages, each once."""
    expected = sum(socket_bytes(CODEC.encode(message)) for message in messages)
    return lambda: Snapshot.of(site.metrics.totals(), 0.0).total("uplink_bytes_total") == expected


def test_every_byte_is_counted_whether_a_frame_reaches_a_replica_or_not(site: FrontSite, cleanup: ExitStack) -> None:
    peer, opening = RawPeer(site.address, cleanup), Open(0, 0, Mode.IDS, Sampling(), tuple(PROMPT))
    unknown: list[Message] = [Draft(5, 1, ()), Close(5), Fault(5, "state", "it is not open")]
    assert peer.request(hello(VOCAB))
    assert peer.request(opening)
    for message in unknown:
        peer.send(message)
    wait_for(counts_all_of(site, hello(VOCAB), opening, *unknown))


def test_the_bytes_of_an_open_that_no_replica_takes_are_counted(site: FrontSite, cleanup: ExitStack) -> None:
    peer, opening = RawPeer(site.address, cleanup), Open(0, 0, Mode.IDS, Sampling(), tuple(PROMPT))
    for replica in list(site.replicas.values()):
        replica.kill()
    wait_for(lambda: not site.front.routing.replicas)
    assert isinstance(peer.request(opening), Fault)
    wait_for(counts_all_of(site, opening))


@pytest.mark.parametrize("most", [0, 10])
def test_the_bytes_of_frames_that_are_held_are_counted_once_whether_there_is_room_or_not(
    most: int, cleanup: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front, "_MAX_HELD", most)
    with front_site(expected=2) as site:
        site.start_replica("replica-0", target())
        site.wait_for_replicas(1)
        peer = RawPeer(site.address, cleanup)
        sent: list[Message] = [Draft(5, 1, ()), Close(6)]
        for message in sent:
            peer.send(message)
        wait_for(counts_all_of(site, *sent))


def test_a_request_stays_behind_an_open_that_is_held(cleanup: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, drafts = Front._forward, list[FrameHead]()

    def noted(self: Front, peer: Peer, head: FrameHead, frame: bytes, size: int) -> None:
        if head.kind is Draft:
            drafts.append(head)
        forward(self, peer, head, frame, size)

    monkeypatch.setattr(Front, "_forward", noted)
    monkeypatch.setattr(Front, "_gathering", property(lambda _: not drafts))
    with front_site(expected=2) as site:
        site.start_replica("replica-0", target())
        site.wait_for_replicas(1)
        peer = RawPeer(site.address, cleanup)
        assert peer.request(hello(VOCAB))
        peer.send(Open(0, 0, Mode.IDS, Sampling(), tuple(PROMPT)))
        first = peer.request(Draft(0, 1, ()))
        assert [type(one) for one in (first, peer.receive())] == [Opened, Verdict]


@pytest.mark.parametrize("delivery", [Delivery.DROPPED, Delivery.GONE])
def test_the_bytes_of_a_frame_that_a_replica_does_not_get_are_counted(
    delivery: Delivery, site: FrontSite, cleanup: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InnerSocket, "send", lambda *_: delivery)
    peer, opening = RawPeer(site.address, cleanup), Open(0, 0, Mode.IDS, Sampling(), tuple(PROMPT))
    peer.send(opening)
    wait_for(counts_all_of(site, opening))


# -- drain --


def test_a_draining_station_opens_no_session_and_lets_open_ones_finish(site: FrontSite, cleanup: ExitStack) -> None:
    answer = list[int]()
    for token in session_at(site.address, IDS, cleanup).answer(TOKENS):
        answer.append(token.token_id)
        if len(answer) == 10:
            site.drain(20.0)
            late = RawPeer(site.address, cleanup)
            assert isinstance(late.request(hello(VOCAB)), Welcome)
            refusal = late.request(Open(0, 0, Mode.IDS, Sampling(), tuple(PROMPT)))
            assert isinstance(refusal, Fault)
            assert refusal.code == "closing"
    assert answer == target_alone(TARGET, PROMPT, TOKENS)
    for replica in site.replicas.values():
        replica.thread.join(10)
        assert not replica.thread.is_alive()


def test_sessions_of_a_drained_replica_finish_and_new_ones_go_elsewhere(site: FrontSite, cleanup: ExitStack) -> None:
    answer = list[int]()
    for token in session_at(site.address, IDS, cleanup).answer(TOKENS):
        answer.append(token.token_id)
        if len(answer) == 10:
            home = serving_replica(site)
            site.drain(20.0, home.name)
            other = next(one for one in site.replicas.values() if one is not home)
            late = RawPeer(site.address, cleanup)
            assert isinstance(late.request(hello(VOCAB)), Welcome)
            assert late.request(Open(0, 0, Mode.IDS, Sampling(), tuple(PROMPT))) == Opened(0, 0)
            assert other.open_sessions == 1
            late.send(Close(0))
    assert answer == target_alone(TARGET, PROMPT, TOKENS)
    home.thread.join(10)
    assert not home.thread.is_alive()


def test_a_front_that_is_told_to_drain_before_its_replicas_report_drains_them(site: FrontSite) -> None:
    site.stop_front()
    site.start_front()
    site.drain(20.0)
    for replica in site.replicas.values():
        replica.thread.join(10)
        assert not replica.thread.is_alive()


def test_a_front_that_ends_and_is_told_to_drain_meanwhile_starts_again_and_drains(cleanup: ExitStack) -> None:
    settings = front_settings()
    process = cleanup.enter_context(closing(FrontProcess(settings)))
    replica = start_replica(settings, process.start(), "replica-0", target(), cleanup)
    answer = list[int]()
    for token in session_at(process.address(30), IDS, cleanup).answer(TOKENS):
        answer.append(token.token_id)
        if len(answer) == 10:
            assert process.pid
            os.kill(process.pid, signal.SIGKILL)
            process.drain(20.0)
    assert answer == target_alone(TARGET, PROMPT, TOKENS)
    replica.thread.join(20)
    assert not replica.thread.is_alive()
    wait_for(lambda: not process.running)


# -- health --


def test_a_front_whose_loop_hangs_is_not_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monitors, check, free = list[Monitor](), Front._check, threading.Event()
    parent, child = multiprocessing.Pipe()

    def make_monitor(*given: Any) -> Monitor:
        monitors.append(Monitor(*given))
        return monitors[-1]

    def check_when_free(self: Front, now: float) -> None:
        free.wait()
        check(self, now)

    monkeypatch.setattr(front, "_DEAD_SECONDS", 1.0)
    monkeypatch.setattr(front_process, "Monitor", make_monitor)
    monkeypatch.setattr(Front, "_check", check_when_free)
    with parent, child, ExitStack() as stack:
        thread = threading.Thread(target=front_process._serve, args=(front_settings("127.0.0.1:0"), child, stack))
        stack.callback(thread.join)
        stack.callback(parent.send, ("stop",))
        stack.callback(free.set)
        thread.start()
        wait_for(lambda: bool(monitors) and not monitors[0].alive())
        free.set()
        wait_for(monitors[0].alive)


# -- imports --


@pytest.mark.parametrize("module", ["basestation.replicas.front_process", "basestation.cli"])
def test_the_front_imports_neither_pytorch_nor_ray(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers', 'ray'}} & set(sys.modules)))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert told.stdout.strip() == "[]"
