"""What is wrong with the options of replicas is one line, before anything starts; all replicas get the same ones."""

import pickle
import socket
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from basestation.cli import LEAST_PASS_TOKENS, app
from basestation.engine.scheduler import PassBudget
from basestation.launch_options import ClusterOptions, OperationOptions, SocketOptions, TargetOptions
from basestation.logs import LogFormat
from basestation.replicas import launcher, ray_actors
from basestation.replicas.cluster import Cluster
from basestation.replicas.launcher import serve_replicas
from basestation.replicas.replica_settings import ReplicaSettings
from protocol.errors import LinkError, ModelError, SettingsError
from protocol.limits import Limits
from tests.tiny_target import tiny_config

OPERATION = OperationOptions(None, None, None, 3.0, LogFormat.TEXT)


def target_options(model: str) -> TargetOptions:
    return TargetOptions(model, "auto", "auto", "cpu", "16MiB", False, "2GiB", None, None, False)


@pytest.mark.parametrize(("ray_address", "replica_cpus"), [("127.0.0.1:6379", None), (None, 2)])
def test_options_of_replicas_are_refused_without_replicas(ray_address: str | None, replica_cpus: int | None) -> None:
    assert ClusterOptions.of(None, None, None, None) is None
    with pytest.raises(SettingsError, match="left out without --replicas"):
        ClusterOptions.of(None, ray_address, replica_cpus, None)


@pytest.mark.parametrize("address", ["", "host", "host:", ":6379", "host:port"])
def test_an_address_of_ray_has_a_host_and_a_port(address: str) -> None:
    with pytest.raises(SettingsError, match="HOST:PORT"):
        Cluster(ClusterOptions(1, address, None))


def test_an_address_without_a_ray_cluster_is_named_at_once() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        with pytest.raises(LinkError, match=r"no Ray cluster at 127\.0\.0\.1:.*ray start --head"):
            Cluster(ClusterOptions(1, f"127.0.0.1:{silent.getsockname()[1]}", None))


@pytest.mark.parametrize("bind", ["tcp://0.0.0.0:0", "tcp://{taken}"])
def test_an_endpoint_that_devices_cannot_have_is_refused_before_replicas_start(
    bind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "Cluster", None)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = bind.format(taken=f"127.0.0.1:{listener.getsockname()[1]}")
        listening = SocketOptions(address, None, False, Limits())
        with pytest.raises((SettingsError, LinkError), match=r"add --keys DIR|cannot bind"):
            serve_replicas(target_options("model"), listening, OPERATION, ClusterOptions(1, None, None))


@pytest.mark.parametrize("replicas", [[], ["--replicas", "2"]], ids=len)
@pytest.mark.parametrize("option", ["--pass-tokens", "--prompt-tokens"])
def test_too_few_tokens_of_a_pass_are_refused_before_a_target_is_loaded(option: str, replicas: list[str]) -> None:
    told = CliRunner().invoke(app, ["serve", "--target", "none", *replicas, option, str(LEAST_PASS_TOKENS - 1)])
    assert (told.exit_code, option in told.stderr) == (2, True)
    assert PassBudget(LEAST_PASS_TOKENS, LEAST_PASS_TOKENS)
    with pytest.raises(SettingsError):
        PassBudget(LEAST_PASS_TOKENS - 1)


@pytest.mark.parametrize("option", ["kv_memory", "peer_memory"])
def test_a_wrong_size_is_refused_before_replicas_start(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "Cluster", None)
    listening = SocketOptions("tcp://127.0.0.1:0", None, False, Limits())
    options: dict[str, Any] = {option: "4 parsecs"}
    with pytest.raises(SettingsError, match=r"4 parsecs.*a size like"):
        serve_replicas(replace(target_options("model"), **options), listening, OPERATION, ClusterOptions(1, None, None))


def test_a_wrong_option_that_a_replica_finds_reaches_the_parent_as_such() -> None:
    with pytest.raises(SettingsError) as caught, ray_actors._ending("replica-0"):
        raise SettingsError("dtype", "float8", "auto, float32, bfloat16")
    received = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 - our own
    assert (type(received), str(received)) == (SettingsError, str(caught.value))


def test_all_replicas_get_the_weights_that_are_chosen_once(monkeypatch: pytest.MonkeyPatch) -> None:
    choices, started = iter(["int8", "dtype", "dtype"]), list[ReplicaSettings]()
    machines = SimpleNamespace(
        host="127.0.0.1", start=started.append, kill=None, choose_weights=lambda *_: next(choices)
    )
    front = SimpleNamespace(start=lambda: "tcp://127.0.0.1:1", close=lambda: None, drain=None, failure=None)
    monkeypatch.setattr(launcher, "Cluster", lambda _: nullcontext(machines))
    monkeypatch.setattr(launcher, "FrontProcess", lambda _: front)
    for name in ("_operate", "stop_on_signals"):
        monkeypatch.setattr(launcher, name, lambda *_: None)
    listening = SocketOptions("tcp://127.0.0.1:0", None, False, Limits())
    serve_replicas(target_options("model"), listening, OPERATION, ClusterOptions(3, None, None))
    assert [one.target.weights for one in started] == ["int8"] * 3


def test_ray_runs_the_choice_of_weights_and_tells_why_a_target_cannot_be_served(tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    with Cluster(ClusterOptions(1, None, None)) as machines:
        assert machines.choose_weights(target_options(str(tmp_path)), 1, LogFormat.TEXT) in ("dtype", "int8")
        with pytest.raises(SettingsError, match=r"weights is .int3.; allowed: "):
            machines.choose_weights(replace(target_options(str(tmp_path)), weights="int3"), 1, LogFormat.TEXT)
        with pytest.raises(ModelError, match="it contains no config"):
            machines.choose_weights(target_options(str(tmp_path.parent)), 1, LogFormat.TEXT)
