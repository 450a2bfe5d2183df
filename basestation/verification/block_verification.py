"""Block verification: how many drafted tokens are accepted, by their joint probability (arXiv:2403.10444, algorithm 2).

For drafted tokens x_i ~ Q_i, the target's distributions P_i and the uniform numbers u_i:

- p_0 = 1, p_i = min(1, p_{i−1} · P_i(x_i) / Q_i(x_i));
- S_i = Σ_x max(0, p_i · P_{i+1}(x) − Q_{i+1}(x)), h_i = S_i / (S_i + 1 − p_i), and h_γ = p_γ after the last token;
- the largest i with u_i < h_i is the number of accepted tokens, 0 where there is none;
- the token after them is sampled from the residual norm(max(0, p_i · P_{i+1} − Q_{i+1})), after all γ from P_{γ+1}.

It accepts at least as many tokens on average as token-wise verification. Whether a token is
accepted depends on all tokens and numbers u of its Draft, so that a position which is drafted
again needs new ones (``protocol/randomness.py``).

Knows tensors with a row for each number of tokens, from none to all γ, of each round; row i has
what concerns x_{i+1}, the last one nothing.
"""

import torch
from torch import Tensor


def joint_probabilities(
    target_probs: Tensor, draft_probs: Tensor, starts: Tensor, round_indices: Tensor, longest: int
) -> Tensor:
    """p_i of each row, float64 [n]; 0 from an impossible token on.

    Args:
        target_probs: P of the drafted token of each row, float64 [n].
        draft_probs: Q of it, float64 [n].
        starts: the first row of each round, int64 [rounds].
        round_indices: the round of each row, int64 [n].
        longest: the most rows of a round.
    """
    ratios = (target_probs / draft_probs).nan_to_num_(nan=0.0)
    columns = torch.arange(len(ratios), device=ratios.device) - starts[round_indices]
    factors, joint = (ratios.new_ones(longest, len(starts)) for _ in range(2))
    factors[columns, round_indices] = ratios
    for column in range(1, longest):
        torch.mul(joint[column - 1], factors[column - 1], out=joint[column]).clamp_(max=1)
    return joint[columns, round_indices]


def last_accepted(
    joint: Tensor, residual_mass: Tensor, numbers: Tensor, starts: Tensor, round_indices: Tensor
) -> Tensor:
    """The row of each round whose tokens are accepted, the first one for none: int64 [rounds].

    Args:
        joint: p_i, float64 [n].
        residual_mass: S_i, float64 [n]; in the last row of a round, which has no Q, it is p_i.
        numbers: u of the drafted token of each row, float64 [n] in [0, 1).
        starts: the first row of each round, int64 [rounds].
        round_indices: the round of each row, int64 [n].
    """
    before = numbers.roll(1)  # u_i of the last of the i tokens, which belongs to the row before
    accepted = before * (residual_mass + 1 - joint) < residual_mass
    rows = torch.where(accepted, torch.arange(len(joint), device=joint.device), 0)
    return starts.scatter_reduce(0, round_indices, rows, "amax")
