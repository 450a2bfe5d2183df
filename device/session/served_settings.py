"""Settings of an answer that a base station serves, by what its Welcome tells."""

from device.session.client import Client
from device.settings import DraftSettings
from protocol.errors import ContextLengthError, SettingsError
from protocol.limits import option_name
from protocol.messages import SAMPLING_VERSION, Encoding, Sampling, Welcome


def check_draft_settings(settings: DraftSettings, welcome: Welcome) -> None:
    """Refuse what the base station does not serve.

    Raises:
        SettingsError: it is the mode, the draft length, the Drafts ahead or the number of entries.
    """
    encoding = settings.mode.encoding
    if settings.mode not in welcome.modes or (encoding and encoding not in welcome.encodings):
        raise SettingsError("mode", str(settings.mode), ", ".join(welcome.modes))
    if settings.draft_len is not None and settings.draft_len > welcome.max_draft_len:
        raise SettingsError("draft-len", settings.draft_len, f"1 to {welcome.max_draft_len}")
    if settings.drafts_ahead is not None and settings.drafts_ahead >= welcome.window:
        raise SettingsError("drafts-ahead", settings.drafts_ahead, f"0 to {welcome.window - 1}")
    if encoding is Encoding.SPARSE and settings.uplink_k > welcome.max_uplink_k:
        raise SettingsError("uplink-k", settings.uplink_k, f"1 to {welcome.max_uplink_k}")


def check_context_length(name: str, tokens: int, welcome: Welcome) -> None:
    """Check that tokens fit the target's context, with one that follows them.

    Raises:
        ContextLengthError: those called ``name`` do not.
    """
    most = welcome.context_length - 1
    if tokens > most:
        allowed = f"at most {most} (the target's context at the base station)"
        raise ContextLengthError(name, f"{tokens} tokens", allowed)


def check_prompt(tokens: int, cached: int, welcome: Welcome) -> None:
    """Check the length of a prompt of which ``cached`` tokens need not be sent.

    Raises:
        ContextLengthError: it does not fit the target's context, or exceeds the base station's limit.
    """
    check_context_length("prompt", tokens, welcome)
    new, most = tokens - cached, welcome.max_prompt_len
    if new > most:
        allowed = f"at most {most} at once (the base station's {option_name('max_prompt_len')})"
        raise ContextLengthError("prompt", f"{new} new tokens", allowed)


def check_sampling(sampling: Sampling, client: Client) -> None:
    """Check sampling settings against the version and the vocabulary of a greeted base station.

    Raises:
        SettingsError: the base station does not know a setting, or its target does not have a token.
    """
    version = client.welcome.version
    if version < SAMPLING_VERSION:
        for name in sampling.later_settings:
            allowed = f"left out: the base station speaks protocol version {version}, this needs {SAMPLING_VERSION}"
            raise SettingsError(name, getattr(sampling, name), allowed)
    length, most = len(sampling.grammar.encode()), client.welcome.max_grammar_len
    if length > most:
        allowed = f"at most {most} bytes (the base station's {option_name('max_grammar_len')})"
        reason = allowed if most else "left out: this base station has no grammars"
        raise SettingsError("grammar", f"{length} bytes", reason)
    check_token_ids(sampling, client.vocab_size)


def check_token_ids(sampling: Sampling, vocab_size: int) -> None:
    """Check the token ids in sampling settings.

    Raises:
        SettingsError: one of them is no id of a vocabulary with ``vocab_size`` tokens.
    """
    biased = [token_id for token_id, _ in sampling.logit_bias]
    for name, token_ids in (("logit_bias", biased), ("stop_token_ids", sampling.stop_token_ids)):
        if not all(0 <= token_id < vocab_size for token_id in token_ids):
            raise SettingsError(name, max(token_ids), f"token ids from 0 to {vocab_size - 1}")
