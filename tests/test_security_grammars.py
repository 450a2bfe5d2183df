"""A peer's grammar neither stops the base station nor keeps it from answering others."""

from collections.abc import Iterator
from contextlib import contextmanager

import zmq

from basestation.server import Server
from protocol.errors import GrammarError
from protocol.frames import FrameCodec
from protocol.messages import Draft, Fault, Message, Mode, Open, Opened, Sampling, Verdict
from tests.fakes import FakeTarget, random_table
from tests.hostile_grammars import HOSTILE, STOP, VALID, VOCAB, ids_of, new_compiler
from tests.raw_device import hello
from tests.serving import ANY_PORT, serving

CODEC = FrameCodec(VOCAB)


class Peer:
    """A greeted device that sends what it is told to."""

    def __init__(self, socket: "zmq.Socket[bytes]") -> None:
        self._socket = socket
        self.send(hello(VOCAB))
        self.receive()

    def send(self, message: Message) -> None:
        self._socket.send(CODEC.encode(message))

    def receive(self) -> Message:
        assert self._socket.poll(60_000), "no reply"
        return CODEC.decode(self._socket.recv())


@contextmanager
def connected(server: Server) -> Iterator[Peer]:
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.connect(server.address)
        yield Peer(socket)


def test_hostile_grammars_are_refused_and_other_peers_get_their_answers() -> None:
    target = FakeTarget.make(random_table(VOCAB, seed=1), frozenset({STOP}), grammar_compiler=new_compiler())
    server = Server(target, ANY_PORT)
    with serving(server), connected(server) as attacker, connected(server) as peer:
        for index, text in enumerate(HOSTILE.values()):
            attacker.send(Open(index, 0, Mode.IDS, Sampling(grammar=text), (1, 2)))
            peer.send(Open(index, 0, Mode.IDS, Sampling(grammar=VALID), (1, 2)))
            assert isinstance(peer.receive(), Opened)
            peer.send(Draft(index, 1, ()))
            verdict, fault = peer.receive(), attacker.receive()
            assert isinstance(verdict, Verdict)
            assert verdict.token_id in ids_of("ab")
            assert isinstance(fault, Fault)
            assert (fault.session_id, fault.code) == (index, GrammarError.code)
