"""``edgedraft-basestation doctor``: everything that ``serve`` needs, checked without loading the weights."""

import json
import os
import stat
import sys
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from basestation.devices.key_folder import KeyFolder
from basestation.devices.router import check_free
from basestation.kv_cache.memory import check_fits, free_memory, kv_budget
from basestation.monitoring.metrics import Metrics
from basestation.monitoring.monitor import Monitor
from basestation.options import StationOptions
from basestation.sizes import readable_size
from basestation.target.int8_linear import may_be_int8
from basestation.target.packed_linear import packed_dtype
from basestation.target.placement import choose_dtype, choose_placement, dtype_name
from basestation.target.pretrained import model_folder, read_config
from basestation.target.quantized_weights import quantization_method
from basestation.target.target_model import context_length, kv_shape, page_count
from common.checks import Checks, Finding, Outcome, Status
from common.key_files import read_public
from common.loopback import is_loopback
from protocol.errors import KeyFileError

_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True)
class _Placement:
    """Where the target runs, in which precision its weights are, and whether linear layers get int8 ones."""

    torch_device: torch.device
    dtype: torch.dtype
    int8: bool


def examine(options: StationOptions, as_json: bool) -> bool:
    """Make all checks and print them; whether none failed."""
    checks = Checks(None if as_json else Console(highlight=False, soft_wrap=True))
    _check_target(checks, options)
    folder = checks.run("keys", partial(_keys, options))
    checks.run("key files", _key_files, folder)
    checks.run("port", partial(_port, options.bind))
    if options.metrics_bind:
        checks.run("metrics port", partial(_metrics_port, options.metrics_bind))
    if as_json:
        sys.stdout.write(json.dumps({"checks": [asdict(check) for check in checks.results]}) + "\n")
    return not checks.failed


def _check_target(checks: Checks, options: StationOptions) -> None:
    ranks = options.tensor_parallel or 1
    config: Outcome[Any] = checks.run("target", partial(_target, options.target, ranks))
    placement = checks.run("processor", partial(_processor, options, config.value))
    weights = checks.run("memory", partial(_memory, options.target, ranks), config, placement)
    checks.run("context", partial(_context, options.kv_memory, ranks), config, placement, weights)


def _target(model: str, ranks: int) -> Finding[Any]:
    config = read_config(model, ranks)
    text = config.get_text_config()
    told = f"{model}: {text.model_type}, {text.num_hidden_layers} layers, vocabulary {text.vocab_size}"
    return Finding(told if ranks == 1 else f"{told}, split over {ranks} ranks", config)


def _processor(options: StationOptions, config: Any) -> Finding[_Placement]:
    """Where the target runs; a warning where the machine could run it faster.

    Args:
        options: of ``serve``.
        config: of the target, None if that was not found.
    """
    device = choose_placement(options.torch_device)
    int8 = may_be_int8(options.weights, device, quantization_method(config), options.tensor_parallel or 1)
    placement = _Placement(device, choose_dtype(options.dtype, device, int8), int8)
    precision = dtype_name(placement.dtype)
    if device.type == "cuda":
        return Finding(f"CUDA: {torch.cuda.get_device_name(device)}, {precision}", placement)
    text = f"{len(os.sched_getaffinity(0))} cores, {precision}; no CUDA device is used"
    if options.torch_device == "auto" and _NVIDIA_DRIVER.exists():
        remedy = "install a PyTorch build for this driver's CUDA version"
        return Finding(f"{text}, although there is an NVIDIA driver", placement, Status.WARNING, remedy)
    if placement.dtype is not packed_dtype(placement.dtype) and not int8:
        remedy = "choose --dtype float32, which takes less memory, or a processor with these instructions"
        return Finding(f"{text}, and no bfloat16 instructions", placement, Status.WARNING, remedy)
    return Finding(text, placement)


def _memory(model: str, ranks: int, config: Any, placement: _Placement) -> Finding[int]:
    folder, device = model_folder(model), placement.torch_device
    needed = check_fits(config, placement.dtype, device, folder, ranks, placement.int8)
    free = readable_size(free_memory(device))
    weights = "the weights take" if ranks == 1 else "a rank's share of the weights takes"
    return Finding(f"{weights} {readable_size(needed)} of {free} free", needed)


def _context(kv_memory: str, ranks: int, config: Any, placement: _Placement, weights: int) -> Finding[None]:
    """The context that fits; a warning where it is less than the model's."""
    device = placement.torch_device
    dtype = packed_dtype(placement.dtype) if device.type == "cpu" else placement.dtype
    shape = kv_shape(config, dtype, device, ranks)
    pages = page_count(shape, kv_budget(kv_memory, device, weights))
    capacity = pages * shape.page_size
    fits, trained = context_length(config, capacity), config.get_text_config().max_position_embeddings
    text = f"{fits} tokens for one session, {capacity} for all, in {readable_size(pages * shape.page_bytes)}"
    if fits >= trained:
        return Finding(text, None)
    remedy = "raise --kv-memory, or free some memory"
    return Finding(f"{text}; the model's is {trained}", None, Status.WARNING, remedy)


def _keys(options: StationOptions) -> Finding[KeyFolder | None]:
    folder = options.key_folder()
    if folder is None:
        if is_loopback(options.bind):
            return Finding("none; on loopback none are needed", None)
        remedy = "create keys with: edgedraft-basestation keys new DIR"
        return Finding("none: every device that reaches the address is served", None, Status.WARNING, remedy)
    count = len(folder.devices())
    if count:
        return Finding(f"{folder.public_key}, {count} devices enrolled", folder)
    remedy = f"enroll one with: edgedraft-basestation keys enroll {options.keys} NAME KEY"
    return Finding("no device is enrolled", folder, Status.WARNING, remedy)


def _key_files(folder: KeyFolder | None) -> Finding[None]:
    """Whether the public key belongs to the secret one, and others cannot enroll devices.

    Raises:
        KeyFileError: it does not, or they can.
    """
    if folder is None:
        return Finding("none", None, Status.NOT_CHECKED)
    path = folder.public_path
    if read_public(str(path)) != folder.public_key:
        raise KeyFileError(
            f"{str(path)!r} does not belong to the secret key beside it, so devices that have it refuse this base "
            "station; create the pair again with: keys new"
        )
    folders = [path.parent, path.parent / "devices"]
    modes = [one.stat().st_mode for one in folders]
    for one, mode in zip(folders, modes, strict=True):
        if mode & _WRITABLE_BY_OTHERS:
            raise KeyFileError(f"others can enroll devices in {str(one)!r}; run: chmod go-w {one}")
    if modes[0] & _OTHERS:
        remedy = f"run: chmod 700 {path.parent}"
        return Finding(f"others can look into {str(path.parent)!r}", None, Status.WARNING, remedy)
    return Finding("only their owner can read the secret key and enroll devices", None)


def _port(bind: str) -> Finding[None]:
    """Whether the endpoint can be bound.

    Raises:
        LinkError: it cannot.
    """
    check_free(bind)
    return Finding(f"{bind} is free", None)


def _metrics_port(bind: str) -> Finding[None]:
    """Whether the address of the metrics can be bound.

    Raises:
        SettingsError: it cannot.
    """
    with closing(Monitor(bind, Metrics())):
        return Finding(f"{bind} is free", None)
