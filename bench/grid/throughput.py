"""Throughput of an answer in steady state: what a speedup is the ratio of.

The clock starts when the first tokens have arrived and stops with the last round,
so that neither the prefill nor half a round at the end distorts a short
measurement.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from bench.grid.cells import AnswerLimits
from bench.grid.recording_planner import RecordingPlanners, RoundFigures
from bench.setup.bench_setup import BenchSetup
from device.settings import DraftSettings
from protocol.messages import Mode


@dataclass(frozen=True)
class Throughput:
    """Tokens, seconds and rounds of one answer or of several, each after its first tokens.

    ``ttft_seconds`` is the time to the first tokens; of several answers, the sum.
    """

    tokens: int
    seconds: float
    ttft_seconds: float
    uplink_bytes: int
    rounds: Sequence[RoundFigures]
    answers: int = 1

    @property
    def tokens_per_second(self) -> float:
        """In steady state."""
        return self.tokens / self.seconds


def measure_throughput(
    setup: BenchSetup, prompt_ids: list[int], settings: DraftSettings, limits: AnswerLimits
) -> Throughput:
    """Measure one answer in a session of its own; it ends between rounds."""
    planners, link = setup.planners, setup.client.link
    assert isinstance(planners, RecordingPlanners)
    planners.rounds.clear()
    began = time.monotonic()
    session = setup.session(settings, prompt_ids)
    longest = limits.tokens + 1 if settings.mode is Mode.TARGET else 64 * limits.tokens
    first = now = 0.0
    before = committed = sent = rounds = 0
    for _ in session.answer(longest):
        if len(session.tokens) == committed:
            continue  # a further token of the same round
        now, committed = time.monotonic(), len(session.tokens)
        if not before:
            first, before, sent, rounds = now, committed, link.uplink_bytes, len(planners.rounds)
        long_enough = now - first >= limits.seconds and session.counters.rounds > 2
        if committed - before >= limits.tokens or long_enough:
            break
    figures = tuple(planners.rounds[rounds:])
    uplink_bytes = link.uplink_bytes - sent
    session.close()
    return Throughput(committed - before, now - first, first - began, uplink_bytes, figures)


def combined(measured: Sequence[Throughput]) -> Throughput:
    """Several answers as one; of none, all is 0."""
    return Throughput(
        sum(one.tokens for one in measured),
        sum(one.seconds for one in measured),
        sum(one.ttft_seconds for one in measured),
        sum(one.uplink_bytes for one in measured),
        [figures for one in measured for figures in one.rounds],
        sum(one.answers for one in measured),
    )
