"""Is the answer the target's own, token for token?

At temperature 0 it is held against transformers' own greedy generation, above it
in mode ``coupled`` against the target alone with the same seed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM

from bench.setup.bench_setup import BenchSetup
from device.session import DraftSettings
from protocol.messages import Mode, Sampling

PROMPT_LEN = 512
TIE = 1e-3
"""Two leading logits closer than this may change places with the order of additions."""


@dataclass(frozen=True)
class Difference:
    """Where an answer leaves the reference; ``gap`` lies between its two leading logits there, where known."""

    prompt: int
    draft_len: int
    position: int
    gap: float | None

    @property
    def is_tie(self) -> bool:
        """Whether the reference itself was undecided."""
        return self.gap is not None and self.gap <= TIE


class Reference(Protocol):
    """What an answer must equal."""

    def generate(self, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
        """The ids that follow the prompt."""

    def gap(self, ids: Sequence[int]) -> float | None:
        """How far apart the two leading logits after ``ids`` are, where that is known."""


class TargetAlone:
    """The target decoding alone at the same base station, with the same seed."""

    def __init__(self, place: BenchSetup, sampling: Sampling) -> None:
        self._place = place
        self._settings = DraftSettings(Mode.TARGET, sampling, uplink_k=1, draft_len=1)

    def generate(self, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
        """The ids that follow the prompt."""
        return self._place.answer(prompt_ids, max_new_tokens, self._settings).token_ids

    def gap(self, ids: Sequence[int]) -> None:
        """Not known at this end."""


class Transformers:
    """``transformers`` generating greedily on the target, float32."""

    def __init__(self, target: str) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()

    @torch.inference_mode()
    def generate(self, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
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
    place: BenchSetup,
    reference: Reference,
    prompts: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling,
    draft_lens: Sequence[int],
    advance: Callable[[], object],
) -> list[Difference]:
    """Every answer in mode ``ids`` or ``coupled`` that is not the reference's, at its first differing token."""
    mode = Mode.IDS if sampling.greedy else Mode.COUPLED
    found = []
    for index, prompt in enumerate(prompts):
        prompt_ids = place.prompt_ids(prompt, PROMPT_LEN)
        expected = reference.generate(prompt_ids, max_new_tokens)
        advance()
        for draft_len in draft_lens:
            settings = DraftSettings(mode, sampling, uplink_k=1, draft_len=draft_len)
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
