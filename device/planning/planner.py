"""How many tokens to draft next, and whether to draft at all, decided from what was measured.

Knows numbers, not models or links; the formulas are in ``common/round_model.py``.
"""

from bisect import bisect
from collections.abc import Sequence
from dataclasses import replace
from math import ceil, inf, prod, sqrt
from typing import TypeAlias

from common.estimates import DECAY, Line, Ratio, Share
from common.round_model import RoundTimes, expected_tokens, run_tokens
from device.drafting.prompt_lookup import Match, Proposal
from device.planning.planner_figures import MAX_ROUNDS, PlannerFigures
from device.planning.planner_lookup import LookupAcceptance
from protocol.bundle import QualityFigures

Evidence: TypeAlias = float | Match | None
"""What tells the acceptance of a drafted token: its margin or the match that it followed; None where it was sampled."""
MAX_DRAFT_LEN = 32
"""Longest planned draft: the formulas assume the same acceptance at every position, which fails further out."""
ASSUMED_COST = 1 / 4
"""Time to draft a token over the time of a forward pass of the target, before either is measured."""
PREFILL_COST = 1 / 5
"""Time to run a token of a prompt through the draft model over that to draft one, before it is measured."""
FIRST_DRAFT_LEN = 4
"""The first round is short: the link's rate is not known yet."""
TRIAL = 3
"""Tokens that the target decodes alone to measure its speed: two intervals."""
MIN_BACKLOG = 32
"""Tokens that the draft model must run before it can draft, from which on the target decodes alone meanwhile."""
MIN_WAIT = 64
"""Tokens at least until the slower alternative is tried again."""
TRIAL_SHARE = 1 / 50
"""Largest share of all time that trials of drafting may cost."""
_TARGET_TRIAL_SHARE = 1 / 100
"""The same for trials of the target alone, which run where drafting is faster, usually by far."""
_LOOKUP_SHARE = 1 / 40
"""Largest share of the time that the target alone may lose because it decodes piece by piece, for prompt lookup."""
_LEAST_PIECE = 2
_PRIOR_ROUNDS = 6.0
_CERTAIN_ROUNDS = 32
"""Before this many rounds, drafting is given up only where it is clearly slower: n rounds have an error of 1/√n."""
ALONE_DECAY = 0.5
"""Weight that earlier rounds keep after the target has decoded ``MIN_WAIT`` tokens alone."""
MIN_SURVIVAL = 0.15
"""Least probability of its assumption at which a Draft is sent ahead."""
_KNOWN_TRIALS = 8.0
_KNOWN_ROUNDS = 4.0
"""What an earlier process learnt counts as so many drafted tokens and rounds, so that a change is noticed soon."""
_HEADROOM = 1.25
"""Drafts are as long as if the target took longer by this: times vary, and it should not fall behind."""
_KNOWN_CERTAINTY = 8
"""Rounds that what an earlier process learnt counts as where drafting might be given up: links change."""
_INSTANT = 1e-9
_MARGIN_BOUNDS = (0.15, 0.3, 0.5)
"""Bounds of the margin classes, in nats; the acceptance rate is estimated for each class."""
_PRIOR_ACCEPTANCE = (0.6, 0.9)
"""Upper bounds of the initial acceptance rate in the classes of the smallest margins."""


class Planner:
    """Decides whether to draft, and after each drafted token whether to draft another.

    One more token adds the probability that it is accepted, and costs the time to
    draft, send and verify it. It is drafted while that ratio is at least the tokens
    per second of whole rounds: the rule that maximises a ratio (Dinkelbach 1967).
    Where rounds give fewer tokens per second than the target alone, the target
    decodes alone (the adaptive rule of arXiv:2509.04576); at once where drafting a token
    takes longer than a forward pass of the target. The slower alternative is tried
    again from time to time.

    All figures are running estimates; Drafts that follow each other without a pause
    count as one observation. The time of a reply is a line over the number
    of drafted tokens: its intercept is the round trip plus one forward pass, its
    slope the time to send and verify a token. Initial estimates come from
    ``common/round_model.py``.

    The acceptance rate is estimated by *margin*, the gap between the two highest
    scores, where the argmax is drafted: in modes ``ids`` and ``coupled``, and at
    temperature 0 in all modes. Sampled tokens share one estimate. That of tokens from
    prompt lookup is estimated by the length of their match.

    Prompt lookup drafts where its round is expected to give more tokens than the
    faster of the draft model and the target alone would give in the same time.

    Args:
        quality: figures of the quality check, the initial acceptance rate.
        greedy: whether the target is sampled at temperature 0.

    Attributes:
        drafts_ahead: how many Drafts may be sent on an assumed bonus token.
    """

    def __init__(self, quality: QualityFigures, greedy: bool) -> None:
        self.drafts_ahead = 0
        self._acceptance = Share(quality.argmax_agreement if greedy else quality.overlap)
        self._by_margin: dict[int, Share] = {}
        self._target_seconds: float | None = None
        self._link_seconds = 0.0
        self._replies = Line()
        self._drafting = Ratio()  # seconds over drafted tokens
        self._prefills = Ratio()  # seconds over tokens of a prompt
        self._rounds = Ratio()  # tokens over seconds
        self._rounds_seen = 0
        self._lookup = LookupAcceptance()
        self._predicted = 0.0, 0.0
        self._overlapped_lens: dict[int, int] = {}  # by drafts ahead, until the estimates change
        self._alone = False
        self._since, self._wait = 0, MIN_WAIT
        self._longest_link: float | None = None  # while nothing of this process is observed

    @property
    def alpha(self) -> float:
        """The estimated probability that a drafted token is accepted."""
        return self._acceptance.mean()

    @property
    def times(self) -> RoundTimes:
        """The estimated times of a round; what a token adds to a reply counts as verification."""
        target_seconds, slope = self._target_seconds or 0.0, self._replies.slope
        draft_seconds = self._drafting.value if self._drafting else ASSUMED_COST * target_seconds
        link_seconds = max(0.0, self._replies.intercept - target_seconds)
        return RoundTimes(draft_seconds, lambda draft_len: target_seconds + draft_len * slope, link_seconds)

    @property
    def speedup(self) -> float:
        """Estimated tokens per second in rounds over those of ``MIN_WAIT`` tokens of the target alone.

        1 before both are known.
        """
        if self._target_seconds is None:
            return 1.0
        alone_seconds = self._target_seconds + self.times.round_trip_seconds / MIN_WAIT
        return self.tokens_per_second * alone_seconds

    @property
    def tokens_per_second(self) -> float:
        """Of rounds: as measured, with the prediction counting as ``_PRIOR_ROUNDS`` rounds."""
        tokens, seconds = self._predicted
        measured = self._rounds
        return (measured.above + _PRIOR_ROUNDS * tokens) / (measured.below + _PRIOR_ROUNDS * seconds + _INSTANT)

    @property
    def explanation(self) -> str:
        """The decision for the next round and the estimates behind it, in one line."""
        times, milliseconds = self.times, 1e3
        if self._target_seconds is None:
            return f"the target decodes {TRIAL} tokens alone, to measure its speed"
        decision = "the target alone"
        if not self._alone:
            decision = f"Drafts of up to {self.planned_len} tokens, {self.drafts_ahead} ahead"
        return (
            f"{decision}: α {self.alpha:.2f}, draft {times.draft_seconds * milliseconds:.1f} ms, "
            f"verify {self._target_seconds * milliseconds:.1f} ms + {self._replies.slope * milliseconds:.2f} a token, "
            f"round trip {times.round_trip_seconds * milliseconds:.1f} ms; "
            f"{self.tokens_per_second:.1f} tokens/s, target alone {1 / max(self._target_seconds, _INSTANT):.1f}"
        )

    @property
    def planned_len(self) -> int:
        """Most tokens of the next Draft."""
        if self.drafts_ahead:
            return self._overlapped_len()
        return self.times.best_draft_len(self.alpha, range(1, MAX_DRAFT_LEN + 1))

    @property
    def figures(self) -> PlannerFigures | None:
        """What a later process can start from; None before the first round."""
        if self._target_seconds is None or not self._rounds_seen or not self._rounds:
            return None
        return PlannerFigures(
            target_seconds=self._target_seconds,
            link_seconds=self.times.round_trip_seconds,
            token_seconds=self._replies.slope,
            draft_seconds=self._drafting.value,
            prefill_seconds=self._prefill_token_seconds,
            tokens_per_second=self._rounds.value,
            acceptance=self.alpha,
            acceptance_by_margin={index: self._acceptance_in(index) for index in self._by_margin},
            rounds=min(self._rounds_seen, MAX_ROUNDS),
            alone=self._alone,
            since=self._since,
            wait=self._wait,
        )

    def start(self, pass_seconds: float, row_seconds: float, known: PlannerFigures | None = None) -> None:
        """Start from figures measured before, until the first Opened tells the link's round trip.

        Args:
            pass_seconds: of the target, as the base station measures it now; 0 where it does not.
            row_seconds: what a drafted token adds to that.
            known: from an earlier process; counts as a few rounds, so that a change is noticed soon.
        """
        if not pass_seconds and known is None:
            return
        self._longest_link = known.link_seconds if known else inf
        self._target_seconds = max(pass_seconds or (known.target_seconds if known else 0.0), _INSTANT)
        if known is None:
            self._replies = Line.through(self._target_seconds, row_seconds)
            return
        self._link_seconds = known.link_seconds
        self._replies = Line.through(self._target_seconds + known.link_seconds, known.token_seconds)
        self._drafting.observe(_KNOWN_TRIALS * known.draft_seconds, _KNOWN_TRIALS)
        self._prefills.observe(_KNOWN_TRIALS * known.prefill_seconds, _KNOWN_TRIALS)
        self._acceptance = Share(known.acceptance, _KNOWN_TRIALS)
        self._by_margin = {index: Share(mean, _KNOWN_TRIALS) for index, mean in known.acceptance_by_margin.items()}
        self._predicted = self._predict()
        seconds = _KNOWN_ROUNDS * self._predicted[1]
        self._rounds.observe(known.tokens_per_second * seconds, seconds)
        self._rounds_seen = min(known.rounds, _KNOWN_CERTAINTY)
        self._alone, self._since, self._wait = known.alone, known.since, known.wait

    def decode_len(self, backlog: int = 0) -> int:
        """How many tokens the target should decode alone now; 0 to draft.

        Args:
            backlog: tokens that the draft model must run before it can draft.
        """
        if self._target_seconds is None:
            return TRIAL
        prefill = self._prefill_len(backlog) if backlog >= MIN_BACKLOG else 0
        trial_due = self._since >= self._wait
        if self._alone:
            return 0 if trial_due else max(prefill, self._wait - self._since)
        return prefill or (TRIAL if trial_due else 0)

    def _prefill_len(self, backlog: int) -> int:
        """Tokens of the target while the draft model runs a prompt: the first takes a reply, others a forward pass."""
        after_first = backlog * self._prefill_token_seconds - self._replies.intercept
        return 1 + max(0, round(after_first / max(self._target_seconds or 0.0, _INSTANT)))

    def should_continue(self, margins: Sequence[float | None]) -> bool:
        """Whether to draft another token after those with these ``margins``; None where the token was sampled."""
        if not margins:
            return True
        if len(margins) >= (MAX_DRAFT_LEN if self._rounds_seen else FIRST_DRAFT_LEN):
            return False
        accepted = self.alpha * prod(map(self._acceptance_at, margins))
        times = self.times
        seconds = times.seconds(1) - times.seconds(0)
        return accepted >= seconds * self.tokens_per_second

    def decode_piece(self, most: int) -> int:
        """How many of ``most`` tokens the target decodes alone before prompt lookup is tried again.

        Each piece costs a round trip, which may take up to ``_LOOKUP_SHARE`` of the time.
        """
        if self._target_seconds is None:
            return min(most, TRIAL)
        piece = self.times.round_trip_seconds / (_LOOKUP_SHARE * self._target_seconds)
        return min(most, max(_LEAST_PIECE, ceil(piece)))

    def lookup_len(self, proposal: Proposal, can_draft: bool, before: Sequence[Evidence] = ()) -> int:
        """How many tokens of a proposal to send as the next Draft; 0 where that is slower than the other ways.

        While Drafts are in flight it costs no round trip, and goes up to the probability of ``MIN_SURVIVAL`` that all
        of it is accepted.

        Args:
            proposal: of prompt lookup; while Drafts are in flight its first token is the assumed bonus token.
            can_draft: whether the draft model can draft instead; it must run the accepted tokens later.
            before: of the tokens in flight; empty where none are.
        """
        if self._target_seconds is None:
            return 0
        alpha, slope = self._lookup.of(proposal.match), self._replies.slope
        seconds = self._target_seconds if before else self._replies.intercept
        rate = self.tokens_per_second if can_draft and not self._alone else 1 / self._target_seconds
        catch_up = self._prefill_token_seconds if can_draft and not self._alone else 0.0
        survival = prod(map(self._acceptance_at, before))
        best, most, tokens = 0, 0.0, 1.0
        for count in range(1, len(proposal.token_ids) + 1):
            survival *= alpha
            if before and survival < MIN_SURVIVAL:
                break
            tokens += alpha**count
            gain = tokens - rate * (seconds + count * slope + tokens * catch_up)
            if gain > most:
                best, most = count, gain
        return best

    def should_draft_ahead(self, before: Sequence[Evidence], margins: Sequence[float | None]) -> bool:
        """Whether to draft another token of a Draft, where up to ``drafts_ahead`` others are sent before its Verdict.

        Drafting goes on while nothing else could be done, up to the probability of
        ``MIN_SURVIVAL`` that all of it is accepted: what is sent in vain costs bytes.

        Args:
            before: of the tokens in flight, and of the assumed bonus token.
            margins: of the Draft so far.
        """
        if len(margins) >= self._overlapped_len():
            return False
        uncertain = (*before, *margins)
        return not uncertain or prod(map(self._acceptance_at, uncertain)) >= MIN_SURVIVAL

    def _overlapped_len(self) -> int:
        """Tokens of a Draft with which runs take the shortest time."""
        if self.drafts_ahead not in self._overlapped_lens:
            times = self.times
            busy = replace(times, verify_seconds=lambda draft_len: _HEADROOM * times.verify_seconds(draft_len))
            best = busy.best_run_len(self.alpha, range(1, MAX_DRAFT_LEN + 1), self.drafts_ahead)
            self._overlapped_lens[self.drafts_ahead] = best
        return self._overlapped_lens[self.drafts_ahead]

    def observe_prefill(self, tokens: int, seconds: float) -> None:
        """Record the time that the draft model took to run ``tokens`` tokens at once."""
        self._prefills.observe(seconds, tokens)

    def observe_opened(self, seconds: float) -> None:
        """Record the time from an Open to its Opened, which waits for no forward pass: about a round trip.

        It is longer with a long prompt, so that a shorter one known before is believed more.
        """
        self._link_seconds = seconds
        if self._longest_link is not None:
            self._link_seconds = min(seconds, self._longest_link)
            self._replies.shift(self._link_seconds + (self._target_seconds or 0.0) - self._replies.intercept)
            self._review(self._alone, 0, 0.0)

    def observe_decoded(self, tokens: int, first_seconds: float | None, seconds: float) -> None:
        """Record the times of tokens that the target decoded alone.

        Args:
            tokens: how many were received.
            first_seconds: until the first; None where the base station may still have been prefilling.
            seconds: from the first to the last.
        """
        if tokens > 1:
            now, before = max(seconds / (tokens - 1), _INSTANT), self._target_seconds
            self._target_seconds = now if before is None else (now + before) / 2
        if first_seconds is None:
            first_seconds = self._link_seconds + (self._target_seconds or 0.0)
        self._rounds.fade(ALONE_DECAY ** (tokens / MIN_WAIT))
        if self._alone:
            self._replies.shift(first_seconds - self._replies.intercept)
        self._replies.observe(0, first_seconds)
        self._review(True, tokens, first_seconds + seconds)

    def observe(
        self,
        margins: Sequence[float | None],
        accepted: int,
        draft_seconds: float,
        reply_seconds: float | None,
        round_seconds: float | None,
    ) -> None:
        """Record a round; one that drafted nothing is ignored.

        Args:
            margins: of its drafted tokens.
            accepted: how many of them were accepted.
            draft_seconds: the time to draft them.
            reply_seconds: from the Draft to its Verdict; None where it also waited for a prefill or another Draft.
            round_seconds: from the Verdict before, or from the first drafted token, to the Verdict; None where the
                base station may still have been prefilling.
        """
        if not margins:
            return
        overlapped = reply_seconds is None
        self._observe_tokens(margins, accepted, fade=not overlapped)
        self._drafting.observe(draft_seconds, len(margins))
        if reply_seconds is not None:
            self._replies.observe(len(margins), reply_seconds)
        if round_seconds is not None:
            self._rounds.observe(accepted + 1, round_seconds, decay=1.0 if overlapped else DECAY)
            self._rounds_seen += not overlapped
            self._review(False, accepted + 1, round_seconds)

    def observe_proposal(self, proposal: Proposal, committed: Sequence[int]) -> None:
        """Record what was committed where a proposal of prompt lookup would have begun, whether it was sent or not."""
        self._lookup.observe(proposal, committed)

    def observe_lookup_reply(self, drafted: int, reply_seconds: float | None) -> None:
        """Record the reply to a Draft that took no forward pass; see ``observe``."""
        if reply_seconds is not None and self._target_seconds is not None:
            self._longest_link = None
            self._overlapped_lens.clear()
            self._replies.observe(drafted, reply_seconds)

    def observe_assumed(self, margin: float | None, is_right: bool, is_argmax: bool) -> None:
        """Record whether an assumed bonus token was right.

        Args:
            margin: of the token.
            is_right: whether it is the target's.
            is_argmax: whether drafted tokens are chosen as it is, so that their acceptance is the same.
        """
        if is_argmax:
            self._acceptance.observe(is_right)
        if margin is not None:
            self._observe_margin(margin, is_right)

    def _observe_tokens(self, margins: Sequence[float | None], accepted: int, fade: bool) -> None:
        if fade:
            self._acceptance.fade()
        for index, margin in enumerate(margins[: accepted + 1]):
            self._acceptance.observe(index < accepted)
            if margin is not None:
                self._observe_margin(margin, index < accepted)

    def _observe_margin(self, margin: float, accepted: bool) -> None:
        share = self._by_margin.setdefault(bisect(_MARGIN_BOUNDS, margin), Share())
        share.fade()
        share.observe(accepted)

    def _review(self, alone: bool, tokens: int, seconds: float) -> None:
        """Choose how to go on, after ``tokens`` in ``seconds`` by drafting, or by the target ``alone``."""
        if self._target_seconds is None:
            return
        self._longest_link = None
        self._overlapped_lens.clear()
        self._predicted = self._predict()
        self._since += tokens
        can_pay = not self._drafting or self._drafting.value < self._target_seconds
        needed = 1.0 if self._alone else min(1.0, sqrt(self._rounds_seen / _CERTAIN_ROUNDS))
        pays = can_pay and self.speedup >= needed
        if pays is self._alone:
            self._alone, self._since, self._wait = not pays, 0, MIN_WAIT
        elif alone is not self._alone:
            tokens_per_second = 1 / self._target_seconds if self._alone else self.tokens_per_second
            lost = seconds * tokens_per_second - tokens
            share = _TARGET_TRIAL_SHARE if alone else TRIAL_SHARE
            self._since, self._wait = 0, max(MIN_WAIT, round(lost / share))

    def _predict(self) -> tuple[float, float]:
        """Tokens and seconds of a round, from the estimates."""
        times, alpha = self.times, self.alpha
        length = self.planned_len
        tokens = expected_tokens(alpha, length)
        if not self.drafts_ahead:
            return tokens, times.seconds(length)
        return tokens, tokens * times.run_seconds(alpha, length, self.drafts_ahead) / run_tokens(alpha)

    @property
    def _prefill_token_seconds(self) -> float:
        """Seconds to run a token of a long prompt through the draft model."""
        return self._prefills.value if self._prefills else PREFILL_COST * self.times.draft_seconds

    def _acceptance_at(self, evidence: Evidence) -> float:
        if isinstance(evidence, Match):
            return self._lookup.of(evidence)
        return self.alpha if evidence is None else self._acceptance_in(bisect(_MARGIN_BOUNDS, evidence))

    def _acceptance_in(self, margin_class: int) -> float:
        prior = min([self.alpha, *_PRIOR_ACCEPTANCE[margin_class : margin_class + 1]])
        share = self._by_margin.get(margin_class)
        return share.mean(prior) if share else prior
