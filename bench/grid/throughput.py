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

    ``first_tokens`` came after ``ttft_seconds``; of several answers, the sums. ``rounds`` are those that drafted;
    ``verdicts`` counts also the tokens that the target decoded alone.
    """

    tokens: int
    seconds: float
    first_tokens: int
    ttft_seconds: float
    uplink_bytes: int
    downlink_bytes: int
    rounds: Sequence[RoundFigures]
    verdicts: int
    answers: int = 1

    @property
    def tokens_per_second(self) -> float:
        """In steady state; 0 where nothing followed the first tokens."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_second_with_prompt(self) -> float:
        """From the prompt to the last token."""
        return (self.first_tokens + self.tokens) / (self.ttft_seconds + self.seconds)


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
    before = committed = sent = received = rounds = verdicts = 0
    for _ in session.answer(longest):
        if len(session.tokens) == committed:
            continue  # a further token of the same round
        now, committed = time.monotonic(), len(session.tokens)
        if not before:
            first, before, verdicts, rounds = now, committed, session.counters.rounds, len(planners.rounds)
            sent, received = link.uplink_bytes, link.downlink_bytes
        long_enough = now - first >= limits.seconds and session.counters.rounds > 2
        if committed - before >= limits.tokens or long_enough:
            break
    measured = Throughput(
        committed - before,
        now - first,
        before - len(prompt_ids),
        first - began,
        link.uplink_bytes - sent,
        link.downlink_bytes - received,
        tuple(planners.rounds[rounds:]),
        session.counters.rounds - verdicts,
    )
    session.close()
    return measured


def combined(measured: Sequence[Throughput]) -> Throughput:
    """Several answers as one; of none, all is 0."""
    return Throughput(
        sum(one.tokens for one in measured),
        sum(one.seconds for one in measured),
        sum(one.first_tokens for one in measured),
        sum(one.ttft_seconds for one in measured),
        sum(one.uplink_bytes for one in measured),
        sum(one.downlink_bytes for one in measured),
        [figures for one in measured for figures in one.rounds],
        sum(one.verdicts for one in measured),
        sum(one.answers for one in measured),
    )
