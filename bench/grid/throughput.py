"""How fast an answer goes on once it has begun: what a speedup is the ratio of.

The clock starts when the first tokens are there and stops with the last round,
so that the prompt's prefill and half a round at the end do not blur a short
measurement.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from bench.grid.recording_client import RecordingClient, RoundFigures
from bench.setup.bench_setup import BenchSetup
from device.session import DraftSettings
from protocol.messages import Mode


@dataclass(frozen=True)
class Pace:
    """Of one answer, or of several: tokens, seconds and rounds, all behind the first tokens."""

    tokens: int
    seconds: float
    first_seconds: float
    uplink_bytes: int
    rounds: Sequence[RoundFigures]
    answers: int = 1

    @property
    def tokens_per_second(self) -> float:
        """Without the first tokens and what came before."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Length:
    """How long an answer is measured: so many tokens, or seconds if they pass sooner, and two rounds at least."""

    tokens: int
    seconds: float


def measure_pace(place: BenchSetup, prompt_ids: list[int], settings: DraftSettings, length: Length) -> Pace:
    """One answer in a session of its own; it ends between rounds."""
    client = place.client
    assert isinstance(client, RecordingClient)
    client.rounds.clear()
    began = time.monotonic()
    session = client.open(settings, place.model, prompt_ids)
    longest = length.tokens + 1 if settings.mode is Mode.TARGET else 64 * length.tokens
    first = now = 0.0
    before = had = sent = rounds = 0
    for _ in session.answer(longest):
        if len(session.tokens) == had:
            continue  # of a round that is counted
        now, had = time.monotonic(), len(session.tokens)
        if not before:
            first, before, sent, rounds = now, had, place.link.uplink_bytes, len(client.rounds)
        enough = had - before >= length.tokens or (now - first >= length.seconds and session.counters.rounds > 2)
        if enough:
            break
    figures = tuple(client.rounds[rounds:])
    uplink_bytes = place.link.uplink_bytes - sent
    session.close()
    return Pace(had - before, now - first, first - began, uplink_bytes, figures)


def together(paces: Sequence[Pace]) -> Pace:
    """Several answers as one."""
    return Pace(
        sum(one.tokens for one in paces),
        sum(one.seconds for one in paces),
        sum(one.first_seconds for one in paces),
        sum(one.uplink_bytes for one in paces),
        [figures for one in paces for figures in one.rounds],
        sum(one.answers for one in paces),
    )
