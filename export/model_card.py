"""The model card: origin and licence of a model, as hubs keep them at the head of a folder's README.md."""

from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData

from protocol.errors import ModelError

CARD_NAME = "README.md"
_QUANTIZED = "quantized"


@dataclass(frozen=True)
class Provenance:
    """Whose model it is, and under which licence; empty where nobody says."""

    origin: str
    licence: str


def write_model_card(folder: Path, provenance: Provenance, text: str) -> None:
    """Write the card of a folder whose weights were quantized from those of ``provenance.origin``."""
    data = ModelCardData(license=provenance.licence, base_model=provenance.origin, base_model_relation=_QUANTIZED)
    (folder / CARD_NAME).write_text(f"---\n{data.to_yaml()}\n---\n\n{text}\n", encoding="utf-8")


def read_model_card(folder: Path) -> Provenance:
    """Read a folder's card.

    Raises:
        ModelError: it is damaged.
    """
    path = folder / CARD_NAME
    if not path.is_file():
        return Provenance("", "")
    try:
        data = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ModelError(f"{str(path)!r} is no model card ({error}); correct or delete it") from error
    is_copy = data.get("base_model_relation") == _QUANTIZED and isinstance(data.get("base_model"), str)
    return Provenance(data["base_model"] if is_copy else "", str(data.get("license") or ""))
