"""How far a changed target agrees with the original, on the original's own greedy answers to a few prompts."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from basestation.kv_cache.kv_pool import SequenceKVCache
from basestation.target.segment import Segment

PROMPTS = (
    "Why do leaves change colour in autumn?",
    "Write a Python function that checks whether a string is a palindrome.",
    "A box holds 3 red and 5 blue balls. What is the probability of drawing two blue ones?",
    "Translate into German: The train to Hamburg leaves in ten minutes.",
    "Write the first lines of a story about a lost dog.",
    "Summarise the plot of Romeo and Juliet in three sentences.",
    "Name five countries in South America and their capitals.",
    "How do I cook rice without a rice cooker?",
    "Write a SQL query that counts the orders of each customer.",
    "What is the difference between weather and climate?",
    "Write a polite reply that declines an invitation to dinner.",
    "If 4x + 7 = 31, what is x? Show each step.",
    "List the planets of the solar system with one fact on each.",
    "Explain how a bicycle stays upright.",
    "Write a haiku about the sea.",
    "Extract the names from: Anna met Tom and Dr. Lee in Paris on Friday.",
)
ANSWER_TOKENS = 32


class RunsSegments(Protocol):
    """The parts of a ``TargetModel`` that texts need."""

    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """The logits [rows, V] of the last tokens of each segment."""

    def new_kv_cache(self) -> SequenceKVCache:
        """An empty KV cache."""


@dataclass(frozen=True)
class Texts:
    """Prompts, the answers [n, m] of a model, and its logits [n, m, V] for these."""

    prompts: Sequence[list[int]]
    answers: Tensor
    logits: Tensor

    def part(self, texts: slice) -> "Texts":
        """Some of them."""
        return Texts(self.prompts[texts], self.answers[texts], self.logits[texts])


@dataclass(frozen=True)
class Agreement:
    """How far a changed model agrees with the original, on text of the original's.

    Attributes:
        argmax: share of positions with the same most likely token.
        overlap: mean Σ min(p, q) at temperature 1: the probability that both sample the same token, at best.
        perplexity: of the changed model, divided by the original's.
    """

    argmax: float
    overlap: float
    perplexity: float

    def __str__(self) -> str:
        return (
            f"the same most likely token for {self.argmax:.3f} of positions, Σ min(p, q) {self.overlap:.3f}, "
            f"perplexity × {self.perplexity:.3f}"
        )


def prompt_ids(tokenizer: Any, prompts: Sequence[str] = PROMPTS) -> list[list[int]]:
    """Prompts as messages of a user, or as plain text where the model has no chat template."""
    if not tokenizer.chat_template:
        return [list(tokenizer.encode(prompt)) for prompt in prompts]
    messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
    texts = [tokenizer.apply_chat_template(one, add_generation_prompt=True, tokenize=False) for one in messages]
    return [list(tokenizer.encode(text, add_special_tokens=False)) for text in texts]


@torch.inference_mode()
def answer_prompts(target: RunsSegments, prompts: Sequence[list[int]], count: int = ANSWER_TOKENS) -> Texts:
    """A target's greedy answers of ``count`` tokens to prompts of token ids."""
    with _new_caches(target, len(prompts)) as caches:
        last = torch.cat([target.forward([Segment(cache, ids, 1)]) for cache, ids in zip(caches, prompts, strict=True)])
        logits, answers = [last], [last.argmax(-1)]
        for _ in range(count - 1):
            tokens = zip(caches, answers[-1].tolist(), strict=True)
            last = target.forward([Segment(cache, [token], 1) for cache, token in tokens])
            logits.append(last)
            answers.append(last.argmax(-1))
    return Texts(prompts, torch.stack(answers, 1), torch.stack(logits, 1))


@torch.inference_mode()
def run_texts(target: RunsSegments, texts: Texts) -> Iterator[Tensor]:
    """A target's logits [m, V] for the answers of another one, a text in each forward pass."""
    for prompt, answer in zip(texts.prompts, texts.answers.tolist(), strict=True):
        with _new_caches(target, 1) as (cache,):
            yield target.forward([Segment(cache, prompt + answer[:-1], len(answer))])


def measure_agreement(target: RunsSegments, texts: Texts) -> Agreement:
    """Compare a changed target with the original, whose ``texts`` these are."""
    argmax, overlap, surprise = [], [], []
    for answer, original, changed in zip(texts.answers, texts.logits, run_texts(target, texts), strict=True):
        p, q = original.log_softmax(-1), changed.log_softmax(-1)
        argmax.append(original.argmax(-1) == changed.argmax(-1))
        overlap.append(torch.minimum(p, q).exp().sum(-1))
        surprise.append((p - q).gather(-1, answer[:, None]))
    means = [float(torch.cat(one).float().mean()) for one in (argmax, overlap, surprise)]
    return Agreement(means[0], means[1], math.exp(means[2]))


@contextmanager
def _new_caches(target: RunsSegments, count: int) -> Iterator[list[SequenceKVCache]]:
    caches = [target.new_kv_cache() for _ in range(count)]
    try:
        yield caches
    finally:
        for cache in caches:
            cache.release()
