"""Export a bundle: convert to ONNX, build the graph or candidates for it, write the manifest.

Knows the order of the steps and the manifest. Does not know how a step works.
"""

import tempfile
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from common.chat_template import ChatTemplate, default_template
from common.hub import model_name
from common.stop_ids import all_stop_ids
from export import quality, source
from export.atomic_folder import atomic_folder, is_free
from export.candidates import Built, CandidateBuilder, candidate_table, progress_bar
from export.converters import Converter, convert_to_onnx
from export.quantize import CANDIDATES, FORMATS, Precision
from export.resources import check_disk, check_memory
from export.source_model import SourceModel, check_match
from export.tokenizer_check import check_template, check_tokenizer
from export.weight_choice import Conditions, TargetText, WeightChoice
from protocol.bundle import (
    CHAT_TEMPLATE_NAME,
    MANIFEST_NAME,
    MODEL_NAME,
    TOKENIZER_NAME,
    Candidate,
    FileRecord,
    Manifest,
)
from protocol.errors import ModelError, SettingsError
from protocol.vocabulary import vocabulary_hash

_TOOLS = ("edgedraft", "onnx", "onnxruntime", "torch", "transformers")
_MEMORY_BYTES, _DISK_BYTES = 12, 10
"""Of each parameter, at most: of the float32 graph and its copies in memory; of it and all candidates on disk."""
_PACKAGES = {Converter.GENAI: "onnxruntime-genai", Converter.OPTIMUM: "optimum-onnx"}


@dataclass(frozen=True)
class ConvertSettings:
    """Export settings.

    Attributes:
        converter: see ``Converter``.
        precision: of the weights; None compares formats and keeps one.
        target: a target model that the draft model must match.
        conditions: for which formats are compared, where there is a target.
    """

    converter: Converter = Converter.AUTO
    precision: Precision | None = Precision.INT8
    target: str | None = None
    conditions: Conditions = field(default_factory=Conditions)


def convert(model: str, bundle: Path, settings: ConvertSettings, console: Console) -> Manifest:
    """Export ``model`` as the folder ``bundle`` and return the manifest.

    Raises:
        SettingsError: ``bundle`` exists and is neither empty nor a bundle.
        ModelError: a model cannot be read or converted, or memory or disk are too small.
        MismatchError: the target model gives an id to another token.
        QualityError: the quality check fails.
    """
    if not is_free(bundle) and not (bundle / MANIFEST_NAME).is_file():
        raise SettingsError("BUNDLE", str(bundle), "a new or empty folder, or a bundle to replace")
    with atomic_folder(bundle) as output, tempfile.TemporaryDirectory(dir=output.parent) as scratch:
        with console.status("reading the models"):
            draft = SourceModel.read(model, Path(scratch, "draft"), weights=True)
            parameters = source.parameter_count(draft.folder)
            check_memory(_MEMORY_BYTES * parameters)
            check_disk({output: _DISK_BYTES * parameters})
            target = _read_target(settings.target, draft, Path(scratch, "target"))
        _print_stop_ids(draft, console)
        return _write_bundle(output, draft, target, settings, Path(scratch, "graph"), console)


def _read_target(name: str | None, draft: SourceModel, scratch: Path) -> SourceModel | None:
    if name is None:
        return None
    target = SourceModel.read(name, scratch, weights=False)
    check_match(draft, target)
    return target


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
    output: Path,
    draft: SourceModel,
    target: SourceModel | None,
    settings: ConvertSettings,
    scratch: Path,
    console: Console,
) -> Manifest:
    vocab_size = min(one.vocab_size for one in (draft, target) if one is not None)
    with console.status("converting to ONNX"):
        converter = convert_to_onnx(draft.folder, scratch, settings.converter)
        _write_tokenizer(output, draft.tokenizer)
    template = _checked_template(output, draft.tokenizer)
    prompts = [quality.prompt_ids(draft.tokenizer, template, prompt) for prompt in quality.PROMPTS]
    text = _source_text(draft, prompts, vocab_size, console)
    builder = CandidateBuilder(scratch / MODEL_NAME, scratch / "candidates", text, console)
    candidates: list[Candidate] = []
    if settings.precision is not None:
        kept = _checked(builder.build(FORMATS[settings.precision]))
    elif target is None:
        kept = _default(builder, console)
    else:
        target_text = _target_text(target, prompts, vocab_size, settings.conditions, scratch / "target", console)
        kept, candidates = _best(builder, WeightChoice(target_text, vocab_size, settings.conditions, console), console)
    for path in kept.graph_path.parent.iterdir():
        path.rename(output / path.name)
    return _write_manifest(output, draft, vocab_size, converter, kept, candidates)


def _source_text(
    draft: SourceModel, prompts: list[list[int]], vocab_size: int, console: Console
) -> list[quality.Continuation]:
    model = source.load_model(draft.folder)
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


def _best(builder: CandidateBuilder, choice: WeightChoice, console: Console) -> tuple[Built, list[Candidate]]:
    """The format with the highest predicted tokens per second, and all that were compared."""
    built = [builder.build(weights) for weights in CANDIDATES]
    candidates = choice.compare(built)
    console.print(candidate_table(candidates))
    kept = next(one for one, figures in zip(built, candidates, strict=True) if not figures.reason)
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
        model = source.load_model(source.model_folder(target.name, scratch), "auto")
    stop_ids = all_stop_ids(target.stop_sources)
    return TargetText.generate(model, prompts, vocab_size, stop_ids, conditions.target_ms, console)


def _write_manifest(
    output: Path,
    draft: SourceModel,
    vocab_size: int,
    converter: Converter,
    kept: Built,
    candidates: list[Candidate],
) -> Manifest:
    cache = kept.cache
    manifest = Manifest(
        name=model_name(draft.name),
        architecture=draft.config.model_type,
        converter=converter,
        precision=kept.weights.precision,
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
        quality=kept.figures,
        files={path.name: FileRecord.of(path) for path in sorted(output.iterdir())},
        origin=draft.origin(_versions(converter)),
        candidates=tuple(candidates),
    )
    manifest.write(output)
    return manifest


def _versions(converter: Converter) -> dict[str, str]:
    """The versions of what the bytes of a bundle depend on."""
    return {name: version(name) for name in (*_TOOLS, _PACKAGES[converter])}


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


def _context_length(draft: SourceModel) -> int:
    length = getattr(draft.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(length, int):
        raise ModelError(f"the configuration of {draft.name!r} has no max_position_embeddings")
    return length
