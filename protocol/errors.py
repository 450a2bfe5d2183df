"""Every error that a user, a file or a peer can cause.

::

    EdgedraftError
    ├── SettingsError           a value that somebody chose is not allowed
    │   └── ContextLengthError  prompt or answer does not fit the model's context
    ├── ModelError              a model cannot be found, read or used
    │   ├── BundleError         a bundle is missing, damaged or of another format
    │   ├── QualityError           an exported model is too unlike the one it was made from
    │   └── MismatchError       draft and target model do not belong together
    ├── KeyFileError            a key is missing, damaged or open to others
    ├── LinkError               the other end cannot be reached
    ├── ClosingError            the base station is shutting down
    ├── FullError               the base station has no room for another session
    ├── BusyError               more requests wait already than are taken
    ├── AdmissionError          the two ends do not know each other's keys
    │   └── RevokedError        a device's key was taken back
    └── ProtocolError           what a peer sent is not allowed
        ├── FrameError          bytes that are no message
        ├── LimitError          more than the base station allows
        ├── StateError          a message that may not follow what came before
        │   └── UnknownSessionError  a request in a session that the base station does not have
        └── FaultError          the peer reported one of these errors to us

A message says the value, what is allowed and what to do; the command line
prints it in one line and leaves with the error's ``exit_code``.
"""

from typing import ClassVar


class EdgedraftError(Exception):
    """Root of the tree; ``code`` names the error on the wire.

    ``retry_seconds`` is after how long it is worth trying again, 0 where nobody can say.
    """

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1
    retry_seconds: int = 0


class SettingsError(EdgedraftError):
    """A value that somebody chose is not allowed.

    Args:
        name: the setting, as the user knows it.
        value: what was given.
        allowed: what would have been accepted.
    """

    code = "settings"
    exit_code = 2

    def __init__(self, name: str, value: object, allowed: str) -> None:
        super().__init__(f"{name} is {value!r}; allowed: {allowed}")
        self.name = name
        self.value = value
        self.allowed = allowed


class ContextLengthError(SettingsError):
    """Prompt or answer does not fit the model's context."""

    code = "context_length"


class ModelError(EdgedraftError):
    """A model cannot be found, read or used."""

    code = "model"


class BundleError(ModelError):
    """A bundle is missing, damaged or of another format."""

    code = "bundle"


class QualityError(ModelError):
    """An exported model is too unlike the model it was made from."""

    code = "quality"


class MismatchError(ModelError):
    """Draft and target model do not belong together."""

    code = "mismatch"


class KeyFileError(EdgedraftError):
    """A key is missing, damaged or open to others."""

    code = "key_file"


class LinkError(EdgedraftError):
    """The other end cannot be reached, or went away."""

    code = "link"


class ClosingError(EdgedraftError):
    """The base station is shutting down."""

    code = "closing"


class FullError(EdgedraftError):
    """The base station has no room for another session; it says when to come back."""

    code = "full"

    def __init__(self, text: str, retry_seconds: int = 0) -> None:
        super().__init__(text)
        self.retry_seconds = retry_seconds


class BusyError(EdgedraftError):
    """More requests wait already than are taken."""

    code = "busy"


class AdmissionError(EdgedraftError):
    """The two ends do not know each other's keys."""

    code = "admission"


class RevokedError(AdmissionError):
    """A device's key was taken back while it was in use."""

    code = "revoked"


class ProtocolError(EdgedraftError):
    """What a peer sent is not allowed."""

    code = "protocol"


class FrameError(ProtocolError):
    """Bytes that are no message."""

    code = "frame"


class LimitError(ProtocolError):
    """More than the base station allows.

    Args:
        option: the base station's setting.
        value: what was asked for.
        allowed: what it is set to.
    """

    code = "limit"

    def __init__(self, option: str, value: object, allowed: int) -> None:
        super().__init__(f"{value} where the base station's {option} allows {allowed}")


class StateError(ProtocolError):
    """A message that may not follow what came before."""

    code = "state"


class UnknownSessionError(StateError):
    """A request in a session that the base station does not have, or no longer.

    A device answers it by greeting again and opening a new session on all committed tokens.
    """

    code = "unknown_session"


class FaultError(ProtocolError):
    """The peer reported an error; ``fault_code`` is the ``code`` of one of the classes here."""

    code = "fault"

    def __init__(self, fault_code: str, text: str, retry_seconds: int = 0) -> None:
        super().__init__(f"the other end answered {fault_code!r}: {text}")
        self.fault_code = fault_code
        self.text = text
        self.retry_seconds = retry_seconds
