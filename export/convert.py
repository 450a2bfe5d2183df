"""Export a bundle: convert to ONNX, edit the graph, quantize, check quality, write the manifest.

Knows the order of the steps and the manifest. Does not know how a step works.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from export import graph, quality, source
from export.atomic_folder import atomic_folder, is_free
from export.converters import Converter, convert_to_onnx
from export.quantize import Precision, quantize
from export.quiet import quiet_tools
from protocol.bundle import (
    CHAT_TEMPLATE_NAME,
    MANIFEST_NAME,
    MODEL_NAME,
    QUALITY_UPLINK_K,
    TOKENIZER_NAME,
    FileRecord,
    Manifest,
    QualityFigures,
    vocabulary_hash,
)
from protocol.errors import MismatchError, ModelError, SettingsError


@dataclass(frozen=True)
class ConvertSettings:
    """Export settings; ``target`` names a target model that the draft model must match."""

    converter: Converter = Converter.AUTO
    precision: Precision = Precision.INT8
    target: str | None = None


@dataclass(frozen=True)
class SourceModel:
    """A model's configuration and tokenizer, without its weights."""

    name: str
    folder: Path
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]

    @classmethod
    def read(cls, name: str, scratch: Path, *, weights: bool) -> "SourceModel":
        """Read the configuration and tokenizer of model ``name``."""
        folder = source.model_folder(name, scratch, weights=weights)
        tokenizer = source.load_tokenizer(folder)
        return cls(name, folder, source.load_config(folder), tokenizer, source.stop_ids_of(folder))

    @property
    def vocabulary(self) -> dict[str, int]:
        """Map of token to id."""
        vocabulary: dict[str, int] = self.tokenizer.get_vocab()
        return vocabulary


def convert(model: str, bundle: Path, settings: ConvertSettings, console: Console) -> Manifest:
    """Export ``model`` as the folder ``bundle`` and return the manifest.

    Raises:
        SettingsError: ``bundle`` exists and is neither empty nor a bundle.
        ModelError: a model cannot be read or converted.
        MismatchError: the target model has a different vocabulary or different stop ids.
        QualityError: the quality check fails.
    """
    if not is_free(bundle) and not (bundle / MANIFEST_NAME).is_file():
        raise SettingsError("BUNDLE", str(bundle), "a new or empty folder, or a bundle to replace")
    with atomic_folder(bundle) as output, tempfile.TemporaryDirectory(dir=output.parent) as scratch:
        with console.status("reading the model"):
            draft = SourceModel.read(model, Path(scratch, "draft"), weights=True)
            if settings.target is not None:
                check_match(draft, SourceModel.read(settings.target, Path(scratch, "target"), weights=False))
        return _write_bundle(output, draft, settings, Path(scratch, "graph"), console)


def check_match(draft: SourceModel, target: SourceModel) -> None:
    """Check that two models have the same vocabulary and stop ids.

    Raises:
        MismatchError: they differ.
    """
    if vocabulary_hash(draft.vocabulary) != vocabulary_hash(target.vocabulary):
        raise MismatchError(
            f"{draft.name!r} has {len(draft.vocabulary)} tokens and {target.name!r} has "
            f"{len(target.vocabulary)}, and the vocabularies differ; a draft model needs its target's vocabulary"
        )
    if draft.stop_ids != target.stop_ids:
        raise MismatchError(
            f"{draft.name!r} has the stop ids {list(draft.stop_ids)}, {target.name!r} has "
            f"{list(target.stop_ids)}; both need the same eos_token_id in generation_config.json"
        )


def _write_bundle(
    output: Path, draft: SourceModel, settings: ConvertSettings, scratch: Path, console: Console
) -> Manifest:
    with console.status("converting to ONNX"):
        converter = convert_to_onnx(draft.folder, scratch, settings.converter)
    with console.status(f"quantizing the weights to {settings.precision}"):
        cache = _write_graph(scratch / MODEL_NAME, output / MODEL_NAME, settings.precision)
        _write_tokenizer(output, draft.tokenizer)
    figures = _check_quality(output / MODEL_NAME, draft, cache, settings.precision, console)
    manifest = Manifest(
        name=Path(draft.name).absolute().name.removesuffix(".gguf"),
        architecture=draft.config.model_type,
        converter=converter,
        precision=settings.precision,
        cache_kind=cache.kind,
        vocab_size=_vocab_size(draft),
        vocabulary_hash=vocabulary_hash(draft.vocabulary),
        stop_ids=draft.stop_ids,
        bos_token=draft.tokenizer.bos_token or "",
        eos_token=draft.tokenizer.eos_token or "",
        context_length=_context_length(draft),
        layers=cache.layers,
        kv_heads=cache.kv_heads,
        head_size=cache.head_size,
        quality=figures,
        files={path.name: FileRecord.of(path) for path in sorted(output.iterdir())},
    )
    manifest.write(output)
    return manifest


def _write_graph(converted: Path, output: Path, precision: Precision) -> graph.Cache:
    model = graph.load(converted)
    graph.keep_last_position(model)
    with quiet_tools():
        model = quantize(model, precision)
    graph.save(model, output)
    return graph.Cache.of(model)


def _write_tokenizer(output: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.backend_tokenizer.save(str(output / TOKENIZER_NAME))
    if tokenizer.chat_template is not None:
        (output / CHAT_TEMPLATE_NAME).write_text(tokenizer.chat_template, encoding="utf-8")


def _check_quality(
    graph_path: Path, draft: SourceModel, cache: graph.Cache, precision: Precision, console: Console
) -> QualityFigures:
    model = source.load_model(draft.folder)
    steps = 2 * quality.NEW_TOKENS * len(quality.PROMPTS)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("checking quality", total=steps)
        figures = quality.measure(
            model, draft.tokenizer, graph_path, cache, _vocab_size(draft), lambda: progress.advance(task)
        )
    limits = quality.LIMITS[precision]
    console.print(_quality_table(figures, limits))
    quality.check(figures, limits)
    return figures


def _quality_table(figures: QualityFigures, limits: quality.QualityLimits) -> Table:
    table = Table("quality check against the source model", "measured", "minimum")
    for label, name in (("argmax agreement", "argmax_agreement"), ("overlap at temperature 1", "overlap")):
        table.add_row(label, f"{getattr(figures, name):.3f}", f"{getattr(limits, name):.2f}")
    table.add_row(f"acceptance in mode topk, K = {QUALITY_UPLINK_K}", f"{figures.topk_acceptance:.3f}", "")
    table.add_row("acceptance in mode coupled", f"{figures.coupled_acceptance:.3f}", "")
    return table


def _vocab_size(draft: SourceModel) -> int:
    return max(draft.vocabulary.values()) + 1


def _context_length(draft: SourceModel) -> int:
    length = getattr(draft.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(length, int):
        raise ModelError(f"the configuration of {draft.name!r} has no max_position_embeddings")
    return length
