"""What the commands of ``edgedraft-bench`` have in common: options, the terminal, a progress bar."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(highlight=False)

BundleOption = Annotated[Path, typer.Option(help="Bundle of the draft model.")]
TargetOption = Annotated[str, typer.Option(help="The target: model folder, hub name or .gguf file.")]
PromptsOption = Annotated[Path | None, typer.Option(help="Spec-Bench jsonl file; left out, the project's own prompts.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")]
DtypeOption = Annotated[str, typer.Option(help="Of the target: auto, float32 or bfloat16.")]
TorchDeviceOption = Annotated[str, typer.Option(help="Of the target: auto, cpu, cuda …")]


def progress_bar() -> Progress:
    """One that is gone when the work is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)
