"""``edgedraft-basestation top``: a live table of a base station's metrics."""

import time
import urllib.error
import urllib.request
from collections.abc import Iterable

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Group
from rich.table import Table

from basestation.monitoring.snapshot import Snapshot
from protocol.errors import LinkError, SettingsError

_TIMEOUT = 5.0


def read_snapshot(url: str, now: float | None = None) -> Snapshot:
    """Scrape a base station.

    Raises:
        LinkError: nothing answers at ``url``.
        SettingsError: ``url`` is not a base station's.
    """
    if not url.startswith(("http://", "https://")):
        raise SettingsError("url", url, "http://HOST:PORT, the address in the base station's --metrics-bind")
    try:
        with urllib.request.urlopen(url.rstrip("/") + "/metrics", timeout=_TIMEOUT) as answer:  # noqa: S310 - checked
            text = answer.read().decode()
        return parse_snapshot(text, time.monotonic() if now is None else now)
    except (OSError, urllib.error.URLError) as error:
        raise LinkError(f"no metrics at {url}: {error}; start a base station with --metrics-bind") from error
    except ValueError as error:
        raise SettingsError("url", url, f"a base station's ({error})") from error


def parse_snapshot(text: str, now: float) -> Snapshot:
    """Parse the text of a scrape.

    Raises:
        ValueError: it is not in Prometheus' format.
    """
    return Snapshot.of(text_string_to_metric_families(text), now)


def render(before: Snapshot, now: Snapshot) -> Group:
    """Tables of the rates between two snapshots, and of the current values."""
    return Group(_passes(before, now), _modes(before, now), _positions(now))


def _passes(before: Snapshot, now: Snapshot) -> Table:
    table = Table(title="base station", title_justify="left")
    rows = (
        ("sessions", f"{now.total('sessions'):.0f}"),
        ("KV pool in use", _share(now.total("kv_positions_used"), now.total("kv_positions_capacity"))),
        ("forward passes/s", f"{_rate(before, now, 'forward_seconds_count'):.1f}"),
        ("sessions per pass", _mean(before, now, "batch_sessions", 1, "")),
        ("tokens per pass", _mean(before, now, "batch_tokens", 1, "")),
        ("forward", _mean(before, now, "forward_seconds", 1e3, " ms")),
        ("verify", _mean(before, now, "verify_seconds", 1e3, " ms")),
        ("queueing delay", _mean(before, now, "queueing_delay_seconds", 1e3, " ms")),
        ("evictions", f"{now.total('evictions_total'):.0f}"),
        ("out of memory", f"{now.total('out_of_memory_total'):.0f}"),
        ("faults", ", ".join(_counts(now, "faults_total")) or "0"),
    )
    table.add_column("metric")
    table.add_column("value", justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _modes(before: Snapshot, now: Snapshot) -> Table:
    table = Table("mode", "rounds/s", "tokens/s", "accepted", "uplink B/s", "downlink B/s")
    modes = {mode for name in ("uplink_bytes_total", "rounds_total") for mode in now.samples.get(name, {})}
    for mode in sorted(modes):
        rounds, accepted = (_rate(before, now, name, mode) for name in ("rounds_total", "accepted_tokens_total"))
        drafted = _rate(before, now, "drafted_tokens_total", mode)
        traffic = (_rate(before, now, name, mode) for name in ("uplink_bytes_total", "downlink_bytes_total"))
        numbers = (f"{value:,.0f}" for value in traffic)
        table.add_row(mode, f"{rounds:.1f}", f"{rounds + accepted:.1f}", _share(accepted, drafted), *numbers)
    return table


def _positions(now: Snapshot) -> Table:
    table = Table("position in round", "drafted", "accepted", title="acceptance since the start", title_justify="left")
    drafted = now.samples.get("drafted_tokens_at_total", {})
    for position in sorted(drafted, key=int):
        accepted = now.value("accepted_tokens_at_total", position)
        table.add_row(position, f"{drafted[position]:.0f}", _share(accepted, drafted[position]))
    return table


def _rate(before: Snapshot, now: Snapshot, name: str, label: str = "") -> float:
    """The rate of a counter; 0 where it fell, because a replica that is gone took its counts with it."""
    seconds = now.time - before.time
    return max(0.0, now.value(name, label) - before.value(name, label)) / seconds if seconds > 0 else 0.0


def _mean(before: Snapshot, now: Snapshot, name: str, scale: float, unit: str) -> str:
    count = now.total(f"{name}_count") - before.total(f"{name}_count")
    total = now.total(f"{name}_sum") - before.total(f"{name}_sum")
    return f"{scale * total / count:.1f}{unit}" if count > 0 else "–"


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else "–"


def _counts(now: Snapshot, name: str) -> Iterable[str]:
    return (f"{label} {count:.0f}" for label, count in sorted(now.samples.get(name, {}).items()))
