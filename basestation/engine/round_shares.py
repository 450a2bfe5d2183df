"""Fair shares of the forward passes for the rounds of devices, by deficit round robin (Shreedhar and Varghese 1995).

A device gets no more tokens than its share of the passes for which it waits, whether the
others wait for their rounds or for their prompts. A round that is longer than the share of
one pass waits until those of several add up to it: long rounds of one device would make
every pass long for all.

Knows lengths; not what a pass runs beside rounds.
"""

from collections.abc import Collection, Sequence
from itertools import accumulate

from basestation.sessions.session import Session

MIN_SHARE = 16
"""Rounds of this many tokens never wait for a share, however many devices there are."""


class RoundShares:
    """What each waiting device may run.

    Args:
        tokens: of a forward pass.
    """

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._credits: dict[str, int] = {}  # by owner: tokens

    def order(self, rounds: Sequence[Session], prompt_owners: Collection[str]) -> list[Session]:
        """The rounds for the next pass: every device's first, then every device's second and so on.

        Args:
            rounds: the sessions with a round, by the time since which it is ready.
            prompt_owners: the owners of waiting prompts.

        Returns:
            Those that their devices' credits allow; where no prompt waits, at least one if there is any.
        """
        by_owner: dict[str, list[Session]] = {}
        for session in rounds:
            by_owner.setdefault(session.peer.owner, []).append(session)
        self._add_share({owner: sessions[0].round_len for owner, sessions in by_owner.items()}, prompt_owners)
        turns: list[list[Session]] = []
        for owner, sessions in by_owner.items():
            totals = accumulate(session.round_len for session in sessions)
            for turn, (session, total) in enumerate(zip(sessions, totals, strict=True)):
                if total > self._credits[owner]:
                    break
                turns += [[]] if turn == len(turns) else []
                turns[turn].append(session)
        return [session for turn in turns for session in sorted(turn, key=lambda one: one.ready_since)]

    def charge(self, session: Session) -> None:
        """Count a round that runs in the next pass."""
        self._credits[session.peer.owner] -= session.round_len

    def _add_share(self, lengths: dict[str, int], prompt_owners: Collection[str]) -> None:
        """Add a share to the credits of waiting devices; where no prompt waits, until the first round of one can run.

        Args:
            lengths: of the first round of each.
            prompt_owners: the owners of waiting prompts.
        """
        share = max(MIN_SHARE, self._tokens // max(1, len({*lengths, *prompt_owners})))
        left = {owner: self._credits.get(owner, 0) for owner in lengths}
        missing = min((length - left[owner] for owner, length in lengths.items()), default=0)
        shares = 1 if prompt_owners else max(1, -(-missing // share))
        self._credits = {owner: min(left[owner] + shares * share, length + share) for owner, length in lengths.items()}
