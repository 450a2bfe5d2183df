"""Is the answer the target's own, token for token? Held against transformers' own greedy generation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from bench.workplace import Workplace
from device.client import DraftSettings
from protocol.messages import Mode, Sampling

PROMPT_LEN = 512
TIE = 1e-3
"""Two leading logits closer than this may change places with the order of additions."""


@dataclass(frozen=True)
class Difference:
    """Where an answer leaves the reference: its two leading logits there are ``gap`` apart."""

    prompt: int
    draft_len: int
    position: int
    gap: float

    @property
    def is_tie(self) -> bool:
        """Whether the reference itself was undecided."""
        return self.gap <= TIE


class Reference:
    """``transformers`` generating greedily on the target, float32."""

    def __init__(self, target: str) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()

    @torch.inference_mode()
    def generate(self, prompt_ids: Sequence[int], max_new_tokens: int) -> list[int]:
        """The ids that follow the prompt."""
        row = torch.tensor([prompt_ids])
        output = self._model.generate(
            row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=max_new_tokens
        )
        ids: list[int] = output[0, len(prompt_ids) :].tolist()
        return ids

    @torch.inference_mode()
    def gap(self, ids: Sequence[int]) -> float:
        """How far apart the two leading logits after ``ids`` are."""
        first, second = self._model(torch.tensor([ids])).logits[0, -1].topk(2).values.tolist()
        return float(first - second)


def differences(
    place: Workplace,
    reference: Reference,
    prompts: Sequence[str],
    max_new_tokens: int,
    draft_lens: Sequence[int],
    advance: Callable[[], object],
) -> list[Difference]:
    """Every answer in mode ``ids`` that is not the reference's, at its first differing token."""
    found = []
    for index, prompt in enumerate(prompts):
        prompt_ids = place.prompt_ids(prompt, PROMPT_LEN)
        expected = reference.generate(prompt_ids, max_new_tokens)
        advance()
        for draft_len in draft_lens:
            settings = DraftSettings(Mode.IDS, Sampling(), uplink_k=1, draft_len=draft_len)
            actual = place.answer(prompt_ids, max_new_tokens, settings).token_ids
            advance()
            if actual != expected:
                position = _first_difference(actual, expected)
                gap = reference.gap([*prompt_ids, *expected[:position]])
                found.append(Difference(index, draft_len, position, gap))
    return found


def _first_difference(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
