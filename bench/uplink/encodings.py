"""Bytes of a draft distribution and the acceptance lost to rounding, for each encoding.

All encodings round the same distributions at the same positions: answers that the
draft model sampled at temperature 1, verified by the target in one forward pass.
Compared is the mean of Σ min(target, draft) over the positions.

The steps of 1/N that are used go through the real frames. FP16 and logarithms of a
fixed number of bits share the same support and frame; their bits are counted, not
written.
"""

from collections.abc import Callable, Sequence
from statistics import median

import numpy as np

from basestation.target.target_model import TargetModel
from bench.setup.options import (
    BundleOption,
    CountOption,
    DtypeOption,
    JsonOption,
    PromptsOption,
    RoundsOption,
    TargetOption,
    UplinkKOption,
    console,
    progress_bar,
)
from bench.setup.results import Results, Row
from bench.uplink.positions import DRAFT_LEN, Corpus, Probs, by_round, collect, finest, load_draft_model, send
from device.drafting.sampling import sparse_distribution
from device.settings import DEFAULT_UPLINK_K, UplinkSettings
from protocol.bits import set_bits
from protocol.draft_codec import encode_drafted
from protocol.frames import FrameCodec
from protocol.messages import Draft, Mode, Sampling
from protocol.sparse import SparseDistribution
from protocol.zmtp import socket_bytes

SAMPLING = Sampling(1.0, seed=1)
STEPS = tuple(2**bits for bits in range(5, 13))
UPLINK_P = (0.9, 0.95, 0.99)
LOG_BITS = range(3, 11)
LOG_RANGE = 12
"""Logarithms reach down to 2^-LOG_RANGE of the largest probability."""


def encodings(
    bundle: BundleOption,
    target: TargetOption,
    dtype: DtypeOption = "float32",
    prompts: PromptsOption = None,
    count: CountOption = 20,
    rounds: RoundsOption = 2,
    uplink_k: UplinkKOption = 32,
    json_file: JsonOption = None,
) -> None:
    """Measure the bytes of each encoding of probabilities, and the acceptance lost to its rounding."""
    model, prompt_ids = load_draft_model(bundle, prompts, count)
    target_model = TargetModel.load(target, dtype)
    with progress_bar() as progress:
        task = progress.add_task("prompts", total=len(prompt_ids))
        corpus = collect(model, target_model, prompt_ids, rounds, SAMPLING, lambda: progress.advance(task))
    described: Row = {
        "draft": model.manifest.name,
        "target": target_model.name,
        "temperature": SAMPLING.temperature,
        "draft_len": DRAFT_LEN,
        "positions": len(corpus.positions),
        "draft_milliseconds": 1e3 * corpus.draft_seconds,
    }
    measured = Results(described, encoding_rows(corpus, uplink_k))
    measured.show(console)
    measured.write(json_file)


def encoding_rows(corpus: Corpus, uplink_k: int) -> list[Row]:
    """A row per encoding; ``acceptance_change`` is relative to the finest quantisation of the same entries."""
    cases = [(f"topk, steps of 1/{steps}", UplinkSettings(uplink_k, 1.0, steps)) for steps in STEPS]
    cases += [("topk, default steps", UplinkSettings.of_mode(Mode.TOPK, uplink_k, 1.0, 0))]
    topp_k = DEFAULT_UPLINK_K[Mode.TOPP]
    cases += [(f"topp {p:g}, default steps", UplinkSettings.of_mode(Mode.TOPP, topp_k, p, 0)) for p in UPLINK_P]
    return [*_alternative_rows(corpus, uplink_k), *(_row(name, corpus, uplink) for name, uplink in cases)]


def _row(name: str, corpus: Corpus, uplink: UplinkSettings) -> Row:
    codec = FrameCodec(len(corpus.positions[0].logits))
    exact = corpus.mean_acceptance([finest(one.logits, SAMPLING, uplink.k, uplink.p) for one in corpus.positions])
    sent = [sparse_distribution(one.logits, SAMPLING, uplink) for one in corpus.positions]
    frames = [send(codec, distributions, SAMPLING.seed) for distributions in by_round(sent)]
    sizes, seconds = [size / DRAFT_LEN for size, _ in frames], [duration for _, duration in frames]
    acceptance = corpus.mean_acceptance(sent)
    return {
        "case": name,
        "bytes_per_token": float(np.mean(sizes)),
        "max_bytes_per_token": max(sizes),
        "acceptance": acceptance,
        "acceptance_change": acceptance - exact,
        "entries": float(np.mean([len(one) for one in sent])),
        "milliseconds_per_round": 1e3 * median(seconds),
    }


def _alternative_rows(corpus: Corpus, uplink_k: int) -> list[Row]:
    exact = [finest(one.logits, SAMPLING, uplink_k, 1.0) for one in corpus.positions]
    rest = _bytes_besides_weights(len(corpus.positions[0].logits), uplink_k)
    alternatives: list[tuple[str, float, Callable[[Probs], Probs]]] = [
        ("topk, FP64", 64.0 * uplink_k, _identity),
        ("topk, FP16", 16.0 * uplink_k, _fp16),
    ]
    for bits in LOG_BITS:  # the index of the largest probability is sent, and its logarithm is implied
        size = bits * (uplink_k - 1) + (uplink_k - 1).bit_length()
        alternatives.append((f"topk, logarithms of {bits} bits", float(size), _logarithms(bits)))
    return [_alternative_row(name, rest + size / 8, quantize, corpus, exact) for name, size, quantize in alternatives]


def _alternative_row(
    name: str,
    size: float,
    quantize: Callable[[Probs], Probs],
    corpus: Corpus,
    exact: Sequence[SparseDistribution],
) -> Row:
    pairs = zip(corpus.positions, exact, strict=True)
    acceptance = float(np.mean([position.acceptance(one.support, quantize(one.probs)) for position, one in pairs]))
    return {
        "case": name,
        "bytes_per_token": size,
        "max_bytes_per_token": size,
        "acceptance": acceptance,
        "acceptance_change": acceptance - corpus.mean_acceptance(exact),
        "entries": float(np.mean([len(one) for one in exact])),
        "milliseconds_per_round": None,
    }


def _bytes_besides_weights(vocab_size: int, uplink_k: int) -> float:
    """Bytes of a drafted token at the socket, without its weights: a share of the frame, its support and its id."""
    even = SparseDistribution.quantize(vocab_size, np.arange(uplink_k), np.ones(uplink_k), uplink_k)
    drafted, distributions = (0,) * DRAFT_LEN, (even,) * DRAFT_LEN
    frame = FrameCodec(vocab_size).encode(Draft(0, 1, drafted, distributions))
    envelope = socket_bytes(frame) - len(encode_drafted(drafted, distributions).data)
    support = len(set_bits(np.arange(DRAFT_LEN * uplink_k), DRAFT_LEN * vocab_size))
    return (envelope + support / 8) / DRAFT_LEN + (uplink_k - 1).bit_length() / 8


def _identity(probs: Probs) -> Probs:
    return probs


def _fp16(probs: Probs) -> Probs:
    rounded = probs.astype(np.float16).astype(np.float64)
    return np.asarray(rounded / rounded.sum())


def _logarithms(bits: int) -> Callable[[Probs], Probs]:
    """Even steps of the logarithm, from the largest probability down to 2⁻¹² of it."""
    last = 2**bits - 1

    def quantize(probs: Probs) -> Probs:
        levels = np.minimum(np.round(-np.log2(probs / probs.max()) * last / LOG_RANGE), last)
        weights = 2.0 ** (-levels * LOG_RANGE / last)
        return np.asarray(weights / weights.sum())

    return quantize
