"""Rounds: drafts, sends the Drafts, and awaits their Verdicts while it drafts on.

Up to ``drafts_ahead`` further Drafts are sent before the Verdict of the oldest, each on
an *assumed bonus token*: the token that the device itself drafts after the last one it
sent. A Verdict that contradicts an assumption invalidates all that builds on it.

Knows tokens and the planner; not what an answer is.
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from device.client import Client
from device.drafter import DraftedToken, Drafter, DraftResult
from device.pending_draft import PendingDraft, margins_of
from device.planner import Planner
from device.round_records import Moment
from device.session_requests import SessionRequests
from device.settings import DraftSettings
from protocol.messages import Verdict

logger = logging.getLogger(__name__)


@dataclass
class Counters:
    """What a session has done so far; ``drafted`` counts no invalidated Draft, ``draft_bytes`` counts all."""

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    draft_bytes: int = 0
    invalidated_bytes: int = 0


@dataclass(frozen=True)
class VerifiedRound:
    """The tokens of a Draft, and their Verdict."""

    drafted: Sequence[DraftedToken]
    verdict: Verdict


class DraftRounds:
    """The rounds of one session.

    Args:
        client: the greeted base station.
        requests: of the session.
        drafter: of the session.
        planner: decides how much to draft; may change while no Draft is in flight.
        settings: how to draft.
        tokens: the committed tokens; the session that owns the list appends the tokens of each round to it.

    Attributes:
        counters: over all rounds.
    """

    def __init__(
        self,
        client: Client,
        requests: SessionRequests,
        drafter: Drafter,
        planner: Planner,
        settings: DraftSettings,
        tokens: Sequence[int],
    ) -> None:
        self.counters = Counters()
        self._client = client
        self._requests = requests
        self._drafter = drafter
        self._settings = settings
        self._tokens = tokens
        self._in_flight: deque[PendingDraft] = deque()
        self._next: PendingDraft | None = None
        self._concluded = client.now()
        self.planner = planner

    @property
    def planner(self) -> Planner:
        """Decides how much to draft."""
        return self._planner

    @planner.setter
    def planner(self, planner: Planner) -> None:
        self._planner = planner
        planner.drafts_ahead = self.drafts_ahead

    @property
    def in_flight(self) -> bool:
        """Whether a Draft has no Verdict yet."""
        return bool(self._in_flight)

    def next(self, end: int) -> VerifiedRound:
        """Draft and send up to position ``end`` until the oldest Draft in flight has its Verdict."""
        draft_room = self._drafter.room(self._tokens)
        while True:
            may_draft = self._may_draft(end, draft_room)
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

    def begin(self, prefill: Callable[[], bool]) -> VerifiedRound | None:
        """Ask for the next token with a Draft without tokens, while the draft model runs the tokens before it.

        Drafting ahead can then begin before that token arrives.

        Args:
            prefill: runs some tokens; says whether there were any.

        Returns:
            The round, if it is verified before the draft model is ready; else ``next`` goes on.
        """
        self._send()
        while prefill():
            if verdict := self._requests.verdict(wait=False):
                return self._conclude(verdict)
        self._drafter.follow(self._tokens)
        return None

    def _may_draft(self, end: int, draft_room: int) -> bool:
        """Whether to draft another token of the next Draft; ``draft_room`` tokens fit the draft model's context."""
        drafting = self._next or PendingDraft(self._concluded)
        new_assumption = bool(self._in_flight) and self._next is None
        room = min(end, self._client.welcome.context_length) - len(self._tokens) - self._pending_len - 1
        room -= new_assumption
        fixed = self._settings.draft_len
        longest = min(self._client.welcome.max_draft_len, fixed or self._client.welcome.max_draft_len)
        if room <= 0 or len(drafting.tokens) >= longest or self._pending_len >= draft_room or self._at_end:
            return False
        if self._in_flight and not self.drafts_ahead:
            return False
        if fixed is not None:
            return True
        if self.drafts_ahead:
            assumed = [drafting.assumed_bonus.margin] if drafting.assumed_bonus else []
            return self._planner.should_draft_ahead([*margins_of(self._in_flight), *assumed], drafting.margins)
        return self._planner.should_continue(drafting.margins)

    def _may_send(self) -> bool:
        """Whether the next Draft may be sent while others are in flight."""
        return self._next is not None and bool(self._next.tokens) and len(self._in_flight) <= self.drafts_ahead

    def _draft_token(self) -> None:
        """Draft one token more: of the next Draft, or the bonus token that it assumes."""
        began = self._client.now()
        if self._next is not None:
            self._next.tokens.append(self._drafter.draft_token())
        elif self._in_flight:
            self._next = PendingDraft(began, assumed_bonus=self._drafter.guess_token())
        else:
            self._concluded = began
            self._drafter.follow(self._tokens)
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

    def _conclude(self, verdict: Verdict) -> VerifiedRound:
        """Take the Verdict of the oldest Draft in flight; discard those on a wrong assumption."""
        draft, received = self._in_flight.popleft(), self._client.now()
        self._observe(draft, verdict, received)
        self.counters.drafted += len(draft.tokens)
        self.counters.accepted += verdict.accepted
        following = self._in_flight[0] if self._in_flight else self._next
        if following and verdict.accepted == len(draft.tokens):
            assert following.assumed_bonus is not None
            is_right = following.assumed_bonus.token_id == verdict.token_id
            is_argmax = self._settings.mode.sends_ids_alone or self._drafter.sampling.greedy
            self._planner.observe_assumed(following.assumed_bonus.margin, is_right, is_argmax)
            following.assumed_bonus = None
        else:
            is_right = False
        if not is_right:
            self._discard()
        if following is None and verdict.accepted == len(draft.tokens) and self._settings.cache_last_token:
            self._drafter.cache_last_token()  # alone, so that the draft does not depend on when the Verdict came
        return VerifiedRound(draft.tokens, verdict)

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

    def leave(self) -> VerifiedRound | None:
        """Stop drafting: the oldest Draft that an abandoned answer left in flight, once it is verified.

        Returns:
            None once no Draft is in flight.
        """
        self._next = None
        while self._in_flight:
            if verdict := self._requests.verdict():
                return self._conclude(verdict)
            self._discard()
        return None

    @property
    def drafts_ahead(self) -> int:
        """How many Drafts may be sent on an assumed bonus token."""
        most = self._client.welcome.window - 1
        return most if self._settings.drafts_ahead is None else min(most, self._settings.drafts_ahead)

    @property
    def _pending_len(self) -> int:
        """How many tokens are drafted and not verified."""
        return sum(map(len, [*self._in_flight, *([self._next] if self._next else [])]))

    @property
    def _at_end(self) -> bool:
        """Whether the last drafted token ends the answer."""
        last = self._next if self._next and len(self._next) else self._in_flight[-1] if self._in_flight else None
        tokens = [*([last.assumed_bonus] if last.assumed_bonus else []), *last.tokens] if last else []
        return bool(tokens) and tokens[-1].token_id in self._drafter.stop_ids
