"""Which replicas are started, drained and killed: scaling, restarts, lost machines, replicas that cannot serve."""

from dataclasses import dataclass, field

import pytest

from basestation.replicas.replica_set import ReplicaSet
from protocol.errors import EdgedraftError, ModelError, SettingsError


@dataclass
class World:
    """Replicas that serve as soon as there is room, and that end once they are drained."""

    room: int = 100
    serving: set[str] = field(default_factory=set)
    waiting: list[str] = field(default_factory=list)
    draining: set[str] = field(default_factory=set)
    killed: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.replicas = ReplicaSet(self.waiting.append, self.draining.add, self.kill)

    def kill(self, name: str) -> None:
        self.waiting.remove(name)
        self.killed.add(name)

    def place(self) -> None:
        """Let those serve that there is room for."""
        while self.waiting and len(self.serving) < self.room:
            self.serving.add(self.waiting.pop(0))

    def finish(self) -> None:
        """Let the drained ones end."""
        for name in self.draining & self.serving:
            self.serving.remove(name)
            self.replicas.remove(name)
        self.draining.clear()

    def step(self) -> None:
        self.replicas.step(self.serving, self.waiting)

    def settle(self) -> None:
        for _ in range(20):
            self.place()
            self.step()
            self.finish()


def world_of(replicas: int, room: int = 100) -> World:
    world = World(room)
    world.replicas.scale(replicas)
    world.place()
    world.step()
    return world


def test_replicas_that_are_missing_are_started() -> None:
    world = world_of(2)
    assert world.serving == {"replica-0", "replica-1"}
    world.replicas.scale(3)
    assert world.waiting == ["replica-2"]


def test_of_too_many_replicas_those_started_last_drain() -> None:
    world = world_of(3)
    world.replicas.scale(1)
    world.step()
    assert world.draining == {"replica-1", "replica-2"}
    world.settle()
    assert world.replicas.running == {"replica-0"}


def test_a_replica_is_told_to_drain_until_it_has_ended() -> None:
    world = world_of(2)
    world.replicas.scale(1)
    for _ in range(3):
        world.draining.clear()  # the front that was told has ended
        world.step()
        assert world.draining == {"replica-1"}


def test_a_replica_that_has_not_served_yet_is_killed() -> None:
    world = world_of(2, room=2)
    world.replicas.scale(3)
    world.step()
    world.replicas.scale(2)
    world.step()
    assert world.killed == {"replica-2"}
    assert world.draining == set()


def test_a_restart_replaces_one_replica_after_another_and_each_drains_once_its_successor_serves() -> None:
    world = world_of(3)
    world.replicas.restart()
    for name, successor in (("replica-0", "replica-3"), ("replica-1", "replica-0"), ("replica-2", "replica-1")):
        world.step()
        assert world.waiting == [successor]
        assert world.draining == set()
        world.place()
        world.step()
        assert world.draining == {name}
        world.step()
        assert world.waiting == []
        world.finish()
    world.settle()
    assert world.serving == world.replicas.running == {"replica-0", "replica-1", "replica-3"}


def test_a_replica_drains_first_where_there_is_no_room_for_its_successor() -> None:
    world = world_of(2, room=2)
    world.replicas.restart()
    world.settle()
    assert world.serving == world.replicas.running == {"replica-0", "replica-2"}


def test_all_replicas_of_a_machine_that_is_about_to_go_are_replaced_at_once() -> None:
    world = world_of(3)
    for _ in range(2):
        world.replicas.replace({"replica-0", "replica-2"})
    assert world.waiting == ["replica-3", "replica-4"]
    world.settle()
    assert world.serving == {"replica-1", "replica-3", "replica-4"}


def test_a_restart_while_replicas_are_added_or_removed_ends_with_the_wanted_number() -> None:
    for wanted in (1, 5):
        world = world_of(3)
        world.replicas.restart()
        world.step()
        world.replicas.scale(wanted)
        world.settle()
        assert len(world.serving) == wanted
        assert world.serving == world.replicas.running


@pytest.mark.parametrize(
    "failure", [ModelError("replica-0: no such folder"), SettingsError("dtype", "float8", "auto")], ids=repr
)
def test_a_target_that_cannot_be_served_ends_a_base_station_that_starts(failure: EdgedraftError) -> None:
    world = World()
    world.replicas.scale(2)
    with pytest.raises(type(failure)) as caught:
        world.replicas.remove("replica-0", failure)
    assert caught.value is failure


def test_a_successor_that_cannot_serve_ends_the_restart_and_the_others_go_on() -> None:
    world = world_of(2)
    world.replicas.restart()
    world.step()
    world.waiting.remove("replica-2")
    world.replicas.remove("replica-2", ModelError("replica-2: no such folder"))
    world.settle()
    assert world.serving == world.replicas.running == {"replica-0", "replica-1"}


def test_a_successor_that_the_front_refuses_is_killed_and_ends_the_restart() -> None:
    world = world_of(2)
    world.replicas.restart()
    world.step()
    world.replicas.refuse("replica-2", "its target is 'b', that of the others 'a'")
    assert world.killed == {"replica-2"}
    world.settle()
    assert world.serving == world.replicas.running == {"replica-0", "replica-1"}


def test_a_refused_replica_that_has_ended_already_is_not_killed_again(caplog: pytest.LogCaptureFixture) -> None:
    world = world_of(2)
    world.replicas.remove("replica-1")
    world.replicas.refuse("replica-1", "its target is 'b', that of the others 'a'")
    assert world.killed == set()
    assert caplog.messages == []


def test_a_replica_that_cannot_serve_is_left_out_while_others_do() -> None:
    world = world_of(2)
    world.replicas.scale(3)
    world.waiting.remove("replica-2")
    world.replicas.remove("replica-2", ModelError("replica-2: no such folder"))
    world.replicas.scale(3)
    assert world.waiting == ["replica-2"]


def test_a_name_that_a_predecessor_had_is_not_used_again_while_it_is_remembered() -> None:
    world = world_of(1, room=1)
    world.replicas.restart()
    world.step()  # replica-1 waits for room, so replica-0 drains
    world.replicas.step(world.serving, world.waiting)
    world.finish()
    world.replicas.scale(2)
    world.room = 2
    world.settle()
    assert world.replicas.running == world.serving
    assert len(world.serving) == 2
