"""Prompt lookup: what followed the last tokens where they occurred before.

A plain n-gram search over the tokens of the conversation, and over a prediction that the
user gave. Of the longest matches it takes the one where the last long match would continue,
else the latest. What it proposes is a guess, and costs no forward pass.

Knows tokens; not what they mean, and not whether a proposal is worth sending.
"""

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

MIN_MATCH = 2
"""Tokens that must have occurred before."""
MAX_MATCH = 16
"""Longer matches count as this long."""
_LONG_MATCH = 4
"""A match of so many tokens tells where the next one is expected."""
_MAX_PLACES = 64
"""Places that are kept of each pair of tokens: the latest."""


@dataclass(frozen=True, slots=True)
class Match:
    """Tokens that occurred before: how many, and whether in the prediction."""

    length: int
    is_predicted: bool = False

    def after(self, count: int) -> "Match":
        """The match that the token after ``count`` proposed ones follows if these are right: it is longer by them."""
        return Match(min(self.length + count, MAX_MATCH), self.is_predicted)


@dataclass(frozen=True, slots=True)
class Proposal:
    """Tokens that followed a match, at least one."""

    token_ids: tuple[int, ...]
    match: Match


class PromptLookup:
    """Proposes tokens that continue a conversation."""

    def __init__(self) -> None:
        self._conversation = _TokenIndex()
        self._prediction = _TokenIndex()

    def begin(self, prompt_ids: Sequence[int], prediction: Sequence[int] = ()) -> None:
        """Prepare for the answer to a prompt, which is perhaps ``prediction``."""
        self._prediction = _TokenIndex()
        if prediction:
            self._prediction.extend([*prompt_ids[-MAX_MATCH:], *prediction])

    def follow(self, tokens: Sequence[int]) -> None:
        """Search the conversation ``tokens`` from now on."""
        known = self._conversation.tokens
        if tokens[: len(known)] != known:
            self._conversation = _TokenIndex()
            known = self._conversation.tokens
        self._conversation.extend(tokens[len(known) :])

    def propose(self, tokens: Sequence[int], most: int, stop_ids: Collection[int]) -> Proposal | None:
        """What may follow ``tokens``, which begin with the conversation: up to ``most`` tokens, none after a stop id.

        A proposal that reaches the end of ``tokens`` goes on with its own tokens, as where a text repeats itself.
        """
        length, place = self._conversation.longest_match(tokens)
        predicted_length, predicted_place = self._prediction.longest_match(tokens)
        if most < 1 or max(length, predicted_length) < MIN_MATCH:
            return None
        if is_predicted := predicted_length >= length:
            found = self._prediction.tokens[predicted_place : predicted_place + most]
        else:
            found = list(tokens[place : place + most])
            while len(found) < most:
                found.append(found[place - len(tokens)])
        end = next((index + 1 for index, token_id in enumerate(found) if token_id in stop_ids), len(found))
        return Proposal(tuple(found[:end]), Match(max(length, predicted_length), is_predicted))


class _TokenIndex:
    """Tokens, and the places that follow each pair of them."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._places: dict[tuple[int, ...], deque[int]] = {}
        self._distance = 0  # from the place of the last long match to the end of the tokens that matched

    def extend(self, token_ids: Sequence[int]) -> None:
        for token_id in token_ids:
            if len(self.tokens) >= MIN_MATCH:
                pair = tuple(self.tokens[-MIN_MATCH:])
                self._places.setdefault(pair, deque(maxlen=_MAX_PLACES)).append(len(self.tokens))
            self.tokens.append(token_id)

    def longest_match(self, tokens: Sequence[int]) -> tuple[int, int]:
        """How many of the last ``tokens`` occurred before, and the place after them; 0 and 0 where none did."""
        last = tokens[-MAX_MATCH:]
        expected = len(tokens) - self._distance
        places = self._places.get(tuple(last[-MIN_MATCH:]), ())
        found = ((self._match_length(place, last), -abs(place - expected), place) for place in places)
        length, _, place = max(found, default=(0, 0, 0))
        if length >= _LONG_MATCH:
            self._distance = len(tokens) - place
        return length, place

    def _match_length(self, place: int, last: Sequence[int]) -> int:
        most = min(place, len(last))
        counts = range(MIN_MATCH, most)
        return next((count for count in counts if self.tokens[place - count - 1] != last[-count - 1]), most)
