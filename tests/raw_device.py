"""A device that says exactly what it is told to."""

from protocol.messages import PROTOCOL_VERSION, Hello, Message, Welcome
from tests.fakes import manifest
from tests.link_pair import Station


def hello(vocab_size: int) -> Hello:
    """The greeting of a draft model that is a table."""
    kin = manifest(vocab_size)
    return Hello(PROTOCOL_VERSION, vocab_size, bytes.fromhex(kin.vocabulary_hash), kin.stop_ids)


class RawDevice:
    """Frames of one device to a base station in memory, and what comes back."""

    def __init__(self, station: Station, peer: bytes = b"a", greet: bool = True) -> None:
        self.station, self.peer = station, peer
        if greet:
            assert isinstance(self.say(hello(station.codec.vocab_size)), Welcome)

    def say(self, message: Message) -> Message | None:
        """Send a message; the next reply, if there is one."""
        return self.send(self.station.codec.encode(message))

    def send(self, frame: bytes) -> Message | None:
        self.station.push(self.peer, frame)
        return self.hear()

    def hear(self) -> Message | None:
        """The next reply, after as many passes as it takes."""
        return self.station.pull(self.peer)
