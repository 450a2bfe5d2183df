"""The address of a base station, and why none answers there: what a plain TCP connection to it finds."""

import contextlib
import re
import socket
from typing import TypeAlias

from protocol.errors import LinkError, SettingsError
from protocol.zmtp import GREETING_BYTES, GREETING_START, is_zeromq, mechanism

Target: TypeAlias = tuple[socket.AddressFamily, tuple[str | int | bytes, ...]]

_TIMEOUT = 2.0
_DEFAULT_PORT = 5755
_HTTP = b"HTTP/"
_ADDRESS = re.compile(r"tcp://(?:\[([0-9A-Fa-f:.]+(?:%[\w.-]+)?)\]|([^\s/?#@:\[\]]+)):([0-9]{1,5})", re.ASCII)


def endpoint(address: str) -> tuple[str, int]:
    """Host and port of ``tcp://HOST:PORT``; an IPv6 address stands in brackets.

    Raises:
        SettingsError: it is not such an address.
    """
    if match := _ADDRESS.fullmatch(address):
        host, port = match[1] or match[2], int(match[3])
        if 0 < port < 2**16 and _is_host(host):
            return host, port
    raise SettingsError("server", address, "tcp://HOST:PORT, as tcp://10.0.0.5:5755 or tcp://[fd00::5]:5755")


def resolve(address: str) -> Target:
    """The IP address and port that the link connects to: libzmq tries one alone, and most base stations listen on IPv4.

    Returns:
        The first IPv4 address of the host, or its first IPv6 address if it has no other.

    Raises:
        SettingsError: it is not an address.
        LinkError: the host name does not resolve.
    """
    host, port = endpoint(address)
    try:
        answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        reason = error.strerror or error
        raise LinkError(
            f"the host {host!r} of {address!r} does not resolve ({reason}); check the name, or use an IP address"
        ) from error
    found: list[Target] = [(family, target) for family, *_, target in answers]
    return next((one for one in found if one[0] is socket.AF_INET), found[0])


def needs_ipv6(address: str) -> bool:
    """Whether a host has no IPv4 address.

    Raises:
        SettingsError: it is not an address.
        LinkError: the host name does not resolve.
    """
    return resolve(address)[0] is socket.AF_INET6


def unreachable_reason(address: str) -> str:
    """Why no base station answers at an address, and what to do."""
    try:
        mechanism_at(address)
    except SettingsError:
        return "it is not a TCP address"
    except LinkError as error:
        return str(error)
    return "a ZeroMQ peer listens there that does not reply to Hello; check that it is a base station, and its log"


def mechanism_at(address: str) -> str:
    """The security mechanism of the ZeroMQ peer at an address: ``NULL``, or ``CURVE`` where keys are used.

    Raises:
        SettingsError: it is not an address.
        LinkError: its host does not resolve or does not answer, or no ZeroMQ peer listens there.
    """
    family, target = resolve(address)
    with socket.socket(family, socket.SOCK_STREAM) as connection:
        connection.settimeout(_TIMEOUT)
        try:
            connection.connect(target)
        except ConnectionRefusedError as error:
            raise LinkError(
                "nothing listens there; start one with: edgedraft-basestation serve --target MODEL, or check the port, "
                f"by default {_DEFAULT_PORT}"
            ) from error
        except OSError as error:
            reason = error.strerror or error
            raise LinkError(
                f"no connection is established ({reason}); check the address, that the base station's machine is on, "
                "and firewalls in between"
            ) from error
        return _mechanism_of(connection)


def _is_host(host: str) -> bool:
    """Whether a name can be asked for: its labels have 1 to 63 characters."""
    try:
        return bool(host.encode("idna"))
    except UnicodeError:
        return False


def _mechanism_of(connection: socket.socket) -> str:
    """The mechanism in the greeting of a peer; other servers say nothing until they are asked."""
    greeting = _exchange(connection, b"", 1)
    if is_zeromq(greeting):
        return mechanism(greeting + _exchange(connection, GREETING_START, GREETING_BYTES - len(greeting)))
    greeting = greeting or _exchange(connection, b"GET / HTTP/1.0\r\n\r\n", len(_HTTP))
    if greeting.startswith(_HTTP):
        raise LinkError(f"an HTTP server listens there; name the base station's own port, {_DEFAULT_PORT} by default")
    raise LinkError(
        f"what listens there is not a base station; check the address and the port, by default {_DEFAULT_PORT}"
    )


def _exchange(connection: socket.socket, sent: bytes, least: int) -> bytes:
    """Send bytes, and receive at least as many, or what comes before the timeout or the end of the connection."""
    received = b""
    with contextlib.suppress(OSError):
        connection.sendall(sent)
        while len(received) < least and (part := connection.recv(GREETING_BYTES)):
            received += part
    return received
