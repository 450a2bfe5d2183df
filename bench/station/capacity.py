"""How many devices one base station serves: replayed devices, the target alone, and a pass against its ceiling.

All cases of a run take turns on one base station, so that their ratios mean
something on a machine that is shared.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from basestation.target_model import TargetModel
from basestation.top import Snapshot, read_snapshot
from bench.setup.prompts import OWN_PROMPTS
from bench.setup.results import Value
from bench.setup.station_process import StationProcess
from bench.station.passes import PassTimes, measure_passes
from bench.station.replay import Pace, Player, Recording, Score, Stage, read_recordings, record, write_recordings
from device.draft_model import DraftModel
from device.tokenizer import Tokenizer
from protocol.bundle import Manifest
from protocol.messages import Mode

_NEWCOMER_LEN = 2000
_RUNNERS = 8
_PASS_LEN = 5
"""New tokens of each session where passes are compared: a round of four drafted tokens."""
_CLOSING_LEN = 5  # of the chat template, behind the user's words


@dataclass(frozen=True)
class CapacitySettings:
    """How much is measured.

    Attributes:
        sessions: at once, in the cases with many.
        contexts: tokens of the shortest and of the longest prompt.
        draft_len: tokens drafted in a round.
        answer_len: tokens of an answer.
        seconds: of each turn, warm-up aside.
        turns: of each case.
        pace: of the replayed devices.
    """

    sessions: int = 16
    contexts: tuple[int, int] = (100, 600)
    draft_len: int = 8
    answer_len: int = 48
    seconds: float = 5.0
    warm_up_seconds: float = 1.0
    turns: int = 3
    pace: Pace = field(default_factory=Pace)


@dataclass(frozen=True)
class Turn:
    """What one turn of a case gave; ``outside`` is the part of the engine's time that is not the forward pass."""

    score: Score
    seconds: float
    outside: float

    @property
    def tokens_per_second(self) -> float:
        """Committed, of all sessions."""
        return self.score.tokens / self.seconds


def context_prompts(tokenizer: Tokenizer, settings: CapacitySettings) -> list[list[int]]:
    """A prompt for each session, of lengths from the shortest to the longest context: the project's own in a row."""
    prompts = []
    for index, length in enumerate(_spread(*settings.contexts, settings.sessions)):
        words = " ".join(OWN_PROMPTS[(index + offset) % len(OWN_PROMPTS)] for offset in range(length // 8 + 1))
        ids = tokenizer.encode_chat([{"role": "user", "content": words}])
        end = tokenizer.encode_chat([{"role": "user", "content": ""}])[-_CLOSING_LEN:]
        prompts.append([*ids[: length - len(end)], *end])
    return prompts


def measure_replay(
    station: StationProcess,
    recordings: Sequence[Recording],
    manifest: Manifest,
    settings: CapacitySettings,
    advance: Callable[[], object],
) -> list[dict[str, Value]]:
    """Rows of the cases ``replay`` and ``target``, and of rounds beside prompts."""
    many, few = settings.sessions, _RUNNERS

    def player(index: int, mode: Mode) -> Player:
        return Player(recordings[index % len(recordings)], mode, settings.pace, manifest)

    newcomer = Recording(tuple(_random_prompt(manifest.vocab_size)), (0,), ((),), 0.0)
    casts: dict[tuple[str, int], list[Player]] = {
        ("replay", 1): [player(len(recordings) // 2, Mode.IDS)],
        ("replay", many): [player(index, Mode.IDS) for index in range(many)],
        ("target", 1): [player(len(recordings) // 2, Mode.TARGET)],
        ("target", many): [player(index, Mode.TARGET) for index in range(many)],
        ("rounds", few): [player(2 * index, Mode.IDS) for index in range(few)],
        (f"rounds beside prompts of {_NEWCOMER_LEN}", few): [
            *(player(2 * index, Mode.IDS) for index in range(few)),
            Player(newcomer, Mode.IDS, settings.pace, manifest, afresh=True),
        ],
    }
    turns: dict[tuple[str, int], list[Turn]] = defaultdict(list)
    with ExitStack() as stack:
        stages = {}
        for case, players in casts.items():
            stage = stack.enter_context(closing(Stage(station.address, manifest.vocab_size, players)))
            stage.settle(players[: case[1]])
            stage.pause()
            stages[case] = stage
            advance()
        for _ in range(settings.turns):
            for case, stage in stages.items():
                turns[case].append(_take_turn(station, stage, casts[case][: case[1]], settings))
                advance()
    return [_row(name, sessions, taken) for (name, sessions), taken in turns.items()]


def measure_pass_rows(
    target: TargetModel, dense: Any, settings: CapacitySettings, advance: Callable[[], object]
) -> list[dict[str, Value]]:
    """Rows of the cases ``packed_pass`` and ``dense_pass``: contexts of one length, and of lengths that differ by 4."""
    count, (shortest, longest) = settings.sessions, settings.contexts
    rows = []
    for lengths in ([(shortest + longest) // 2] * count, _spread(longest // 4, longest, count)):
        rows += _pass_rows(measure_passes(target, dense, lengths, _PASS_LEN), lengths)
        advance()
    return rows


def recorded(
    path: Path | None,
    model: DraftModel,
    target: TargetModel,
    tokenizer: Tokenizer,
    settings: CapacitySettings,
    advance: Callable[[], object],
) -> list[Recording]:
    """The recordings of the file, or where there is none new ones, which then go there."""
    if path is not None and path.exists():
        return read_recordings(path)
    prompts = context_prompts(tokenizer, settings)
    recordings = record(model, target, prompts, settings.answer_len, settings.draft_len, advance)
    if path is not None:
        write_recordings(path, recordings)
    return recordings


def _pass_rows(times: PassTimes, lengths: Sequence[int]) -> list[dict[str, Value]]:
    name = f"{min(lengths)}" if len(set(lengths)) == 1 else f"{min(lengths)} to {max(lengths)}"
    tokens = len(lengths) * _PASS_LEN
    return [
        {
            "case": case,
            "sessions": len(lengths),
            "tokens_per_second": tokens / seconds,
            "milliseconds": 1e3 * seconds,
            "p99_milliseconds": None,
            "acceptance_rate": None,
            "outside_forward": None,
            "contexts": name,
        }
        for case, seconds in (("packed_pass", times.packed), ("dense_pass", times.dense))
    ]


def ratios(rows: Sequence[dict[str, Value]], sessions: int) -> list[dict[str, Value]]:
    """What a run shows about serving many, each with what is asked of it."""
    found = {(row["case"], row["sessions"], row.get("contexts")): row for row in rows}

    def speed(case: str, count: int) -> float:
        return _number(found[case, count, None]["tokens_per_second"])

    def p99(case: str) -> float:
        return _number(found[case, _RUNNERS, None]["p99_milliseconds"])

    many, one, alone = speed("replay", sessions), speed("replay", 1), speed("target", sessions)
    stalled = p99(f"rounds beside prompts of {_NEWCOMER_LEN}") / p99("rounds")
    compared: list[dict[str, Value]] = [
        {"case": f"replay: {sessions} sessions over 1", "ratio": many / one, "asked": "at least 5"},
        {"case": f"{sessions} sessions: replay over target", "ratio": many / alone, "asked": "at least 2.3"},
        {"case": "p99 of rounds, with prompts over without", "ratio": stalled, "asked": "at most 2"},
        {
            "case": f"outside the forward pass, replay of {sessions}",
            "ratio": found["replay", sessions, None]["outside_forward"],
            "asked": "below 0.08",
        },
    ]
    for (case, count, contexts), row in found.items():
        if case == "packed_pass":
            dense = _number(found["dense_pass", count, contexts]["milliseconds"])
            asked = "at least 1" if "to" in str(contexts) else "at least 0.85"
            name = f"packed over dense pass, contexts {contexts}"
            compared.append({"case": name, "ratio": dense / _number(row["milliseconds"]), "asked": asked})
    return compared


def _take_turn(station: StationProcess, stage: Stage, counted: Sequence[Player], settings: CapacitySettings) -> Turn:
    """Play for a while, the base station being asked before and after."""
    stage.play(settings.warm_up_seconds)
    before = read_snapshot(station.metrics_url)
    stage.play(settings.seconds)
    now = read_snapshot(station.metrics_url)
    score = Score.sum(player.score for player in counted)
    stage.pause()
    return Turn(score, now.time - before.time, _outside(before, now))


def _outside(before: Snapshot, now: Snapshot) -> float:
    forward, idle = (now.total(name) - before.total(name) for name in ("forward_seconds_sum", "idle_seconds_total"))
    return 1 - forward / (now.time - before.time - idle)


def _row(name: str, sessions: int, turns: Sequence[Turn]) -> dict[str, Value]:
    rounds = [seconds for turn in turns for seconds in turn.score.rounds]
    drafted = sum(turn.score.drafted for turn in turns)
    return {
        "case": name,
        "sessions": sessions,
        "tokens_per_second": median(turn.tokens_per_second for turn in turns),
        "milliseconds": 1e3 * median(rounds),
        "p99_milliseconds": 1e3 * quantiles(rounds, n=100)[98],
        "acceptance_rate": sum(turn.score.accepted for turn in turns) / drafted if drafted else None,
        "outside_forward": median(turn.outside for turn in turns),
        "contexts": None,
    }


def _number(value: Value) -> float:
    assert isinstance(value, float)
    return value


def _random_prompt(vocab_size: int) -> list[int]:
    chance = random.Random(0)  # noqa: S311 - any tokens will do
    return [chance.randrange(vocab_size) for _ in range(_NEWCOMER_LEN)]


def _spread(first: int, last: int, count: int) -> list[int]:
    return [first + (last - first) * index // max(1, count - 1) for index in range(count)]
