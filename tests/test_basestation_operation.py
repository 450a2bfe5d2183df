"""Operation: metrics, health endpoints, records, logs, traces and draining."""

import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from basestation.engine import engine_host
from basestation.engine.pass_records import PassRecordFile
from basestation.engine.profiler import PassProfiler
from basestation.kv_cache.memory_guard import MemoryGuard
from basestation.logs import JsonFormatter
from basestation.monitoring.metrics import Metrics
from basestation.monitoring.monitor import Monitor
from basestation.monitoring.top import parse_snapshot, read_snapshot, render
from basestation.server import Server
from basestation.stop_signals import stop_on_signals
from device.link.link import Link
from device.session.client import Client
from device.session.session import DeviceSession
from device.settings import DraftSettings, Timeouts
from protocol.errors import FaultError, LinkError, SettingsError
from protocol.frames import FrameCodec
from protocol.messages import Mode, Sampling
from tests.fakes import DRAFT, PROMPT, TARGET, VOCAB, FakeDraftModel, FakeTarget, random_table, target_alone
from tests.fleet import Response, get
from tests.link_pair import open_session
from tests.record_file import lines_of
from tests.sample import PROJECT
from tests.serving import ANY_PORT, serving
from tests.wait import wait_for

SETTINGS = (
    DraftSettings(Mode.IDS, Sampling(), 4, 4),
    DraftSettings(Mode.TOPK, Sampling(1.0, seed=3), 4, 4),
    DraftSettings(Mode.TARGET, Sampling(), 4, 4),
)


@dataclass
class MonitoredStation:
    """A base station with a monitor and a record file."""

    server: Server
    monitor: Monitor
    record: Path
    links: list[Link] = field(default_factory=list)

    def session(self, settings: DraftSettings, timeouts: Timeouts | None = None) -> tuple[DeviceSession, Link]:
        model = FakeDraftModel.make(DRAFT)
        link = Link.connect(self.server.address, FrameCodec(VOCAB))
        self.links.append(link)
        return open_session(Client(link, model.manifest, timeouts), settings, model, PROMPT), link

    def get(self, path: str) -> Response:
        return get(self.monitor.url + path)

    def samples(self) -> dict[tuple[str, str], float]:
        text = self.get("/metrics").text
        return {
            (sample.name.removeprefix("edgedraft_"), ",".join(sample.labels.values())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }


@pytest.fixture
def monitored(tmp_path: Path) -> Iterator[MonitoredStation]:
    metrics, record = Metrics(), tmp_path / "rounds.jsonl"
    with closing(Monitor("127.0.0.1:0", metrics)) as monitor, closing(PassRecordFile(record)) as records:
        server = Server(FakeTarget.make(TARGET), ANY_PORT, metrics=metrics, records=records)
        monitor.alive, monitor.ready = (lambda: server.alive), (lambda: not server.draining)
        monitored = MonitoredStation(server, monitor, record)
        with serving(server):
            yield monitored
            for link in monitored.links:
                link.close()


def settled(monitored: MonitoredStation, name: str, label: str, value: float) -> float:
    """A counter once it has reached ``value``, or after two seconds."""
    for _ in range(100):
        if monitored.samples().get((name, label)) == value:
            break
        time.sleep(0.02)
    return monitored.samples().get((name, label), 0.0)


def test_a_scrape_agrees_with_the_devices_counters(monitored: MonitoredStation) -> None:
    for settings in SETTINGS:
        session, link = monitored.session(settings)
        tokens = [token.token_id for token in session.answer(30)]
        session.close()
        mode, counters = str(settings.mode), session.counters
        assert settled(monitored, "rounds_total", mode, counters.rounds) == counters.rounds
        samples = monitored.samples()
        assert samples["drafted_tokens_total", mode] == counters.drafted
        assert samples["accepted_tokens_total", mode] == counters.accepted
        assert counters.accepted + counters.rounds == len(tokens) == 30
        handshake = [samples[f"{direction}_bytes_total", "none"] for direction in ("uplink", "downlink")]
        assert handshake[0] > 0
        assert link.uplink_bytes > samples["uplink_bytes_total", mode] > link.uplink_bytes / 2
        assert link.downlink_bytes > samples["downlink_bytes_total", mode] > link.downlink_bytes / 3
    assert settled(monitored, "sessions", "", 0) == 0
    samples = monitored.samples()
    uplink = sum(value for (name, _), value in samples.items() if name == "uplink_bytes_total")
    downlink = sum(value for (name, _), value in samples.items() if name == "downlink_bytes_total")
    assert uplink == sum(link.uplink_bytes for link in monitored.links)
    assert downlink == sum(link.downlink_bytes for link in monitored.links)


def test_acceptance_by_position_sums_to_the_total(monitored: MonitoredStation) -> None:
    session, _ = monitored.session(SETTINGS[0])
    for _ in session.answer(40):
        pass
    assert settled(monitored, "rounds_total", "ids", session.counters.rounds) == session.counters.rounds
    samples = monitored.samples()
    for name, total in (("drafted", session.counters.drafted), ("accepted", session.counters.accepted)):
        counts = [samples.get((f"{name}_tokens_at_total", str(position)), 0.0) for position in range(1, 5)]
        assert sum(counts) == total
        assert counts == sorted(counts, reverse=True)
        assert (f"{name}_tokens_at_total", "5") not in samples


def test_faults_are_counted_by_code(monitored: MonitoredStation) -> None:
    session, link = monitored.session(SETTINGS[0])
    with pytest.raises(FaultError):
        Client(link, FakeDraftModel.make(random_table(VOCAB + 1, 0)).manifest)
    assert monitored.samples()["faults_total", "mismatch"] == 2  # it sends Hello in two versions
    assert [token.token_id for token in session.answer(5)] == target_alone(TARGET, PROMPT, 5)


def test_the_operations_manual_documents_every_metric() -> None:
    manual = (PROJECT / "docs" / "operations.md").read_text(encoding="utf-8")
    names = {family.name for family in Metrics().registry.collect()}
    assert len(names) > 10
    assert [name for name in names if f"`{name}" not in manual] == []


def test_a_base_station_is_ready_until_it_drains(monitored: MonitoredStation) -> None:
    session, _ = monitored.session(SETTINGS[0])
    stream = session.answer(20)
    first = next(stream).token_id
    assert [monitored.get(path).status for path in ("/healthz", "/readyz", "/nothing")] == [200, 200, 404]
    monitored.server.stop(drain_seconds=30)
    assert [monitored.get(path).status for path in ("/healthz", "/readyz")] == [200, 503]
    with pytest.raises(FaultError, match="shutting down") as caught:
        monitored.session(SETTINGS[0], Timeouts(retry=1))
    assert caught.value.fault_code == "closing"
    assert [first, *(token.token_id for token in stream)] == target_alone(TARGET, PROMPT, 20)


def test_a_drained_base_station_stops_before_the_drain_time_ends() -> None:
    server = Server(FakeTarget.make(TARGET), ANY_PORT)
    thread = threading.Thread(target=server.serve)
    thread.start()
    server.stop(drain_seconds=3600)
    thread.join(timeout=20)
    assert not thread.is_alive()


def test_a_base_station_whose_io_thread_hangs_is_not_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_host, "_DEAD_SECONDS", 1.0)
    monkeypatch.setattr(engine_host, "_IDLE_POLL_SECONDS", 0.1)
    free = threading.Event()

    def resident() -> int:
        free.wait()
        return 0

    server = Server(FakeTarget.make(TARGET), "tcp://127.0.0.1:0", memory_guard=MemoryGuard(0, 100, resident))
    with serving(server), ExitStack() as stack:
        stack.callback(free.set)
        wait_for(lambda: not server.alive)
        free.set()
        wait_for(lambda: server.alive)


def test_sigterm_drains_and_a_second_one_or_sigint_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers, told = dict[int, Callable[[], None]](), list[float]()
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    stop_on_signals(told.append, lambda: bool(told), 3.0)
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        handlers[number]()
    assert told == [3.0, 0.0, 0.0]


def test_a_monitor_reports_not_ready_while_the_model_loads() -> None:
    with closing(Monitor("127.0.0.1:0", Metrics())) as monitor:
        assert get(monitor.url + "/readyz").status == 503
        assert get(monitor.url + "/healthz").status == 200
        with pytest.raises(SettingsError, match="metrics-bind"):
            Monitor(monitor.url.removeprefix("http://"), Metrics())
    for bind in ("nowhere", "127.0.0.1:http", "127.0.0.1:99999"):
        with pytest.raises(SettingsError, match=f"metrics-bind is '{bind}'"):
            Monitor(bind, Metrics())


def test_every_round_is_recorded_in_a_line(monitored: MonitoredStation) -> None:
    session, _ = monitored.session(SETTINGS[0])
    committed = [token.token_id for token in session.answer(30)]
    assert settled(monitored, "rounds_total", "ids", session.counters.rounds) == session.counters.rounds
    lines = lines_of(monitored.record)
    assert [(line["session"], line["round"]) for line in lines] == [(0, 1 + index) for index in range(len(lines))]
    assert sum(line["drafted"] for line in lines) == session.counters.drafted
    assert sum(line["accepted"] + 1 for line in lines) == len(committed)
    assert lines[-1]["token_id"] == committed[-1]
    assert {line["mode"] for line in lines} == {"ids"}
    for line in lines:
        assert line["queueing_delay"] >= 0
        assert line["batch_tokens"] >= line["drafted"] + 1


def test_top_shows_the_rates_between_two_snapshots(monitored: MonitoredStation) -> None:
    session, _ = monitored.session(SETTINGS[0])
    before = read_snapshot(monitored.monitor.url, now=0.0)
    for _ in session.answer(40):
        pass
    assert settled(monitored, "rounds_total", "ids", session.counters.rounds) == session.counters.rounds
    console = Console(width=120, record=True, file=Path("/dev/null").open("w", encoding="utf-8"))  # noqa: SIM115
    console.print(render(before, read_snapshot(monitored.monitor.url, now=2.0)))
    console.file.close()
    rows = [line.replace("│", " ").split() for line in console.export_text().splitlines()]
    (ids,) = [row for row in rows if row[:1] == ["ids"]]
    assert ids[1:4] == [
        f"{session.counters.rounds / 2:.1f}",
        f"{40 / 2:.1f}",
        f"{session.counters.accepted / session.counters.drafted:.0%}",
    ]
    assert ["sessions", "1"] in rows


def test_top_refuses_an_address_without_metrics() -> None:
    with pytest.raises(LinkError, match="--metrics-bind"):
        read_snapshot("http://127.0.0.1:9")
    with pytest.raises(SettingsError, match="url is 'file:///etc/passwd'"):
        read_snapshot("file:///etc/passwd")
    assert parse_snapshot("", 0.0).total("sessions") == 0


def test_a_json_log_line_has_all_fields() -> None:
    record = logging.makeLogRecord(
        {"msg": "peer %s: %s", "args": ("ab", 'a "word"'), "levelname": "WARNING", "name": "basestation", "session": 7}
    )
    line = json.loads(JsonFormatter().format(record))
    assert (line["level"], line["logger"], line["message"]) == ("warning", "basestation", 'peer ab: a "word"')
    assert line["session"] == 7
    assert line["time"].endswith("+00:00")


def test_a_trace_is_written_after_some_passes_or_on_close(tmp_path: Path) -> None:
    for name, count in (("long", 40), ("short", 10)):
        path = tmp_path / f"{name}.json"
        with PassProfiler(path) as profiler:
            for _ in range(count):
                profiler.step()
            assert path.exists() == (name == "long")
        assert "traceEvents" in json.loads(path.read_text(encoding="utf-8"))
