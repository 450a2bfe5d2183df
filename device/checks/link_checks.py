"""Checks of the link, in the order in which a connection is made: from the address to its round trip and rates.

Each finds one kind of fault, so that a wrong address, a wrong key and a wrong model do not look alike.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

from common.checks import Finding, Status
from common.loopback import is_loopback
from device.link.curve_keys import CurveKeys
from device.link.link import Link, SocketTransport
from device.link.probe import endpoint, mechanism_at, resolve
from device.session.client import Client
from protocol.bundle import Manifest
from protocol.errors import LinkError
from protocol.frames import FrameCodec
from protocol.messages import VOCABULARY_VERSION, Hello, Welcome

_GREETINGS = 5
_BURST = 32
"""Messages that measure a rate."""
_PADDING = tuple(range(2**31, 2**31 + 255))
"""As stop ids they make a Hello large; from version 3 on the base station does not use those of a Hello."""
_INSTANT = 1e-6


@dataclass(frozen=True)
class Rates:
    """What a link carries at least, in bytes per second."""

    uplink: float
    downlink: float


def address(server: str) -> Finding[str]:
    """Check the form of the address.

    Raises:
        SettingsError: it is not an address.
    """
    host, port = endpoint(server)
    return Finding(f"host {host}, port {port}", server)


def name(server: str) -> Finding[str]:
    """Resolve the host.

    Raises:
        LinkError: it does not resolve.
    """
    (host, _), (_, target) = endpoint(server), resolve(server)
    return Finding("an IP address" if host == target[0] else f"{host} is {target[0]!s}", server)


def port(server: str) -> Finding[None]:
    """Find out what listens at the address.

    Raises:
        LinkError: nobody does, or not a ZeroMQ peer.
    """
    try:
        mechanism = mechanism_at(server)
    except LinkError as error:
        raise LinkError(f"{server}: {error}") from error
    return Finding(f"a ZeroMQ peer listens; its security mechanism is {mechanism}", None)


def keys(server: str, read: Callable[[], CurveKeys | None]) -> Finding[CurveKeys | None]:
    """Read the keys.

    Raises:
        SettingsError: one is given without the other.
        KeyFileError: a key file cannot be used.
    """
    pair = read()
    if pair is not None:
        return Finding(f"this device's is {pair.public}, the base station's {pair.station}", pair)
    if is_loopback(server):
        return Finding("none; on loopback none are needed", None)
    return Finding("none: the link is not encrypted", None, Status.WARNING, "see keys in docs/operations.md")


def handshake(server: str, timeout: float, pair: CurveKeys | None) -> Finding[None]:
    """Connect, without sending a message.

    Raises:
        AdmissionError: the two ends do not know each other's keys.
        LinkError: no connection is established within ``timeout`` seconds.
    """
    transport = SocketTransport(server, FrameCodec(1).max_frame_bytes, pair)
    try:
        end = time.monotonic() + timeout
        while not transport.connections and (left := end - time.monotonic()) > 0:
            transport.receive(left)
    finally:
        transport.close()
    if not transport.connections:
        raise LinkError(f"not completed within {timeout:g} s; try again, or look at the base station's log")
    return Finding(
        "both ends know each other's key; the link is encrypted" if pair else "completed, without keys", None
    )


def vocabulary(connect: Callable[[Manifest], Client], manifest: Manifest) -> Finding[Client]:
    """Greet the base station; the caller closes the client.

    Raises:
        FaultError: the base station refuses the draft model.
        LinkError: what listens there does not answer.
    """
    client = connect(manifest)
    welcome = client.welcome
    text = (
        f"{manifest.vocab_size} tokens, as those of the target {welcome.model}; "
        f"context {welcome.context_length}, protocol version {welcome.version}"
    )
    return Finding(text, client)


def round_trip(timeout: float, client: Client) -> Finding[float]:
    """Measure the time from a Hello to its Welcome; the value is the median in seconds."""
    seconds = []
    for _ in range(_GREETINGS):
        began = time.monotonic()
        client.greet(timeout)
        seconds.append(time.monotonic() - began)
    middle = median(seconds)
    text = f"{1e3 * middle:.1f} ms, from {1e3 * min(seconds):.1f} to {1e3 * max(seconds):.1f} in {_GREETINGS} greetings"
    return Finding(text, middle)


def rates(timeout: float, manifest: Manifest, client: Client) -> Finding[Rates | None]:
    """Measure both directions with bursts of Hellos; a fast link is faster than the base station answers them.

    Raises:
        LinkError: an answer is lost.
    """
    version = client.welcome.version
    if version < VOCABULARY_VERSION:
        return Finding(f"the base station speaks version {version}", None, Status.NOT_CHECKED)
    small = Hello(version, manifest.vocab_size, bytes.fromhex(manifest.vocabulary_hash), manifest.stop_ids)
    count = min(_BURST, client.welcome.max_requests_per_second)
    up, _ = _burst(client.link, replace(small, stop_ids=_PADDING), count, timeout)
    _, down = _burst(client.link, small, count, timeout)
    return Finding(f"at least {_megabits(up)} up and {_megabits(down)} down", Rates(up, down))


def _burst(link: Link, hello: Hello, count: int, timeout: float) -> tuple[float, float]:
    """Bytes per second in both directions, from the first to the last of ``count`` answers."""
    before = link.uplink_bytes, link.downlink_bytes
    for _ in range(count):
        link.send(hello)
    arrived: list[float] = []
    while len(arrived) < count:
        message = link.receive(timeout)
        if message is None:
            raise LinkError(f"{count - len(arrived)} of {count} Hellos got no answer; is the link unstable?")
        if isinstance(message, Welcome):
            arrived.append(time.monotonic())
    share = (count - 1) / count / max(arrived[-1] - arrived[0], _INSTANT)
    return share * (link.uplink_bytes - before[0]), share * (link.downlink_bytes - before[1])


def _megabits(bytes_per_second: float) -> str:
    return f"{8e-6 * bytes_per_second:.2g} Mbit/s"
