"""Invariant 3: output tokens are the target's own.

Greedy decoding is tested here; tests/test_basestation_verify.py tests sampled verification.
"""

import pytest

from device.session.session import Origin
from device.settings import DraftSettings
from protocol.errors import SettingsError
from protocol.messages import Mode, Sampling
from tests.fakes import TARGET, target_alone
from tests.invariants import (
    GREEDY,
    MAX_NEW_TOKENS,
    PROMPT,
    SETTINGS,
    TURNS,
    answer,
    draft_model,
    every_setting,
    lossy,
    new_station,
    settings_name,
    token_ids_of,
)
from tests.link_pair import MemoryTransport, join, open_session


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("draft_len", [1, 4, 8])
@pytest.mark.parametrize("prompt", [[5], [0, 0], PROMPT, [11, 7, 3] * 9], ids=len)
def test_a_greedy_answer_is_the_targets_own(mode: Mode, draft_len: int, prompt: list[int]) -> None:
    settings = DraftSettings(mode, GREEDY, 4, draft_len)
    assert answer(settings, prompt=prompt) == target_alone(TARGET, prompt, MAX_NEW_TOKENS)


@pytest.mark.parametrize("settings", SETTINGS[:4], ids=settings_name)
def test_drafts_are_partly_accepted(settings: DraftSettings) -> None:
    """Otherwise these tests would prove little."""
    station, model = new_station(), draft_model()
    client, _ = join(station, model)
    session = open_session(client, settings, model, PROMPT)
    tokens = list(session.answer(MAX_NEW_TOKENS))
    assert {token.origin for token in tokens} == set(Origin) - {Origin.LOOKUP, Origin.UNVERIFIED}
    assert 0 < session.counters.accepted < session.counters.drafted
    assert session.counters.rounds < MAX_NEW_TOKENS
    assert sum(token.origin is Origin.ACCEPTED for token in tokens) == session.counters.accepted


@pytest.mark.parametrize("mode", [Mode.TOPK, Mode.FULL, Mode.TARGET])
@pytest.mark.parametrize("temperature", [1e-6, 1e-300, 1e-308, 5e-324])
def test_a_tiny_temperature_is_greedy_or_refused(mode: Mode, temperature: float) -> None:
    try:
        sampling = Sampling(temperature)
    except SettingsError:
        return
    assert answer(DraftSettings(mode, sampling, 4, 4)) == target_alone(TARGET, PROMPT, MAX_NEW_TOKENS)


@every_setting
def test_a_conversation_gives_the_answers_of_new_sessions(settings: DraftSettings) -> None:
    station, model = new_station(), draft_model()
    client, _ = join(station, model, MemoryTransport(station, up=lossy(5), down=lossy(6)))
    session = open_session(client, settings, model, PROMPT)
    conversation = [*PROMPT, *token_ids_of(session, 10)]
    for turn in TURNS:
        prompt = [*conversation, *turn]
        session.extend(prompt)
        tokens = token_ids_of(session, 10)
        assert tokens == answer(settings, prompt=prompt, count=10)
        conversation = [*prompt, *tokens]


@every_setting
def test_a_conversation_can_replace_earlier_tokens(settings: DraftSettings) -> None:
    station, model = new_station(), draft_model()
    client, _ = join(station, model)
    session = open_session(client, settings, model, PROMPT)
    token_ids_of(session)
    for prompt in ([*PROMPT[:5], 0, 0], PROMPT[:2], [10, 11], PROMPT, PROMPT):
        session.extend(prompt)
        assert token_ids_of(session, 15) == answer(settings, prompt=prompt, count=15)
