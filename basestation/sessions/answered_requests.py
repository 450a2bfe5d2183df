"""The last requests of a session, to recognise repetitions, and the replies that they get again (invariant 4).

A request is kept as a hash, and a Verdict as two numbers and the bytes of its
log-probabilities, so that long prompts and long Decodes take little memory.
"""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from protocol.logprobs import TokenLogprobs
from protocol.messages import Draft, Opened, Reply, Request, Verdict

_ANY_VOCABULARY = 2**32
_OBJECT_BYTES = 100
"""Of a token's log-probabilities beside their bytes: an object, and its places in a tuple and a list."""


@dataclass(slots=True)
class _Answered:
    """A request's ``key`` and replies: an Opened, or for each Verdict the accepted tokens and the token after them."""

    key: int
    opened: bool = False
    verdicts: "array[int]" = field(default_factory=lambda: array("I"))
    logprobs: list[tuple[bytes, ...]] = field(default_factory=list)


class AnsweredRequests:
    """Requests by round.

    Args:
        session_id: of the session.
        most: how many of the last requests may be repeated.
    """

    def __init__(self, session_id: int, most: int) -> None:
        self._session_id = session_id
        self._most = most
        self._answered: dict[int, _Answered] = {}

    @property
    def oldest_round(self) -> int:
        """The round of the oldest request that may be repeated."""
        return min(self._answered)

    @property
    def newest_round(self) -> int:
        """The round of the newest request."""
        return max(self._answered)

    @property
    def nbytes(self) -> int:
        """Bytes that the replies take."""
        return sum(
            one.verdicts.itemsize * len(one.verdicts)
            + sum(_OBJECT_BYTES + len(data) for told in one.logprobs for data in told)
            for one in self._answered.values()
        )

    def remember(self, request: Request) -> None:
        """Note a new request, and forget the oldest one beyond ``most``."""
        self._answered[request.round_id] = _Answered(_key(request))
        while len(self._answered) > self._most:
            del self._answered[self.oldest_round]

    def record(self, round_id: int, reply: Reply) -> None:
        """Note a reply to the request of a round."""
        answered = self._answered[round_id]
        if isinstance(reply, Verdict):
            answered.verdicts.extend((reply.accepted, reply.token_id))
            if reply.logprobs:
                answered.logprobs.append(tuple(one.encode() for one in reply.logprobs))
        else:
            answered.opened = True

    def repeats(self, request: Request) -> bool:
        """Whether a request is a repetition of one of the last."""
        answered = self._answered.get(request.round_id)
        return answered is not None and answered.key == _key(request)

    def replies(self, request: Request, first_round: int) -> Iterable[Reply]:
        """The replies so far to a repeated request, from the round ``first_round`` on."""
        answered = self._answered[request.round_id]
        if answered.opened and request.round_id >= first_round:
            yield Opened(self._session_id, request.round_id)
        verdicts = answered.verdicts
        for index in range(max(0, first_round - request.round_id), len(verdicts) // 2):
            accepted, token_id = verdicts[2 * index : 2 * index + 2]
            told = answered.logprobs[index] if answered.logprobs else ()
            logprobs = tuple(TokenLogprobs.decode(data, _ANY_VOCABULARY) for data in told)
            yield Verdict(self._session_id, request.round_id + index, accepted, token_id, logprobs)


def verdict_bytes(logprobs: int | None) -> int:
    """Bytes that the stored Verdict of one token takes, with as many most likely tokens as are asked for."""
    told = 0 if logprobs is None else _OBJECT_BYTES + len(_longest_logprobs(logprobs).encode())
    return 2 * array("I").itemsize + told


def _longest_logprobs(count: int) -> TokenLogprobs:
    return TokenLogprobs(0.0, tuple((_ANY_VOCABULARY - 1, 0.0) for _ in range(count)))


def _key(request: Request) -> int:
    """A hash of a request without its distributions: a repetition has the same tokens."""
    request = replace(request, distributions=()) if isinstance(request, Draft) else request
    return hash((type(request), request))
