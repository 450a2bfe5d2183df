"""Planned drafting against fixed settings on many links, in simulated time: ``python -m tests.planner_grid``.

The draft model's acceptance varies along an answer, as in real ones: tokens that are easy
follow each other, and so do hard ones. Its margins predict most of the rejections.
"""

import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from device.drafting.draft_model import Logits
from device.settings import DraftSettings
from protocol.messages import Mode, Sampling
from tests.fakes import manifest, next_logits, random_table
from tests.timed_pair import PairTimes, TimedDraftModel, TimedPair

VOCAB = 64
TABLE = random_table(VOCAB, seed=1, sharpness=3.0)
ROUND_TRIPS = (0.0, 0.02, 0.05, 0.1, 0.2)
MEGABITS = (1, 50)
ACCEPTANCES = (0.3, 0.5, 0.7, 0.85, 0.95)
SAMPLE = PairTimes(draft=0.008, forward=0.0175, row=0.001)
SLOW_TARGET = PairTimes(draft=0.0105, forward=0.040, row=0.003)
PLANNED = DraftSettings(Mode.IDS, Sampling(), 1, None, drafts_ahead=None)
LOCKSTEP = replace(PLANNED, drafts_ahead=0)
TARGET_ALONE = replace(PLANNED, mode=Mode.TARGET)
FIXED = [replace(PLANNED, draft_len=draft_len) for draft_len in (2, 4, 8)]
FIXED += [replace(LOCKSTEP, draft_len=draft_len) for draft_len in (4, 8)]
WARM_UP_TOKENS, ANSWER_TOKENS, ANSWERS = 48, 96, 6
_SPAN = 8192
_EASY_TOKENS, _HARD_TOKENS = 20, 10


@dataclass(frozen=True)
class Guess:
    """What the draft model makes of a position: its margin in nats, and whether its token is the target's."""

    margin: float
    is_right: bool


def guesses(acceptance: float, seed: int) -> list[Guess]:
    """Of all positions; on average this share is right."""
    chance = random.Random(seed)  # noqa: S311
    easy = min((1 + acceptance) / 2, 1.5 * acceptance)
    made: list[Guess] = []
    while len(made) < _SPAN:
        for share, tokens in ((easy, _EASY_TOKENS), (3 * acceptance - 2 * easy, _HARD_TOKENS)):
            for _ in range(1 + int(chance.expovariate(1 / tokens))):
                is_right = chance.random() < share
                made.append(Guess(0.02 + chance.expovariate(0.4 if is_right else 2.0), is_right))
    return made[:_SPAN]


@dataclass
class GuessingDraftModel(TimedDraftModel):
    """Drafts the target's token, or another one, as ``guesses`` say for each position."""

    guesses: Sequence[Guess] = ()

    def next_logits(self) -> Logits:
        guess = self.guesses[len(self.tokens) % len(self.guesses)]
        target = int(next_logits(self.table, self.tokens).argmax())
        logits = np.full(VOCAB, -20.0, np.float32)
        logits[[target, (target + 7) % VOCAB]] = (guess.margin, 0.0) if guess.is_right else (0.0, guess.margin)
        return logits


class GridPair:
    """A pair whose answers differ in where the draft model is right.

    Args:
        acceptance: the share of tokens that the draft model gets right.
        times: of each step.
        seed: of the guesses.
    """

    def __init__(self, acceptance: float, times: PairTimes, seed: int = 3) -> None:
        self.pair = TimedPair(TABLE, TABLE, times)
        self._guesses = guesses(acceptance, seed)
        self._answers = 0

    def answer_seconds(self, settings: DraftSettings, tokens: int) -> tuple[float, float]:
        """The simulated seconds of an answer, and those after its first token."""
        start = self._answers * 997 % _SPAN
        self._answers += 1
        model = GuessingDraftModel(
            TABLE,
            manifest(VOCAB),
            run_for=self.pair.run_for,
            draft_seconds=self.pair.times.draft,
            guesses=self._guesses[start:] + self._guesses[:start],
        )
        began = self.pair.now
        session = self.pair.session(settings, [3, 1, 4 + self._answers], model=model)
        moments = [self.pair.now for _ in session.answer(tokens)]
        session.close()
        self.pair.run_until(self.pair.now + 2.0)  # the base station is idle
        assert len(moments) == tokens
        return moments[-1] - began, moments[-1] - moments[0]


def rate(acceptance: float, times: PairTimes, settings: DraftSettings) -> float:
    """Tokens per second after the first ones of some answers; a shorter answer comes before them."""
    pair = GridPair(acceptance, times)
    pair.answer_seconds(settings, WARM_UP_TOKENS)
    seconds = sum(pair.answer_seconds(settings, ANSWER_TOKENS)[1] for _ in range(ANSWERS))
    return ANSWERS * (ANSWER_TOKENS - 1) / seconds


@dataclass(frozen=True)
class GridCell:
    """Tokens per second on one link, over those of the target alone.

    Attributes:
        ahead: planned, with Drafts ahead.
        lockstep: planned, one Draft at a time.
        best_fixed: of the fastest fixed setting; the target alone is one.
    """

    ahead: float
    lockstep: float
    best_fixed: float

    @classmethod
    def measure(cls, acceptance: float, times: PairTimes) -> "GridCell":
        """Simulate all settings."""
        alone = rate(acceptance, times, TARGET_ALONE)
        fixed = max(rate(acceptance, times, settings) for settings in FIXED)
        ahead, lockstep = (rate(acceptance, times, settings) / alone for settings in (PLANNED, LOCKSTEP))
        return cls(ahead, lockstep, max(1.0, fixed / alone))

    @property
    def faults(self) -> str:
        """What is missed, in words; empty where nothing is."""
        missed = {
            "below .95 of the target alone": self.ahead < 0.95,
            "below .93 of the best fixed setting": self.ahead < 0.93 * self.best_fixed,
            "below one Draft at a time": self.ahead < 0.97 * self.lockstep,
        }
        return "; ".join(text for text, is_missed in missed.items() if is_missed)


def cells() -> Iterator[tuple[float, PairTimes]]:
    """The acceptance and the times of each cell."""
    for speeds, acceptance, megabits, round_trip in product((SAMPLE, SLOW_TARGET), ACCEPTANCES, MEGABITS, ROUND_TRIPS):
        yield acceptance, replace(speeds, round_trip=round_trip, bytes_per_second=megabits * 1e6 / 8)


def main() -> None:
    """Print a row of each cell."""
    write = sys.stdout.write
    write("| target ms | acceptance | uplink Mbit/s | round trip ms | ahead | one at a time | best fixed | |\n")
    write("|---|---|---|---|---|---|---|---|\n")
    for acceptance, times in cells():
        cell = GridCell.measure(acceptance, times)
        link = f"{times.bytes_per_second * 8e-6:g} | {times.round_trip * 1e3:g}"
        ratios = f"{cell.ahead:.2f} | {cell.lockstep:.2f} | {cell.best_fixed:.2f}"
        write(f"| {times.forward * 1e3:g} | {acceptance:g} | {link} | {ratios} | {cell.faults} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
