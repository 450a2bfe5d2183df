"""How many tokens to draft next, and whether to draft at all, decided from what was measured.

Knows numbers, not models or links; the formulas are in ``common/round_model.py``.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import ceil

from common.estimates import DECAY, Ratio
from common.round_model import RoundTimes, expected_tokens, run_tokens
from device.drafting.prompt_lookup import Proposal
from device.planning.acceptance import Acceptance, Evidence
from device.planning.planner_figures import MAX_ROUNDS, PlannerFigures
from device.planning.time_estimates import TimeEstimates
from device.planning.trials import MIN_WAIT, TRIAL, Speeds, Trials
from protocol.bundle import QualityFigures

MAX_DRAFT_LEN = 32
"""Longest planned draft: the formulas assume the same acceptance at every position, which fails further out."""
FIRST_DRAFT_LEN = 4
"""The first round is short: the link's rate is not known yet."""
MIN_BACKLOG = 32
"""Tokens that the draft model must run before it can draft, from which on the target decodes alone meanwhile."""
_LOOKUP_SHARE = 1 / 40
"""Largest share of the time that the target alone may lose because it decodes piece by piece, for prompt lookup."""
_LEAST_PIECE = 2
_FIRST_SHARE = 1 / 20
"""Largest share of the first tokens' time, decoded alone, that the first switch to drafting may cost."""
_ASSUMED_TARGET_SECONDS = 0.02
"""Of a forward pass of the target, before it is known."""
_PRIOR_ROUNDS = 6.0
ALONE_DECAY = 0.5
"""Weight that earlier rounds keep after the target has decoded ``MIN_WAIT`` tokens alone."""
MIN_SURVIVAL = 0.15
"""Least probability of its assumption at which a Draft is sent ahead."""
_KNOWN_ROUNDS = 4.0
"""What an earlier process learnt counts as so many rounds, so that a change is noticed soon."""
_LEAST_CERTAINTY = 0.5
"""Least probability that a whole Draft is accepted at which it grows: its Verdict would come later by each token."""
_HEADROOM = 1.25
"""Drafts are as long as if the target took longer by this: times vary, and it should not fall behind."""
_KNOWN_CERTAINTY = 8
"""Rounds that what an earlier process learnt counts as where drafting might be given up: links change."""
_INSTANT = 1e-9


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
    count as one observation. Initial estimates come from ``common/round_model.py``.

    Where the draft model *guesses* the tokens that the target decodes alone, they teach
    the acceptance at no cost, so that drafting is given up, and taken up again, at once.

    Prompt lookup drafts where its round is expected to give more tokens than the
    faster of the draft model and the target alone would give in the same time.

    Args:
        quality: figures of the quality check, the initial acceptance rate.
        greedy: whether the target is sampled at temperature 0.

    Attributes:
        drafts_ahead: how many Drafts may be sent on an assumed bonus token.
        guesses: whether the draft model guesses the tokens that the target decodes alone.
    """

    def __init__(self, quality: QualityFigures, greedy: bool) -> None:
        self.drafts_ahead = 0
        self.guesses = False
        self._acceptance = Acceptance(quality.argmax_agreement if greedy else quality.overlap)
        self._estimates = TimeEstimates()
        self._rounds = Ratio()  # tokens over seconds
        self._rounds_seen = 0
        self._trials = Trials()
        self._predicted = 0.0, 0.0
        self._overlapped_lens: dict[int, int] = {}  # by drafts ahead, until the estimates change

    @property
    def alpha(self) -> float:
        """The estimated probability that a drafted token is accepted."""
        return self._acceptance.mean

    @property
    def times(self) -> RoundTimes:
        """The estimated times of a round; what a token adds to a reply counts as verification."""
        return self._estimates.round_times

    @property
    def knows_link(self) -> bool:
        """Whether the link's round trip was measured, in this process or in an earlier one."""
        return self._estimates.knows_link

    @property
    def speedup(self) -> float:
        """Estimated tokens per second in rounds over those of the target alone; 1 before both are known.

        Without guesses the target decodes ``MIN_WAIT`` tokens at a time, each time for another round trip.
        """
        target_seconds = self._estimates.target_seconds
        if target_seconds is None:
            return 1.0
        pause = 0.0 if self.guesses else self.times.round_trip_seconds / MIN_WAIT
        return self.tokens_per_second * (target_seconds + pause)

    @property
    def tokens_per_second(self) -> float:
        """Of rounds: as measured, with the prediction counting as ``_PRIOR_ROUNDS`` rounds."""
        tokens, seconds = self._predicted
        measured = self._rounds
        return (measured.above + _PRIOR_ROUNDS * tokens) / (measured.below + _PRIOR_ROUNDS * seconds + _INSTANT)

    @property
    def explanation(self) -> str:
        """The decision for the next round and the estimates behind it, in one line."""
        times, milliseconds, target_seconds = self.times, 1e3, self._estimates.target_seconds
        if target_seconds is None:
            return f"the target decodes {self.decode_len()} tokens alone, to measure its speed"
        token_milliseconds = self._estimates.token_seconds * milliseconds
        return (
            f"{self._decision}: α {self.alpha:.2f}, draft {times.draft_seconds * milliseconds:.1f} ms, "
            f"verify {target_seconds * milliseconds:.1f} ms + {token_milliseconds:.2f} a token, "
            f"round trip {times.round_trip_seconds * milliseconds:.1f} ms; "
            f"{self.tokens_per_second:.1f} tokens/s, target alone {1 / max(target_seconds, _INSTANT):.1f}"
        )

    @property
    def _decision(self) -> str:
        """How the next tokens are generated."""
        if self._guesses_first:
            return "the target alone, until guesses tell the acceptance"
        trial = ", as a trial" if self._trials.due else ""
        if self._trials.alone is not self._trials.due:
            return f"the target alone{trial}"
        return f"Drafts of up to {self.planned_len} tokens, {self.drafts_ahead} ahead{trial}"

    @property
    def _guesses_first(self) -> bool:
        """Whether guesses tell the acceptance before the first Draft; where the link is fast, a Draft costs little."""
        return self.guesses and not self._acceptance.is_observed and self._first_len > TRIAL

    @property
    def planned_len(self) -> int:
        """Most tokens of the next Draft."""
        if self.drafts_ahead:
            return self._overlapped_len()
        return self.times.best_draft_len(self.alpha, range(1, MAX_DRAFT_LEN + 1))

    @property
    def figures(self) -> PlannerFigures | None:
        """What a later process can start from; None before the first round or guess."""
        if self._estimates.target_seconds is None or not self._acceptance.is_observed:
            return None
        return PlannerFigures(
            target_seconds=self._estimates.target_seconds,
            link_seconds=self.times.round_trip_seconds,
            token_seconds=self._estimates.token_seconds,
            draft_seconds=self.times.draft_seconds,
            prefill_seconds=self._estimates.prefill_token_seconds,
            tokens_per_second=self.tokens_per_second,
            acceptance=self.alpha,
            acceptance_by_margin=self._acceptance.by_margin,
            rounds=min(self._rounds_seen, MAX_ROUNDS),
            alone=self._trials.alone,
            since=self._trials.since,
            wait=self._trials.wait,
        )

    def start(self, pass_seconds: float, row_seconds: float, known: PlannerFigures | None = None) -> None:
        """Start from figures measured before; without ``known``, the first Opened tells the link's round trip.

        Args:
            pass_seconds: of the target, as the base station measures it now; 0 where it does not.
            row_seconds: what a drafted token adds to that.
            known: from an earlier process; counts as a few rounds, so that a change is noticed soon.
        """
        if not pass_seconds and known is None:
            return
        self._estimates.start(pass_seconds, row_seconds, known)
        if known is None:
            return
        self._acceptance.start(known.acceptance, known.acceptance_by_margin)
        self._predicted = self._predict()
        seconds = _KNOWN_ROUNDS * self._predicted[1]
        self._rounds.observe(known.tokens_per_second * seconds, seconds)
        self._rounds_seen = min(known.rounds, _KNOWN_CERTAINTY)
        self._trials.start(known.alone, known.since, known.wait)

    def decode_len(self, backlog: int = 0, target_backlog: int = 0) -> int:
        """How many tokens the target should decode alone now; 0 to draft.

        Args:
            backlog: tokens that the draft model must run before it can draft.
            target_backlog: tokens of a prompt that the target may have to run before it decodes.
        """
        prefill = self._prefill_len(backlog, target_backlog)
        if self._guesses_first:
            return max(prefill, self._first_len)
        if self._estimates.target_seconds is None:
            return TRIAL
        if self._trials.alone:
            return 0 if self._trials.due else max(prefill, self._trials.left)
        return prefill or (TRIAL if self._trials.due else 0)

    @property
    def _first_len(self) -> int:
        """Tokens of the target before the first Draft, for which switching to drafting costs one round trip."""
        target_seconds = self._estimates.target_seconds or _ASSUMED_TARGET_SECONDS
        return round(self._estimates.opened_seconds / (_FIRST_SHARE * target_seconds))

    def _prefill_len(self, backlog: int, target_backlog: int) -> int:
        """Tokens of the target while the draft model runs a prompt.

        The first takes a reply after the target itself has run the prompt, others a forward pass.
        """
        target_seconds = self._estimates.target_seconds
        if backlog < MIN_BACKLOG or target_seconds is None:
            return 0
        first_seconds = target_backlog * self._estimates.target_prefill_token_seconds + self._estimates.reply_seconds
        after_first = backlog * self._estimates.prefill_token_seconds - first_seconds
        return 1 + max(0, round(after_first / max(target_seconds, _INSTANT)))

    def should_guess(self, awaited: int) -> bool:
        """Whether the draft model is to guess the next token while the target decodes alone.

        Not where that takes longer than the tokens that are still to come: the last of them would wait for it.

        Args:
            awaited: how many tokens these are, at least one.
        """
        target_seconds = self._estimates.target_seconds
        if not self.guesses or target_seconds is None:
            return self.guesses
        return self.times.draft_seconds <= awaited * target_seconds

    def should_continue(self, margins: Sequence[float | None]) -> bool:
        """Whether to draft another token after those with these ``margins``; None where the token was sampled."""
        if not margins:
            return True
        if len(margins) >= (MAX_DRAFT_LEN if self._rounds_seen else FIRST_DRAFT_LEN):
            return False
        accepted = self.alpha * self._acceptance.of_all(margins)
        times = self.times
        seconds = times.seconds(1) - times.seconds(0)
        return accepted >= seconds * self.tokens_per_second

    def decode_piece(self, most: int, running: int = 0) -> int:
        """How many of ``most`` tokens the target decodes alone before prompt lookup is tried again.

        Each piece costs a round trip, and half a pass of the draft model that is at work when its last token arrives.
        They may take up to ``_LOOKUP_SHARE`` of the time.

        Args:
            most: tokens.
            running: tokens that the draft model runs at once meanwhile.
        """
        if self._estimates.target_seconds is None:
            return min(most, TRIAL)
        pause = self.times.round_trip_seconds + running / 2 * self._estimates.prefill_token_seconds
        piece = pause / (_LOOKUP_SHARE * self._estimates.target_seconds)
        return min(most, max(_LEAST_PIECE, ceil(piece)))

    def lookup_len(self, proposal: Proposal, can_draft: bool, before: Sequence[Evidence] = ()) -> int:
        """How many tokens of a proposal to send as the next Draft; 0 where that is slower than the other ways.

        While Drafts are in flight it costs no round trip, and goes up to the probability of ``MIN_SURVIVAL`` that all
        of it is accepted. The assumed bonus token, which comes with the Verdict before, is no gain; if it is wrong, the
        Draft gives nothing.

        Args:
            proposal: of prompt lookup; while Drafts are in flight its first token is the assumed bonus token.
            can_draft: whether the draft model can draft instead; it must run the accepted tokens later.
            before: of the tokens in flight; empty where none are.
        """
        target_seconds = self._estimates.target_seconds
        if target_seconds is None:
            return 0
        slope = self._estimates.token_seconds
        seconds = target_seconds if before else self._estimates.reply_seconds
        drafts = can_draft and not self._trials.alone
        rate = self.tokens_per_second if drafts else 1 / target_seconds
        catch_up = self._estimates.prefill_token_seconds if drafts else 0.0
        assumptions, accepted = self._acceptance.of_all(before), 1.0
        best, most, tokens = 0, 0.0, 0.0 if before else 1.0
        for count in range(1, len(proposal.token_ids) + 1):
            accepted *= self._acceptance.of(proposal.match.after(count - 1))
            if before and assumptions * accepted < MIN_SURVIVAL:
                break
            tokens += accepted
            gain = tokens - rate * (seconds + count * slope + tokens * catch_up)
            if gain > most:
                best, most = count, gain
        return best

    def should_draft_ahead(self, before: Sequence[Evidence], margins: Sequence[float | None], may_send: bool) -> bool:
        """Whether to draft another token of a Draft, where up to ``drafts_ahead`` others are sent before its Verdict.

        Drafting goes on while nothing else could be done, up to the probability of
        ``MIN_SURVIVAL`` that all of it is accepted: what is sent in vain costs bytes.

        Args:
            before: of the tokens in flight, and of the assumed bonus token.
            margins: of the Draft so far.
            may_send: whether the Draft can be sent now.
        """
        if len(margins) >= self._overlapped_len():
            return False
        if may_send and self._acceptance.of_all(margins) < _LEAST_CERTAINTY:
            return False
        uncertain = (*before, *margins)
        return not uncertain or self._acceptance.of_all(uncertain) >= MIN_SURVIVAL

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
        self._estimates.observe_prefill(tokens, seconds)

    def observe_target_prefill(self, tokens: int, reply_seconds: float) -> None:
        """Record the time of a reply that waited until the target had run ``tokens`` tokens of a prompt."""
        self._estimates.observe_target_prefill(tokens, reply_seconds)

    def observe_opened(self, seconds: float, at_most: bool = False) -> None:
        """Record the time from an Open or Extend to its Opened, which waits for no pass: about a round trip.

        It is longer with a long prompt, so that a shorter one known before is believed more.

        Args:
            seconds: the time.
            at_most: whether the Opened may have been there before, while the device did something else.
        """
        self._estimates.observe_opened(seconds, at_most)
        self._review(self._trials.alone, 0, 0.0)

    def observe_guess(self, margin: float | None, is_right: bool, seconds: float | None) -> None:
        """Record whether a guess was the target's token.

        Args:
            margin: of the guess.
            is_right: whether it is the target's.
            seconds: to draft it; None where the draft model had more than one token to run.
        """
        self._acceptance.observe_guess(margin, is_right)
        if seconds is not None:
            self._estimates.observe_drafting(1, seconds)

    def observe_decoded(self, tokens: int, first_seconds: float | None, seconds: float) -> None:
        """Record the times of tokens that the target decoded alone.

        Args:
            tokens: how many were received.
            first_seconds: until the first; None where the base station may still have been prefilling.
            seconds: from the first to the last.
        """
        self._rounds.fade(ALONE_DECAY ** (tokens / MIN_WAIT))
        whole = self._estimates.observe_decoded(tokens, first_seconds, seconds, self._trials.alone)
        self._review(True, tokens, whole)

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
        self._acceptance.observe_draft(margins, accepted, overlapped)
        self._estimates.observe_drafting(len(margins), draft_seconds)
        if reply_seconds is not None:
            self._estimates.observe_reply(len(margins), reply_seconds)
        if round_seconds is not None:
            round_seconds = self._estimates.limited_round(len(margins), round_seconds)
            self._rounds.observe(accepted + 1, round_seconds, decay=1.0 if overlapped else DECAY)
            self._rounds_seen += not overlapped
            self._review(False, accepted + 1, round_seconds)

    def observe_proposal(self, proposal: Proposal, committed: Sequence[int]) -> None:
        """Record what was committed where a proposal of prompt lookup would have begun, whether it was sent or not."""
        self._acceptance.observe_proposal(proposal, committed)

    def observe_lookup_reply(self, drafted: int, reply_seconds: float | None) -> None:
        """Record the reply to a Draft that took no forward pass; see ``observe``."""
        if reply_seconds is not None and self._estimates.target_seconds is not None:
            self._overlapped_lens.clear()
            self._estimates.observe_reply(drafted, reply_seconds)

    def observe_assumed(self, margin: float | None, is_right: bool, is_argmax: bool) -> None:
        """Record whether an assumed bonus token was right.

        Args:
            margin: of the token.
            is_right: whether it is the target's.
            is_argmax: whether drafted tokens are chosen as it is, so that their acceptance is the same.
        """
        self._acceptance.observe_assumed(margin, is_right, is_argmax)

    def _review(self, alone: bool, tokens: int, seconds: float) -> None:
        """Choose how to go on, after ``tokens`` in ``seconds`` by drafting, or by the target ``alone``."""
        if self._estimates.target_seconds is None:
            return
        self._overlapped_lens.clear()
        self._predicted = self._predict()
        self._trials.review(self._speeds, alone, tokens, seconds)

    @property
    def _speeds(self) -> Speeds:
        return Speeds(
            tokens_per_second=self.tokens_per_second,
            speedup=max(self.speedup, _INSTANT),
            drafting_is_slower=self._estimates.drafting_is_slower,
            rounds_seen=self._rounds_seen,
            guesses=self.guesses,
            target_seconds=max(self._estimates.target_seconds or 0.0, _INSTANT),
            reply_seconds=self._estimates.reply_seconds,
            round_trip_seconds=self.times.round_trip_seconds,
            predicted_round=self._predicted,
        )

    def _predict(self) -> tuple[float, float]:
        """Tokens and seconds of a round, from the estimates."""
        times, alpha = self.times, self.alpha
        length = self.planned_len
        tokens = expected_tokens(alpha, length)
        if not self.drafts_ahead:
            return tokens, times.seconds(length)
        return tokens, tokens * times.run_seconds(alpha, length, self.drafts_ahead) / run_tokens(alpha)
