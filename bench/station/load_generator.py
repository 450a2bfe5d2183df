"""Runs many replay clients against a base station, each over a socket of its own, in one thread."""

import heapq
import math
import time
from collections.abc import Sequence

import zmq

from bench.station.replay_client import ReplayClient, Score
from protocol.errors import LinkError
from protocol.frames import FrameCodec
from protocol.messages import Close, Message, Welcome

_REPLY_TIMEOUT = 60.0
_WARM_UP_SECONDS = 0.2
_LINGER_MS = 500


class LoadGenerator:
    """Replay clients, and the messages they will send next.

    Args:
        address: of the base station.
        vocab_size: of the draft model; the Welcome gives the size that ids are encoded for.
        clients: to start with.
    """

    def __init__(self, address: str, vocab_size: int, clients: Sequence[ReplayClient]) -> None:
        self._codec = FrameCodec(vocab_size)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._poller = zmq.Poller()
        self._clients: dict[zmq.Socket[bytes], ReplayClient] = {}
        self._due: list[tuple[float, int, zmq.Socket[bytes], Message]] = []
        self._awaiting: set[zmq.Socket[bytes]] = set()
        self._address = address
        self._scheduled = 0
        for client in clients:
            self.add(client)

    def add(self, client: ReplayClient) -> None:
        """Start one more client."""
        socket = self._context.socket(zmq.DEALER)
        socket.connect(self._address)
        self._poller.register(socket, zmq.POLLIN)
        self._clients[socket] = client
        self._schedule(time.monotonic(), socket, client.first_message())

    def remove(self, client: ReplayClient, abruptly: bool = False) -> None:
        """Close a client's session, or ``abruptly`` only its connection."""
        socket = next(socket for socket, one in self._clients.items() if one is client)
        if not abruptly:
            socket.send(self._codec.encode(Close(0)))
        self._poller.unregister(socket)
        self._awaiting.discard(socket)
        self._due = [one for one in self._due if one[2] is not socket]
        heapq.heapify(self._due)
        del self._clients[socket]
        socket.close(linger=0 if abruptly else _LINGER_MS)

    def warm_up(self, clients: Sequence[ReplayClient]) -> None:
        """Run until each of these clients has completed a round.

        Raises:
            FaultError: the base station answered with a Fault.
        """
        waiting = list(clients)
        while waiting:
            self.run(_WARM_UP_SECONDS)
            waiting = [client for client in waiting if not client.score.rounds]

    def run(self, seconds: float) -> None:
        """Run for this long; afterwards the clients' scores are of this time alone.

        Raises:
            FaultError: the base station answered with a Fault.
        """
        for client in self._clients.values():
            client.score = Score()
        end = time.monotonic() + seconds
        while (now := time.monotonic()) < end:
            self._send_due(now)
            self._poll(min(end, self._due[0][0] if self._due else end) - now)

    def drain(self) -> None:
        """Send nothing more, and wait for the outstanding replies.

        Raises:
            LinkError: they do not arrive within a minute.
            FaultError: the base station answered with a Fault.
        """
        end = time.monotonic() + _REPLY_TIMEOUT
        while self._awaiting:
            self._poll(1.0)
            if time.monotonic() > end:
                raise LinkError(f"the base station did not reply within {_REPLY_TIMEOUT:.0f} s")

    def close(self) -> None:
        """Close all sessions."""
        for client in list(self._clients.values()):
            self.remove(client)
        self._context.term()

    def _poll(self, seconds: float) -> None:
        for socket, _ in self._poller.poll(max(0, math.ceil(seconds * 1000))):
            self._receive(socket)

    def _receive(self, socket: "zmq.Socket[bytes]") -> None:
        message, now = self._codec.decode(socket.recv()), time.monotonic()
        if isinstance(message, Welcome) and message.vocab_size:
            self._codec = FrameCodec(message.vocab_size)
        following = self._clients[socket].reply_to(message, now)
        if following is not None:
            self._awaiting.discard(socket)
            self._schedule(now + following[0], socket, following[1])

    def _schedule(self, when: float, socket: "zmq.Socket[bytes]", message: Message) -> None:
        self._scheduled += 1
        heapq.heappush(self._due, (when, self._scheduled, socket, message))

    def _send_due(self, now: float) -> None:
        while self._due and self._due[0][0] <= now:
            _, _, socket, message = heapq.heappop(self._due)
            self._clients[socket].mark_sent(now)
            self._awaiting.add(socket)
            socket.send(self._codec.encode(message))
