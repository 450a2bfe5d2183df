"""How often the draft model's second choice is the target's token where its first is rejected.

This bounds how often a Draft prepared for a rejection could be used. Both models see the
draft model's own text: up to a rejection it is the target's too.
"""

import numpy as np

from basestation.target.target_model import TargetModel
from bench.setup.options import (
    BundleOption,
    CountOption,
    DtypeOption,
    JsonOption,
    PromptsOption,
    RoundsOption,
    TargetOption,
    TemperaturesOption,
    console,
    progress_bar,
)
from bench.setup.results import Results, Row
from bench.uplink.positions import Corpus, Position, collect, load_draft_model
from protocol.coupling import PositionNoise
from protocol.messages import Sampling

TEMPERATURES = (0.0, 1.0)


def choices(
    bundle: BundleOption,
    target: TargetOption,
    dtype: DtypeOption = "float32",
    prompts: PromptsOption = None,
    count: CountOption = 20,
    rounds: RoundsOption = 8,
    temperatures: TemperaturesOption = None,
    json_file: JsonOption = None,
) -> None:
    """Measure how often the draft model's second choice is right where its first is rejected."""
    draft_model, prompt_ids = load_draft_model(bundle, prompts, count)
    target_model = TargetModel.load(target, dtype)
    samplings = [Sampling(temperature, seed=1) for temperature in temperatures or TEMPERATURES]
    rows: list[Row] = []
    with progress_bar() as progress:
        task = progress.add_task("prompts", total=len(prompt_ids) * len(samplings))
        for sampling in samplings:
            corpus = collect(draft_model, target_model, prompt_ids, rounds, sampling, lambda: progress.advance(task))
            rows.append(choice_row(corpus))
    manifest = draft_model.manifest
    settings: Row = {"draft": manifest.name, "precision": manifest.precision, "target": target_model.name}
    measured = Results({**settings, "dtype": dtype, "prompts": count}, rows)
    measured.show(console)
    measured.write(json_file)


def choice_row(corpus: Corpus) -> Row:
    """The shares of positions where the first choice and the second are right, and the second's of the rejections."""
    ranks = [_rank(one, corpus.sampling) for one in corpus.positions]
    first, second = ranks.count(0), ranks.count(1)
    rejected = len(ranks) - first
    return {
        "case": "ids" if corpus.sampling.greedy else "coupled",
        "temperature": corpus.sampling.temperature,
        "positions": len(ranks),
        "first_right": first / len(ranks),
        "second_right": second / len(ranks),
        "second_right_of_rejected": second / rejected if rejected else None,
    }


def _rank(position: Position, sampling: Sampling) -> int:
    """How many tokens the draft model prefers to the target's; with the shared noise above temperature 0."""
    with np.errstate(divide="ignore"):  # tokens of probability 0
        target_scores = np.log(position.target_probs.astype(np.float64))
    draft_scores = position.logits.astype(np.float64)
    if not sampling.greedy:
        noise = PositionNoise(sampling.seed, position.index, len(draft_scores)).of(np.arange(len(draft_scores)))
        target_scores, draft_scores = target_scores + noise, draft_scores / sampling.temperature + noise
    return int(np.count_nonzero(draft_scores > draft_scores[target_scores.argmax()]))
