"""Many devices without many draft models: rounds are recorded once and played to a base station.

In mode ``ids`` a draft is a function of the committed tokens, so what a device
would send can be drawn up beforehand: at every place of the target's answer the
tokens that the draft model would guess there. A player sends them over a real
socket, after the time that drafting would have taken.
"""

import heapq
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Self

import zmq

from basestation.kv_pool import Segment
from basestation.target_model import TargetModel
from basestation.verify import Round, verify_rounds
from device.draft_model import DraftModel
from device.drafter import Drafter
from device.sampling import Uplink
from protocol.bundle import Manifest
from protocol.errors import FaultError, LinkError, SettingsError
from protocol.frames import FrameCodec
from protocol.messages import (
    PROTOCOL_VERSION,
    Close,
    Decode,
    Draft,
    Extend,
    Fault,
    Hello,
    Message,
    Mode,
    Open,
    Opened,
    Sampling,
    Verdict,
    Welcome,
)

_SILENCE_SECONDS = 60.0
_SETTLE_SECONDS = 0.2
_LINGER_MS = 500
_GREEDY = Sampling()


@dataclass(frozen=True)
class Recording:
    """A prompt, the target's answer, and what a device would draft.

    Attributes:
        prompt_ids: as the device sends them.
        answer_ids: the target's own tokens.
        drafts: at index i what is drafted when i tokens of the answer are committed.
        token_seconds: that drafting a token took.
    """

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    drafts: tuple[tuple[int, ...], ...]
    token_seconds: float

    @classmethod
    def from_json(cls, one: dict[str, object]) -> Self:
        """What ``asdict`` and JSON made of one."""
        made = cls(**one)  # type: ignore[arg-type]
        drafts = tuple(tuple(draft) for draft in made.drafts)
        return cls(tuple(made.prompt_ids), tuple(made.answer_ids), drafts, made.token_seconds)


def record(
    model: DraftModel,
    target: TargetModel,
    prompts: Sequence[list[int]],
    answer_len: int,
    draft_len: int,
    advance: Callable[[], object],
) -> list[Recording]:
    """Let the target answer all prompts, and the draft model guess at every place of the answers."""
    recordings = []
    for prompt, answer in zip(prompts, _answers(target, prompts, answer_len), strict=True):
        drafter = Drafter(model, Mode.IDS, _GREEDY, Uplink.of_mode(Mode.IDS, 1, 1.0, 0))
        drafter.prefill(prompt)
        began = time.perf_counter()
        drafts = [drafter.draft([*prompt, *answer[:place]], draft_len).token_ids for place in range(len(answer))]
        seconds = (time.perf_counter() - began) / sum(map(len, drafts))
        recordings.append(Recording(tuple(prompt), tuple(answer), tuple(drafts), seconds))
        advance()
    return recordings


def _answers(target: TargetModel, prompts: Sequence[list[int]], answer_len: int) -> list[list[int]]:
    texts, kv_caches = [list(prompt) for prompt in prompts], [target.new_kv_cache() for _ in prompts]
    for text, kv_cache in zip(texts, kv_caches, strict=True):
        target.forward([Segment(kv_cache, text[:-1], 0)])
    for _ in range(answer_len):
        logits = target.forward(
            [Segment(kv_cache, text[-1:], 1) for text, kv_cache in zip(texts, kv_caches, strict=True)]
        )
        results = verify_rounds(logits, [Round(_GREEDY, len(text)) for text in texts])
        for text, result in zip(texts, results, strict=True):
            text.append(result.token_id)
    for kv_cache in kv_caches:
        kv_cache.release()
    stops = target.vocabulary.stop_ids
    answers = [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
    return [list(takewhile(lambda token: token not in stops, answer)) or answer[:1] for answer in answers]


def write_recordings(path: Path, recordings: Sequence[Recording]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(asdict(one)) + "\n" for one in recordings), encoding="utf-8")


def read_recordings(path: Path) -> list[Recording]:
    """What ``write_recordings`` wrote.

    Raises:
        SettingsError: it is none such.
    """
    try:
        return [Recording.from_json(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, TypeError) as error:
        raise SettingsError("recording", str(path), f"a file that --recording wrote ({error})") from error


@dataclass(frozen=True)
class Pace:
    """How a player spends its time: seconds for a drafted token (None: as recorded) and one way over the link."""

    token_seconds: float | None = None
    delay_seconds: float = 0.0


@dataclass
class Score:
    """What was achieved: committed tokens, seconds of each round as its device sees them, drafts that fell."""

    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    diverged: int = 0
    rounds: list[float] = field(default_factory=list)

    @classmethod
    def sum(cls, scores: Iterable[Self]) -> Self:
        """Of several players."""
        total = cls()
        for one in scores:
            total.tokens += one.tokens
            total.drafted += one.drafted
            total.accepted += one.accepted
            total.diverged += one.diverged
            total.rounds += one.rounds
        return total


class Player:
    """A replayed device: one session that answers its prompt over and over.

    A rounding difference of the target can margin away from the recorded answer; the
    player then has the base station take up the recorded one, as a user who edits.

    Args:
        recording: what it plays.
        mode: ``ids``, or ``target`` to let the target decode alone.
        pace: how fast.
        manifest: of the draft model.
        afresh: take every answer from the first token of the prompt on, none of which is then cached.
    """

    def __init__(self, recording: Recording, mode: Mode, pace: Pace, manifest: Manifest, afresh: bool = False) -> None:
        self.score = Score()
        self._start = 0 if afresh else len(recording.prompt_ids) - 1
        self._recording = recording
        self._mode = mode
        self._pace = pace
        self._hello = Hello(
            PROTOCOL_VERSION, manifest.vocab_size, bytes.fromhex(manifest.vocabulary_hash), manifest.stop_ids
        )
        self._round_id = 0
        self._place = 0
        self._left = 0
        self._asked = 0.0
        self._drafted: tuple[int, ...] = ()

    def begin(self) -> Message:
        """Its first word."""
        return self._hello

    def sent(self, now: float) -> None:
        """What it said last is on its way."""
        self._asked = now

    def next(self, message: Message, now: float) -> tuple[float, Message] | None:
        """What it says to a message, and after how many seconds; None where it waits for more.

        Raises:
            FaultError: the base station found fault.
        """
        match message:
            case Welcome():
                return 0.0, Open(0, 0, self._mode, _GREEDY, self._recording.prompt_ids)
            case Opened():
                return self._ask()
            case Verdict():
                return self._commit(message, now)
            case Fault():
                raise FaultError(message.code, message.text)
        return None

    def _ask(self) -> tuple[float, Message]:
        self._round_id += 1
        recording, remaining = self._recording, len(self._recording.answer_ids) - self._place
        if self._mode is Mode.TARGET:
            self._left = remaining
            return 2 * self._pace.delay_seconds, Decode(0, self._round_id, remaining)
        drafted = recording.drafts[self._place][: remaining - 1]
        pace = recording.token_seconds if self._pace.token_seconds is None else self._pace.token_seconds
        wait = len(drafted) * pace + 2 * self._pace.delay_seconds
        self.score.drafted += len(drafted)
        self._drafted = drafted
        return wait, Draft(0, self._round_id, drafted)

    def _commit(self, verdict: Verdict, now: float) -> tuple[float, Message] | None:
        self.score.rounds.append(now - self._asked + 2 * self._pace.delay_seconds)
        self.score.tokens += verdict.accepted + 1
        self.score.accepted += verdict.accepted
        answer = self._recording.answer_ids
        committed = [*self._drafted[: verdict.accepted], verdict.token_id]
        wanted = answer[self._place : self._place + len(committed)]
        agreed = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(committed, wanted, strict=True)))
        self._place += min(agreed + 1, len(committed))
        if self._mode is Mode.TARGET:
            self._left, self._asked, self._round_id = self._left - 1, now, verdict.round_id
            if self._left and verdict.token_id not in self._hello.stop_ids:
                return None
            return self._again()
        if self._place == len(answer):
            return self._again()
        if agreed < len(committed):
            self.score.diverged += 1
            return self._extend(len(self._recording.prompt_ids) + self._place - 1, answer[self._place - 1])
        return self._ask()

    def _again(self) -> tuple[float, Message]:
        """Back to the prompt."""
        self._place = 0
        return self._extend(self._start, *self._recording.prompt_ids[self._start :])

    def _extend(self, start: int, *token_ids: int) -> tuple[float, Message]:
        self._round_id += 1
        return 0.0, Extend(0, self._round_id, start, token_ids)


class Stage:
    """Players over sockets of their own, all in one thread.

    Args:
        address: of the base station.
        vocab_size: of its target.
        players: who plays.
    """

    def __init__(self, address: str, vocab_size: int, players: Sequence[Player]) -> None:
        self._codec = FrameCodec(vocab_size)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._poller = zmq.Poller()
        self._cast: dict[zmq.Socket[bytes], Player] = {}
        self._due: list[tuple[float, int, zmq.Socket[bytes], Message]] = []
        self._awaiting: set[zmq.Socket[bytes]] = set()
        self._address = address
        self._count = 0
        for player in players:
            self.enter(player)

    def enter(self, player: Player) -> None:
        """One more plays."""
        socket = self._context.socket(zmq.DEALER)
        socket.connect(self._address)
        self._poller.register(socket, zmq.POLLIN)
        self._cast[socket] = player
        self._plan(time.monotonic(), socket, player.begin())

    def leave(self, player: Player, without_a_word: bool = False) -> None:
        """One plays no more: it closes its session, or just disappears."""
        socket = next(socket for socket, one in self._cast.items() if one is player)
        if not without_a_word:
            socket.send(self._codec.encode(Close(0)))
        self._poller.unregister(socket)
        self._awaiting.discard(socket)
        self._due = [one for one in self._due if one[2] is not socket]
        heapq.heapify(self._due)
        del self._cast[socket]
        socket.close(linger=0 if without_a_word else _LINGER_MS)

    def settle(self, players: Sequence[Player]) -> None:
        """Play until each of these has had a round.

        Raises:
            FaultError: the base station found fault.
        """
        waiting = list(players)
        while waiting:
            self.play(_SETTLE_SECONDS)
            waiting = [player for player in waiting if not player.score.rounds]

    def play(self, seconds: float) -> None:
        """Go on for so long; the players' scores are then of this time alone.

        Raises:
            FaultError: the base station found fault.
        """
        for player in self._cast.values():
            player.score = Score()
        end = time.monotonic() + seconds
        while (now := time.monotonic()) < end:
            self._send_due(now)
            self._listen(min(end, self._due[0][0] if self._due else end) - now)

    def pause(self) -> None:
        """Say nothing more, and hear what is still to come.

        Raises:
            LinkError: nothing is heard for a minute.
            FaultError: the base station found fault.
        """
        end = time.monotonic() + _SILENCE_SECONDS
        while self._awaiting:
            self._listen(1.0)
            if time.monotonic() > end:
                raise LinkError(f"the base station was silent for {_SILENCE_SECONDS:.0f} s")

    def close(self) -> None:
        """End all sessions."""
        for player in list(self._cast.values()):
            self.leave(player)
        self._context.term()

    def _listen(self, seconds: float) -> None:
        for socket, _ in self._poller.poll(max(0, math.ceil(seconds * 1000))):
            self._hear(socket)

    def _hear(self, socket: "zmq.Socket[bytes]") -> None:
        message, now = self._codec.decode(socket.recv()), time.monotonic()
        following = self._cast[socket].next(message, now)
        if following is not None:
            self._awaiting.discard(socket)
            self._plan(now + following[0], socket, following[1])

    def _plan(self, when: float, socket: "zmq.Socket[bytes]", message: Message) -> None:
        self._count += 1
        heapq.heappush(self._due, (when, self._count, socket, message))

    def _send_due(self, now: float) -> None:
        while self._due and self._due[0][0] <= now:
            _, _, socket, message = heapq.heappop(self._due)
            self._cast[socket].sent(now)
            self._awaiting.add(socket)
            socket.send(self._codec.encode(message))
