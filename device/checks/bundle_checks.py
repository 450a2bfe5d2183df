"""Checks of a bundle: its files, its quality figures, and whether the memory is enough for it.

Knows files and sizes; loads no model.
"""

import re
from pathlib import Path

import numpy as np

from common.checks import Finding, Status
from common.container_memory import within_limits
from protocol.bundle import MODEL_NAME, TEXT_NAMES, Manifest
from protocol.errors import BundleError

_LOW_ACCEPTANCE = 0.55
"""The least that an export accepts; below it drafts of several tokens are mostly rejected."""
_FIRST_POSITIONS = 512
"""The draft model reserves so many positions with the first token."""
_MEMORY_INFO = Path("/proc/meminfo")
_AVAILABLE = re.compile(r"^MemAvailable: *(\d+) kB$", re.MULTILINE)


def files(folder: Path, has_draft_model: bool) -> Finding[Manifest]:
    """Check the manifest of a bundle, and size and hash of each file; of those of the model only if it is used.

    Raises:
        BundleError: the bundle is missing or damaged.
    """
    manifest = Manifest.read(folder)
    if not has_draft_model:
        manifest.check_files(folder, TEXT_NAMES)
        return Finding(f"{manifest.name}: tokenizer and chat template as the manifest lists them", manifest)
    manifest.check_files(folder)
    size = _megabytes(sum(record.size for record in manifest.files.values()))
    count = len(manifest.files)
    return Finding(
        f"{manifest.name}, {manifest.precision}: {count} files, {size}, as the manifest lists them", manifest
    )


def unused(_: Manifest) -> Finding[None]:
    """Take the place of a check of the draft model that is not used."""
    return Finding("--draft none uses no draft model", None, Status.NOT_CHECKED)


def quality(manifest: Manifest) -> Finding[None]:
    """Check the figures that export measured against the target."""
    figures, own = manifest.target_quality, manifest.draft_vocabulary
    text = (
        f"acceptance {figures.argmax_agreement:.2f} at temperature 0, {figures.coupled_acceptance:.2f} at 1, "
        f"measured by export at {figures.positions} positions"
    )
    if own is not None:
        text += f"; another vocabulary than that of {own.target}: {own.coverage:.2f} of its text can be drafted"
    if min(figures.argmax_agreement, figures.coupled_acceptance) >= _LOW_ACCEPTANCE:
        return Finding(text, None)
    return Finding(text, None, Status.WARNING, "export with a higher --precision, or choose another draft model")


def memory(manifest: Manifest, memory_info: Path = _MEMORY_INFO) -> Finding[None]:
    """Compare the memory that the draft model needs with what is available.

    Raises:
        BundleError: it is not enough to load the model.
    """
    found = _AVAILABLE.search(memory_info.read_text(encoding="ascii", errors="replace"))
    if found is None:
        return Finding(f"{memory_info} does not tell the available memory", None, Status.NOT_CHECKED)
    available = within_limits(int(found[1]) * 1024)
    weights = sum(record.size for name, record in manifest.files.items() if name.startswith(MODEL_NAME))
    number = np.dtype(manifest.cache_dtype).itemsize
    position = 2 * manifest.layers * manifest.kv_heads * manifest.head_size * number
    least, most = (
        weights + min(positions, manifest.context_length) * position
        for positions in (_FIRST_POSITIONS, manifest.context_length)
    )
    if least > available:
        raise BundleError(
            f"the draft model needs {_megabytes(least)}, and {_megabytes(available)} are available; "
            "end other programs, or export a smaller model or with a lower --precision"
        )
    text = f"{_megabytes(least)} needed, up to {_megabytes(most)} with {manifest.context_length} tokens of context"
    text = f"{text}; {_megabytes(available)} available"
    if most <= available:
        return Finding(text, None)
    room = (available - weights) // position
    return Finding(text, None, Status.WARNING, f"keep conversations below {room} tokens, or end other programs")


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.0f} MB"
