"""Rounds: drafts, sends the Drafts, and awaits their Verdicts while it drafts on.

Up to ``drafts_ahead`` further Drafts are sent before the Verdict of the oldest, each on
an *assumed bonus token*: the token that the device itself drafts after the last one it
sent. A Verdict that contradicts an assumption invalidates all that builds on it.

A Draft comes from the draft model or from prompt lookup. After the latter the draft model
catches up in chunks while a Verdict is awaited, and with the rest once it drafts again.
After an outage, Drafts are the tokens that the draft model added alone.

Knows tokens and the planner; not what an answer is.
"""

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from device.drafting.drafter import DraftedToken, Drafter, DraftResult
from device.drafting.lookup_drafter import LookupDrafter
from device.drafting.prompt_lookup import Proposal
from device.planning.planner import Planner
from device.session.catch_up import CatchUp
from device.session.client import Client
from device.session.counters import Counters
from device.session.pending_draft import PendingDraft, evidence_of
from device.session.round_records import Moment
from device.session.session_requests import SessionRequests
from device.session.unverified_tail import UnverifiedTail
from device.settings import DraftSettings
from protocol.messages import Mode, Verdict

logger = logging.getLogger(__name__)


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
        catch_up: of the draft model.
        settings: how to draft.
        tokens: the committed tokens; the session that owns the list appends the tokens of each round to it.
        lookup: of the session; None where it drafts with the draft model alone.
        tail: of the answer; None where it waits in an outage.

    Attributes:
        counters: over all rounds.
    """

    def __init__(
        self,
        client: Client,
        requests: SessionRequests,
        drafter: Drafter,
        planner: Planner,
        catch_up: CatchUp,
        settings: DraftSettings,
        tokens: Sequence[int],
        lookup: LookupDrafter | None = None,
        tail: UnverifiedTail | None = None,
    ) -> None:
        self.counters = Counters()
        self._client = client
        self._requests = requests
        self._drafter = drafter
        self._settings = settings
        self._tokens = tokens
        self._lookup = lookup
        self._tail = tail
        self._model_follows = True  # the draft model has drafted the last of the pending tokens
        self._in_flight: deque[PendingDraft] = deque()
        self._next: PendingDraft | None = None
        self._concluded = client.now()
        self._catch_up = catch_up
        self.planner = planner

    @property
    def planner(self) -> Planner:
        """Decides how much to draft."""
        return self._planner

    @planner.setter
    def planner(self, planner: Planner) -> None:
        self._planner = planner
        planner.drafts_ahead = self.drafts_ahead
        planner.guesses = self._may_guess

    @property
    def in_flight(self) -> bool:
        """Whether a Draft has no Verdict yet."""
        return bool(self._in_flight)

    def next(self, end: int) -> VerifiedRound:
        """Draft and send up to position ``end`` until the oldest Draft in flight has its Verdict."""
        draft_room = self._drafter.room(self._tokens)
        while True:
            self.begin_ready(end)
            may_draft = self._may_draft(end, draft_room)
            if self._in_flight and (may_draft or not self._may_send()):
                is_busy = may_draft or self._use_wait()
                if verdict := self._verdict(wait=not is_busy):
                    return self._conclude(verdict)
                if not self._requests.drafts_in_flight:  # the session had to be opened again
                    self._discard()
                    continue
            if may_draft:
                self._draft_token()
            elif self._may_send() or not self._in_flight:
                self._send()

    def begin_ready(self, end: int) -> bool:
        """Begin the next Draft, up to position ``end``, with tokens that take no forward pass; whether there are any.

        They are what the draft model added in an outage, or come from prompt lookup where that is worth it.
        """
        self._retake_model()
        if self._lookup is not None:
            self._lookup.follow(self._tokens, self._drafter.stop_ids, self._planner)
        if self._next is not None:
            return self._next.is_ready
        is_ahead = bool(self._in_flight)
        if self._at_end or (is_ahead and not self.drafts_ahead):
            return False
        return self._begin_tail(end, is_ahead) or self._look_up(end, is_ahead)

    def _begin_tail(self, end: int, is_ahead: bool) -> bool:
        """Begin the next Draft with unverified tokens of the answer, as many as the base station allows."""
        most = min(self._room(end), self._client.welcome.max_draft_len + is_ahead)
        tokens = self._tail.following(self._pending_ids)[: max(0, most)] if self._tail else []
        if len(tokens) <= is_ahead:  # an assumed bonus token alone is no Draft
            return False
        self._begin_with(tokens, is_ahead, self._client.now())
        return True

    def _look_up(self, end: int, is_ahead: bool) -> bool:
        """Begin the next Draft by prompt lookup."""
        if self._lookup is None:
            return False
        most = min(self._room(end), self._longest + is_ahead)
        proposal = self._lookup.propose([*self._tokens, *self._pending_ids], most, self._drafter.stop_ids)
        count = self._lookup_len(proposal) if proposal else 0
        if proposal is None or count <= is_ahead:  # an assumed bonus token alone is no Draft
            return False
        began = self._client.now()
        self._begin_with(self._lookup.drafted(proposal, count), is_ahead, began)
        return True

    def _begin_with(self, tokens: list[DraftedToken], is_ahead: bool, began: Moment) -> None:
        """Begin the next Draft with tokens; the first is its assumed bonus token where another is in flight."""
        assumed = tokens.pop(0) if is_ahead else None
        self._next = PendingDraft(began, assumed_bonus=assumed, tokens=tokens, is_ready=True)
        self._model_follows = False
        if not is_ahead:
            self._concluded = began

    def _verdict(self, wait: bool = True) -> Verdict | None:
        """The Verdict of the oldest Draft in flight, as ``SessionRequests.verdict``."""
        verdict = self._requests.verdict(wait)
        self._retake_model()
        return verdict

    def _retake_model(self) -> None:
        """Draft anew after the committed and pending tokens where the draft model was used in an outage."""
        if self._tail and self._tail.take_model():
            self._next, self._model_follows = None, False

    def begin_decode(self) -> None:
        """Forget the Draft that was begun: it does not follow the tokens that the target now decodes alone."""
        self._next = None

    def begin(self) -> VerifiedRound | None:
        """Ask for the next token with a Draft without tokens, while the draft model runs the tokens before it.

        Drafting ahead can then begin before that token arrives.

        Returns:
            The round, if it is verified before the draft model is ready; else ``next`` goes on.
        """
        self._send()
        while self._catch_up.run_chunk(self._tokens, self._planner):
            if verdict := self._requests.verdict(wait=False):
                return self._conclude(verdict)
            if not self._requests.drafts_in_flight:  # the session had to be opened again
                self._discard()
        self._drafter.follow(self._tokens)
        self._model_follows = True
        return None

    def _may_draft(self, end: int, draft_room: int) -> bool:
        """Whether to draft another token of the next Draft; ``draft_room`` tokens fit the draft model's context."""
        drafting = self._next or PendingDraft(self._concluded)
        new_assumption = bool(self._in_flight) and self._next is None
        room = self._room(end) - new_assumption
        if room <= 0 or len(drafting.tokens) >= self._longest or self._pending_len >= draft_room or self._at_end:
            return False
        if drafting.is_ready or (self._in_flight and not self.drafts_ahead):
            return False
        is_last = room == 1 and bool(drafting.tokens)  # in a Draft of its own it would take another round trip
        if self._settings.draft_len is not None or is_last:
            return True
        if self.drafts_ahead:
            assumed = [drafting.assumed_bonus.evidence] if drafting.assumed_bonus else []
            before = [*evidence_of(self._in_flight), *assumed]
            return self._planner.should_draft_ahead(before, drafting.margins, self._may_send())
        return self._planner.should_continue(drafting.margins)

    def _room(self, end: int) -> int:
        """Tokens that may be drafted beside the pending ones, up to position ``end``."""
        return min(end, self._client.welcome.context_length) - len(self._tokens) - self._pending_len - 1

    @property
    def _may_guess(self) -> bool:
        """Whether guesses teach a planner, and the draft model has a core of its own while the target decodes."""
        is_planned = self._settings.draft_len is None and self._settings.mode is not Mode.TARGET
        return is_planned and self._drafts_argmax and self.drafts_ahead > 0

    @property
    def _drafts_argmax(self) -> bool:
        """Whether drafted tokens are chosen as an assumed bonus token or a guess is."""
        return self._settings.mode.sends_ids_alone or self._drafter.sampling.greedy

    @property
    def _longest(self) -> int:
        """Most tokens of a Draft."""
        most = self._client.welcome.max_draft_len
        return min(most, self._settings.draft_len or most)

    def _lookup_len(self, proposal: Proposal) -> int:
        """How many tokens of a proposal to send; 0 where the draft model or the target alone goes on instead."""
        can_draft = self._drafter.room(self._tokens) > 0
        if self._settings.draft_len is not None:
            return 0 if can_draft else len(proposal.token_ids)
        return self._planner.lookup_len(proposal, can_draft, evidence_of(self._in_flight))

    def _use_wait(self) -> bool:
        """Bring the draft model's KV cache up to date while a Verdict is awaited; whether there may be more to do."""
        if not self._settings.cache_last_token:
            return False
        if not self._model_follows:
            return self._catch_up.run_chunk(self._tokens, self._planner)
        self._drafter.cache_last_token()
        return False

    def _may_send(self) -> bool:
        """Whether the next Draft may be sent while others are in flight."""
        return self._next is not None and bool(self._next.tokens) and len(self._in_flight) <= self.drafts_ahead

    def _draft_token(self) -> None:
        """Draft one token more: of the next Draft, or the bonus token that it assumes."""
        if self._next is None and not (self._in_flight and self._model_follows):
            self._follow([*self._tokens, *self._pending_ids])
        began = self._client.now()
        if self._next is None and self._in_flight:
            self._next = PendingDraft(began, assumed_bonus=self._drafter.guess_token())
        else:
            index = len(self._next.tokens) if self._next is not None else 0
            token = self._drafter.draft_token(index if self._requests.block_verification else None)
            if self._next is None:
                self._concluded, self._next = began, PendingDraft(began)
            self._next.tokens.append(token)
            self._next.draft_seconds += self._client.now().seconds - began.seconds

    def _follow(self, tokens: Sequence[int]) -> None:
        """Have the draft model draft what follows ``tokens``; first it runs those that prompt lookup drafted."""
        if not self._model_follows:
            self._catch_up.run_all(tokens, self._planner)
        self._drafter.follow(tokens)
        self._model_follows = True

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

    def _conclude(self, verdict: Verdict, timed: bool = True) -> VerifiedRound:
        """Take the Verdict of the oldest Draft in flight; discard those on a wrong assumption."""
        draft, received = self._in_flight.popleft(), self._client.now()
        self._observe(draft, verdict, received, timed)
        self.counters.count_draft(draft.tokens, verdict.accepted)
        following = self._in_flight[0] if self._in_flight else self._next
        if following and verdict.accepted == len(draft.tokens):
            assert following.assumed_bonus is not None
            is_right = following.assumed_bonus.token_id == verdict.token_id
            if following.assumed_bonus.match is None:
                self._planner.observe_assumed(following.assumed_bonus.margin, is_right, self._drafts_argmax)
            following.assumed_bonus = None
        else:
            is_right = False
        if not is_right:
            self._discard()
        is_whole = following is None and verdict.accepted == len(draft.tokens)
        if is_whole and self._settings.cache_last_token and self._model_follows:
            self._drafter.cache_last_token()  # alone, so that the draft does not depend on when the Verdict came
        return VerifiedRound(draft.tokens, verdict)

    def _observe(self, draft: PendingDraft, verdict: Verdict, received: Moment, timed: bool) -> None:
        """Tell the planner and the record file what a round took; the planner only where it was ``timed``."""
        sent = draft.sent
        assert sent is not None
        prefilled = self._requests.take_prefilled()
        is_known = timed and not prefilled
        reply_seconds = received.seconds - sent.seconds if is_known and not draft.overlaps else None
        if (opened_seconds := self._requests.take_opened_seconds()) is not None:
            self._planner.observe_opened(opened_seconds, at_most=True)
        if timed and prefilled:
            self._planner.observe_target_prefill(prefilled, received.seconds - sent.seconds)
        round_seconds = received.seconds - self._concluded.seconds if is_known else None
        if draft.is_ready:
            self._planner.observe_lookup_reply(len(draft.tokens), reply_seconds)
        else:
            self._planner.observe(draft.margins, verdict.accepted, draft.draft_seconds, reply_seconds, round_seconds)
        if logger.isEnabledFor(logging.DEBUG):
            counts = verdict.round_id, verdict.accepted, len(draft.tokens)
            source = "prompt lookup" if any(token.match for token in draft.tokens) else "the draft model"
            logger.debug("round %d, %d of %d accepted from %s; next: %s", *counts, source, self._planner.explanation)
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

        Its Verdict may have come meanwhile and be lost, so the Drafts are sent again; how long it took tells nothing.

        Returns:
            None once no Draft is in flight.
        """
        self._next = None
        while self._in_flight:
            verdict = self._requests.verdict(wait=False)
            if verdict is None and self._requests.drafts_in_flight:
                verdict = self._requests.verdict_again()
            self._retake_model()
            if verdict:
                return self._conclude(verdict, timed=False)
            self._discard()
        return None

    @property
    def drafts_ahead(self) -> int:
        """How many Drafts may be sent on an assumed bonus token."""
        most = min(self._client.welcome.window, self._requests.window) - 1  # a restart may change it
        return most if self._settings.drafts_ahead is None else min(most, self._settings.drafts_ahead)

    @property
    def _pending_ids(self) -> list[int]:
        """The tokens that are drafted and not verified, assumed bonus tokens included."""
        return [token_id for draft in self._in_flight for token_id in draft.token_ids]

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
