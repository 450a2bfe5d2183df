"""An answer ends at a stop id, at the requested length or at the context length."""

from dataclasses import replace
from typing import cast

import pytest

from device.settings import DraftSettings
from protocol.errors import ContextLengthError, SettingsError
from protocol.messages import Mode
from tests.fakes import FakeDraftModel
from tests.invariants import (
    PROMPT,
    SETTINGS,
    answer,
    draft_model,
    every_setting,
    lossy,
    new_station,
    settings_name,
    token_ids_of,
)
from tests.link_pair import MemoryTransport, join, open_session


@pytest.mark.parametrize("settings", [one for one in SETTINGS if not one.block_verification], ids=settings_name)
def test_a_stop_id_is_the_last_token_of_the_answer(settings: DraftSettings) -> None:
    """In block verification the tokens before it depend on where Drafts end, and a drafted stop id ends one."""
    full = answer(settings)
    for stop in dict.fromkeys(full):
        station, model = new_station((stop,)), draft_model((stop,))
        client, _ = join(station, model, MemoryTransport(station, up=lossy(1), down=lossy(2)))
        session = open_session(client, settings, model, PROMPT)
        tokens = token_ids_of(session)
        assert tokens[-1] == stop
        assert stop not in tokens[:-1]
        assert tokens == full[: len(tokens)]


@every_setting
def test_a_conversation_continues_after_a_stop_id(settings: DraftSettings) -> None:
    stop = answer(settings)[5]
    station, model = new_station((stop,)), draft_model((stop,))
    client, _ = join(station, model)
    session = open_session(client, settings, model, PROMPT)
    conversation = [*PROMPT, *token_ids_of(session)]
    session.extend([*conversation, 7, 8])
    other_station, other_model = new_station((stop,)), draft_model((stop,))
    other_client, _ = join(other_station, other_model)
    new_session = open_session(other_client, settings, other_model, [*conversation, 7, 8])
    assert token_ids_of(session) == token_ids_of(new_session)


@every_setting
@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 6, 17])
def test_an_answer_has_the_requested_length(settings: DraftSettings, count: int) -> None:
    tokens = answer(settings, count=count)
    assert len(tokens) == count
    if settings.sampling.greedy or settings.mode is Mode.TARGET:
        assert tokens == answer(settings)[:count]


@every_setting
@pytest.mark.parametrize("draft_context", [4096, 20, 10])
def test_an_answer_ends_at_the_targets_context_length(settings: DraftSettings, draft_context: int) -> None:
    station, model = new_station(context_length=20), draft_model(context_length=draft_context)
    client, _ = join(station, model)
    session = open_session(client, settings, model, PROMPT)
    assert len(token_ids_of(session)) == 20 - len(PROMPT)
    assert token_ids_of(session) == []
    session.extend(session.tokens[:19])
    assert len(token_ids_of(session)) == 1


@every_setting
@pytest.mark.parametrize("draft_context", [1, 7, len(PROMPT), 15])
def test_beyond_the_draft_models_context_the_target_decodes_alone(settings: DraftSettings, draft_context: int) -> None:
    station, model = new_station(), draft_model(context_length=draft_context)
    client, _ = join(station, model)
    tokens = token_ids_of(open_session(client, settings, model, PROMPT))
    assert len(tokens) == len(answer(settings))
    if settings.mode.encoding is None or settings.sampling.greedy:
        assert tokens == answer(settings)
    assert cast(FakeDraftModel, model).length <= draft_context


def test_a_prompt_that_fills_the_targets_context_is_refused() -> None:
    station, model = new_station(context_length=8), draft_model()
    client, _ = join(station, model)
    with pytest.raises(ContextLengthError, match=r"8 tokens.*at most 7 \(the target's context at the base station\)"):
        open_session(client, SETTINGS[0], model, PROMPT)
    session = open_session(client, SETTINGS[0], model, PROMPT[:7])
    assert len(token_ids_of(session)) == 1
    with pytest.raises(ContextLengthError, match=r"8 tokens.*at most 7"):
        session.extend(PROMPT)


def test_a_draft_len_above_the_base_stations_limit_is_refused() -> None:
    station, model = new_station(), draft_model()
    client, _ = join(station, model)
    with pytest.raises(SettingsError, match="draft-len is 65; allowed: 1 to 64"):
        open_session(client, replace(SETTINGS[0], draft_len=65), model, PROMPT)
