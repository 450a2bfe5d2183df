"""Replayed devices on one base station: each case has its clients, and the cases take turns."""

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import TypeAlias

from basestation.monitoring.snapshot import Snapshot
from basestation.monitoring.top import read_snapshot
from bench.setup.results import Row
from bench.setup.station_process import StationProcess
from bench.station.load_generator import LoadGenerator
from bench.station.recording import Recording
from bench.station.replay_client import ReplayClient, ReplayTiming, Score
from protocol.bundle import Manifest
from protocol.errors import SettingsError
from protocol.messages import Mode

RUNNING_SESSIONS = 8
_PREFILL_LEN = 2000
PREFILL_CASE = f"rounds during prefills of {_PREFILL_LEN} tokens"

Case: TypeAlias = tuple[str, int]
"""The name of a case and its number of sessions."""


@dataclass(frozen=True)
class CapacitySettings:
    """How much is measured.

    Attributes:
        sessions: concurrent sessions, in the cases with many.
        contexts: tokens of the shortest and of the longest prompt.
        draft_len: tokens drafted per round.
        answer_len: tokens per answer.
        seconds: duration of each turn, after the warm-up.
        turns: of each case.
        timing: of the replayed devices.
    """

    sessions: int = 16
    contexts: tuple[int, int] = (100, 600)
    draft_len: int = 8
    answer_len: int = 48
    seconds: float = 5.0
    warm_up_seconds: float = 1.0
    turns: int = 3
    timing: ReplayTiming = field(default_factory=ReplayTiming)


@dataclass(frozen=True)
class Turn:
    """One turn of a case.

    ``share_outside_forward`` is the share of the engine's busy time outside forward passes; None where no engine ran.
    """

    score: Score
    seconds: float
    share_outside_forward: float | None

    @property
    def tokens_per_second(self) -> float:
        """Committed tokens of all sessions."""
        return self.score.tokens / self.seconds


def measure_replay(
    station: StationProcess,
    recordings: Sequence[Recording],
    manifest: Manifest,
    settings: CapacitySettings,
    advance: Callable[[], object],
) -> list[Row]:
    """Rows of the cases ``replay`` and ``target``, and of rounds during prefills.

    Raises:
        SettingsError: the turns are too short for two rounds of a case.
    """
    clients = _clients_by_case(recordings, manifest, settings)
    turns: dict[Case, list[Turn]] = defaultdict(list)
    with ExitStack() as stack:
        generators = {}
        for case, of_case in clients.items():
            load = stack.enter_context(closing(LoadGenerator(station.address, manifest.vocab_size, of_case)))
            load.warm_up(of_case[: case[1]])
            load.drain()
            generators[case] = load
            advance()
        for _ in range(settings.turns):
            for case, load in generators.items():
                turns[case].append(take_turn(station, load, clients[case][: case[1]], settings))
                advance()
    return [replay_row(name, sessions, of_case) for (name, sessions), of_case in turns.items()]


def _clients_by_case(
    recordings: Sequence[Recording], manifest: Manifest, settings: CapacitySettings
) -> dict[Case, list[ReplayClient]]:
    """The clients of each case; those beyond its number of sessions only add load."""
    many, few, timing = settings.sessions, RUNNING_SESSIONS, settings.timing

    def client(index: int, mode: Mode) -> ReplayClient:
        return ReplayClient(recordings[index % len(recordings)], mode, timing, manifest)

    prefilling = Recording(tuple(_random_prompt(manifest.vocab_size)), (0,), ((),), 0.0)
    return {
        ("replay", 1): [client(len(recordings) // 2, Mode.IDS)],
        ("replay", many): [client(index, Mode.IDS) for index in range(many)],
        ("target", 1): [client(len(recordings) // 2, Mode.TARGET)],
        ("target", many): [client(index, Mode.TARGET) for index in range(many)],
        ("rounds", few): [client(2 * index, Mode.IDS) for index in range(few)],
        (PREFILL_CASE, few): [
            *(client(2 * index, Mode.IDS) for index in range(few)),
            ReplayClient(prefilling, Mode.IDS, timing, manifest, recompute_prompt=True),
        ],
    }


def take_turn(
    station: StationProcess, load: LoadGenerator, counted: Sequence[ReplayClient], settings: CapacitySettings
) -> Turn:
    """Run for a while, with the base station's metrics from before and after."""
    load.run(settings.warm_up_seconds)
    before = read_snapshot(station.metrics_url)
    load.run(settings.seconds)
    now = read_snapshot(station.metrics_url)
    score = Score.sum(client.score for client in counted)
    load.drain()
    return Turn(score, now.time - before.time, _share_outside_forward(before, now))


def _share_outside_forward(before: Snapshot, now: Snapshot) -> float:
    forward, idle = (now.total(name) - before.total(name) for name in ("forward_seconds_sum", "idle_seconds_total"))
    return 1 - forward / (now.time - before.time - idle)


def replay_row(name: str, sessions: int, turns: Sequence[Turn]) -> Row:
    """The row of a case, from all its turns.

    Raises:
        SettingsError: the turns are too short for two rounds.
    """
    rounds = [seconds for turn in turns for seconds in turn.score.rounds]
    if len(rounds) < 2:
        raise SettingsError("seconds", round(turns[0].seconds, 1), f"more: {name!r} completed fewer than two rounds")
    drafted = sum(turn.score.drafted for turn in turns)
    outside = [turn.share_outside_forward for turn in turns if turn.share_outside_forward is not None]
    return {
        "case": name,
        "sessions": sessions,
        "tokens_per_second": median(turn.tokens_per_second for turn in turns),
        "milliseconds": 1e3 * median(rounds),
        "p99_milliseconds": 1e3 * quantiles(rounds, n=100)[98],
        "acceptance_rate": sum(turn.score.accepted for turn in turns) / drafted if drafted else None,
        "share_outside_forward": median(outside) if outside else None,
        "contexts": None,
    }


def _random_prompt(vocab_size: int) -> list[int]:
    rng = random.Random(0)  # noqa: S311 - any tokens will do
    return [rng.randrange(vocab_size) for _ in range(_PREFILL_LEN)]
