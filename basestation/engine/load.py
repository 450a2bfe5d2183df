"""What runs at an engine now: a replica reports it to the front, which routes by it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from basestation.engine.pace import Pace

SessionKey: TypeAlias = tuple[str, int]
"""Owner and session id."""


@dataclass(frozen=True, slots=True)
class Load:
    """The load of an engine.

    Attributes:
        sessions: that are open.
        kv_share: of the KV pool that busy sessions require, as admission counts them; above 1 where some must wait.
        pace: for one more session beside those that are active.
    """

    sessions: Sequence[SessionKey] = ()
    kv_share: float = 0.0
    pace: Pace = Pace()  # noqa: RUF009 - frozen
