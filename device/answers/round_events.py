"""The rounds of an answer as its client receives them: each with its record and its tokens' text and origins."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from device.session.round_records import RoundRecord
from device.session.session import AnswerToken


@dataclass(frozen=True)
class AnswerRound:
    """A round whose tokens are committed; ``tokens`` are those of the answer, each with the text it adds."""

    record: RoundRecord
    tokens: tuple[tuple[str, AnswerToken], ...]

    @property
    def text(self) -> str:
        """The text that the round adds."""
        return "".join(text for text, _ in self.tokens)

    @property
    def fields(self) -> dict[str, Any]:
        """The round in JSON: the fields of a line of ``--record``, and its tokens."""
        tokens = [
            {"text": text, "token_id": token.token_id, "origin": token.origin, "margin": token.margin}
            for text, token in self.tokens
        ]
        return {**asdict(self.record), "tokens": tokens}


class RoundEvents:
    """Collects the tokens of an answer, and delivers each round once it has all of them.

    Args:
        deliver: receives the rounds, and text that belongs to no further token.
    """

    def __init__(self, deliver: Callable[[str | AnswerRound], None]) -> None:
        self._deliver = deliver
        self._record: RoundRecord | None = None
        self._tokens: list[tuple[str, AnswerToken]] = []

    def begin(self, record: RoundRecord) -> None:
        """The tokens that follow are those of this round."""
        self._record = record

    def add(self, text: str, token: AnswerToken | None) -> None:
        """Add a token with its text, or with None text that was still missing."""
        if token is None:
            self.flush()
            if text:
                self._deliver(text)
            return
        assert self._record is not None
        self._tokens.append((text, token))
        if len(self._tokens) > self._record.accepted:
            self.flush()

    def flush(self) -> None:
        """Deliver the tokens so far: the answer ended within their round."""
        if self._tokens:
            assert self._record is not None
            self._deliver(AnswerRound(self._record, tuple(self._tokens)))
            self._tokens.clear()
