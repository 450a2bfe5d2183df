"""Measures the cells of ``grid.py``, one after the other, each row beside its prediction."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Self

from bench.grid.cells import DOWNLINK_MBIT, FULL, FULL_DRAFT_LENS, TARGET, Answers, Case, Cell, cases
from bench.grid.planner_prediction import VerifiedDraft, planned_pace
from bench.grid.prediction import Calibration, Prediction, standing
from bench.grid.recording_client import RecordingClient
from bench.grid.throughput import Length, Pace, measure_pace, together
from bench.link.relay import relay_command
from bench.setup.bench_setup import BenchSetup, connected
from bench.setup.cores import Cores, running_on
from bench.setup.results import Row, Value, number, numbers
from bench.setup.server_process import Served, serving
from bench.setup.station_process import station_command
from device.draft_model import DraftModel
from device.round_model import Direction, expected_tokens
from device.sampling import ENTRIES
from device.session import DraftSettings
from device.tokenizer import Tokenizer
from protocol.bundle import QualityFigures
from protocol.errors import EdgedraftError
from protocol.messages import Mode, Sampling

WARM_UP = Length(24, 4.0)
_VERDICT_BYTES = 12.0


@dataclass(frozen=True)
class GridSettings:
    """What every cell is measured with: at temperature 0 the answers ``greedy``, above it ``sampled``."""

    target: str
    dtype: str
    greedy: Answers
    sampled: Answers

    def answers(self, cell: Cell) -> Answers:
        """Of each case in a cell."""
        return self.sampled if cell.temperature else self.greedy


class GridRun:
    """The draft model on one core and a base station on another, which is started again where it has died.

    Args:
        bundle: of the draft model.
        settings: what every cell is measured with.
        advance: called when a case of a prompt is done.

    Raises:
        SettingsError: there is but one core.
    """

    def __init__(self, bundle: Path, settings: GridSettings, advance: Callable[[], object]) -> None:
        self.model = DraftModel(bundle, threads=1)
        self._cores = Cores.choose()
        self._tokenizer = Tokenizer(bundle, self.model.manifest)
        self._settings = settings
        self._advance = advance
        self._stack = ExitStack()
        self._station: Served | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def described(self) -> dict[str, Value]:
        """All that every cell depends on."""
        manifest, settings = self.model.manifest, self._settings
        return {
            "target": Path(settings.target).name,
            "target_dtype": settings.dtype,
            "draft": manifest.name,
            "draft_precision": manifest.precision,
            **_described("greedy", settings.greedy),
            **_described("sampled", settings.sampled),
            "downlink_mbit": DOWNLINK_MBIT,
            "cores": "one for the device, another for the base station",
        }

    def cell_rows(self, cell: Cell, loopback: Sequence[Row]) -> list[Row]:
        """A row for each case of a cell; the load average is that of its last minute, all processes together.

        Args:
            cell: to measure.
            loopback: the rows of its temperature without a link; without any, nothing is predicted.
        """
        model = Model.of(loopback, self.model.manifest.quality)
        planned = [_chosen(case, cell, model) for case in cases(cell)]
        paces, failures = self._paces(cell, planned)
        rows = [_row(case, cell, together(paces[case.name]) if paces[case.name] else None) for case in planned]
        for row in rows:
            row["failed"] = failures.get(str(row["case"]))
            row["load_average"] = os.getloadavg()[0]
        self.compare(rows, cell, loopback or (rows if cell.round_trip_ms is None else []))
        return rows

    def compare(self, rows: Sequence[Row], cell: Cell, loopback: Sequence[Row]) -> None:
        """Add to every row of a cell its speedup, what is predicted and the error of that; None without figures."""
        alone = _target_seconds(rows)
        model = Model.of(loopback, self.model.manifest.quality).at(alone)
        for row in rows:
            draft_len = row["draft_len"] if isinstance(row["draft_len"], int) else None
            row["speedup"] = row["prediction_error"] = None
            if alone and row["tokens_per_second"]:
                row["speedup"] = number(row, "tokens_per_second") * alone
            predicted = model.predict(Mode(str(row["mode"])), draft_len, cell)
            row["predicted_speedup"] = predicted.speedup if predicted else None
            row["predicted_tokens_per_round"] = predicted.tokens_per_round if predicted else None
            if row["speedup"] and row["predicted_speedup"]:
                row["prediction_error"] = number(row, "predicted_speedup") / number(row, "speedup") - 1

    def _paces(self, cell: Cell, planned: Sequence[Case]) -> tuple[Mapping[str, list[Pace]], Mapping[str, str]]:
        """Of every case an answer a prompt, taken in turns, and why the others have none."""
        paces: dict[str, list[Pace]] = {case.name: [] for case in planned}
        failures: dict[str, str] = {}
        with running_on(self._cores.device), ExitStack() as stack:
            try:
                station = self._running_station()
                address = stack.enter_context(self._linked(cell, station.address))
                place = stack.enter_context(self._connected(address))
                self._warm_up(place, cell, planned)
                for prompt in self._settings.answers(cell).prompts:
                    for case in planned:
                        if case.name not in failures and station.alive:
                            self._measure(place, cell, case, prompt, paces[case.name], failures)
                        self._advance()
                if not station.alive:
                    failures = dict.fromkeys(paces, "the base station died")
            except EdgedraftError as error:
                failures = dict.fromkeys(paces, str(error))
        return paces, failures

    def _measure(
        self, place: BenchSetup, cell: Cell, case: Case, prompt: str, paces: list[Pace], failures: dict[str, str]
    ) -> None:
        ids, settings = place.prompt_ids(prompt), _draft_settings(case, cell)
        length = self._settings.answers(cell).length
        try:
            if case.colocated:
                with running_on(self._cores.station), self._connected(self._running_station().address) as beside:
                    measure_pace(beside, ids, settings, WARM_UP)
                    paces.append(measure_pace(beside, ids, settings, length))
            else:
                paces.append(measure_pace(place, ids, settings, length))
        except EdgedraftError as error:
            failures[case.name] = str(error)

    def _warm_up(self, place: BenchSetup, cell: Cell, planned: Sequence[Case]) -> None:
        """First passes are slow, and a plan has to learn its link."""
        ids = place.prompt_ids(self._settings.answers(cell).prompts[0])
        for case in planned:
            if case is TARGET or (case.draft_len is None and not case.colocated):
                measure_pace(place, ids, _draft_settings(case, cell), WARM_UP)

    def _running_station(self) -> Served:
        if self._station is None or not self._station.alive:
            command = station_command(self._settings.target, self._settings.dtype)
            self._station = self._stack.enter_context(serving(command, self._cores.station))
        return self._station

    @contextmanager
    def _linked(self, cell: Cell, address: str) -> Iterator[str]:
        """The address of the base station behind the cell's link."""
        if cell.round_trip_ms is None:
            yield address
            return
        with serving(relay_command(address, cell.up, cell.down), self._cores.device) as relay:
            yield relay.address

    @contextmanager
    def _connected(self, address: str) -> Iterator[BenchSetup]:
        with connected(self.model, self._tokenizer, address, RecordingClient) as place:
            yield place


def calibrations_of(loopback: Sequence[Row]) -> dict[Mode, Calibration]:
    """What the rows with fixed draft lengths say of each mode."""
    rows = [row for row in loopback if isinstance(row["draft_len"], int) and row["failed"] is None]
    found = {}
    for mode in {Mode(str(row["mode"])) for row in rows}:
        of_mode = {int(number(row, "draft_len")): row for row in rows if row["mode"] == mode}
        found[mode] = Calibration(
            {draft_len: numbers(row, "standing") for draft_len, row in of_mode.items()},
            {draft_len: number(row, "draft_milliseconds") / 1e3 for draft_len, row in of_mode.items()},
            {draft_len: number(row, "reply_milliseconds") / 1e3 for draft_len, row in of_mode.items()},
            {draft_len: number(row, "uplink_bytes_per_round") for draft_len, row in of_mode.items()},
            _judged(of_mode[max(of_mode)]),
        )
    return found


def _described(name: str, answers: Answers) -> dict[str, Value]:
    return {
        f"{name}_prompts": len(answers.prompts),
        f"{name}_prompts_hash": sha256("\n".join(answers.prompts).encode()).hexdigest()[:8],
        f"{name}_tokens": answers.length.tokens,
        f"{name}_answer_seconds": answers.length.seconds,
    }


def _judged(row: Row) -> list[VerifiedDraft]:
    rounds = row["rounds"]
    assert isinstance(rounds, list)
    return [VerifiedDraft(one[1:], int(one[0] or 0)) for one in rounds if isinstance(one, list)]


@dataclass(frozen=True)
class Model:
    """What predicts: figures of loopback by mode, the target's pace there, and where the live plan begins."""

    calibrations: Mapping[Mode, Calibration]
    target_seconds: float | None
    quality: QualityFigures

    @classmethod
    def of(cls, loopback: Sequence[Row], quality: QualityFigures) -> Self:
        """Of the rows that were measured over loopback; of none, it predicts nothing."""
        return cls(calibrations_of(loopback), _target_seconds(loopback), quality)

    def at(self, target_seconds: float | None) -> "Model":
        """The same on a machine as slow as the target alone now shows it: all that is computed takes as much longer.

        None leaves it as it is, and so does a loopback of which nothing is known.
        """
        if target_seconds is None or self.target_seconds is None:
            return self
        slowness = target_seconds / self.target_seconds
        slowed = {mode: calibration.slowed(slowness) for mode, calibration in self.calibrations.items()}
        return replace(self, calibrations=slowed, target_seconds=target_seconds)

    def predict(self, mode: Mode, draft_len: int | None, cell: Cell) -> Prediction | None:
        """Of a mode in a cell, without a draft length that of the live plan; None without figures."""
        if mode is Mode.TARGET:
            return Prediction(1.0)
        calibration = self.calibrations.get(mode)
        if calibration is None or self.target_seconds is None:
            return None
        rate = cell.up.bits_per_second / 8
        downlink = Direction(round_bytes=_VERDICT_BYTES, bytes_per_second=1e6 * DOWNLINK_MBIT / 8)
        times = calibration.times(self.target_seconds, cell.round_trip_seconds, rate, downlink)
        if draft_len is not None:
            alphas = calibration.acceptance(draft_len)
            return Prediction(times.speedup(alphas, draft_len), expected_tokens(alphas, draft_len))
        if not calibration.rounds:
            return None
        pace = planned_pace(self.quality, cell.temperature == 0, calibration.rounds, times)
        return Prediction(pace.tokens_per_second * times.target_seconds(), pace.tokens_per_round)


def _chosen(case: Case, cell: Cell, model: Model) -> Case:
    """The case; of the full vocabulary as many tokens a round as the model says is best."""
    if case is not FULL:
        return case
    predicted = {one: model.predict(Mode.FULL, one, cell) or Prediction(0.0) for one in FULL_DRAFT_LENS}
    return replace(case, draft_len=max(predicted, key=lambda draft_len: predicted[draft_len].speedup))


def _draft_settings(case: Case, cell: Cell) -> DraftSettings:
    uplink_k, sampling = ENTRIES.get(case.mode, 1), Sampling(cell.temperature, seed=1)
    return DraftSettings(case.mode, sampling, uplink_k, case.draft_len, run_ahead=not case.colocated)


def _row(case: Case, cell: Cell, pace: Pace | None) -> Row:
    row: Row = {"case": case.name, **cell.columns(), "mode": str(case.mode), "draft_len": case.draft_len or "auto"}
    if case.mode is Mode.TARGET:
        row["draft_len"] = None
    if pace is None or not pace.seconds:
        return row | dict.fromkeys(_FIGURES)
    drafted, timed = sum(one.drafted for one in pace.rounds), [one for one in pace.rounds if one.drafted]
    replies = [one.reply_seconds for one in timed if one.reply_seconds is not None]
    figures = (
        pace.tokens,
        pace.tokens_per_second,
        1e3 * pace.first_seconds / pace.answers,
        sum(one.accepted for one in timed) / drafted if drafted else None,
        fmean(one.accepted + 1 for one in timed) if timed else None,
        1e3 * sum(one.draft_seconds for one in timed) / drafted if drafted else None,
        1e3 * fmean(replies) if replies else None,
        pace.uplink_bytes / pace.tokens,
        pace.uplink_bytes / len(timed) if timed else None,
        standing(pace, case.draft_len) if case.draft_len else None,
        [[one.accepted, *one.margins] for one in timed] if case.draft_len and cell.round_trip_ms is None else None,
    )
    return row | dict(zip(_FIGURES, figures, strict=True))


_FIGURES = (
    "tokens",
    "tokens_per_second",
    "first_milliseconds",
    "acceptance_rate",
    "tokens_per_round",
    "draft_milliseconds",
    "reply_milliseconds",
    "uplink_bytes_per_token",
    "uplink_bytes_per_round",
    "standing",
    "rounds",
)


def _target_seconds(rows: Sequence[Row]) -> float | None:
    """Between two tokens of the target alone, if that was measured."""
    measured = [row for row in rows if row["case"] == TARGET.name and row["tokens_per_second"]]
    return 1 / number(measured[0], "tokens_per_second") if measured else None
