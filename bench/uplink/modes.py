"""Uplink bytes of a drafted token and its acceptance, for every mode and K, at several temperatures.

Every mode sends the same positions through the real frames. The probability that a
token is accepted is Σ min(target, draft) of the distribution it is sampled from; in
mode ``coupled`` it is the share of positions where both ends sample the same token.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import numpy as np
import typer

from basestation.target.target_model import TargetModel
from bench.setup.options import (
    BundleOption,
    CountOption,
    DtypeOption,
    JsonOption,
    PromptsOption,
    RoundsOption,
    TargetOption,
    console,
    progress_bar,
)
from bench.setup.results import Results, Row
from bench.uplink.positions import DRAFT_LEN, Corpus, by_round, collect, load_draft_model, send
from device.drafting.sampling import coupled_token, full_distribution, sparse_distribution
from device.settings import DEFAULT_UPLINK_K, UplinkSettings
from protocol.coupling import PositionNoise
from protocol.errors import SettingsError
from protocol.frames import FrameCodec
from protocol.limits import Limits
from protocol.messages import MAX_TEMPERATURE, Draft, DraftDistribution, Mode, Sampling
from protocol.zmtp import socket_bytes

UPLINK_K = (1, 3, 8, 32, 128, 320, 3200)
UPLINK_P = (0.9, 0.95, 0.99)
TEMPERATURES = (0.0, 0.7, 1.0)
SEEDS = range(1, 9)
"""Seeds of the noise over which mode ``coupled`` is averaged."""


def uplink(
    bundle: BundleOption,
    target: TargetOption,
    dtype: DtypeOption = "float32",
    prompts: PromptsOption = None,
    count: CountOption = 20,
    rounds: RoundsOption = 2,
    uplink_ks: Annotated[
        list[int] | None,
        typer.Option(
            "--uplink-k", help="Repeatable. Default: 1, 3, 8, 32, 128, 320, 3200 and the vocabulary size.", min=1
        ),
    ] = None,
    temperatures: Annotated[
        list[float] | None,
        typer.Option("--temperature", help="Repeatable. Default: 0, 0.7 and 1.", min=0, max=MAX_TEMPERATURE),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Measure uplink bytes and acceptance of a drafted token, for each mode and K."""
    draft_model, prompt_ids = load_draft_model(bundle, prompts, count)
    vocab_size = draft_model.manifest.vocab_size
    checked = check_uplink_k(uplink_ks or [*UPLINK_K, vocab_size], vocab_size)
    samplings = [Sampling(temperature, seed=1) for temperature in temperatures or TEMPERATURES]
    target_model = TargetModel.load(target, dtype)
    described: Row = {
        "draft": draft_model.manifest.name,
        "target": target_model.name,
        "dtype": dtype,
        "vocab_size": vocab_size,
    }
    measured = Results(described, [])
    with progress_bar() as progress:
        task = progress.add_task("prompts", total=len(prompt_ids) * len(samplings))
        for sampling in samplings:
            corpus = collect(draft_model, target_model, prompt_ids, rounds, sampling, lambda: progress.advance(task))
            measured = Results(described, [*measured.rows, *uplink_rows(corpus, checked)])
            measured.write(json_file)
    measured.show(console)


def check_uplink_k(uplink_k: Sequence[int], vocab_size: int) -> Sequence[int]:
    """Return the values of K unchanged.

    Raises:
        SettingsError: a value is below 1 or above the vocabulary size.
    """
    for one in uplink_k:
        if not 1 <= one <= vocab_size:
            raise SettingsError("uplink_k", one, f"1 to {vocab_size}, the size of the vocabulary")
    return uplink_k


def uplink_rows(corpus: Corpus, uplink_k: Sequence[int]) -> list[Row]:
    """A row per mode, in mode ``topk`` per K; ``paper_bytes`` are K probabilities in FP16 without token ids."""
    sampling, positions = corpus.sampling, corpus.positions
    vocab_size = len(positions[0].logits)
    ids_mode = Mode.IDS if sampling.greedy else Mode.COUPLED
    acceptance = _argmax_agreement(corpus) if sampling.greedy else _coupled_agreement(corpus)
    rows = [_row(corpus, str(Mode.TARGET), None, 0.0, None, None)]
    rows.append(_row(corpus, str(ids_mode), None, _bytes_of_ids(corpus), acceptance, None))
    cases: list[tuple[str, int | None, UplinkSettings]] = [
        (f"topk {k if k < vocab_size else 'V'}", k, UplinkSettings.of_mode(Mode.TOPK, k, 1.0, 0)) for k in uplink_k
    ]
    topp_k = DEFAULT_UPLINK_K[Mode.TOPP]
    cases += [(f"topp {p:g}", None, UplinkSettings.of_mode(Mode.TOPP, topp_k, p, 0)) for p in UPLINK_P]
    for name, k, settings in cases:
        sent = [sparse_distribution(one.logits, sampling, settings) for one in positions]
        rows.append(_row(corpus, name, k, *_measure(corpus, sent)))
    full = [full_distribution(one.logits, sampling) for one in positions]
    rows.append(_row(corpus, str(Mode.FULL), vocab_size, *_measure(corpus, full)))
    return rows


def _row(
    corpus: Corpus, case: str, uplink_k: int | None, size: float, acceptance: float | None, entries: float | None
) -> Row:
    return {
        "case": case,
        "temperature": corpus.sampling.temperature,
        "uplink_k": uplink_k,
        "bytes_per_token": size,
        "paper_bytes": 2 * uplink_k if uplink_k else None,
        "acceptance": acceptance,
        "entries": entries,
        "positions": len(corpus.positions),
    }


def _measure(corpus: Corpus, sent: Sequence[DraftDistribution]) -> tuple[float, float, float]:
    """Bytes of a token at the socket, its acceptance, and the number of entries sent for it."""
    vocab_size = sent[0].vocab_size
    codec = FrameCodec(vocab_size, Limits(max_uplink_k=vocab_size))
    sizes = [send(codec, distributions, corpus.sampling.seed)[0] for distributions in by_round(sent)]
    return sum(sizes) / len(sent), corpus.mean_acceptance(sent), float(np.mean([len(one) for one in sent]))


def _bytes_of_ids(corpus: Corpus) -> float:
    """Bytes of a token at the socket in a Draft with ids only."""
    codec = FrameCodec(len(corpus.positions[0].logits))
    ids = [position.token_id for position in corpus.positions]
    frames = [
        codec.encode(Draft(0, 1, tuple(ids[start : start + DRAFT_LEN]))) for start in range(0, len(ids), DRAFT_LEN)
    ]
    return sum(map(socket_bytes, frames)) / len(ids)


def _argmax_agreement(corpus: Corpus) -> float:
    """The share of positions where both models have the same argmax."""
    return float(np.mean([one.logits.argmax() == one.target_probs.argmax() for one in corpus.positions]))


def _coupled_agreement(corpus: Corpus) -> float:
    """The share of positions and seeds where both ends sample the same token with the same noise."""
    agreements = []
    for one in corpus.positions:
        with np.errstate(divide="ignore"):  # tokens of probability 0
            scores = np.log(one.target_probs)
        for seed in SEEDS:
            drafted, _ = coupled_token(one.logits, replace(corpus.sampling, seed=seed), one.index)
            chosen, _ = PositionNoise(seed, one.index, len(scores)).choose(scores)
            agreements.append(drafted == chosen)
    return float(np.mean(agreements))
