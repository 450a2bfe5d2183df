"""One session at the base station: its committed tokens, its KV cache and its round state.

Answers repeated requests with the stored replies and says which tokens the next
forward pass must run. Knows no socket and no clock, and runs no model.
"""

from collections.abc import Sequence
from itertools import islice

from basestation.devices.peer import Peer
from basestation.kv_cache.kv_pool import SequenceKVCache
from basestation.sessions.answered_requests import AnsweredRequests, verdict_bytes
from basestation.sessions.committed_tokens import CommittedTokens
from basestation.sessions.held_bytes import held_bytes
from basestation.target.segment import Segment
from basestation.verification.logits_processing import AnswerSoFar
from basestation.verification.verify import RoundToVerify, VerificationResult
from common.grammar import Grammar
from protocol.errors import ContextLengthError, StateError, UnknownSessionError
from protocol.messages import Decode, Draft, Extend, Mode, Open, Opened, Reply, Request, Resume, Resumed, Verdict
from protocol.rounds import SessionRounds, State


class Session:
    """A session between its Open and its Close. Other modules read its attributes and never write them.

    Args:
        peer: who opened it.
        opening: the Open; ``take`` it next.
        kv_cache: an empty one.
        stop_ids: the target's.
        context_length: of the target.
        window: how many Drafts may be in flight.
        now: the engine's clock.

    Attributes:
        peer: who owns it, and the address for its replies.
        session_id: chosen by the device.
        rounds: this end's round state.
        tokens: the committed tokens, the prompt included.
        kv_cache: of these tokens.
        last_active: when the device last sent a request or got a Verdict.
        ready_since: since when the session has had something to run, if it has.
        round_since: since when the current round has waited, or its device's next one since it was asked for.
    """

    def __init__(
        self,
        peer: Peer,
        opening: Open,
        kv_cache: SequenceKVCache,
        stop_ids: frozenset[int],
        context_length: int,
        window: int,
        now: float,
    ) -> None:
        self.peer = peer
        self.session_id = opening.session_id
        self.rounds = SessionRounds(stop_ids, window)
        self.tokens = CommittedTokens(kv_cache.page_size)
        self.kv_cache = kv_cache
        self.last_active = now
        self.ready_since = self.round_since = now
        self._mode = opening.mode
        self._block_verification = opening.block_verification
        self._sampling = opening.sampling
        self._stop_ids = stop_ids
        self._answer_start = 0
        self._grammar: Grammar | None = None
        self._evicted = False
        self._context_length = context_length
        self._answered = AnsweredRequests(opening.session_id, window + 1)
        self._resume_round = 0

    def touch(self, peer: Peer, now: float) -> None:
        """Note a request of the device before it is taken; replies go to ``peer`` from now on."""
        if not self.waiting:
            self.ready_since = now
        self.peer = peer
        self.last_active = now

    def is_new(self, request: Request) -> bool:
        """Whether a request is neither a repetition, nor old, nor invalidated."""
        if self._answered.repeats(request) or self.rounds.is_old(request):
            return False
        return not (isinstance(request, Draft) and self.rounds.is_invalidated(request))

    def repeat(self, request: Request, most: int) -> list[Reply]:
        """The stored replies to a repetition (invariant 4), at most ``most``, from the round that the last Resume told.

        There are none to an old or invalidated request.
        """
        if not self._answered.repeats(request):
            return []
        return list(islice(self._answered.replies(request, self._resume_round), most))

    def take(self, request: Request, grammar: Grammar | None = None) -> list[Reply]:
        """Take a new request and return the replies that are due at once.

        Args:
            request: of the device.
            grammar: compiled, that of the sampling settings of an Open or Extend.

        Raises:
            StateError: the request is not allowed in this state.
            ContextLengthError: it exceeds the target's context.
        """
        self._check_length(request)
        if not self._verifying:
            self.round_since = self.last_active
        self.rounds.advance(request)
        self._evicted = False
        self._answered.remember(request)
        if isinstance(request, Open):
            self._grammar = grammar
            self.tokens.append(request.prompt_ids)
            self._answer_start = len(self.tokens) - request.answer_len
        elif isinstance(request, Extend):
            self.tokens.replace_from(request.start, request.token_ids)
            self._answer_start = len(self.tokens)
            self.kv_cache.rollback(request.start)
            self.kv_cache.give_back_reserved(len(self.tokens))
            if request.sampling is not None:
                self._sampling, self._grammar = request.sampling, grammar
        else:
            return []
        return [self._record(Opened(request.session_id, request.round_id))]

    def resume(self, message: Resume) -> Resumed:
        """Tell the round and the committed length to a device with the same tokens, or with the first of them.

        Raises:
            UnknownSessionError: the device's tokens are others, or its round is too old.
        """
        if not message.agrees(self.tokens[: message.committed_len]) or message.round_id < self._answered.oldest_round:
            raise UnknownSessionError(f"session {message.session_id} has other tokens here")
        self._resume_round = message.round_id
        return Resumed(message.session_id, self.rounds.round_id, len(self.tokens))

    @property
    def mode(self) -> Mode:
        """The uplink mode."""
        return self._mode

    @property
    def held_bytes(self) -> int:
        """Bytes that the session takes besides its KV cache, with the replies that it will store."""
        grammar = self._grammar.nbytes if self._grammar else 0
        due = self.rounds.left * verdict_bytes(self._sampling.logprobs)
        return self.tokens.nbytes + self._answered.nbytes + due + sum(map(held_bytes, self.rounds.in_flight)) + grammar

    def reply_bytes(self, request: Request) -> int:
        """Bytes that the stored replies to a request will take at most; those to all but a Decode count as 0."""
        count = min(request.count, self._context_length) if isinstance(request, Decode) else 0
        return count * verdict_bytes(self._sampling.logprobs)

    @property
    def grammar_error(self) -> str:
        """Why the grammar cannot be applied to the current round; "" where it can, or there is none."""
        return self._grammar.error if self._grammar else ""

    @property
    def waiting(self) -> bool:
        """Whether the session has something to run; an evicted one does not before its device's next request."""
        return self._verifying or (self.backlog > 0 and not self._evicted)

    @property
    def backlog(self) -> int:
        """Committed tokens that must be prefilled before a round can be verified."""
        return max(0, len(self.tokens) - 1 - self.kv_cache.length)

    @property
    def round_len(self) -> int:
        """Tokens to run for the verification of the current round, 0 without one."""
        return len(self._drafted) + 1 if self._verifying else 0

    def segment(self, limit: int) -> Segment:
        """The next tokens to run, at most ``limit``: the backlog, and with the rest of it the round.

        The last committed token runs together with the drafted tokens, because its
        logits verify the first of them.
        """
        if self._verifying and self.backlog + self.round_len <= limit:
            token_ids = [*self.tokens[self.kv_cache.length :], *self._drafted]
            return Segment(self.kv_cache, token_ids, num_logits=self.round_len)
        start = self.kv_cache.length
        return Segment(self.kv_cache, self.tokens[start : start + min(limit, self.backlog)].tolist(), num_logits=0)

    @property
    def round(self) -> RoundToVerify:
        """The current round, for the logits of a segment that includes it."""
        draft = self.rounds.in_flight[0] if self.rounds.in_flight else None
        sampling, position, by_rejection = self._sampling, len(self.tokens), self._rejection_sampling
        answer = self._answer_so_far
        if draft is None:
            return RoundToVerify(sampling, position, rejection_sampling=by_rejection, answer=answer)
        return RoundToVerify(
            sampling,
            position,
            draft.token_ids,
            draft.distributions if by_rejection else (),
            by_rejection,
            answer,
            draft.given,
            self._block_verification,
        )

    def evict(self) -> None:
        """Free the KV cache; it is recomputed from the tokens when they are needed again."""
        self.kv_cache.release()
        self._evicted = not self._verifying

    def commit(self, result: VerificationResult, now: float) -> Verdict:
        """Commit the result of the current round, roll the KV cache back to it, and return the Verdict."""
        accepted, token_id = result.accepted, result.token_id
        self.tokens.append((*self._drafted[:accepted], token_id))
        self.kv_cache.rollback(len(self.tokens) - 1)
        verdict = Verdict(self.session_id, self.rounds.round_id, accepted, token_id, result.logprobs)
        self._record(verdict)
        self.ready_since = self.round_since = self.last_active = now
        return verdict

    @property
    def _answer_so_far(self) -> AnswerSoFar | None:
        """What the sampling settings look at, if they do."""
        if not self._sampling.changes_logits:
            return None
        return AnswerSoFar(self.tokens[:], self._answer_start, self._sampling.stop_ids(self._stop_ids), self._grammar)

    @property
    def _verifying(self) -> bool:
        return self.rounds.state in (State.VERIFYING, State.DECODING)

    @property
    def _rejection_sampling(self) -> bool:
        return not self._sampling.greedy and self._mode.encoding is not None

    @property
    def _drafted(self) -> Sequence[int]:
        return self.rounds.in_flight[0].token_ids if self.rounds.in_flight else ()

    def _record(self, reply: Reply) -> Reply:
        in_flight = self.rounds.in_flight
        request_round = in_flight[0].round_id if in_flight else self._answered.newest_round
        self.rounds.advance(reply)
        self._answered.record(request_round, reply)
        return reply

    def _check_length(self, request: Request) -> None:
        match request:
            case Open():
                needed = len(request.prompt_ids) + 1
            case Extend():
                needed = request.start + len(request.token_ids) + 1
            case Draft():
                rounds = (*self.rounds.in_flight, request)
                needed = len(self.tokens) + sum(len(draft.token_ids) + 1 for draft in rounds)
            case Decode():
                needed = len(self.tokens) + request.count
        if needed > self._context_length:
            if isinstance(request, Open | Extend):
                raise ContextLengthError(
                    "prompt", f"{needed - 1} tokens", f"at most {self._context_length - 1} (the target's context)"
                )
            raise StateError(f"a round up to token {needed}; allowed: {self._context_length} (the target's context)")
