"""The server side of the fleet page: metrics of each device, the samples of the last minutes, the report, HTTP."""

import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from basestation.devices.key_folder import KeyFolder
from basestation.devices.peer import UNNAMED, Peer
from basestation.monitoring.fault_log import FaultLog
from basestation.monitoring.fleet_history import INTERVAL, SAMPLES, FleetHistory
from basestation.monitoring.fleet_report import fleet_report
from basestation.monitoring.metrics import Metrics
from basestation.monitoring.monitor import Monitor
from basestation.monitoring.snapshot import Snapshot
from device.link.curve_keys import new_key
from protocol.messages import Mode
from tests.fakes import PROMPT, TARGET, target_alone
from tests.fleet import Fleet, fleet, get
from tests.sample import PROJECT

PAGE = PROJECT / "basestation" / "monitoring" / "page"
KITCHEN = Peer("key", b"address", "kitchen")


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Fleet]:
    with fleet(tmp_path) as running:
        yield running


def eventually(condition: Callable[[], bool]) -> bool:
    """Whether a condition holds within five seconds."""
    for _ in range(250):
        if condition():
            return True
        time.sleep(0.02)
    return False


def snapshot(metrics: Metrics) -> Snapshot:
    return Snapshot.of(metrics.registry.collect(), 0.0)


# -- metrics of each device --


def test_each_device_is_counted_under_the_name_it_is_enrolled_under(running: Fleet) -> None:
    for name, count in (("kitchen", 20), ("garden", 10)):
        running.enroll(name)
        session = running.session(name)
        assert [token.token_id for token in session.answer(count)] == target_alone(TARGET, PROMPT, count)

        def value(metric: str, name: str = name) -> float:
            return snapshot(running.metrics).value(f"fleet_{metric}", name)

        assert eventually(lambda: value("rounds_total") == session.counters.rounds)  # noqa: B023 - called at once
        assert value("drafted_tokens_total") == session.counters.drafted
        assert value("accepted_tokens_total") == session.counters.accepted
        assert value("uplink_bytes_total") == running.links[name].uplink_bytes
        assert value("downlink_bytes_total") == running.links[name].downlink_bytes
        assert value("sessions") == 1
    samples = snapshot(running.metrics)
    assert set(samples.samples["fleet_rounds_total"]) == {"kitchen", "garden"}
    assert samples.total("fleet_rounds_total") == samples.total("rounds_total")


def test_devices_without_a_key_share_a_label() -> None:
    metrics = Metrics()
    for address in (b"a", b"b"):
        metrics.count_uplink(Peer.without_key(address), None, 10)
    assert snapshot(metrics).samples["fleet_uplink_bytes_total"] == {UNNAMED: 20}


def test_a_revoked_device_leaves_no_label(running: Fleet) -> None:
    for name in ("kitchen", "garden"):
        running.enroll(name)
        session = running.session(name)
        assert next(session.answer(5))
    running.folder.revoke("kitchen")

    def devices() -> set[str]:
        samples = snapshot(running.metrics).samples
        return {label for name, values in samples.items() if name.startswith("fleet_") for label in values}

    assert eventually(lambda: devices() == {"garden"})


def test_the_name_of_a_device_is_cut(tmp_path: Path) -> None:
    folder, key = KeyFolder.create(tmp_path / "keys"), new_key(tmp_path / "kitchen")
    folder.enroll("kitchen", key)
    (file,) = (tmp_path / "keys" / "devices").iterdir()
    file.write_text("k" * 10_000)
    assert folder.name_of(key) == "k" * 64


def test_the_faults_of_one_device_do_not_push_out_those_of_another() -> None:
    log = FaultLog(clock=iter(range(10_000)).__next__)
    log.add("kitchen", "state", "the kitchen's")
    for number in range(1000):
        log.add("garden", "c" * 1000, f"{number}" + "t" * 10_000)
    newest = log.newest(50)
    assert [fault.device for fault in newest] == ["garden"] * (len(newest) - 1) + ["kitchen"]
    assert [fault.text[:3] for fault in newest[:2]] == ["999", "998"]
    assert all(len(fault.code) <= 40 and len(fault.text) <= 300 for fault in newest)
    assert len(newest) < 50


# -- the last minutes --


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def history(metrics: Metrics, keys: KeyFolder | None = None) -> tuple[FleetHistory, Clock]:
    clock = Clock()
    taken = FleetHistory(metrics, keys, clock)
    taken.sample()
    return taken, clock


def advance(taken: FleetHistory, clock: Clock) -> None:
    clock.now += INTERVAL
    taken.sample()


def test_only_the_samples_of_ten_minutes_are_kept() -> None:
    taken, clock = history(Metrics())
    for _ in range(3 * SAMPLES):
        advance(taken, clock)
    samples = taken.samples()
    assert len(samples) == SAMPLES
    assert samples[-1].time - samples[0].time == 600
    assert {len(column) for column in fleet_report(taken, FaultLog())["history"].values()} == {SAMPLES - 1}


def test_an_idle_device_takes_no_memory_in_each_sample() -> None:
    metrics = Metrics()
    metrics.count_uplink(KITCHEN, Mode.IDS, 10)
    taken, clock = history(metrics)
    advance(taken, clock)
    metrics.count_uplink(KITCHEN, Mode.IDS, 10)
    advance(taken, clock)
    first, second, third = (sample.devices["kitchen"] for sample in taken.samples())
    assert first is second
    assert third is not second


def test_the_report_has_the_rates_between_the_samples() -> None:
    metrics = Metrics()
    taken, clock = history(metrics)
    metrics.count_uplink(KITCHEN, Mode.IDS, 500)
    metrics.count_downlink(KITCHEN, Mode.IDS, 50)
    for accepted in (4, 2):
        metrics.fleet.count_round("kitchen", 4, accepted, 0.25)
    metrics.count_fault(KITCHEN, "state", "a text")
    advance(taken, clock)
    advance(taken, clock)
    clock.now += 1
    report = fleet_report(taken, metrics.fleet.faults, "kitchen")
    (row,) = report["devices"]
    assert (row["name"], row["enrolled"], row["total_faults"]) == ("kitchen", None, 1)
    assert (row["tokens_per_second"], row["acceptance"]) == (0.8, 0.75)
    assert (row["uplink_bytes_per_second"], row["downlink_bytes_per_second"]) == (50, 5)
    columns = report["device"]["history"]
    assert columns["age"] == [6, 1]
    assert columns["tokens_per_second"] == [1.6, 0]
    assert columns["acceptance"] == [0.75, None]
    assert columns["queueing_seconds"] == [0.25, None]
    assert columns["faults"] == [1, 0]
    (fault,) = report["faults"]
    assert (fault["device"], fault["code"], fault["text"]) == ("kitchen", "state", "a text")
    assert report["history"]["uplink_bytes_per_second"] == [100, 0]


def test_a_device_that_is_enrolled_again_counts_from_zero() -> None:
    metrics = Metrics()
    metrics.count_uplink(KITCHEN, Mode.IDS, 1000)
    taken, clock = history(metrics)
    metrics.fleet.forget("kitchen")
    metrics.count_uplink(KITCHEN, Mode.IDS, 10)
    advance(taken, clock)
    assert fleet_report(taken, FaultLog(), "kitchen")["device"]["history"]["uplink_bytes_per_second"] == [2]


def test_enrolled_devices_are_listed_before_they_connect(tmp_path: Path) -> None:
    folder = KeyFolder.create(tmp_path / "keys")
    folder.enroll("garden", new_key(tmp_path / "garden"))
    metrics = Metrics()
    metrics.count_uplink(KITCHEN, Mode.IDS, 10)
    taken, _ = history(metrics, folder)
    rows = fleet_report(taken, FaultLog())["devices"]
    assert [(row["name"], row["enrolled"], row["seen_age"] is None) for row in rows] == [
        ("garden", True, True),
        ("kitchen", False, False),
    ]


def test_a_folder_that_cannot_be_looked_into_is_reported_and_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    folder = KeyFolder.create(tmp_path / "keys")
    (tmp_path / "keys" / "devices").rmdir()
    metrics = Metrics()
    metrics.count_uplink(KITCHEN, Mode.IDS, 10)
    taken, clock = history(metrics, folder)
    report = fleet_report(taken, FaultLog())
    assert "cannot be read" in report["unreadable"]
    assert [row["enrolled"] for row in report["devices"]] == [None]
    (tmp_path / "keys" / "devices").mkdir()
    advance(taken, clock)
    report = fleet_report(taken, FaultLog())
    assert report["unreadable"] == ""
    assert [row["enrolled"] for row in report["devices"]] == [False]


# -- HTTP --


def test_the_page_and_its_files_are_served_with_a_policy_that_admits_nothing_else() -> None:
    with closing(Monitor("127.0.0.1:0", Metrics())) as monitor:
        paths = ["/", *(f"/page/{path.name}" for path in PAGE.iterdir() if path.name != "index.html"), "/fleet.json"]
        assert len(paths) > 6
        for path in paths:
            answer = get(monitor.url + path)
            assert answer.status == 200
            policy = answer.headers["Content-Security-Policy"]
            assert {"default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"} <= set(policy.split("; "))
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
        for path in ("/page/index.html", "/page/../monitor.py", "/page/%2e%2e/monitor.py", "/page/"):
            assert get(monitor.url + path).status == 404


def test_a_name_that_a_web_page_could_own_is_refused() -> None:
    with closing(Monitor("127.0.0.1:0", Metrics())) as monitor:
        allowed = ["127.0.0.1:9464", "localhost", "LOCALHOST:1", "[::1]:9464", "10.0.0.5", socket.gethostname()]
        refused = ["evil.example", "evil.example:9464", "localhost.evil.example", "127.0.0.1.evil.example", "[", "@"]
        for path in ("/", "/fleet.json", "/metrics", "/healthz"):
            assert [get(monitor.url + path, host).status for host in allowed] == [200] * len(allowed)
            assert [get(monitor.url + path, host).status for host in refused] == [400] * len(refused)
        assert "evil.example" in get(monitor.url, "evil.example").text


def test_a_port_alone_is_bound_on_loopback() -> None:
    for bind in ("0", ":0"):
        with closing(Monitor(bind, Metrics())) as monitor:
            assert monitor.url.startswith("http://127.0.0.1:")


def test_the_report_tells_whether_the_base_station_serves(running: Fleet) -> None:
    assert [running.report()[name] for name in ("alive", "ready")] == [True, True]
    running.server.stop(drain_seconds=30)
    assert [running.report()[name] for name in ("alive", "ready")] == [True, False]


def test_clients_that_never_finish_their_request_delay_no_answer(running: Fleet) -> None:
    running.enroll("kitchen")
    session = running.session("kitchen")
    host, port = running.monitor.url.removeprefix("http://").split(":")
    with ExitStack() as stack:
        for _ in range(20):
            slow = stack.enter_context(socket.create_connection((host, int(port))))
            slow.sendall(b"GET /fleet.json HTTP/1.1\r\n")
        assert running.report()["alive"]
        assert [token.token_id for token in session.answer(20)] == target_alone(TARGET, PROMPT, 20)


# -- the files of the page --


def test_the_page_makes_no_html_from_text_and_names_no_other_host() -> None:
    for path in PAGE.iterdir():
        text = path.read_text(encoding="utf-8")
        assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(", text)
        assert re.findall(r"https?://\S+?(?=\")", text) in ([], ["http://www.w3.org/2000/svg"])
        assert not re.findall(r"<[^>]+\s(?:style|on\w+)=", text)


def test_every_file_that_the_page_loads_exists_and_every_file_is_loaded() -> None:
    files = {path.name for path in PAGE.iterdir()}
    loaded = {"index.html"}
    for path in PAGE.iterdir():
        text = path.read_text(encoding="utf-8")
        loaded |= set(re.findall(r'"/page/([\w.]+)"', text)) | set(re.findall(r'from "\./([\w.]+)"', text))
    assert loaded == files
