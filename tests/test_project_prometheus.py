"""A real Prometheus (Debian's package): it scrapes both ends, and evaluates the dashboard's queries and the alerts."""

import json
import math
import shutil
import socket
import subprocess
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fleet import get
from tests.monitoring import RULES, alerts, dashboard_queries
from tests.sample import DOCKER
from tests.sample_fleet import sample_fleet

pytestmark = pytest.mark.pages

VARIABLES = {"$__rate_interval": "1m", "$station": ".*", "$device": ".*", "$board": ".*"}
SECONDS = 120


class Prometheus:
    """A running Prometheus."""

    def __init__(self, url: str) -> None:
        self._url = url

    def query(self, expression: str) -> list[Any]:
        """The series of an instant query."""
        answer = json.loads(self.get(f"query?query={urllib.parse.quote(expression)}"))
        assert answer["status"] == "success", (expression, answer)
        result: list[Any] = answer["data"]["result"]
        return result

    def has_figures(self, expression: str) -> bool:
        """Whether a query returns a series whose value is a finite number."""
        return any(math.isfinite(float(series["value"][1])) for series in self.query(expression))

    def get(self, path: str) -> str:
        return get(f"{self._url}/api/v1/{path}").text


@contextmanager
def prometheus(folder: Path, targets: dict[str, str]) -> Iterator[Prometheus]:
    """Prometheus with the configuration of ``docker/``, at other addresses and a shorter interval."""
    config = yaml.safe_load((DOCKER / "prometheus.yml").read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    for job in config["scrape_configs"]:
        job["static_configs"] = [{"targets": [targets.pop(job["job_name"])]}]
    assert targets == {}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    shutil.copy(RULES, folder / config["rule_files"][0])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    files = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/series"]
    log = (folder / "log").open("w")
    with log, subprocess.Popen(["prometheus", *files, f"--web.listen-address={address}"], stderr=log) as process:
        try:
            yield Prometheus(f"http://{address}")
        finally:
            process.terminate()


def test_every_query_of_the_dashboard_returns_figures_of_a_running_pair(tmp_path: Path) -> None:
    with sample_fleet(tmp_path) as fleet:
        addresses = {"basestation": fleet.station.metrics_url, "device": fleet.kitchen.url}
        targets = {job: url.removeprefix("http://") for job, url in addresses.items()}
        with prometheus(tmp_path, targets) as running:
            wait_until_up(running)
            assert fleet.ask("river " * 20_000) == 400
            fleet.fault()
            left, end = [substituted(query) for query in dashboard_queries()], time.monotonic() + SECONDS
            while left and time.monotonic() < end:
                assert fleet.ask() == fleet.ask(temperature=1, seed=1) == 200
                left = [query for query in left if not running.has_figures(query)]
            assert left == []
            devices = {series["metric"]["device"] for series in running.query("edgedraft_fleet_rounds_total")}
            assert devices == {"kitchen"}
            assert json.loads(running.get("rules"))["data"]["groups"]
            assert running.query('ALERTS{alertstate="firing"}') == []


def wait_until_up(running: Prometheus) -> None:
    """Wait until both jobs are scraped."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        try:
            if [series["value"][1] for series in running.query("up")] == ["1", "1"]:
                return
        except (OSError, ValueError):
            pass  # it is starting
        time.sleep(0.2)
    raise AssertionError("Prometheus does not scrape both ends")


def substituted(query: str) -> str:
    for variable, value in VARIABLES.items():
        query = query.replace(variable, value)
    assert "$" not in query
    return query


# -- alerts --

FIRING: dict[str, dict[str, str]] = {
    "EdgedraftStationDown": {'up{job="basestation", instance="a"}': "1x30 0x30"},
    "EdgedraftDeviceDown": {'up{job="device", instance="a"}': "1x30 0x30"},
    "EdgedraftAcceptanceFell": {
        'edgedraft_fleet_drafted_tokens_total{instance="a", device="kitchen"}': "0+100x60",
        'edgedraft_fleet_accepted_tokens_total{instance="a", device="kitchen"}': "0+80x30 2410+10x30",
    },
    "EdgedraftQueueingDelayUp": {
        'edgedraft_queueing_delay_seconds_bucket{instance="a", le="0.5"}': "0+100x30 3000+10x30",
        'edgedraft_queueing_delay_seconds_bucket{instance="a", le="1"}': "0+100x60",
        'edgedraft_queueing_delay_seconds_bucket{instance="a", le="+Inf"}': "0+100x60",
    },
    "EdgedraftEvictions": {'edgedraft_evictions_total{instance="a"}': "0x30 0+5x30"},
}
"""Series a minute apart that are well for half an hour and then are not."""


@pytest.mark.parametrize("alert", [alert["alert"] for alert in alerts()])
def test_an_alert_fires_when_its_figure_is_bad_and_not_before(alert: str, tmp_path: Path) -> None:
    assert fires(alert, "30m", tmp_path) is False
    assert fires(alert, "58m", tmp_path) is True


def fires(alert: str, at: str, folder: Path) -> bool:
    """Whether an alert fires, as promtool evaluates it."""
    series = [{"series": name, "values": values} for name, values in FIRING[alert].items()]
    test = {
        "interval": "1m",
        "input_series": series,
        "alert_rule_test": [{"eval_time": at, "alertname": alert, "exp_alerts": []}],
    }
    path = folder / "test.yml"
    path.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "tests": [test]}))
    finished = subprocess.run(["promtool", "test", "rules", str(path)], capture_output=True, text=True, check=False)
    differs = "got:" in finished.stdout + finished.stderr  # no alert is expected, so it is what fired
    assert differs == (finished.returncode != 0), finished
    return differs


def test_promtool_accepts_the_configuration(tmp_path: Path) -> None:
    for path in (DOCKER / "prometheus.yml", RULES):
        shutil.copy(path, tmp_path)
    finished = subprocess.run(
        ["promtool", "check", "config", str(tmp_path / "prometheus.yml")], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
