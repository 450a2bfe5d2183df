"""Prefix sharing: sessions with the same first tokens compute and store their KV cache once.

A session with an empty KV cache looks for another one with the same first tokens
and shares its blocks. While that *source* is still computing them, the session
waits, because computing them twice would take longer.

Knows tokens and lengths; not how a batch is scheduled.
"""

import logging
from collections.abc import Iterable

from basestation.kv_pool import BLOCK_SIZE
from basestation.memory import OutOfMemory, catch_out_of_memory
from basestation.session import Session

logger = logging.getLogger(__name__)


def share_prefixes(newcomers: Iterable[Session], sessions: Iterable[Session]) -> dict[Session, Session]:
    """Let ``newcomers``, whose KV caches are empty, share the cached prefixes of ``sessions``.

    The work grows with the number of sessions and of their blocks, not with its square.

    Returns:
        The newcomers that should wait, each with the source that is computing their prefix.
    """
    ordered = sorted(newcomers, key=lambda one: len(one.tokens))
    if not ordered:
        return {}
    sources: dict[bytes, Session] = {}  # by the key of each block: the source with the most cached positions
    for session in sorted(sessions, key=lambda one: one.kv_cache.length):
        if session.kv_cache.length:
            sources.update(dict.fromkeys(session.tokens.shareable_keys, session))
    waiting = {}
    for newcomer in ordered:
        length, source = _longest_prefix(newcomer, sources)
        if not length:
            for key in newcomer.tokens.shareable_keys:
                sources.setdefault(key, newcomer)
        elif source.kv_cache.length < length:
            waiting[newcomer] = source
        else:
            _share(newcomer, source, length)
    return waiting


def _longest_prefix(newcomer: Session, sources: dict[bytes, Session]) -> tuple[int, Session]:
    """Positions that a newcomer can share, and the source that has them; (0, the newcomer) without any."""
    keys = newcomer.tokens.shareable_keys
    known, unknown = 0, len(keys) + 1  # the first ``known`` blocks have a source, the first ``unknown`` have none
    while unknown - known > 1:
        middle = (known + unknown) // 2
        if keys[middle - 1] in sources:
            known = middle
        else:
            unknown = middle
    return known * BLOCK_SIZE, sources[keys[known - 1]] if known else newcomer


def _share(newcomer: Session, source: Session, length: int) -> None:
    try:
        with catch_out_of_memory():
            newcomer.kv_cache.share_prefix(source.kv_cache, length)
    except OutOfMemory as error:
        logger.warning("out of memory while sharing a prefix of %d tokens: %s", length, error)
