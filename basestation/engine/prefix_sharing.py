"""Prefix sharing: sessions with the same first tokens compute and store their KV cache once.

A session with an empty KV cache looks for another one with the same first tokens
and shares its pages. While that *source* is still computing them, the session
waits, because computing them twice would take longer.

Knows tokens and lengths; not how a batch is scheduled.
"""

from collections.abc import Iterable

from basestation.sessions.session import Session


def share_prefixes(newcomers: Iterable[Session], sessions: Iterable[Session]) -> dict[Session, Session]:
    """Let ``newcomers``, whose KV caches are empty, share the cached prefixes of ``sessions``.

    The work grows with the number of sessions and of their pages, not with its square.

    Returns:
        The newcomers that should wait, each with the source that is computing their prefix.
    """
    ordered = sorted(newcomers, key=lambda one: len(one.tokens))
    if not ordered:
        return {}
    sources: dict[bytes, Session] = {}  # by the key of each page: the source with the most cached positions
    for session in sorted(sessions, key=lambda one: one.kv_cache.length):
        if session.kv_cache.length:
            page_size = session.kv_cache.page_size
            first = max(0, -(-session.kv_cache.shortest // page_size) - 1)
            end = None if session.waiting else session.kv_cache.length // page_size
            sources.update(dict.fromkeys(session.tokens.shareable_keys[first:end], session))
    waiting = {}
    for newcomer in ordered:
        length, source = _longest_prefix(newcomer, sources)
        if not length:
            for key in newcomer.tokens.shareable_keys:
                sources.setdefault(key, newcomer)
        elif source.kv_cache.length < length:
            waiting[newcomer] = source
        else:
            newcomer.kv_cache.share_prefix(source.kv_cache, length)
    return waiting


def _longest_prefix(newcomer: Session, sources: dict[bytes, Session]) -> tuple[int, Session]:
    """Positions that a newcomer can share, and the source that has them; (0, the newcomer) without any."""
    keys = newcomer.tokens.shareable_keys
    known = next((count for count in range(len(keys), 0, -1) if keys[count - 1] in sources), 0)
    return known * newcomer.kv_cache.page_size, sources[keys[known - 1]] if known else newcomer
