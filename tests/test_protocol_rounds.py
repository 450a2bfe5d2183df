"""The session state machine: both ends agree after the same messages, and all other messages are refused."""

from dataclasses import replace
from random import Random
from typing import cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import StateError
from protocol.messages import Close, Decode, Draft, Extend, Fault, Hello, Mode, Open, Opened, Sampling, Verdict
from protocol.rounds import SessionMessage, SessionRounds, State
from protocol.sparse import SparseDistribution

STOP = 9
PROMPT = (1, 2, 3)
GREEDY, SAMPLED = Sampling(), Sampling(1.0)
CERTAIN = SparseDistribution.quantize(12, np.array([3]), np.ones(1), 1)


def open_in(mode: Mode, sampling: Sampling = GREEDY) -> Open:
    return Open(0, 0, mode, sampling, PROMPT)


OPENING: list[SessionMessage] = [open_in(Mode.IDS)]
READY: list[SessionMessage] = [*OPENING, Opened(0, 0)]
PATHS: dict[State, list[SessionMessage]] = {
    State.NEW: [],
    State.OPENING: OPENING,
    State.READY: READY,
    State.VERIFYING: [*READY, Draft(0, 1, (4, 5))],
    State.DECODING: [*READY, Decode(0, 1, 3)],
    State.EXTENDING: [*READY, Extend(0, 1, 3, (7,))],
    State.CLOSED: [*READY, Close(0)],
}
ALLOWED: dict[State, dict[type[SessionMessage], State]] = {
    State.NEW: {Open: State.OPENING},
    State.OPENING: {Opened: State.READY},
    State.READY: {Draft: State.VERIFYING, Decode: State.DECODING, Extend: State.EXTENDING},
    State.VERIFYING: {Verdict: State.READY, Draft: State.VERIFYING},
    State.DECODING: {Verdict: State.DECODING},
    State.EXTENDING: {Opened: State.READY},
    State.CLOSED: {},
}


def after(*messages: SessionMessage) -> SessionRounds:
    rounds = SessionRounds(frozenset({STOP}))
    for message in messages:
        rounds.advance(message)
    return rounds


def windowed(*messages: SessionMessage, window: int = 3) -> SessionRounds:
    rounds = SessionRounds(frozenset({STOP}), window)
    for message in messages:
        rounds.advance(message)
    return rounds


def view(rounds: SessionRounds) -> tuple[State, int, int]:
    return rounds.state, rounds.round_id, rounds.committed_len


def refuses(rounds: SessionRounds, message: SessionMessage, match: str) -> None:
    before = dict(vars(rounds))
    with pytest.raises(StateError, match=match):
        rounds.advance(message)
    assert vars(rounds) == before


def candidates(rounds: SessionRounds, shift: int = 0) -> list[SessionMessage]:
    """A message of each kind, in the expected round plus ``shift``."""
    following, awaited = rounds.next_round + shift, rounds.round_id + shift
    return [
        replace(open_in(Mode.IDS), round_id=following),
        Opened(0, awaited),
        Extend(0, following, 2, (8,)),
        Draft(0, following, (4, 5), assumed_bonus=6 if rounds.state is State.VERIFYING else None),
        Decode(0, following, 3),
        Verdict(0, awaited, 0, 6),
    ]


def test_both_ends_agree_after_each_message() -> None:
    script: list[tuple[SessionMessage, tuple[State, int, int]]] = [
        (open_in(Mode.IDS), (State.OPENING, 0, 3)),
        (Opened(0, 0), (State.READY, 1, 3)),
        (Draft(0, 1, (4, 5)), (State.VERIFYING, 1, 3)),
        (Verdict(0, 1, 1, 6), (State.READY, 2, 5)),
        (Draft(0, 2, ()), (State.VERIFYING, 2, 5)),
        (Verdict(0, 2, 0, 6), (State.READY, 3, 6)),
        (Decode(0, 3, 2), (State.DECODING, 3, 6)),
        (Verdict(0, 3, 0, 6), (State.DECODING, 4, 7)),
        (Verdict(0, 4, 0, 6), (State.READY, 5, 8)),
        (Extend(0, 5, 4, (7, 8, 9)), (State.EXTENDING, 5, 7)),
        (Opened(0, 5), (State.READY, 6, 7)),
        (Draft(0, 6, (1,)), (State.VERIFYING, 6, 7)),
        (Verdict(0, 6, 1, 2), (State.READY, 7, 9)),
        (Close(0), (State.CLOSED, 7, 9)),
    ]
    device, station = after(), after()
    for message, expected in script:
        for end in (device, station):
            end.advance(message)
            assert view(end) == expected


@st.composite
def walks(draw: st.DrawFn) -> list[tuple[SessionMessage, int]]:
    """Requests and replies, with the number of committed tokens after each."""
    walk: list[tuple[SessionMessage, int]] = [(open_in(Mode.IDS), 3), (Opened(0, 0), 3)]
    committed, round_id = 3, 1
    for _ in range(draw(st.integers(0, 12))):
        kind = draw(st.sampled_from([Draft, Decode, Extend]))
        if kind is Extend:
            start, new = draw(st.integers(0, committed)), draw(st.integers(1, 5))
            committed = start + new
            walk += [(Extend(0, round_id, start, (7,) * new), committed), (Opened(0, round_id), committed)]
            round_id += 1
        elif kind is Draft:
            drafted = draw(st.integers(0, 6))
            walk.append((Draft(0, round_id, (4,) * drafted), committed))
            accepted = draw(st.integers(0, drafted))
            committed += accepted + 1
            walk.append((Verdict(0, round_id, accepted, STOP), committed))
            round_id += 1
        else:
            count, ends = draw(st.integers(1, 5)), draw(st.booleans())
            walk.append((Decode(0, round_id, count + ends), committed))
            for index in range(count):
                committed += 1
                walk.append((Verdict(0, round_id, 0, STOP if ends and index == count - 1 else 6), committed))
                round_id += 1
    return walk


@given(walks())
@settings(deadline=None)
def test_both_ends_agree_in_any_sequence_of_rounds(walk: list[tuple[SessionMessage, int]]) -> None:
    device, station = after(), after()
    for message, committed in walk:
        device.advance(message)
        station.advance(message)
        assert view(device) == view(station)
        assert device.committed_len == committed
    assert device.state is State.READY


@pytest.mark.parametrize("state", State)
def test_a_message_that_is_not_allowed_is_refused_and_changes_nothing(state: State) -> None:
    rounds = windowed(*PATHS[state])
    assert rounds.state is state
    taken = 0
    for message in candidates(rounds):
        fresh = windowed(*PATHS[state])
        if type(message) in ALLOWED[state]:
            fresh.advance(message)
            assert fresh.state is ALLOWED[state][type(message)]
            taken += 1
        else:
            refuses(fresh, message, f"{type(message).__name__} in state {state}; allowed: ")
    assert taken == len(ALLOWED[state])


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("end", [Close(0), Fault(0, "state", "")], ids=["Close", "Fault"])
def test_close_and_fault_end_a_session_in_any_state_once(state: State, end: SessionMessage) -> None:
    rounds = after(*PATHS[state])
    if state is not State.CLOSED:
        rounds.advance(end)
    assert rounds.state is State.CLOSED
    refuses(rounds, end, "allowed: nothing")


def test_a_message_outside_sessions_is_refused() -> None:
    refuses(after(*READY), cast(SessionMessage, Hello(1, 2, bytes(32), ())), "Hello in state ready")


@pytest.mark.parametrize("state", [state for state in State if ALLOWED[state]])
@pytest.mark.parametrize("shift", [-1, 1, 1000])
def test_an_unexpected_round_is_refused(state: State, shift: int) -> None:
    rounds = after(*PATHS[state])
    for message in candidates(rounds, shift):
        if type(message) in ALLOWED[state]:
            due = message.round_id - shift  # type: ignore[union-attr]
            refuses(after(*PATHS[state]), message, f"round {due + shift}; expected round {due}")


def test_requests_of_earlier_rounds_are_old() -> None:
    rounds = after(*READY, Draft(0, 1, ()), Verdict(0, 1, 0, 6))
    assert [rounds.is_old(Draft(0, round_id, ())) for round_id in range(4)] == [True, True, False, False]


@pytest.mark.parametrize(
    ("state", "drafted"), [(State.VERIFYING, 2), (State.DECODING, 0)], ids=["of a Draft", "of a Decode"]
)
def test_a_verdict_accepts_at_most_the_drafted_tokens(state: State, drafted: int) -> None:
    rounds = after(*PATHS[state])
    refuses(rounds, Verdict(0, 1, drafted + 1, 6), f"{drafted + 1} tokens accepted of {drafted} drafted")
    rounds.advance(Verdict(0, 1, drafted, 6))
    assert rounds.committed_len == 3 + drafted + 1


def test_a_decode_after_a_draft_accepts_nothing() -> None:
    rounds = after(*PATHS[State.VERIFYING], Verdict(0, 1, 2, 6), Decode(0, 2, 1))
    refuses(rounds, Verdict(0, 2, 1, 6), "1 tokens accepted of 0")


def test_a_decode_ends_after_its_count() -> None:
    rounds = after(*READY, Decode(0, 1, 3))
    for round_id in (1, 2):
        rounds.advance(Verdict(0, round_id, 0, 6))
        assert rounds.state is State.DECODING
    rounds.advance(Verdict(0, 3, 0, 6))
    assert view(rounds) == (State.READY, 4, 6)


def test_a_decode_ends_at_a_stop_id() -> None:
    rounds = after(*READY, Decode(0, 1, 3), Verdict(0, 1, 0, 6), Verdict(0, 2, 0, STOP))
    assert view(rounds) == (State.READY, 3, 5)
    rounds.advance(Decode(0, 3, 2))
    rounds.advance(Verdict(0, 3, 0, 6))
    assert rounds.state is State.DECODING  # the count of the previous Decode is dropped


def test_a_decode_of_no_tokens_is_refused() -> None:
    refuses(after(*READY), Decode(0, 1, 0), "0 tokens; allowed: 1 or more")


@pytest.mark.parametrize(("start", "token_ids"), [(4, (7,)), (1000, (7,)), (3, ()), (0, ())])
def test_an_extend_with_a_gap_or_without_tokens_is_refused(start: int, token_ids: tuple[int, ...]) -> None:
    match = f"Extend of {len(token_ids)} tokens after the first {start}; allowed: 1 or more, after at most 3"
    refuses(after(*READY), Extend(0, 1, start, token_ids), match)


@pytest.mark.parametrize("start", [0, 1, 3])
def test_an_extend_keeps_any_number_of_committed_tokens(start: int) -> None:
    rounds = after(*READY, Extend(0, 1, start, (7, 8)), Opened(0, 1))
    assert view(rounds) == (State.READY, 2, start + 2)


def test_an_open_without_a_prompt_is_refused() -> None:
    refuses(after(), replace(open_in(Mode.IDS), prompt_ids=()), "without a prompt; allowed: 1 token or more")


def test_mode_ids_requires_temperature_0() -> None:
    refuses(after(), open_in(Mode.IDS, SAMPLED), "mode 'ids' at temperature 1.0; allowed: temperature 0")
    for mode in (Mode.TOPK, Mode.FULL, Mode.TARGET):
        assert after(open_in(mode, SAMPLED)).state is State.OPENING


def test_an_extend_may_change_the_sampling_as_its_mode_allows() -> None:
    sampled = Extend(0, 1, 3, (7,), SAMPLED)
    refuses(after(*READY), sampled, "mode 'ids' at temperature 1.0; allowed: temperature 0")
    assert after(*READY, replace(sampled, sampling=Sampling(top_k=3))).state is State.EXTENDING
    for mode in Mode:
        if mode is not Mode.IDS:
            assert after(open_in(mode), Opened(0, 0), sampled).state is State.EXTENDING
            assert after(open_in(mode, SAMPLED), Opened(0, 0), replace(sampled, sampling=GREEDY)).committed_len == 4


def test_a_draft_has_distributions_exactly_in_the_modes_that_send_them() -> None:
    without, with_distribution = Draft(0, 1, (3,)), Draft(0, 1, (3,), (CERTAIN,))
    for mode in (Mode.TOPK, Mode.FULL):
        ready = (open_in(mode, SAMPLED), Opened(0, 0))
        refuses(after(*ready), without, f"without distributions in mode '{mode}'")
        assert after(*ready, with_distribution).state is State.VERIFYING
    refuses(after(*READY), with_distribution, "with distributions in mode 'ids'")


@pytest.mark.parametrize("distributions", [(), (CERTAIN,)], ids=["ids", "distributions"])
def test_mode_target_allows_no_drafted_tokens(distributions: tuple[SparseDistribution, ...]) -> None:
    refuses(after(open_in(Mode.TARGET), Opened(0, 0)), Draft(0, 1, (3,), distributions), "mode 'target'")


@pytest.mark.parametrize("mode", Mode)
def test_an_empty_draft_requests_one_token_in_every_mode(mode: Mode) -> None:
    rounds = after(open_in(mode), Opened(0, 0), Draft(0, 1, ()), Verdict(0, 1, 0, 6))
    assert view(rounds) == (State.READY, 2, 4)


# -- the window --


FIRST = Draft(0, 1, (4, 5))
SECOND = Draft(0, 2, (6,), assumed_bonus=7)
THIRD = Draft(0, 3, (8, 8), assumed_bonus=9)


def test_drafts_with_correct_assumed_bonus_are_verified_in_order() -> None:
    rounds = windowed(*READY, FIRST, SECOND, THIRD)
    assert (rounds.in_flight, rounds.next_round) == ((FIRST, SECOND, THIRD), 4)
    rounds.advance(Verdict(0, 1, 2, 7))
    assert view(rounds) == (State.VERIFYING, 2, 6)
    rounds.advance(Verdict(0, 2, 1, 9))
    assert view(rounds) == (State.VERIFYING, 3, 8)
    rounds.advance(Verdict(0, 3, 0, 1))
    assert view(rounds) == (State.READY, 4, 9)


@pytest.mark.parametrize(
    "verdict", [Verdict(0, 1, 1, 7), Verdict(0, 1, 2, 8), Verdict(0, 1, 0, 4)], ids=["rejected", "other token", "both"]
)
def test_a_wrong_assumed_bonus_invalidates_all_later_drafts(verdict: Verdict) -> None:
    rounds = windowed(*READY, FIRST, SECOND, THIRD, verdict)
    assert rounds.in_flight == ()
    assert view(rounds) == (State.READY, 4, 3 + verdict.accepted + 1)
    for draft in (SECOND, THIRD, Draft(0, 4, (1,), assumed_bonus=1)):
        assert rounds.is_invalidated(draft)
    rounds.advance(Draft(0, 4, (1,)))
    assert view(rounds)[:2] == (State.VERIFYING, 4)


def test_a_base_station_that_missed_invalidated_drafts_accepts_the_next_one() -> None:
    for lost in range(3):
        rounds = windowed(*READY, *(FIRST, SECOND, THIRD)[: 3 - lost], Verdict(0, 1, 0, 3))
        rounds.advance(Draft(0, 4, (1,)))
        assert rounds.round_id == 4
    refuses(windowed(*READY, FIRST, Verdict(0, 1, 0, 3)), Draft(0, 5, (1,)), "round 5; expected round 2")


def test_a_draft_with_assumed_bonus_may_arrive_after_the_verdict() -> None:
    rounds = windowed(*READY, FIRST, Verdict(0, 1, 2, 7))
    assert not rounds.is_invalidated(SECOND)
    rounds.advance(SECOND)
    assert view(rounds)[:2] == (State.VERIFYING, 2)
    for verdict in (Verdict(0, 1, 2, 6), Verdict(0, 1, 1, 7)):
        late = windowed(*READY, FIRST, verdict)
        assert late.is_invalidated(SECOND)
        refuses(late, SECOND, "its assumed bonus token 7 is wrong")


def test_a_draft_without_its_base_round_is_invalidated() -> None:
    rounds = windowed(*READY, FIRST)
    assert rounds.is_invalidated(THIRD)
    rounds.advance(SECOND)
    assert not rounds.is_invalidated(THIRD)


def test_at_most_window_drafts_are_in_flight() -> None:
    refuses(
        windowed(*READY, FIRST, SECOND, THIRD),
        Draft(0, 4, (), assumed_bonus=1),
        r"4 Drafts in flight; allowed: 3 \(--window",
    )
    refuses(after(*READY, FIRST), SECOND, r"2 Drafts in flight; allowed: 1")
    refuses(windowed(*READY, FIRST), Draft(0, 2, (6,)), "without an assumed bonus token while another is in flight")


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 2)), max_size=30), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_both_ends_agree_when_drafts_are_lost_or_reordered(steps: list[tuple[bool, int]], chance: Random) -> None:
    """The device drafts ahead and the base station verifies; Drafts are lost, delayed and repeated."""
    device, station = windowed(*READY), windowed(*READY)
    sent: list[Draft] = []
    unread: list[Verdict] = []
    for drafts_ahead, accepted in steps:
        if device.state is State.READY or (drafts_ahead and len(device.in_flight) < 3):
            assumed_bonus = None if device.state is State.READY else 7
            device.advance(Draft(0, device.next_round, (4, 5), assumed_bonus=assumed_bonus))
        sent = [*sent, *device.in_flight]
        chance.shuffle(sent)
        for draft in sent[: chance.randint(0, len(sent))]:
            if draft.round_id >= station.next_round and not station.is_invalidated(draft):
                station.advance(draft)
        if station.in_flight:
            verdict = Verdict(0, station.round_id, accepted, 7 if accepted == 2 else 3)
            station.advance(verdict)
            unread.append(verdict)
        while unread and unread[0].round_id == device.round_id and device.in_flight and chance.random() < 0.7:
            device.advance(unread.pop(0))
    for verdict in unread:
        device.advance(verdict)
    assert device.committed_len == station.committed_len
    assert not device.in_flight or device.in_flight[0].round_id >= station.round_id
