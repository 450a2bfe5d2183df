"""What the fleet page shows, ready for JSON: rates between the samples of the last minutes.

Times are ages in seconds, so that the clock of the reader does not matter. A figure
without a denominator, like the acceptance of no drafted tokens, is None.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from typing import Any, TypeAlias

from basestation.monitoring.fault_log import FaultLog, LoggedFault
from basestation.monitoring.fleet_history import INTERVAL, FleetHistory, Sample, Traffic

Figures: TypeAlias = dict[str, Any]

_RECENT_SECONDS = 60.0
_MAX_FAULTS = 50
_DIGITS = 4


def fleet_report(history: FleetHistory, faults: FaultLog, device: str | None = None) -> Figures:
    """The base station and its devices in the last minute, the latest faults, and the last ten minutes of one.

    Args:
        history: of the base station.
        faults: of its devices.
        device: whose last ten minutes are included; None for the base station's alone.
    """
    samples, enrolled = history.samples(), history.enrolled
    recent = _recent(samples)
    names = {*(enrolled or ()), *recent[-1].devices}
    report: Figures = {
        "interval_seconds": INTERVAL,
        "unreadable": history.unreadable,
        "last_minute": _station_figures(recent[0], recent[-1]),
        "history": _columns(history.now, samples, _station_figures),
        "devices": [_device_row(name, history, recent) for name in sorted(names)],
        "faults": [_fault(fault) for fault in faults.newest(_MAX_FAULTS)],
    }
    if device is not None:
        columns = _columns(history.now, samples, partial(_device_figures, device))
        report["device"] = {"name": device, "history": columns}
    return report


def _recent(samples: Sequence[Sample]) -> Sequence[Sample]:
    """The samples of the last minute."""
    return [sample for sample in samples if sample.time >= samples[-1].time - _RECENT_SECONDS]


def _columns(
    now: float, samples: Sequence[Sample], figures: Callable[[Sample, Sample], Figures]
) -> dict[str, list[Any]]:
    """Each figure between all neighbouring samples, oldest first, and how long ago the later sample was."""
    points = [{"age": _rounded(now - later.time), **figures(earlier, later)} for earlier, later in pairwise(samples)]
    return {name: [point[name] for point in points] for name in points[0]} if points else {"age": []}


def _device_row(name: str, history: FleetHistory, recent: Sequence[Sample]) -> Figures:
    """A device in the last minute; ``total_faults`` since the start."""
    seen = history.last_seen.get(name)
    return {
        "name": name,
        "enrolled": None if history.enrolled is None else name in history.enrolled,
        "seen_age": None if seen is None else _rounded(max(0.0, time.time() - seen)),
        "total_faults": recent[-1].devices.get(name, Traffic()).faults,
        **_device_figures(name, recent[0], recent[-1]),
    }


def _device_figures(name: str, before: Sample, now: Sample) -> Figures:
    seconds = now.time - before.time
    return _traffic_figures(before.devices.get(name, Traffic()), now.devices.get(name, Traffic()), seconds)


def _station_figures(before: Sample, now: Sample) -> Figures:
    seconds = now.time - before.time
    passes = now.passes.passes - before.passes.passes
    batch_sessions = now.passes.batch_sessions - before.passes.batch_sessions
    batch_tokens = now.passes.batch_tokens - before.passes.batch_tokens
    return _traffic_figures(before.total, now.total, seconds) | {
        "passes_per_second": _ratio(passes, seconds),
        "batch_sessions": _ratio(batch_sessions, passes),
        "batch_tokens": _ratio(batch_tokens, passes),
        "forward_seconds": _ratio(now.passes.forward_seconds - before.passes.forward_seconds, passes),
        "verify_seconds": _ratio(now.passes.verify_seconds - before.passes.verify_seconds, passes),
        "evictions": now.passes.evictions - before.passes.evictions,
        "kv_share": _ratio(now.passes.kv_used, now.passes.kv_capacity),
    }


def _traffic_figures(before: Traffic, now: Traffic, seconds: float) -> Figures:
    """Rates and ratios of an interval; a device that was enrolled again counts from 0."""
    if now.uplink_bytes < before.uplink_bytes:
        before = Traffic()
    rounds, accepted = now.rounds - before.rounds, now.accepted - before.accepted
    return {
        "sessions": now.sessions,
        "tokens_per_second": _ratio(rounds + accepted, seconds),
        "acceptance": _ratio(accepted, now.drafted - before.drafted),
        "uplink_bytes_per_second": _ratio(now.uplink_bytes - before.uplink_bytes, seconds),
        "downlink_bytes_per_second": _ratio(now.downlink_bytes - before.downlink_bytes, seconds),
        "queueing_seconds": _ratio(now.queueing_seconds - before.queueing_seconds, rounds),
        "faults": now.faults - before.faults,
    }


def _fault(fault: LoggedFault) -> Figures:
    fields = asdict(fault)
    return {"age": _rounded(max(0.0, time.time() - fields.pop("time"))), **fields}


def _ratio(part: float, whole: float) -> float | None:
    return _rounded(part / whole) if whole > 0 else None


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
