"""Export a bundle: convert to ONNX, build the graph or candidates for it, write the manifest.

Knows the order of the steps and the manifest. Does not know how a step works.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from common.chat_template import ChatTemplate, default_template
from common.gguf_metadata import gguf_parameters
from common.hub import model_name
from common.stop_ids import all_stop_ids
from export import quality, source
from export.atomic_folder import atomic_folder, is_free
from export.candidates import Built, CandidateBuilder, candidate_table, progress_bar
from export.converters import Converter, Processor, convert_to_onnx
from export.quantize import CANDIDATES, FORMATS, Precision, WeightFormat
from export.resources import check_disk, check_memory
from export.source_model import Models, SourceModel
from export.tokenizer_check import check_template, check_tokenizer
from export.vocabulary_bridge import ExportedBridge
from export.weight_choice import Conditions, TargetText, WeightChoice
from protocol.bundle import (
    CHAT_TEMPLATE_NAME,
    DRAFT_CHAT_TEMPLATE_NAME,
    DRAFT_TOKENIZER_NAME,
    MANIFEST_NAME,
    MODEL_NAME,
    TOKENIZER_NAME,
    Candidate,
    DraftVocabulary,
    FileRecord,
    Manifest,
)
from protocol.errors import ModelError, SettingsError
from protocol.vocabulary import vocabulary_hash

_TOOLS = ("edgedraft", "onnx", "onnxruntime", "torch", "transformers")
_MEMORY_BYTES, _DISK_BYTES = 12, 10
"""Of each parameter, at most: of the float32 graph and its copies in memory; of it and all candidates on disk."""
_UNPACKED_BYTES = 4
"""Of each parameter of a GGUF file, on disk: of the model folder that it is unpacked to."""
_PACKAGES = {Converter.GENAI: "onnxruntime-genai", Converter.OPTIMUM: "optimum-onnx"}


@dataclass(frozen=True)
class ConvertSettings:
    """Export settings.

    Attributes:
        converter: see ``Converter``.
        precision: of the weights; None compares formats and keeps one.
        target: a target model, whose tokens the bundle's session has.
        conditions: for which the speed is predicted, where there is a target.
        processor: of the device; for a GPU the weights are float16.
    """

    converter: Converter = Converter.AUTO
    precision: Precision | None = Precision.INT8
    target: str | None = None
    conditions: Conditions = field(default_factory=Conditions)
    processor: Processor = Processor.CPU

    def __post_init__(self) -> None:
        if self.converter is Converter.OPTIMUM and self.processor is Processor.CUDA:
            raise SettingsError("converter", self.converter.value, "auto or genai with --for cuda")


def convert(model: str, bundle: Path, settings: ConvertSettings, console: Console) -> Manifest:
    """Export ``model`` as the folder ``bundle`` and return the manifest.

    Raises:
        SettingsError: ``bundle`` exists and is neither empty nor a bundle.
        ModelError: a model cannot be read or converted, or memory or disk are too small.
        MismatchError: the draft model cannot spell the tokens of a target with another vocabulary.
        QualityError: the quality check fails.
    """
    check_bundle_folder(bundle)
    with atomic_folder(bundle) as output, tempfile.TemporaryDirectory(dir=output.parent) as scratch:
        with console.status("reading the models"):
            draft = SourceModel.read(model, Path(scratch, "draft"))
            models = Models(draft, _read_target(settings.target, Path(scratch, "target")))
        _print_stop_ids(models.session, console)
        return _write_bundle(output, models, settings, Path(scratch, "graph"), console)


def check_bundle_folder(bundle: Path) -> None:
    """Check that a bundle may be written as ``bundle``.

    Raises:
        SettingsError: it exists and is neither empty nor a bundle.
    """
    if not is_free(bundle) and not _is_bundle(bundle):
        raise SettingsError("BUNDLE", str(bundle), "a new or empty folder, or a bundle to replace")


def _is_bundle(folder: Path) -> bool:
    """Whether a folder has a manifest of any format version; other files of that name are common."""
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and {"format_version", "files"} <= manifest.keys()


def _read_target(name: str | None, scratch: Path) -> SourceModel | None:
    return None if name is None else SourceModel.read(name, scratch)


def _print_stop_ids(model: SourceModel, console: Console) -> None:
    """Say which source names which stop ids, and warn where they disagree."""
    ids = all_stop_ids(model.stop_sources)
    names = model.tokenizer.convert_ids_to_tokens(sorted(ids))
    told = ", ".join(f"{token_id} {name}" for token_id, name in zip(sorted(ids), names, strict=True)) or "none"
    sources = "; ".join(f"{name}: {sorted(named)}" for name, named in model.stop_sources.items())
    console.print(f"stop ids: {told} ({sources})", markup=False, highlight=False, soft_wrap=True)
    if any(named != ids for named in model.stop_sources.values()):
        console.print(
            "warning: the sources of stop ids disagree; an answer ends at any of them", highlight=False, soft_wrap=True
        )


def _write_bundle(output: Path, models: Models, settings: ConvertSettings, scratch: Path, console: Console) -> Manifest:
    draft, target, bridge = models.draft, models.target, None
    prompts = own_prompts = _write_text_files(output, models.session, TOKENIZER_NAME, CHAT_TEMPLATE_NAME)
    if models.are_bridged:
        own_prompts = _write_text_files(output, draft, DRAFT_TOKENIZER_NAME, DRAFT_CHAT_TEMPLATE_NAME)
        bridge = ExportedBridge(output, models, prompts, own_prompts)
        console.print(bridge.notice, markup=False, highlight=False, soft_wrap=True)
    with console.status("reading the weights"):
        weights = _weights(draft, output, scratch / "weights")
    with console.status("converting to ONNX"):
        converter = convert_to_onnx(weights, scratch, settings.converter, settings.processor)
    text = _source_text(weights, own_prompts, models.graph_tokens, console)
    builder = CandidateBuilder(scratch / MODEL_NAME, scratch / "candidates", text, console)
    choice = None
    if target is not None and (bridge or settings.precision is None):
        target_text = _target_text(target, prompts, models.vocab_size, settings.conditions, scratch / "target", console)
        choice = WeightChoice(
            target_text, models.vocab_size, settings.conditions, console, bridge.forcing if bridge else None
        )
    kept, candidates = _built(builder, settings, choice, console)
    own = bridge.draft_vocabulary(choice.text, choice.quality[kept.weights.name]) if bridge and choice else None
    for path in kept.graph_path.parent.iterdir():
        path.rename(output / path.name)
    return _write_manifest(output, models, converter, kept, candidates, own)


def _weights(draft: SourceModel, output: Path, scratch: Path) -> Path:
    """The folder of the draft model with its weights; a GGUF file is unpacked into ``scratch``.

    Raises:
        ModelError: they cannot be read, or memory or disk are too small for the export.
    """
    path = Path(draft.name).expanduser()
    if path.is_file():
        _check_room(output, gguf_parameters(path), _DISK_BYTES + _UNPACKED_BYTES)
    folder = source.model_folder(draft.name, scratch)
    _check_room(output, source.parameter_count(folder), _DISK_BYTES)
    return folder


def _check_room(output: Path, parameters: int, disk_bytes: int) -> None:
    check_memory(_MEMORY_BYTES * parameters)
    check_disk({output: disk_bytes * parameters})


def _built(
    builder: CandidateBuilder, settings: ConvertSettings, choice: WeightChoice | None, console: Console
) -> tuple[Built, list[Candidate]]:
    """The graph that the bundle gets, and the formats that were compared for the target."""
    precision = settings.precision
    if choice is None:
        kept = _default(builder, console) if precision is None else _checked(builder.build(FORMATS[precision]))
        return kept, []
    if settings.processor is Processor.CUDA and FORMATS[Precision.FP16].name not in settings.conditions.draft_ms:
        return _without_prediction(builder, choice, console), []
    return _best(builder, choice, CANDIDATES if precision is None else [FORMATS[precision]], console)


def _source_text(
    folder: Path, prompts: list[list[int]], vocab_size: int, console: Console
) -> list[quality.Continuation]:
    model = source.load_model(folder)
    with progress_bar(console) as progress:
        task = progress.add_task("text of the source model", total=quality.NEW_TOKENS * len(prompts))
        return quality.sample_continuations(
            model, prompts, vocab_size, quality.NEW_TOKENS, lambda: progress.advance(task)
        )


def _checked(built: Built) -> Built:
    built.check()
    return built


def _default(builder: CandidateBuilder, console: Console) -> Built:
    """int8, and what int4 would cost; without a target nothing tells which drafts faster."""
    kept, other = _checked(builder.build(FORMATS[Precision.INT8])), builder.build(FORMATS[Precision.INT4])
    console.print(
        f"int8 is kept: int4 would take {other.size / 1e6:.0f} MB instead of {kept.size / 1e6:.0f} MB, and agree with "
        f"the source model in {other.figures.argmax_agreement:.3f} instead of {kept.figures.argmax_agreement:.3f} of "
        f"the tokens at temperature 0, {other.figures.coupled_acceptance:.3f} instead of "
        f"{kept.figures.coupled_acceptance:.3f} at 1; --target MODEL compares their speed",
        highlight=False,
        soft_wrap=True,
    )
    return kept


def _without_prediction(builder: CandidateBuilder, choice: WeightChoice, console: Console) -> Built:
    """The graph for a GPU: how long it takes on the CPU here says nothing of the device."""
    kept = _checked(builder.build(FORMATS[Precision.FP16]))
    choice.agreement(kept)
    console.print(
        "no speed is predicted for a GPU without --draft-ms: edgedraft-device doctor measures it on the device",
        highlight=False,
        soft_wrap=True,
    )
    return kept


def _best(
    builder: CandidateBuilder, choice: WeightChoice, formats: Sequence[WeightFormat], console: Console
) -> tuple[Built, list[Candidate]]:
    """The format with the highest predicted tokens per second, and all that were compared."""
    built = [builder.build(weights) for weights in formats]
    candidates = choice.compare(built)
    console.print(candidate_table(candidates))
    kept, figures = next(pair for pair in zip(built, candidates, strict=True) if not pair[1].reason)
    alone = 1 / choice.text.pass_seconds
    console.print(
        f"predicted: {figures.tokens_per_second:.1f} tokens/s, {alone:.1f} of the target alone",
        highlight=False,
        soft_wrap=True,
    )
    if round(figures.tokens_per_second / alone, 2) <= 1:
        console.print(
            "warning: with these times the target alone is as fast; choose a smaller draft model, or give the times "
            "of device and base station with --draft-ms and --target-ms",
            highlight=False,
            soft_wrap=True,
        )
    return kept, candidates


def _target_text(
    target: SourceModel,
    prompts: list[list[int]],
    vocab_size: int,
    conditions: Conditions,
    scratch: Path,
    console: Console,
) -> TargetText:
    with console.status("loading the target"):
        folder = source.model_folder(target.name, scratch)
        check_memory(sum(path.stat().st_size for path in folder.glob("*.safetensors")))
        model = source.load_model(folder, "auto")
    stop_ids = all_stop_ids(target.stop_sources)
    return TargetText.generate(model, prompts, vocab_size, stop_ids, conditions.target_ms, console)


def _write_manifest(
    output: Path,
    models: Models,
    converter: Converter,
    kept: Built,
    candidates: list[Candidate],
    own: DraftVocabulary | None,
) -> Manifest:
    cache, draft, session, vocab_size = kept.cache, models.draft, models.session, models.vocab_size
    manifest = Manifest(
        name=model_name(draft.name),
        architecture=draft.config.model_type,
        converter=converter,
        precision=kept.weights.precision,
        cache_kind=cache.kind,
        vocab_size=vocab_size,
        vocabulary_hash=vocabulary_hash(session.vocabulary, vocab_size),
        stop_ids=tuple(token_id for token_id in sorted(all_stop_ids(session.stop_sources)) if token_id < vocab_size),
        bos_token=session.bos_token,
        eos_token=session.eos_token,
        context_length=_context_length(draft),
        layers=cache.layers,
        kv_heads=cache.kv_heads,
        head_size=cache.head_size,
        quality=kept.figures,
        files={path.name: FileRecord.of(path) for path in sorted(output.iterdir())},
        origin=draft.origin(_versions(converter)),
        candidates=tuple(candidates),
        draft_vocabulary=own,
        cache_dtype=cache.dtype,
    )
    manifest.write(output)
    return manifest


def _versions(converter: Converter) -> dict[str, str]:
    """The versions of what the bytes of a bundle depend on."""
    return {name: version(name) for name in (*_TOOLS, _PACKAGES[converter])}


def _write_text_files(output: Path, model: SourceModel, tokenizer_name: str, template_name: str) -> list[list[int]]:
    """Write a tokenizer and its chat template, check both, and encode the prompts of the quality check."""
    tokenizer = model.tokenizer
    tokenizer.backend_tokenizer.save(str(output / tokenizer_name))
    check_tokenizer(output / tokenizer_name)
    template = None
    if (text := default_template(tokenizer.chat_template)) is not None:
        (output / template_name).write_text(text, encoding="utf-8")
        template = ChatTemplate(text, {"bos_token": model.bos_token, "eos_token": model.eos_token})
        check_template(template, tokenizer)
    return [quality.prompt_ids(tokenizer, template, prompt) for prompt in quality.PROMPTS]


def _context_length(draft: SourceModel) -> int:
    length = getattr(draft.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(length, int):
        raise ModelError(f"the configuration of {draft.name!r} has no max_position_embeddings")
    return length
