"""What the monitoring files of ``docker/`` say: the dashboard's queries, the rules."""

import json
from typing import Any

import yaml

from tests.sample import DOCKER

RULES = DOCKER / "grafana" / "rules.yml"


def dashboard_queries() -> list[str]:
    """The queries of all panels, with Grafana's variables."""
    dashboard = json.loads((DOCKER / "grafana" / "dashboard.json").read_text(encoding="utf-8"))
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"] for rule in group["rules"]]


def alerts() -> list[dict[str, Any]]:
    return [rule for rule in rules() if "alert" in rule]
