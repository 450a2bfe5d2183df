"""Rows of a made-up grid, with an acceptance of 0.8 at every position."""

from bench.grid.cells import COLOCATED, TARGET, Cell
from bench.setup.results import Row
from protocol.messages import Mode

LOOPBACK = Cell(0.0)
CELL = Cell(0.0, 20.0, 5.0)
TARGET_SECONDS = 0.05


def row(case: str, mode: Mode, draft_len: int | str | None, cell: Cell, tokens_per_second: float | None) -> Row:
    """The row of a case; without tokens per second it failed."""
    fixed = draft_len if isinstance(draft_len, int) else None
    figures: Row = {
        "tokens": 100,
        "tokens_per_second": tokens_per_second,
        "ttft_milliseconds": 100.0,
        "acceptance_rate": None,
        "tokens_per_round": fixed and 4.0,
        "draft_milliseconds": 10.0,
        "reply_milliseconds": 50.0 + 2.0 * fixed if fixed else None,
        "uplink_bytes_per_token": 3.0,
        "uplink_bytes_per_round": 20.0 + 2 * fixed if fixed else None,
        "accepted_at_least": [round(100_000 * 0.8**count) for count in range(fixed + 1)] if fixed else None,
        "rounds": 200 * [[float(accepted), *[None] * fixed] for accepted in range(fixed + 1)] if fixed else None,
        "failed": None if tokens_per_second else "the base station died",
        "load_average": 1.0 + (cell.round_trip_ms or 0) / 25,
        "speedup": tokens_per_second * TARGET_SECONDS if tokens_per_second else None,
        "predicted_speedup": 1.0,
        "predicted_tokens_per_round": fixed and 2.0,
        "prediction_error": 1 / (tokens_per_second * TARGET_SECONDS) - 1 if tokens_per_second else None,
    }
    return {"case": case, **cell.columns(), "mode": str(mode), "draft_len": draft_len, **figures}


def rows_of(cell: Cell, auto: float | None = 30.0, best: float = 28.0) -> list[Row]:
    """The rows of a cell, with the tokens per second of ``auto`` and of the best fixed draft length."""
    return [
        row(TARGET.name, Mode.TARGET, None, cell, 1 / TARGET_SECONDS),
        row("ids, auto", Mode.IDS, "auto", cell, auto),
        row("ids, draft length 2", Mode.IDS, 2, cell, 20.5),
        row("ids, draft length 4", Mode.IDS, 4, cell, best),
        row("full vocabulary", Mode.FULL, 1, cell, 4.0),
        *([row(COLOCATED, Mode.IDS, "auto", cell, 40.0)] if cell.round_trip_ms is None else []),
    ]
