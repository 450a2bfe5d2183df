"""Both models' outputs for the same tokens: draft logits and target probabilities, position by position.

The draft model writes the answers; the target runs each answer in one forward pass.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.nn.functional import one_hot

from basestation.target.segment import Segment
from basestation.target.target_model import TargetModel
from basestation.verification.target_sampling import target_weights
from bench.setup.prompts import read_prompts
from device.drafting.draft_model import Logits, SequenceModel
from device.drafting.load_model import load_model
from device.drafting.sampling import sparse_distribution
from device.settings import UplinkSettings
from device.text.tokenizer import Tokenizer
from protocol.frames import FrameCodec
from protocol.messages import Draft, DraftDistribution, Sampling
from protocol.randomness import Stream, random_bits
from protocol.sparse import MAX_STEPS, SparseDistribution
from protocol.zmtp import socket_bytes

DRAFT_LEN = 8
"""Tokens per round, wherever bytes are counted."""
Probs = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Position:
    """Draft logits [V] and target probabilities [V] of one token, float32.

    ``index`` is the token's position in its sequence, ``token_id`` the token that the draft model sampled.
    """

    logits: Logits
    target_probs: npt.NDArray[np.float32]
    index: int
    token_id: int

    def acceptance(self, support: npt.NDArray[np.int64], probs: Probs) -> float:
        """Σ min(target, draft): the probability that a token sampled from ``probs`` on ``support`` is accepted."""
        return float(np.minimum(self.target_probs[support], probs).sum())


@dataclass(frozen=True)
class Corpus:
    """Positions in order, whole rounds of ``DRAFT_LEN`` per answer, and the median seconds to draft a token."""

    sampling: Sampling
    positions: Sequence[Position]
    draft_seconds: float

    def mean_acceptance(self, distributions: Sequence[DraftDistribution]) -> float:
        """The mean acceptance of tokens sampled from ``distributions``, one per position."""
        pairs = zip(self.positions, distributions, strict=True)
        return float(np.mean([position.acceptance(one.support, one.probs) for position, one in pairs]))


def load_draft_model(bundle: Path, prompts: Path | None, count: int) -> tuple[SequenceModel, list[list[int]]]:
    """The draft model, and the ids of the prompts rendered by its chat template."""
    texts, model = read_prompts(prompts, count), load_model(bundle)
    tokenizer = Tokenizer(bundle, model.manifest)
    return model, [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in texts]


def collect(
    model: SequenceModel,
    target: TargetModel,
    prompts: Sequence[list[int]],
    rounds: int,
    sampling: Sampling,
    advance: Callable[[], object],
) -> Corpus:
    """The positions of ``rounds`` rounds per prompt."""
    positions: list[Position] = []
    seconds: list[float] = []
    for prompt in prompts:
        positions += _answer_positions(model, target, prompt, rounds * DRAFT_LEN, sampling, seconds)
        advance()
    return Corpus(sampling, positions, median(seconds))


def finest(logits: Logits, sampling: Sampling, k: int, p: float) -> SparseDistribution:
    """The most likely entries, quantised in the smallest steps."""
    return sparse_distribution(logits, sampling, UplinkSettings(k, p, MAX_STEPS))


def by_round(distributions: Sequence[DraftDistribution]) -> Iterator[Sequence[DraftDistribution]]:
    """The distributions of each round."""
    return (distributions[start : start + DRAFT_LEN] for start in range(0, len(distributions), DRAFT_LEN))


def send(codec: FrameCodec, distributions: Sequence[DraftDistribution], seed: int) -> tuple[int, float]:
    """Bytes of a Draft at the socket, and seconds to encode and decode it."""
    token_ids = tuple(one.sample(random_bits(seed, i, Stream.DRAFT)) for i, one in enumerate(distributions))
    draft = Draft(0, 1, token_ids, tuple(distributions))
    start = time.perf_counter()
    frame = codec.encode(draft)
    decoded = codec.decode(frame)
    duration = time.perf_counter() - start
    assert decoded == draft
    return socket_bytes(frame), duration


def _answer_positions(
    model: SequenceModel,
    target: TargetModel,
    prompt: list[int],
    count: int,
    sampling: Sampling,
    seconds: list[float],
) -> Iterator[Position]:
    tokens, rows = list(prompt), []
    model.rollback(0)
    model.begin(prompt)
    for _ in range(count):
        start = time.perf_counter()
        rows.append(model.forward(tokens[model.length :]).copy())
        seconds.append(time.perf_counter() - start)
        distribution = finest(rows[-1], sampling, len(rows[-1]), 1.0)
        tokens.append(distribution.sample(random_bits(sampling.seed, len(tokens), Stream.DRAFT)))
    logits = target.forward([Segment(target.new_kv_cache(), tokens[:-1], num_logits=count)])
    indices = range(len(prompt), len(tokens))
    for index, row, probs in zip(indices, rows, _target_probs(logits, sampling), strict=True):
        yield Position(row, probs, index, tokens[index])


def _target_probs(logits: Tensor, sampling: Sampling) -> npt.NDArray[np.float32]:
    """The probabilities that the target is sampled from, [n, V]."""
    if sampling.greedy:
        probs = one_hot(logits.argmax(dim=-1), logits.shape[-1])
    else:
        weights, totals = target_weights(logits, [sampling], [len(logits)])
        probs = weights / totals
    return np.asarray(probs.float().cpu().numpy())
