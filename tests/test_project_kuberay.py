"""The manifest for Kubernetes conforms to the schemas; its parts agree with each other and with the commands."""

import re
import shlex
from copy import deepcopy
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import typer
import yaml

from basestation.cli import app
from tests.raycluster_schema import RAY_CLUSTER
from tests.sample import DOCKER

KUBERNETES = "1.37"
DOCUMENTS = list(yaml.safe_load_all((DOCKER / "kuberay" / "raycluster.yaml").read_text(encoding="utf-8")))
CLUSTER, SERVICE, POLICY = DOCUMENTS


def validate(cluster: dict[str, Any]) -> None:
    jsonschema.validate(cluster, RAY_CLUSTER)
    spec = cluster["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        template = {"apiVersion": "v1", "kind": "PodTemplate", "template": group["template"]}
        kubernetes_validate.validate(template, KUBERNETES, strict=True)


def container(group: dict[str, Any]) -> dict[str, Any]:
    only: list[dict[str, Any]] = group["template"]["spec"]["containers"]
    assert len(only) == 1
    return only[0]


HEAD, WORKERS = CLUSTER["spec"]["headGroupSpec"], CLUSTER["spec"]["workerGroupSpecs"]
PORTS = {port["name"]: port["containerPort"] for port in container(HEAD)["ports"]}


def serve_options() -> dict[str, Any]:
    """What the front's command says, by the option's Python name."""
    script = container(HEAD)["args"][0]
    found = re.search(r"edgedraft-basestation serve (.*)", script.replace("\\\n", " "))
    assert found
    group = typer.main.get_command(app)
    serve = group.get_command(None, "serve")  # type: ignore[attr-defined]
    options: dict[str, Any] = serve.make_context("serve", shlex.split(found[1]), resilient_parsing=True).params
    return options


def test_the_cluster_conforms_to_the_schemas() -> None:
    validate(CLUSTER)


@pytest.mark.parametrize("document", [SERVICE, POLICY], ids=["Service", "NetworkPolicy"])
def test_the_other_documents_conform_to_kubernetes(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "headGroupSpec", "template", "spec", "containers", 0, "port"), []),
        (("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "workerGroupSpecs", 0, "maxReplicas"), "2"),
        (("spec", "authOption"), {}),
    ],
)
def test_a_wrong_field_is_found(path: tuple[str | int, ...], value: object) -> None:
    broken = deepcopy(CLUSTER)
    inner: Any = broken
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        validate(broken)


def test_the_front_has_a_machine_for_each_replica() -> None:
    options = serve_options()
    assert options["replicas"] == sum(group["replicas"] for group in WORKERS)
    for group in WORKERS:
        assert int(container(group)["resources"]["requests"]["cpu"]) >= options["replica_cpus"]
    assert HEAD["rayStartParams"]["num-cpus"] == "0"


def test_the_ports_of_the_command_are_those_of_the_pod_the_service_and_the_probes() -> None:
    options = serve_options()
    assert options["bind"].endswith(f":{PORTS['devices']}")
    assert options["metrics_bind"].endswith(f":{PORTS['metrics']}")
    assert options["ray_address"].endswith(f":{PORTS['gcs-server']}")
    assert [(port["port"], port["targetPort"]) for port in SERVICE["spec"]["ports"]] == [(PORTS["devices"], "devices")]
    for group in WORKERS:
        port = int(group["rayStartParams"]["node-manager-port"])
        for probe in ("readinessProbe", "livenessProbe"):
            assert container(group)[probe]["tcpSocket"]["port"] == port


def test_devices_need_keys_and_pods_a_token() -> None:
    options = serve_options()
    assert not options["insecure"]
    assert str(options["keys"]) in {mount["mountPath"] for mount in container(HEAD)["volumeMounts"]}
    assert CLUSTER["spec"]["authOptions"] == {"mode": "token"}


def test_service_and_policy_select_the_pods_of_the_cluster() -> None:
    selected = {"ray.io/cluster": CLUSTER["metadata"]["name"]}
    assert SERVICE["spec"]["selector"] == {**selected, "ray.io/node-type": "head"}
    assert POLICY["spec"]["podSelector"]["matchLabels"] == selected


def test_a_pod_may_take_as_long_to_end_as_its_sessions_may_to_finish() -> None:
    drain_seconds = serve_options()["drain_seconds"]
    for group in (HEAD, *WORKERS):
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] > drain_seconds
