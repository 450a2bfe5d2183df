"""The bridge keeps the draft model's context in step with the target's tokens, byte for byte."""

import random
from collections.abc import Sequence

import numpy as np
import pytest

from common.token_bytes import TokenBytes
from device.drafting.drafter import Drafter
from device.drafting.vocabulary_bridge import VocabularyBridge
from device.settings import UplinkSettings
from device.text.prompt import Prompt
from protocol.messages import Mode, Sampling
from tests.vocabulary_pairs import END, SHEEP, TARGET, TARGET_SIZE, TARGET_TEXTS, bridged, context_of

COMMON = [2, 6, len(TARGET_TEXTS)]
SEQUENCES = 10_000
"""Of commits, rejections and extensions, over all draft models."""
SHEEP_IDS = [TARGET_TEXTS.index(SHEEP[:2]), TARGET_TEXTS.index(SHEEP[2:])]


def target_text(token_ids: Sequence[int]) -> bytes:
    return b"".join(TARGET.ordinary.get(token_id, b"<end>") for token_id in token_ids)


def draft_text(tokens: TokenBytes, draft_ids: Sequence[int]) -> bytes:
    return b"".join(tokens.ordinary.get(draft_id, b"<end>") for draft_id in draft_ids)


def drafter_of(bridge: VocabularyBridge, sampling: Sampling, mode: Mode = Mode.COUPLED) -> Drafter:
    return Drafter(bridge, mode, sampling, UplinkSettings(4, 1.0, 100), TARGET_SIZE, frozenset({END}))


@pytest.mark.parametrize("common", COMMON)
def test_after_any_commits_rejections_and_extensions_the_context_says_the_committed_text(common: int) -> None:
    draw = random.Random(common)  # noqa: S311 - not a secret
    bridge, tokens = bridged(common)
    for number in range(SEQUENCES // len(COMMON) + 1):
        drafter = drafter_of(bridge, Sampling(1.0, seed=number))
        committed = [draw.randrange(TARGET_SIZE) for _ in range(draw.randrange(1, 4))]
        for _ in range(draw.randrange(1, 4)):
            drafted = drafter.draft(committed, draw.randrange(1, 4)).token_ids
            assert draft_text(tokens, context_of(bridge)) == target_text(bridge.token_ids)
            accepted = drafted[: draw.randrange(len(drafted) + 1)]
            committed = [*committed, *accepted, draw.randrange(TARGET_SIZE)]
            if draw.random() < 0.2:
                committed = [*committed[: draw.randrange(len(committed))], draw.randrange(TARGET_SIZE)]
        drafter.follow(committed)
        drafter.draft_token()
        assert bridge.token_ids == committed
        assert draft_text(tokens, context_of(bridge)) == target_text(committed)


def test_only_common_tokens_are_drafted() -> None:
    bridge, tokens = bridged(3)
    logits = bridge.forward([0, 5, *SHEEP_IDS])
    known = set(tokens.ordinary.values())
    assert logits.shape == (TARGET_SIZE,)
    finite = {token_id for token_id, logit in enumerate(logits.tolist()) if np.isfinite(logit)}
    assert finite == {END, *(token_id for token_id, text in enumerate(TARGET_TEXTS) if text in known)}


def test_a_character_in_two_tokens_can_be_rolled_back_in_its_middle() -> None:
    bridge, tokens = bridged(2)
    bridge.forward([0, *SHEEP_IDS])
    bridge.rollback(2)
    assert draft_text(tokens, context_of(bridge)) == b"a" + SHEEP[:2]
    bridge.forward([1])
    assert draft_text(tokens, context_of(bridge)) == b"a" + SHEEP[:2] + b"b"


def test_the_logits_after_a_rollback_are_those_of_a_new_sequence() -> None:
    bridge, _ = bridged(4)
    bridge.forward([0, 1, 6, 9, 3])
    bridge.rollback(2)
    again, _ = bridged(4)
    assert (bridge.forward([9, 5]) == again.forward([0, 1, 9, 5])).all()


def test_a_fork_has_a_context_of_its_own() -> None:
    bridge, tokens = bridged(2)
    bridge.forward([6, 9, 2])
    fork = bridge.fork(2)
    fork.forward([0])
    bridge.forward([1])
    assert draft_text(tokens, context_of(fork)) == target_text([6, 9, 0])
    assert draft_text(tokens, context_of(bridge)) == target_text([6, 9, 2, 1])
    assert (fork.forked_length, fork.length) == (2, 3)


@pytest.mark.parametrize("most", [1, 2, 5, 64])
def test_a_prompt_is_taken_in_the_draft_models_own_form(most: int) -> None:
    for own in ([7, 1, 2], list(range(9))):
        bridge, tokens = bridged()
        drafter = drafter_of(bridge, Sampling())
        prompt = Prompt([0, 1, 2, 3, END], own)
        drafter.begin(prompt)
        while drafter.backlog([*prompt, 5]):
            drafter.prefill([*prompt, 5], most)
        assert bridge.token_ids == prompt
        assert context_of(bridge) == own
        drafter.follow([*prompt, 5])
        drafter.draft_token()
        assert draft_text(tokens, context_of(bridge)[len(own) :]) == target_text([5])


def test_the_next_turn_keeps_what_its_own_form_shares_with_the_cache() -> None:
    bridge, _ = bridged()
    own = [7, 1, 2, 3, 4, 5, 6]
    bridge.begin(Prompt([0, 1, 2, 3], own))
    bridge.forward([0, 1, 2, 3])
    bridge.forward([4])
    answered = context_of(bridge)
    bridge.begin(Prompt([0, 1, 2, 3, 4, 5, 6], [*answered, 9, 9]))
    assert context_of(bridge) == answered
    bridge.begin(Prompt([0, 1, 2, 3, 4, 5, 6], [*own[:4], 9, 9, 9, 9, 9]))
    assert context_of(bridge) == own[: len(context_of(bridge))]
    bridge.forward([0, 1, 2, 3, 4, 5, 6][bridge.length :])
    assert context_of(bridge) == [*own[:4], 9, 9, 9, 9, 9]


def test_what_leaves_a_prompt_before_its_end_is_translated_token_by_token() -> None:
    bridge, tokens = bridged()
    bridge.begin(Prompt([0, 1, 2, 3], [7, 1, 2, 3, 4, 5, 6]))
    bridge.forward([0, 1])
    bridge.forward([5, 9])
    assert draft_text(tokens, context_of(bridge)) == target_text([0, 1, 5, 9])


def test_a_token_without_a_text_leaves_the_logits_as_they_are() -> None:
    bridge, _ = bridged()
    before = bridge.forward([0, 1])
    assert (bridge.forward([TARGET_SIZE + 3]) == before).all()
    assert bridge.length == 3
    bridge.rollback(0)
    assert np.isfinite(bridge.forward([TARGET_SIZE + 3]).max())


def test_the_room_counts_the_draft_models_own_tokens() -> None:
    bridge, _ = bridged(2, context_length=20)
    assert bridge.room([0, 1]) == 18
    assert bridge.room([0, *SHEEP_IDS, 5]) == 20 - 1 - len(context_of(bridge)) - spelled_length(bridge, [*SHEEP_IDS, 5])
    prompt = Prompt([0, 1, 2], range(7))
    assert bridge.room(prompt) == 13
    bridge.begin(prompt)
    assert bridge.room([*prompt, 0]) == 12
    bridge.forward([*prompt, 0])
    assert bridge.room([*prompt, 0]) == 12
    assert bridge.room([*prompt, *[0] * 99]) == 0


def spelled_length(bridge: VocabularyBridge, token_ids: Sequence[int]) -> int:
    fork = bridge.fork(0)
    fork.forward(token_ids)
    return len(context_of(fork))
