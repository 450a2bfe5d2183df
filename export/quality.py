"""The last check of a draft model: the graph that ships against the model it was made from.

PyTorch continues a few prompts at temperature 1; the graph is led through the
same tokens one at a time, and at each the two distributions are compared. Slow
and obvious on purpose: nothing here is shared with the device's fast path.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from export.graph import Cache
from export.quantize import Precision
from protocol.bundle import QUALITY_UPLINK_K, QualityFigures
from protocol.coupling import PositionNoise
from protocol.errors import QualityError

PROMPTS = (
    "Why does the sky turn red in the evening?",
    "Write a Python function that says whether a number is prime.",
    "A train leaves at 9:40 and arrives at 12:05. How long does the journey take?",
    "Tell a short story about a lighthouse keeper and a fox.",
)
NEW_TOKENS = 48
NOISES = 32
"""At each position, to see how often two models choose the same."""
_SEED = 20

Distribution: TypeAlias = npt.NDArray[np.float64]  # [vocab_size]
Distributions: TypeAlias = npt.NDArray[np.float64]  # [tokens, vocab_size]
Shares: TypeAlias = tuple[float, float, float, float]


@dataclass(frozen=True)
class QualityLimits:
    """The least that a graph must reach: share of equal likeliest tokens, mean Σ_v min(p(v), q(v))."""

    argmax_agreement: float
    overlap: float


LIMITS: Mapping[Precision, QualityLimits] = {
    Precision.FP32: QualityLimits(0.99, 0.99),
    Precision.INT8: QualityLimits(0.92, 0.92),
    Precision.INT4: QualityLimits(0.60, 0.55),
}


@dataclass(frozen=True)
class Continuation:
    """What PyTorch made of a prompt.

    ``probs`` is [tokens, vocab_size]: row i is the distribution that
    ``token_ids[i]`` was sampled from.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    probs: Distributions


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    graph_path: Path,
    cache: Cache,
    vocab_size: int,
    on_position: Callable[[], None],
) -> QualityFigures:
    """Compare the graph at ``graph_path`` with ``model``; ``on_position`` is called after each step of either."""
    generator = torch.Generator().manual_seed(_SEED)
    session = onnxruntime.InferenceSession(graph_path, providers=["CPUExecutionProvider"])
    shares: list[Shares] = []
    for prompt in PROMPTS:
        expected = _continue(model, _prompt_ids(tokenizer, prompt), vocab_size, generator, on_position)
        rows = zip(expected.probs, _follow(session, cache, expected), strict=True)
        for target_probs, logits in rows:
            shares.append(_likeness(_softmax(logits[:vocab_size]), target_probs, len(shares)))
            on_position()
    agreement, overlap, topk, coupled = np.mean(shares, axis=0).tolist()
    return QualityFigures(agreement, overlap, topk, coupled, len(shares))


def _likeness(
    draft_probs: Distribution, target_probs: Distribution, position: int
) -> tuple[float, float, float, float]:
    """One position's share in each of ``QualityFigures``."""
    if np.isnan(draft_probs).any():
        return (np.nan,) * 4
    count = min(QUALITY_UPLINK_K, len(draft_probs))
    kept = np.argpartition(draft_probs, -count)[-count:]
    sent = draft_probs[kept] / draft_probs[kept].sum()
    with np.errstate(divide="ignore"):
        draft_scores, target_scores = np.log(draft_probs), np.log(target_probs)
    noises = [PositionNoise(seed, position, len(draft_probs)) for seed in range(NOISES)]
    same = [noise.choose(draft_scores)[0] == noise.choose(target_scores)[0] for noise in noises]
    return (
        float(draft_probs.argmax() == target_probs.argmax()),
        float(np.minimum(draft_probs, target_probs).sum()),
        float(np.minimum(sent, target_probs[kept]).sum()),
        float(np.mean(same)),
    )


def check(figures: QualityFigures, limits: QualityLimits) -> None:
    """Hold ``figures`` against ``limits``.

    Raises:
        QualityError: a figure is below its limit, or no number.
    """
    for name in ("argmax_agreement", "overlap"):
        figure, limit = getattr(figures, name), getattr(limits, name)
        if not figure >= limit:  # NaN compares false
            raise QualityError(
                f"{name} of the exported model is {figure:.3f}; allowed: {limit:.2f} or more; "
                "try a --precision with more bits or another --converter"
            )


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    if tokenizer.chat_template is None:
        return list(tokenizer(prompt).input_ids)
    messages = [{"role": "user", "content": prompt}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))


@torch.inference_mode()
def _continue(
    model: PreTrainedModel,
    prompt_ids: list[int],
    vocab_size: int,
    generator: torch.Generator,
    on_position: Callable[[], None],
) -> Continuation:
    token_ids: list[int] = []
    probs: list[Distributions] = []
    inputs, past = prompt_ids, None
    for _ in range(NEW_TOKENS):
        output = model(torch.tensor([inputs]), past_key_values=past, use_cache=True)
        past = output.past_key_values
        probs.append(_softmax(output.logits[0, -1, :vocab_size].double().numpy()))
        inputs = [int(torch.multinomial(torch.from_numpy(probs[-1]), 1, generator=generator))]
        token_ids += inputs
        on_position()
    return Continuation(prompt_ids, token_ids, np.array(probs))


def _follow(
    session: onnxruntime.InferenceSession, cache: Cache, expected: Continuation
) -> Iterator[npt.NDArray[np.float32]]:
    """The logits, float32[V], that the graph gives after the prompt and after each token but the last."""
    feeds: dict[str, npt.NDArray[Any]] = {
        name: np.zeros((1, cache.kv_heads, 0, cache.head_size), np.float32) for name in cache.past_names
    }
    takes_positions = "position_ids" in {entry.name for entry in session.get_inputs()}
    length = 0
    for inputs in (expected.prompt_ids, *([token_id] for token_id in expected.token_ids[:-1])):
        positions = np.arange(length, length + len(inputs))
        length += len(inputs)
        feeds["input_ids"] = np.array([inputs])
        feeds["attention_mask"] = np.ones((1, length), np.int64)
        if takes_positions:
            feeds["position_ids"] = positions[None]
        logits, *present = session.run(["logits", *cache.present_names], feeds)
        feeds.update(zip(cache.past_names, present, strict=True))
        yield logits[0, 0]


def _softmax(logits: npt.NDArray[np.floating]) -> Distributions:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    probs: Distributions = weights / weights.sum()
    return probs
