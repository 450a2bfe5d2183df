"""What a session has done so far, in numbers."""

from collections.abc import Sequence
from dataclasses import dataclass

from device.drafting.drafter import DraftedToken


@dataclass
class Counters:
    """Totals of a session; ``drafted`` counts no invalidated Draft, ``draft_bytes`` counts all.

    ``drafted_prediction`` and ``accepted_prediction`` are of the tokens that came from the prediction.
    """

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    drafted_prediction: int = 0
    accepted_prediction: int = 0
    draft_bytes: int = 0
    invalidated_bytes: int = 0

    def count_draft(self, tokens: Sequence[DraftedToken], accepted: int) -> None:
        """Count a Draft with these tokens, the first ``accepted`` of which were accepted."""
        predicted = [bool(token.match and token.match.is_predicted) for token in tokens]
        self.drafted += len(tokens)
        self.accepted += accepted
        self.drafted_prediction += sum(predicted)
        self.accepted_prediction += sum(predicted[:accepted])
