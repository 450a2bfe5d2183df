"""The masks of a grammar on the device, where the draft model does not know all of the target's tokens."""

from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest

from common.grammar import Grammar, lark_grammar
from device.drafting.draft_model import SequenceModel
from device.drafting.drafter import DraftedToken, Drafter
from device.settings import UplinkSettings
from protocol.messages import Mode, Sampling
from tests.fakes import FakeDraftModel, next_logits, random_table
from tests.json_tokens import COMPILER, PIECES, STOP
from tests.vocabulary_pairs import TARGET_SIZE, bridged

TEXT = lark_grammar('start: ("a" | "b" | "c")+ "x"')
VOCAB = len(PIECES)
PROMPT = [1, 2, 3]
MODES = [
    (Mode.IDS, Sampling(grammar=TEXT)),
    (Mode.COUPLED, Sampling(1.0, grammar=TEXT)),
    (Mode.COUPLED, Sampling(1.0, top_p=0.9, grammar=TEXT)),
    (Mode.TOPK, Sampling(1.0, grammar=TEXT)),
    (Mode.TOPP, Sampling(1.0, grammar=TEXT)),
    (Mode.FULL, Sampling(1.0, grammar=TEXT)),
]
every_mode = pytest.mark.parametrize(("mode", "sampling"), MODES)


class FixedMask:
    """A grammar that always allows the same tokens."""

    error = ""

    def __init__(self, token_ids: list[int]) -> None:
        self._mask = np.zeros(TARGET_SIZE, np.bool_)
        self._mask[token_ids] = True

    def follow(self, tokens: list[int]) -> bool:
        return True

    def forced(self) -> None:
        return None

    def allowed(self) -> npt.NDArray[np.bool_]:
        return self._mask


def draft(model: SequenceModel, mode: Mode, sampling: Sampling, grammar: Any, vocab_size: int) -> list[DraftedToken]:
    drafter = Drafter(model, mode, sampling, UplinkSettings.of_mode(mode, 3, 0.7, 0), vocab_size, frozenset({STOP}))
    drafter.grammar, drafter.answer_start = cast(Grammar, grammar), len(PROMPT)
    drafter.follow(PROMPT)
    drafted = [drafter.draft_token()]
    while len(drafted) < 4 and drafted[-1].token_id not in drafter.stop_ids:
        drafted.append(drafter.draft_token())
    return drafted


@every_mode
def test_a_draft_model_without_the_last_tokens_drafts_within_the_grammar(mode: Mode, sampling: Sampling) -> None:
    table = random_table(VOCAB, seed=1)
    drafted = draft(FakeDraftModel.make(table, (STOP,)), mode, sampling, COMPILER.compile(TEXT), VOCAB + 12)
    assert COMPILER.compile(TEXT).follow([token.token_id for token in drafted])
    if mode is Mode.IDS:
        allowed = [PIECES.index(piece) for piece in "abc"]
        assert drafted[0].token_id == max(allowed, key=next_logits(table, PROMPT).__getitem__)


@every_mode
def test_a_draft_model_that_knows_none_of_the_allowed_tokens_drafts_others(mode: Mode, sampling: Sampling) -> None:
    bridge, _ = bridged(common=2)
    common = np.isfinite(bridge.forward([0, 1]))
    bridge.rollback(0)
    drafted = draft(bridge, mode, sampling, FixedMask(np.flatnonzero(~common)[:2].tolist()), TARGET_SIZE)
    assert {token.token_id for token in drafted} <= {*np.flatnonzero(common).tolist()}
    assert np.isfinite([token.margin for token in drafted if token.margin is not None]).all()
