"""The options that ``serve`` and ``doctor`` share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from basestation.devices.authentication import check_bind
from basestation.devices.key_folder import KeyFolder

PASSES = "Forward passes"
OPERATION = "Operation"


BindOption = Annotated[
    str, typer.Option(help="ZeroMQ endpoint that the base station listens on; port 0 chooses a free port.")
]


@dataclass(frozen=True)
class StationOptions:
    """Which target is served and with which memory, and where and to whom."""

    target: Annotated[str, typer.Option(help="Model folder, hub name or .gguf file.")]
    bind: BindOption = "tcp://127.0.0.1:5755"
    dtype: Annotated[
        str,
        typer.Option(
            help="auto, float32, bfloat16 or, on CUDA, float16; auto is float32, on CUDA or with int8 weights bfloat16."
        ),
    ] = "auto"
    weights: Annotated[
        str,
        typer.Option(help="Weights of linear layers: dtype for --dtype, int8 (VNNI or AMX), or auto, the faster."),
    ] = "dtype"
    torch_device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")] = "auto"
    tensor_parallel: Annotated[
        int | None,
        typer.Option(
            metavar="M",
            help="Processes over which each replica's target is split, each with a GPU or cores of its own; "
            "with --replicas.",
            min=1,
        ),
    ] = None
    keys: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Key folder; only the devices enrolled in it are admitted.")
    ] = None
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Without keys, serve every device that can reach the address.")
    ] = False
    kv_memory: Annotated[
        str,
        typer.Option(help="Memory for KV caches: 4GiB, or auto, a share of the free memory.", rich_help_panel=PASSES),
    ] = "auto"
    metrics_bind: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Serve the fleet page, /metrics, /healthz and /readyz; PORT alone is on loopback.",
            rich_help_panel=OPERATION,
        ),
    ] = None

    def key_folder(self) -> KeyFolder | None:
        """The key folder, if there is one; checks that the address may be bound with it or without.

        Raises:
            KeyFileError: the folder has no usable secret key.
            SettingsError: other machines can reach the address, and there are neither keys nor ``--insecure``.
        """
        folder = KeyFolder(self.keys) if self.keys else None
        check_bind(self.bind, folder is not None or self.insecure)
        return folder
