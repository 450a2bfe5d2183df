"""Drafts from devices against the draft model beside the target on the same cores, for growing numbers of sessions."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from statistics import median

from basestation.target.target_model import TargetModel
from bench.setup.results import Row, number
from bench.setup.station_process import StationProcess
from bench.station.colocated_sessions import ColocatedScore, ColocatedSessions
from bench.station.load_generator import LoadGenerator
from bench.station.recording import Recording
from bench.station.replay import CapacitySettings, Turn, replay_row, take_turn
from bench.station.replay_client import ReplayClient
from protocol.bundle import Manifest
from protocol.messages import Mode

FROM_DEVICES = "drafts from devices"
COLOCATED = "colocated draft model"


def session_counts(most: int) -> list[int]:
    """1, 2, 4, … up to and with ``most``."""
    return [count for exponent in range(most.bit_length()) if (count := 2**exponent) < most] + [most]


def measure_colocation(
    station: StationProcess,
    draft: TargetModel,
    target: TargetModel,
    recordings: Sequence[Recording],
    manifest: Manifest,
    settings: CapacitySettings,
    advance: Callable[[], object],
) -> list[Row]:
    """Rows of both ways to draft, which take turns, then a row with their ratio for each number of sessions.

    Args:
        station: serves the replayed devices.
        draft: the draft model, in this process.
        target: the target, likewise.
        recordings: of the devices.
        manifest: of the devices' draft model.
        settings: the largest number of sessions, and how long each turn takes.
        advance: called after each turn.
    """
    rows: list[Row] = []
    gains: list[Row] = []
    for count in session_counts(settings.sessions):
        of_count = [recordings[index % len(recordings)] for index in range(count)]
        clients = [ReplayClient(one, Mode.IDS, settings.timing, manifest) for one in of_count]
        colocated = ColocatedSessions(draft, target, of_count, settings.draft_len)
        turns: dict[str, list[Turn]] = {FROM_DEVICES: [], COLOCATED: []}
        with ExitStack() as stack:
            stack.callback(colocated.release)
            load = stack.enter_context(closing(LoadGenerator(station.address, manifest.vocab_size, clients)))
            load.warm_up(clients)
            load.drain()
            for _ in range(settings.turns):
                turns[FROM_DEVICES].append(take_turn(station, load, clients, settings))
                turns[COLOCATED].append(_colocated_turn(colocated, settings))
                advance()
        measured = [replay_row(name, count, of_case) for name, of_case in turns.items()]
        rows += measured
        gains.append(_gain_row(measured, colocated.score, settings.draft_len))
    return [*rows, *gains]


def predicted_gain(score: ColocatedScore, draft_len: int) -> float:
    """1 + γ·t_draft / t_verify: how many times the sessions, where devices draft (arXiv:2606.25091)."""
    return 1 + draft_len * median(score.draft_seconds) / median(score.verify_seconds)


def _colocated_turn(colocated: ColocatedSessions, settings: CapacitySettings) -> Turn:
    colocated.run(settings.warm_up_seconds)
    began = time.monotonic()
    score = colocated.run(settings.seconds)
    return Turn(score, time.monotonic() - began, None)


def _gain_row(measured: Sequence[Row], score: ColocatedScore, draft_len: int) -> Row:
    devices, colocated = (number(row, "tokens_per_second") for row in measured)
    return {
        "case": "gain of drafting on devices",
        "sessions": measured[0]["sessions"],
        "gain": devices / colocated,
        "predicted_gain": predicted_gain(score, draft_len),
        "draft_milliseconds": 1e3 * median(score.draft_seconds),
        "verify_milliseconds": 1e3 * median(score.verify_seconds),
    }
