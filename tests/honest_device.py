"""A device that drafts a known answer over and over, and checks every reply of the base station."""

import threading
from collections.abc import Iterator

import zmq

from protocol.frames import FrameCodec
from protocol.messages import (
    Close,
    Decode,
    Draft,
    Extend,
    Hello,
    Message,
    Mode,
    Open,
    Opened,
    Sampling,
    Verdict,
    Welcome,
)

_REPLY_MS = 120_000
_DRAFT_LEN = 5


class HonestDevice:
    """One session of one device, greeted.

    Attributes:
        rounds: how many were verified as expected.
        failure: the first unexpected reply.
    """

    def __init__(
        self, dealer: "zmq.Socket[bytes]", codec: FrameCodec, hello: Hello, prompt_ids: tuple[int, ...]
    ) -> None:
        self.rounds = 0
        self._session_id = 0
        self.failure: BaseException | None = None
        self._dealer, self._codec, self._prompt_ids = dealer, codec, prompt_ids
        self._stop_ids = hello.stop_ids
        reply = self._request(hello)
        assert isinstance(reply, Welcome), reply

    def learn_answer(self, count: int) -> None:
        """Let the target decode alone: up to ``count`` tokens."""
        self._expect(Open(0, 0, Mode.TARGET, Sampling(), self._prompt_ids), Opened(0, 0))
        reply, answer = self._request(Decode(0, 1, count)), []
        while True:
            assert isinstance(reply, Verdict), reply
            answer.append(reply.token_id)
            if len(answer) == count or answer[-1] in self._stop_ids:
                break
            reply = self._receive()
        self._answer_ids = tuple(answer)
        self._dealer.send(self._codec.encode(Close(0)))

    def start(self, rounds: int) -> threading.Thread:
        """Draft in a thread of its own until ``rounds`` are verified, or a reply is unexpected."""

        def work() -> None:
            try:
                self._run(rounds)
            except BaseException as error:  # noqa: BLE001 - raised in the thread of the test
                self.failure = error

        thread = threading.Thread(target=work)
        thread.start()
        return thread

    def _run(self, rounds: int) -> None:
        self._session_id += 1
        session_id, round_id, end = self._session_id, 0, self.rounds + rounds
        opening = Open(session_id, 0, Mode.IDS, Sampling(), self._prompt_ids)
        self._expect(opening, Opened(session_id, 0))
        while self.rounds < end:
            for expected in self._cycle():
                round_id += 1
                wrong = 1 + expected[-1] % 100
                drafted = (*expected[:-1], wrong if wrong != expected[-1] else wrong + 1)
                verdict = Verdict(session_id, round_id, len(expected) - 1, expected[-1])
                self._expect(Draft(session_id, round_id, drafted), verdict)
                self.rounds += 1
            round_id += 1
            again = Extend(session_id, round_id, len(self._prompt_ids) - 1, self._prompt_ids[-1:])
            self._expect(again, Opened(session_id, round_id))
        self._dealer.send(self._codec.encode(Close(session_id)))

    def _cycle(self) -> Iterator[tuple[int, ...]]:
        """The answer in parts of the draft length."""
        starts = range(0, len(self._answer_ids) - _DRAFT_LEN + 1, _DRAFT_LEN)
        return (self._answer_ids[start : start + _DRAFT_LEN] for start in starts)

    def _expect(self, request: Message, expected: Message) -> None:
        reply = self._request(request)
        assert reply == expected, reply

    def _request(self, message: Message) -> Message:
        self._dealer.send(self._codec.encode(message))
        return self._receive()

    def _receive(self) -> Message:
        assert self._dealer.poll(_REPLY_MS), "no reply"
        return self._codec.decode(self._dealer.recv())
