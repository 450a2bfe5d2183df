"""How much memory a decoded message takes."""

from protocol.full_distribution import FullDistribution
from protocol.messages import Draft, DraftDistribution, Extend, Message, Open, Sampling

_ID_BYTES = 40
"""An int and its place in a tuple."""
_BIAS_BYTES = 128
"""A pair of an int and a float, and its place in a tuple."""


def held_bytes(message: Message) -> int:
    """Bytes that a message takes as long as it is held; small ones count as 0."""
    match message:
        case Open():
            return len(message.prompt_ids) * _ID_BYTES + _sampling_bytes(message.sampling)
        case Extend():
            sampling = _sampling_bytes(message.sampling) if message.sampling else 0
            return len(message.token_ids) * _ID_BYTES + sampling
        case Draft():
            return len(message.token_ids) * _ID_BYTES + sum(map(_distribution_bytes, message.distributions))
    return 0


def _sampling_bytes(sampling: Sampling) -> int:
    return len(sampling.logit_bias) * _BIAS_BYTES + len(sampling.grammar)


def _distribution_bytes(distribution: DraftDistribution) -> int:
    if isinstance(distribution, FullDistribution):
        return distribution.fp16.nbytes
    return distribution.support.nbytes + distribution.weights.nbytes
