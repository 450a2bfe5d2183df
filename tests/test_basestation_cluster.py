"""What is wrong with the options of replicas is one line, before anything starts."""

import socket

import pytest

from basestation.launch_options import ClusterOptions
from basestation.replicas.cluster import Cluster
from protocol.errors import LinkError, SettingsError


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
