"""An answer as its caller receives it: text as it is committed, then the figures."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from common.common_prefix import common_prefix
from device.answers.timings import Timings
from device.drafting.draft_model import SequenceModel
from device.planning.planners import Planners
from device.process_memory import peak_memory_bytes
from device.session.client import Client
from device.session.draft_rounds import Counters
from device.session.session import AnswerToken, DeviceSession, Origin
from device.settings import DraftSettings
from device.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextChunk:
    """The text that one committed token adds; may be empty.

    ``token`` is None where an answer ended within a character, for the text that was still missing.
    """

    text: str
    origin: Origin
    token: AnswerToken | None


@dataclass(frozen=True)
class Answer:
    """A finished answer; the field names are those of ``generate --json``.

    ``finish_reason`` is ``stop`` or ``length``. Bytes are counted in the TCP stream,
    ``seconds`` from the prompt to the last token, ``ttft_seconds`` to the first.
    ``draft_len`` is the fixed draft length, or else the rounded mean over the rounds.
    ``draft_bytes`` are those of all Drafts, ``invalidated_bytes`` of those on a wrong
    assumed bonus token. ``peak_memory_bytes`` is the largest resident memory of the process so far.
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    finish_reason: str
    origins: list[Origin]
    rounds: int
    drafted: int
    accepted: int
    acceptance_rate: float | None
    tokens_per_round: float
    uplink_bytes: int
    downlink_bytes: int
    seconds: float
    ttft_seconds: float
    tokens_per_second: float
    mode: str
    draft_len: int
    draft_bytes: int
    invalidated_bytes: int
    peak_memory_bytes: int


@dataclass(frozen=True)
class _Snapshot:
    """Clock and counters at one moment; an answer's figures are differences of two."""

    seconds: float
    uplink_bytes: int
    downlink_bytes: int
    counters: Counters


class Conversation:
    """Prompts in, answers out; each prompt continues the previous one as far as they agree.

    Args:
        client: the greeted base station.
        planners: decide how much to draft.
        model: the draft model.
        tokenizer: of the same bundle.
        settings: how to draft and sample.

    Attributes:
        settings: of the next answer; ``sampling`` alone may change within a conversation.
        model: the draft model.
    """

    def __init__(
        self, client: Client, planners: Planners, model: SequenceModel, tokenizer: Tokenizer, settings: DraftSettings
    ) -> None:
        self.tokenizer = tokenizer
        self.settings = settings
        self._client = client
        self._planners = planners
        self.model = model
        self._prompt_len = 0
        self._session: DeviceSession | None = None

    def ask(self, prompt_ids: list[int], max_new_tokens: int, prediction: Sequence[int] = ()) -> "AnswerStream":
        """The answer to a prompt, at most ``max_new_tokens`` long; nothing happens until it is iterated.

        ``prediction`` is what the answer perhaps is, for prompt lookup.
        """
        return AnswerStream(self, prompt_ids, max_new_tokens, prediction)

    def begin(self, prompt_ids: list[int], prediction: Sequence[int] = ()) -> DeviceSession:
        """The session, opened on the prompt or extended with it."""
        planner = self._planners.for_settings(self.settings, self._client.welcome)
        self._prompt_len = len(prompt_ids)
        sampling = self.settings.sampling
        self._client.check_sampling(sampling)
        grammar = self.tokenizer.grammar(sampling.grammar, self._client.stop_ids) if sampling.grammar else None
        if self._session is None:
            self._session = DeviceSession(
                self._client, planner, self.settings, self.model, prompt_ids, grammar, prediction
            )
        else:
            self._session.extend(prompt_ids, sampling, planner, grammar, prediction)
        return self._session

    @property
    def ready(self) -> bool:
        """Whether another prompt can continue the session."""
        return self._session is not None and self._session.ready

    @property
    def token_ids(self) -> Sequence[int]:
        """The committed tokens."""
        return self._session.tokens if self._session is not None else ()

    def is_continued_by(self, prompt_ids: Sequence[int]) -> bool:
        """Whether a prompt is the next turn, or the last prompt again."""
        return common_prefix(self.token_ids, prompt_ids) >= self._prompt_len

    def accepts(self, settings: DraftSettings) -> bool:
        """Whether the conversation can continue with these settings."""
        return replace(settings, sampling=self.settings.sampling) == self.settings

    def cancelled_by(self, is_cancelled: Callable[[], bool]) -> AbstractContextManager[None]:
        """End answers with ``CancelledError`` where ``is_cancelled`` says so, as ``Client.cancelled_by``."""
        return self._client.cancelled_by(is_cancelled)

    def snapshot(self) -> _Snapshot:
        """Clock and counters now."""
        counters = replace(self._session.counters) if self._session else Counters()
        now = self._client.now()
        return _Snapshot(time.monotonic(), now.uplink_bytes, now.downlink_bytes, counters)

    def keep_figures(self) -> None:
        """Store what the planner has learnt."""
        self._planners.keep(self.settings, self._client.welcome)

    def close(self) -> None:
        """End the session, if there is one."""
        if self._session is not None:
            self._session.close()
            self._session = None


class AnswerStream:
    """One answer: iterate over its text chunks, then read ``answer``."""

    def __init__(
        self, conversation: Conversation, prompt_ids: list[int], max_new_tokens: int, prediction: Sequence[int] = ()
    ) -> None:
        self._conversation = conversation
        self._prompt_ids = prompt_ids
        self._max_new_tokens = max_new_tokens
        self._prediction = prediction
        self._tokens: list[AnswerToken] = []
        self._cached_tokens = 0
        self._finish_reason = "length"
        self._ended: _Snapshot | None = None

    def __iter__(self) -> Iterator[TextChunk]:
        """The chunks of text, each as soon as its token is committed."""
        self._began = self._conversation.snapshot()
        count = 0
        try:
            for text in self._conversation.tokenizer.decode_stream(self._token_ids()):
                token = self._tokens[-1]
                yield TextChunk(text, token.origin, token if len(self._tokens) > count else None)
                count = len(self._tokens)
            self._ended = self._conversation.snapshot()
        finally:
            self._conversation.keep_figures()

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self._prompt_ids)

    @property
    def new_tokens(self) -> int:
        """Tokens committed so far."""
        return len(self._tokens)

    @property
    def prediction_tokens(self) -> tuple[int, int]:
        """How many tokens of the prediction were accepted so far, and how many rejected."""
        began, now = self._began.counters, self._conversation.snapshot().counters
        accepted = now.accepted_prediction - began.accepted_prediction
        return accepted, now.drafted_prediction - began.drafted_prediction - accepted

    @property
    def ended(self) -> bool:
        """Whether iteration has reached the end of the answer."""
        return self._ended is not None

    @property
    def timings(self) -> Timings:
        """The figures of the answer so far, once it has a token."""
        began, now = self._began, self._ended or self._conversation.snapshot()
        return Timings(
            cache_n=self._cached_tokens,
            prompt_n=len(self._prompt_ids) - self._cached_tokens,
            prompt_ms=1000 * (self._first - began.seconds),
            predicted_n=len(self._tokens),
            predicted_ms=1000 * (now.seconds - self._first),
            draft_n=now.counters.drafted - began.counters.drafted,
            draft_n_accepted=now.counters.accepted - began.counters.accepted,
            uplink_bytes=now.uplink_bytes - began.uplink_bytes,
            downlink_bytes=now.downlink_bytes - began.downlink_bytes,
        )

    @property
    def answer(self) -> Answer:
        """The whole answer and its figures, once iteration has ended."""
        token_ids = [token.token_id for token in self._tokens]
        settings, began, ended = self._conversation.settings, self._began, self._ended
        assert ended is not None
        rounds = ended.counters.rounds - began.counters.rounds
        drafted = ended.counters.drafted - began.counters.drafted
        accepted = ended.counters.accepted - began.counters.accepted
        seconds = ended.seconds - began.seconds
        return Answer(
            text=self._conversation.tokenizer.decode(token_ids),
            token_ids=token_ids,
            prompt_tokens=len(self._prompt_ids),
            finish_reason=self._finish_reason,
            origins=[token.origin for token in self._tokens],
            rounds=rounds,
            drafted=drafted,
            accepted=accepted,
            acceptance_rate=accepted / drafted if drafted else None,
            tokens_per_round=len(token_ids) / rounds,
            uplink_bytes=ended.uplink_bytes - began.uplink_bytes,
            downlink_bytes=ended.downlink_bytes - began.downlink_bytes,
            seconds=seconds,
            ttft_seconds=self._first - began.seconds,
            tokens_per_second=len(token_ids) / seconds,
            mode=settings.mode,
            draft_len=(settings.draft_len if drafted else 0) or round(drafted / rounds),
            draft_bytes=ended.counters.draft_bytes - began.counters.draft_bytes,
            invalidated_bytes=ended.counters.invalidated_bytes - began.counters.invalidated_bytes,
            peak_memory_bytes=peak_memory_bytes(),
        )

    def _token_ids(self) -> Iterator[int]:
        session = self._conversation.begin(self._prompt_ids, self._prediction)
        self._cached_tokens = session.cached_tokens
        for token in session.answer(self._max_new_tokens):
            if not self._tokens:
                self._first = time.monotonic()
            self._tokens.append(token)
            yield token.token_id
        if self._tokens[-1].token_id in session.stop_ids:
            self._finish_reason = "stop"
