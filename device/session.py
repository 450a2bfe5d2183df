"""The device's side of a session: draft, send the Draft, commit the Verdict.

Knows tokens, not text; ``session_requests.py`` gets the requests answered.
"""

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from device.client import Client
from device.common_prefix import common_prefix
from device.draft_model import DraftModel
from device.drafter import Drafter, DraftResult
from device.pending_draft import PendingDraft, margins_of
from device.planner import Planner
from device.round_records import Moment
from device.session_requests import SessionRequests
from device.settings import DraftSettings
from protocol.errors import CancelledError, ContextLengthError, NonFiniteError
from protocol.limits import option_name
from protocol.messages import Mode, Sampling, Verdict

logger = logging.getLogger(__name__)

_MIN_PREFILL, _MAX_PREFILL = 8, 32
"""While the target decodes alone, the draft model runs the new tokens in chunks of this size.

A single token costs more, and more tokens would keep those of the target waiting.
"""


class Origin(StrEnum):
    """How a token of the answer was produced."""

    ACCEPTED = "accepted"
    RECOVERED = "recovered"
    BONUS = "bonus"


@dataclass(frozen=True)
class AnswerToken:
    """One committed token of an answer."""

    token_id: int
    origin: Origin


@dataclass
class Counters:
    """What a session has done so far; ``drafted`` counts no invalidated Draft, ``draft_bytes`` counts all."""

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    draft_bytes: int = 0
    invalidated_bytes: int = 0


class DeviceSession:
    """One conversation: the committed tokens, and answers that continue them.

    Args:
        client: the greeted base station.
        planner: decides how much to draft.
        settings: how to draft and sample.
        model: the draft model.
        prompt_ids: the first prompt.

    Attributes:
        tokens: committed so far, the prompt included.
        counters: over all answers.

    Raises:
        SettingsError: the base station does not serve these settings.
        ContextLengthError: the prompt does not fit the target's context, or exceeds the base station's limit.
    """

    def __init__(
        self, client: Client, planner: Planner, settings: DraftSettings, model: DraftModel, prompt_ids: list[int]
    ) -> None:
        client.check_served(settings)
        self.counters = Counters()
        self.tokens: list[int] = []
        self._client = client
        self._planner = planner
        self._settings = settings
        planner.drafts_ahead = self._drafts_ahead
        self._target_alone = settings.mode is Mode.TARGET
        self._draft_context = model.manifest.context_length
        self._drafter = Drafter(
            model,
            settings.mode,
            settings.sampling,
            settings.uplink,
            client.vocab_size,
            client.stop_ids,
            client.check_cancelled,
        )
        self._requests = SessionRequests(client, settings.mode, settings.sampling, self.tokens)
        self._in_flight: deque[PendingDraft] = deque()
        self._next: PendingDraft | None = None
        self._concluded = client.now()
        self._check_prompt(prompt_ids)
        began = client.now()
        try:
            self._requests.open(prompt_ids)
            self._planner.observe_opened(client.now().seconds - began.seconds)
            self.tokens[:] = prompt_ids
        except (NonFiniteError, CancelledError):  # nobody else could close the session
            self.close()
            raise

    @property
    def ready(self) -> bool:
        """Whether another prompt can continue the session: no reply is outstanding, except to Drafts."""
        return self._requests.ready or self._requests.drafts_in_flight > 0

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end an answer."""
        return self._client.stop_ids

    def extend(self, prompt_ids: list[int], sampling: Sampling | None = None, planner: Planner | None = None) -> None:
        """Continue with a prompt; only what differs from the committed tokens is sent and run.

        Args:
            prompt_ids: the whole conversation.
            sampling: how the target is sampled from now on; None for no change.
            planner: for these settings; None for no change.

        Raises:
            ContextLengthError: it does not fit the target's context, or exceeds the base station's limit.
        """
        self._await_verdicts()
        sampling = sampling or self._drafter.sampling
        self._planner = planner or self._planner
        self._planner.drafts_ahead = self._drafts_ahead
        start = common_prefix(self.tokens, prompt_ids[:-1])
        can_extend = self._requests.can_extend(sampling)
        self._check_prompt(prompt_ids, start if can_extend else 0)
        self._drafter.sampling = sampling
        if can_extend:
            self._requests.extend(start, prompt_ids[start:], sampling)
        else:  # the target still decodes an abandoned answer, or the base station is of an older version
            self._requests.reopen(prompt_ids, sampling)
        self.tokens[:] = prompt_ids

    def answer(self, max_new_tokens: int) -> Iterator[AnswerToken]:
        """The answer to the prompt, each token as soon as its round is committed.

        Ends after a stop id, ``max_new_tokens`` tokens or at the end of the context.
        """
        start = len(self.tokens)
        end = start + max_new_tokens
        while (room := min(end, self._client.welcome.context_length) - len(self.tokens)) > 0:
            alone = 0 if self._in_flight else self._decode_len(room)
            try:
                for token in self._decode(alone) if alone else self._round(len(self.tokens) + room):
                    self._client.check_cancelled()
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

    def _round(self, end: int) -> list[AnswerToken]:
        """Draft and send up to position ``end`` until the oldest Draft in flight has its Verdict, and commit it."""
        while True:
            may_draft = self._may_draft(end)
            if self._in_flight and (may_draft or not self._may_send()):
                if not may_draft and self._settings.cache_last_token:
                    self._drafter.cache_last_token()
                if verdict := self._requests.verdict(wait=not may_draft):
                    return self._conclude(verdict)
                if not self._requests.drafts_in_flight:  # the session had to be opened again
                    self._discard()
                    continue
            if may_draft:
                self._draft_token()
            else:
                self._send()

    def _may_draft(self, end: int) -> bool:
        """Whether to draft another token of the next Draft."""
        drafting = self._next or PendingDraft(self._concluded)
        new_assumption = bool(self._in_flight) and self._next is None
        room = min(end, self._client.welcome.context_length) - self._sequence_len - 1 - new_assumption
        fixed = self._settings.draft_len
        longest = min(self._client.welcome.max_draft_len, fixed or self._client.welcome.max_draft_len)
        if room <= 0 or len(drafting.tokens) >= longest or self._sequence_len >= self._draft_context or self._at_end:
            return False
        if self._in_flight and not self._drafts_ahead:
            return False
        if fixed is not None:
            return True
        if self._drafts_ahead:
            before = margins_of(self._in_flight)
            return self._planner.should_draft_ahead(before, drafting.uncertain_margins)
        return self._planner.should_continue(drafting.margins)

    def _may_send(self) -> bool:
        """Whether the next Draft may be sent while others are in flight."""
        return self._next is not None and bool(self._next.tokens) and len(self._in_flight) <= self._drafts_ahead

    def _draft_token(self) -> None:
        """Draft one token more: of the next Draft, or the bonus token that it assumes."""
        began = self._client.now()
        if self._next is not None:
            self._next.tokens.append(self._drafter.draft_token())
        elif self._in_flight:
            self._next = PendingDraft(began, assumed_bonus=self._drafter.guess_token())
        else:
            self._concluded = began
            self._drafter.follow(self.tokens)
            self._next = PendingDraft(began, tokens=[self._drafter.draft_token()])
        self._next.draft_seconds += self._client.now().seconds - began.seconds

    def _send(self) -> None:
        """Send the next Draft, without tokens where none may be drafted."""
        began = self._client.now()
        draft, self._next = self._next or PendingDraft(began), None
        if not self._in_flight and not draft.tokens:
            self._concluded = began
        draft.overlaps = bool(self._in_flight)
        assumed = draft.assumed_bonus
        self._requests.send_draft(DraftResult.of(draft.tokens), assumed.token_id if assumed else None)
        draft.sent = began
        draft.uplink_bytes = self._client.now().uplink_bytes - began.uplink_bytes
        self.counters.draft_bytes += draft.uplink_bytes
        self._in_flight.append(draft)

    def _conclude(self, verdict: Verdict) -> list[AnswerToken]:
        """Commit the Verdict of the oldest Draft in flight; discard those on a wrong assumption."""
        draft, received = self._in_flight.popleft(), self._client.now()
        self._observe(draft, verdict, received)
        self.counters.drafted += len(draft.tokens)
        self.counters.accepted += verdict.accepted
        following = self._in_flight[0] if self._in_flight else self._next
        if following and verdict.accepted == len(draft.tokens):
            assert following.assumed_bonus is not None
            is_right = following.assumed_bonus.token_id == verdict.token_id
            self._planner.observe_assumed(following.assumed_bonus.margin, is_right)
            following.assumed_bonus = None
        else:
            is_right = False
        if not is_right:
            self._discard()
        return self._commit(draft.token_ids, verdict)

    def _observe(self, draft: PendingDraft, verdict: Verdict, received: Moment) -> None:
        """Tell the planner and the record file what a round took."""
        sent = draft.sent
        assert sent is not None
        drafting = draft.draft_seconds * len(draft.tokens) / max(1, len(draft))
        prefilled = self._requests.take_prefilled()
        reply_seconds = None if prefilled or draft.overlaps else received.seconds - sent.seconds
        round_seconds = None if prefilled else received.seconds - self._concluded.seconds
        self._planner.observe(draft.margins, verdict.accepted, drafting, reply_seconds, round_seconds)
        if logger.isEnabledFor(logging.DEBUG):
            counts = verdict.round_id, verdict.accepted, len(draft.tokens)
            logger.debug("round %d, %d of %d accepted; next: %s", *counts, self._planner.explanation)
        counted = replace(self._concluded, seconds=draft.began.seconds)
        longest = self._settings.draft_len or self._client.welcome.max_draft_len
        self._client.record(self._settings.mode, verdict, longest, len(draft.tokens), (counted, sent, received))
        self._concluded = received

    def _discard(self) -> None:
        """Forget all Drafts without a Verdict."""
        self.counters.invalidated_bytes += sum(draft.uplink_bytes for draft in self._in_flight)
        self._in_flight.clear()
        self._next = None

    def _await_verdicts(self) -> None:
        """Commit the Drafts that an abandoned answer left in flight."""
        while self._in_flight:
            if verdict := self._requests.verdict():
                self._conclude(verdict)
            else:
                self._discard()
        self._next = None

    @property
    def _drafts_ahead(self) -> int:
        """How many Drafts may be sent on an assumed bonus token."""
        most = self._client.welcome.window - 1
        return most if self._settings.drafts_ahead is None else min(most, self._settings.drafts_ahead)

    @property
    def _sequence_len(self) -> int:
        """The length of the committed tokens with all drafted ones."""
        pending = [*self._in_flight, *([self._next] if self._next else [])]
        return len(self.tokens) + sum(map(len, pending))

    @property
    def _at_end(self) -> bool:
        """Whether the last drafted token ends the answer."""
        last = self._next if self._next and len(self._next) else self._in_flight[-1] if self._in_flight else None
        tokens = [*([last.assumed_bonus] if last.assumed_bonus else []), *last.tokens] if last else []
        return bool(tokens) and tokens[-1].token_id in self.stop_ids

    def _decode_len(self, room: int) -> int:
        """How many tokens the target decodes alone now; 0 where the device drafts."""
        if self._target_alone or not self._draft_room:
            return room
        if self._settings.draft_len:
            return 0
        return min(self._planner.decode_len(self._drafter.backlog(self.tokens)), room)

    @property
    def _draft_room(self) -> int:
        """Tokens that fit the draft model's context after the committed ones; without any the target decodes alone."""
        return max(0, self._draft_context - len(self.tokens))

    def _decode(self, count: int) -> Iterator[AnswerToken]:
        """Let the target decode alone and commit its tokens; meanwhile the draft model runs its backlog."""
        moments = [self._client.now()]
        for verdict in self._requests.decode(count, self._prefill_draft_model):
            moments.append(self._client.now())
            self._client.record(self._settings.mode, verdict, 0, 0, (moments[-2], moments[-2], moments[-1]))
            yield from self._commit((), verdict)
        seconds = [moment.seconds for moment in moments]
        first_seconds = None if self._requests.take_prefilled() else seconds[1] - seconds[0]
        self._planner.observe_decoded(len(seconds) - 1, first_seconds, seconds[-1] - seconds[1])
        logger.debug("%d tokens of the target alone; next: %s", len(seconds) - 1, self._planner.explanation)

    def _prefill_draft_model(self) -> bool:
        """Run a chunk of the committed tokens through the draft model; whether there was one."""
        if self._target_alone or not self._draft_room:
            return False
        began = self._client.now().seconds
        backlog = min(self._drafter.backlog(self.tokens), _MAX_PREFILL)
        if backlog < _MIN_PREFILL:
            return False
        self._drafter.prefill(self.tokens, backlog)
        self._planner.observe_prefill(backlog, self._client.now().seconds - began)
        return True

    def _commit(self, drafted: Sequence[int], verdict: Verdict) -> list[AnswerToken]:
        self.counters.rounds += 1
        last = Origin.BONUS if verdict.accepted == len(drafted) else Origin.RECOVERED
        committed = [AnswerToken(token_id, Origin.ACCEPTED) for token_id in drafted[: verdict.accepted]]
        committed.append(AnswerToken(verdict.token_id, last))
        self.tokens += [token.token_id for token in committed]
        return committed

    def _check_prompt(self, prompt_ids: list[int], start: int = 0) -> None:
        context_length = self._client.welcome.context_length
        if len(prompt_ids) >= context_length:
            allowed = f"at most {context_length - 1} (the target's context at the base station)"
            raise ContextLengthError("prompt", f"{len(prompt_ids)} tokens", allowed)
        new, most = len(prompt_ids) - start, self._client.welcome.max_prompt_len
        if new > most:
            allowed = f"at most {most} at once (the base station's {option_name('max_prompt_len')})"
            raise ContextLengthError("prompt", f"{new} new tokens", allowed)
