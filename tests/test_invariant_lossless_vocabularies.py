"""Invariant 3, for a draft model with another vocabulary than the target: answers are the target's own."""

import random
from collections import Counter
from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
from scipy.stats import chisquare

from device.drafting.vocabulary_bridge import VocabularyBridge
from device.settings import DraftSettings
from device.text.prompt import Prompt
from protocol.limits import Limits
from protocol.messages import Mode, Sampling
from tests.fakes import FakeTarget, next_logits, random_table, target_alone
from tests.invariants import lossy, token_ids_of
from tests.link_pair import IDS, MemoryTransport, Station, join, open_session
from tests.p_values import FALSE_ALARM
from tests.slow_verify import target_probs
from tests.vocabulary_pairs import TARGET_SIZE, TARGET_TEXTS, bridged, context_of, similar_table

TARGET = random_table(TARGET_SIZE, seed=1)
PROMPT = [3, 1, 4, 7, 8]
SAMPLINGS = [Sampling(1.0, seed=3), Sampling(0.8, 5, 0.9, seed=4)]
SESSIONS = 300
COUNTS = [0, 2, 5, len(TARGET_TEXTS)]
"""Common tokens."""
DRAFTS = [*((count, True) for count in COUNTS), (5, False)]
"""Common tokens, and whether the draft model is like the target; else its logits are random."""
every_draft = pytest.mark.parametrize(("common", "similar"), DRAFTS, ids=str)


def draft_model(common: int, similar: bool) -> VocabularyBridge:
    return bridged(common, similar_table(TARGET, common) if similar else None)[0]


def answer(
    model: VocabularyBridge,
    settings: DraftSettings,
    prompt: Sequence[int] = PROMPT,
    count: int = 30,
    window: int = 1,
    loss: float = 0.0,
) -> list[int]:
    station = Station(FakeTarget.make(TARGET), Limits(window=window))
    transport = MemoryTransport(station, up=lossy(5, loss), down=lossy(6, loss)) if loss else MemoryTransport(station)
    client, _ = join(station, model, transport)
    session = open_session(client, settings, model, prompt if isinstance(prompt, Prompt) else list(prompt))
    return token_ids_of(session, count)


@every_draft
@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("draft_len", [1, 4, 8])
def test_a_greedy_answer_is_the_targets_own(mode: Mode, draft_len: int, common: int, similar: bool) -> None:
    settings = DraftSettings(mode, Sampling(), 4, draft_len)
    assert answer(draft_model(common, similar), settings) == target_alone(TARGET, PROMPT, 30)


@every_draft
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=repr)
@pytest.mark.parametrize("draft_len", [1, 4, None])
def test_a_coupled_answer_is_what_the_target_alone_samples(
    draft_len: int | None, sampling: Sampling, common: int, similar: bool
) -> None:
    expected = answer(draft_model(common, similar), DraftSettings(Mode.TARGET, sampling, 4, 4))
    assert answer(draft_model(common, similar), DraftSettings(Mode.COUPLED, sampling, 4, draft_len)) == expected


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLINGS[0]], ids=repr)
def test_drafts_ahead_a_lossy_link_and_the_draft_models_own_prompt_change_nothing(sampling: Sampling) -> None:
    expected = answer(draft_model(5, True), DraftSettings(Mode.TARGET, sampling, 4, 4))
    settings = DraftSettings(Mode.COUPLED if sampling.temperature else Mode.IDS, sampling, 4, 3)
    prompt = Prompt(PROMPT, [1, 0, 2, 9, 9, 3, 4])
    assert answer(draft_model(5, True), settings, prompt, window=4, loss=0.2) == expected


def test_similar_models_have_drafts_accepted() -> None:
    """Otherwise these tests would prove little."""
    station, model = Station(FakeTarget.make(TARGET)), draft_model(len(TARGET_TEXTS), True)
    client, _ = join(station, model)
    session = open_session(client, IDS, model, list(PROMPT))
    token_ids_of(session, 60)
    assert 0.1 < session.counters.accepted / session.counters.drafted < 1


def test_the_target_continues_alone_beyond_the_draft_models_context() -> None:
    for context_length in range(4, 24, 3):
        model, _ = bridged(2, similar_table(TARGET, 2), context_length)
        assert answer(model, IDS) == target_alone(TARGET, PROMPT, 30)
        assert len(context_of(model)) <= context_length


def test_random_sessions_give_the_targets_answers() -> None:
    """Turns that extend or replace earlier ones, with or without a prompt of the draft model's own."""
    draw = random.Random(24)  # noqa: S311 - not a secret
    modes = Counter[Mode]()
    for number in range(SESSIONS):
        common, similar = draw.choice(DRAFTS)
        sampling = Sampling() if draw.random() < 0.4 else Sampling(draw.choice([0.5, 1.0]), seed=number)
        mode = Mode.IDS if sampling.greedy else Mode.COUPLED
        settings = DraftSettings(mode, sampling, 4, draw.choice([1, 3, 6, None]))
        model, station = (
            draft_model(common, similar),
            Station(FakeTarget.make(TARGET), Limits(window=draw.choice([1, 4]))),
        )
        loss = draw.choice([0.0, 0.2])
        client, _ = join(station, model, MemoryTransport(station, up=lossy(number, loss), down=lossy(number + 1, loss)))
        tokens, session = list[int](), None
        for _ in range(draw.randrange(1, 4)):
            tokens = tokens[: draw.choice([len(tokens), len(tokens) // 2])]
            tokens += [draw.randrange(TARGET_SIZE) for _ in range(draw.randrange(1, 9))]
            own = [draw.randrange(model.manifest.graph_tokens) for _ in range(draw.randrange(12))]
            prompt, count = Prompt(tokens, own), draw.randrange(1, 12)
            if session is None:
                session = open_session(client, settings, model, prompt)
            else:
                session.extend(prompt)
            answered = token_ids_of(session, count)
            alone = DraftSettings(Mode.TARGET, sampling, 4, 4)
            assert answered == answer(draft_model(0, False), alone, tokens, count), f"session {number}"
            tokens += answered
        modes[mode] += 1
    assert min(modes[Mode.IDS], modes[Mode.COUPLED]) > SESSIONS / 4


@pytest.mark.parametrize(
    ("mode", "common", "similar"),
    [
        *product([Mode.TOPK, Mode.TOPP, Mode.FULL], [2], [True]),
        (Mode.TOPK, len(TARGET_TEXTS), True),
        (Mode.FULL, 5, False),
    ],
)
def test_sampled_answers_are_distributed_as_the_targets_own(mode: Mode, common: int, similar: bool) -> None:
    """Answers of two tokens, over many seeds at one base station."""
    samples, counts = 1200, np.zeros((TARGET_SIZE, TARGET_SIZE))
    station, model = Station(FakeTarget.make(TARGET)), draft_model(common, similar)
    client, _ = join(station, model)
    for seed in range(samples):
        settings = DraftSettings(mode, Sampling(1.0, seed=seed), 4, 1, uplink_p=0.8 if mode is Mode.TOPP else 1.0)
        session = open_session(client, settings, model, list(PROMPT))
        one, other = token_ids_of(session, 2)
        counts[one, other] += 1
        session.close()
    sampling = Sampling(1.0)
    first = target_probs(next_logits(TARGET, PROMPT), sampling)
    last = [target_probs(next_logits(TARGET, [PROMPT[-1], one]), sampling) for one in range(TARGET_SIZE)]
    exact = first[:, None] * np.array(last)
    frequent = exact * samples >= 5
    expected = np.append(exact[frequent], exact[~frequent].sum()) * samples
    observed = np.append(counts[frequent], counts[~frequent].sum())
    assert chisquare(observed, expected).pvalue > FALSE_ALARM
