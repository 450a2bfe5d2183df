"""What a front admits: replicas with the inner key and the same target, and messages of devices within the limits."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest

from basestation.logs import LogFormat
from basestation.replicas.front import FrontOptions
from basestation.replicas.front_process import FrontProcess, FrontSettings
from basestation.replicas.inner_link import InnerKey
from protocol.errors import SettingsError
from protocol.limits import Limits
from protocol.messages import Fault, Mode, Open, Opened, Sampling, Welcome
from tests.fakes import PROMPT, TARGET, VOCAB, FakeTarget, random_table
from tests.front_site import FrontSite, front_settings, front_site, start_replica, two_replicas
from tests.raw_device import hello
from tests.raw_peer import RawPeer
from tests.serving import ANY_PORT
from tests.wait import wait_for

ANOTHER_VOCABULARY = "its target 'table' has another vocabulary or other stop ids than that of the others"


@pytest.fixture
def site() -> Iterator[FrontSite]:
    with two_replicas() as site:
        yield site


@pytest.fixture
def cleanup() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_a_replica_without_the_inner_key_is_not_admitted(site: FrontSite) -> None:
    site.start_replica("stranger", FakeTarget.make(TARGET), InnerKey.new())
    known = site.start_replica("replica-2", FakeTarget.make(TARGET))
    wait_for(lambda: len(site.front.routing.replicas) == 3)
    assert {one.name for one in site.front.routing.replicas.values()} == {"replica-0", "replica-1", known.name}


def test_a_replica_with_another_target_gets_no_sessions(site: FrontSite) -> None:
    site.start_replica("other", FakeTarget.make(random_table(VOCAB + 1, seed=3)))
    site.start_replica("replica-2", FakeTarget.make(TARGET))
    wait_for(lambda: len(site.front.routing.replicas) == 3)
    wait_for(lambda: site.refused == {"other": ANOTHER_VOCABULARY})
    assert "other" not in {one.name for one in site.front.routing.replicas.values()}


def test_the_parent_of_a_front_hears_which_replica_is_refused_and_why(cleanup: ExitStack) -> None:
    settings, refused = front_settings(), dict[str, str]()
    process = cleanup.enter_context(closing(FrontProcess(settings)))
    address = process.start()
    for name, model in (
        ("replica-0", FakeTarget.make(TARGET)),
        ("other", FakeTarget.make(random_table(VOCAB + 1, seed=3))),
    ):
        start_replica(settings, address, name, model, cleanup)
        process.address(30)

    def has_heard() -> bool:
        refused.update(process.refused())
        return bool(refused)

    wait_for(has_heard)
    assert refused == {"other": ANOTHER_VOCABULARY}
    assert list(process.replicas) == ["replica-0"]


def test_a_front_whose_address_for_metrics_is_taken_tells_its_parent_which_option_is_wrong() -> None:
    listening = FrontOptions(ANY_PORT, ANY_PORT, InnerKey.new(), 1, Limits())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        settings = FrontSettings(listening, "table", None, False, 2**30, address, LogFormat.TEXT)
        with (
            closing(FrontProcess(settings)) as process,
            pytest.raises(SettingsError, match=f"metrics-bind is .{address}"),
        ):
            process.start()


@pytest.mark.parametrize("lengths", [(64, 4096), (4096, 64)], ids=str)
def test_devices_are_told_the_smallest_context_length_of_the_replicas(
    lengths: tuple[int, int], cleanup: ExitStack
) -> None:
    with front_site() as site:
        for number, length in enumerate(lengths):
            site.start_replica(f"replica-{number}", FakeTarget.make(TARGET, context_length=length))
            site.wait_for_replicas(number + 1)
        welcome = RawPeer(site.address, cleanup).request(hello(VOCAB))
    assert isinstance(welcome, Welcome)
    assert welcome.context_length == 64
    assert site.refused == {}


@pytest.mark.parametrize("later", [None, 2048])
def test_devices_are_told_a_longer_context_length_once_the_replica_with_the_smallest_is_gone_or_has_more(
    later: int | None, cleanup: ExitStack
) -> None:
    with front_site() as site:
        site.start_replica("replica-0", FakeTarget.make(TARGET, context_length=4096))
        small = site.start_replica("replica-1", FakeTarget.make(TARGET, context_length=64))
        site.wait_for_replicas(2)
        peer = RawPeer(site.address, cleanup)

        def told() -> int:
            welcome = peer.request(hello(VOCAB))
            assert isinstance(welcome, Welcome)
            return welcome.context_length

        assert told() == 64
        small.kill()
        if later:
            site.start_replica("replica-1", FakeTarget.make(TARGET, context_length=later))
        wait_for(lambda: told() == (later or 4096))
        assert peer.request(Open(0, 0, Mode.IDS, Sampling(), (3,) * 100)) == Opened(0, 0)


def test_a_device_that_was_told_a_longer_context_greets_again_before_its_session_is_at_a_replica_with_less(
    cleanup: ExitStack,
) -> None:
    with front_site(expected=1) as site:
        site.start_replica("replica-0", FakeTarget.make(TARGET, context_length=4096))
        site.wait_for_replicas(1)
        peer = RawPeer(site.address, cleanup)
        openings = [Open(number, 0, Mode.IDS, Sampling(), tuple(PROMPT)) for number in range(2)]
        assert isinstance(peer.request(hello(VOCAB)), Welcome)
        assert peer.request(openings[0]) == Opened(0, 0)
        site.start_replica("replica-1", FakeTarget.make(TARGET, context_length=64))
        site.wait_for_replicas(2)
        assert peer.request(openings[0]) == Opened(0, 0)  # its own replica goes on
        site.drain(20.0, "replica-0")
        refusal = peer.request(openings[1])
        assert isinstance(refusal, Fault)
        assert (refusal.session_id, refusal.code) == (1, "unknown_session")
        welcome = peer.request(hello(VOCAB))
        assert isinstance(welcome, Welcome)
        assert welcome.context_length == 64
        assert peer.request(openings[1]) == Opened(1, 0)


@pytest.mark.parametrize("frame", [b"", b"\xc1", b"\x91\x05", b"\x92\x63\x00", b"\x93\x05\xff\x00"])
def test_bytes_that_are_no_message_get_a_fault(site: FrontSite, cleanup: ExitStack, frame: bytes) -> None:
    peer = RawPeer(site.address, cleanup)
    refusal = peer.request(frame)
    assert isinstance(refusal, Fault)
    assert refusal.code == "frame"
    assert isinstance(peer.request(hello(VOCAB)), Welcome)


def test_a_flood_is_limited_at_the_front(cleanup: ExitStack) -> None:
    with front_site(Limits(max_requests_per_second=5), expected=1) as site:
        site.start_replica("replica-0", FakeTarget.make(TARGET))
        site.wait_for_replicas(1)
        peer = RawPeer(site.address, cleanup)
        for _ in range(40):
            peer.send(hello(VOCAB))
        replies = list(iter(lambda: peer.receive(0.5), None))
    faults = [(one.code, one.session_id, one.retry_seconds) for one in replies if isinstance(one, Fault)]
    assert faults == [("limit", None, 2)]
    assert sum(isinstance(reply, Welcome) for reply in replies) < 30
