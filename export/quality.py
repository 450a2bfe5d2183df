"""The quality check: the exported graph against its source model.

PyTorch samples continuations of a few prompts at temperature 1. The graph is
teacher-forced on the same tokens, and the two distributions are compared at each
position. Deliberately slow and simple; it shares no code with the device.
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

from common.chat_template import ChatTemplate
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
NOISE_SAMPLES = 32
"""Gumbel noise samples per position, to estimate the acceptance rate of mode ``coupled``."""
_SEED = 20

Distribution: TypeAlias = npt.NDArray[np.float64]  # [vocab_size]
Distributions: TypeAlias = npt.NDArray[np.float64]  # [tokens, vocab_size]
PositionFigures: TypeAlias = tuple[float, float, float, float]  # in the order of QualityFigures


@dataclass(frozen=True)
class QualityLimits:
    """Minimum figures of an exported graph; see ``QualityFigures``."""

    argmax_agreement: float
    overlap: float


LIMITS: Mapping[Precision, QualityLimits] = {
    Precision.FP32: QualityLimits(0.99, 0.99),
    Precision.INT8: QualityLimits(0.92, 0.92),
    Precision.INT4: QualityLimits(0.60, 0.55),
}


@dataclass(frozen=True)
class Continuation:
    """Tokens that PyTorch sampled after a prompt.

    ``probs`` is [tokens, vocab_size]: ``token_ids[i]`` was sampled from row i.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    probs: Distributions


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate | None,
    graph_path: Path,
    cache: Cache,
    vocab_size: int,
    on_position: Callable[[], None],
) -> QualityFigures:
    """Compare the graph at ``graph_path`` with ``model``; each model calls ``on_position`` after each token."""
    generator = torch.Generator().manual_seed(_SEED)
    session = onnxruntime.InferenceSession(graph_path, providers=["CPUExecutionProvider"])
    figures: list[PositionFigures] = []
    for prompt in PROMPTS:
        expected = _sample_continuation(
            model, _prompt_ids(tokenizer, template, prompt), vocab_size, generator, on_position
        )
        rows = zip(expected.probs, _teacher_forced_logits(session, cache, expected), strict=True)
        for target_probs, logits in rows:
            figures.append(_compare(_softmax(logits[:vocab_size]), target_probs, len(figures)))
            on_position()
    agreement, overlap, topk, coupled = np.mean(figures, axis=0).tolist()
    return QualityFigures(agreement, overlap, topk, coupled, len(figures))


def _compare(draft_probs: Distribution, target_probs: Distribution, position: int) -> PositionFigures:
    """Return the figures of one position, NaN if the graph's logits are NaN."""
    if np.isnan(draft_probs).any():
        return (np.nan,) * 4
    count = min(QUALITY_UPLINK_K, len(draft_probs))
    kept = np.argpartition(draft_probs, -count)[-count:]
    sent = draft_probs[kept] / draft_probs[kept].sum()
    with np.errstate(divide="ignore"):
        draft_scores, target_scores = np.log(draft_probs), np.log(target_probs)
    noises = [PositionNoise(seed, position, len(draft_probs)) for seed in range(NOISE_SAMPLES)]
    same = [noise.choose(draft_scores)[0] == noise.choose(target_scores)[0] for noise in noises]
    return (
        float(draft_probs.argmax() == target_probs.argmax()),
        float(np.minimum(draft_probs, target_probs).sum()),
        float(np.minimum(sent, target_probs[kept]).sum()),
        float(np.mean(same)),
    )


def check(figures: QualityFigures, limits: QualityLimits) -> None:
    """Compare ``figures`` with ``limits``.

    Raises:
        QualityError: a figure is below its limit, or NaN.
    """
    for name in ("argmax_agreement", "overlap"):
        figure, limit = getattr(figures, name), getattr(limits, name)
        if not figure >= limit:  # NaN compares false
            raise QualityError(
                f"{name} of the exported model is {figure:.3f}; allowed: {limit:.2f} or more; "
                "try a --precision with more bits or another --converter"
            )


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | None, prompt: str) -> list[int]:
    if template is None:
        return list(tokenizer(prompt).input_ids)
    text = template.render([{"role": "user", "content": prompt}])
    return list(tokenizer(text, add_special_tokens=False).input_ids)


@torch.inference_mode()
def _sample_continuation(
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


def _teacher_forced_logits(
    session: onnxruntime.InferenceSession, cache: Cache, expected: Continuation
) -> Iterator[npt.NDArray[np.float32]]:
    """Yield the graph's logits, float32[V], after the prompt and after each token except the last."""
    feeds: dict[str, npt.NDArray[Any]] = {
        name: np.zeros((1, cache.kv_heads, 0, cache.head_size), np.float32) for name in cache.past_names
    }
    has_position_ids = "position_ids" in {entry.name for entry in session.get_inputs()}
    length = 0
    for inputs in (expected.prompt_ids, *([token_id] for token_id in expected.token_ids[:-1])):
        positions = np.arange(length, length + len(inputs))
        length += len(inputs)
        feeds["input_ids"] = np.array([inputs])
        feeds["attention_mask"] = np.ones((1, length), np.int64)
        if has_position_ids:
            feeds["position_ids"] = positions[None]
        logits, *present = session.run(["logits", *cache.present_names], feeds)
        feeds.update(zip(cache.past_names, present, strict=True))
        yield logits[0, 0]


def _softmax(logits: npt.NDArray[np.floating]) -> Distributions:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    probs: Distributions = weights / weights.sum()
    return probs
