"""Metrics of all replicas: one scrape with the label ``replica``, and sums for the tables and the fleet page."""

import io
import json
import re
import time
import urllib.request
from contextlib import closing

from prometheus_client import generate_latest
from rich.console import Console

from basestation.devices.peer import Peer
from basestation.engine.load import Load
from basestation.engine.pass_records import PassRecord, VerifiedRound
from basestation.monitoring.fault_log import LoggedFault
from basestation.monitoring.metrics import Metrics
from basestation.monitoring.monitor import Monitor
from basestation.monitoring.snapshot import Snapshot
from basestation.monitoring.top import parse_snapshot, read_snapshot, render
from basestation.replicas.front_metrics import FrontMetrics
from basestation.replicas.inner_messages import Report
from protocol.messages import Mode
from tests.fakes import FakeTarget, random_table

PEER = Peer("key", b"\x01a", "kitchen")


def replica_metrics(rounds: int, sessions: int = 0) -> Metrics:
    metrics = Metrics()
    metrics.watch(lambda: {PEER.name: sessions}, FakeTarget.make(random_table(12, seed=1)).kv_pool)
    verified = [VerifiedRound("key", 0, number, Mode.IDS, 4, 2, 1, 0.1) for number in range(rounds)]
    metrics.count_pass(PassRecord(1, 5, 0, 0.5, 0.1, verified))
    metrics.count_uplink(PEER, Mode.IDS, 100)
    return metrics


def report(name: str, metrics: Metrics) -> Report:
    text = generate_latest(metrics.registry).decode()
    return Report(name, Load(), metrics=text, faults=metrics.fleet.faults.newest(10))


def scrape(metrics: FrontMetrics) -> str:
    return generate_latest(metrics.registry).decode()


def front_of(*replicas: Metrics) -> FrontMetrics:
    front = FrontMetrics()
    for number, metrics in enumerate(replicas):
        front.take(bytes([number]), report(f"replica-{number}", metrics))
    return front


def test_a_scrape_has_each_replicas_samples_under_its_label() -> None:
    text = scrape(front_of(replica_metrics(2), replica_metrics(3)))
    for number, rounds in enumerate((2, 3)):
        assert f'edgedraft_rounds_total{{mode="ids",replica="replica-{number}"}} {rounds}.0' in text
    assert text.count("# TYPE edgedraft_rounds_total counter") == 1


def test_a_snapshot_adds_the_replicas_and_the_front() -> None:
    front = front_of(replica_metrics(2), replica_metrics(3))
    front.count_uplink(PEER, None, 11)
    snapshot = parse_snapshot(scrape(front), 0.0)
    assert snapshot.value("rounds_total", "ids") == 5
    assert snapshot.total("uplink_bytes_total") == 211
    assert snapshot.value("fleet_uplink_bytes_total", "kitchen") == 211


def test_of_the_times_of_several_replicas_the_latest_is_taken() -> None:
    metrics = [replica_metrics(1), replica_metrics(1)]
    latest = max(
        parse_snapshot(generate_latest(one.registry).decode(), 0.0).total("fleet_last_seen_timestamp_seconds")
        for one in metrics
    )
    assert parse_snapshot(scrape(front_of(*metrics)), 0.0).total("fleet_last_seen_timestamp_seconds") == latest


def test_a_lost_replica_is_no_longer_scraped() -> None:
    front = front_of(replica_metrics(2), replica_metrics(3))
    front.drop(b"\0", "replica-0")
    assert 'replica="replica-0"' not in scrape(front)


def test_the_counts_of_replicas_that_are_gone_stay_in_the_totals_and_their_gauges_do_not() -> None:
    front = front_of(replica_metrics(2), replica_metrics(3))
    before = Snapshot.of(front.totals(), 0.0)
    front.drop(b"\0", "replica-0")
    front.take(b"\2", report("replica-0", replica_metrics(1)))
    front.drop(b"\1", "replica-1")
    now = Snapshot.of(front.totals(), 1.0)
    assert (before.total("rounds_total"), now.total("rounds_total")) == (5, 6)
    assert now.value("fleet_uplink_bytes_total", "kitchen") == 300
    assert now.total("forward_seconds_count") == 3
    assert now.total("fleet_last_seen_timestamp_seconds") <= time.time()


def test_a_replica_that_was_silent_for_a_while_counts_once() -> None:
    metrics = replica_metrics(2)
    front = front_of(metrics)
    front.drop(b"\0", "replica-0")
    front.take(b"\0", report("replica-0", metrics))
    assert Snapshot.of(front.totals(), 0.0).total("rounds_total") == 2


def test_a_rate_is_not_negative_where_a_replica_is_gone() -> None:
    front = front_of(replica_metrics(2), replica_metrics(3))
    before = parse_snapshot(scrape(front), 0.0)
    front.drop(b"\0", "replica-0")
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render(before, parse_snapshot(scrape(front), 1.0)))
    assert not re.search(r"-\d", console.export_text())


def test_top_and_the_fleet_page_show_the_sessions_of_all_replicas() -> None:
    front = front_of(*(replica_metrics(rounds, sessions=1) for rounds in (2, 3)))
    with closing(Monitor("127.0.0.1:0", front)) as monitor:
        assert read_snapshot(monitor.url).total("sessions") == 2
        with urllib.request.urlopen(f"{monitor.url}/fleet.json", timeout=5) as answer:  # noqa: S310 - our own
            fleet = json.load(answer)
    assert fleet["last_minute"]["sessions"] == 2
    assert [(device["name"], device["sessions"]) for device in fleet["devices"]] == [("kitchen", 2)]


def test_the_fleet_page_lists_the_faults_of_the_front_and_of_all_replicas() -> None:
    metrics = Metrics()
    metrics.count_fault(PEER, "state", "at the replica")
    front = front_of(metrics)
    front.count_fault(PEER, "limit", "at the front")
    listed: list[LoggedFault] = front.fleet.faults.newest(10)
    assert {fault.text for fault in listed} == {"at the replica", "at the front"}
