"""What a base station allows: each limit a setting, with a name that its Faults tell."""

from dataclasses import dataclass, fields

from protocol.errors import LimitError, SettingsError


@dataclass(frozen=True)
class Limits:
    """The most of everything; checked before anything large is allocated.

    Attributes:
        max_prompt_len: tokens of an Open or Extend.
        max_draft_len: tokens of a Draft.
        max_uplink_k: entries of one distribution, mode ``full`` aside.
        max_sessions: open at once by one device.
        max_requests_per_second: of one device, over some seconds.
        window: Drafts under way in a session.
        idle_timeout: that a session is kept when its device is silent.
    """

    max_prompt_len: int = 131_072
    max_draft_len: int = 64
    max_uplink_k: int = 4096
    max_sessions: int = 16
    max_requests_per_second: int = 500
    window: int = 4
    idle_timeout: int = 600

    def __post_init__(self) -> None:
        for entry in fields(self):
            if getattr(self, entry.name) < 1:
                raise SettingsError(option_name(entry.name), getattr(self, entry.name), "1 and more")

    def check(self, name: str, value: int) -> None:
        """Hold a value against the limit ``name``.

        Raises:
            LimitError: it is more.
        """
        allowed = getattr(self, name)
        if value > allowed:
            raise LimitError(option_name(name), value, allowed)


def option_name(name: str) -> str:
    """A setting as the command line calls it."""
    return "--" + name.replace("_", "-")
