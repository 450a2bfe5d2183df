"""``edgedraft-basestation``: serve a target model to devices."""

import json
import sys
import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from basestation.devices.key_folder import KeyFolder
from basestation.launch_options import ClusterOptions, OperationOptions, SocketOptions, TargetOptions
from basestation.logs import LogFormat, start_logging
from basestation.options import OPERATION, PASSES, BindOption, StationOptions
from common.command_line import application, run
from common.configuration import configured_group
from common.key_files import read_public
from common.option_groups import with_options
from protocol.errors import SettingsError
from protocol.limits import Limits

app = application(
    "The base station: holds the target model and verifies the drafts of devices.", configured_group("basestation")
)
keys_app = typer.Typer(help="The keys of the base station and of the enrolled devices.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")

LIMITS = "Limits of a device's requests"
CLUSTER = "Replicas"
LEAST_PASS_TOKENS = 16
"""Of a ``PassBudget``, whose module imports PyTorch."""
KeyFolderArgument = Annotated[Path, typer.Argument(metavar="DIR", help="Folder created by keys new.")]
DeviceName = Annotated[str, typer.Argument(metavar="NAME", help="The device's name in this folder.")]


@app.command()
@with_options(StationOptions)
def serve(
    options: StationOptions,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Convert a .gguf target at every start; keep no converted weights.")
    ] = False,
    max_prompt_len: Annotated[int, typer.Option(help="Tokens in a prompt.", rich_help_panel=LIMITS)] = (
        Limits.max_prompt_len
    ),
    max_draft_len: Annotated[int, typer.Option(help="Tokens in a Draft.", rich_help_panel=LIMITS)] = (
        Limits.max_draft_len
    ),
    max_uplink_k: Annotated[
        int, typer.Option(help="Entries in a sent distribution, except in mode full.", rich_help_panel=LIMITS)
    ] = Limits.max_uplink_k,
    max_sessions: Annotated[int, typer.Option(help="Open sessions per device.", rich_help_panel=LIMITS)] = (
        Limits.max_sessions
    ),
    max_requests_per_second: Annotated[int, typer.Option(help="Rate limit per device.", rich_help_panel=LIMITS)] = (
        Limits.max_requests_per_second
    ),
    window: Annotated[int, typer.Option(help="Drafts in flight per session.", rich_help_panel=LIMITS)] = (
        Limits.window
    ),
    idle_timeout: Annotated[
        int, typer.Option(help="Seconds after which an idle session is dropped.", rich_help_panel=LIMITS)
    ] = Limits.idle_timeout,
    max_bytes_per_second: Annotated[int, typer.Option(help="Bytes received per device.", rich_help_panel=LIMITS)] = (
        Limits.max_bytes_per_second
    ),
    max_held_bytes: Annotated[
        int, typer.Option(help="Bytes held per device, besides KV caches.", rich_help_panel=LIMITS)
    ] = Limits.max_held_bytes,
    max_grammar_len: Annotated[int, typer.Option(help="Bytes of a grammar.", rich_help_panel=LIMITS)] = (
        Limits.max_grammar_len
    ),
    peer_memory: Annotated[
        str,
        typer.Option(help="Memory for what peers send and for the tensors of a pass.", rich_help_panel=PASSES),
    ] = "2GiB",
    pass_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens in a forward pass; default 256, on CUDA 2048.",
            min=LEAST_PASS_TOKENS,
            rich_help_panel=PASSES,
        ),
    ] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            help="Of --pass-tokens for prompts, while other sessions run rounds; default 32, on CUDA 512.",
            min=LEAST_PASS_TOKENS,
            rich_help_panel=PASSES,
        ),
    ] = None,
    cuda_graphs: Annotated[
        bool, typer.Option(help="On CUDA, capture forward passes as graphs where faster.", rich_help_panel=PASSES)
    ] = True,
    record: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Append a JSON line for every round.", rich_help_panel=OPERATION),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a PyTorch trace of some forward passes.", rich_help_panel=OPERATION),
    ] = None,
    log_format: Annotated[LogFormat, typer.Option(help="Format of the log on stderr.", rich_help_panel=OPERATION)] = (
        LogFormat.TEXT
    ),
    drain_seconds: Annotated[
        float,
        typer.Option(
            help="Time for open sessions to finish after SIGTERM.", min=0, max=86_400, rich_help_panel=OPERATION
        ),
    ] = 3.0,
    replicas: Annotated[
        int | None,
        typer.Option(
            help="Engines behind a front of their own process, placed and restarted by Ray.",
            min=1,
            rich_help_panel=CLUSTER,
        ),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="A Ray cluster; default: this machine.", rich_help_panel=CLUSTER),
    ] = None,
    replica_cpus: Annotated[
        int | None,
        typer.Option(
            help="Cores of a replica, or of each of its ranks; default: this machine's, divided by all of them.",
            min=1,
            rich_help_panel=CLUSTER,
        ),
    ] = None,
) -> None:
    """Serve a target model until interrupted; SIGTERM lets open sessions finish, SIGINT does not."""
    start_logging(log_format)
    folder = options.key_folder()  # before the slow imports
    limits = Limits(
        max_prompt_len,
        max_draft_len,
        max_uplink_k,
        max_sessions,
        max_requests_per_second,
        window,
        idle_timeout,
        max_bytes_per_second,
        max_held_bytes,
        max_grammar_len,
    )
    target = TargetOptions(
        options.target,
        options.dtype,
        options.weights,
        options.torch_device,
        options.kv_memory,
        not no_cache,
        peer_memory,
        pass_tokens,
        prompt_tokens,
        cuda_graphs,
    )
    socket = SocketOptions(options.bind, folder, options.insecure, limits)
    operation = OperationOptions(options.metrics_bind, record, profile, drain_seconds, log_format)
    cluster = ClusterOptions.of(replicas, ray_address, replica_cpus, options.tensor_parallel)
    if cluster is None:
        from basestation.launcher import run_base_station

        run_base_station(target, socket, operation)
    else:
        _serve_replicas(target, socket, operation, cluster)


def _serve_replicas(
    target: TargetOptions, socket: SocketOptions, operation: OperationOptions, options: ClusterOptions
) -> None:
    if find_spec("ray") is None:
        allowed = "left out while Ray is not installed: in the source folder, pip install '.[cluster]'"
        raise SettingsError("replicas", options.replicas, allowed)
    from basestation.replicas.launcher import serve_replicas

    serve_replicas(target, socket, operation, options)


@app.command()
@with_options(StationOptions)
def doctor(
    options: StationOptions,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a line per check.")] = False,
) -> None:
    """Check target, memory, keys and ports before ``serve``; the exit code is 1 if a check fails.

    Downloads the target if it is a hub name that the cache does not have; loads no weights.
    """
    from basestation.doctor import examine

    if not examine(options, as_json):
        raise typer.Exit(1)


@app.command()
def top(
    url: Annotated[str, typer.Option(help="The address in a base station's --metrics-bind.")] = "http://127.0.0.1:9464",
    interval: Annotated[float, typer.Option(help="Seconds between two updates.", min=0.1)] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print one table and exit.")] = False,
) -> None:
    """Show a base station's metrics as a live table."""
    from rich.console import Console
    from rich.live import Live

    from basestation.monitoring.top import read_snapshot, render

    before = read_snapshot(url)
    if once:
        time.sleep(interval)
        Console().print(render(before, read_snapshot(url)))
        return
    with Live(render(before, before), screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            now = read_snapshot(url)
            live.update(render(before, now), refresh=True)
            before = now


@app.command()
def scale(
    replicas: Annotated[int, typer.Argument(metavar="N", help="Replicas from now on.", min=1)],
    bind: BindOption = StationOptions.bind,
) -> None:
    """Change the number of replicas of a base station that serves on this machine."""
    from basestation.replicas.control import Scale, send_request

    send_request(bind, Scale(replicas))
    typer.echo(f"{replicas} replicas; those that are too many finish their sessions first")


@app.command()
def restart(bind: BindOption = StationOptions.bind) -> None:
    """Replace all replicas of a base station that serves on this machine, one after another.

    Each drains once its successor serves; the log of ``serve`` tells.
    """
    from basestation.replicas.control import Restart, send_request

    send_request(bind, Restart())
    typer.echo("replacing all replicas, one after another")


@keys_app.command()
def new(folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to create.")]) -> None:
    """Create a folder with the base station's key pair; devices are enrolled in it."""
    created = KeyFolder.create(folder)
    typer.echo(f"public key, for the devices: {created.public_key}\nit is also in {created.public_path}")


@keys_app.command()
def enroll(
    folder: KeyFolderArgument,
    name: DeviceName,
    public_key: Annotated[str, typer.Argument(help="The device's public key, or a file that contains it.")],
) -> None:
    """Enroll a device; a running base station admits it at once."""
    KeyFolder(folder).enroll(name, read_public(public_key))
    typer.echo(f"enrolled {name}")


@keys_app.command()
def revoke(folder: KeyFolderArgument, name: DeviceName) -> None:
    """Revoke a device's key; a running base station ends its sessions."""
    KeyFolder(folder).revoke(name)
    typer.echo(f"revoked {name}")


@keys_app.command("show")
def show_key(folder: KeyFolderArgument) -> None:
    """Print the file station.pub: the base station's public key, for --station-key of the devices."""
    typer.echo(KeyFolder(folder).public_line, nl=False)


@keys_app.command("list")
def list_devices(
    folder: KeyFolderArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the base station's public key, the enrolled devices and the revoked ones."""
    keys = KeyFolder(folder)
    devices, revoked = keys.devices(), keys.revoked_devices()
    if as_json:
        report = {
            "station": keys.public_key,
            "devices": [asdict(device) for device in devices],
            "revoked": [asdict(device) for device in revoked],
        }
        sys.stdout.write(json.dumps(report) + "\n")
        return
    typer.echo(f"{keys.public_key}  this base station")
    for device in devices:
        typer.echo(f"{device.public_key}  {device.name}")
    for device in revoked:
        typer.echo(f"{device.public_key}  {device.name} (revoked)")


def main() -> None:
    """Run the command line."""
    run(app, "basestation")
