"""A device that sends the messages and frames that a test gives it."""

from protocol.frames import FrameCodec
from protocol.messages import PROTOCOL_VERSION, Hello, Message, Welcome
from tests.fakes import VOCAB, manifest
from tests.link_pair import Station

CODEC = FrameCodec(VOCAB)


def hello(vocab_size: int) -> Hello:
    """The Hello of a draft model that is a table."""
    bundle = manifest(vocab_size)
    return Hello(PROTOCOL_VERSION, vocab_size, bytes.fromhex(bundle.vocabulary_hash), bundle.stop_ids)


class RawDevice:
    """Sends frames of one device to a base station in memory, and receives the replies."""

    def __init__(self, station: Station, peer: bytes = b"a", greet: bool = True) -> None:
        self.station, self.peer = station, peer
        if greet:
            assert isinstance(self.request(hello(station.codec.vocab_size)), Welcome)

    def request(self, message: Message) -> Message | None:
        """Send a message and return the next reply, if any."""
        return self.send_frame(self.station.codec.encode(message))

    def send_frame(self, frame: bytes) -> Message | None:
        self.station.push(self.peer, frame)
        return self.receive()

    def receive(self) -> Message | None:
        """The next reply, after as many forward passes as needed."""
        return self.station.pull(self.peer)
