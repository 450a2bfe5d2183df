"""Beginnings that sessions have in common: computed once, kept once.

A session that has computed nothing yet looks for another whose tokens begin as
its own do, and holds that one's keys and values from then on. Where the other is
still computing them, it waits: two would take longer than one.

Knows tokens and lengths; not what a pass is.
"""

import logging
from collections.abc import Iterable, Sequence

from basestation.kv_pool import STEP
from basestation.memory import OutOfMemory, catch_out_of_memory
from basestation.session import Session

logger = logging.getLogger(__name__)


def share_prefixes(newcomers: Iterable[Session], sessions: Iterable[Session]) -> dict[Session, Session]:
    """Let ``newcomers``, whose kv_caches are empty, hold what ``sessions`` have computed of the same tokens.

    Returns:
        Those that should wait, each with the other session that is computing what it can hold.
    """
    ahead = [one for one in sessions if one.kv_cache.length]
    behind = {}
    for newcomer in sorted(newcomers, key=lambda one: len(one.tokens)):
        shared = [(shared_len(one, newcomer), one) for one in ahead]
        length, source = max(shared, key=lambda pair: (pair[0], pair[1].kv_cache.length), default=(0, newcomer))
        if not length:
            ahead.append(newcomer)
        elif source.kv_cache.length < length:
            behind[newcomer] = source
        else:
            _join(newcomer, source, length)
    return behind


def shared_len(one: Session, other: Session) -> int:
    """How many positions both can hold in common: whole blocks, without the last token, which is run with a round."""
    return _common_len(one.tokens, other.tokens, min(len(one.tokens), len(other.tokens)) - 1)


def _common_len(one: Sequence[int], other: Sequence[int], most: int) -> int:
    ends = range(STEP, most + 1, STEP)
    return next((end - STEP for end in ends if one[end - STEP : end] != other[end - STEP : end]), len(ends) * STEP)


def _join(newcomer: Session, source: Session, length: int) -> None:
    try:
        with catch_out_of_memory():
            newcomer.kv_cache.join(source.kv_cache, length)
    except OutOfMemory as error:
        logger.warning("no memory to make a beginning of %d tokens a shared one: %s", length, error)
