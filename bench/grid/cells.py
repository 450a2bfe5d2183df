"""Speedups over a grid of links and temperatures: this system against its alternatives, and what the model predicts.

A *cell* is a temperature and a link; its *cases* are ways to get the same
answers, the target alone first. The first cell of each temperature is loopback:
its rounds are what the predictions for all others are made from, and there too
runs the draft model on the base station's own core, which needs no link.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from bench.grid.throughput import Length
from bench.link.relay import Way
from bench.setup.results import Row
from device.sampling import ENTRIES
from protocol.errors import SettingsError
from protocol.messages import Mode, Sampling

ROUND_TRIPS_MS = (0.0, 10.0, 20.0, 50.0, 100.0)
UPLINKS_MBIT = (1.0, 5.0, 50.0)
TEMPERATURES = (0.0, 1.0)
DOWNLINK_MBIT = 50.0
DRAFT_LENS = (2, 4, 8, 16)
FULL_DRAFT_LENS = (1, 2, 4)


@dataclass(frozen=True)
class Cell:
    """A temperature and a link; without a round trip, loopback.

    Raises:
        SettingsError: a value is not allowed.
    """

    temperature: float
    round_trip_ms: float | None = None
    uplink_mbit: float | None = None

    def __post_init__(self) -> None:
        _ = Sampling(self.temperature)  # raises what is wrong with it
        if self.round_trip_ms is not None and not 0 <= self.round_trip_ms < inf:
            raise SettingsError("round_trip_ms", self.round_trip_ms, "0 and more")
        if self.uplink_mbit is not None and not self.uplink_mbit > 0:
            raise SettingsError("uplink_mbit", self.uplink_mbit, "above 0")

    def columns(self) -> Row:
        """The cell as every one of its rows says it."""
        return {
            "temperature": self.temperature,
            "round_trip_ms": self.round_trip_ms,
            "uplink_mbit": self.uplink_mbit,
        }

    @property
    def round_trip_seconds(self) -> float:
        """Without airtime."""
        return (self.round_trip_ms or 0.0) / 1e3

    @property
    def up(self) -> Way:
        """From the device."""
        return Way(inf if self.uplink_mbit is None else 1e6 * self.uplink_mbit, self.round_trip_seconds / 2)

    @property
    def down(self) -> Way:
        """To the device."""
        return Way(1e6 * DOWNLINK_MBIT, self.round_trip_seconds / 2)


@dataclass(frozen=True)
class Answers:
    """What is measured of each case in a cell: an answer of a ``length`` to each of the ``prompts``."""

    prompts: Sequence[str]
    length: Length


@dataclass(frozen=True)
class Case:
    """A way to an answer; without a draft length the device plans it, ``colocated`` runs it at the base station."""

    name: str
    mode: Mode
    draft_len: int | None = None
    colocated: bool = False


TARGET = Case("target alone", Mode.TARGET)
FULL = Case("full vocabulary", Mode.FULL, FULL_DRAFT_LENS[0])
COLOCATED = "colocated, auto"


def cells(temperatures: Sequence[float], round_trips: Sequence[float], uplinks: Sequence[float]) -> list[Cell]:
    """For each temperature loopback, then every link."""
    return [
        cell
        for temperature in temperatures
        for cell in (
            Cell(temperature),
            *(Cell(temperature, round_trip, uplink) for round_trip in round_trips for uplink in uplinks),
        )
    ]


def cases(cell: Cell) -> list[Case]:
    """What is measured in a cell; how many tokens ``FULL`` drafts in a round is left to what is predicted there."""
    mode = _own_mode(cell.temperature)
    lockstep = [Case(f"{mode}, {draft_len} a round", mode, draft_len) for draft_len in DRAFT_LENS]
    others = [(Mode.TOPK, f"topk {ENTRIES[Mode.TOPK]}"), (Mode.TOPP, "topp .95")][: 2 if cell.temperature else 1]
    auto = [Case(f"{mode}, auto", mode), *(Case(f"{name}, auto", other) for other, name in others)]
    if cell.round_trip_ms is not None:
        return [TARGET, *auto, *lockstep, FULL]
    full = [Case(f"{FULL.name}, {draft_len} a round", Mode.FULL, draft_len) for draft_len in FULL_DRAFT_LENS]
    sparse = [
        Case(f"{name}, {draft_len} a round", other, draft_len) for other, name in others for draft_len in (4, 8, 16)
    ]
    return [TARGET, *auto, *lockstep, *sparse, *full, Case(COLOCATED, mode, colocated=True)]


def _own_mode(temperature: float) -> Mode:
    return Mode.COUPLED if temperature else Mode.IDS
