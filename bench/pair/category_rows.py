"""The rows of one category: a case's figures, paired ratios, and what the round model gives for the same figures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from statistics import StatisticsError, fmean, linear_regression, median

from bench.grid.cells import COLOCATED, TARGET, Case, Cell
from bench.grid.pair_run import Measured
from bench.grid.planner_prediction import VerifiedDraft
from bench.grid.prediction import CalibratedModel, Calibration
from bench.grid.ratio import Ratio
from bench.grid.recording_planner import RoundFigures
from bench.grid.rows import accepted_at_least
from bench.grid.throughput import Throughput, combined
from bench.setup.results import Row, Value
from device.settings import DEFAULT_UPLINK_K
from protocol.bundle import QualityFigures
from protocol.messages import Mode

DRAFT_LEN = 8
"""Of the case with a fixed draft length, whose acceptance no planner has selected."""
_WITH_PROMPT = attrgetter("tokens_per_second_with_prompt")


@dataclass(frozen=True)
class CategoryCell:
    """A category of prompts and a temperature."""

    category: str
    temperature: float

    def columns(self) -> Row:
        """The columns that identify the cell in each of its rows."""
        return {"category": self.category, "temperature": self.temperature}

    def has(self, row: Mapping[str, Value]) -> bool:
        """Whether ``row`` belongs to this cell."""
        columns = self.columns()
        return {name: row[name] for name in columns} == columns

    @property
    def link(self) -> Cell:
        """Loopback."""
        return Cell(self.temperature)


def category_cases(temperature: float) -> list[Case]:
    """The target alone, the uplink modes, and the draft model on the base station's core.

    The case with Drafts ahead and prompt lookup is what a device does by default. At temperature 0 a distribution has
    one entry, so that ``topp`` sends what ``topk`` does.
    """
    mode = Mode.COUPLED if temperature else Mode.IDS
    sparse = [Mode.TOPK, Mode.TOPP] if temperature else [Mode.TOPK]
    return [
        TARGET,
        Case(f"{mode}, auto", mode),
        Case(f"{mode}, ahead, auto", mode, drafts_ahead=None),
        Case(f"{mode}, ahead, lookup, auto", mode, drafts_ahead=None, lookup=True),
        Case(f"{mode}, draft length {DRAFT_LEN}", mode, DRAFT_LEN),
        *(Case(f"{one} {DEFAULT_UPLINK_K[one]}, auto", one) for one in sparse),
        Case(COLOCATED, mode, colocated=True),
    ]


def category_rows(cell: CategoryCell, cases: Sequence[Case], measured: Measured, quality: QualityFigures) -> list[Row]:
    """A row per case; ratios are None where a case failed, or where nothing followed the first tokens."""
    answers = measured.answers
    colocated = next((case.name for case in cases if case.colocated), TARGET.name)
    predictor = _predictor(cases, answers, cell.temperature, quality)
    rows = []
    for case in cases:
        speedup = _ratio(answers[case.name], answers[TARGET.name])
        with_prompt = _ratio(answers[case.name], answers[TARGET.name], _WITH_PROMPT)
        over_colocated = _ratio(answers[case.name], answers[colocated])
        predicted = predictor.predict(case.mode, case.draft_len, cell.link) if _is_predicted(case) else None
        rows.append(
            {
                "case": case.name,
                **cell.columns(),
                **_figures(answers[case.name]),
                **_columns("speedup", speedup),
                **_columns("speedup_with_prompt", with_prompt),
                **_columns("over_colocated", over_colocated),
                "predicted_speedup": predicted.speedup if predicted else None,
                "over_round_model": speedup.median / predicted.speedup if speedup and predicted else None,
                "failed": measured.failures.get(case.name),
            }
        )
    return rows


def _ratio(
    answers: Sequence[Throughput],
    others: Sequence[Throughput],
    rate: Callable[[Throughput], float] = attrgetter("tokens_per_second"),
) -> Ratio | None:
    """Of paired answers, which a failed case has fewer of."""
    if len(answers) != len(others):
        return None
    pairs = [(one, other) for one, other in zip(answers, others, strict=True) if one.seconds and other.seconds]
    return Ratio.of([rate(one) for one, _ in pairs], [rate(other) for _, other in pairs]) if pairs else None


def _is_predicted(case: Case) -> bool:
    """Whether its rounds follow each other, on a core for each end."""
    return not case.colocated and case.drafts_ahead == 0


def _columns(name: str, ratio: Ratio | None) -> Row:
    interval = f"{ratio.low:.2f} to {ratio.high:.2f}" if ratio else None
    return {name: ratio.median if ratio else None, f"{name}_interval": interval}


def _figures(answers: Sequence[Throughput]) -> Row:
    total = combined(answers)
    drafted = sum(one.drafted for one in total.rounds)
    rates = [one.tokens_per_second for one in answers if one.seconds]
    tokens = total.tokens
    return {
        "answers": len(answers),
        "tokens": tokens,
        "tokens_per_second": median(rates) if rates else None,
        "ttft_milliseconds": 1e3 * median(one.ttft_seconds for one in answers) if answers else None,
        "acceptance_rate": sum(one.accepted for one in total.rounds) / drafted if drafted else None,
        "acceptance_length": fmean(one.accepted + 1 for one in total.rounds) if total.rounds else None,
        "tokens_per_round": tokens / total.verdicts if total.verdicts else None,
        "draft_milliseconds": 1e3 * sum(one.draft_seconds for one in total.rounds) / drafted if drafted else None,
        "uplink_bytes_per_token": total.uplink_bytes / tokens if tokens else None,
        "downlink_bytes_per_token": total.downlink_bytes / tokens if tokens else None,
    }


def _predictor(
    cases: Sequence[Case], answers: Mapping[str, Sequence[Throughput]], temperature: float, quality: QualityFigures
) -> CalibratedModel:
    """The round model with the drafting time and the verification time of each mode's own rounds.

    It takes the acceptance of rounds with a fixed draft length. At temperature 0 all modes accept the same tokens;
    above, a mode without such rounds is not predicted.
    """
    target = combined(answers[TARGET.name])
    calibrations = {}
    for mode in {case.mode for case in cases} - {Mode.TARGET}:
        timed = [case for case in cases if case.mode is mode and _is_predicted(case)]
        rounds = [one for case in timed for one in combined(answers[case.name]).rounds]
        comparable = [case for case in cases if case.draft_len and (case.mode is mode or not temperature)]
        fixed = [one for case in comparable for one in combined(answers[case.name]).rounds]
        if fixed and any(one.reply_seconds is not None for one in rounds):
            calibrations[mode] = _calibration(rounds, fixed)
    return CalibratedModel(calibrations, target.seconds / target.tokens if target.tokens else None, quality)


def _calibration(rounds: Sequence[RoundFigures], accepted: Sequence[RoundFigures]) -> Calibration:
    """Times of ``rounds``, with the verification time as a line over the draft length; acceptance of ``accepted``."""
    replies = [(one.drafted, one.reply_seconds) for one in rounds if one.reply_seconds is not None]
    draft_seconds = sum(one.draft_seconds for one in rounds) / sum(one.drafted for one in rounds)
    try:
        slope, intercept = linear_regression(*zip(*replies, strict=True))
    except StatisticsError:  # all rounds have the same draft length
        slope, intercept = 0.0, fmean(seconds for _, seconds in replies)
    lengths = (1, DRAFT_LEN)
    return Calibration(
        {DRAFT_LEN: accepted_at_least(accepted, DRAFT_LEN)},
        dict.fromkeys(lengths, draft_seconds),
        {length: intercept + length * slope for length in lengths},
        dict.fromkeys(lengths, 0.0),
        [VerifiedDraft(one.margins, one.accepted) for one in accepted],
    )
