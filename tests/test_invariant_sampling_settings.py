"""Sampling settings hold on both ends: the answer is the target's own with the same settings (invariant 3)."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from device.session.session import DeviceSession, Origin
from device.settings import DraftSettings
from protocol.errors import SettingsError, StateError
from protocol.messages import Decode, Draft, Extend, Hello, Message, Mode, Open, Opened, Sampling, Verdict
from protocol.rounds import SessionRounds
from tests.fakes import FakeDraftModel, FakeTarget, blend, random_table
from tests.invariants import token_ids_of
from tests.link_pair import IDS, MemoryTransport, Station, join, open_session
from tests.slow_sampling import slow_answer

VOCAB = 24
TARGET = random_table(VOCAB, seed=1)
DRAFT = blend(TARGET, random_table(VOCAB, seed=2), 0.7)
STOPS = (3, 17)
PROMPTS = [np.random.default_rng(seed).integers(0, VOCAB, 2 + seed).tolist() for seed in range(20)]
SETTINGS = {
    "bias": Sampling(logit_bias=((5, 3.0), (7, -100.0))),
    "repetition": Sampling(repetition_penalty=1.5),
    "presence": Sampling(presence_penalty=1.0),
    "frequency": Sampling(frequency_penalty=0.5),
    "min_tokens": Sampling(min_tokens=25),
    "ignore_eos": Sampling(ignore_eos=True),
    "stop_token_ids": Sampling(stop_token_ids=(9, 11)),
    "all": Sampling(
        min_p=0.1,
        repetition_penalty=1.2,
        presence_penalty=0.5,
        frequency_penalty=0.2,
        logit_bias=((3, 2.0), (9, 2.0)),
        min_tokens=12,
        ignore_eos=True,
        stop_token_ids=(9,),
    ),
}
every_setting = pytest.mark.parametrize("sampling", SETTINGS.values(), ids=SETTINGS)


def new_station() -> Station:
    return Station(FakeTarget.make(TARGET, frozenset(STOPS)))


def session_of(
    settings: DraftSettings, prompt: Sequence[int], transport: MemoryTransport | None = None
) -> DeviceSession:
    model = FakeDraftModel.make(DRAFT)
    transport = transport or MemoryTransport(new_station())
    return open_session(join(transport.station, model, transport)[0], settings, model, list(prompt))


@pytest.mark.parametrize("mode", Mode)
@every_setting
def test_greedy_answers_are_those_of_the_slow_twin(mode: Mode, sampling: Sampling) -> None:
    for index, prompt in enumerate(PROMPTS if mode is Mode.IDS else PROMPTS[:3]):
        settings = DraftSettings(mode, sampling, 4, [4, None, 8][index % 3], drafts_ahead=[0, 0, 2][index % 3])
        assert token_ids_of(session_of(settings, prompt)) == slow_answer(TARGET, sampling, prompt, 40, STOPS)


@every_setting
def test_coupled_answers_are_the_targets_own_with_the_same_seed(sampling: Sampling) -> None:
    for seed, prompt in enumerate(PROMPTS[:3]):
        sampled = replace(sampling, temperature=0.9, seed=seed)
        alone = token_ids_of(session_of(DraftSettings(Mode.TARGET, sampled, 4, None), prompt))
        for draft_len, ahead in ((4, 0), (8, 2)):
            settings = DraftSettings(Mode.COUPLED, sampled, 4, draft_len, drafts_ahead=ahead)
            assert token_ids_of(session_of(settings, prompt)) == alone


@every_setting
def test_a_draft_model_equal_to_the_target_is_accepted(sampling: Sampling) -> None:
    """Otherwise the device would draft without the settings."""
    model = FakeDraftModel.make(TARGET)
    settings = DraftSettings(Mode.IDS, sampling, 4, 4)
    session = open_session(join(new_station(), model)[0], settings, model, PROMPTS[3])
    assert {token.origin for token in session.answer(40)} <= {Origin.ACCEPTED, Origin.BONUS}


@pytest.mark.parametrize("mode", [Mode.IDS, Mode.TARGET])
@every_setting
def test_a_base_station_that_restarts_continues_the_answer(mode: Mode, sampling: Sampling) -> None:
    transport = MemoryTransport(new_station())
    session = session_of(DraftSettings(mode, sampling, 4, 4), PROMPTS[4], transport)
    tokens = session.answer(40)
    answer = [next(tokens).token_id for _ in range(2)]
    transport.station = new_station()
    answer += [token.token_id for token in tokens]
    assert answer == slow_answer(TARGET, sampling, PROMPTS[4], 40, STOPS)


@every_setting
def test_the_next_turn_may_have_other_settings(sampling: Sampling) -> None:
    session = session_of(IDS, PROMPTS[5])
    for settings in (sampling, Sampling(), sampling):
        prompt = [*session.tokens, 1, 2]
        session.extend(prompt, settings)
        assert token_ids_of(session, 20) == slow_answer(TARGET, settings, prompt, 20, STOPS)


def test_stop_token_ids_end_a_decode_in_both_state_machines() -> None:
    rounds = SessionRounds(frozenset({2}))
    sampling = Sampling(ignore_eos=True, stop_token_ids=(5,))
    messages: list[Message] = [Open(0, 0, Mode.TARGET, sampling, (1,)), Opened(0, 0), Decode(0, 1, 9)]
    messages += [Verdict(0, 1, 0, 2), Verdict(0, 2, 0, 5)]
    messages += [Extend(0, 3, 0, (4,), Sampling()), Opened(0, 3), Decode(0, 4, 9), Verdict(0, 4, 0, 5)]
    messages += [Verdict(0, 5, 0, 2), Draft(0, 6, ())]
    for message in messages:
        rounds.advance(message)  # type: ignore[arg-type]


def test_an_answer_longer_than_the_prompt_is_refused() -> None:
    with pytest.raises(StateError, match="an answer of 2 tokens in 2"):
        SessionRounds(frozenset()).advance(Open(0, 0, Mode.IDS, Sampling(), (1, 2), 2))


class Version4Transport(MemoryTransport):
    """A transport to a base station of version 4, which ignores later sampling settings."""

    def send(self, frame: bytes) -> None:
        message = self.station.codec.decode(frame)
        super().send(self.station.codec.encode(replace(message, version=4)) if isinstance(message, Hello) else frame)


@every_setting
def test_an_older_base_station_gets_no_settings_that_it_would_ignore(sampling: Sampling) -> None:
    name = sampling.later_settings[0]
    with pytest.raises(SettingsError, match=f"{name} is .* the base station speaks protocol version 4, this needs 5"):
        session_of(DraftSettings(Mode.IDS, sampling, 4, 4), [1], Version4Transport(new_station()))
    session = session_of(IDS, [1], Version4Transport(new_station()))
    with pytest.raises(SettingsError, match=name):
        session.extend([1, 2], sampling)
    session.extend([1, 2])
    assert token_ids_of(session) == slow_answer(TARGET, Sampling(), [1, 2], 40, STOPS)


@pytest.mark.parametrize("sampling", [Sampling(logit_bias=((VOCAB, 1.0),)), Sampling(stop_token_ids=(VOCAB,))])
def test_tokens_that_the_target_does_not_have_are_refused(sampling: Sampling) -> None:
    with pytest.raises(SettingsError, match=f"{sampling.later_settings[0]} is {VOCAB}; .* 0 to {VOCAB - 1}"):
        session_of(DraftSettings(Mode.IDS, sampling, 4, 4), [1])


@pytest.mark.parametrize(
    "values",
    [
        {"min_p": -0.1},
        {"min_p": float("nan")},
        {"repetition_penalty": 0.0},
        {"presence_penalty": 2.1},
        {"frequency_penalty": float("nan")},
        {"logit_bias": ((1, float("inf")),)},
        {"logit_bias": ((1, 1.0), (1, 2.0))},
        {"logit_bias": tuple((token_id, 1.0) for token_id in range(1025))},
        {"min_tokens": -1},
        {"stop_token_ids": tuple(range(65))},
    ],
    ids=str,
)
def test_values_that_are_not_allowed_are_refused_by_name(values: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match=next(iter(values))):
        Sampling(**values)  # type: ignore[arg-type]
