"""The manifest of an exported draft model: what ``export`` writes and ``device`` loads.

A bundle is a folder that holds ``manifest.json`` and the files it lists. The
manifest states everything that a device needs, so that nothing is inferred from the
graph or from a configuration file of another project.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

from protocol.errors import BundleError

MANIFEST_NAME = "manifest.json"
MODEL_NAME = "model.onnx"
TOKENIZER_NAME = "tokenizer.json"
CHAT_TEMPLATE_NAME = "chat_template.jinja"
FORMAT_VERSION = 3
QUALITY_UPLINK_K = 32


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
class Manifest:
    """Everything that a device needs to know about a draft model.

    ``vocab_size`` counts the tokenizer's ids; a graph may return more logits
    (padding), which are cut off. ``stop_ids`` end an answer.
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
    format_version: int = FORMAT_VERSION

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
                "make one with: edgedraft-export convert MODEL BUNDLE"
            ) from None
        except (OSError, ValueError) as error:
            raise BundleError(f"{str(path)!r} cannot be read: {error}; export the bundle again") from error
        try:
            return cls._from_json(values)
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError(f"{str(path)!r} is not a valid manifest: {error}; export the bundle again") from error

    @classmethod
    def _from_json(cls, values: dict[str, Any]) -> Self:
        version = values.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(f"format_version is {version!r}; allowed: {FORMAT_VERSION}")
        missing = {entry.name for entry in fields(cls)} - set(values)
        if missing:
            raise ValueError(f"{', '.join(sorted(missing))} missing")
        return cls(
            **{
                **values,
                "cache_kind": CacheKind(values["cache_kind"]),
                "stop_ids": tuple(values["stop_ids"]),
                "quality": QualityFigures(**values["quality"]),
                "files": {name: FileRecord(**record) for name, record in values["files"].items()},
            }
        )

    def check_files(self, folder: Path) -> None:
        """Check the size and the hash of every listed file.

        Raises:
            BundleError: a file is missing or differs from its record.
        """
        for name, record in self.files.items():
            path = folder / name
            if not path.is_file():
                raise BundleError(f"{str(path)!r} is missing; export the bundle again")
            size = path.stat().st_size
            if size != record.size:
                raise BundleError(
                    f"{str(path)!r} has {size} bytes; the manifest lists {record.size}: export or copy it again"
                )
            if FileRecord.of(path) != record:
                raise BundleError(f"{str(path)!r} has another SHA-256 than the manifest lists: export or copy it again")


def vocabulary_hash(vocabulary: Mapping[str, int]) -> str:
    """SHA-256 (hex) of a vocabulary, token → id.

    Draft and target model must assign the same token to each id. Only the device
    tokenizes text, so the tokenizers may differ otherwise.
    """
    entries = sorted((token_id, token) for token, token_id in vocabulary.items())
    return hashlib.sha256(json.dumps(entries, separators=(",", ":")).encode()).hexdigest()


def stop_ids(*settings: int | Sequence[int] | None) -> frozenset[int]:
    """The ids that end an answer, from values of ``eos_token_id`` in configuration files: an id, several or none."""
    ids: set[int] = set()
    for setting in settings:
        if setting is not None:
            ids |= {setting} if isinstance(setting, int) else set(setting)
    return frozenset(ids)
