"""Invariant 3: prompt lookup changes no answer, whatever it proposes."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from device.drafting.draft_model import SequenceModel
from device.drafting.no_draft_model import NoDraftModel
from device.session.session import DeviceSession, Origin
from device.settings import DraftSettings, UplinkSettings
from protocol.full_distribution import FullDistribution
from protocol.messages import DraftDistribution, Mode, Sampling
from protocol.sparse import SparseDistribution
from tests.fakes import FakeDraftModel, FakeTarget, blend, manifest, random_table, target_alone
from tests.invariants import lossy, token_ids_of
from tests.link_pair import MemoryTransport, Station, join, open_session
from tests.p_values import FALSE_ALARM, SMALL, answers_p_value
from tests.timed_pair import PairTimes, TimedPair

VOCAB = 6
TARGET = random_table(VOCAB, seed=1)
"""Greedy answers of so few tokens soon repeat themselves, sampled ones often."""
DRAFT = blend(TARGET, random_table(VOCAB, seed=2), 0.7)
GREEDY, SAMPLED = Sampling(), Sampling(0.8, seed=7)
COUNT = 60


def prediction_of(kind: str, answer: Sequence[int], chance: random.Random) -> list[int]:
    if kind == "right":
        return [*answer]
    if kind == "edited":
        return [token if chance.random() < 0.9 else chance.randrange(VOCAB) for token in answer]
    return [chance.randrange(VOCAB) for _ in range(2000)] if kind == "wrong" else []


def expected(sampling: Sampling, prompt: Sequence[int]) -> list[int]:
    if sampling.greedy:
        return target_alone(TARGET, prompt, COUNT)
    return token_ids_of(session_with(DraftSettings(Mode.TARGET, sampling, 1, None), prompt), COUNT)


def session_with(
    settings: DraftSettings,
    prompt: Sequence[int],
    prediction: Sequence[int] = (),
    transport: MemoryTransport | None = None,
    model: SequenceModel | None = None,
) -> DeviceSession:
    transport = transport or MemoryTransport(Station(FakeTarget.make(TARGET)))
    model = model or FakeDraftModel.make(DRAFT)
    client, _ = join(transport.station, model, transport)
    return open_session(client, settings, model, list(prompt), prediction=prediction)


@pytest.mark.parametrize("ahead", [0, None])
@pytest.mark.parametrize(
    ("mode", "sampling"), [*((mode, GREEDY) for mode in Mode), (Mode.COUPLED, SAMPLED), (Mode.TARGET, SAMPLED)]
)
def test_answers_are_the_targets_own(mode: Mode, sampling: Sampling, ahead: int | None) -> None:
    chance, looked_up = random.Random(mode), 0  # noqa: S311
    for kind in ["none", "right", "edited", "wrong"] * 3:
        times = PairTimes(*(chance.choice([0.001, 0.01, 0.05]) for _ in range(4)))
        prompt = [chance.randrange(VOCAB) for _ in range(chance.randrange(1, 12))]
        answer = expected(sampling, prompt)
        settings = DraftSettings(mode, sampling, 3, None, drafts_ahead=ahead, lookup=True)
        prediction = prediction_of(kind, answer, chance)
        session = TimedPair(TARGET, DRAFT, times).session(settings, prompt, prediction=prediction)
        tokens = list(session.answer(COUNT))
        assert [token.token_id for token in tokens] == answer, kind
        looked_up += sum(token.origin is Origin.LOOKUP for token in tokens)
    assert (looked_up > 20) is (mode is not Mode.TARGET)


@pytest.mark.parametrize("ahead", [0, 3])
@pytest.mark.parametrize("seed", range(6))
def test_losses_and_turns_change_no_answer(ahead: int, seed: int) -> None:
    """Without a draft model and with a fixed draft length, lookup drafts whenever it finds something."""
    sampling = [GREEDY, SAMPLED][seed % 2]
    settings = DraftSettings(Mode.COUPLED, sampling, 1, 5, drafts_ahead=ahead, lookup=True)
    station, chance = Station(FakeTarget.make(TARGET)), random.Random(seed)  # noqa: S311
    transport = MemoryTransport(station, up=lossy(seed), down=lossy(seed + 50))
    prompt = [1, 2, 3]
    session = session_with(settings, prompt, transport=transport, model=NoDraftModel(manifest(VOCAB)))
    for _ in range(4):
        assert token_ids_of(session, 30) == expected(sampling, prompt)[:30]
        prompt = [*prompt, *expected(sampling, prompt)[: chance.randrange(30)], chance.randrange(VOCAB)]
        session.extend(prompt, prediction=prediction_of("wrong", (), chance))
    assert session.counters.accepted > 10
    assert session.counters.drafted > session.counters.accepted


@pytest.mark.parametrize("restart_at", range(1, 50, 7))
def test_a_base_station_that_restarts_changes_no_answer(restart_at: int) -> None:
    settings = DraftSettings(Mode.IDS, GREEDY, 1, 4, drafts_ahead=None, lookup=True)
    transport = MemoryTransport(Station(FakeTarget.make(TARGET)))
    session = session_with(settings, [1, 2], transport=transport, model=NoDraftModel(manifest(VOCAB)))
    tokens = []
    for token in session.answer(COUNT):
        tokens.append(token.token_id)
        if len(tokens) == restart_at:
            transport.station = Station(FakeTarget.make(TARGET))
    assert tokens == target_alone(TARGET, [1, 2], COUNT)


PROMPT, LENGTH, SAMPLES = [0, 1, 2, 0, 1, 2, 0, 1], 4, 1000


def p_value(mode: Mode, samples: int) -> float:
    """Of the hypothesis that whole answers are distributed as the target's own."""
    sampling = Sampling(0.9)
    settings = DraftSettings(mode, sampling, 3, 3, uplink_p=1.0, lookup=True)
    model, station = NoDraftModel(manifest(3)), Station(FakeTarget.make(SMALL))
    client, _ = join(station, model)
    session = open_session(client, settings, model, PROMPT)
    counted: Counter[tuple[int, ...]] = Counter()
    for seed in range(samples):
        session.extend(PROMPT, replace(sampling, seed=seed))
        counted[tuple(token_ids_of(session, LENGTH))] += 1
    assert 0 < session.counters.accepted < session.counters.drafted
    return answers_p_value(counted, SMALL, PROMPT, sampling)


@pytest.mark.parametrize("mode", [Mode.TOPK, Mode.TOPP, Mode.FULL])
def test_sampled_answers_are_distributed_as_the_targets_own(mode: Mode) -> None:
    assert p_value(mode, SAMPLES) > FALSE_ALARM


@pytest.mark.parametrize("mode", [Mode.TOPK, Mode.FULL])
def test_a_distribution_that_the_token_was_not_chosen_from_is_detected(
    mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    def any_token(_: int, vocab_size: int, uplink: UplinkSettings | None) -> DraftDistribution:
        probs = np.ones(vocab_size) / vocab_size
        if uplink is None:
            return FullDistribution.quantize(probs)
        return SparseDistribution.quantize(vocab_size, np.arange(vocab_size), probs, uplink.steps)

    monkeypatch.setattr("device.drafting.lookup_drafter.certain_distribution", any_token)
    assert p_value(mode, SAMPLES // 4) < FALSE_ALARM
