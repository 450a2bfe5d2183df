"""Whether samples have a distribution: that of whole answers of a target that is a table, and when a test fails."""

from collections import Counter
from collections.abc import Sequence
from itertools import product

import numpy as np
from scipy.stats import chisquare

from protocol.messages import Sampling
from tests.fakes import Table, random_table
from tests.slow_verify import target_probs

SMALL = random_table(3, seed=4, sharpness=0.8)
"""A target of few tokens, so that whole answers can be counted."""
FALSE_ALARM = 1e-4
"""A p-value below this fails a test; samples of planted defects must have a far smaller one."""


def answers_p_value(
    counted: Counter[tuple[int, ...]], table: Table, prompt: Sequence[int], sampling: Sampling
) -> float:
    """Of the hypothesis that answers of one length to ``prompt``, counted, are sampled from the target alone."""
    answers = list(product(range(table.shape[-1]), repeat=len(next(iter(counted)))))
    probs = np.array([_probability(answer, table, prompt, sampling) for answer in answers])
    expected = counted.total() * probs / probs.sum()
    return float(chisquare([counted[answer] for answer in answers], expected).pvalue)


def _probability(answer: Sequence[int], table: Table, prompt: Sequence[int], sampling: Sampling) -> float:
    tokens, probability = [*prompt], 1.0
    for token_id in answer:
        probability *= float(target_probs(table[tokens[-2], tokens[-1]], sampling)[token_id])
        tokens.append(token_id)
    return probability
