"""Checks of the board: kernel, processor features, threads, and clock, which decide the draft model's speed; the speed.

Reads what Linux says of itself; where it says nothing, that is not checked.
"""

import os
import platform
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from common.checks import Finding, Status
from device.drafting.draft_model import SequenceModel

_CPU_INFO = Path("/proc/cpuinfo")
_CPUS = Path("/sys/devices/system/cpu")
_DOT_PRODUCTS: Mapping[str, str] = {
    "asimddp": "dot product",
    "i8mm": "i8mm",
    "avx_vnni": "AVX-VNNI",
    "avx512_vnni": "AVX-512 VNNI",
    "amx_int8": "AMX",
}
"""Instructions for int8 products, which int8 and int4 bundles run on, by the names that Linux gives them."""
_VECTORS: Mapping[str, str] = {"asimd": "NEON", "sve": "SVE", "avx2": "AVX2", "avx512f": "AVX-512"}
_SLOW_GOVERNORS = ("powersave", "conservative")
_SELF_GOVERNING = ("intel_pstate", "amd-pstate-epp")
"""Drivers whose ``powersave`` raises the clock under load."""
_UNTIMED_TOKENS, _TIMED_TOKENS = 4, 16
_HOT = 80
"""Degrees Celsius at which a Raspberry Pi begins to lower its clock."""
_CLOCK_LIMITS = ("under-voltage", "clock capped", "throttled", "soft temperature limit")
"""Bits 0 to 3 of a Raspberry Pi's ``get_throttled`` for now; bits 16 to 19 for any time since boot."""
_SINCE_BOOT = 16


def board(tree: Path = Path("/proc/device-tree"), page_bytes: int | None = None) -> Finding[None]:
    """Name the board, its kernel, and the size of the kernel's pages."""
    model = tree / "model"
    name = model.read_text(encoding="utf-8").rstrip("\0") if model.exists() else platform.machine()
    kibibytes = (page_bytes or os.sysconf("SC_PAGE_SIZE")) // 1024
    untested = "" if kibibytes == 4 else ", on which edgedraft is untested"
    return Finding(f"{name}, kernel {platform.release()}, pages of {kibibytes} KiB{untested}", None)


def processor(cpu_info: Path = _CPU_INFO) -> Finding[None]:
    """Look for instructions that multiply int8 numbers."""
    text = cpu_info.read_text(encoding="utf-8", errors="replace")
    features = re.search(r"^(?:flags|Features)\s*: (.*)$", text, re.MULTILINE)
    if features is None:
        return Finding(f"{cpu_info} lists no features", None, Status.NOT_CHECKED)
    name = re.search(r"^(?:model name|Model)\s*: (.*)$", text, re.MULTILINE)
    words = features[1].split()
    vectors, products = (_named(words, names) for names in (_VECTORS, _DOT_PRODUCTS))
    known = ", ".join([*vectors, *products]) or "no vector instructions known here"
    found = f"{name[1].strip() if name else platform.machine()}: {known}"
    if products:
        return Finding(found, None)
    return Finding(
        f"{found}, no int8 dot products",
        None,
        Status.WARNING,
        "choose a small draft model in int8; int4 gains little without these instructions",
    )


def threads(wanted: int) -> Finding[None]:
    """Compare the draft model's threads with the cores that this process may use; 0 uses all of them."""
    usable, present = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    text = f"{wanted or usable} threads on {usable} of {present} cores"
    if wanted > usable:
        return Finding(text, None, Status.WARNING, f"set --threads to {usable} or less: they wait for each other")
    return Finding(text, None)


def governor(cpus: Path = _CPUS) -> Finding[None]:
    """Look at what governs the processor's clock."""
    governors = _contents(cpus, "scaling_governor")
    if not governors:
        return Finding("this system does not tell what governs the clock", None, Status.NOT_CHECKED)
    drivers, text = _contents(cpus, "scaling_driver"), ", ".join(sorted(governors))
    if governors.isdisjoint(_SLOW_GOVERNORS) or not drivers.isdisjoint(_SELF_GOVERNING):
        return Finding(text, None)
    remedy = "run: echo performance | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"
    return Finding(f"{text}: the clock stays low", None, Status.WARNING, remedy)


def throttling(system: Path = Path("/sys")) -> Finding[None]:
    """Look at temperature and supply voltage, which lower the clock."""
    degrees = [int(text) // 1000 for text in _readable(system.glob("class/thermal/thermal_zone*/temp"))]
    flags = [int(text, 16) for text in _readable(system.glob("devices/platform/soc*/*firmware/get_throttled"))]
    now, before = (
        [name for bit, name in enumerate(_CLOCK_LIMITS) if any(flag >> bit + shift & 1 for flag in flags)]
        for shift in (0, _SINCE_BOOT)
    )
    found = [f"{max(degrees)} °C"] if degrees else []
    found += [f"{when}: {', '.join(names)}" for when, names in (("now", now), ("since boot", before)) if names]
    if not found:
        return Finding("this system tells neither temperature nor voltage", None, Status.NOT_CHECKED)
    if now or before or max(degrees, default=0) >= _HOT:
        remedy = "the clock is lowered: cool the board, and use the power supply that its maker recommends"
        return Finding("; ".join(found), None, Status.WARNING, remedy)
    return Finding("; ".join(found), None)


def draft_model(
    load: Callable[[], SequenceModel], clock: Callable[[], float] = time.monotonic
) -> Finding[SequenceModel]:
    """Load the draft model, and measure how long it takes for a token.

    Raises:
        BundleError: it cannot be loaded.
        SettingsError: the number of threads, or the execution provider.
    """
    model = load()
    moments = []
    for _ in range(_UNTIMED_TOKENS + _TIMED_TOKENS):
        model.forward([0])
        moments.append(clock())
    model.rollback(0)
    seconds = (moments[-1] - moments[_UNTIMED_TOKENS - 1]) / _TIMED_TOKENS
    return Finding(f"{1e3 * seconds:.1f} ms for a token", model)


def _readable(paths: Iterable[Path]) -> Iterator[str]:
    """The contents of files, but for sensors that are off, which cannot be read."""
    for path in paths:
        with suppress(OSError):
            yield path.read_text(encoding="ascii")


def _named(words: Collection[str], names: Mapping[str, str]) -> list[str]:
    return [name for word, name in names.items() if word in words]


def _contents(cpus: Path, name: str) -> set[str]:
    return {path.read_text(encoding="ascii").strip() for path in cpus.glob(f"cpu[0-9]*/cpufreq/{name}")}
