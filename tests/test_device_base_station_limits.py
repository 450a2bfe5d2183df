"""A base station that comes back with other limits: the device uses the new ones and shortens what is pending."""

from itertools import count

import pytest

from device.session.session import DeviceSession
from device.settings import DraftSettings
from protocol.errors import ContextLengthError, FaultError, LimitError
from protocol.frames import FrameCodec
from protocol.limits import Limits
from protocol.messages import Decode, Draft, Mode, Sampling
from tests.fakes import FakeDraftModel, FakeTarget, random_table, target_alone
from tests.link_pair import IDS, MemoryTransport, Station, join, open_session

TABLE = random_table(12, seed=3)
PROMPT = [1, 2]
COUNT = 60


class RestartedTransport(MemoryTransport):
    """The base station decides what a frame may hold, not the link."""

    def send(self, frame: bytes) -> None:
        try:
            super().send(frame)
        except LimitError:
            self.station.push(self.peer, frame)


def restarted_answer(
    draft_len: int | None, limits: Limits, context_length: int = 4096, mode: Mode = Mode.IDS
) -> tuple[list[int], MemoryTransport]:
    """An answer during which the base station restarts with other limits; the draft model is the target itself."""
    first = Station(FakeTarget.make(TABLE))
    second = Station(FakeTarget.make(TABLE, context_length=context_length), limits)
    model, transport = FakeDraftModel.make(TABLE), RestartedTransport(first)
    client, _ = join(first, model, transport)
    session = open_session(client, DraftSettings(mode, Sampling(), 4, draft_len), model, PROMPT)
    tokens = []
    for token in session.answer(COUNT):
        tokens.append(token.token_id)
        if len(tokens) == 20:
            transport.station = second
    return tokens, transport


@pytest.mark.parametrize("draft_len", [16, None])
@pytest.mark.parametrize("mode", [Mode.IDS, Mode.TOPK])
def test_a_smaller_draft_len_shortens_pending_drafts(draft_len: int | None, mode: Mode) -> None:
    tokens, transport = restarted_answer(draft_len, Limits(max_draft_len=3), mode=mode)
    assert tokens == target_alone(TABLE, PROMPT, COUNT)
    sent = [transport.station.codec.decode(frame) for frame in transport.uplink[-3:]]
    assert any(isinstance(message, Draft) for message in sent)


@pytest.mark.parametrize(("draft_len", "mode"), [(4, Mode.IDS), (None, Mode.IDS), (4, Mode.TARGET)])
def test_a_smaller_context_ends_the_answer_there(draft_len: int | None, mode: Mode) -> None:
    tokens, _ = restarted_answer(draft_len, Limits(), context_length=40, mode=mode)
    assert tokens == target_alone(TABLE, PROMPT, len(tokens))
    assert len(tokens) == 40 - len(PROMPT) or draft_len is None  # then more was committed before the restart


def test_a_decode_in_progress_is_shortened_to_a_smaller_context() -> None:
    tokens, transport = restarted_answer(4, Limits(), context_length=40, mode=Mode.TARGET)
    decodes = [one for one in map(transport.station.codec.decode, transport.uplink) if isinstance(one, Decode)]
    assert decodes[-1].count == 40 - len(PROMPT) - 20
    assert len(tokens) == 40 - len(PROMPT)


def test_an_answer_that_fills_the_new_context_already_ends() -> None:
    tokens, _ = restarted_answer(4, Limits(), context_length=15)
    assert tokens == target_alone(TABLE, PROMPT, len(tokens))
    assert 20 <= len(tokens) < 30


def test_the_next_turn_names_the_new_context() -> None:
    transport = RestartedTransport(Station(FakeTarget.make(TABLE)))
    model = FakeDraftModel.make(TABLE)
    client, _ = join(transport.station, model, transport)
    session = open_session(client, IDS, model, PROMPT)
    list(session.answer(20))
    transport.station = Station(FakeTarget.make(TABLE, context_length=15))
    session.extend([*session.tokens, 1])
    with pytest.raises(ContextLengthError, match=r"at most 14 \(the target's context at the base station\)"):
        list(session.answer(20))


@pytest.mark.parametrize("pace_changes", [False, True])
def test_a_limit_that_did_not_change_is_an_error(pace_changes: bool) -> None:
    transport = RestartedTransport(Station(FakeTarget.make(TABLE)))
    if pace_changes:
        ticks = count()
        transport.station.engine._clock = lambda: float(next(ticks)) ** 2  # each pass takes longer
    model = FakeDraftModel.make(TABLE)
    client, _ = join(transport.station, model, transport)
    session = open_session(client, DraftSettings(Mode.TOPK, Sampling(1.0), 8, None), model, PROMPT)
    transport.station.codec = FrameCodec(12, Limits(max_uplink_k=1))
    with pytest.raises(FaultError, match="--max-uplink-k"):
        list(session.answer(20))
    assert transport.now < 1  # at once
    assert not transport.station.engine.load.sessions  # the Fault does not name the session, which is closed
    assert bool(client.welcome.pass_seconds) is pace_changes


def open_at(station: Station) -> DeviceSession:
    model = FakeDraftModel.make(TABLE)
    return open_session(join(station, model)[0], IDS, model, PROMPT)


def test_the_stop_ids_are_the_base_stations() -> None:
    stop = target_alone(TABLE, PROMPT, 10)[-1]
    session = open_at(Station(FakeTarget.make(TABLE, stop_ids=frozenset({stop}))))
    tokens = [token.token_id for token in session.answer(COUNT)]
    assert tokens[-1] == stop
    assert stop not in tokens[:-1]
