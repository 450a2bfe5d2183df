"""Invariant 2: randomness is a function of (seed, position)."""

from dataclasses import replace

import pytest

from device.settings import DraftSettings
from tests.fakes import TARGET, target_alone
from tests.invariants import (
    MAX_NEW_TOKENS,
    PROMPT,
    SAMPLED,
    SAMPLED_SETTINGS,
    SETTINGS,
    answer,
    draft_model,
    every_setting,
    lossy,
    new_station,
    settings_name,
)
from tests.link_pair import MemoryTransport, join, open_session


@every_setting
def test_an_answer_does_not_depend_on_other_sessions(settings: DraftSettings) -> None:
    station = new_station()
    others = [replace(settings, sampling=replace(settings.sampling, seed=seed)) for seed in (settings.sampling.seed, 8)]
    answers: list[list[int]] = []
    streams = []
    for index, (one, prompt) in enumerate(zip([settings, *others], [PROMPT, PROMPT, [2, 2]], strict=True)):
        model = draft_model()
        client, _ = join(station, model, MemoryTransport(station, bytes([index + 1]), lossy(index), lossy(9 + index)))
        streams.append(open_session(client, one, model, prompt).answer(MAX_NEW_TOKENS))
        answers.append([])
    for tokens in zip(*streams, strict=True):
        for stream_answer, token in zip(answers, tokens, strict=True):
            stream_answer.append(token.token_id)
    assert answers[0] == answers[1] == answer(settings)
    assert answers[2] == answer(others[1], prompt=[2, 2])


@pytest.mark.parametrize("settings", SETTINGS[-6:], ids=settings_name)
def test_a_sampled_answer_is_a_function_of_its_seed(settings: DraftSettings) -> None:
    other = replace(settings, sampling=replace(SAMPLED, seed=8))
    assert answer(settings) == answer(settings)
    assert answer(settings) != answer(other)
    assert answer(settings) != target_alone(TARGET, PROMPT, MAX_NEW_TOKENS)


def test_two_sessions_of_one_device_are_independent() -> None:
    station, models = new_station(), [draft_model(), draft_model()]
    client, _ = join(station, models[0])
    streams = [
        open_session(client, settings, model, PROMPT).answer(MAX_NEW_TOKENS)
        for settings, model in zip((SETTINGS[0], SAMPLED_SETTINGS[0]), models, strict=True)
    ]
    pairs = [(one.token_id, other.token_id) for one, other in zip(*streams, strict=True)]
    assert [one for one, _ in pairs] == target_alone(TARGET, PROMPT, MAX_NEW_TOKENS)
    assert [other for _, other in pairs] == answer(SAMPLED_SETTINGS[0])
