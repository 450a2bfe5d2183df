"""The device's side of a session: draft, send, and commit what the base station says.

A request is repeated until its reply is there, so lost frames cost time and
nothing else. Knows tokens, not text.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from device.draft_model import DraftModel
from device.drafter import Drafter
from device.link import Link
from protocol.bundle import Manifest
from protocol.errors import ContextLengthError, FaultError, LinkError, SettingsError, StateError
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
    Reply,
    Request,
    Sampling,
    Verdict,
    Welcome,
)
from protocol.rounds import SessionRounds, State


class Origin(StrEnum):
    """How a token of the answer came about."""

    ACCEPTED = "accepted"
    RECOVERED = "recovered"
    BONUS = "bonus"


@dataclass(frozen=True)
class AnswerToken:
    """One committed token of an answer."""

    token_id: int
    origin: Origin


@dataclass(frozen=True)
class Patience:
    """Times in seconds: when to repeat a request, and when to give up."""

    connect: float = 5.0
    repeat: float = 5.0
    reply: float = 60.0


@dataclass(frozen=True)
class DraftSettings:
    """How the device drafts.

    ``uplink_k`` entries of each distribution are sent in mode ``topk``;
    ``draft_len`` tokens are drafted in a round, at most.
    """

    mode: Mode
    sampling: Sampling
    uplink_k: int
    draft_len: int


@dataclass
class Tally:
    """What a session has done so far."""

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0


class Client:
    """A greeted base station.

    Args:
        link: to the base station.
        manifest: of the draft model; the base station refuses one that is not its target's kin.
        patience: how long to wait.
        clock: seconds, monotonic.

    Raises:
        LinkError: nobody answers within ``patience.connect``.
        FaultError: the base station refuses the draft model.
    """

    def __init__(
        self,
        link: Link,
        manifest: Manifest,
        patience: Patience | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._link = link
        self._patience = patience or Patience()
        self._clock = clock
        self._sessions = 0
        self.welcome = self._greet(manifest)

    def open(self, settings: DraftSettings, model: DraftModel, prompt_ids: list[int]) -> "DeviceSession":
        """Open a session on a prompt.

        Raises:
            SettingsError: the base station does not serve the mode or the draft length.
            ContextLengthError: the prompt does not fit the context of both models.
        """
        if settings.mode not in self.welcome.modes:
            raise SettingsError("mode", str(settings.mode), ", ".join(self.welcome.modes))
        if settings.draft_len > self.welcome.max_draft_len:
            raise SettingsError("draft-len", settings.draft_len, f"1 to {self.welcome.max_draft_len}")
        context_length = min(self.welcome.context_length, model.manifest.context_length)
        self._sessions += 1
        return DeviceSession(self, settings, model, self._sessions - 1, context_length, prompt_ids)

    def exchange(self, request: Hello | Request) -> Iterator[Message]:
        """Send a request and give what comes back, repeating it whenever the base station is silent.

        Raises:
            LinkError: the base station is silent for ``patience.reply`` seconds.
            FaultError: it answers with a Fault.
        """
        self._link.send(request)
        heard = sent = self._clock()
        while True:
            message = self._link.receive(min(self._patience.repeat, self._patience.reply))
            now = self._clock()
            if message is None:
                if now - heard >= self._patience.reply:
                    raise LinkError(
                        f"the base station at {self._link.address} has been silent for {now - heard:.0f} s; "
                        "check that it runs and that the network is up"
                    )
                if now - sent >= self._patience.repeat:
                    self._link.send(request)
                    sent = now
                continue
            heard = now
            _raise_fault(message, getattr(request, "session_id", None))
            yield message

    def tell(self, message: Close) -> None:
        """Send what needs no answer."""
        self._link.send(message)

    def _greet(self, manifest: Manifest) -> Welcome:
        hello = Hello(PROTOCOL_VERSION, manifest.vocab_size, bytes.fromhex(manifest.vocabulary_hash), manifest.stop_ids)
        self._link.send(hello)
        message = self._link.receive(self._patience.connect)
        if message is None:
            raise LinkError(
                f"no base station answers at {self._link.address} (waited {self._patience.connect:g} s); "
                "start one with: edgedraft-basestation serve --target MODEL"
            )
        _raise_fault(message, None)
        if not isinstance(message, Welcome):
            raise StateError(f"the base station answered Hello with {type(message).__name__}; allowed: Welcome")
        return message


class DeviceSession:
    """One conversation: the committed tokens, and answers that go on from them.

    Attributes:
        tokens: committed so far, the prompt included.
        tally: counts over all answers.
        stop_ids: the ids that end an answer.
    """

    def __init__(
        self,
        client: Client,
        settings: DraftSettings,
        model: DraftModel,
        session_id: int,
        context_length: int,
        prompt_ids: list[int],
    ) -> None:
        self.tally = Tally()
        self.tokens: list[int] = []
        self._client = client
        self._settings = settings
        self._target_alone = settings.mode is Mode.TARGET
        self._drafter = Drafter(model, settings.mode, settings.sampling, settings.uplink_k)
        self._session_id = session_id
        self._context_length = context_length
        self.stop_ids = frozenset(model.manifest.stop_ids)
        self._rounds = SessionRounds(self.stop_ids)
        self._check_prompt(prompt_ids)
        self._ask(Open(session_id, 0, settings.mode, settings.sampling, tuple(prompt_ids)))
        self._commit_prompt(prompt_ids)

    def extend(self, prompt_ids: list[int]) -> None:
        """Go on with a prompt that begins as the committed tokens do; only the rest is sent and run.

        Raises:
            ContextLengthError: it does not fit the context of both models.
        """
        self._check_prompt(prompt_ids)
        start = 0
        for old, new in zip(self.tokens, prompt_ids[:-1], strict=False):
            if old != new:
                break
            start += 1
        self._ask(Extend(self._session_id, self._rounds.round_id, start, tuple(prompt_ids[start:])))
        self._commit_prompt(prompt_ids)

    def answer(self, max_new_tokens: int) -> Iterator[AnswerToken]:
        """The answer to the prompt, token by token as each round commits them.

        Ends after a stop id, ``max_new_tokens`` tokens or at the end of the context.
        """
        end = min(len(self.tokens) + max_new_tokens, self._context_length)
        while len(self.tokens) < end:
            room = end - len(self.tokens)
            for token in self._decode(room) if self._target_alone else self._round(room - 1):
                yield token
                if token.token_id in self.stop_ids:
                    return

    def close(self) -> None:
        """Tell the base station that the session is over."""
        close = Close(self._session_id)
        self._rounds.advance(close)
        self._client.tell(close)

    def _round(self, room: int) -> list[AnswerToken]:
        """Draft up to ``room`` tokens, have them judged, commit what stands and what follows."""
        guess = self._drafter.draft(self.tokens, min(self._settings.draft_len, room))
        draft = Draft(self._session_id, self._rounds.round_id, guess.token_ids, guess.distributions)
        verdict = self._ask(draft)
        assert isinstance(verdict, Verdict)
        self.tally.drafted += len(guess.token_ids)
        self.tally.accepted += verdict.accepted
        return self._commit(guess.token_ids, verdict)

    def _decode(self, count: int) -> Iterator[AnswerToken]:
        """Let the target decode alone, and commit its tokens as they come."""
        for verdict in self._replies(Decode(self._session_id, self._rounds.round_id, count)):
            assert isinstance(verdict, Verdict)
            yield from self._commit((), verdict)

    def _commit(self, drafted: tuple[int, ...], verdict: Verdict) -> list[AnswerToken]:
        self.tally.rounds += 1
        last = Origin.BONUS if verdict.accepted == len(drafted) else Origin.RECOVERED
        committed = [AnswerToken(token_id, Origin.ACCEPTED) for token_id in drafted[: verdict.accepted]]
        committed.append(AnswerToken(verdict.token_id, last))
        self.tokens += [token.token_id for token in committed]
        return committed

    def _commit_prompt(self, prompt_ids: list[int]) -> None:
        self.tokens = list(prompt_ids)
        if not self._target_alone:
            self._drafter.prefill(self.tokens)

    def _check_prompt(self, prompt_ids: list[int]) -> None:
        if len(prompt_ids) >= self._context_length:
            raise ContextLengthError(
                "prompt", f"{len(prompt_ids)} tokens", f"at most {self._context_length - 1} (the models' context)"
            )

    def _ask(self, request: Request) -> Reply:
        return next(self._replies(request))

    def _replies(self, request: Request) -> Iterator[Reply]:
        """The replies to one request, until the state machine says that it is answered."""
        self._rounds.advance(request)
        for message in self._client.exchange(request):
            if not isinstance(message, Opened | Verdict) or self._is_stale(message):
                continue
            self._rounds.advance(message)
            yield message
            if self._rounds.state is State.READY:
                return

    def _is_stale(self, reply: Reply) -> bool:
        """A reply of another session, of a round that is over, or behind one that was lost."""
        return reply.session_id != self._session_id or reply.round_id != self._rounds.round_id


def _raise_fault(message: Message, session_id: int | None) -> None:
    """Raise a Fault that is about this session or about none; one of another session ends that one alone."""
    if isinstance(message, Fault) and message.session_id in (None, session_id):
        raise FaultError(message.code, message.text)
