"""The choice of a draft model's weight format: the highest predicted tokens per second with a given target and link.

The target generates text once, at temperatures 0 and 1; each candidate is
teacher-forced on it, and the candidates draft in turns. The round model predicts
with a draft length that is the best for each. Knows figures of candidates, not how
they are made.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, islice, pairwise
from math import ceil, inf, log2
from statistics import harmonic_mean, quantiles

from rich.console import Console
from transformers import PreTrainedModel

from common.round_model import Direction, RoundTimes, run_tokens
from export import quality
from export.candidates import Built, progress_bar
from export.quality import Continuation, Forcing, TeacherForcing
from protocol.bundle import Candidate, QualityFigures
from protocol.errors import QualityError, SettingsError

MAX_DRAFT_LEN = 32
DRAFTS_AHEAD = 3
"""As many as a base station's default window allows."""
TARGET_TOKENS = 64
TURNS = 6
TURN_TOKENS = 12
_FIRST_TOKENS = 4
"""Tokens of a turn that are not timed: the prompt, and while another's threads still spin."""


@dataclass(frozen=True)
class Conditions:
    """What the prediction is for.

    Attributes:
        rtt_ms: round trip of the link.
        up_mbit: uplink in Mbit/s.
        target_ms: a forward pass of the target; None to measure it here.
        draft_ms: a token of the draft model on the device, by the name of the format; others are measured here.
    """

    rtt_ms: float = 0.0
    up_mbit: float = inf
    target_ms: float | None = None
    draft_ms: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TargetText:
    """Text of the target, at temperatures 0 and 1, and the time of its forward passes."""

    greedy: Sequence[Continuation]
    sampled: Sequence[Continuation]
    pass_seconds: float

    @classmethod
    def generate(
        cls,
        model: PreTrainedModel,
        prompts: Sequence[list[int]],
        vocab_size: int,
        stop_ids: Collection[int],
        target_ms: float | None,
        console: Console,
    ) -> "TargetText":
        """Let the target continue prompts at temperatures 0 and 1; ``target_ms`` replaces the time of its passes."""
        instants: list[float] = []
        with progress_bar(console) as progress:
            task = progress.add_task("text of the target", total=2 * len(prompts) * TARGET_TOKENS)

            def record() -> None:
                instants.append(time.perf_counter())
                progress.advance(task)

            greedy, sampled = (
                quality.sample_continuations(
                    model, prompts, vocab_size, TARGET_TOKENS, record, greedy=greedy, stop_ids=stop_ids
                )
                for greedy in (True, False)
            )
        measured = _undisturbed([after - before for before, after in pairwise(instants)])
        return cls(greedy, sampled, measured if target_ms is None else target_ms / 1e3)


def parse_draft_ms(values: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """Milliseconds by name, of texts like ``int4=12.5``, or ``12.5`` for all of them.

    Raises:
        SettingsError: another form, an unknown name, or no time above 0.
    """
    parsed = {}
    for value in values:
        name, _, text = value.rpartition("=")
        try:
            milliseconds = float(text)
        except ValueError:
            milliseconds = 0.0
        meant = [name] if "=" in value else names
        if not set(meant) <= set(names) or not 0 < milliseconds < inf:
            raise SettingsError("draft-ms", value, f"MS or NAME=MS with NAME one of {', '.join(names)} and MS above 0")
        parsed.update(dict.fromkeys(meant, milliseconds))
    return parsed


def draft_seconds(forcings: Sequence[Forcing], text: Sequence[Continuation]) -> list[float]:
    """The time of a token of each graph; they take turns, so that another load of the machine meets all."""
    turns = [_of_a_turn(one) for one in text]
    times: list[list[float]] = [[] for _ in forcings]
    for turn in range(TURNS):
        for forcing, measured in zip(forcings, times, strict=True):
            started = time.perf_counter()
            for index, _ in enumerate(forcing.logits(turns[turn % len(turns)])):
                now = time.perf_counter()
                if index >= _FIRST_TOKENS:
                    measured.append(now - started)
                started = now
    return [_undisturbed(measured) for measured in times]


def _of_a_turn(text: Continuation) -> Continuation:
    """A text as long as a turn: a short one is repeated without its stop id, which does not change a token's time."""
    token_ids = islice(cycle(text.token_ids[:-1] or text.token_ids), _FIRST_TOKENS + TURN_TOKENS)
    return replace(text, token_ids=list(token_ids))


def _undisturbed(times: Sequence[float]) -> float:
    """The lower quartile: the times that other programs of the machine disturbed least."""
    return quantiles(times, n=4)[0]


def predicted_tokens_per_second(
    acceptances: Sequence[float], draft_seconds: float, target_seconds: float, vocab_size: int, conditions: Conditions
) -> float:
    """Tokens per second over texts of equal length with these acceptance rates, each with its best draft length.

    A forward pass is taken to last as long whatever the draft length.
    """
    id_bytes = ceil(log2(vocab_size)) / 8
    times = RoundTimes(
        draft_seconds,
        lambda _: target_seconds,
        conditions.rtt_ms / 1e3,
        Direction(token_bytes=id_bytes, bytes_per_second=conditions.up_mbit * 1e6 / 8),
    )
    return harmonic_mean([_tokens_per_second(times, alpha) for alpha in acceptances])


def _tokens_per_second(times: RoundTimes, alpha: float) -> float:
    """With the best draft length and, where there is a round trip, Drafts ahead; at least that of the target alone."""
    lengths = range(1, MAX_DRAFT_LEN + 1)
    alone = 1 / times.target_seconds()
    in_turn = alone * max(times.speedup(alpha, length) for length in lengths)
    if not times.round_trip_seconds:
        return max(alone, in_turn)
    ahead = max(run_tokens(alpha) / times.run_seconds(alpha, length, DRAFTS_AHEAD) for length in lengths)
    return max(alone, in_turn, ahead)


class WeightChoice:
    """Compares candidates for one target.

    Args:
        text: of the target.
        vocab_size: ids that frames are encoded for.
        conditions: of the prediction.
        console: for progress.
        bridge: makes a graph with another vocabulary take the target's tokens; None where it has them.

    Attributes:
        text: of the target.
        quality: of each candidate that was run over its text, against the target, by the name of the format.
    """

    def __init__(
        self,
        text: TargetText,
        vocab_size: int,
        conditions: Conditions,
        console: Console,
        bridge: Callable[[TeacherForcing], Forcing] | None = None,
    ) -> None:
        self.quality: dict[str, QualityFigures] = {}
        self.text = text
        self._bridge = bridge
        self._vocab_size = vocab_size
        self._conditions = conditions
        self._console = console

    def compare(self, candidates: Sequence[Built]) -> list[Candidate]:
        """The candidates in order, all but the best with the reason why it is not kept.

        Raises:
            QualityError: none passes the quality check.
        """
        failures = [_failure(one) for one in candidates]
        sound = [one for one, failure in zip(candidates, failures, strict=True) if not failure]
        if not sound:
            candidates[0].check()
        forcings = [self._forcing(one) for one in sound]
        with self._console.status("measuring the drafting speed"):
            measured = draft_seconds(forcings, self.text.greedy)
        figures = {
            one.weights.name: self._figures(one, forcing, seconds)
            for one, forcing, seconds in zip(sound, forcings, measured, strict=True)
        }
        best = max(figures.values(), key=lambda one: one.tokens_per_second)
        return [
            _failed(one, failure) if failure else _reasoned(figures[one.weights.name], best)
            for one, failure in zip(candidates, failures, strict=True)
        ]

    def agreement(self, built: Built, forcing: Forcing | None = None) -> QualityFigures:
        """How far a candidate agrees with the target, in argmax at temperature 0, else at 1; kept in ``quality``."""
        forcing = forcing or self._forcing(built)
        greedy, sampled = self.text.greedy, self.text.sampled
        with progress_bar(self._console) as progress:
            steps = sum(len(one.token_ids) for one in (*greedy, *sampled))
            task = progress.add_task(f"acceptance of {built.weights.name}", total=steps)
            at_0 = quality.argmax_agreement(forcing, greedy, lambda: progress.advance(task))
            figures = quality.measure(forcing, sampled, lambda: progress.advance(task))
        self.quality[built.weights.name] = replace(figures, argmax_agreement=at_0)
        return self.quality[built.weights.name]

    def _forcing(self, built: Built) -> Forcing:
        return self._bridge(built.forcing()) if self._bridge else built.forcing()

    def _figures(self, built: Built, forcing: Forcing, measured: float) -> Candidate:
        figures = self.agreement(built, forcing)
        at_0, at_1 = figures.argmax_agreement, figures.coupled_acceptance
        seconds = self._conditions.draft_ms.get(built.weights.name, 1e3 * measured) / 1e3
        speed = predicted_tokens_per_second(
            (at_0, at_1), seconds, self.text.pass_seconds, self._vocab_size, self._conditions
        )
        return replace(
            _failed(built, ""),
            greedy_acceptance=at_0,
            coupled_acceptance=at_1,
            draft_milliseconds=1e3 * seconds,
            tokens_per_second=speed,
        )


def _failure(built: Built) -> str:
    try:
        built.check()
    except QualityError as error:
        return str(error)
    return ""


def _failed(built: Built, reason: str) -> Candidate:
    """A candidate without figures of the target."""
    figures = built.figures
    agreement = (figures.argmax_agreement, figures.coupled_acceptance)
    return Candidate(built.weights.name, built.size, *agreement, 0.0, 0.0, 0.0, 0.0, reason)


def _reasoned(candidate: Candidate, best: Candidate) -> Candidate:
    if candidate is best:
        return candidate
    return replace(candidate, reason=f"{candidate.tokens_per_second / best.tokens_per_second:.2f} of the best")
