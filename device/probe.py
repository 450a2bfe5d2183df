"""The address of a base station, and why none answers there: what a plain TCP connection to it finds."""

import re
import socket
from typing import TypeAlias

from protocol.errors import LinkError, SettingsError

_Target: TypeAlias = tuple[socket.AddressFamily, tuple[str | int | bytes, ...]]

_TIMEOUT = 2.0
_ZMTP_SIGNATURE = b"\xff"
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


def needs_ipv6(address: str) -> bool:
    """Whether a host has no IPv4 address. libzmq tries one address alone, and most base stations listen on IPv4.

    Raises:
        SettingsError: it is not an address.
        LinkError: the host name does not resolve.
    """
    try:
        return _resolve(*endpoint(address))[0] is socket.AF_INET6
    except OSError as error:
        host, _ = endpoint(address)
        reason = error.strerror or error
        raise LinkError(
            f"the host {host!r} of {address!r} does not resolve ({reason}); check the name, or use an IP address"
        ) from error


def unreachable_reason(address: str) -> str:
    """What answers at an address at which no base station does."""
    try:
        family, target = _resolve(*endpoint(address))
        with socket.socket(family, socket.SOCK_STREAM) as connection:
            connection.settimeout(_TIMEOUT)
            connection.connect(target)
            return _what_answers(connection)
    except SettingsError:
        return "it is not a TCP address"
    except ConnectionRefusedError:
        return "nothing listens there"
    except OSError as error:
        return f"no connection is established ({error.strerror or error})"


def _resolve(host: str, port: int) -> _Target:
    """The first IPv4 address of a host, or its first IPv6 address if it has no other.

    Raises:
        OSError: the name does not resolve.
    """
    answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    found: list[_Target] = [(family, target) for family, *_, target in answers]
    return next((one for one in found if one[0] is socket.AF_INET), found[0])


def _is_host(host: str) -> bool:
    """Whether a name can be asked for: its labels have 1 to 63 characters."""
    try:
        return bool(host.encode("idna"))
    except UnicodeError:
        return False


def _what_answers(connection: socket.socket) -> str:
    try:
        greeting = connection.recv(16)
    except TimeoutError:
        greeting = b""
    if greeting.startswith(_ZMTP_SIGNATURE):
        return "a ZeroMQ peer listens there that does not reply to Hello"
    if not greeting:
        try:
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            greeting = connection.recv(16)
        except OSError:
            greeting = b""
    if greeting.startswith(b"HTTP/"):
        return "an HTTP server listens there; name the base station's own port, 5755 by default"
    return "what listens there is not a base station"
