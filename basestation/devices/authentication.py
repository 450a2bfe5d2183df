"""Authentication of devices: the addresses a base station may bind, and the answer to each CURVE handshake.

ZeroMQ sends a request for every handshake, after the device has proved that it
holds its secret key (ZAP, RFC 27; CURVE, RFC 26), and then attaches the key to each message.
"""

import logging
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

import zmq
from zmq.utils import z85

from basestation.devices.key_folder import EnrolledDevice, KeyFolder
from basestation.devices.peer import UNNAMED
from basestation.devices.quarantine import HandshakeLog
from common.loopback import is_loopback
from protocol.errors import KeyFileError, RevokedError, SettingsError

if TYPE_CHECKING:
    from basestation.monitoring.metrics import Metrics  # imports PyTorch, which the commands for keys do not need

logger = logging.getLogger(__name__)

_BIND = re.compile(r"tcp://(\[[^]/]+\]|[^][/]+):(\d+|\*)|ipc://.+")
_ENDPOINT = "inproc://zeromq.zap.01"
_DOMAIN = b"edgedraft"
_STATUS = {True: (b"200", b""), False: (b"400", b"not enrolled"), None: (b"300", b"try again")}
"""ZAP status codes: success, refused, temporary error. Of a refusal, libzmq sends the device the code alone."""
_REVOKED = b"500", b"revoked"
"""ZAP has no code for it; 500, an internal error, is not used otherwise."""


class Authenticator:
    """Admits enrolled keys, and reports those that are revoked later.

    A key whose file cannot be looked at is neither: who was admitted stays so, and a
    new connection is closed without a refusal, so that the device tries again.

    Args:
        keys: of the base station and the enrolled devices.
        context: of the socket that is guarded.
        metrics: count the files that could not be looked at.
        handshakes: is told of each handshake before it is answered, and knows the keys in quarantine.

    Attributes:
        socket: receives ZeroMQ's requests; call ``answer`` when it is readable.
    """

    def __init__(
        self,
        keys: KeyFolder,
        context: "zmq.Context[zmq.Socket[bytes]]",
        metrics: "Metrics",
        handshakes: HandshakeLog | None = None,
    ) -> None:
        self._keys = keys
        self._metrics = metrics
        self._handshakes = handshakes
        self._admitted: dict[str, str] = {}
        """Names by key."""
        self._watched: set[str] = set()
        self._unreadable: set[str] = set()
        self.socket = context.socket(zmq.REP)
        self.socket.bind(_ENDPOINT)

    def guard(self, router: "zmq.Socket[bytes]") -> None:
        """Require admission on a socket, before it is bound."""
        router.setsockopt(zmq.CURVE_SERVER, 1)
        router.setsockopt(zmq.CURVE_SECRETKEY, self._keys.secret_key.encode())
        router.setsockopt(zmq.ZAP_DOMAIN, _DOMAIN)
        router.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without it ZeroMQ admits every device when nobody answers

    def answer(self) -> None:
        """Answer one request: version, request id, domain, address, identity, mechanism, credentials."""
        version, request, _, address, _, mechanism, *credentials = self.socket.recv_multipart()
        key = z85.encode(credentials[0]).decode() if mechanism == b"CURVE" else ""
        enrolled = self._is_enrolled(key) if key else False
        if enrolled and self._handshakes:
            enrolled = self._handshakes.admit(key) or None
        status, text = _STATUS[enrolled]
        if enrolled is False:
            status, text = self._refusal(key)
            logger.warning("refused a device at %s: key %r is %s", address.decode(), key, text.decode())
        if enrolled:
            self._admitted[key] = self._read_name(key)
            logger.info("peer %s is %s, at %s", key[:8], self._admitted[key], address.decode())
        self.socket.send_multipart([version, request, status, text, key.encode() if enrolled else b"", b""])

    def admits(self, key: str) -> bool:
        """Whether messages of a key are accepted; a connection outlives its key."""
        return key in self._admitted

    def name_of(self, key: str) -> str:
        """The name under which an admitted key was enrolled when it last connected."""
        return self._admitted.get(key, UNNAMED)

    def watch(self, keys: Iterable[str]) -> None:
        """Have the next ``revoked`` look at these too, which another process may have admitted."""
        self._watched.update(key for key in keys if key not in self._admitted)

    def revoked(self) -> list[EnrolledDevice]:
        """Devices that are not enrolled any more: those admitted, each returned once, and those of ``watch``."""
        keys = [key for key in self._watched | self._admitted.keys() if self._is_enrolled(key) is False]
        self._watched.clear()
        return [EnrolledDevice(self._admitted.pop(key, "") or self._read_name(key), key) for key in keys]

    def _is_enrolled(self, key: str) -> bool | None:
        """Whether a key is enrolled; where that cannot be looked up, True if it was admitted before, else None."""
        try:
            enrolled = self._keys.is_enrolled(key)
        except KeyFileError as error:
            self._metrics.count_unreadable_key()
            if key not in self._unreadable:
                logger.error("cannot tell whether a key is enrolled: %s", error)  # noqa: TRY400 - the message contains the reason
            if key in self._admitted or key in self._watched:  # of others there may be any number
                self._unreadable.add(key)
            return True if key in self._admitted else None
        self._unreadable.discard(key)
        return enrolled

    def _refusal(self, key: str) -> tuple[bytes, bytes]:
        """Status code and text for a key that is not enrolled."""
        try:
            revoked = bool(key) and self._keys.is_revoked(key)
        except KeyFileError as error:
            logger.error("cannot tell whether a key is revoked: %s", error)  # noqa: TRY400 - the message contains the reason
            revoked = False
        return _REVOKED if revoked else _STATUS[False]

    def _read_name(self, key: str) -> str:
        try:
            return self._keys.name_of(key) or self._keys.revoked_name_of(key) or UNNAMED
        except KeyFileError as error:
            logger.error("cannot tell the name of a key: %s", error)  # noqa: TRY400 - the message contains the reason
            return self.name_of(key)


def revocation() -> RevokedError:
    """The error for a device whose key was revoked."""
    return RevokedError("this device's key was revoked; ask the base station's operator to enroll a new one")


def check_bind(bind: str, allowed: bool) -> None:
    """Refuse an address that other machines can reach, unless ``allowed``.

    Raises:
        SettingsError: other machines can reach it, or it is no endpoint.
    """
    if not _BIND.fullmatch(bind):
        raise SettingsError("bind", bind, "tcp://ADDRESS:PORT, such as tcp://127.0.0.1:5755")
    if not allowed and not is_loopback(bind):
        raise SettingsError(
            "bind", bind, "tcp://127.0.0.1:PORT; for other machines add --keys DIR, or --insecure to admit every device"
        )
