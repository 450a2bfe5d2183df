"""How far two sequences agree."""

from collections.abc import Sequence


def common_prefix(one: Sequence[int] | str, other: Sequence[int] | str) -> int:
    """The number of tokens or characters with which both start."""
    for index, (mine, yours) in enumerate(zip(one, other, strict=False)):
        if mine != yours:
            return index
    return min(len(one), len(other))
