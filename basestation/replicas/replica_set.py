"""Which replicas a base station has and which it should have: it starts, drains and replaces them.

Knows replicas by name. Where one runs, and how it is started, drained and killed, it is told.
"""

import logging
from collections import deque
from collections.abc import Callable, Collection
from itertools import count

from protocol.errors import EdgedraftError, ModelError

logger = logging.getLogger(__name__)


class ReplicaSet:
    """The replicas of a base station.

    A replaced replica serves until its successor does. Only where there is no room for both,
    it drains first.

    Args:
        start: a replica with this name.
        drain: let its sessions finish, after which it ends; called again and again until then.
        kill: end it at once.
    """

    def __init__(self, start: Callable[[str], None], drain: Callable[[str], None], kill: Callable[[str], None]) -> None:
        self._start, self._drain, self._kill = start, drain, kill
        self._wanted: list[str] = []
        self._running: set[str] = set()
        self._served: set[str] = set()
        self._leaving: set[str] = set()
        self._predecessors: dict[str, str] = {}
        self._to_restart: deque[str] = deque()

    @property
    def running(self) -> Collection[str]:
        """The replicas that have been started and have not ended."""
        return self._running

    def scale(self, replicas: int) -> None:
        """Have this many: start those that are missing, or drain those that were started last."""
        while len(self._wanted) < replicas:
            self._wanted.append(self._start_another())
        while len(self._wanted) > replicas:
            name = self._wanted.pop()
            for one in (name, self._predecessors.pop(name, name)):
                self._leave(one, "there are more than are wanted")

    def restart(self) -> None:
        """Replace all, one after another."""
        self._to_restart = deque(self._wanted)

    def replace(self, names: Collection[str]) -> None:
        """Replace these at once."""
        for name in [name for name in self._wanted if name in names]:
            successor = self._start_another()
            logger.info("%s replaces %s", successor, name)
            self._wanted[self._wanted.index(name)] = successor
            self._predecessors[successor] = name

    def step(self, serving: Collection[str], unplaced: Collection[str]) -> None:
        """Do what is due now.

        Args:
            serving: replicas that the front sends sessions to.
            unplaced: replicas that have long waited for a machine with room.
        """
        self._served |= self._running & set(serving)
        for successor, name in list(self._predecessors.items()):
            if name not in self._running and successor in serving:
                del self._predecessors[successor]
            elif successor in serving:
                self._leave(name, f"{successor} serves")
            elif successor in unplaced:
                self._leave(name, f"there is no room for {successor} beside it")
        if self._to_restart and not self._predecessors:
            self.replace([self._to_restart.popleft()])
        for name in self._leaving & self._served:
            self._drain(name)
        for name in self._leaving - self._served:
            self._kill(name)
            self.remove(name)

    def remove(self, name: str, failure: EdgedraftError | None = None) -> None:
        """Forget a replica that has ended.

        Args:
            name: of the replica.
            failure: why it cannot serve; None where it drained.

        Raises:
            EdgedraftError: ``failure``, if no other one serves.
        """
        for names in (self._running, self._served, self._leaving):
            names.discard(name)
        if failure is None:
            return
        if not self._served:
            raise failure
        logger.error("%s; the other replicas go on", failure)
        self._to_restart.clear()
        predecessor = self._predecessors.pop(name, "")
        if name in self._wanted:
            stays = [predecessor] if predecessor in self._running - self._leaving else []
            place = self._wanted.index(name)
            self._wanted[place : place + 1] = stays

    def refuse(self, name: str, reason: str) -> None:
        """End a replica that the front sends no sessions to.

        Raises:
            ModelError: no other one serves.
        """
        if name in self._running:
            self._kill(name)
            self.remove(name, ModelError(f"{name}: {reason}"))

    def _start_another(self) -> str:
        taken = {*self._running, *self._wanted, *self._predecessors.values()}
        name = next(name for number in count() if (name := f"replica-{number}") not in taken)
        self._running.add(name)
        self._start(name)
        return name

    def _leave(self, name: str, reason: str) -> None:
        if name in self._running - self._leaving:
            logger.info("%s drains: %s", name, reason)
            self._leaving.add(name)
