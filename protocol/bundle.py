"""The manifest of an exported draft model: what ``export`` writes and ``device`` loads.

A bundle is a folder that holds ``manifest.json`` and the files it lists. The
manifest states everything that a device needs, so that nothing is inferred from the
graph or from a configuration file of another project.
"""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from math import inf
from pathlib import Path
from typing import Any, Self

from protocol.errors import BundleError

MANIFEST_NAME = "manifest.json"
MODEL_NAME = "model.onnx"
TOKENIZER_NAME = "tokenizer.json"
CHAT_TEMPLATE_NAME = "chat_template.jinja"
DRAFT_TOKENIZER_NAME = "draft_tokenizer.json"
DRAFT_CHAT_TEMPLATE_NAME = "draft_chat_template.jinja"
VOCABULARY_MAP_NAME = "vocabulary_map.npy"
TEXT_NAMES = (TOKENIZER_NAME, CHAT_TEMPLATE_NAME)
"""The files that are enough without the draft model."""
FORMAT_VERSION = 6
_OLDEST_VERSION = 3
_ADDED_SINCE: Mapping[int, Mapping[str, Any]] = {
    4: {"origin": {"model": "", "licence": "", "versions": {}}, "candidates": []},
    5: {"draft_vocabulary": None},
    6: {"cache_dtype": "float32"},
}
"""The fields that each format has added, with their values in a manifest of an older one."""
CACHE_DTYPES = ("float32", "float16")
QUALITY_UPLINK_K = 32
_MOST_SHOWN = 60
_MOST_SHARE = 1.001
"""Sums of rounded probabilities may exceed 1."""


class CacheKind(StrEnum):
    """How a graph stores its KV cache."""

    SHARED = "shared"
    """Past and present share one preallocated buffer (GroupQueryAttention)."""
    GROWING = "growing"
    """The present is a copy of the past plus the new tokens, made at every step."""


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 (hex) of one file of a bundle."""

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Self:
        """The record of the file at ``path``."""
        with path.open("rb") as file:
            return cls(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


@dataclass(frozen=True)
class QualityFigures:
    """How closely an exported model matches its target, measured at ``positions`` positions.

    All figures are shares in [0, 1]. ``argmax_agreement`` counts the positions at which
    both models have the same argmax. The others are at temperature 1: ``overlap`` is the
    mean of Σ_v min(p(v), q(v)), the acceptance of mode ``full``; ``topk_acceptance`` is
    the same with the ``QUALITY_UPLINK_K`` most likely entries kept; ``coupled_acceptance``
    counts the positions at which both models choose the same token under the same noise.
    """

    argmax_agreement: float
    overlap: float
    topk_acceptance: float
    coupled_acceptance: float
    positions: int


@dataclass(frozen=True)
class Origin:
    """Where a draft model comes from: whose model it is, its licence ("" if unknown), and the versions of the tools."""

    model: str = ""
    licence: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Candidate:
    """A format of the weights that ``--precision auto`` has compared with others.

    Attributes:
        weights: name of the format.
        size: of the graph in bytes.
        argmax_agreement: with the source model, as in ``QualityFigures``.
        coupled_agreement: with the source model.
        greedy_acceptance: by the target at temperature 0, of its own greedy text.
        coupled_acceptance: by the target in mode ``coupled`` at temperature 1.
        draft_milliseconds: to draft a token.
        tokens_per_second: predicted, over both temperatures.
        reason: why it is not the bundle's; "" for the one that is.
    """

    weights: str
    size: int
    argmax_agreement: float
    coupled_agreement: float
    greedy_acceptance: float
    coupled_acceptance: float
    draft_milliseconds: float
    tokens_per_second: float
    reason: str = ""


@dataclass(frozen=True)
class DraftVocabulary:
    """The draft model's own vocabulary, where it is not the first of the target's.

    Attributes:
        target: the target whose vocabulary the session has.
        vocab_size: of the draft model.
        bos_token: of the draft model.
        eos_token: of the draft model.
        common_tokens: tokens that both vocabularies have.
        coverage: the share of the target's own text that consists of common tokens.
        quality: against the target, as it generates text.
    """

    target: str
    vocab_size: int
    bos_token: str
    eos_token: str
    common_tokens: int
    coverage: float
    quality: QualityFigures


@dataclass(frozen=True)
class Manifest:
    """Everything that a device needs to know about a draft model.

    ``vocab_size`` counts the tokenizer's ids; a graph may return more logits
    (padding), which are cut off. ``stop_ids`` end an answer. With a ``draft_vocabulary``
    tokens, stop ids and the tokenizer are the target's. ``cache_dtype`` is float16 in
    graphs for a GPU.
    """

    name: str
    architecture: str
    converter: str
    precision: str
    cache_kind: CacheKind
    vocab_size: int
    vocabulary_hash: str
    stop_ids: tuple[int, ...]
    bos_token: str
    eos_token: str
    context_length: int
    layers: int
    kv_heads: int
    head_size: int
    quality: QualityFigures
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    origin: Origin = field(default_factory=Origin)
    candidates: tuple[Candidate, ...] = ()
    draft_vocabulary: DraftVocabulary | None = None
    cache_dtype: str = "float32"
    format_version: int = FORMAT_VERSION

    @property
    def graph_tokens(self) -> int:
        """Tokens that the graph has logits for."""
        return self.draft_vocabulary.vocab_size if self.draft_vocabulary else self.vocab_size

    @property
    def target_quality(self) -> QualityFigures:
        """Figures against the target, or those against the source model where the target was not measured."""
        return self.draft_vocabulary.quality if self.draft_vocabulary else self.quality

    def write(self, folder: Path) -> None:
        """Write ``manifest.json`` into ``folder``."""
        (folder / MANIFEST_NAME).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the manifest of ``folder``.

        Raises:
            BundleError: it is missing or damaged, or has another format version.
        """
        path = folder / MANIFEST_NAME
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise BundleError(
                f"{str(folder)!r} is not a bundle: it has no {MANIFEST_NAME}; "
                f"make one with: edgedraft-export convert MODEL {folder}"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise BundleError(f"{str(path)!r} cannot be read: {error}; export the bundle again") from error
        try:
            return cls._from_json(values)
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError(f"{str(path)!r} is not a valid manifest: {error}; export the bundle again") from error

    @classmethod
    def _from_json(cls, values: Any) -> Self:
        if not isinstance(values, dict):
            raise TypeError(f"it holds a {type(values).__name__}; allowed: a JSON object")
        version = values.get("format_version")
        versions = range(_OLDEST_VERSION, FORMAT_VERSION + 1)
        if not isinstance(version, int) or version not in versions:
            raise ValueError(f"format_version is {version!r}; allowed: {', '.join(map(str, versions))}")
        for added in range(version + 1, FORMAT_VERSION + 1):
            values = {**_ADDED_SINCE[added], **values}
        _check_manifest(values)
        own = values["draft_vocabulary"]
        return cls(
            **{
                **values,
                "cache_kind": CacheKind(values["cache_kind"]),
                "stop_ids": tuple(values["stop_ids"]),
                "quality": QualityFigures(**values["quality"]),
                "origin": Origin(**values["origin"]),
                "candidates": tuple(Candidate(**candidate) for candidate in values["candidates"]),
                "draft_vocabulary": own and DraftVocabulary(**{**own, "quality": QualityFigures(**own["quality"])}),
                "files": {name: FileRecord(**record) for name, record in values["files"].items()},
            }
        )

    def check_files(self, folder: Path, names: Collection[str] | None = None) -> None:
        """Check the size and the hash of the listed files.

        Args:
            folder: of the bundle.
            names: of those that are checked; None checks all.

        Raises:
            BundleError: a file is missing or differs from its record, or a part of the model is not listed.
        """
        unlisted = sorted(path.name for path in folder.glob(f"{MODEL_NAME}*") if path.name not in self.files)
        if unlisted and names is None:
            raise BundleError(f"{str(folder / unlisted[0])!r} is not listed in the manifest; export the bundle again")
        checked = {name: record for name, record in self.files.items() if names is None or name in names}
        for name, record in checked.items():
            path = folder / name
            if not path.is_file():
                raise BundleError(f"{str(path)!r} is missing; export the bundle again")
            size = path.stat().st_size
            if size != record.size:
                raise BundleError(
                    f"{str(path)!r} has {size} bytes, and the manifest lists {record.size}; export or copy it again"
                )
            if FileRecord.of(path) != record:
                raise BundleError(f"{str(path)!r} has another SHA-256 than the manifest lists; export or copy it again")


def _check_manifest(values: dict[str, Any]) -> None:
    """Check every field of a manifest.

    Raises:
        TypeError, ValueError: one is missing, unknown or not allowed.
    """
    _check_fields(Manifest, values, "the manifest")
    _check_fields(QualityFigures, values["quality"], "quality")
    _check_fields(Origin, values["origin"], "origin")
    for index, candidate in enumerate(values["candidates"]):
        _check_fields(Candidate, candidate, f"candidates.{index}")
    needed = {MODEL_NAME, TOKENIZER_NAME}
    if (own := values["draft_vocabulary"]) is not None:
        _check_fields(DraftVocabulary, own, "draft_vocabulary")
        _check_fields(QualityFigures, own["quality"], "draft_vocabulary.quality")
        needed |= {DRAFT_TOKENIZER_NAME, VOCABULARY_MAP_NAME}
    for name, record in values["files"].items():
        _check_file_name(name)
        _check_fields(FileRecord, record, f"files.{name}")
    if missing := needed - set(values["files"]):
        raise ValueError(f"files lists no {', '.join(sorted(missing))}")


def _check_fields(kind: type[Any], values: Any, what: str) -> None:
    """Check that ``values`` has every field of a dataclass, with an allowed value.

    Raises:
        TypeError: it does not.
    """
    if not isinstance(values, dict):
        raise TypeError(f"{what} is of type {type(values).__name__}; allowed: an object")
    names = {entry.name for entry in fields(kind)}
    if missing := sorted(names - set(values)):
        raise TypeError(f"{what} has no {', '.join(missing)}")
    if unknown := sorted(set(values) - names):
        raise TypeError(f"{what} has the unknown field {unknown[0]!r}")
    for name, value in values.items():
        allowed = _ALLOWED.get(name, _TEXT)
        if not allowed.includes(value):
            raise TypeError(f"{what}: {name} is {_shortened(value)}; allowed: {allowed.text}")


@dataclass(frozen=True)
class _Allowed:
    """The values that a field of the manifest may have."""

    text: str
    includes: Callable[[Any], bool]


def _is_count(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value < 2**31


def _is_text(value: Any) -> bool:
    """Whether a value is a string without halves of surrogate pairs, which JSON allows."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


_TEXT = _Allowed("text", _is_text)
_HASH = _Allowed(
    "64 hexadecimal digits", lambda value: isinstance(value, str) and bool(re.fullmatch("[0-9a-f]{64}", value))
)
_POSITIVE = _Allowed("1 to 2147483647", lambda value: _is_count(value, 1))
_SHARE = _Allowed("0 to 1", lambda value: type(value) in (int, float) and 0 <= value < _MOST_SHARE)
_MEASURE = _Allowed("a finite number, 0 or more", lambda value: type(value) in (int, float) and 0 <= value < inf)
_OBJECT = _Allowed("an object", lambda value: isinstance(value, dict))
_ALLOWED: Mapping[str, _Allowed] = {
    **dict.fromkeys(("vocab_size", "context_length", "layers", "kv_heads", "head_size", "positions"), _POSITIVE),
    "common_tokens": _Allowed("0 to 2147483647", _is_count),
    **dict.fromkeys(
        (
            "argmax_agreement",
            "overlap",
            "topk_acceptance",
            "coupled_acceptance",
            "coupled_agreement",
            "greedy_acceptance",
            "coverage",
        ),
        _SHARE,
    ),
    **dict.fromkeys(("draft_milliseconds", "tokens_per_second"), _MEASURE),
    **dict.fromkeys(("quality", "files", "origin"), _OBJECT),
    "draft_vocabulary": _Allowed("an object or null", lambda value: value is None or isinstance(value, dict)),
    "candidates": _Allowed(
        "a list of objects", lambda value: isinstance(value, list) and all(isinstance(one, dict) for one in value)
    ),
    "versions": _Allowed(
        "an object of texts", lambda value: isinstance(value, dict) and all(map(_is_text, value.values()))
    ),
    **dict.fromkeys(("vocabulary_hash", "sha256"), _HASH),
    "cache_dtype": _Allowed(" or ".join(CACHE_DTYPES), lambda value: value in list(CACHE_DTYPES)),
    "cache_kind": _Allowed(" or ".join(CacheKind), lambda value: value in list(CacheKind)),
    "format_version": _Allowed(str(FORMAT_VERSION), lambda value: type(value) is int),
    "size": _Allowed("a number of bytes", lambda value: type(value) is int and value >= 0),
    "stop_ids": _Allowed("a list of ids", lambda value: isinstance(value, list) and all(map(_is_count, value))),
}


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}…"


def _check_file_name(name: str) -> None:
    """Check that a listed file lies in the bundle's own folder.

    Raises:
        ValueError: its name leads elsewhere.
    """
    if name in ("", ".", "..", MANIFEST_NAME) or any(mark in name for mark in ("/", "\\", "\0")):
        raise ValueError(f"files lists {name!r}; allowed: names of files in the bundle's folder")
