"""A device at a real socket that sends the messages and frames that a test gives it."""

from contextlib import ExitStack

import zmq

from device.link.curve_keys import CurveKeys
from protocol.messages import Message
from tests.raw_device import CODEC


class RawPeer:
    """A DEALER, which may claim any routing id.

    Args:
        address: of the base station.
        cleanup: closes the socket.
        keys: None where the base station has none.
        routing_id: None for one that libzmq chooses.
    """

    def __init__(
        self, address: str, cleanup: ExitStack, keys: CurveKeys | None = None, routing_id: bytes | None = None
    ) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        cleanup.callback(context.destroy, linger=0)
        self.socket = context.socket(zmq.DEALER)
        cleanup.callback(self.socket.close, linger=0)
        if routing_id is not None:
            self.socket.setsockopt(zmq.ROUTING_ID, routing_id)
        if keys is not None:
            keys.protect(self.socket)
        self.socket.connect(address)

    def send(self, message: Message | bytes) -> None:
        self.socket.send(message if isinstance(message, bytes) else CODEC.encode(message))

    def receive(self, seconds: float = 5) -> Message | None:
        return CODEC.decode(self.socket.recv()) if self.socket.poll(round(1000 * seconds)) else None

    def request(self, message: Message | bytes) -> Message | None:
        self.send(message)
        return self.receive()
