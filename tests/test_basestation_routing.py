"""Where sessions go: rendezvous hashing, load, lost and returning replicas."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from basestation.devices.peer import Peer
from basestation.engine.load import Load, SessionKey
from basestation.engine.pace import Pace
from basestation.replicas.inner_messages import Report, decode_peer, encode_peer
from basestation.replicas.routing import Routing
from basestation.target.served_target import ServedTarget
from basestation.target.vocabulary import Vocabulary

OWNERS = [f"owner{number}" for number in range(300)]


def report(
    name: str, sessions: list[SessionKey] | None = None, kv_share: float = 0.0, draining: bool = False
) -> Report:
    return Report(name, Load(sessions or [], kv_share), draining)


def routing_of(*names: str) -> Routing:
    routing = Routing()
    for name in names:
        routing.update(name.encode(), report(name), 0.0)
    return routing


def opened_at(routing: Routing, owner: str, session_id: int = 0) -> bytes:
    route = routing.open((owner, session_id), 0.0)
    assert route
    return route.replica


def proposals(routing: Routing) -> dict[str, str]:
    return {owner: proposed.name for owner in OWNERS if (proposed := routing.proposed(owner))}


def test_owners_spread_evenly_over_the_replicas() -> None:
    counts = Counter(proposals(routing_of("a", "b", "c")).values())
    assert set(counts) == {"a", "b", "c"}
    assert min(counts.values()) > len(OWNERS) // 5


def test_a_lost_replica_changes_the_proposal_of_its_owners_alone() -> None:
    routing = routing_of("a", "b", "c")
    before = proposals(routing)
    routing.drop(b"b")
    after = proposals(routing)
    moved = {after[owner] for owner, name in before.items() if name == "b"}
    assert moved == {"a", "c"}
    assert all(after[owner] == name for owner, name in before.items() if name != "b")


def test_a_new_session_goes_to_the_proposed_replica() -> None:
    routing = routing_of("a", "b", "c")
    proposed = routing.proposed("owner")
    assert proposed
    assert opened_at(routing, "owner") == proposed.identity


def test_one_owner_cannot_overload_its_replica() -> None:
    routing = routing_of("a", "b")
    assert set(Counter(opened_at(routing, "owner", number) for number in range(60))) == {b"a", b"b"}


def test_a_replica_with_a_full_kv_pool_gets_no_session_while_another_has_room() -> None:
    routing = routing_of("a", "b")
    routing.update(b"a", report("a", kv_share=0.95), 0.0)
    assert {opened_at(routing, owner) for owner in OWNERS[:4]} == {b"b"}


def test_a_draining_replica_gets_no_session_and_keeps_its_own() -> None:
    routing = routing_of("a", "b")
    routing.update(b"a", report("a", [("owner", 7)], draining=True), 0.0)
    assert {opened_at(routing, owner) for owner in OWNERS[:4]} == {b"b"}
    route = routing.route(("owner", 7))
    assert route
    assert route.replica == b"a"


def test_a_report_that_is_older_than_the_command_to_drain_does_not_undo_it() -> None:
    routing = routing_of("a", "b")
    routing.replicas[b"a"].draining = True
    routing.update(b"a", report("a"), 0.5)
    assert {opened_at(routing, owner) for owner in OWNERS[:4]} == {b"b"}


def test_without_replicas_no_session_is_opened() -> None:
    assert Routing().open(("owner", 0), 0.0) is None


def test_a_new_front_routes_as_the_replicas_report() -> None:
    routing = Routing()
    routing.update(b"a", report("a", [("owner", 1)]), 0.0)
    routing.update(b"b", report("b", [("owner", 2)]), 0.0)
    routes = [routing.route(("owner", session_id)) for session_id in (1, 2, 3)]
    assert [route and route.replica for route in routes] == [b"a", b"b", None]


def test_a_session_that_was_opened_elsewhere_stays_there_when_its_old_replica_returns() -> None:
    routing = routing_of("a")
    route = routing.open(("owner", 0), 0.0)
    routing.update(b"b", report("b", [("owner", 0)]), 1.0)
    assert routing.route(("owner", 0)) is route


def test_a_lost_replica_takes_its_sessions_with_it_and_no_others() -> None:
    routing = Routing()
    routing.update(b"a", report("a", [("owner", 1)]), 0.0)
    routing.update(b"b", report("b", [("owner", 2)]), 0.0)
    assert [key for key, _ in routing.drop(b"a")] == [("owner", 1)]
    assert routing.route(("owner", 1)) is None
    assert routing.route(("owner", 2)) is not None


def test_a_replica_that_reports_nothing_for_long_is_silent() -> None:
    routing = routing_of("a", "b")
    routing.update(b"b", report("b"), 2.0)
    assert routing.silent(2.5) == []
    assert routing.silent(3.5) == [b"a"]


def test_a_route_is_forgotten_once_its_replica_has_not_reported_the_session_for_long() -> None:
    routing = routing_of("a")
    routing.open(("owner", 0), 0.0)
    routing.update(b"a", report("a"), 1.0)
    assert routing.route(("owner", 0))
    routing.update(b"a", report("a"), 6.0)
    assert routing.route(("owner", 0)) is None


def test_a_report_survives_the_link() -> None:
    vocabulary = Vocabulary({"a": 0, "ß\n": 1}, 2, frozenset({1}))
    target = ServedTarget("model", 100, vocabulary, has_grammars=True)
    sent = Report("a", Load([("owner", 3)], 0.5, Pace(0.1, 0.2)), True, target, "metrics\n")
    received = Report.decode(sent.encode())
    assert received == sent
    assert received.target
    assert received.target.vocabulary.hash_of_first(2) == vocabulary.hash_of_first(2)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"context_length": 50}, ""),
        ({"name": "model-int8"}, "its target is 'model-int8', that of the others 'model'"),
        ({"vocabulary": Vocabulary({"a": 0, "b": 1}, 2, frozenset({0}))}, "another vocabulary or other stop ids"),
        ({"has_grammars": False}, "cannot compile grammars"),
    ],
    ids=lambda one: next(iter(one), "") if isinstance(one, dict) else "",
)
def test_only_a_target_that_serves_devices_as_well_stands_in_for_another(change: dict[str, Any], reason: str) -> None:
    target = ServedTarget("model", 100, Vocabulary({"a": 0, "b": 1}, 2, frozenset({1})), has_grammars=True)
    other = replace(target, **change)
    assert reason in target.obstacle(other)
    assert bool(target.obstacle(other)) == bool(reason)


def test_a_target_with_grammars_stands_in_for_one_without() -> None:
    target = ServedTarget("model", 100, Vocabulary({"a": 0}, 1, frozenset()), has_grammars=False)
    assert target.obstacle(replace(target, has_grammars=True)) == ""


def test_a_peer_survives_the_link() -> None:
    for peer in (Peer("k" * 40, b"\x01\x00 \xff", "kitchen", 5), Peer.without_key(bytes(255))):
        assert decode_peer(encode_peer(peer)) == peer
