"""A replica's link to its front: frames of devices come from there, replies and reports go there.

Knows devices by the peers that the front names, and of the engine what it reports.
"""

import contextlib
import os
import time
from collections.abc import Mapping
from typing import Any, Protocol

import zmq
from prometheus_client import generate_latest

from basestation.devices.device_socket import FrameReceiver
from basestation.devices.key_folder import EnrolledDevice
from basestation.devices.router import Turn
from basestation.engine.load import Load
from basestation.monitoring.metrics import Metrics
from basestation.replicas.inner_link import connect_inner
from basestation.replicas.inner_messages import Command, Report, decode_peer
from basestation.replicas.replica_settings import ReplicaOptions
from basestation.target.served_target import ServedTarget
from protocol.zmtp import CURVE_BYTES, socket_bytes

_REPORT_SECONDS = 1.0
_IDENTITY_BYTES = 4
_MAX_FAULTS = 50


class ReportingEngine(Protocol):
    """What a ``FrontLink`` reports of, and stops when the front says so."""

    @property
    def load(self) -> Load:
        """What runs now."""

    @property
    def draining(self) -> bool:
        """Whether no more sessions are opened."""

    def stop(self, drain_seconds: float = 0.0) -> None:
        """Stop, once open sessions had time to finish."""


class FrontLink:
    """A DEALER to the front, which it sends a report each second.

    Args:
        context: of the socket.
        options: where the front is.
        target: that is served.
        metrics: that are reported.

    Attributes:
        engine: what is reported of; set it before ``process``.
    """

    engine: ReportingEngine

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        options: ReplicaOptions,
        target: ServedTarget,
        metrics: Metrics,
    ) -> None:
        self.envelope_bytes = CURVE_BYTES if options.keyed else 0
        self._name = options.name
        self._target = target
        self._metrics = metrics
        identity = f"{options.name}-{os.urandom(_IDENTITY_BYTES).hex()}".encode()
        self._dealer = connect_inner(context, options.front, options.inner_key, identity)
        self._next_report = 0.0

    def register(self, poller: zmq.Poller) -> None:
        """Register what ``process`` reads."""
        poller.register(self._dealer, zmq.POLLIN)

    def process(self, ready: Mapping[Any, int], receiver: FrameReceiver) -> None:
        """Take what the front sent for a turn, and report sometimes."""
        if self._dealer in ready:
            self._receive(receiver)
        if time.monotonic() >= self._next_report:
            self._next_report = time.monotonic() + _REPORT_SECONDS
            self._report(None)

    def send(self, address: bytes, frame: bytes) -> None:
        """Send a frame to a device; it is dropped where there is no front. Devices repeat their requests."""
        with contextlib.suppress(zmq.Again):
            self._dealer.send_multipart([address, frame], zmq.NOBLOCK)

    def _receive(self, receiver: FrameReceiver) -> None:
        turn = Turn()
        with contextlib.suppress(zmq.Again):
            while True:
                head, *frame = self._dealer.recv_multipart(zmq.NOBLOCK)
                self._obey(Command(head[0]), head[1:], frame, receiver)
                if not turn.spend(sum(map(len, frame))):
                    return

    def _obey(self, command: Command, content: bytes, frame: list[bytes], receiver: FrameReceiver) -> None:
        match command:
            case Command.REQUEST:
                size = socket_bytes(frame[0], self.envelope_bytes)
                receiver.receive(decode_peer(content), frame[0], size)
            case Command.REVOKE:
                peer = decode_peer(content)
                receiver.revoke(EnrolledDevice(peer.name, peer.owner))
            case Command.DESCRIBE:
                self._report(self._target)
            case Command.DRAIN:
                self.engine.stop(float(content))
            case Command.PROBE:
                pass

    def _report(self, target: ServedTarget | None) -> None:
        engine, metrics = self.engine, generate_latest(self._metrics.registry).decode()
        faults = self._metrics.fleet.faults.newest(_MAX_FAULTS)
        report = Report(self._name, engine.load, engine.draining, target, metrics, faults)
        with contextlib.suppress(zmq.Again):
            self._dealer.send_multipart([b"", report.encode()], zmq.NOBLOCK)
