"""Export a bundle: convert to ONNX, edit the graph, quantize, check quality, write the manifest.

Knows the order of the steps and the manifest. Does not know how a step works.
"""

import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from common.chat_template import ChatTemplate, default_template
from common.hub import model_name
from common.stop_ids import all_stop_ids
from export import graph, quality, source
from export.atomic_folder import atomic_folder, is_free
from export.converters import Converter, convert_to_onnx
from export.quantize import Precision, quantize
from export.quiet import quiet_tools
from export.source_model import SourceModel, check_match
from export.tokenizer_check import check_template, check_tokenizer
from protocol.bundle import (
    CHAT_TEMPLATE_NAME,
    MANIFEST_NAME,
    MODEL_NAME,
    QUALITY_UPLINK_K,
    TOKENIZER_NAME,
    FileRecord,
    Manifest,
    QualityFigures,
)
from protocol.errors import ModelError, SettingsError
from protocol.vocabulary import vocabulary_hash

_TOOLS = ("edgedraft", "onnx", "onnxruntime", "torch", "transformers")
_PACKAGES = {Converter.GENAI: "onnxruntime-genai", Converter.OPTIMUM: "optimum-onnx"}


@dataclass(frozen=True)
class ConvertSettings:
    """Export settings; ``target`` names a target model that the draft model must match."""

    converter: Converter = Converter.AUTO
    precision: Precision = Precision.INT8
    target: str | None = None


def convert(model: str, bundle: Path, settings: ConvertSettings, console: Console) -> Manifest:
    """Export ``model`` as the folder ``bundle`` and return the manifest.

    Raises:
        SettingsError: ``bundle`` exists and is neither empty nor a bundle.
        ModelError: a model cannot be read or converted.
        MismatchError: the target model gives an id to another token.
        QualityError: the quality check fails.
    """
    if not is_free(bundle) and not (bundle / MANIFEST_NAME).is_file():
        raise SettingsError("BUNDLE", str(bundle), "a new or empty folder, or a bundle to replace")
    with atomic_folder(bundle) as output, tempfile.TemporaryDirectory(dir=output.parent) as scratch:
        with console.status("reading the model"):
            draft = SourceModel.read(model, Path(scratch, "draft"), weights=True)
            vocab_size = draft.vocab_size
            if settings.target is not None:
                target = SourceModel.read(settings.target, Path(scratch, "target"), weights=False)
                check_match(draft, target)
                vocab_size = min(vocab_size, target.vocab_size)
        _print_stop_ids(draft, console)
        return _write_bundle(output, draft, vocab_size, settings, Path(scratch, "graph"), console)


def _print_stop_ids(draft: SourceModel, console: Console) -> None:
    """Say which source names which stop ids, and warn where they disagree."""
    ids = all_stop_ids(draft.stop_sources)
    names = draft.tokenizer.convert_ids_to_tokens(sorted(ids))
    told = ", ".join(f"{token_id} {name}" for token_id, name in zip(sorted(ids), names, strict=True)) or "none"
    sources = "; ".join(f"{name}: {sorted(named)}" for name, named in draft.stop_sources.items())
    console.print(f"stop ids: {told} ({sources})", markup=False, highlight=False, soft_wrap=True)
    if any(named != ids for named in draft.stop_sources.values()):
        console.print(
            "warning: the sources of stop ids disagree; an answer ends at any of them", highlight=False, soft_wrap=True
        )


def _write_bundle(
    output: Path, draft: SourceModel, vocab_size: int, settings: ConvertSettings, scratch: Path, console: Console
) -> Manifest:
    with console.status("converting to ONNX"):
        converter = convert_to_onnx(draft.folder, scratch, settings.converter)
    with console.status(f"quantizing the weights to {settings.precision}"):
        cache = _write_graph(scratch / MODEL_NAME, output / MODEL_NAME, settings.precision)
        _write_tokenizer(output, draft.tokenizer)
    template = _checked_template(output, draft.tokenizer)
    figures = _check_quality(output / MODEL_NAME, draft, template, vocab_size, cache, settings.precision, console)
    manifest = Manifest(
        name=model_name(draft.name),
        architecture=draft.config.model_type,
        converter=converter,
        precision=settings.precision,
        cache_kind=cache.kind,
        vocab_size=vocab_size,
        vocabulary_hash=vocabulary_hash(draft.vocabulary, vocab_size),
        stop_ids=tuple(token_id for token_id in sorted(all_stop_ids(draft.stop_sources)) if token_id < vocab_size),
        bos_token=draft.tokenizer.bos_token or "",
        eos_token=draft.tokenizer.eos_token or "",
        context_length=_context_length(draft),
        layers=cache.layers,
        kv_heads=cache.kv_heads,
        head_size=cache.head_size,
        quality=figures,
        files={path.name: FileRecord.of(path) for path in sorted(output.iterdir())},
        origin=draft.origin(_versions(converter)),
    )
    manifest.write(output)
    return manifest


def _versions(converter: Converter) -> dict[str, str]:
    """The versions of what the bytes of a bundle depend on."""
    return {name: version(name) for name in (*_TOOLS, _PACKAGES[converter])}


def _write_graph(converted: Path, output: Path, precision: Precision) -> graph.Cache:
    model = graph.load(converted)
    graph.keep_last_position(model)
    with quiet_tools():
        model = quantize(model, precision)
    graph.save(model, output)
    return graph.Cache.of(model)


def _write_tokenizer(output: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.backend_tokenizer.save(str(output / TOKENIZER_NAME))
    if (template := default_template(tokenizer.chat_template)) is not None:
        (output / CHAT_TEMPLATE_NAME).write_text(template, encoding="utf-8")


def _checked_template(output: Path, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate | None:
    """Check the files that ship; return the chat template as a device renders it, if there is one."""
    check_tokenizer(output / TOKENIZER_NAME)
    if default_template(tokenizer.chat_template) is None:
        return None
    special = {"bos_token": tokenizer.bos_token or "", "eos_token": tokenizer.eos_token or ""}
    template = ChatTemplate((output / CHAT_TEMPLATE_NAME).read_text(encoding="utf-8"), special)
    check_template(template, tokenizer)
    return template


def _check_quality(
    graph_path: Path,
    draft: SourceModel,
    template: ChatTemplate | None,
    vocab_size: int,
    cache: graph.Cache,
    precision: Precision,
    console: Console,
) -> QualityFigures:
    model = source.load_model(draft.folder)
    steps = 2 * quality.NEW_TOKENS * len(quality.PROMPTS)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("checking quality", total=steps)
        figures = quality.measure(
            model, draft.tokenizer, template, graph_path, cache, vocab_size, lambda: progress.advance(task)
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


def _context_length(draft: SourceModel) -> int:
    length = getattr(draft.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(length, int):
        raise ModelError(f"the configuration of {draft.name!r} has no max_position_embeddings")
    return length
