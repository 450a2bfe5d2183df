"""The target's log-probabilities of a prompt, in a session of their own.

The prompt's tokens are sent as given Drafts, as many at a time as a Draft may have.
The token that the target puts after them is removed by an Extend, which repeats the
last of them.
"""

from collections.abc import Callable, Sequence

from device.session.client import Client
from device.session.served_settings import check_context_length, check_sampling
from device.session.session_requests import SessionRequests
from protocol.logprobs import TokenLogprobs
from protocol.messages import Mode, Sampling


def prompt_logprobs(
    client: Client, prompt_ids: Sequence[int], most: int, make_room: Callable[[], None] = lambda: None
) -> list[TokenLogprobs]:
    """The log-probabilities of all tokens of a prompt but the first.

    Args:
        client: the greeted base station.
        prompt_ids: one token or more.
        most: how many of the likeliest tokens are told with each.
        make_room: called before the session is opened, once the request is checked.

    Raises:
        SettingsError: the base station tells no log-probabilities.
        ContextLengthError: the prompt does not fit the target's context.
    """
    check_context_length("prompt", len(prompt_ids), client.welcome)
    sampling = Sampling(logprobs=most)
    check_sampling(sampling, client)
    make_room()
    tokens: list[int] = []
    requests = SessionRequests(client, Mode.TARGET, sampling, tokens)
    told: list[TokenLogprobs] = []
    try:
        requests.open(prompt_ids[:1])
        tokens[:] = prompt_ids[:1]
        while len(tokens) < len(prompt_ids):
            if told:
                requests.extend(len(tokens) - 1, tokens[-1:], sampling)
            given = prompt_ids[len(tokens) : len(tokens) + client.welcome.max_draft_len]
            told += _given(requests, given)
            tokens += given
    finally:
        requests.close()
    return told


def _given(requests: SessionRequests, token_ids: Sequence[int]) -> Sequence[TokenLogprobs]:
    """The log-probabilities of the next tokens, across restarts of the base station."""
    while True:
        requests.send_given(token_ids)
        if verdict := requests.verdict():
            return verdict.logprobs[: len(token_ids)]
