"""The target's log-probabilities, for sessions that ask for them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from protocol.logprobs import TokenLogprobs


def token_logprobs(logits: Tensor, token_ids: Sequence[int], most: int) -> tuple[TokenLogprobs, ...]:
    """The log-probabilities of tokens, and of the ``most`` likeliest ones at their positions.

    Args:
        logits: of the target, before any sampling setting, [len(token_ids) or more, V], float32.
        token_ids: one for each of the first rows.
        most: how many others.
    """
    logprobs = logits[: len(token_ids)].double().log_softmax(dim=-1).float()
    chosen = logprobs.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])[:, 0].tolist()
    values, ids = logprobs.topk(min(most, logits.shape[1]), dim=-1)
    tops = [tuple(zip(*row, strict=True)) for row in zip(ids.tolist(), values.tolist(), strict=True)]
    return tuple(TokenLogprobs(logprob, top) for logprob, top in zip(chosen, tops, strict=True))
