"""The device's side of a session: draft, send the Draft, commit the Verdict.

Knows tokens, not text; ``session_requests.py`` gets the requests answered.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from common.common_prefix import common_prefix
from common.grammar import Grammar
from device.drafting.draft_model import SequenceModel
from device.drafting.drafter import DraftedToken, Drafter
from device.drafting.lookup_drafter import LookupDrafter
from device.planning.planner import MIN_BACKLOG, Planner
from device.planning.trials import TRIAL
from device.session.catch_up import CatchUp
from device.session.client import Client
from device.session.counters import Counters
from device.session.draft_rounds import DraftRounds
from device.session.guesses import Guesses
from device.session.served_settings import check_draft_settings, check_prompt, check_sampling
from device.session.session_requests import SessionRequests
from device.session.unverified_tail import AnswerEndedError, UnverifiedTail
from device.settings import DraftSettings
from protocol.errors import CancelledError, ContextLengthError, NonFiniteError
from protocol.logprobs import TokenLogprobs
from protocol.messages import Mode, Sampling, Verdict

logger = logging.getLogger(__name__)


class Origin(StrEnum):
    """How a token of the answer was produced."""

    ACCEPTED = "accepted"
    RECOVERED = "recovered"
    BONUS = "bonus"
    TARGET = "target"
    LOOKUP = "lookup"
    UNVERIFIED = "unverified"


@dataclass(frozen=True)
class AnswerToken:
    """One token of an answer, committed unless its origin is ``unverified``.

    ``origin`` is ``target`` where nothing was drafted, ``lookup`` for an accepted token of prompt lookup. ``margin`` is
    the draft model's, in nats, of an accepted token; None where it was sampled from its distribution, and for tokens of
    prompt lookup and of the target. ``logprobs`` are the target's, if the sampling settings ask for them.
    """

    token_id: int
    origin: Origin
    margin: float | None = None
    logprobs: TokenLogprobs | None = None


class DeviceSession:
    """One conversation: the committed tokens, and answers that continue them.

    Args:
        client: the greeted base station.
        planner: decides how much to draft.
        settings: how to draft and sample.
        model: the draft model.
        prompt_ids: the first prompt.
        grammar: compiled, that of ``settings``.
        prediction: what the answer perhaps is, for prompt lookup.
        tail: has begun with the prompt; None where answers wait in an outage.

    Attributes:
        tokens: committed so far, the prompt included.
        cached_tokens: of the last prompt, that were not sent again.

    Raises:
        SettingsError: the base station does not serve these settings.
        ContextLengthError: the prompt does not fit the target's context, or exceeds the base station's limit.
    """

    def __init__(
        self,
        client: Client,
        planner: Planner,
        settings: DraftSettings,
        model: SequenceModel,
        prompt_ids: list[int],
        grammar: Grammar | None = None,
        prediction: Sequence[int] = (),
        tail: UnverifiedTail | None = None,
    ) -> None:
        check_draft_settings(settings, client.welcome)
        self.tokens: list[int] = []
        self.cached_tokens = 0
        self._client, self._settings = client, settings
        self._target_alone = settings.mode is Mode.TARGET
        drafting = settings.mode, settings.sampling, settings.uplink, client.vocab_size, client.stop_ids
        self._drafter = Drafter(model, *drafting, before_pass=client.check_cancelled)
        opening = settings.mode, settings.sampling, self.tokens, settings.asks_block_verification
        self._requests = SessionRequests(client, *opening)
        looks_up = settings.lookup and not self._target_alone
        self._lookup = LookupDrafter(settings.mode, settings.uplink, client.vocab_size) if looks_up else None
        self._tail = tail
        if tail is not None:
            tail.draft_with(self._drafter)
        self._catch_up = CatchUp(self._drafter, lambda: client.now().seconds)
        self._guesses = Guesses(self._drafter, lambda: client.now().seconds)
        self._rounds = DraftRounds(
            client, self._requests, self._drafter, planner, self._catch_up, settings, self.tokens, self._lookup, tail
        )
        self._drafter.answer_start, self._drafter.grammar = len(prompt_ids), grammar
        check_prompt(len(prompt_ids), 0, client.welcome)
        try:
            self._open(prompt_ids)
            self._begin(prompt_ids, prediction)
        except (NonFiniteError, CancelledError, AnswerEndedError):  # nobody else could close the session
            self.close()
            raise

    @property
    def ready(self) -> bool:
        """Whether another prompt can continue the session: no reply is awaited, except to Drafts."""
        return self._requests.ready or self._requests.drafts_in_flight > 0

    @property
    def counters(self) -> Counters:
        """Over all answers."""
        return self._rounds.counters

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end an answer."""
        return self._drafter.sampling.stop_ids(self._client.stop_ids)

    def check(self, prompt_ids: Sequence[int], sampling: Sampling) -> None:
        """Check a prompt and sampling settings as ``extend`` does, and change nothing.

        Raises:
            ContextLengthError: it does not fit the target's context, or exceeds the base station's limit.
            SettingsError: the base station does not know these sampling settings.
        """
        check_sampling(sampling, self._client)
        is_known = self._requests.can_sample(sampling)
        cached = common_prefix(self.tokens, prompt_ids[:-1]) if is_known else 0
        check_prompt(len(prompt_ids), cached, self._client.welcome)

    def extend(
        self,
        prompt_ids: list[int],
        sampling: Sampling | None = None,
        planner: Planner | None = None,
        grammar: Grammar | None = None,
        prediction: Sequence[int] = (),
    ) -> None:
        """Continue with a prompt; only what differs from the committed tokens is sent and run.

        Args:
            prompt_ids: the whole conversation.
            sampling: how the target is sampled from now on; None for no change.
            planner: for these settings; None for no change.
            grammar: compiled, that of ``sampling``.
            prediction: what the answer perhaps is, for prompt lookup.

        Raises:
            ContextLengthError: it does not fit the target's context, or exceeds the base station's limit.
            SettingsError: the base station does not know these sampling settings.
        """
        while left := self._rounds.leave():
            self._commit(left.drafted, left.verdict)
        sampling = sampling or self._drafter.sampling
        check_sampling(sampling, self._client)
        start = common_prefix(self.tokens, prompt_ids[:-1])
        can_extend = self._requests.can_extend(sampling)
        self.cached_tokens = start if can_extend else 0
        check_prompt(len(prompt_ids), self.cached_tokens, self._client.welcome)
        self._drafter.sampling, self._drafter.answer_start, self._drafter.grammar = sampling, len(prompt_ids), grammar
        self._rounds.planner = planner or self._rounds.planner
        # a prompt too long for an Open: were the Extend lost unnoticed, the session could not be opened anew
        wait = self._awaits_opened or len(prompt_ids) > self._client.welcome.max_prompt_len
        if can_extend:
            self._requests.extend(start, prompt_ids[start:], sampling, wait)
        else:  # the target still decodes an abandoned answer, or the base station is of an older version
            self._requests.reopen(prompt_ids, sampling, wait)
        self._begin(prompt_ids, prediction)

    def answer(self, max_new_tokens: int) -> Iterator[AnswerToken]:
        """The answer to the prompt, each token as soon as its round is committed.

        Ends after a stop id, ``max_new_tokens`` tokens or at the end of the context.
        """
        start = len(self.tokens)
        end = start + max_new_tokens
        while (room := min(end, self._client.welcome.context_length) - len(self.tokens)) > 0:
            try:
                for token in self._next_tokens(room):
                    self._client.check_cancelled()
                    if self._tail is not None:
                        self._tail.commit(token.token_id)
                    yield token
                    if token.token_id in self.stop_ids:
                        return
            except ContextLengthError:  # the base station restarted with a context that the committed tokens fill
                if len(self.tokens) == start:
                    raise
                return

    def close(self) -> None:
        """End the session at the base station."""
        self._requests.close()

    def _open(self, prompt_ids: list[int]) -> None:
        """Open the session; the time of a reply that is awaited tells the planner the link's round trip."""
        began, awaits = self._client.now(), self._awaits_opened
        self._requests.open(prompt_ids, awaits)
        if awaits:
            self._rounds.planner.observe_opened(self._client.now().seconds - began.seconds)

    @property
    def _awaits_opened(self) -> bool:
        """Whether the reply to an Open or Extend is needed: it tells the link's round trip, or of an outage."""
        return self._tail is not None or not self._rounds.planner.knows_link

    def _begin(self, prompt_ids: list[int], prediction: Sequence[int]) -> None:
        self._drafter.begin(prompt_ids)
        if self._lookup is not None:
            self._lookup.begin(prompt_ids, prediction[: self._client.welcome.context_length])
        self.tokens[:] = prompt_ids

    def _next_tokens(self, room: int) -> Iterable[AnswerToken]:
        """Commit the next tokens, at most ``room``: of a round, or of the target alone."""
        verified = None
        if not self._rounds.in_flight and (alone := self._decode_len(room)):
            backlog = 0 if self._target_alone or not self._draft_room else self._drafter.backlog(self.tokens)
            if alone > 1 or backlog < MIN_BACKLOG or not self._rounds.drafts_ahead:
                return self._decode(alone)
            verified = self._rounds.begin()
        verified = verified or self._rounds.next(len(self.tokens) + room)
        return self._commit(verified.drafted, verified.verdict)

    def _decode_len(self, room: int) -> int:
        """How many tokens the target decodes alone now; 0 where the device drafts."""
        if self._target_alone:
            return room
        planner = self._rounds.planner
        if self._rounds.begin_ready(len(self.tokens) + room):
            return 0
        if self._draft_room and self._settings.draft_len:
            return 0
        alone = self._planned_decode_len() if self._draft_room else room
        if self._lookup is not None and alone > TRIAL:  # piece by piece, so that lookup is tried in between
            piece = planner.decode_piece(alone, self._catch_up.chunk_len(self.tokens))
            alone = TRIAL if self._settings.draft_len else piece
        return min(alone, room)

    def _planned_decode_len(self) -> int:
        """How many tokens the target decodes alone now, as planned."""
        return self._rounds.planner.decode_len(self._drafter.backlog(self.tokens), self._requests.prefilling)

    @property
    def _draft_room(self) -> int:
        """Tokens that fit the draft model's context after the committed ones; without any the target decodes alone."""
        return self._drafter.room(self.tokens)

    def _decode(self, count: int) -> Iterator[AnswerToken]:
        """Let the target decode alone and commit its tokens; meanwhile the draft model runs its backlog."""
        self._rounds.begin_decode()
        moments, start, prefilled = [self._client.now()], len(self.tokens), 0
        end, planner = start + count, self._rounds.planner
        for verdict in self._requests.decode(count, lambda: self._follow_target(end - len(self.tokens))):
            moments.append(self._client.now())
            if len(moments) == 2:
                prefilled = self._requests.take_prefilled()
            self._client.record(self._settings.mode, verdict, 0, 0, (moments[-2], moments[-2], moments[-1]))
            yield from self._commit((), verdict)
        self._guesses.check(self.tokens, planner)
        if self._requests.take_prefilled():  # the base station restarted, and a later token waited for all before it
            del moments[2:]
        if (opened_seconds := self._requests.take_opened_seconds()) is not None:
            planner.observe_opened(opened_seconds, at_most=not self._target_alone)
        seconds = [moment.seconds for moment in moments]
        first_seconds = seconds[1] - seconds[0]
        known_seconds = None if prefilled else first_seconds
        planner.observe_decoded(len(seconds) - 1, known_seconds, seconds[-1] - seconds[1])
        if prefilled:
            planner.observe_target_prefill(prefilled, first_seconds)
        logger.debug("%d tokens of the target alone; next: %s", len(self.tokens) - start, planner.explanation)

    def _follow_target(self, awaited: int) -> bool:
        """While the target decodes alone, run its tokens and guess the next one; whether there was something to do.

        Args:
            awaited: tokens that are still to come.
        """
        if self._target_alone:
            return False
        planner = self._rounds.planner
        if self._catch_up.run_chunk(self.tokens, planner):
            return True
        return planner.should_guess(awaited) and self._guesses.next(self.tokens, planner)

    def _commit(self, drafted: Sequence[DraftedToken], verdict: Verdict) -> list[AnswerToken]:
        self.counters.rounds += 1
        last = Origin.BONUS if verdict.accepted == len(drafted) else Origin.RECOVERED
        accepted = drafted[: verdict.accepted]
        committed = [
            AnswerToken(token.token_id, Origin.LOOKUP if token.match else Origin.ACCEPTED, token.margin)
            for token in accepted
        ]
        committed.append(AnswerToken(verdict.token_id, last if drafted else Origin.TARGET))
        if verdict.logprobs:
            pairs = zip(committed, verdict.logprobs, strict=True)
            committed = [replace(token, logprobs=logprobs) for token, logprobs in pairs]
        self.tokens += [token.token_id for token in committed]
        return committed
