"""The dashboard, the alerts and the monitoring profile agree with the metrics, the jobs and the files that exist."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from basestation.monitoring.metrics import Metrics as StationMetrics
from device.answers.metrics import Metrics as DeviceMetrics
from tests.monitoring import alerts, dashboard_queries, rules
from tests.sample import DOCKER, PROJECT

SUFFIXES = {"counter": ("_total",), "gauge": ("",), "info": ("_info",), "histogram": ("_bucket", "_sum", "_count")}
SERVICES: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))["services"]
JOBS = [
    job["job_name"] for job in yaml.safe_load((DOCKER / "prometheus.yml").read_text(encoding="utf-8"))["scrape_configs"]
]


def series_of(registry: CollectorRegistry) -> Iterator[str]:
    for family in registry.collect():
        yield from (family.name + suffix for suffix in SUFFIXES[family.type])


SERIES = {*series_of(StationMetrics().registry), *series_of(DeviceMetrics().registry)}


def test_every_panel_queries_metrics_that_exist() -> None:
    queries = dashboard_queries()
    assert len(queries) > 30
    for query in queries:
        named = re.findall(r"\bedgedraft_\w+", query)
        assert named
        assert set(named) <= SERIES, query


def test_the_dashboard_shows_every_metric() -> None:
    shown = set(re.findall(r"\bedgedraft_\w+", " ".join(dashboard_queries())))
    families = {re.sub("_(bucket|sum|count)$", "", name) for name in SERIES}
    assert families - {re.sub("_(bucket|sum|count)$", "", name) for name in shown} == set()


def test_every_alert_queries_series_that_exist() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    named = {name for rule in rules() for name in re.findall(r"\bedgedraft[_:][\w:]+", rule["expr"])}
    assert recorded < named
    assert named <= SERIES | recorded


@pytest.mark.parametrize("text", [*dashboard_queries(), *(rule["expr"] for rule in rules())])
def test_a_query_names_only_jobs_that_are_scraped(text: str) -> None:
    assert set(re.findall(r'job="(\w+)"', text)) <= set(JOBS)


def test_the_operations_manual_documents_every_alert() -> None:
    manual = (PROJECT / "docs" / "operations.md").read_text(encoding="utf-8")
    names = [alert["alert"] for alert in alerts()]
    assert len(names) == 5
    assert [name for name in names if f"`{name}`" not in manual] == []


def test_only_the_link_is_published_beyond_loopback() -> None:
    published = {name: service.get("ports", []) for name, service in SERVICES.items()}
    assert [name for name, ports in published.items() if not all(port.startswith("127.0.0.1:") for port in ports)] == [
        "basestation"
    ]
    assert [port for port in published["basestation"] if not port.startswith("127.0.0.1:")] == [
        "${STATION_PORT:-5755}:5755"
    ]


def test_the_monitoring_profile_mounts_files_that_exist() -> None:
    monitoring = [name for name, service in SERVICES.items() if service.get("profiles") == ["monitoring"]]
    assert monitoring == ["prometheus", "grafana"]
    mounted = [volume.split(":")[0] for name in monitoring for volume in SERVICES[name]["volumes"] if volume[0] == "."]
    assert len(mounted) == 5
    assert [path for path in mounted if not (DOCKER / path).is_file()] == []
