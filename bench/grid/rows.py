"""The row of a case in a cell: its measured figures, and its speedup beside the prediction."""

from collections.abc import Sequence
from statistics import fmean

from bench.grid.cells import Case, Cell
from bench.grid.prediction import CalibratedModel, target_seconds
from bench.grid.recording_planner import RoundFigures
from bench.grid.throughput import Throughput
from bench.setup.results import Row, number
from protocol.bundle import QualityFigures
from protocol.messages import Mode

_FIGURES = (
    "tokens",
    "tokens_per_second",
    "ttft_milliseconds",
    "acceptance_rate",
    "tokens_per_round",
    "draft_milliseconds",
    "reply_milliseconds",
    "uplink_bytes_per_token",
    "uplink_bytes_per_round",
    "accepted_at_least",
    "rounds",
)


def case_row(case: Case, cell: Cell, measured: Throughput) -> Row:
    """The row of a case, without figures if nothing was measured.

    Loopback rows with a fixed draft length keep every round, [accepted, margin, margin, …].
    """
    row: Row = {"case": case.name, **cell.columns(), "mode": str(case.mode), "draft_len": case.draft_len or "auto"}
    if case.mode is Mode.TARGET:
        row["draft_len"] = None
    if not measured.seconds:
        return row | dict.fromkeys(_FIGURES)
    drafted, rounds = sum(one.drafted for one in measured.rounds), [one for one in measured.rounds if one.drafted]
    replies = [one.reply_seconds for one in rounds if one.reply_seconds is not None]
    figures = (
        measured.tokens,
        measured.tokens_per_second,
        1e3 * measured.ttft_seconds / measured.answers,
        sum(one.accepted for one in rounds) / drafted if drafted else None,
        fmean(one.accepted + 1 for one in rounds) if rounds else None,
        1e3 * sum(one.draft_seconds for one in rounds) / drafted if drafted else None,
        1e3 * fmean(replies) if replies else None,
        measured.uplink_bytes / measured.tokens,
        measured.uplink_bytes / len(rounds) if rounds else None,
        accepted_at_least(rounds, case.draft_len) if case.draft_len else None,
        [[one.accepted, *one.margins] for one in rounds] if case.draft_len and cell.round_trip_ms is None else None,
    )
    return row | dict(zip(_FIGURES, figures, strict=True))


def accepted_at_least(rounds: Sequence[RoundFigures], draft_len: int) -> list[int]:
    """The number of rounds in which at least 0, 1, … ``draft_len`` tokens were accepted.

    Rounds that a stop id made shorter are excluded.
    """
    accepted = [one.accepted for one in rounds if one.drafted == draft_len]
    return [sum(one >= count for one in accepted) for count in range(draft_len + 1)]


def add_predictions(rows: Sequence[Row], cell: Cell, loopback: Sequence[Row], quality: QualityFigures) -> None:
    """Add to each row of a cell its speedup, the prediction and the relative error; None where unknown."""
    target_alone = target_seconds(rows)
    model = CalibratedModel.of(loopback, quality).scaled_to(target_alone)
    for row in rows:
        draft_len = row["draft_len"] if isinstance(row["draft_len"], int) else None
        row["speedup"] = row["prediction_error"] = None
        if target_alone and row["tokens_per_second"]:
            row["speedup"] = number(row, "tokens_per_second") * target_alone
        predicted = model.predict(Mode(str(row["mode"])), draft_len, cell)
        row["predicted_speedup"] = predicted.speedup if predicted else None
        row["predicted_tokens_per_round"] = predicted.tokens_per_round if predicted else None
        if row["speedup"] and row["predicted_speedup"]:
            row["prediction_error"] = number(row, "predicted_speedup") / number(row, "speedup") - 1
