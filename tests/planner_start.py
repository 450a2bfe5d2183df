"""How fast a first answer is by what its process knows, in simulated time: ``python -m tests.planner_start``."""

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from device.planning.planner_store import PlannerStore
from device.settings import DraftSettings
from protocol.messages import Mode, Sampling
from tests.fakes import blend, manifest, random_table
from tests.timed_pair import PairTimes, TimedPair

VOCAB = 20
PROMPT = [3, 1, 4]
SETTINGS = DraftSettings(Mode.COUPLED, Sampling(1.0, seed=1), uplink_k=1, draft_len=None, drafts_ahead=None)
TARGET_TABLE = random_table(VOCAB, seed=1, sharpness=3)
DRAFT_TABLE = blend(TARGET_TABLE, random_table(VOCAB, seed=2, sharpness=3), 0.9)
LINKS = {
    "fast": PairTimes(draft=0.004, forward=0.030, row=0.001, round_trip=0.005),
    "far": PairTimes(draft=0.004, forward=0.030, row=0.001, round_trip=0.100),
    "slow drafting": PairTimes(draft=0.050, forward=0.030, row=0.001, round_trip=0.020),
}
ADDRESS = "tcp://127.0.0.1:5755"


def store_in(folder: Path, address: str = ADDRESS) -> PlannerStore:
    return PlannerStore(folder, manifest(VOCAB), address)


def new_pair(times: PairTimes) -> TimedPair:
    return TimedPair(TARGET_TABLE, DRAFT_TABLE, times)


def answer_seconds(
    pair: TimedPair, tokens: int, prompt: Sequence[int] = PROMPT, settings: DraftSettings = SETTINGS
) -> float:
    """The simulated seconds of an answer in a session of its own."""
    began = pair.now
    session = pair.session(settings, prompt)
    answer = list(session.answer(tokens))
    seconds = pair.now - began
    session.close()
    pair.run_until(pair.now + 2.0)  # the base station is idle
    assert len(answer) == tokens
    return seconds


def prompts() -> Iterator[list[int]]:
    """Many different prompts."""
    return ([first, second] for first in range(VOCAB) for second in range(VOCAB))


@dataclass(frozen=True)
class Starts:
    """Mean tokens per second of short answers, by what the process knows when it begins."""

    nothing: float
    welcome: float
    state: float
    both: float
    warmed: float


def measure(times: PairTimes, folder: Path, tokens: int = 32, answers: int = 20) -> Starts:
    """Short answers, each by a new process; in the end by one that has answered before."""
    warm = new_pair(times)
    warm.restart_device(store_in(folder))
    answer_seconds(warm, 600)
    warm.planners.keep(SETTINGS, warm.client.welcome)
    chosen = list(islice(prompts(), answers))

    def mean_rate(next_pair: Callable[[], TimedPair]) -> float:
        seconds = 0.0
        for prompt in chosen:
            pair = next_pair()
            seconds += answer_seconds(pair, tokens, prompt)
            pair.planners.keep(SETTINGS, pair.client.welcome)
        return tokens * answers / seconds

    def restarted(pair: TimedPair, with_state: bool) -> TimedPair:
        pair.restart_device(store_in(folder) if with_state else None)
        return pair

    return Starts(
        warmed=mean_rate(lambda: warm),
        nothing=mean_rate(lambda: new_pair(times)),
        welcome=mean_rate(lambda: restarted(warm, with_state=False)),
        state=mean_rate(lambda: restarted(new_pair(times), with_state=True)),
        both=mean_rate(lambda: restarted(warm, with_state=True)),
    )


def main() -> None:
    """Print the figures of each link."""
    for name, times in LINKS.items():
        with tempfile.TemporaryDirectory() as folder:
            starts = measure(times, Path(folder))
        figures = (f"{what} {rate:.1f}" for what, rate in vars(starts).items())
        sys.stdout.write(f"{name}: tokens/s {', '.join(figures)}\n")


if __name__ == "__main__":
    main()
