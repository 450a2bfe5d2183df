"""Tokens a second with drafting against the target alone, over the same link, in one run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.setup.bench_setup import BenchSetup
from bench.setup.results import Results, Value, number
from device.answer import Answer
from device.session import DraftSettings
from protocol.messages import Mode, Sampling

WARM_UP_TOKENS = 16


@dataclass(frozen=True)
class SpeedupSettings:
    """What is measured: ``max_new_tokens`` for each prompt, ``draft_len`` tokens a round, None planned."""

    max_new_tokens: int
    draft_len: int | None
    temperature: float
    uplink_k: int

    def cases(self) -> list[DraftSettings]:
        """The target alone, then every mode that the temperature allows."""
        sampling = Sampling(self.temperature, seed=1)
        modes = [Mode.TARGET, Mode.IDS] if sampling.greedy else [Mode.TARGET, Mode.COUPLED, Mode.TOPK, Mode.FULL]
        return [DraftSettings(mode, sampling, self.uplink_k, self.draft_len) for mode in modes]


def measure_speedup(
    place: BenchSetup, prompts: Sequence[str], settings: SpeedupSettings, advance: Callable[[], object]
) -> list[dict[str, Value]]:
    """A row a case. Cases take turns on each prompt, so that a drift of the machine's speed meets all alike."""
    cases = settings.cases()
    answers: dict[Mode, list[Answer]] = {case.mode: [] for case in cases}
    place.answer(place.prompt_ids(prompts[0]), WARM_UP_TOKENS, cases[-1])  # first passes are slow
    for prompt in prompts:
        for case in cases:
            answers[case.mode].append(place.answer(place.prompt_ids(prompt), settings.max_new_tokens, case))
            advance()
    rows = [_row(mode, done) for mode, done in answers.items()]
    for row in rows:
        row["speedup"] = number(row, "tokens_per_second") / number(rows[0], "tokens_per_second")
    return rows


def results(place: BenchSetup, rows: list[dict[str, Value]], settings: SpeedupSettings, dtype: str) -> Results:
    """The rows with all that they depend on."""
    manifest = place.model.manifest
    return Results(
        {
            "target": place.client.welcome.model,
            "target_dtype": dtype,
            "draft": manifest.name,
            "draft_precision": manifest.precision,
            "draft_len": settings.draft_len or "auto",
            "temperature": settings.temperature,
            "max_new_tokens": settings.max_new_tokens,
            "link": "loopback",
        },
        rows,
    )


def _row(mode: Mode, answers: Sequence[Answer]) -> dict[str, Value]:
    tokens = sum(len(answer.token_ids) for answer in answers)
    rounds = sum(answer.rounds for answer in answers)
    drafted = sum(answer.drafted for answer in answers)
    uplink = sum(answer.uplink_bytes for answer in answers)
    return {
        "case": str(mode),
        "tokens": tokens,
        "tokens_per_second": tokens / sum(answer.seconds for answer in answers),
        "acceptance_rate": sum(answer.accepted for answer in answers) / drafted if drafted else None,
        "tokens_per_round": tokens / rounds,
        "uplink_bytes_per_token": uplink / tokens,
        "downlink_bytes_per_token": sum(answer.downlink_bytes for answer in answers) / tokens,
    }


def full_vocabulary_bytes(vocab_size: int) -> int:
    """What one drafted token costs on the uplink when the whole distribution is sent in FP16."""
    return 2 * vocab_size
