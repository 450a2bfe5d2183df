"""Predicted speedup of a case in a cell, from figures measured over loopback.

Acceptance is taken by position, times as means over rounds: to draft a token,
from a Draft to its Verdict, and between tokens of the target alone. The machine's
speed drifts over the hours of a grid, so all three are scaled by the speed of the
target alone in the cell. The link adds its round trip and airtime.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from bench.grid.cells import DOWNLINK_MBIT, TARGET, Cell
from bench.grid.planner_prediction import VerifiedDraft, planned_throughput
from bench.setup.results import Row, number, numbers
from common.round_model import Direction, RoundTimes, expected_tokens
from protocol.bundle import QualityFigures
from protocol.messages import Mode

_VERDICT_BYTES = 12.0


@dataclass(frozen=True)
class Prediction:
    """The speedup of a case, and tokens per round over the rounds that draft something."""

    speedup: float
    tokens_per_round: float | None = None


@dataclass(frozen=True)
class Calibration:
    """Figures of one mode, measured over loopback; the mappings have a value per fixed draft length.

    Attributes:
        accepted_at_least: the number of rounds in which at least 0, 1, 2, … tokens were accepted.
        draft_seconds: to draft one token.
        reply_seconds: from a Draft to its Verdict.
        round_bytes: uplink bytes of a round.
        rounds: the rounds of the longest draft length.
    """

    accepted_at_least: Mapping[int, Sequence[int]]
    draft_seconds: Mapping[int, float]
    reply_seconds: Mapping[int, float]
    round_bytes: Mapping[int, float]
    rounds: Sequence[VerifiedDraft] = ()

    def scaled(self, factor: float) -> "Calibration":
        """The same on a machine on which everything takes ``factor`` times as long."""
        return replace(
            self,
            draft_seconds={draft_len: factor * seconds for draft_len, seconds in self.draft_seconds.items()},
            reply_seconds={draft_len: factor * seconds for draft_len, seconds in self.reply_seconds.items()},
        )

    def acceptance(self, draft_len: int) -> list[float]:
        """α by position: of the rounds with this draft length, or if there are none, of all that reach the position."""
        lengths = [draft_len] if draft_len in self.accepted_at_least else list(self.accepted_at_least)
        alphas = []
        for position in range(1, max(lengths) + 1):
            counts = [self.accepted_at_least[one] for one in lengths if one >= position]
            trials = sum(of_length[position - 1] for of_length in counts)
            if not trials:
                break
            alphas.append(sum(of_length[position] for of_length in counts) / trials)
        return alphas

    def times(
        self, target_seconds: float, round_trip_seconds: float, bytes_per_second: float, downlink: Direction
    ) -> RoundTimes:
        """Times of a round over a link; the constant part of the drafting time is counted with the reply."""
        lengths = sorted(self.reply_seconds)
        draft_seconds = min(self.draft_seconds.values())
        constant = {one: one * (self.draft_seconds[one] - draft_seconds) for one in lengths}
        replies = [self.reply_seconds[one] + constant[one] for one in lengths]

        def verify_seconds(draft_len: int) -> float:
            return _interpolate(draft_len, lengths, replies) if draft_len else target_seconds

        sent = [self.round_bytes[one] for one in lengths]
        slope = (sent[-1] - sent[0]) / (lengths[-1] - lengths[0]) if len(lengths) > 1 else sent[0] / lengths[0]
        uplink = Direction(max(0.0, sent[0] - slope * lengths[0]), slope, bytes_per_second)
        return RoundTimes(draft_seconds, verify_seconds, round_trip_seconds, uplink, downlink)


@dataclass(frozen=True)
class CalibratedModel:
    """Predicts cases of one temperature: the figures of each mode, the target's seconds per token, the draft's quality.

    ``target_seconds`` is None where the target alone was not measured; then nothing is predicted.
    """

    calibrations: Mapping[Mode, Calibration]
    target_seconds: float | None
    quality: QualityFigures

    @classmethod
    def of(cls, loopback: Sequence[Row], quality: QualityFigures) -> Self:
        """Calibrate with the rows measured over loopback; with no rows it predicts nothing."""
        return cls(calibrations_of(loopback), target_seconds(loopback), quality)

    def scaled_to(self, target_seconds: float | None) -> "CalibratedModel":
        """The same on a machine that takes ``target_seconds`` per token of the target alone; None changes nothing."""
        if target_seconds is None or self.target_seconds is None:
            return self
        factor = target_seconds / self.target_seconds
        calibrations = {mode: calibration.scaled(factor) for mode, calibration in self.calibrations.items()}
        return replace(self, calibrations=calibrations, target_seconds=target_seconds)

    def predict(self, mode: Mode, draft_len: int | None, cell: Cell) -> Prediction | None:
        """Predict a mode in a cell, without a draft length with the planner; None without figures."""
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
            if not alphas:  # all rounds were shorter
                return None
            return Prediction(times.speedup(alphas, draft_len), expected_tokens(alphas, draft_len))
        if not calibration.rounds:
            return None
        planned = planned_throughput(self.quality, cell.temperature == 0, calibration.rounds, times)
        return Prediction(planned.tokens_per_second * times.target_seconds(), planned.tokens_per_round)


def calibrations_of(loopback: Sequence[Row]) -> dict[Mode, Calibration]:
    """The calibration of each mode, from its rows with fixed draft lengths."""
    rows = [row for row in loopback if isinstance(row["draft_len"], int) and row["failed"] is None]
    found = {}
    for mode in {Mode(str(row["mode"])) for row in rows}:
        of_mode = {int(number(row, "draft_len")): row for row in rows if row["mode"] == mode}
        found[mode] = Calibration(
            {draft_len: numbers(row, "accepted_at_least") for draft_len, row in of_mode.items()},
            {draft_len: number(row, "draft_milliseconds") / 1e3 for draft_len, row in of_mode.items()},
            {draft_len: number(row, "reply_milliseconds") / 1e3 for draft_len, row in of_mode.items()},
            {draft_len: number(row, "uplink_bytes_per_round") for draft_len, row in of_mode.items()},
            _verified_drafts(of_mode[max(of_mode)]),
        )
    return found


def target_seconds(rows: Sequence[Row]) -> float | None:
    """Seconds between two tokens of the target alone; None if that was not measured."""
    measured = [row for row in rows if row["case"] == TARGET.name and row["tokens_per_second"]]
    return 1 / number(measured[0], "tokens_per_second") if measured else None


def _verified_drafts(row: Row) -> list[VerifiedDraft]:
    rounds = row["rounds"]
    assert isinstance(rounds, list)
    return [VerifiedDraft(one[1:], int(one[0] or 0)) for one in rounds if isinstance(one, list)]


def _interpolate(x: int, xs: Sequence[int], ys: Sequence[float]) -> float:
    """Linear between the points; beyond the last, its line is continued."""
    if x <= xs[-1] or len(xs) == 1:
        return float(np.interp(x, xs, ys))
    slope = (ys[-1] - ys[-2]) / (xs[-1] - xs[-2])
    return ys[-1] + slope * (x - xs[-1])
