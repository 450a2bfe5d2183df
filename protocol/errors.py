"""Every error that a user, a file or a peer can cause.

::

    EdgedraftError
    ├── SettingsError           a setting has an invalid value
    │   └── ContextLengthError  the prompt or the answer exceeds the context length
    ├── GrammarError            a grammar cannot be compiled or applied
    │   └── TransientGrammarError  a grammar cannot be compiled now
    ├── ModelError              a model cannot be found, read or used
    │   ├── BundleError         a bundle is missing, damaged or has another format version
    │   ├── QualityError        an exported model differs too much from its target
    │   ├── NonFiniteError      a model's logits are NaN or infinite
    │   └── MismatchError       draft and target model are incompatible
    ├── KeyFileError            a key file is missing, damaged or readable by others
    ├── LinkError               the other end cannot be reached
    ├── ClosingError            the base station is shutting down
    ├── FullError               the base station has no capacity for another session
    ├── BusyError               the request queue is full
    ├── OverloadError           peers take more memory than the base station has for them
    ├── CancelledError          nobody waits for the answer any more
    ├── AdmissionError          one end does not have the other's key
    │   └── RevokedError        a device's key was revoked
    └── ProtocolError           a peer sent something invalid
        ├── FrameError          bytes that are not a valid message
        ├── LimitError          a request exceeds a limit of the base station
        ├── StateError          a message is not allowed in the session's state
        │   └── UnknownSessionError  a request names a session that the base station does not have
        └── FaultError          the peer reported an error

A message states the value, what is allowed and what to do; the command line
prints it in one line and exits with the error's ``exit_code``.
"""

from typing import ClassVar


class EdgedraftError(Exception):
    """Root of the tree; ``code`` names the error on the wire.

    ``retry_seconds`` is the time to wait before a retry; 0 if unknown.
    """

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1
    retry_seconds: int = 0


class SettingsError(EdgedraftError):
    """A setting has an invalid value.

    Args:
        name: the setting, as the user knows it.
        value: the given value; None if it is missing.
        allowed: the allowed values.
    """

    code = "settings"
    exit_code = 2

    def __init__(self, name: str, value: object, allowed: str) -> None:
        super().__init__(f"{name} is {'missing' if value is None else repr(value)}; allowed: {allowed}")
        self.name = name
        self.value = value
        self.allowed = allowed

    def __reduce__(self) -> tuple[type["SettingsError"], tuple[str, object, str]]:
        return type(self), (self.name, self.value, self.allowed)


class ContextLengthError(SettingsError):
    """The prompt or the answer exceeds the model's context length."""

    code = "context_length"


class GrammarError(EdgedraftError):
    """A grammar cannot be compiled or applied."""

    code = "grammar"
    exit_code = 2


class TransientGrammarError(GrammarError):
    """A grammar cannot be compiled now, for a reason other than the grammar itself; it may be compiled later."""

    retry_seconds = 5


class ModelError(EdgedraftError):
    """A model cannot be found, read or used."""

    code = "model"


class BundleError(ModelError):
    """A bundle is missing, damaged or has another format version."""

    code = "bundle"


class QualityError(ModelError):
    """An exported model differs too much from its target."""

    code = "quality"


class NonFiniteError(ModelError):
    """A model's logits are NaN or infinite."""

    code = "non_finite"


class MismatchError(ModelError):
    """Draft and target model are incompatible."""

    code = "mismatch"


class KeyFileError(EdgedraftError):
    """A key file is missing, damaged or readable by others."""

    code = "key_file"


class LinkError(EdgedraftError):
    """The other end cannot be reached, or the connection was lost."""

    code = "link"


class ClosingError(EdgedraftError):
    """The base station is shutting down."""

    code = "closing"


class FullError(EdgedraftError):
    """The base station has no capacity for another session; ``retry_seconds`` tells when to retry."""

    code = "full"

    def __init__(self, text: str, retry_seconds: int = 0) -> None:
        super().__init__(text)
        self.retry_seconds = retry_seconds


class BusyError(EdgedraftError):
    """The request queue is full."""

    code = "busy"


class OverloadError(EdgedraftError):
    """Peers take more memory than the base station has for them; its process must end."""

    code = "overload"


class CancelledError(EdgedraftError):
    """Nobody waits for the answer any more."""

    code = "cancelled"


class AdmissionError(EdgedraftError):
    """One end does not have the other's key."""

    code = "admission"


class RevokedError(AdmissionError):
    """A device's key was revoked."""

    code = "revoked"


class ProtocolError(EdgedraftError):
    """A peer sent something invalid."""

    code = "protocol"


class FrameError(ProtocolError):
    """Bytes that are not a valid message."""

    code = "frame"


class LimitError(ProtocolError):
    """A request exceeds a limit of the base station.

    Args:
        option: the base station's option.
        value: the requested value.
        allowed: the value of the option.
        retry_seconds: after which the same request is allowed; 0 for never.
    """

    code = "limit"

    def __init__(self, option: str, value: object, allowed: int, retry_seconds: int = 0) -> None:
        super().__init__(f"{value} exceeds the base station's {option} of {allowed}")
        self.retry_seconds = retry_seconds


class StateError(ProtocolError):
    """A message is not allowed in the session's state."""

    code = "state"


class UnknownSessionError(StateError):
    """A request names a session that the base station does not have, or has dropped.

    The device then sends Hello again and opens a new session on all committed tokens.
    """

    code = "unknown_session"


class FaultError(ProtocolError):
    """The peer reported an error; ``fault_code`` is the ``code`` of one of these classes.

    ``session_id`` is the session that it ended; None where it concerns the whole connection.
    """

    code = "fault"

    def __init__(self, fault_code: str, text: str, retry_seconds: int = 0, session_id: int | None = None) -> None:
        super().__init__(f"the other end answered {fault_code!r}: {text}")
        self.fault_code = fault_code
        self.text = text
        self.retry_seconds = retry_seconds
        self.session_id = session_id
