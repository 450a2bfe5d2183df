"""How few bits a draft distribution can be sent in, and what coarser probabilities cost in acceptance.

Every candidate rounds the same distributions at the same positions: answers the
draft model wrote at temperature 1, judged by the target in one pass. What is
compared is the mean of Σ min(target, draft) over the positions.

The steps of 1/N that are sent go through the real frames. Their rivals, FP16
and logarithms of a fixed number of bits, are held against the same support and
the same frame, their bits counted and not written.
"""

from collections.abc import Callable, Sequence
from statistics import median

import numpy as np

from bench.setup.results import Results, Value
from bench.uplink.positions import DRAFT_LEN, Corpus, Probs, by_round, send, unrounded
from device.sampling import Uplink, draft_distribution
from protocol.bits import set_bits
from protocol.draft_codec import encode_drafted
from protocol.frames import FrameCodec
from protocol.messages import Draft, Mode, Sampling
from protocol.sparse import SparseDistribution
from protocol.zmtp import socket_bytes

SAMPLING = Sampling(1.0, seed=1)
STEPS = tuple(2**bits for bits in range(5, 13))
LOG_BITS = range(3, 11)
LOG_RANGE = 12
"""Binary digits that logarithms reach below the likeliest token."""


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


def _row(name: str, corpus: Corpus, uplink: Uplink) -> dict[str, Value]:
    codec = FrameCodec(len(corpus.positions[0].logits))
    exact = corpus.mean_acceptance([unrounded(one.logits, SAMPLING, uplink.k, uplink.p) for one in corpus.positions])
    sent = [draft_distribution(one.logits, SAMPLING, uplink) for one in corpus.positions]
    taken = [send(codec, distributions, SAMPLING.seed) for distributions in by_round(sent)]
    sizes, seconds = [size / DRAFT_LEN for size, _ in taken], [duration for _, duration in taken]
    acceptance = corpus.mean_acceptance(sent)
    return {
        "case": name,
        "bytes_per_token": float(np.mean(sizes)),
        "most_bytes_per_token": max(sizes),
        "acceptance": acceptance,
        "acceptance_change": acceptance - exact,
        "entries": float(np.mean([len(one) for one in sent])),
        "milliseconds_per_round": 1e3 * median(seconds),
    }


def _rival_rows(corpus: Corpus, uplink_k: int) -> list[dict[str, Value]]:
    exact = [unrounded(one.logits, SAMPLING, uplink_k, 1.0) for one in corpus.positions]
    rest = _bytes_beside_weights(len(corpus.positions[0].logits), uplink_k)
    rivals: list[tuple[str, float, Callable[[Probs], Probs]]] = [
        ("topk, unrounded", 64.0 * uplink_k, _as_they_are),
        ("topk, FP16", 16.0 * uplink_k, _halves),
    ]
    for bits in LOG_BITS:  # the likeliest token's place is sent, and its logarithm implied
        size = bits * (uplink_k - 1) + (uplink_k - 1).bit_length()
        rivals.append((f"topk, logarithms of {bits} bits", float(size), _logarithms(bits)))
    base = corpus.mean_acceptance(exact)
    return [_rival_row(name, rest + size / 8, quantize, corpus, exact, base) for name, size, quantize in rivals]


def _rival_row(
    name: str,
    size: float,
    quantize: Callable[[Probs], Probs],
    corpus: Corpus,
    exact: Sequence[SparseDistribution],
    base: float,
) -> dict[str, Value]:
    pairs = zip(corpus.positions, exact, strict=True)
    acceptance = float(np.mean([position.acceptance(one.support, quantize(one.probs)) for position, one in pairs]))
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
    even = SparseDistribution.quantize(vocab_size, np.arange(uplink_k), np.ones(uplink_k), uplink_k)
    drafted, distributions = (0,) * DRAFT_LEN, (even,) * DRAFT_LEN
    frame = FrameCodec(vocab_size).encode(Draft(0, 1, drafted, distributions))
    around = socket_bytes(frame) - len(encode_drafted(drafted, distributions).data)
    support = len(set_bits(np.arange(DRAFT_LEN * uplink_k), DRAFT_LEN * vocab_size))
    return (around + support / 8) / DRAFT_LEN + (uplink_k - 1).bit_length() / 8


def _as_they_are(probs: Probs) -> Probs:
    return probs


def _halves(probs: Probs) -> Probs:
    fp16 = probs.astype(np.float16).astype(np.float64)
    return np.asarray(fp16 / fp16.sum())


def _logarithms(bits: int) -> Callable[[Probs], Probs]:
    """Even steps of the logarithm, from the likeliest token down to 2⁻¹² of it."""
    last = 2**bits - 1

    def quantize(probs: Probs) -> Probs:
        levels = np.minimum(np.round(-np.log2(probs / probs.max()) * last / LOG_RANGE), last)
        weights = 2.0 ** (-levels * LOG_RANGE / last)
        return np.asarray(weights / weights.sum())

    return quantize
