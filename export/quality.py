"""The quality check: the exported graph against its source model.

PyTorch samples continuations of a few prompts at temperature 1. The graph is
teacher-forced on the same tokens, and the two distributions are compared at each
position. Deliberately slow and simple; it shares no code with the device.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

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
from protocol.errors import NonFiniteError, QualityError

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
    Precision.FP16: QualityLimits(0.97, 0.97),
    Precision.INT8: QualityLimits(0.92, 0.92),
    Precision.INT4: QualityLimits(0.60, 0.55),
}


@dataclass(frozen=True)
class Continuation:
    """Tokens that PyTorch generated after a prompt.

    ``probs`` is [tokens, vocab_size]: ``token_ids[i]`` was chosen from row i.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    probs: Distributions


class Forcing(Protocol):
    """Something that gets the tokens of continuations one by one."""

    def logits(self, expected: Continuation) -> Iterator[npt.NDArray[np.float32]]:
        """Yield the logits, float32[V], after the prompt and after each token except the last."""


class TeacherForcing:
    """A graph that gets the tokens of continuations one by one.

    Args:
        graph_path: the graph.
        cache: its KV cache.
    """

    def __init__(self, graph_path: Path, cache: Cache) -> None:
        self._cache = cache
        self._session = onnxruntime.InferenceSession(graph_path, providers=["CPUExecutionProvider"])
        self._has_position_ids = "position_ids" in {entry.name for entry in self._session.get_inputs()}

    def logits(self, expected: Continuation) -> Iterator[npt.NDArray[np.float32]]:
        """Yield the logits, float32[V], after the prompt and after each token except the last."""
        return self.run([expected.prompt_ids, *([token_id] for token_id in expected.token_ids[:-1])])

    def run(self, steps: Sequence[Sequence[int]]) -> Iterator[npt.NDArray[np.float32]]:
        """Yield the logits, float32[V], after each step of tokens; after one without tokens those before it."""
        feeds: dict[str, npt.NDArray[Any]] = {
            name: np.zeros((1, self._cache.kv_heads, 0, self._cache.head_size), self._cache.dtype)
            for name in self._cache.past_names
        }
        length = 0
        for inputs in steps:
            if inputs:
                positions = np.arange(length, length + len(inputs))
                length += len(inputs)
                feeds["input_ids"] = np.array([inputs])
                feeds["attention_mask"] = np.ones((1, length), np.int64)
                if self._has_position_ids:
                    feeds["position_ids"] = positions[None]
                logits, *present = self._session.run(["logits", *self._cache.present_names], feeds)
                feeds.update(zip(self._cache.past_names, present, strict=True))
            yield logits[0, 0]


def sample_continuations(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    vocab_size: int,
    new_tokens: int,
    on_position: Callable[[], None],
    *,
    greedy: bool = False,
    stop_ids: Collection[int] = (),
) -> list[Continuation]:
    """Let a model continue prompts, at temperature 1 or 0; ``on_position`` is called after each token."""
    generator = torch.Generator().manual_seed(_SEED)
    return [
        _continuation(model, prompt, vocab_size, new_tokens, None if greedy else generator, stop_ids, on_position)
        for prompt in prompts
    ]


def measure(forcing: Forcing, continuations: Sequence[Continuation], on_position: Callable[[], None]) -> QualityFigures:
    """Compare a graph's distributions with those of the model that generated the continuations."""
    figures: list[PositionFigures] = []
    for expected in continuations:
        for target_probs, logits in zip(expected.probs, forcing.logits(expected), strict=True):
            figures.append(_compare(_softmax(logits[: len(target_probs)]), target_probs, len(figures)))
            on_position()
    agreement, overlap, topk, coupled = np.mean(figures, axis=0).tolist()
    return QualityFigures(agreement, overlap, topk, coupled, len(figures))


def argmax_agreement(forcing: Forcing, continuations: Sequence[Continuation], on_position: Callable[[], None]) -> float:
    """The share of positions at which graph and model have the same argmax."""
    same = []
    for expected in continuations:
        for target_probs, logits in zip(expected.probs, forcing.logits(expected), strict=True):
            same.append(bool(logits[: len(target_probs)].argmax() == target_probs.argmax()))
            on_position()
    return float(np.mean(same))


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


def prompt_ids(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | None, prompt: str) -> list[int]:
    """The tokens of a prompt, as a user's message where there is a chat template."""
    if template is None:
        return list(tokenizer(prompt).input_ids)
    text = template.render([{"role": "user", "content": prompt}])
    return list(tokenizer(text, add_special_tokens=False).input_ids)


@torch.inference_mode()
def _continuation(
    model: PreTrainedModel,
    prompt: list[int],
    vocab_size: int,
    new_tokens: int,
    generator: torch.Generator | None,
    stop_ids: Collection[int],
    on_position: Callable[[], None],
) -> Continuation:
    """A continuation of up to ``new_tokens`` tokens; without a generator it is greedy."""
    token_ids: list[int] = []
    probs: list[Distribution] = []
    inputs, past = prompt, None
    while len(token_ids) < new_tokens and not (token_ids and token_ids[-1] in stop_ids):
        output = model(torch.tensor([inputs]), past_key_values=past, use_cache=True)
        past = output.past_key_values
        logits = output.logits[0, -1, :vocab_size].double().numpy()
        if not np.isfinite(logits).all():
            raise NonFiniteError("the model's logits are NaN or infinite: its weights are damaged; get them again")
        probs.append(_softmax(logits))
        chosen = torch.from_numpy(probs[-1])
        inputs = [int(chosen.argmax() if generator is None else torch.multinomial(chosen, 1, generator=generator))]
        token_ids += inputs
        on_position()
    return Continuation(prompt, token_ids, np.array(probs))


def _softmax(logits: npt.NDArray[np.floating]) -> Distributions:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    probs: Distributions = weights / weights.sum()
    return probs
