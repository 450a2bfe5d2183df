"""An answer as its caller receives it: text as it is committed, then the figures."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TypeAlias

from common.common_prefix import common_prefix
from common.grammar import Grammar
from device.answers.timings import Timings
from device.drafting.draft_model import SequenceModel
from device.drafting.drafter import DraftedToken
from device.planning.planners import Planners
from device.process_memory import peak_memory_bytes
from device.session.client import Client
from device.session.counters import Counters
from device.session.served_settings import check_draft_settings, check_prompt, check_sampling, check_token_ids
from device.session.session import AnswerToken, DeviceSession, Origin
from device.session.unverified_tail import AnswerEndedError, UnverifiedTail
from device.settings import DraftSettings
from device.text.tokenizer import Tokenizer
from protocol.messages import Sampling


@dataclass(frozen=True)
class TextChunk:
    """The text that one committed token adds; may be empty.

    ``token`` is None where an answer ended within a character, for the text that was still missing, and for the text of
    all unverified tokens at the end of an answer, with the origin ``unverified``. ``unverified`` is the text of the
    unverified tokens that follow now; the next chunk may have another.
    """

    text: str
    origin: Origin
    token: AnswerToken | None
    unverified: str = ""


ShowUnverified: TypeAlias = Callable[[TextChunk], bool]
"""Takes the chunk of an unverified token; says whether the answer shall end with it."""


@dataclass(frozen=True)
class Answer:
    """A finished answer; the field names are those of ``generate --json``.

    ``finish_reason`` is ``stop`` or ``length``. Bytes are counted in the TCP stream,
    ``seconds`` from the prompt to the last token, ``ttft_seconds`` to the first.
    ``unverified`` are the tokens at the end that no base station has verified, which ``tokens_per_round`` leaves out.
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
    unverified: int


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
        client: the base station.
        planners: decide how much to draft.
        model: the draft model.
        tokenizer: of the same bundle.
        settings: how to draft and sample.

    Attributes:
        settings: of the next answer; ``sampling`` alone may change within a conversation.
        model: the draft model.
        tail: of an answer that does not wait in an outage; None where the client bridges none.
    """

    def __init__(
        self, client: Client, planners: Planners, model: SequenceModel, tokenizer: Tokenizer, settings: DraftSettings
    ) -> None:
        self.tokenizer = tokenizer
        self.settings = settings
        self._client = client
        self._planners = planners
        self.model = model
        self.tail = UnverifiedTail(client, model, settings) if client.bridges_outages else None
        self._prompt_len = 0
        self._session: DeviceSession | None = None

    def ask(
        self,
        prompt_ids: list[int],
        max_new_tokens: int,
        prediction: Sequence[int] = (),
        show_unverified: ShowUnverified | None = None,
    ) -> "AnswerStream":
        """The answer to a prompt, at most ``max_new_tokens`` long; nothing happens until it is iterated.

        Args:
            prompt_ids: the whole conversation.
            max_new_tokens: most tokens of the answer.
            prediction: what the answer perhaps is, for prompt lookup.
            show_unverified: as of ``AnswerStream``.
        """
        return AnswerStream(self, prompt_ids, max_new_tokens, prediction, show_unverified)

    def check(self, prompt_ids: Sequence[int], settings: DraftSettings) -> None:
        """Check whether a prompt can be answered with ``settings``, as far as is known before it is sent.

        Raises:
            SettingsError: the base station does not serve these settings.
            ContextLengthError: the prompt does not fit the context, or exceeds the base station's limit.
            GrammarError: the grammar cannot be compiled.
        """
        client, sampling = self._client, settings.sampling
        if self._session is not None:
            self._session.check(prompt_ids, sampling)
        elif client.is_greeted:
            check_draft_settings(settings, client.welcome)
            check_sampling(sampling, client)
            check_prompt(len(prompt_ids), 0, client.welcome)
        else:
            check_token_ids(sampling, client.vocab_size)
        if self.tail is not None:
            self.tail.check_prompt(prompt_ids)
        self._grammar_of(sampling)

    def begin(self, prompt_ids: list[int], prediction: Sequence[int] = ()) -> DeviceSession:
        """The session, opened on the prompt or extended with it."""
        self._prompt_len = len(prompt_ids)
        self._client.greet_once()
        planner = self._planners.for_settings(self.settings, self._client.welcome)
        sampling = self.settings.sampling
        check_sampling(sampling, self._client)
        grammar = self._grammar_of(sampling)
        if self._session is None:
            self._session = DeviceSession(
                self._client, planner, self.settings, self.model, prompt_ids, grammar, prediction, self.tail
            )
        else:
            self._session.extend(prompt_ids, sampling, planner, grammar, prediction)
        return self._session

    def begin_tail(self, prompt_ids: Sequence[int], max_new_tokens: int) -> None:
        """Prepare for an outage in the answer to a prompt.

        Raises:
            SettingsError: a token id in the sampling settings is none of the model's.
            GrammarError: their grammar cannot be compiled.
        """
        if self.tail is not None:
            sampling = self.settings.sampling
            check_token_ids(sampling, self._client.vocab_size)
            self.tail.begin(prompt_ids, max_new_tokens, sampling, self._grammar_of(sampling))

    def _grammar_of(self, sampling: Sampling) -> Grammar | None:
        """The compiled grammar of sampling settings."""
        return self.tokenizer.grammar(sampling.grammar, self._client.stop_ids) if sampling.grammar else None

    @property
    def ready(self) -> bool:
        """Whether another prompt can continue the session; without a base station always."""
        return self._client.is_offline or (self._session is not None and self._session.ready)

    @property
    def token_ids(self) -> Sequence[int]:
        """The committed tokens; without a base station those in the KV cache."""
        if self._session is not None:
            return self._session.tokens
        return self.model.token_ids if self._client.is_offline else ()

    def is_continued_by(self, prompt_ids: Sequence[int]) -> bool:
        """Whether a prompt is the next turn, or the last prompt again."""
        return common_prefix(self.token_ids, prompt_ids) >= self._prompt_len

    def accepts(self, settings: DraftSettings) -> bool:
        """Whether the conversation can continue with these settings."""
        return replace(settings, sampling=self.settings.sampling) == self.settings

    def cancelled_by(self, is_cancelled: Callable[[], bool]) -> AbstractContextManager[None]:
        """End answers with ``CancelledError`` where ``is_cancelled`` says so, as ``Client.cancelled_by``."""
        return self._client.cancelled_by(is_cancelled)

    def bridged_by(self, draft_token: Callable[[], bool]) -> AbstractContextManager[None]:
        """Call ``draft_token`` in an outage, as ``Client.bridged_by``."""
        return self._client.bridged_by(draft_token)

    def snapshot(self) -> _Snapshot:
        """Clock and counters now."""
        counters = replace(self._session.counters) if self._session else Counters()
        now = self._client.now()
        return _Snapshot(time.monotonic(), now.uplink_bytes, now.downlink_bytes, counters)

    def keep_figures(self) -> None:
        """Store what the planner has learnt."""
        if self._client.is_greeted:
            self._planners.keep(self.settings, self._client.welcome)

    def close(self) -> None:
        """End the session, if there is one."""
        if self._session is not None:
            self._session.close()
            self._session = None


class AnswerStream:
    """One answer: iterate over its text chunks, then read ``answer``.

    In an outage the iterator waits. ``show_unverified`` then gets a chunk without a token for each unverified one, and
    says whether the answer shall end there; without it, or where the client bridges no outage, the answer waits too.
    """

    def __init__(
        self,
        conversation: Conversation,
        prompt_ids: list[int],
        max_new_tokens: int,
        prediction: Sequence[int] = (),
        show_unverified: ShowUnverified | None = None,
    ) -> None:
        self._conversation = conversation
        self._tail = conversation.tail if show_unverified else None
        self._show_unverified = show_unverified
        self._prompt_ids = prompt_ids
        self._max_new_tokens = max_new_tokens
        self._prediction = prediction
        self._tokens: list[AnswerToken] = []
        self._text = ""
        self._cached_tokens = 0
        self._finish_reason = "length"
        self._first = 0.0
        self._ended: _Snapshot | None = None

    def __iter__(self) -> Iterator[TextChunk]:
        """The chunks of text, each as soon as its token is committed."""
        self._began = self._conversation.snapshot()
        self._conversation.begin_tail(self._prompt_ids, self._max_new_tokens)
        try:
            if self._tail is None:
                yield from self._committed()
            else:
                yield from self._bridged(self._tail)
            self._ended = self._conversation.snapshot()
        finally:
            self._conversation.keep_figures()

    def _committed(self) -> Iterator[TextChunk]:
        count = 0
        for text in self._conversation.tokenizer.decode_stream(self._token_ids()):
            token, self._text = self._tokens[-1], self._text + text
            yield TextChunk(text, token.origin, token if len(self._tokens) > count else None, self._unverified_text())
            count = len(self._tokens)

    def _bridged(self, tail: UnverifiedTail) -> Iterator[TextChunk]:
        """The chunks of an answer that outages do not stop; the last one may be unverified."""
        try:
            with self._conversation.bridged_by(self._draft_alone):
                yield from self._committed()
        except AnswerEndedError as ended:
            self._finish_reason = ended.reason
            self._tokens += [AnswerToken(token.token_id, Origin.UNVERIFIED, token.margin) for token in tail.drafted]
            yield TextChunk(self._text_after(self._tokens), Origin.UNVERIFIED, None)

    def _draft_alone(self) -> bool:
        """Have the draft model add a token in an outage, and show the text; whether it could."""
        assert self._tail is not None
        assert self._show_unverified is not None
        if not self._tail.draft_token():
            return False
        self._first = self._first or time.monotonic()
        if self._show_unverified(TextChunk("", Origin.UNVERIFIED, None, self._unverified_text())):
            raise AnswerEndedError("stop")
        return True

    def _unverified_text(self) -> str:
        """The text that the unverified tokens add, up to an incomplete character."""
        if self._tail is None or not self._tail.drafted:
            return ""
        return self._text_after([*self._tokens, *self._tail.drafted]).rstrip("\ufffd")

    def _text_after(self, tokens: Sequence[AnswerToken | DraftedToken]) -> str:
        """What the text of ``tokens``, of which the committed ones are the first, has beyond the text so far."""
        ids, tokenizer = [token.token_id for token in tokens], self._conversation.tokenizer
        whole = tokenizer.decode(ids)
        if not whole.startswith(self._text):  # of bytes that are not UTF-8
            whole = "".join(tokenizer.decode_stream(iter(ids)))
        return whole[len(self._text) :]

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self._prompt_ids)

    @property
    def new_tokens(self) -> int:
        """Tokens committed so far; at the end, those that are unverified too."""
        return len(self._tokens)

    @property
    def _unverified(self) -> int:
        return sum(token.origin is Origin.UNVERIFIED for token in self._tokens)

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
            unverified_n=self._unverified,
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
            tokens_per_round=(len(token_ids) - self._unverified) / max(1, rounds),
            uplink_bytes=ended.uplink_bytes - began.uplink_bytes,
            downlink_bytes=ended.downlink_bytes - began.downlink_bytes,
            seconds=seconds,
            ttft_seconds=self._first - began.seconds,
            tokens_per_second=len(token_ids) / seconds,
            mode=settings.mode,
            draft_len=(settings.draft_len if drafted else 0) or round(drafted / max(1, rounds)),
            draft_bytes=ended.counters.draft_bytes - began.counters.draft_bytes,
            invalidated_bytes=ended.counters.invalidated_bytes - began.counters.invalidated_bytes,
            peak_memory_bytes=peak_memory_bytes(),
            unverified=self._unverified,
        )

    def _token_ids(self) -> Iterator[int]:
        session = self._conversation.begin(self._prompt_ids, self._prediction)
        self._cached_tokens = session.cached_tokens
        for token in session.answer(self._max_new_tokens):
            self._first = self._first or time.monotonic()
            self._tokens.append(token)
            yield token.token_id
        if self._tokens[-1].token_id in session.stop_ids:
            self._finish_reason = "stop"
