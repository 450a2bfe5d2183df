"""The grid of links and temperatures, and what is measured in each cell.

A *cell* is a temperature and a link; its *cases* are ways to generate the same
answers, the target alone first. The first cell of each temperature is loopback:
all predictions are made from its rounds, and the draft model also runs on the
base station's core there, which needs no link.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

from bench.link.relay import LinkDirection
from bench.setup.results import Row, Value
from device.settings import DEFAULT_UPLINK_K
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
        _ = Sampling(self.temperature)  # raises if it is not allowed
        if self.round_trip_ms is not None and not 0 <= self.round_trip_ms < inf:
            raise SettingsError("round_trip_ms", self.round_trip_ms, "0 or more")
        if self.uplink_mbit is not None and not self.uplink_mbit > 0:
            raise SettingsError("uplink_mbit", self.uplink_mbit, "above 0")

    def columns(self) -> Row:
        """The columns that identify the cell in each of its rows."""
        return {
            "temperature": self.temperature,
            "round_trip_ms": self.round_trip_ms,
            "uplink_mbit": self.uplink_mbit,
        }

    def has(self, row: Mapping[str, Value]) -> bool:
        """Whether ``row`` belongs to this cell."""
        columns = self.columns()
        return {name: row[name] for name in columns} == columns

    @property
    def round_trip_seconds(self) -> float:
        """The round-trip time, without airtime."""
        return (self.round_trip_ms or 0.0) / 1e3

    @property
    def up(self) -> LinkDirection:
        """From the device to the base station."""
        rate = inf if self.uplink_mbit is None else 1e6 * self.uplink_mbit
        return LinkDirection(rate, self.round_trip_seconds / 2)

    @property
    def down(self) -> LinkDirection:
        """From the base station to the device."""
        return LinkDirection(1e6 * DOWNLINK_MBIT, self.round_trip_seconds / 2)


@dataclass(frozen=True)
class AnswerLimits:
    """An answer is measured for this many tokens or seconds, whichever ends first, and for two rounds at least."""

    tokens: int
    seconds: float


@dataclass(frozen=True)
class Workload:
    """What each case of a cell generates: an answer to each of the ``prompts``, up to the ``limits``."""

    prompts: Sequence[str]
    limits: AnswerLimits
    seed: int = 1


@dataclass(frozen=True)
class Case:
    """A way to generate an answer; without a draft length, the planner chooses it.

    Where ``colocated``, the draft model runs on the base station's core. ``drafts_ahead`` and ``lookup`` are as in
    ``DraftSettings``; without a draft model, lookup drafts alone. ``block_verification`` asks for block verification.
    """

    name: str
    mode: Mode
    draft_len: int | None = None
    colocated: bool = False
    drafts_ahead: int | None = 0
    lookup: bool = False
    has_draft_model: bool = True
    block_verification: bool = False


TARGET = Case("target alone", Mode.TARGET)
FULL = Case("full vocabulary", Mode.FULL, FULL_DRAFT_LENS[0])
COLOCATED = "colocated, auto"


def cells(temperatures: Sequence[float], round_trips: Sequence[float], uplinks: Sequence[float]) -> list[Cell]:
    """For each temperature the loopback cell, then a cell per link."""
    return [
        cell
        for temperature in temperatures
        for cell in (
            Cell(temperature),
            *(Cell(temperature, round_trip, uplink) for round_trip in round_trips for uplink in uplinks),
        )
    ]


def cases(cell: Cell) -> list[Case]:
    """The cases of a cell; the draft length of ``FULL`` is chosen later, by prediction."""
    mode = Mode.COUPLED if cell.temperature else Mode.IDS
    fixed = [_fixed(str(mode), mode, draft_len) for draft_len in DRAFT_LENS]
    others = [(Mode.TOPK, f"topk {DEFAULT_UPLINK_K[Mode.TOPK]}"), (Mode.TOPP, "topp 0.95")]
    others = others if cell.temperature else others[:1]
    auto = [Case(f"{mode}, auto", mode), *(Case(f"{name}, auto", other) for other, name in others)]
    if cell.round_trip_ms is not None:
        return [TARGET, *auto, *fixed, FULL]
    full = [_fixed(FULL.name, Mode.FULL, draft_len) for draft_len in FULL_DRAFT_LENS]
    sparse = [_fixed(name, other, draft_len) for other, name in others for draft_len in (4, 8, 16)]
    return [TARGET, *auto, *fixed, *sparse, *full, Case(COLOCATED, mode, colocated=True)]


def _fixed(name: str, mode: Mode, draft_len: int) -> Case:
    return Case(f"{name}, draft length {draft_len}", mode, draft_len)
