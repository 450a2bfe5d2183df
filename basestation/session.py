"""One device's session at the base station: what is committed, cached and asked for.

Keeps the round state machine, answers repeated requests with the stored
replies, and says which tokens the next pass must run. Knows no socket and runs
no model.
"""

from collections.abc import Sequence
from dataclasses import replace

from basestation.kv_pool import Segment, SequenceKVCache
from basestation.verify import Round, VerificationResult
from protocol.errors import ContextLengthError, StateError, UnknownSessionError
from protocol.messages import Decode, Draft, Extend, Mode, Open, Opened, Reply, Request, Resume, Resumed, Verdict
from protocol.rounds import SessionRounds, State


class Session:
    """A session between its Open and its Close.

    Attributes:
        rounds: this end's view of what may follow.
        tokens: the committed tokens, the prompt included.
        kv_cache: its keys and values.
        heard_at: when its device last asked for something or was last answered, by the engine's clock.
        waiting_since: when what it waits for could first have been run.
        owner: whose it is.
        address: where it asked from, and is answered.
    """

    def __init__(
        self, opening: Open, kv_cache: SequenceKVCache, stop_ids: frozenset[int], context_length: int, window: int
    ) -> None:
        self.rounds = SessionRounds(stop_ids, window)
        self.tokens: list[int] = []
        self.kv_cache = kv_cache
        self.heard_at = 0.0
        self.waiting_since = 0.0
        self.owner = ""
        self.address = b""
        self._opening = opening
        self._evicted = False
        self._context_length = context_length
        self._window = window
        self._answered: dict[int, tuple[Request, list[Reply]]] = {}

    def take(self, request: Request) -> list[Reply]:
        """Take a request; give the replies that are due at once.

        A repeated request gets the replies stored for it (invariant 4). One of a
        round that is long over gets none, and neither does a void Draft.

        Raises:
            StateError: the request may not come now.
            ContextLengthError: it does not fit the target's context.
        """
        known, replies = self._answered.get(request.round_id, (None, []))
        if _without_distributions(request) == known:
            return list(replies)
        if self.rounds.is_old(request) or (isinstance(request, Draft) and self.rounds.is_invalidated(request)):
            return []
        self._check_length(request)
        self.rounds.advance(request)
        self._evicted = False
        self._remember(request)
        if isinstance(request, Open):
            self.tokens = list(request.prompt_ids)
        elif isinstance(request, Extend):
            self.tokens[request.start :] = request.token_ids
            self.kv_cache.rollback(request.start)
        else:
            return []
        return [self._record(Opened(request.session_id, request.round_id))]

    def resume(self, message: Resume) -> Resumed:
        """Say where the session stands, to a device that stands in the same place or a little behind.

        Raises:
            UnknownSessionError: it is another session than the device's.
        """
        if not message.agrees(self.tokens) or message.round_id < min(self._answered):
            raise UnknownSessionError(f"session {message.session_id} has other tokens here")
        return Resumed(message.session_id, self.rounds.round_id, len(self.tokens))

    @property
    def mode(self) -> Mode:
        """What its device sends."""
        return self._opening.mode

    @property
    def waiting(self) -> bool:
        """Whether the session has unit for a pass; an evicted one has none until its device's next word."""
        return self._verifying or (self.backlog > 0 and not self._evicted)

    @property
    def backlog(self) -> int:
        """How many committed tokens are to be run before a round can be judged."""
        return max(0, len(self.tokens) - 1 - self.kv_cache.length)

    @property
    def round_len(self) -> int:
        """How many tokens are run to judge the round under way, if there is one."""
        return len(self._drafted) + 1 if self._verifying else 0

    def segment(self, limit: int) -> Segment:
        """What a pass must run next, at most ``limit`` tokens: the backlog, and with all of that the round.

        The last committed token is run only together with what follows it: its
        logits judge the first drafted token.
        """
        if self._verifying and self.backlog + self.round_len <= limit:
            token_ids = [*self.tokens[self.kv_cache.length :], *self._drafted]
            return Segment(self.kv_cache, token_ids, num_logits=self.round_len)
        start = self.kv_cache.length
        return Segment(self.kv_cache, self.tokens[start : start + min(limit, self.backlog)], num_logits=0)

    def evict(self) -> None:
        """Give back the room of the keys and values; they are made again from the tokens when they are needed."""
        self.kv_cache.release()
        self._evicted = not self._verifying

    @property
    def round(self) -> Round:
        """What the judged rows of this session's segment are for."""
        draft = self.rounds.in_flight[0] if self.rounds.in_flight else None
        sampling, position, by_distributions = self._opening.sampling, len(self.tokens), self._by_distributions
        if draft is None:
            return Round(sampling, position, by_distributions=by_distributions)
        return Round(
            sampling, position, draft.token_ids, draft.distributions if by_distributions else (), by_distributions
        )

    def commit(self, result: VerificationResult) -> Verdict:
        """Take the result of the round under way; give its Verdict."""
        accepted, token_id = result.accepted, result.token_id
        self.tokens += [*self._drafted[:accepted], token_id]
        self.kv_cache.rollback(len(self.tokens) - 1)
        verdict = Verdict(self._opening.session_id, self.rounds.round_id, accepted, token_id)
        self._record(verdict)
        return verdict

    @property
    def _verifying(self) -> bool:
        return self.rounds.state in (State.VERIFYING, State.DECODING)

    @property
    def _by_distributions(self) -> bool:
        """Whether drafts are judged by what they were drawn from, and not by the target's own tokens."""
        return not self._opening.sampling.greedy and self._opening.mode.encoding is not None

    @property
    def _drafted(self) -> Sequence[int]:
        return self.rounds.in_flight[0].token_ids if self.rounds.in_flight else ()

    def _remember(self, request: Request) -> None:
        """Keep a request, but for its distributions, with its replies for as long as it may be repeated."""
        self._answered[request.round_id] = _without_distributions(request), []
        while len(self._answered) > self._window + 1:
            del self._answered[min(self._answered)]

    def _record(self, reply: Reply) -> Reply:
        in_flight = self.rounds.in_flight
        request_round = in_flight[0].round_id if in_flight else max(self._answered)
        self.rounds.advance(reply)
        self._answered[request_round][1].append(reply)
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


def _without_distributions(request: Request) -> Request:
    """What should_notify one request from another; they alone are large."""
    return replace(request, distributions=()) if isinstance(request, Draft) else request
