"""A Draft on its way from its first token to its Verdict."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from device.drafting.drafter import DraftedToken
from device.planning.acceptance import Evidence
from device.session.round_records import Moment


@dataclass
class PendingDraft:
    """A Draft that is being drafted or in flight.

    Attributes:
        began: when its first token was begun.
        overlaps: whether another Draft was in flight when it was sent.
        assumed_bonus: what it assumes to follow the Draft before it; None where that is known.
        tokens: drafted so far.
        draft_seconds: the time to draft ``tokens``.
        sent: when it was sent.
        uplink_bytes: of it on the link.
        is_ready: whether its tokens were there before, from prompt lookup or an outage, so that none is added.
    """

    began: Moment
    overlaps: bool = False
    assumed_bonus: DraftedToken | None = None
    tokens: list[DraftedToken] = field(default_factory=list)
    draft_seconds: float = 0.0
    sent: Moment | None = None
    uplink_bytes: int = 0
    is_ready: bool = False

    def __len__(self) -> int:
        return len(self.tokens) + (self.assumed_bonus is not None)

    @property
    def margins(self) -> list[float | None]:
        """The margins of ``tokens``."""
        return [token.margin for token in self.tokens]

    @property
    def evidence(self) -> list[Evidence]:
        """Of the assumed bonus token, if there is one, and of ``tokens``."""
        assumed = [self.assumed_bonus] if self.assumed_bonus else []
        return [token.evidence for token in (*assumed, *self.tokens)]

    @property
    def token_ids(self) -> list[int]:
        """Of the assumed bonus token, if there is one, and of ``tokens``."""
        assumed = [self.assumed_bonus] if self.assumed_bonus else []
        return [token.token_id for token in (*assumed, *self.tokens)]


def evidence_of(drafts: Sequence[PendingDraft]) -> list[Evidence]:
    """The evidence of all tokens of Drafts whose Verdicts are not known."""
    return [evidence for draft in drafts for evidence in draft.evidence]
