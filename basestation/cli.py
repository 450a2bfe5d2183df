"""``edgedraft-basestation``: serve a target model to devices."""

import json
import logging
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from basestation.admission import check_bind
from basestation.keys import KeyFolder
from protocol.command_line import Verbose, run
from protocol.keys import read_public
from protocol.limits import Limits

app = typer.Typer(
    help="The base station: holds the target model and judges the drafts of devices.", no_args_is_help=True
)
keys_app = typer.Typer(help="The keys of the base station, and of the devices it lets in.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")

LIMITS = "What a device may ask for"
KeyFolderArgument = Annotated[Path, typer.Argument(metavar="DIR", help="Folder that keys new made.")]
DeviceName = Annotated[str, typer.Argument(metavar="NAME", help="What the device is called here.")]


@app.callback()
def options(verbose: Verbose = False) -> None:
    """The base station: holds the target model and judges the drafts of devices."""


@app.command()
def serve(
    target: Annotated[str, typer.Option(help="Model folder, hub name or .gguf file.")],
    bind: Annotated[str, typer.Option(help="ZeroMQ endpoint to listen at; port 0 takes a free one.")] = (
        "tcp://127.0.0.1:5755"
    ),
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16; auto is bfloat16 on CUDA.")] = "auto",
    torch_device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")] = "auto",
    keys: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Let in only the devices that are enrolled here.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Without keys, serve everybody who can reach the address.")
    ] = False,
    max_prompt_len: Annotated[int, typer.Option(help="Tokens of a prompt.", rich_help_panel=LIMITS)] = (
        Limits.max_prompt_len
    ),
    max_draft_len: Annotated[int, typer.Option(help="Tokens of a Draft.", rich_help_panel=LIMITS)] = (
        Limits.max_draft_len
    ),
    max_uplink_k: Annotated[
        int, typer.Option(help="Entries of a sent distribution, mode full aside.", rich_help_panel=LIMITS)
    ] = Limits.max_uplink_k,
    max_sessions: Annotated[int, typer.Option(help="Open sessions of one device.", rich_help_panel=LIMITS)] = (
        Limits.max_sessions
    ),
    max_requests_per_second: Annotated[int, typer.Option(help="Of one device.", rich_help_panel=LIMITS)] = (
        Limits.max_requests_per_second
    ),
    window: Annotated[int, typer.Option(help="Drafts under way in a session.", rich_help_panel=LIMITS)] = (
        Limits.window
    ),
    keep_seconds: Annotated[
        int, typer.Option(help="How long a session is kept when its device is silent.", rich_help_panel=LIMITS)
    ] = Limits.keep_seconds,
) -> None:
    """Serve a target model until interrupted."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logger = logging.getLogger("basestation")
    folder = KeyFolder(keys) if keys else None
    check_bind(bind, folder is not None or insecure)  # before what takes long
    limits = Limits(
        max_prompt_len, max_draft_len, max_uplink_k, max_sessions, max_requests_per_second, window, keep_seconds
    )
    from basestation.server import Server
    from basestation.target_model import TargetModel

    logger.info("loading %s", target)
    server = Server(TargetModel.load(target, dtype, torch_device), bind, limits, folder, insecure)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: server.stop())
    logger.info("serving %s at %s", target, server.address)
    server.serve()
    logger.info("stopped")


@keys_app.command()
def new(folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to make.")]) -> None:
    """Make the base station's key pair, and a folder for it and for the enrolled devices."""
    made = KeyFolder.create(folder)
    typer.echo(f"public key, for the devices: {made.public_key}\nit is also in {made.public_path}")


@keys_app.command()
def enroll(
    folder: KeyFolderArgument,
    name: DeviceName,
    public_key: Annotated[str, typer.Argument(help="The device's public key, or the file that holds it.")],
) -> None:
    """Let a device in; a running base station does so at once."""
    KeyFolder(folder).enroll(name, read_public(public_key))
    typer.echo(f"enrolled {name}")


@keys_app.command()
def revoke(folder: KeyFolderArgument, name: DeviceName) -> None:
    """Let a device in no more; a running base station ends its sessions."""
    KeyFolder(folder).revoke(name)
    typer.echo(f"revoked {name}")


@keys_app.command("list")
def list_devices(
    folder: KeyFolderArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """The base station's public key, and the devices that are enrolled."""
    keys = KeyFolder(folder)
    devices = keys.devices()
    if as_json:
        report = {"station": keys.public_key, "devices": [asdict(device) for device in devices]}
        sys.stdout.write(json.dumps(report) + "\n")
        return
    typer.echo(f"{keys.public_key}  this base station")
    for device in devices:
        typer.echo(f"{device.public_key}  {device.name}")


def main() -> None:
    """Run the command line."""
    run(app, "basestation")
