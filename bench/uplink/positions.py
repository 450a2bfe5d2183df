"""What both models say about the same tokens: draft logits and target probabilities, position by position.

The tokens are answers that the draft model wrote; the target judges each answer in one pass.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.nn.functional import one_hot

from basestation.kv_pool import Segment
from basestation.target_model import TargetModel
from basestation.verify import target_weights
from device.draft_model import DraftModel, Logits
from device.sampling import Uplink, draft_distribution
from protocol.frames import FrameCodec
from protocol.messages import Draft, Sampling
from protocol.randomness import Stream, random_bits
from protocol.sparse import MAX_STEPS, SparseDistribution
from protocol.zmtp import socket_bytes

DRAFT_LEN = 8
"""Tokens of a round, wherever bytes are counted."""
Probs = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Position:
    """What both models said about one token: draft logits [V] and target probabilities [V], float32.

    ``place`` is its place in its sequence, ``token_id`` the draft model's.
    """

    logits: Logits
    target_probs: npt.NDArray[np.float32]
    place: int
    token_id: int

    def acceptance(self, support: npt.NDArray[np.int64], probs: Probs) -> float:
        """Σ min(target, draft): how likely a token drawn from ``probs`` on ``support`` is to stand."""
        return float(np.minimum(self.target_probs[support], probs).sum())


@dataclass(frozen=True)
class Corpus:
    """Positions in order, rounds of ``DRAFT_LEN`` to each answer; the draft model took ``draft_seconds`` for each."""

    sampling: Sampling
    positions: Sequence[Position]
    draft_seconds: float

    def mean_acceptance(self, distributions: Sequence[SparseDistribution]) -> float:
        """Of a token drawn from the distribution of its position."""
        pairs = zip(self.positions, distributions, strict=True)
        return float(np.mean([position.acceptance(one.support, one.probs) for position, one in pairs]))


def collect(
    model: DraftModel,
    target: TargetModel,
    prompts: Sequence[list[int]],
    rounds: int,
    sampling: Sampling,
    advance: Callable[[], object],
) -> Corpus:
    """Positions of ``rounds`` rounds for each of the prompts."""
    positions: list[Position] = []
    seconds: list[float] = []
    for prompt in prompts:
        positions += _answer_positions(model, target, prompt, rounds * DRAFT_LEN, sampling, seconds)
        advance()
    return Corpus(sampling, positions, median(seconds))


def unrounded(logits: Logits, sampling: Sampling, k: int, p: float) -> SparseDistribution:
    """The likeliest entries in the finest steps there are."""
    return draft_distribution(logits, sampling, Uplink(k, p, MAX_STEPS))


def by_round(sent: Sequence[SparseDistribution]) -> Iterator[Sequence[SparseDistribution]]:
    """Of the positions of each round."""
    return (sent[start : start + DRAFT_LEN] for start in range(0, len(sent), DRAFT_LEN))


def send(codec: FrameCodec, distributions: Sequence[SparseDistribution], seed: int) -> tuple[int, float]:
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
    model: DraftModel,
    target: TargetModel,
    prompt: list[int],
    count: int,
    sampling: Sampling,
    seconds: list[float],
) -> Iterator[Position]:
    tokens, rows = list(prompt), []
    model.rollback(0)
    for _ in range(count):
        start = time.perf_counter()
        rows.append(model.forward(tokens[model.length :]).copy())
        seconds.append(time.perf_counter() - start)
        drawn = unrounded(rows[-1], sampling, len(rows[-1]), 1.0)
        tokens.append(drawn.sample(random_bits(sampling.seed, len(tokens), Stream.DRAFT)))
    logits = target.forward([Segment(target.new_kv_cache(), tokens[:-1], num_logits=count)])
    places = range(len(prompt), len(tokens))
    for place, row, probs in zip(places, rows, _target_probs(logits, sampling), strict=True):
        yield Position(row, probs, place, tokens[place])


def _target_probs(logits: Tensor, sampling: Sampling) -> npt.NDArray[np.float32]:
    """What the target is sampled from, [n, V]."""
    if sampling.greedy:
        probs = one_hot(logits.argmax(dim=-1), logits.shape[-1])
    else:
        weights, totals = target_weights(logits, [sampling], [len(logits)])
        probs = weights / totals
    return np.asarray(probs.float().cpu().numpy())
