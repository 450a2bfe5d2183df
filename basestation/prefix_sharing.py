"""Prefix sharing: sessions with the same first tokens compute and store their KV cache once.

A session with an empty KV cache looks for another one with the same first tokens
and shares its blocks. While that *source* is still computing them, the session
waits, because computing them twice would take longer.

Knows tokens and lengths; not how a batch is scheduled.
"""

import logging
from collections.abc import Iterable, Sequence

from basestation.kv_pool import BLOCK_SIZE
from basestation.memory import OutOfMemory, catch_out_of_memory
from basestation.session import Session

logger = logging.getLogger(__name__)


def share_prefixes(newcomers: Iterable[Session], sessions: Iterable[Session]) -> dict[Session, Session]:
    """Let ``newcomers``, whose KV caches are empty, share the cached prefixes of ``sessions``.

    Returns:
        The newcomers that should wait, each with the source that is computing their prefix.
    """
    sources = [one for one in sessions if one.kv_cache.length]
    waiting = {}
    for newcomer in sorted(newcomers, key=lambda one: len(one.tokens)):
        shared = [(shared_len(one, newcomer), one) for one in sources]
        length, source = max(shared, key=lambda pair: (pair[0], pair[1].kv_cache.length), default=(0, newcomer))
        if not length:
            sources.append(newcomer)
        elif source.kv_cache.length < length:
            waiting[newcomer] = source
        else:
            _share(newcomer, source, length)
    return waiting


def shared_len(one: Session, other: Session) -> int:
    """Positions that two sessions can share: whole blocks, without the last token, which runs with a round."""
    return _common_len(one.tokens, other.tokens, min(len(one.tokens), len(other.tokens)) - 1)


def _common_len(one: Sequence[int], other: Sequence[int], limit: int) -> int:
    starts = range(0, limit - BLOCK_SIZE + 1, BLOCK_SIZE)
    different = (start for start in starts if one[start : start + BLOCK_SIZE] != other[start : start + BLOCK_SIZE])
    return next(different, len(starts) * BLOCK_SIZE)


def _share(newcomer: Session, source: Session, length: int) -> None:
    try:
        with catch_out_of_memory():
            newcomer.kv_cache.share_prefix(source.kv_cache, length)
    except OutOfMemory as error:
        logger.warning("out of memory while sharing a prefix of %d tokens: %s", length, error)
