"""The slow and obvious twin of the sampling settings: one token at a time, in plain loops and float64."""

from collections.abc import Sequence
from math import exp, inf

import numpy as np
import numpy.typing as npt

from protocol.messages import Sampling
from tests.fakes import Table, next_logits

Logits = npt.NDArray[np.float64]


def slow_logits(
    logits: npt.NDArray[np.floating], sampling: Sampling, prompt: Sequence[int], answer: Sequence[int], stops: set[int]
) -> Logits:
    """The logits of the token after ``answer``, changed in the documented order."""
    biases = dict(sampling.logit_bias)
    changed = []
    for token_id, logit in enumerate(map(float, logits)):
        value = logit + biases.get(token_id, 0)
        if token_id in prompt or token_id in answer:
            value = value / sampling.repetition_penalty if value > 0 else value * sampling.repetition_penalty
        count = list(answer).count(token_id)
        value -= sampling.frequency_penalty * count + sampling.presence_penalty * (count > 0)
        changed.append(-inf if len(answer) < sampling.min_tokens and token_id in stops else value)
    if not sampling.greedy:
        largest = max(changed)
        changed = [-inf if exp(value - largest) < sampling.min_p else value for value in changed]
    return np.array(changed)


def slow_answer(
    table: Table, sampling: Sampling, prompt: Sequence[int], count: int, model_stops: Sequence[int]
) -> list[int]:
    """The target's own greedy answer."""
    stops = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else model_stops)}
    answer: list[int] = []
    while len(answer) < count and not (answer and answer[-1] in stops):
        logits = next_logits(table, [*prompt, *answer])
        answer.append(int(slow_logits(logits, sampling, prompt, answer, stops).argmax()))
    return answer
