"""The drafter keeps the draft model's KV cache in step with the committed tokens, and runs no token twice."""

from dataclasses import dataclass
from typing import cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device.drafting.draft_model import DraftModel
from device.drafting.drafter import Drafter, DraftResult
from device.drafting.sampling import full_distribution, sparse_distribution
from device.settings import UplinkSettings
from protocol.coupling import MAX_MARGIN
from protocol.errors import CancelledError, NonFiniteError
from protocol.messages import Mode, Sampling
from protocol.randomness import Stream, random_bits
from tests.fakes import FakeDraftModel, next_logits, random_table, target_alone
from tests.sample import BUNDLE
from tests.slow_verify import dense

VOCAB = 6
TABLE = random_table(VOCAB, seed=4)
PROMPT = [1, 2, 3, 4]
GREEDY, SAMPLED = Sampling(), Sampling(1.0, seed=5)
MODES = [(Mode.IDS, GREEDY), (Mode.TOPK, GREEDY), (Mode.TOPK, SAMPLED), (Mode.TOPP, SAMPLED), (Mode.FULL, SAMPLED)]

every_mode = pytest.mark.parametrize(("mode", "sampling"), MODES)
token_ids = st.integers(0, VOCAB - 1)


@dataclass
class Setup:
    """A drafter and its model."""

    drafter: Drafter
    model: FakeDraftModel


def uplink_of(mode: Mode) -> UplinkSettings:
    return UplinkSettings.of_mode(mode, 3, 0.7, 0)


def new_setup(mode: Mode, sampling: Sampling, stop_ids: tuple[int, ...] = ()) -> Setup:
    model = FakeDraftModel.make(TABLE, stop_ids)
    return Setup(Drafter(model, mode, sampling, uplink_of(mode)), cast(FakeDraftModel, model))


def slow_draft(mode: Mode, sampling: Sampling, tokens: list[int], draft_len: int) -> DraftResult:
    """Draft without a KV cache: the logits depend on the whole sequence."""
    drafted, distributions = list(tokens), []
    for _ in range(draft_len):
        logits = next_logits(TABLE, drafted)
        distribution = (
            full_distribution(logits, sampling)
            if mode is Mode.FULL
            else sparse_distribution(logits, sampling, uplink_of(mode))
        )
        distributions.append(distribution)
        drafted.append(distribution.sample(random_bits(sampling.seed, len(drafted), Stream.DRAFT)))
    return DraftResult(tuple(drafted[len(tokens) :]), () if mode is Mode.IDS else tuple(distributions))


@dataclass(frozen=True)
class Round:
    """A round, and the start of the next turn.

    Attributes:
        draft_len: tokens drafted.
        cache_last_token: whether the last drafted token is cached.
        accepted: most drafted tokens that are accepted.
        token_id: the recovered or bonus token.
        keep: share of the committed tokens that the next turn keeps.
        turn: tokens of the next turn's prompt; empty where none starts.
    """

    draft_len: int
    cache_last_token: bool
    accepted: int
    token_id: int
    keep: float
    turn: tuple[int, ...]


rounds = st.builds(
    Round,
    draft_len=st.integers(0, 5),
    cache_last_token=st.booleans(),
    accepted=st.integers(0, 5),
    token_id=token_ids,
    keep=st.just(1.0) | st.floats(0, 1),
    turn=st.just(()) | st.lists(token_ids, min_size=1, max_size=4).map(tuple),
)


@given(st.sampled_from(MODES), st.lists(token_ids, min_size=1, max_size=6), st.lists(rounds, max_size=8), st.booleans())
@settings(deadline=None)
def test_draft_after_any_rounds_equals_that_of_a_new_drafter(
    mode: tuple[Mode, Sampling], prompt: list[int], script: list[Round], prefill: bool
) -> None:
    setup, tokens = new_setup(*mode), list(prompt)
    for step in script:
        drafted = setup.drafter.draft(tokens, step.draft_len)
        assert drafted == new_setup(*mode).drafter.draft(tokens, step.draft_len)
        assert drafted == slow_draft(*mode, tokens, step.draft_len)
        assert setup.model.tokens == [*tokens, *drafted.token_ids[:-1]][: setup.model.length]
        if step.cache_last_token:
            setup.drafter.cache_last_token()
            assert setup.model.tokens == [*tokens, *drafted.token_ids]
        tokens += [*drafted.token_ids[: step.accepted], step.token_id]
        if step.turn:
            tokens = [*tokens[: round(step.keep * len(tokens))], *step.turn]
            if prefill:
                setup.drafter.prefill(tokens)
                assert setup.model.tokens == tokens[:-1]


@every_mode
def test_each_token_runs_once(mode: Mode, sampling: Sampling) -> None:
    setup, tokens = new_setup(mode, sampling), list(PROMPT)
    setup.drafter.prefill(tokens)
    assert setup.model.passes == [len(PROMPT) - 1]
    drafted = setup.drafter.draft(tokens, 3)
    assert setup.model.passes[1:] == [1, 1, 1]
    tokens += [*drafted.token_ids, 0]  # all accepted; the last drafted token and the bonus token have not run
    setup.drafter.draft(tokens, 3)
    assert setup.model.passes[4:] == [2, 1, 1]
    tokens.append(5 if setup.drafter.draft(tokens, 1).token_ids[0] != 5 else 4)  # rejected
    setup.drafter.draft(tokens, 2)
    assert setup.model.passes[8:] == [1, 1]


@every_mode
def test_cached_last_token_does_not_run_again(mode: Mode, sampling: Sampling) -> None:
    setup, tokens = new_setup(mode, sampling), list(PROMPT)
    tokens += [*setup.drafter.draft(tokens, 3).token_ids, 0]  # all accepted
    setup.drafter.cache_last_token()
    setup.drafter.cache_last_token()
    setup.drafter.draft(tokens, 2)
    assert setup.model.passes == [4, 1, 1, 1, 1, 1]


def test_stop_id_is_not_cached() -> None:
    setup = new_setup(Mode.IDS, GREEDY, stop_ids=tuple(range(VOCAB)))
    setup.drafter.draft(PROMPT, 3)
    setup.drafter.cache_last_token()
    assert setup.model.passes == [4]


@every_mode
def test_prefill_runs_all_but_the_last_token(mode: Mode, sampling: Sampling) -> None:
    setup = new_setup(mode, sampling)
    setup.drafter.prefill(PROMPT)
    assert setup.model.tokens == PROMPT[:-1]
    setup.drafter.prefill([*PROMPT, 5, 0])
    assert setup.model.tokens == [*PROMPT, 5]
    setup.drafter.prefill([1, 2, 0, 0])
    assert setup.model.tokens == [1, 2, 0]
    assert setup.model.passes == [3, 2, 1]


@pytest.mark.model
def test_a_prompt_that_runs_in_chunks_has_the_logits_of_one_pass() -> None:
    model = DraftModel(BUNDLE)
    prompt = np.random.default_rng(0).integers(0, model.manifest.vocab_size, 200).tolist()
    model.forward(prompt[:-1])
    in_one_pass = model.forward(prompt[-1:])
    model.rollback(0)
    passes: list[int] = []
    drafter = Drafter(model, Mode.IDS, GREEDY, uplink_of(Mode.IDS), before_pass=lambda: passes.append(model.length))
    drafter.prefill(prompt)
    assert len(passes) > 3
    assert np.array_equal(model.forward(prompt[-1:]), in_one_pass)


def test_what_is_raised_between_two_passes_of_a_prefill_leaves_the_cache_valid() -> None:
    setup = new_setup(Mode.IDS, GREEDY)
    prompt = [token_id % VOCAB for token_id in range(500)]

    cancellations = [CancelledError("nobody waits")]

    def cancel_after_two() -> None:
        if len(setup.model.passes) == 2 and cancellations:
            raise cancellations.pop()

    model = cast(DraftModel, setup.model)
    drafter = Drafter(model, Mode.IDS, GREEDY, uplink_of(Mode.IDS), before_pass=cancel_after_two)
    with pytest.raises(CancelledError):
        drafter.prefill(prompt)
    cached = len(setup.model.tokens)
    assert 0 < cached < 200
    setup.model.passes.clear()
    drafter.prefill(prompt)
    assert sum(setup.model.passes) == len(prompt) - 1 - cached
    assert drafter.draft(prompt, 3) == slow_draft(Mode.IDS, GREEDY, prompt, 3)


def test_prefill_of_one_token_or_of_cached_tokens_runs_nothing() -> None:
    setup = new_setup(Mode.IDS, GREEDY)
    setup.drafter.prefill([3])
    assert setup.model.passes == []
    setup.drafter.prefill(PROMPT)
    setup.drafter.prefill(PROMPT)
    assert setup.model.passes == [3]


def test_draft_of_no_tokens_runs_nothing() -> None:
    setup = new_setup(Mode.TOPK, SAMPLED)
    assert setup.drafter.draft(PROMPT, 0) == DraftResult((), ())
    assert setup.model.passes == []


@every_mode
def test_draft_ends_after_a_stop_id(mode: Mode, sampling: Sampling) -> None:
    full_draft = slow_draft(mode, sampling, PROMPT, 8).token_ids
    for stop in sorted(set(full_draft)):
        end = full_draft.index(stop) + 1
        setup = new_setup(mode, sampling, (stop,))
        drafted = setup.drafter.draft(PROMPT, 8)
        assert drafted.token_ids == full_draft[:end]
        assert len(drafted.distributions) == (0 if mode is Mode.IDS else end)
        assert len(setup.model.passes) == end


def test_greedy_draft_equals_the_draft_models_greedy_output() -> None:
    for mode in (Mode.IDS, Mode.TOPK, Mode.FULL):
        assert list(new_setup(mode, GREEDY).drafter.draft(PROMPT, 8).token_ids) == target_alone(TABLE, PROMPT, 8)


def test_number_of_entries_depends_on_the_mode() -> None:
    for mode, count in ((Mode.TOPK, 3), (Mode.FULL, VOCAB)):
        drafted = new_setup(mode, SAMPLED).drafter.draft(PROMPT, 4)
        assert [len(distribution) for distribution in drafted.distributions] == [count] * 4


def test_draft_depends_only_on_seed_and_preceding_tokens() -> None:
    drafted = new_setup(Mode.TOPK, SAMPLED).drafter.draft(PROMPT, 8)
    tokens = [*PROMPT, *drafted.token_ids[:3]]
    assert new_setup(Mode.TOPK, SAMPLED).drafter.draft(tokens, 5).token_ids == drafted.token_ids[3:]
    drafts_by_seed = [
        new_setup(Mode.TOPK, Sampling(1.0, seed=seed)).drafter.draft(PROMPT, 8).token_ids for seed in range(10)
    ]
    assert len(set(drafts_by_seed)) > 5


@every_mode
def test_the_margin_is_the_gap_between_the_two_highest_logits_where_none_is_sampled(
    mode: Mode, sampling: Sampling
) -> None:
    drafter, tokens = new_setup(mode, sampling).drafter, list(PROMPT)
    drafter.follow(tokens)
    for _ in range(5):
        second, first = sorted(next_logits(TABLE, tokens))[-2:]
        drafted = drafter.draft_token()
        assert drafted.margin == (min(first - second, MAX_MARGIN) if sampling.greedy else None)
        tokens.append(drafted.token_id)


def drafter_with(value: float, mode: Mode, sampling: Sampling, *token_ids: int) -> Drafter:
    """A drafter whose model gives ``value`` as the logit of these tokens."""
    table = TABLE.copy()
    table[:, :, list(token_ids)] = value
    return Drafter(FakeDraftModel.make(table), mode, sampling, uplink_of(mode))


@every_mode
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tokens", [(2,), tuple(range(VOCAB))])
def test_logits_that_are_not_finite_end_the_draft_with_a_named_error(
    mode: Mode, sampling: Sampling, value: float, tokens: tuple[int, ...]
) -> None:
    message = r"the draft model's logits are NaN or infinite after 4 tokens; export it again"
    drafter = drafter_with(value, mode, sampling, *tokens)
    for _ in range(2):  # an error leaves no state behind
        with pytest.raises(NonFiniteError, match=message):
            drafter.draft(PROMPT, 3)
    with pytest.raises(NonFiniteError, match="after 3 tokens"):
        drafter.prefill([5, *PROMPT[1:]])


@every_mode
def test_logits_that_are_all_minus_infinity_are_not_finite(mode: Mode, sampling: Sampling) -> None:
    with pytest.raises(NonFiniteError):
        drafter_with(-np.inf, mode, sampling, *range(VOCAB)).draft(PROMPT, 3)


@every_mode
@pytest.mark.parametrize("excluded", [(0,), (0, 3), tuple(range(1, VOCAB))])
def test_tokens_of_minus_infinity_are_never_drafted(mode: Mode, sampling: Sampling, excluded: tuple[int, ...]) -> None:
    drafter = drafter_with(-np.inf, mode, sampling, *excluded)
    drafter.follow(PROMPT)
    for _ in range(20):
        drafted = drafter.draft_token()
        assert drafted.token_id not in excluded
        assert drafted.distribution is None or not dense(drafted.distribution)[[*excluded]].any()
        assert drafted.margin is None or 0 <= drafted.margin <= MAX_MARGIN
