"""What a bundle is and which targets it fits, and whether it is sound.

Reads the bundle alone; only a target that is named is looked up.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from rich.console import Group
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer

from common.vocabulary_map import VocabularyMap
from export.candidates import candidate_table
from export.graph import LOGITS, Cache
from export.source_model import SourceModel
from export.tokenizer_check import check_tokenizer
from protocol.bundle import DRAFT_TOKENIZER_NAME, MODEL_NAME, QUALITY_UPLINK_K, TOKENIZER_NAME, Manifest
from protocol.errors import BundleError, QualityError
from protocol.vocabulary import first_difference

_UNKNOWN = "not stated"


@dataclass(frozen=True)
class TargetFit:
    """Whether a target fits a bundle; ``reason`` says what differs, or is empty."""

    target: str
    fits: bool
    reason: str


def target_fits(bundle: Path, targets: Sequence[str]) -> list[TargetFit]:
    """Compare a bundle with targets as a base station does: its tokens must be the target's first ones.

    Raises:
        BundleError: the bundle's manifest or tokenizer cannot be read.
        ModelError: a target cannot be read.
    """
    manifest, path = Manifest.read(bundle), bundle / TOKENIZER_NAME
    try:
        vocabulary = Tokenizer.from_file(str(path)).get_vocab()
    except Exception as error:  # the library raises Exception itself
        raise BundleError(f"{str(path)!r} cannot be read: {error}; export the bundle again") from error
    return [_target_fit(manifest, vocabulary, target) for target in targets]


def _target_fit(manifest: Manifest, vocabulary: dict[str, int], name: str) -> TargetFit:
    with tempfile.TemporaryDirectory() as scratch:
        target = SourceModel.read(name, Path(scratch))
    if manifest.vocab_size > target.vocab_size:
        sizes = f"{manifest.vocab_size:,} tokens in the bundle, {target.vocab_size:,} in the target"
        return TargetFit(name, False, f"{sizes}; export it again with --target")
    first = {token: token_id for token, token_id in vocabulary.items() if token_id < manifest.vocab_size}
    difference = first_difference(first, target.vocabulary)
    if difference is None:
        return TargetFit(name, True, "")
    token_id, own, other = difference
    return TargetFit(name, False, f"id {token_id} is {own!r} in the bundle and {other!r} in the target")


def verify(bundle: Path) -> Manifest:
    """Check the files of a bundle, its tokenizers, and that its graph computes logits; return its manifest.

    Raises:
        BundleError: a file differs from its record, or the graph from the manifest.
        QualityError: the tokenizer does not encode its tokens to their ids.
    """
    manifest = Manifest.read(bundle)
    manifest.check_files(bundle)
    check_tokenizer(bundle / TOKENIZER_NAME)
    if (own := manifest.draft_vocabulary) is not None:
        check_tokenizer(bundle / DRAFT_TOKENIZER_NAME)
        VocabularyMap.read(bundle, manifest, own)
    cache = Cache.of(onnx.load(bundle / MODEL_NAME, load_external_data=False))
    stated = Cache(manifest.cache_kind, manifest.layers, manifest.kv_heads, manifest.head_size, manifest.cache_dtype)
    if cache != stated:
        raise BundleError(f"the graph has {cache}; the manifest says {stated}; export the bundle again")
    logits = _first_logits(bundle / MODEL_NAME, cache)
    if logits.size < manifest.graph_tokens:
        raise BundleError(
            f"the graph has {logits.size} logits; the manifest says {manifest.graph_tokens} tokens; "
            "export the bundle again"
        )
    if not np.isfinite(logits).all():
        raise QualityError("the graph computes logits that are NaN or infinite; export the bundle again")
    return manifest


def _first_logits(path: Path, cache: Cache) -> npt.NDArray[np.float32]:
    """The logits [V] after one token."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feeds = {name: np.zeros((1, cache.kv_heads, 0, cache.head_size), cache.dtype) for name in cache.past_names}
    ids = {"input_ids": np.zeros((1, 1), np.int64), "attention_mask": np.ones((1, 1), np.int64)}
    positions = {"position_ids": np.zeros((1, 1), np.int64)}
    wanted = {entry.name for entry in session.get_inputs()}
    inputs = {name: feed for name, feed in {**feeds, **ids, **positions}.items() if name in wanted}
    logits: npt.NDArray[np.float32] = session.run([LOGITS], inputs)[0][0, -1]
    return logits


def _vocabulary_rows(manifest: Manifest) -> dict[str, str]:
    """What ``inspect`` prints of a draft model with a vocabulary of its own."""
    if (own := manifest.draft_vocabulary) is None:
        return {}
    figures = own.quality
    return {
        "vocabulary": f"{own.vocab_size:,} tokens of its own, {own.common_tokens:,} of which the target has; they are "
        f"{own.coverage:.3f} of the target's text",
        "target": f"{own.target}: it accepts {figures.argmax_agreement:.3f} at temperature 0, "
        f"{figures.coupled_acceptance:.3f} in mode coupled and {figures.topk_acceptance:.3f} in mode topk at 1",
    }


def description(manifest: Manifest, fits: Sequence[TargetFit]) -> Group:
    """What ``inspect`` prints."""
    origin, quality = manifest.origin, manifest.quality
    sizes = [f"{name} {record.size / 1e6:.1f} MB" for name, record in manifest.files.items()]
    total = sum(record.size for record in manifest.files.values())
    rows = {
        "origin": origin.model or _UNKNOWN,
        "licence": origin.licence or _UNKNOWN,
        "made with": ", ".join(f"{name} {version}" for name, version in origin.versions.items()) or _UNKNOWN,
        "model": f"{manifest.name}: {manifest.architecture}, {manifest.layers} layers, context of "
        f"{manifest.context_length:,} tokens, {manifest.precision} by {manifest.converter}",
        "quality": f"against the source model at {quality.positions} positions: argmax agreement "
        f"{quality.argmax_agreement:.3f}, overlap {quality.overlap:.3f}, acceptance {quality.topk_acceptance:.3f} in "
        f"mode topk (K = {QUALITY_UPLINK_K}), {quality.coupled_acceptance:.3f} in mode coupled",
        **_vocabulary_rows(manifest),
        "files": f"{total / 1e6:.1f} MB: {', '.join(sizes)}",
        "fits": f"targets with the same tokens: {manifest.vocab_size:,}, SHA-256 {manifest.vocabulary_hash}",
    }
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in rows.items():
        table.add_row(name, Text(value))  # no markup: the texts are other people's
    for fit in fits:
        table.add_row("", Text(f"{fit.target}: " + ("fits" if fit.fits else f"does not fit, {fit.reason}")))
    return Group(table, candidate_table(manifest.candidates)) if manifest.candidates else Group(table)
