"""Options that several commands of ``edgedraft-bench`` share, the console and the progress bar."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from protocol.errors import SettingsError
from protocol.messages import MAX_TEMPERATURE

console = Console(highlight=False)

MIN_MBIT = 1e-3
"""The slowest rate that a link can be given."""

BundleOption = Annotated[Path, typer.Option(help="Bundle of the draft model.")]
TargetOption = Annotated[str, typer.Option(help="Target model: a folder, a hub name or a .gguf file.")]
DtypeOption = Annotated[str, typer.Option(help="Data type of the target: auto, float32 or bfloat16.")]
WeightsOption = Annotated[str, typer.Option(help="Weights of the target's linear layers: dtype, int8 or auto.")]
TorchDeviceOption = Annotated[str, typer.Option(help="Torch device of the target: auto, cpu, cuda, …")]
PromptsOption = Annotated[
    Path | None, typer.Option(help="Spec-Bench jsonl file with prompts. Default: the built-in prompts.")
]
CountOption = Annotated[int, typer.Option(help="Number of prompts; of a file, one of each category in turn.", min=1)]
MaxNewTokensOption = Annotated[int, typer.Option(help="Tokens per answer.", min=1)]
RoundsOption = Annotated[int, typer.Option(help="Rounds of 8 tokens per prompt.", min=1)]
DraftLenOption = Annotated[int, typer.Option(help="Tokens drafted per round.", min=1)]
UplinkKOption = Annotated[int, typer.Option(help="Entries kept of each distribution in mode topk.", min=1)]
TemperatureOption = Annotated[
    float, typer.Option(help="0 measures mode ids, above 0 mode coupled.", min=0, max=MAX_TEMPERATURE)
]
TemperaturesOption = Annotated[
    list[float] | None,
    typer.Option("--temperature", help="0 is greedy; repeatable. Default: 0 and 1.", min=0, max=MAX_TEMPERATURE),
]
BatchSessionsOption = Annotated[int, typer.Option("--sessions", help="Sessions in one forward pass.", min=1)]


def _check_json_file(path: Path | None) -> Path | None:
    """Refuse, before anything is measured, a file that cannot be written."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise SettingsError("json", str(path), "a file in a folder that exists")
    return path


JsonOption = Annotated[
    Path | None, typer.Option("--json", help="Write the results to this file.", callback=_check_json_file)
]


def check_transformers_target(target: str) -> None:
    """Refuse a GGUF file where transformers reads the target's weights.

    Raises:
        SettingsError: it is one.
    """
    if target.endswith(".gguf"):
        raise SettingsError("target", target, "a folder or a hub name here: transformers reads the weights")


def progress_bar() -> Progress:
    """A progress bar that disappears when the work is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)
