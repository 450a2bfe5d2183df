"""Check token for token that answers are the target's own.

At temperature 0 the reference is transformers' greedy generation; above it, in
mode ``coupled``, the target alone with the same seed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import torch
import typer
from transformers import AutoModelForCausalLM

from bench.setup.bench_setup import BenchSetup, bench_setup
from bench.setup.options import (
    BundleOption,
    CountOption,
    JsonOption,
    MaxNewTokensOption,
    PromptsOption,
    TargetOption,
    TemperatureOption,
    check_transformers_target,
    console,
    progress_bar,
)
from bench.setup.prompts import read_prompts
from bench.setup.results import Results, Row
from bench.setup.station_process import running_station
from device.settings import DraftSettings
from protocol.messages import Mode, Sampling

PROMPT_LEN = 512
TIE = 1e-3
"""If the two highest logits are closer than this, the order of additions can decide which one is the argmax."""
MAX_TIED_SHARE = 1 / 40
"""The command fails if a larger share of the prompts has a different answer, tied or not."""


def exact(
    bundle: BundleOption,
    target: TargetOption,
    prompts: PromptsOption = None,
    count: CountOption = 20,
    max_new_tokens: MaxNewTokensOption = 64,
    draft_lens: Annotated[
        list[int] | None,
        typer.Option("--draft-len", help="Tokens drafted per round; repeatable. Default: 1, 4, 8.", min=1),
    ] = None,
    temperature: TemperatureOption = 0.0,
    json_file: JsonOption = None,
) -> None:
    """Compare answers token for token with transformers, or with the target alone, in float32."""
    if temperature == 0:
        check_transformers_target(target)
    texts = read_prompts(prompts, count)
    lengths, sampling = draft_lens or [1, 4, 8], Sampling(temperature, seed=1)
    with (
        running_station(target, "float32") as address,
        bench_setup(bundle, address) as setup,
        progress_bar() as progress,
    ):
        task = progress.add_task("answers", total=len(texts) * (1 + len(lengths)))
        reference = Transformers(target) if sampling.greedy else TargetAlone(setup, sampling)
        found = differences(setup, reference, texts, max_new_tokens, sampling, lengths, lambda: progress.advance(task))
    settings: Row = {"target": target, "dtype": "float32", "temperature": temperature, "max_new_tokens": max_new_tokens}
    measured = Results(settings, [_row(length, found, len(texts)) for length in lengths])
    measured.show(console)
    measured.write(json_file)
    if any(not one.is_tie for one in found) or len({one.prompt for one in found}) > MAX_TIED_SHARE * len(texts):
        raise typer.Exit(1)


@dataclass(frozen=True)
class Difference:
    """Where an answer departs from the reference; ``gap`` is the reference's top-1 minus top-2 logit, if known."""

    prompt: int
    draft_len: int
    position: int
    gap: float | None

    @property
    def is_tie(self) -> bool:
        """Whether the two highest logits are equal up to rounding."""
        return self.gap is not None and self.gap <= TIE


class Reference(Protocol):
    """Generates the tokens that an answer must equal."""

    def generate(self, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
        """The ids that follow the prompt."""

    def gap(self, ids: Sequence[int]) -> float | None:
        """The top-1 minus top-2 logit after ``ids``, if known."""


class TargetAlone:
    """The target decoding alone at the same base station, with the same seed."""

    def __init__(self, setup: BenchSetup, sampling: Sampling) -> None:
        self._setup = setup
        self._settings = DraftSettings(Mode.TARGET, sampling, uplink_k=1, draft_len=1)

    def generate(self, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
        """The ids that follow the prompt."""
        return self._setup.answer(prompt_ids, max_new_tokens, self._settings).token_ids

    def gap(self, ids: Sequence[int]) -> None:
        """Unknown on the device."""


class Transformers:
    """``transformers`` generating greedily with the target in float32."""

    def __init__(self, target: str) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()

    @torch.inference_mode()
    def generate(self, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
        """The ids that follow the prompt."""
        row = torch.tensor([prompt_ids])
        output = self._model.generate(
            row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=max_new_tokens
        )
        ids: list[int] = output[0, len(prompt_ids) :].tolist()
        return ids

    @torch.inference_mode()
    def gap(self, ids: Sequence[int]) -> float:
        """The top-1 minus top-2 logit after ``ids``."""
        first, second = self._model(torch.tensor([ids])).logits[0, -1].topk(2).values.tolist()
        return float(first - second)


def differences(
    setup: BenchSetup,
    reference: Reference,
    prompts: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling,
    draft_lens: Sequence[int],
    advance: Callable[[], object],
) -> list[Difference]:
    """The answers in mode ``ids`` or ``coupled`` that differ from the reference, at the first differing token."""
    mode = Mode.IDS if sampling.greedy else Mode.COUPLED
    found = []
    for index, prompt in enumerate(prompts):
        prompt_ids = setup.prompt_ids(prompt, PROMPT_LEN)
        expected = reference.generate(prompt_ids, max_new_tokens)
        advance()
        for draft_len in draft_lens:
            settings = DraftSettings(mode, sampling, uplink_k=1, draft_len=draft_len, drafts_ahead=None)
            actual = setup.answer(prompt_ids, max_new_tokens, settings).token_ids
            advance()
            if actual != expected:
                position = _first_difference(actual, expected)
                gap = reference.gap([*prompt_ids, *expected[:position]])
                found.append(Difference(index, draft_len, position, gap))
    return found


def _first_difference(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _row(draft_len: int, found: Sequence[Difference], prompts: int) -> Row:
    of_length = [one for one in found if one.draft_len == draft_len]
    return {
        "case": f"draft length {draft_len}",
        "prompts": prompts,
        "differ": len(of_length),
        "differ_beyond_ties": sum(not one.is_tie for one in of_length),
        "largest_gap": max((one.gap for one in of_length if one.gap), default=None),
    }
