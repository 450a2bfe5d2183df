"""How few bits a draft distribution can be sent in, and what coarser probabilities cost in acceptance.

Every candidate rounds the same distributions at the same positions: answers the
draft model wrote at temperature 1, judged by the target in one pass. What is
compared is the mean of Σ min(target, draft) over the positions.

The steps of 1/N that are sent go through the real frames. Their rivals, FP16
and logarithms of a fixed number of bits, are held against the same support and
the same frame, their bits counted and not written.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import numpy.typing as npt

from basestation.kv_arena import Segment
from basestation.target_model import TargetModel
from basestation.verify import target_weights
from bench.results import Results, Value
from device.draft_model import DraftModel, Logits
from device.sampling import Uplink, draft_distribution
from protocol.bits import set_bits
from protocol.drafted import pack_drawn
from protocol.frames import FrameCodec
from protocol.messages import Draft, Mode, Sampling
from protocol.randomness import Stream, random_bits
from protocol.sparse import MAX_STEPS, SparseDistribution
from protocol.stream import socket_bytes

SAMPLING = Sampling(1.0, seed=1)
DRAFT_LEN = 8
STEPS = tuple(2**bits for bits in range(5, 13))
LOG_BITS = range(3, 11)
LOG_RANGE = 12
"""Binary digits that logarithms reach below the likeliest token."""
Probs = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Position:
    """What both models said about one token: draft logits [V] and target probabilities [V], float32."""

    logits: Logits
    target_probs: npt.NDArray[np.float32]

    def acceptance(self, support: npt.NDArray[np.int64], probs: Probs) -> float:
        """Σ min(target, draft): how likely a token drawn from ``probs`` on ``support`` is to stand."""
        return float(np.minimum(self.target_probs[support], probs).sum())


@dataclass(frozen=True)
class Corpus:
    """Positions in order, rounds of ``DRAFT_LEN`` to each answer; the draft model took ``draft_seconds`` for each."""

    positions: Sequence[Position]
    draft_seconds: float


def collect(
    model: DraftModel, target: TargetModel, prompts: Sequence[list[int]], rounds: int, advance: Callable[[], object]
) -> Corpus:
    """Positions of ``rounds`` rounds for each of the prompts."""
    positions: list[Position] = []
    seconds: list[float] = []
    for prompt in prompts:
        positions += _answer_positions(model, target, prompt, rounds * DRAFT_LEN, seconds)
        advance()
    return Corpus(positions, median(seconds))


def measure(corpus: Corpus, uplink_k: int) -> list[dict[str, Value]]:
    """A row for each candidate; ``acceptance_change`` is against the unrounded entries of the same mode."""
    cases = [(f"topk, {steps} steps", Uplink(uplink_k, 1.0, steps)) for steps in STEPS]
    cases += [("topk, default", Uplink.of_mode(Mode.TOPK, uplink_k, 1.0, 0))]
    cases += [(f"topp {p:g}, default", Uplink.of_mode(Mode.TOPP, 256, p, 0)) for p in (0.9, 0.95, 0.99)]
    return [*_rival_rows(corpus, uplink_k), *(_row(name, corpus, uplink) for name, uplink in cases)]


def results(rows: list[dict[str, Value]], corpus: Corpus, draft: str, target: str) -> Results:
    """The rows with all that they depend on."""
    settings: dict[str, Value] = {
        "draft": draft,
        "target": target,
        "temperature": SAMPLING.temperature,
        "draft_len": DRAFT_LEN,
        "positions": len(corpus.positions),
        "draft_milliseconds_per_token": 1e3 * corpus.draft_seconds,
    }
    return Results(settings, rows)


def _answer_positions(
    model: DraftModel, target: TargetModel, prompt: list[int], count: int, seconds: list[float]
) -> Iterator[Position]:
    tokens, rows = list(prompt), []
    model.rollback(0)
    for _ in range(count):
        start = time.perf_counter()
        rows.append(model.forward(tokens[model.length :]).copy())
        seconds.append(time.perf_counter() - start)
        drawn = _unrounded(rows[-1], len(rows[-1]), 1.0)
        tokens.append(drawn.sample(random_bits(SAMPLING.seed, len(tokens), Stream.DRAFT)))
    logits = target.forward([Segment(target.new_stretch(), tokens[:-1], judged=count)])
    weights, totals = target_weights(logits, [SAMPLING], [count])
    for row, probs in zip(rows, (weights / totals).float().cpu().numpy(), strict=True):
        yield Position(row, probs)


def _unrounded(logits: Logits, k: int, p: float) -> SparseDistribution:
    return draft_distribution(logits, SAMPLING, Uplink(k, p, MAX_STEPS))


def _row(name: str, corpus: Corpus, uplink: Uplink) -> dict[str, Value]:
    codec = FrameCodec(len(corpus.positions[0].logits))
    exact = _mean_acceptance(corpus, [_unrounded(one.logits, uplink.k, uplink.p) for one in corpus.positions])
    sent = [draft_distribution(one.logits, SAMPLING, uplink) for one in corpus.positions]
    taken = [_send(codec, sent[start : start + DRAFT_LEN]) for start in range(0, len(sent), DRAFT_LEN)]
    sizes, seconds = [size / DRAFT_LEN for size, _ in taken], [duration for _, duration in taken]
    acceptance = _mean_acceptance(corpus, sent)
    return {
        "case": name,
        "bytes_per_token": float(np.mean(sizes)),
        "most_bytes_per_token": max(sizes),
        "acceptance": acceptance,
        "acceptance_change": acceptance - exact,
        "entries": float(np.mean([len(one) for one in sent])),
        "milliseconds_per_round": 1e3 * median(seconds),
    }


def _send(codec: FrameCodec, distributions: Sequence[SparseDistribution]) -> tuple[int, float]:
    """Bytes at the socket, and seconds to encode and decode them."""
    token_ids = tuple(one.sample(random_bits(SAMPLING.seed, i, Stream.DRAFT)) for i, one in enumerate(distributions))
    draft = Draft(0, 1, token_ids, tuple(distributions))
    start = time.perf_counter()
    frame = codec.encode(draft)
    decoded = codec.decode(frame)
    duration = time.perf_counter() - start
    assert decoded == draft
    return socket_bytes(frame), duration


def _mean_acceptance(corpus: Corpus, distributions: Sequence[SparseDistribution]) -> float:
    pairs = zip(corpus.positions, distributions, strict=True)
    return float(np.mean([position.acceptance(one.support, one.probs) for position, one in pairs]))


def _rival_rows(corpus: Corpus, uplink_k: int) -> list[dict[str, Value]]:
    exact = [_unrounded(one.logits, uplink_k, 1.0) for one in corpus.positions]
    rest = _bytes_beside_weights(len(corpus.positions[0].logits), uplink_k)
    rivals: list[tuple[str, float, Callable[[Probs], Probs]]] = [
        ("topk, unrounded", 64.0 * uplink_k, _as_they_are),
        ("topk, FP16", 16.0 * uplink_k, _halves),
    ]
    for bits in LOG_BITS:  # the likeliest token's place is sent, and its logarithm implied
        size = bits * (uplink_k - 1) + (uplink_k - 1).bit_length()
        rivals.append((f"topk, logarithms of {bits} bits", float(size), _logarithms(bits)))
    base = _mean_acceptance(corpus, exact)
    return [_rival_row(name, rest + size / 8, round_off, corpus, exact, base) for name, size, round_off in rivals]


def _rival_row(
    name: str,
    size: float,
    round_off: Callable[[Probs], Probs],
    corpus: Corpus,
    exact: Sequence[SparseDistribution],
    base: float,
) -> dict[str, Value]:
    pairs = zip(corpus.positions, exact, strict=True)
    acceptance = float(np.mean([position.acceptance(one.support, round_off(one.probs)) for position, one in pairs]))
    return {
        "case": name,
        "bytes_per_token": size,
        "most_bytes_per_token": size,
        "acceptance": acceptance,
        "acceptance_change": acceptance - base,
        "entries": float(np.mean([len(one) for one in exact])),
        "milliseconds_per_round": None,
    }


def _bytes_beside_weights(vocab_size: int, uplink_k: int) -> float:
    """Of a drafted token at the socket: its round's share of the frame, its support and its place there."""
    even = SparseDistribution.round_off(vocab_size, np.arange(uplink_k), np.ones(uplink_k), uplink_k)
    drafted, distributions = (0,) * DRAFT_LEN, (even,) * DRAFT_LEN
    frame = FrameCodec(vocab_size).encode(Draft(0, 1, drafted, distributions))
    around = socket_bytes(frame) - len(pack_drawn(drafted, distributions).data)
    support = len(set_bits(np.arange(DRAFT_LEN * uplink_k), DRAFT_LEN * vocab_size))
    return (around + support / 8) / DRAFT_LEN + (uplink_k - 1).bit_length() / 8


def _as_they_are(probs: Probs) -> Probs:
    return probs


def _halves(probs: Probs) -> Probs:
    halves = probs.astype(np.float16).astype(np.float64)
    return np.asarray(halves / halves.sum())


def _logarithms(bits: int) -> Callable[[Probs], Probs]:
    """Even steps of the logarithm, from the likeliest token down to 2⁻¹² of it."""
    last = 2**bits - 1

    def round_off(probs: Probs) -> Probs:
        levels = np.minimum(np.round(-np.log2(probs / probs.max()) * last / LOG_RANGE), last)
        weights = 2.0 ** (-levels * LOG_RANGE / last)
        return np.asarray(weights / weights.sum())

    return round_off
