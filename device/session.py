"""The device's side of a session: draft, have it judged, and commit what the base station says.

Knows tokens, not text.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from device.draft_model import DraftModel
from device.drafter import Drafter
from device.sampling import Uplink
from protocol.errors import ClosingError, ContextLengthError, FaultError, FullError, UnknownSessionError
from protocol.limits import option_name
from protocol.messages import (
    Close,
    Decode,
    Draft,
    Extend,
    Mode,
    Open,
    Opened,
    Reply,
    Request,
    Resume,
    Sampling,
    Verdict,
)
from protocol.rounds import SessionRounds, State

if TYPE_CHECKING:  # a client opens sessions, and a session asks by its client
    from device.client import Client

_PREFILL_INTERVAL = 8
"""Tokens of the target alone after which the draft model reads them: together they take it less time."""


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
class DraftSettings:
    """How the device drafts.

    Of each distribution ``uplink_k`` entries are sent in mode ``topk``, and in mode
    ``topp`` as many as reach the probability ``uplink_p``, up to ``uplink_k``; both in
    ``uplink_steps`` steps, 0 taking as many as the mode needs;
    ``draft_len`` tokens are drafted in a round, at most; None plans it as rounds are measured.
    Whether to ``run_ahead`` while a Verdict is under way: not where that takes time from the base station.
    """

    mode: Mode
    sampling: Sampling
    uplink_k: int
    draft_len: int | None
    uplink_p: float = 0.95
    uplink_steps: int = 0
    run_ahead: bool = True

    def __post_init__(self) -> None:
        _ = self.uplink  # raises what is wrong with it

    @property
    def uplink(self) -> Uplink:
        """How much of each distribution is sent.

        Raises:
            SettingsError: a value is not allowed.
        """
        return Uplink.of_mode(self.mode, self.uplink_k, self.uplink_p, self.uplink_steps)


@dataclass
class Counters:
    """What a session has done so far."""

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0


class DeviceSession:
    """One conversation: the committed tokens, and answers that go on from them.

    Attributes:
        tokens: committed so far, the prompt included.
        counters: counts over all answers.
        stop_ids: the ids that end an answer.
    """

    def __init__(
        self,
        client: "Client",
        settings: DraftSettings,
        model: DraftModel,
        context_length: int,
        prompt_ids: list[int],
    ) -> None:
        self.counters = Counters()
        self.tokens: list[int] = []
        self._client = client
        self._settings = settings
        self._target_alone = settings.mode is Mode.TARGET
        self._drafter = Drafter(model, settings.mode, settings.sampling, settings.uplink)
        self._planner = client.planner(settings, model.manifest)
        self._session_id = client.new_session_id()
        self._context_length = context_length
        self._reads_prompt = True  # the base station, perhaps: what it answers first may have waited for that
        self.stop_ids = frozenset(model.manifest.stop_ids)
        self._rounds = SessionRounds(self.stop_ids)
        self._check_prompt(prompt_ids)
        began = client.now()
        self._ask(self._opening(prompt_ids))
        self._planner.observe_opened(client.now().seconds - began.seconds)
        self._commit_prompt(prompt_ids)

    def extend(self, prompt_ids: list[int]) -> None:
        """Go on with a prompt that begins as the committed tokens do; only the rest is sent and run.

        Raises:
            ContextLengthError: it does not fit both models' contexts, or is more than the base station takes.
        """
        start = 0
        for old, new in zip(self.tokens, prompt_ids[:-1], strict=False):
            if old != new:
                break
            start += 1
        self._check_prompt(prompt_ids, start if self._rounds.state is State.READY else 0)
        if self._rounds.state is State.READY:
            self._ask(Extend(self._session_id, self._rounds.round_id, start, tuple(prompt_ids[start:])))
        else:  # the answer before was left while the target still decodes it
            self.close()
            self._begin_again()
            self._ask(self._opening(prompt_ids))
        self._commit_prompt(prompt_ids)

    def answer(self, max_new_tokens: int) -> Iterator[AnswerToken]:
        """The answer to the prompt, token by token as each round commits them.

        Ends after a stop id, ``max_new_tokens`` tokens or at the end of the context.
        """
        end = min(len(self.tokens) + max_new_tokens, self._context_length)
        while len(self.tokens) < end:
            room = end - len(self.tokens)
            alone = self._decode_len(room)
            for token in self._decode(alone) if alone else self._round(room - 1):
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
        began = self._client.now()
        fixed = self._settings.draft_len
        draft_len = min(self._client.welcome.max_draft_len if fixed is None else fixed, room)
        should_continue = self._planner.should_continue if fixed is None else None
        drafted = self._drafter.draft(self.tokens, draft_len, should_continue)
        draft = Draft(self._session_id, self._rounds.round_id, drafted.token_ids, drafted.distributions)
        sent = self._client.now()
        verdict = self._ask(draft)
        assert isinstance(verdict, Verdict)
        judged = self._client.now()
        reply_seconds = None if self._reads_prompt else judged.seconds - sent.seconds
        self._reads_prompt = False
        self._planner.observe(drafted.margins, verdict.accepted, sent.seconds - began.seconds, reply_seconds)
        self._client.record(self._settings.mode, verdict, draft_len, len(drafted.token_ids), (began, sent, judged))
        self.counters.drafted += len(drafted.token_ids)
        self.counters.accepted += verdict.accepted
        return self._commit(drafted.token_ids, verdict)

    def _decode_len(self, room: int) -> int:
        """How many tokens the target decodes alone now; 0 where a round is due."""
        if self._target_alone:
            return room
        return 0 if self._settings.draft_len else min(self._planner.decode_len(), room)

    def _decode(self, count: int) -> Iterator[AnswerToken]:
        """Let the target decode alone, and commit its tokens as they come."""
        heard = [self._client.now()]
        for verdict in self._replies(Decode(self._session_id, self._rounds.round_id, count)):
            assert isinstance(verdict, Verdict)
            heard.append(self._client.now())
            self._client.record(self._settings.mode, verdict, 0, 0, (heard[-2], heard[-2], heard[-1]))
            yield from self._commit((), verdict)
            if len(heard) % _PREFILL_INTERVAL == 0:
                self._prefill_draft_model()
        self._prefill_draft_model()
        seconds = [moment.seconds for moment in heard]
        first_seconds = None if self._reads_prompt else seconds[1] - seconds[0]
        self._reads_prompt = False
        self._planner.observe_decoded(len(seconds) - 1, first_seconds, seconds[-1] - seconds[1])

    def _prefill_draft_model(self) -> None:
        """Keep the draft model in step while the target decodes, so that drafting can begin at once."""
        if not self._target_alone:
            self._drafter.prefill(self.tokens)

    def _commit(self, drafted: tuple[int, ...], verdict: Verdict) -> list[AnswerToken]:
        self.counters.rounds += 1
        last = Origin.BONUS if verdict.accepted == len(drafted) else Origin.RECOVERED
        committed = [AnswerToken(token_id, Origin.ACCEPTED) for token_id in drafted[: verdict.accepted]]
        committed.append(AnswerToken(verdict.token_id, last))
        self.tokens += [token.token_id for token in committed]
        return committed

    def _commit_prompt(self, prompt_ids: list[int]) -> None:
        self.tokens = list(prompt_ids)
        self._reads_prompt = True
        self._prefill_draft_model()

    def _check_prompt(self, prompt_ids: list[int], start: int = 0) -> None:
        if len(prompt_ids) >= self._context_length:
            raise ContextLengthError(
                "prompt", f"{len(prompt_ids)} tokens", f"at most {self._context_length - 1} (the models' context)"
            )
        new, most = len(prompt_ids) - start, self._client.welcome.max_prompt_len
        if new > most:
            allowed = f"at most {most} at once (the base station's {option_name('max_prompt_len')})"
            raise ContextLengthError("prompt", f"{new} new tokens", allowed)

    def _ask(self, request: Request, refused_at: float | None = None) -> Reply:
        return next(self._replies(request, refused_at))

    def _replies(self, request: Request, refused_at: float | None = None) -> Iterator[Reply]:
        """The replies to one request, whatever the base station forgets or refuses meanwhile.

        It was refused first at ``refused_at``, by the client's clock. A session that is
        forgotten again before anything was answered in it is taken for refused.
        """
        answered, forgotten = 0, False
        while True:
            try:
                for reply in self._attempt(self._remaining(request, answered)):
                    answered, refused_at, forgotten = answered + 1, None, False
                    yield reply
            except FaultError as fault:
                if fault.fault_code not in (FullError.code, ClosingError.code, UnknownSessionError.code):
                    raise
                with self._client.stopped_clock():
                    if forgotten or fault.fault_code != UnknownSessionError.code:
                        refused_at = self._client.pause(fault, refused_at)
                    forgotten = True
                    self._begin_again()
                    if not isinstance(request, Open):
                        self._ask(self._opening(self.tokens), refused_at)
            else:
                return

    def _attempt(self, request: Request) -> Iterator[Reply]:
        """The replies to one request, until the state machine says that it is answered."""
        self._rounds.advance(request)
        resume = None if isinstance(request, Open | Extend) else self._resume
        ahead = isinstance(request, Draft) and self._settings.run_ahead
        meanwhile = self._drafter.run_ahead if ahead else None
        for message in self._client.exchange(request, resume=resume, meanwhile=meanwhile):
            if not isinstance(message, Opened | Verdict) or self._is_stale(message):
                continue
            self._rounds.advance(message)
            yield message
            if self._rounds.state is State.READY:
                return

    def _remaining(self, request: Request, answered: int) -> Request:
        """What is left of a request in the session as it is now."""
        here = replace(request, session_id=self._session_id, round_id=self._rounds.round_id)
        return replace(here, count=here.count - answered) if isinstance(here, Decode) else here

    def _begin_again(self) -> None:
        """Greet, and start a new session; as randomness follows the position, the answer stays the same."""
        self._client.greet()
        self._reads_prompt = True
        self._session_id = self._client.new_session_id()
        self._rounds = SessionRounds(self.stop_ids)

    def _resume(self) -> Resume:
        return Resume.of(self._session_id, self._rounds.round_id, self.tokens)

    def _opening(self, prompt_ids: list[int]) -> Open:
        return Open(self._session_id, 0, self._settings.mode, self._settings.sampling, tuple(prompt_ids))

    def _is_stale(self, reply: Reply) -> bool:
        """A reply of another session, of a round that is over, or behind one that was lost."""
        return reply.session_id != self._session_id or reply.round_id != self._rounds.round_id
