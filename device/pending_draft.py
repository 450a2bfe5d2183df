"""A Draft on its way from its first token to its Verdict."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from device.drafter import DraftedToken
from device.round_records import Moment


@dataclass
class PendingDraft:
    """A Draft that is being drafted or in flight.

    Attributes:
        began: when its first token was begun.
        overlaps: whether another Draft was in flight when it was sent.
        assumed_bonus: what it assumes to follow the Draft before it; None where that is known.
        tokens: drafted so far.
        draft_seconds: the time to draft ``tokens`` and ``assumed_bonus``.
        sent: when it was sent.
        uplink_bytes: of it on the link.
    """

    began: Moment
    overlaps: bool = False
    assumed_bonus: DraftedToken | None = None
    tokens: list[DraftedToken] = field(default_factory=list)
    draft_seconds: float = 0.0
    sent: Moment | None = None
    uplink_bytes: int = 0

    def __len__(self) -> int:
        return len(self.tokens) + (self.assumed_bonus is not None)

    @property
    def margins(self) -> list[float | None]:
        """The margins of ``tokens``."""
        return [token.margin for token in self.tokens]

    @property
    def uncertain_margins(self) -> list[float | None]:
        """The margins of the assumed bonus token, if there is one, and of ``tokens``."""
        assumed = [self.assumed_bonus.margin] if self.assumed_bonus else []
        return [*assumed, *self.margins]


def margins_of(drafts: Sequence[PendingDraft]) -> list[float | None]:
    """The margins of all tokens of Drafts whose Verdicts are not known."""
    return [margin for draft in drafts for margin in draft.uncertain_margins]
