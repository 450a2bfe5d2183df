"""Authentication of devices: the addresses a base station may bind, and the answer to each CURVE handshake.

ZeroMQ sends a request for every handshake, after the device has proved that it
holds its secret key (ZAP, RFC 27; CURVE, RFC 26), and then attaches the key to each message.
"""

import logging

import zmq
from zmq.utils import z85

from basestation.key_folder import KeyFolder
from common.loopback import is_loopback
from protocol.errors import RevokedError, SettingsError

logger = logging.getLogger(__name__)

_ENDPOINT = "inproc://zeromq.zap.01"
_DOMAIN = b"edgedraft"


class Authenticator:
    """Admits enrolled keys, and reports those that are revoked later.

    Attributes:
        socket: receives ZeroMQ's requests; call ``answer`` when it is readable.
    """

    def __init__(self, keys: KeyFolder, context: "zmq.Context[zmq.Socket[bytes]]") -> None:
        self._keys = keys
        self._admitted: set[str] = set()
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
        name = self._keys.name_of(key) if key else None
        if name is None:
            logger.warning("refused a device at %s: key %r is not enrolled", address.decode(), key)
            self.socket.send_multipart([version, request, b"400", b"not enrolled", b"", b""])
            return
        logger.info("peer %s is %s, at %s", key[:8], name, address.decode())
        self._admitted.add(key)
        self.socket.send_multipart([version, request, b"200", b"", key.encode(), b""])

    def admits(self, key: str) -> bool:
        """Whether messages of a key are accepted; a connection outlives the enrolment of its key."""
        return key in self._admitted

    def revoked(self) -> list[str]:
        """Admitted keys that are not enrolled any more; each is returned once."""
        revoked = [key for key in self._admitted if self._keys.name_of(key) is None]
        self._admitted.difference_update(revoked)
        return revoked


def revocation() -> RevokedError:
    """The error for a device whose key was revoked."""
    return RevokedError("this device's key was revoked; ask the base station's operator to enroll a new one")


def check_bind(bind: str, allowed: bool) -> None:
    """Refuse an address that other machines can reach, unless ``allowed``.

    Raises:
        SettingsError: other machines can reach it.
    """
    if not allowed and not is_loopback(bind):
        raise SettingsError(
            "bind", bind, "tcp://127.0.0.1:PORT; for other machines add --keys DIR, or --insecure to admit every device"
        )
