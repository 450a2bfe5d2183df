"""What a drafted token costs on the uplink, and how likely it stands: every mode and K, at a temperature.

Every mode sends the same positions through the real frames. How likely a token
stands is Σ min(target, draft) of the distribution that it is drawn from; in
mode ``coupled`` it is counted how often both ends come to the same token.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from bench.setup.results import Value
from bench.uplink.positions import DRAFT_LEN, Corpus, by_round, send
from device.sampling import ENTRIES, Uplink, coupled_token, draft_distribution, full_distribution
from protocol.coupling import PositionNoise
from protocol.errors import SettingsError
from protocol.frames import FrameCodec
from protocol.limits import Limits
from protocol.messages import Draft, Mode
from protocol.sparse import SparseDistribution
from protocol.zmtp import socket_bytes

UPLINK_K = (1, 3, 8, 32, 128, 320, 3200)
UPLINK_P = (0.9, 0.95, 0.99)
TEMPERATURES = (0.0, 0.7, 1.0)
SEEDS = range(1, 9)
"""Of the noise that mode ``coupled`` is counted over."""


def check_uplink_k(uplink_k: Sequence[int], vocab_size: int) -> Sequence[int]:
    """The values of K.

    Raises:
        SettingsError: one is below 1 or above the vocabulary's size.
    """
    for one in uplink_k:
        if not 1 <= one <= vocab_size:
            raise SettingsError("uplink_k", one, f"1 to {vocab_size}, the size of the vocabulary")
    return uplink_k


def uplink_rows(corpus: Corpus, uplink_k: Sequence[int]) -> list[dict[str, Value]]:
    """A row for each mode, in mode ``topk`` for each K; ``papers_bytes`` are K numbers in FP16 without their ids."""
    sampling, positions = corpus.sampling, corpus.positions
    vocab_size = len(positions[0].logits)
    alone = Mode.IDS if sampling.greedy else Mode.COUPLED
    share = _whole_share(corpus) if sampling.greedy else _coupled_share(corpus)
    rows = [_row(corpus, str(Mode.TARGET), None, 0.0, None, None)]
    rows.append(_row(corpus, str(alone), None, _bytes_of_ids(corpus), share, None))
    cases: list[tuple[str, int | None, Uplink]] = [
        (f"topk {k if k < vocab_size else 'V'}", k, Uplink.of_mode(Mode.TOPK, k, 1.0, 0)) for k in uplink_k
    ]
    cases += [(f"topp {p:g}", None, Uplink.of_mode(Mode.TOPP, ENTRIES[Mode.TOPP], p, 0)) for p in UPLINK_P]
    for name, k, uplink in cases:
        sent = [draft_distribution(one.logits, sampling, uplink) for one in positions]
        rows.append(_row(corpus, name, k, *_sent(corpus, sent)))
    whole = [full_distribution(one.logits, sampling) for one in positions]
    rows.append(_row(corpus, str(Mode.FULL), vocab_size, *_sent(corpus, whole)))
    return rows


def _row(
    corpus: Corpus, case: str, uplink_k: int | None, size: float, acceptance: float | None, entries: float | None
) -> dict[str, Value]:
    return {
        "case": case,
        "temperature": corpus.sampling.temperature,
        "uplink_k": uplink_k,
        "bytes_per_token": size,
        "papers_bytes": 2 * uplink_k if uplink_k else None,
        "acceptance": acceptance,
        "entries": entries,
        "positions": len(corpus.positions),
    }


def _sent(corpus: Corpus, sent: Sequence[SparseDistribution]) -> tuple[float, float, float]:
    """Bytes a token at the socket, how likely it stands, and entries sent of its distribution."""
    vocab_size = sent[0].vocab_size
    codec = FrameCodec(vocab_size, Limits(max_uplink_k=vocab_size))
    sizes = [send(codec, distributions, corpus.sampling.seed)[0] for distributions in by_round(sent)]
    return sum(sizes) / len(sent), corpus.mean_acceptance(sent), float(np.mean([len(one) for one in sent]))


def _bytes_of_ids(corpus: Corpus) -> float:
    """A token at the socket where a Draft has nothing but ids."""
    codec = FrameCodec(len(corpus.positions[0].logits))
    ids = [position.token_id for position in corpus.positions]
    frames = [
        codec.encode(Draft(0, 1, tuple(ids[start : start + DRAFT_LEN]))) for start in range(0, len(ids), DRAFT_LEN)
    ]
    return sum(map(socket_bytes, frames)) / len(ids)


def _whole_share(corpus: Corpus) -> float:
    """How often both models' likeliest tokens are the same."""
    return float(np.mean([one.logits.argmax() == one.target_probs.argmax() for one in corpus.positions]))


def _coupled_share(corpus: Corpus) -> float:
    """How often both ends come to the same token with the same noise."""
    same = []
    for position in corpus.positions:
        with np.errstate(divide="ignore"):  # a token of probability 0 has no chance
            scores = np.log(position.target_probs)
        for seed in SEEDS:
            drafted, _ = coupled_token(position.logits, replace(corpus.sampling, seed=seed), position.place)
            chosen, _ = PositionNoise(seed, position.place, len(scores)).choose(scores)
            same.append(drafted == chosen)
    return float(np.mean(same))
