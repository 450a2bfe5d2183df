"""The drafter keeps the draft model's cache in step with whatever is committed, and runs nothing twice."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device.drafter import Drafter, DraftResult
from device.sampling import Uplink, draft_distribution, full_distribution
from protocol.coupling import MAX_MARGIN
from protocol.messages import Mode, Sampling
from protocol.randomness import Stream, random_bits
from tests.fakes import FakeDraftModel, next_logits, random_table, target_alone

VOCAB = 6
TABLE = random_table(VOCAB, seed=4)
PROMPT = [1, 2, 3, 4]
GREEDY, SAMPLED = Sampling(), Sampling(1.0, seed=5)
MODES = [(Mode.IDS, GREEDY), (Mode.TOPK, GREEDY), (Mode.TOPK, SAMPLED), (Mode.TOPP, SAMPLED), (Mode.FULL, SAMPLED)]

every_mode = pytest.mark.parametrize(("mode", "sampling"), MODES)
token_ids = st.integers(0, VOCAB - 1)


@dataclass
class Fresh:
    """A drafter that has run nothing yet, and its model."""

    drafter: Drafter
    model: FakeDraftModel


def uplink_of(mode: Mode) -> Uplink:
    return Uplink.of_mode(mode, 3, 0.7, 0)


def fresh(mode: Mode, sampling: Sampling, stop_ids: tuple[int, ...] = ()) -> Fresh:
    model = FakeDraftModel.make(TABLE, stop_ids)
    return Fresh(Drafter(model, mode, sampling, uplink_of(mode)), cast(FakeDraftModel, model))


def slow_draft(mode: Mode, sampling: Sampling, tokens: list[int], draft_len: int) -> DraftResult:
    """Without a cache: the whole sequence is looked at for each token."""
    drafted, distributions, margins = list(tokens), [], []
    for _ in range(draft_len):
        logits = next_logits(TABLE, drafted)
        one = (
            full_distribution(logits, sampling)
            if mode is Mode.FULL
            else draft_distribution(logits, sampling, uplink_of(mode))
        )
        distributions.append(one)
        second, first = sorted(logits)[-2:]
        margins.append(min(first - second, MAX_MARGIN) if sampling.greedy else None)
        drafted.append(one.sample(random_bits(sampling.seed, len(drafted), Stream.DRAFT)))
    return DraftResult(tuple(drafted[len(tokens) :]), () if mode is Mode.IDS else tuple(distributions), tuple(margins))


@dataclass(frozen=True)
class Round:
    """Draft, perhaps run ahead; ``accepted`` of the drafted tokens stand, ``token_id`` follows; perhaps a new turn."""

    draft_len: int
    ahead: bool
    accepted: int
    token_id: int
    keep: float
    turn: tuple[int, ...]


rounds = st.builds(
    Round,
    draft_len=st.integers(0, 5),
    ahead=st.booleans(),
    accepted=st.integers(0, 5),
    token_id=token_ids,
    keep=st.just(1.0) | st.floats(0, 1),
    turn=st.just(()) | st.lists(token_ids, min_size=1, max_size=4).map(tuple),
)


@given(st.sampled_from(MODES), st.lists(token_ids, min_size=1, max_size=6), st.lists(rounds, max_size=8), st.booleans())
@settings(deadline=None)
def test_after_any_rounds_a_draft_is_that_of_a_fresh_drafter(
    mode: tuple[Mode, Sampling], prompt: list[int], script: list[Round], prefill: bool
) -> None:
    kept, tokens = fresh(*mode), list(prompt)
    for one in script:
        drafted = kept.drafter.draft(tokens, one.draft_len)
        assert drafted == fresh(*mode).drafter.draft(tokens, one.draft_len) == slow_draft(*mode, tokens, one.draft_len)
        assert kept.model.tokens == [*tokens, *drafted.token_ids[:-1]][: kept.model.length]
        if one.ahead:
            kept.drafter.run_ahead()
            assert kept.model.tokens == [*tokens, *drafted.token_ids]
        tokens += [*drafted.token_ids[: one.accepted], one.token_id]
        if one.turn:
            tokens = [*tokens[: round(one.keep * len(tokens))], *one.turn]
            if prefill:
                kept.drafter.prefill(tokens)
                assert kept.model.tokens == tokens[:-1]


@every_mode
def test_a_round_runs_each_token_once(mode: Mode, sampling: Sampling) -> None:
    """After the prompt: a pass for each drafted token, and nothing that was run and stands is run again."""
    one, tokens = fresh(mode, sampling), list(PROMPT)
    one.drafter.prefill(tokens)
    assert one.model.passes == [len(PROMPT) - 1]
    drafted = one.drafter.draft(tokens, 3)
    assert one.model.passes[1:] == [1, 1, 1]
    tokens += [*drafted.token_ids, 0]  # all stand: the last drafted token and the bonus were not run
    one.drafter.draft(tokens, 3)
    assert one.model.passes[4:] == [2, 1, 1]
    tokens.append(5 if one.drafter.draft(tokens, 1).token_ids[0] != 5 else 4)  # none stands
    one.drafter.draft(tokens, 2)
    assert one.model.passes[8:] == [1, 1]


@every_mode
def test_what_was_run_ahead_is_not_run_again(mode: Mode, sampling: Sampling) -> None:
    one, tokens = fresh(mode, sampling), list(PROMPT)
    tokens += [*one.drafter.draft(tokens, 3).token_ids, 0]  # all stand
    one.drafter.run_ahead()
    one.drafter.run_ahead()
    one.drafter.draft(tokens, 2)
    assert one.model.passes == [4, 1, 1, 1, 1, 1]


def test_nothing_is_run_ahead_behind_a_stop_id() -> None:
    one = fresh(Mode.IDS, GREEDY, stop_ids=tuple(range(VOCAB)))
    one.drafter.draft(PROMPT, 3)
    one.drafter.run_ahead()
    assert one.model.passes == [4]


@every_mode
def test_prefill_runs_all_but_the_last_token(mode: Mode, sampling: Sampling) -> None:
    one = fresh(mode, sampling)
    one.drafter.prefill(PROMPT)
    assert one.model.tokens == PROMPT[:-1]
    one.drafter.prefill([*PROMPT, 5, 0])
    assert one.model.tokens == [*PROMPT, 5]
    one.drafter.prefill([1, 2, 0, 0])
    assert one.model.tokens == [1, 2, 0]
    assert one.model.passes == [3, 2, 1]


def test_prefill_of_one_token_or_of_what_is_cached_runs_nothing() -> None:
    one = fresh(Mode.IDS, GREEDY)
    one.drafter.prefill([3])
    assert one.model.passes == []
    one.drafter.prefill(PROMPT)
    one.drafter.prefill(PROMPT)
    assert one.model.passes == [3]


def test_a_draft_of_no_tokens_runs_nothing() -> None:
    one = fresh(Mode.TOPK, SAMPLED)
    assert one.drafter.draft(PROMPT, 0) == DraftResult((), (), ())
    assert one.model.passes == []


@every_mode
def test_a_draft_ends_after_a_stop_id(mode: Mode, sampling: Sampling) -> None:
    unstopped = slow_draft(mode, sampling, PROMPT, 8).token_ids
    for stop in sorted(set(unstopped)):
        end = unstopped.index(stop) + 1
        one = fresh(mode, sampling, (stop,))
        drafted = one.drafter.draft(PROMPT, 8)
        assert drafted.token_ids == unstopped[:end]
        assert len(drafted.distributions) == (0 if mode is Mode.IDS else end)
        assert len(one.model.passes) == end


def test_greedy_drafts_are_the_draft_models_own_answer() -> None:
    for mode in (Mode.IDS, Mode.TOPK, Mode.FULL):
        assert list(fresh(mode, GREEDY).drafter.draft(PROMPT, 8).token_ids) == target_alone(TABLE, PROMPT, 8)


def test_distributions_have_the_entries_that_the_mode_sends() -> None:
    for mode, count in ((Mode.TOPK, 3), (Mode.FULL, VOCAB)):
        drafted = fresh(mode, SAMPLED).drafter.draft(PROMPT, 4)
        assert [len(one) for one in drafted.distributions] == [count] * 4


def test_a_draft_depends_on_the_seed_and_on_the_positions_before_it_alone() -> None:
    drafted = fresh(Mode.TOPK, SAMPLED).drafter.draft(PROMPT, 8)
    tokens = [*PROMPT, *drafted.token_ids[:3]]
    assert fresh(Mode.TOPK, SAMPLED).drafter.draft(tokens, 5).token_ids == drafted.token_ids[3:]
    others = [fresh(Mode.TOPK, Sampling(1.0, seed=seed)).drafter.draft(PROMPT, 8).token_ids for seed in range(10)]
    assert len(set(others)) > 5


@every_mode
def test_drafting_ends_where_it_is_told_to(mode: Mode, sampling: Sampling) -> None:
    whole = fresh(mode, sampling).drafter.draft(PROMPT, 5)
    asked: list[tuple[float | None, ...]] = []

    def should_continue(margins: Sequence[float | None]) -> bool:
        asked.append(tuple(margins))
        return len(margins) < 3

    drafted = fresh(mode, sampling).drafter.draft(PROMPT, 5, should_continue)
    assert drafted.token_ids == whole.token_ids[:3]
    assert asked == [whole.margins[:count] for count in range(4)]
