"""Invariant 5: the uplink carries news only: the prompt once, then drafts."""

from typing import cast

from device.drafting.draft_model import DraftModel
from device.settings import DraftSettings
from protocol.messages import Close, Decode, Draft, Extend, Hello, Mode, Open
from tests.fakes import FakeDraftModel
from tests.invariants import MAX_NEW_TOKENS, PROMPT, TURNS, draft_model, every_setting, new_station, token_ids_of
from tests.link_pair import MemoryTransport, join, open_session
from tests.raw_device import CODEC


def passes_of(model: DraftModel) -> list[int]:
    return cast(FakeDraftModel, model).passes


@every_setting
def test_the_prompt_is_sent_once_and_then_only_drafts(settings: DraftSettings) -> None:
    station, model = new_station(), draft_model()
    transport = MemoryTransport(station)
    client, _ = join(station, model, transport)
    session = open_session(client, settings, model, PROMPT)
    tokens = token_ids_of(session)
    session.close()
    greeting, first, *rounds, last = [CODEC.decode(frame) for frame in transport.uplink]
    assert isinstance(greeting, Hello)
    assert isinstance(first, Open)
    assert first.prompt_ids == tuple(PROMPT)
    assert last == Close(0)
    if settings.mode is Mode.TARGET:
        assert rounds == [Decode(0, 1, MAX_NEW_TOKENS)]
        return
    assert len(rounds) == session.counters.rounds
    drafted = 0
    for message in rounds:
        assert isinstance(message, Draft)
        assert len(message.token_ids) <= (settings.draft_len or 0)
        assert len(message.distributions) == (0 if settings.mode is Mode.IDS else len(message.token_ids))
        drafted += len(message.token_ids)
    assert drafted == session.counters.drafted
    assert session.counters.accepted + session.counters.rounds == len(tokens) == MAX_NEW_TOKENS


@every_setting
def test_a_turn_of_a_conversation_sends_and_runs_only_new_tokens(settings: DraftSettings) -> None:
    station, model = new_station(), draft_model()
    transport = MemoryTransport(station)
    client, _ = join(station, model, transport)
    session = open_session(client, settings, model, PROMPT)
    conversation = [*PROMPT, *token_ids_of(session, 10)]
    for turn in TURNS:
        prompt = [*conversation, *turn]
        sent, run = len(transport.uplink), len(passes_of(model))
        session.extend(prompt)
        (extend,) = (CODEC.decode(frame) for frame in transport.uplink[sent:])
        assert isinstance(extend, Extend)
        assert (extend.start, extend.token_ids) == (len(conversation), tuple(turn))
        if settings.mode is Mode.TARGET:
            assert passes_of(model) == []
        else:  # the new tokens but the last, and the answer's last two, which may not be cached yet
            assert sum(passes_of(model)[run:]) <= len(turn) - 1 + 2
        conversation = [*prompt, *token_ids_of(session, 10)]
