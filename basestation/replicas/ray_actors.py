"""The processes that Ray runs: a replica, another rank of one, and the choice of its weights."""

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from basestation.launch_options import TargetOptions
from basestation.logs import LogFormat, start_logging
from basestation.replicas.replica_settings import ReplicaSettings
from common.error_text import first_line
from protocol.errors import EdgedraftError, ModelError, SettingsError

if TYPE_CHECKING:
    from basestation.target.ranks import FirstRank, RankAddress  # imports PyTorch

logger = logging.getLogger(__name__)


class ReplicaActor:
    """What Ray runs in the process of a replica, or of its rank 0."""

    def serve(self, settings: ReplicaSettings) -> None:
        """Serve until drained. Ray calls it again in the process that replaces a lost one.

        Raises:
            ModelError: the target cannot be served; another process could not either.
        """
        from basestation.launcher import run_replica

        with _ending(settings.replica.name):
            run_replica(settings, _first_rank(settings) if settings.ranks > 1 else None)


class FollowerActor:
    """What Ray runs in the process of another rank of a replica."""

    def follow(self, settings: ReplicaSettings, rank: int, address: "RankAddress") -> None:
        """Follow rank 0 until it stops.

        Raises:
            ModelError: the share cannot be loaded; another process could not either.
        """
        from basestation.launcher import run_follower

        with _ending(f"rank {rank} of {settings.replica.name}"):
            run_follower(settings, rank, address)


def choose_weights(target: TargetOptions, ranks: int, log_format: LogFormat) -> str:
    """What Ray runs in a process like that of a replica: decide what ``--weights auto`` is."""
    from basestation import launcher

    start_logging(log_format)
    return launcher.choose_weights(target, ranks)


class Followers:
    """The other ranks of a replica, as its rank 0 starts and watches them.

    Where one is lost, the process of rank 0 ends, and Ray starts that again. Where rank 0 is lost, Ray ends its
    followers: an actor ends with the process that started it.

    Args:
        settings: of the replica, whose ranks have a placement group.
        address: of rank 0.
    """

    def __init__(self, settings: ReplicaSettings, address: "RankAddress") -> None:
        self._name = settings.replica.name
        self._failure: EdgedraftError | None = None
        group = get_current_placement_group()
        self._actors = [_follower(group, rank) for rank in range(1, settings.ranks)]  # Ray ends forgotten actors
        running = [actor.follow.remote(settings, rank, address) for rank, actor in enumerate(self._actors, 1)]
        threading.Thread(target=self._watch, args=(running,), name="followers", daemon=True).start()

    def check(self) -> None:
        """Raise what keeps a follower from loading its share."""
        if self._failure is not None:
            raise self._failure

    def _watch(self, running: list[Any]) -> None:
        while running:
            (ended, *_), running = ray.wait(running)
            try:
                ray.get(ended)
            except RayTaskError as error:
                self._failure = failure_of(error)
            except RayError as error:
                reason = first_line(error)
                logger.critical("%s ends, for another process to replace it: %s", self._name, reason)
                os._exit(1)


@contextmanager
def _ending(name: str) -> Iterator[None]:
    """End the process if the code in this context fails.

    Raises:
        SettingsError: an option has a wrong value.
        ModelError: it fails in another way that another process would too.
    """
    try:
        yield
    except SettingsError:
        raise
    except EdgedraftError as error:
        raise ModelError(f"{name}: {error}") from None
    except Exception:
        logger.exception("%s ends, for another process to replace it", name)
        os._exit(1)


def failure_of(error: RayError) -> EdgedraftError:
    """Why an actor or a task of Ray cannot go on."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, EdgedraftError) else ModelError(str(cause or error))


def _first_rank(settings: ReplicaSettings) -> "FirstRank":
    """Rank 0 of a replica, whose followers start now."""
    from basestation.target.ranks import FirstRank, address_towards

    first = FirstRank(settings.ranks, address_towards(settings.replica.front), settings.replica.inner_key)
    first.check = Followers(settings, first.address).check
    return first


def _follower(group: Any, rank: int) -> Any:
    """The actor of a follower, with the resources that the placement group has for it."""
    resources = group.bundle_specs[rank]
    options = {"num_cpus": resources.get("CPU", 0), "num_gpus": resources.get("GPU", 0)}
    return ray.remote(FollowerActor).options(scheduling_strategy=place_of(group, rank), **options).remote()


def place_of(group: Any, rank: int) -> PlacementGroupSchedulingStrategy:
    """The bundle of a rank in the placement group of its replica."""
    return PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
