"""The sampling settings of a request, as OpenAI, vLLM and llama-server name them."""

import secrets
from dataclasses import dataclass

from device.http.grammar_fields import read_grammar
from device.http.request_fields import ANY, Fields, as_number, field, number
from protocol.errors import SettingsError
from protocol.messages import MAX_BIASED_TOKENS, Sampling


@dataclass(frozen=True)
class SamplingDefaults:
    """Values for fields that a request leaves out; ``seed`` None draws a new one for each answer."""

    temperature: float
    top_k: int
    top_p: float
    seed: int | None


def read_sampling(fields: Fields, defaults: SamplingDefaults, logprobs: int | None = None) -> Sampling:
    """The sampling; greedy answers share one seed, so that a conversation can continue its session.

    Args:
        fields: of the request.
        defaults: for fields that it leaves out.
        logprobs: how many of the likeliest tokens are told with each token; None for no log-probabilities.

    Raises:
        SettingsError: a field has a value that is not allowed.
    """
    temperature = number(fields, "temperature", defaults.temperature)
    top_k = field(fields, "top_k", int, defaults.top_k, "a whole number")
    seed = field(fields, "seed", int, defaults.seed, "a whole number")
    if seed in (None, ANY):
        seed = secrets.randbits(63) if temperature else 0
    return Sampling(
        temperature,
        0 if top_k == ANY else top_k,
        number(fields, "top_p", defaults.top_p),
        seed,
        number(fields, "min_p", 0.0),
        number(fields, "repetition_penalty", 1.0),
        number(fields, "presence_penalty", 0.0),
        number(fields, "frequency_penalty", 0.0),
        _logit_bias(fields),
        field(fields, "min_tokens", int, 0, "a whole number"),
        field(fields, "ignore_eos", bool, False, "true or false"),
        _stop_token_ids(fields),
        read_grammar(fields),
        logprobs,
    )


def _logit_bias(fields: Fields) -> tuple[tuple[int, float], ...]:
    """The pairs of OpenAI's object, whose keys are token ids as text."""
    biases = field(fields, "logit_bias", dict, {}, "an object of token ids and numbers")
    if len(biases) > MAX_BIASED_TOKENS:
        raise SettingsError("logit_bias", f"{len(biases)} tokens", f"up to {MAX_BIASED_TOKENS}")
    for key in biases:
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise SettingsError("logit_bias", key, "token ids as keys")
    return tuple((int(key), as_number(f"logit_bias.{key}", bias)) for key, bias in biases.items())


def _stop_token_ids(fields: Fields) -> tuple[int, ...]:
    token_ids = field(fields, "stop_token_ids", list, [], "a list of token ids")
    if not all(type(token_id) is int for token_id in token_ids):
        raise SettingsError("stop_token_ids", token_ids, "a list of token ids")
    return tuple(token_ids)
