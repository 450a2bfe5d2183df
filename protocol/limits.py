"""The limits of a base station. Each is an option, which Faults name."""

from dataclasses import dataclass, fields

from protocol.errors import LimitError, SettingsError

MAX_DRAFT_LEN = 255
"""The largest ``max_draft_len``: a Verdict may have the log-probabilities of a token more, in one array of a frame."""


@dataclass(frozen=True)
class Limits:
    """Limits, checked before anything large is allocated.

    Attributes:
        max_prompt_len: tokens in an Open or Extend.
        max_draft_len: tokens in a Draft.
        max_uplink_k: entries of a distribution, except in mode ``full``.
        max_sessions: open sessions per device.
        max_grammar_len: bytes of a grammar.
        max_requests_per_second: requests per device, averaged over a few seconds.
        window: Drafts in flight per session.
        idle_timeout: seconds after which an idle session is dropped.
        max_bytes_per_second: bytes received per device, averaged over a few seconds.
        max_held_bytes: bytes held per device for requests that wait and for its sessions, besides their KV caches.
    """

    max_prompt_len: int = 131_072
    max_draft_len: int = 64
    max_uplink_k: int = 4096
    max_sessions: int = 16
    max_requests_per_second: int = 500
    window: int = 4
    idle_timeout: int = 600
    max_bytes_per_second: int = 32 * 2**20
    max_held_bytes: int = 64 * 2**20
    max_grammar_len: int = 64 * 2**10

    def __post_init__(self) -> None:
        for entry in fields(self):
            most = MAX_DRAFT_LEN if entry.name == "max_draft_len" else 2**31 - 1
            if not 1 <= getattr(self, entry.name) <= most:
                raise SettingsError(option_name(entry.name), getattr(self, entry.name), f"1 or more, up to {most}")

    def check(self, name: str, value: int) -> None:
        """Check a value against the limit ``name``.

        Raises:
            LimitError: the value exceeds the limit.
        """
        allowed = getattr(self, name)
        if value > allowed:
            raise LimitError(option_name(name), value, allowed)


def option_name(name: str) -> str:
    """The command-line option of a setting."""
    return "--" + name.replace("_", "-")
