"""How often the draft model proposes the target's token, on the target's own text, by category of prompt.

Teacher-forced: the draft model sees the target's tokens, so every position counts. This estimates the probability
that a token is accepted, given that all before it in the round were.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from basestation.target.segment import Segment
from basestation.target.target_model import TargetModel
from basestation.verification.target_sampling import SamplingRow, sample_target_tokens
from bench.setup.options import (
    BundleOption,
    DtypeOption,
    JsonOption,
    TargetOption,
    TemperaturesOption,
    console,
    progress_bar,
)
from bench.setup.prompts import prompts_by_category
from bench.setup.results import Results, Row
from device.drafting.draft_model import SequenceModel
from device.drafting.drafter import Drafter
from device.drafting.load_model import load_model
from device.settings import UplinkSettings
from device.text.tokenizer import Tokenizer
from protocol.messages import Mode, Sampling


def agreement(
    bundle: BundleOption,
    target: TargetOption,
    prompts: Annotated[Path, typer.Option(help="Spec-Bench jsonl file: a category and turns in each line.")],
    dtype: DtypeOption = "bfloat16",
    per_category: Annotated[int, typer.Option(min=1, help="Prompts of a category, or all where it has fewer.")] = 2,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the target for each prompt.")] = 56,
    temperatures: TemperaturesOption = None,
    json_file: JsonOption = None,
) -> None:
    """Measure how often the draft model proposes the target's token, on the target's own text."""
    draft_model, target_model = load_model(bundle), TargetModel.load(target, dtype)
    tokenizer = Tokenizer(bundle, draft_model.manifest)
    by_category = prompts_by_category(prompts, per_category)
    samplings = [Sampling(temperature, seed=1) for temperature in temperatures or (0.0, 1.0)]
    rows: list[Row] = []
    with progress_bar() as progress:
        task = progress.add_task("prompts", total=len(samplings) * sum(map(len, by_category.values())))
        for sampling in samplings:
            counts: dict[str, list[bool]] = {}
            for category, texts in by_category.items():
                counts[category] = []
                for text in texts:
                    prompt = tokenizer.encode_chat([{"role": "user", "content": text}])
                    counts[category] += agreements(draft_model, target_model, prompt, sampling, max_new_tokens)
                    progress.advance(task)
            rows += agreement_rows(counts, sampling)
    settings: Row = {"draft": draft_model.manifest.name, "target": target_model.name, "dtype": dtype}
    measured = Results({**settings, "per_category": per_category, "max_new_tokens": max_new_tokens}, rows)
    measured.show(console)
    measured.write(json_file)


def agreements(
    draft_model: SequenceModel, target: TargetModel, prompt: list[int], sampling: Sampling, count: int
) -> list[bool]:
    """Whether each of up to ``count`` tokens of the target is what the draft model proposes there."""
    mode = Mode.IDS if sampling.greedy else Mode.COUPLED
    vocabulary = target.vocabulary
    drafter = Drafter(draft_model, mode, sampling, UplinkSettings(1, 1.0, 1), vocabulary.size, vocabulary.stop_ids)
    drafter.begin(prompt)
    kv_cache, tokens, found = target.new_kv_cache(), [*prompt], list[bool]()
    for _ in range(count):
        logits = target.forward([Segment(kv_cache, tokens[kv_cache.length :], num_logits=1)])
        chosen = int(sample_target_tokens(logits, [SamplingRow(sampling, len(tokens))])[0])
        found.append(drafter.draft(tokens, 1).token_ids == (chosen,))
        tokens.append(chosen)
        if chosen in vocabulary.stop_ids:
            break
    return found


def agreement_rows(counts: Mapping[str, Sequence[bool]], sampling: Sampling) -> list[Row]:
    """A row for each category, and one for all tokens."""
    everything = [one for category in counts.values() for one in category]
    return [
        {
            "case": "ids" if sampling.greedy else "coupled",
            "temperature": sampling.temperature,
            "category": name,
            "tokens": len(found),
            "agreement": float(np.mean(found)),
        }
        for name, found in {**counts, "all": everything}.items()
    ]
