"""The memory that a container's limit leaves, from files like those of Linux."""

from pathlib import Path

import pytest
import torch

from basestation.kv_cache.memory import free_memory, kv_budget
from common import container_memory
from common.container_memory import within_limits

MIB = 2**20
MACHINE = 64 * 2**30
UNLIMITED_VERSION_1 = 9_223_372_036_854_771_712


class ControlGroups:
    """A tree of control groups, and the one that this process is in."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._root = root
        self._membership = root / "membership"
        monkeypatch.setattr(container_memory, "_ROOT", root)
        monkeypatch.setattr(container_memory, "_MEMBERSHIP", self._membership)

    def enter(self, *lines: str) -> None:
        self._membership.write_text("".join(f"{line}\n" for line in lines))

    def version_1(self, path: str, limit: int, used: int, inactive: int) -> None:
        folder = self._root / "memory" / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
        (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"cache 5\ninactive_file 0\ntotal_inactive_file {inactive}\n")

    def version_2(self, path: str, limit: int | str, used: int, inactive: int) -> None:
        folder = self._root / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\n")


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ControlGroups:
    return ControlGroups(tmp_path, monkeypatch)


def test_a_container_of_version_2_leaves_its_limit_less_what_it_uses(groups: ControlGroups) -> None:
    groups.enter("0::/")
    groups.version_2("", 900 * MIB, used=500 * MIB, inactive=100 * MIB)
    assert within_limits(MACHINE) == 500 * MIB
    assert within_limits(300 * MIB) == 300 * MIB


def test_a_container_of_version_1_sees_its_group_as_the_root(groups: ControlGroups) -> None:
    groups.enter("5:cpu,cpuacct:/docker/abc", "4:memory:/docker/abc", "0::/")
    groups.version_1("", 900 * MIB, used=500 * MIB, inactive=100 * MIB)
    assert within_limits(MACHINE) == 500 * MIB


def test_the_limit_of_a_group_above_counts(groups: ControlGroups) -> None:
    groups.enter("0::/system.slice/edgedraft.service")
    groups.version_2("system.slice/edgedraft.service", "max", used=200 * MIB, inactive=0)
    groups.version_2("system.slice", 700 * MIB, used=300 * MIB, inactive=0)
    assert within_limits(MACHINE) == 400 * MIB


def test_without_a_limit_all_of_the_machine_is_left(groups: ControlGroups) -> None:
    assert within_limits(MACHINE) == MACHINE  # no control groups
    groups.enter("4:memory:/", "0::/")
    groups.version_1("", UNLIMITED_VERSION_1, used=500 * MIB, inactive=0)
    groups.version_2("", "max", used=500 * MIB, inactive=0)
    assert within_limits(MACHINE) == MACHINE


def test_more_in_use_than_the_limit_leaves_nothing(groups: ControlGroups) -> None:
    groups.enter("0::/")
    groups.version_2("", 100 * MIB, used=101 * MIB, inactive=0)
    assert within_limits(MACHINE) == 0


def test_the_kv_pool_takes_its_share_of_what_the_container_has_left(groups: ControlGroups) -> None:
    groups.enter("0::/")
    groups.version_2("", 3 * MIB, used=MIB, inactive=0)
    assert free_memory(torch.device("cpu")) == 2 * MIB
    assert kv_budget("auto", torch.device("cpu")) == MIB
