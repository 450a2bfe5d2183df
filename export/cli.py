"""The command line ``edgedraft-export``.

Knows the options and how results and errors are printed. Does not know how a
model is converted.
"""

import json
import sys
import time
from dataclasses import asdict
from math import inf
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from common.command_line import application, run
from common.configuration import configured_group
from export.sample_models import SampleName
from protocol.bundle import Manifest
from protocol.errors import SettingsError

PREDICTION = "What the speed with --target is predicted for"
BundleArgument = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder that convert wrote.")]

app = application("Export a draft model as an ONNX bundle for the device.", configured_group("export"))


@app.command()
def sample(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The model folder to create.")],
    model: Annotated[SampleName, typer.Option(help="Which model.")] = SampleName.SMOLLM2_135M,
) -> None:
    """Download a sample model and write it as a Hugging Face model folder."""
    console = _console()
    with console.status("loading libraries"):
        from export.sample import make_sample

    created = make_sample(folder, console, model)
    typer.echo(f"{folder}: the sample model {model}" + ("" if created else " already exists"))
    typer.echo(f"next: edgedraft-basestation serve --target {folder}")


@app.command()
def convert(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="A model folder, a hub name or a .gguf file; of several the fastest with --target is kept.",
        ),
    ],
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle folder to create or replace.")],
    converter: Annotated[
        Literal["auto", "optimum", "genai"],
        typer.Option(help="genai writes faster graphs, optimum supports more architectures; auto tries genai first."),
    ] = "auto",
    precision: Annotated[
        Literal["auto", "fp32", "int8", "int4"],
        typer.Option(help="Weight precision; auto is the fastest with the target, without one int8."),
    ] = "auto",
    processor: Annotated[
        Literal["cpu", "cuda"],
        typer.Option("--for", help="What the device runs it on; with cuda, weights and KV cache are float16."),
    ] = "cpu",
    target: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The target; one with another vocabulary is bridged.")
    ] = None,
    rtt_ms: Annotated[
        float, typer.Option(help="Round trip of the link.", min=0, max=600_000, rich_help_panel=PREDICTION)
    ] = 0.0,
    up_mbit: Annotated[
        float | None, typer.Option(help="Uplink in Mbit/s; default: unlimited.", min=0.001, rich_help_panel=PREDICTION)
    ] = None,
    target_ms: Annotated[
        float | None,
        typer.Option(
            help="A forward pass of the target at the base station; default: measured here, with transformers.",
            min=0.001,
            rich_help_panel=PREDICTION,
        ),
    ] = None,
    draft_ms: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]MS",
            help="A token of the draft model on the device, as 15 or int4=12.5; repeatable; default: measured here.",
            rich_help_panel=PREDICTION,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as one JSON object.")] = False,
) -> None:
    """Convert a draft model to a bundle and check its quality, against the source model and the target."""
    started = time.monotonic()
    console = _console()
    with console.status("loading libraries"):
        from export.convert import ConvertSettings
        from export.convert import convert as make_bundle
        from export.converters import Converter, Processor
        from export.draft_choice import convert_fastest
        from export.quantize import CANDIDATES, FORMATS, Precision
        from export.weight_choice import Conditions, parse_draft_ms

    names = dict.fromkeys(one.name for one in (*CANDIDATES, *FORMATS.values()))
    given = parse_draft_ms(draft_ms or [], list(names))
    conditions = Conditions(rtt_ms, inf if up_mbit is None else up_mbit, target_ms, given)
    chosen = None if precision == "auto" else Precision(precision)
    if processor == "cuda":
        if chosen is not None:
            raise SettingsError("precision", precision, "auto with --for cuda, whose weights are float16")
        chosen = Precision.FP16
    settings = ConvertSettings(Converter(converter), chosen, target, conditions, Processor(processor))
    if len(models) == 1:
        manifest = make_bundle(models[0], bundle, settings, console)
    else:
        manifest = convert_fastest(models, bundle, settings, console)
    seconds = time.monotonic() - started
    if as_json:
        typer.echo(json.dumps({**asdict(manifest), "seconds": round(seconds, 1)}))
        return
    size = sum(record.size for record in manifest.files.values())
    typer.echo(
        f"{bundle}: {manifest.name}, {manifest.precision} by {manifest.converter}, {size / 1e6:.0f} MB, {seconds:.0f} s"
    )
    typer.echo(f'next: edgedraft-device generate --bundle {bundle} --server tcp://127.0.0.1:5755 --prompt "Hello!"')


@app.command()
def inspect(
    bundle: BundleArgument,
    targets: Annotated[
        list[str] | None, typer.Argument(metavar="TARGET", help="Target models; it says which fit.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show a bundle's origin, licence, quality, sizes, and which targets it fits; reads no weights."""
    manifest = Manifest.read(bundle)
    console = _console()
    with console.status("loading libraries"):
        from export.inspection import description, target_fits

    fits = target_fits(bundle, targets or [])
    if as_json:
        typer.echo(json.dumps({**asdict(manifest), "targets": [asdict(fit) for fit in fits]}))
        return
    Console(highlight=False).print(description(manifest, fits))


@app.command()
def verify(bundle: BundleArgument) -> None:
    """Check a bundle: hashes, tokenizer, and that its graph computes logits; the exit code is 1 if not."""
    console = _console()
    with console.status("loading libraries"):
        from export.inspection import verify as verify_bundle

    with console.status("verifying"):
        manifest = verify_bundle(bundle)
    typer.echo(f"{bundle}: {manifest.name}, {manifest.precision}, {len(manifest.files)} files: sound")


def main() -> None:
    """Run the command line."""
    run(app, "export")


def _console() -> Console:
    # Holds the stream itself, because quiet_tools rebinds sys.stderr.
    return Console(file=sys.stderr)
