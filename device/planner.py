"""How many tokens to draft in a round: the paper's formulas.

Times are in units of one pass of the target. Knows numbers, not models or links.
"""

from protocol.bundle import GateFigures

ASSUMED_COST = 1 / 8
MAX_DRAFT_LEN = 16
"""No plan drafts more: the formulas take acceptance to be the same at every position, which fails far out."""


def expected_tokens(alpha: float, draft_len: int) -> float:
    """Tokens a round yields: (1 − α^(γ+1)) / (1 − α) (arXiv:2509.04576; Leviathan et al. 2023, eq. 1).

    Args:
        alpha: probability that a drafted token is accepted, in [0, 1].
        draft_len: γ, tokens drafted.
    """
    return sum(alpha**position for position in range(draft_len + 1))


def speedup(alpha: float, cost: float, draft_len: int) -> float:
    """S(γ) = E(γ) / (1 + γL): tokens a second against the target alone (arXiv:2509.04576).

    Args:
        alpha: probability that a drafted token is accepted, in [0, 1].
        cost: L, the time to draft and send one token.
        draft_len: γ, tokens drafted.
    """
    return expected_tokens(alpha, draft_len) / (1 + draft_len * cost)


def optimal_draft_len(alpha: float, cost: float) -> int:
    """γ*, the draft length from 1 to ``MAX_DRAFT_LEN`` with the largest speedup; the shorter of equals."""
    return max(range(1, MAX_DRAFT_LEN + 1), key=lambda draft_len: speedup(alpha, cost, draft_len))


def planned_draft_len(gate: GateFigures, greedy: bool) -> int:
    """The draft length to begin with, before anything is measured on this link.

    Acceptance is taken to be the likeness that the bundle's gate measured, and
    drafting a token to cost ``ASSUMED_COST`` of a pass of the target.
    """
    return optimal_draft_len(gate.argmax_agreement if greedy else gate.overlap, ASSUMED_COST)
