"""The cache of what a start with int8 weights measures: how inputs become integers, and the agreement.

Measuring takes the original a minute of forward passes, quantizing its weights seconds. An entry belongs to the content
of the weights, the prompts and the versions of PyTorch and transformers.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from platformdirs import user_cache_path

from basestation.target.agreement import Agreement
from basestation.target.int8_linear import InputRule

logger = logging.getLogger(__name__)

_FORMAT = 1
"""Raised when entries are written, or what they hold is measured, otherwise than before."""


@dataclass(frozen=True)
class Int8Figures:
    """What was measured.

    Attributes:
        rules: of inputs, by linear layer; layers with the same input have the same object.
        agreement: of the result with the original.
    """

    rules: Mapping[str, InputRule]
    agreement: Agreement


def figures_entry(model: Any, prompts: Sequence[list[int]]) -> Path | None:
    """The file for a loaded model, which need not exist; None where the user has no cache directory."""
    try:
        cache = Path("/") / user_cache_path("edgedraft")
    except RuntimeError:
        return None
    settings = (_FORMAT, torch.__version__, transformers.__version__, str(model.dtype), prompts, model.config.to_dict())
    content = hashlib.sha256(repr(settings).encode())
    for name, parameter in model.named_parameters():
        content.update(name.encode())
        content.update(memoryview(parameter.detach().contiguous().view(torch.uint8).numpy()))
    return cache / "int8" / f"{content.hexdigest()}.json"


def read_figures(entry: Path | None) -> Int8Figures | None:
    """The figures of an entry; None where there is none, or a damaged one, which a log line names."""
    if entry is None or not entry.is_file():
        return None
    try:
        found = json.loads(entry.read_text(encoding="utf-8"))
        rules = {}
        for one in found["rules"]:
            rules |= dict.fromkeys(one["layers"], _decoded(one["exponents"], one["wide"]))
        return Int8Figures(rules, Agreement(**found["agreement"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s cannot be read (%s); its figures are measured again", entry, error)
        return None


def write_figures(entry: Path | None, figures: Int8Figures) -> None:
    """Keep figures; a log line says why where they cannot be kept."""
    if entry is None:
        return
    layers: dict[int, list[str]] = {}
    for name, rule in figures.rules.items():
        layers.setdefault(id(rule), []).append(name)
    rules = [{"layers": names, **_encoded(figures.rules[names[0]])} for names in layers.values()]
    text = json.dumps({"rules": rules, "agreement": asdict(figures.agreement)})
    unfinished = entry.with_suffix(".unfinished")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(entry)
    except OSError as error:
        logger.warning("the figures of int8 weights are not kept in %s: %s", entry, error.strerror)


def _encoded(rule: InputRule) -> dict[str, list[int] | None]:
    exponents = None if rule.smoothing is None else rule.smoothing.log2().int().tolist()
    return {"exponents": exponents, "wide": None if rule.wide is None else rule.wide.tolist()}


def _decoded(exponents: list[int] | None, wide: list[int] | None) -> InputRule:
    smoothing = None if exponents is None else torch.exp2(torch.tensor(exponents, dtype=torch.float32)).bfloat16()
    return InputRule(smoothing, None if wide is None else torch.tensor(wide))
