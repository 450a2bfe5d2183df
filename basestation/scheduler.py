"""What runs in the next pass: rounds first, then prompts in chunks, within a budget of tokens and of memory.

Everything that waits is taken as it comes; nobody waits for anybody's round. Where
the kv_pool has no room, sessions whose devices are silent lose their keys and
values, the longest silent first, and keep their tokens. Who begins like another
takes over what that one has computed.

Knows lengths and times; not what tokens mean.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Self

from basestation.kv_pool import STEP, KVPool, Segment
from basestation.prefix_sharing import share_prefixes
from basestation.session import Session
from protocol.errors import FullError, SettingsError

_LEAST_CHUNK = 16
_RUNNING_SECONDS = 1.0
BUSY_SECONDS = 5.0


@dataclass(frozen=True)
class PassBudget:
    """Tokens of a pass.

    Attributes:
        tokens: in all, unless a single round needs more.
        prompt_tokens: of prompts, while rounds of other sessions may come.
    """

    tokens: int = 256
    prompt_tokens: int = 32

    @classmethod
    def of(cls, tokens: int | None, prompt_tokens: int | None, on_cuda: bool) -> Self:
        """What was chosen, or what suits the processor."""
        suited = cls(2048, 512) if on_cuda else cls()
        return cls(
            suited.tokens if tokens is None else tokens,
            suited.prompt_tokens if prompt_tokens is None else prompt_tokens,
        )

    def __post_init__(self) -> None:
        for option, value in (("pass-tokens", self.tokens), ("prompt-tokens", self.prompt_tokens)):
            if value < _LEAST_CHUNK:
                raise SettingsError(option, value, f"{_LEAST_CHUNK} and more")


@dataclass(frozen=True, slots=True)
class ScheduledUnit:
    """A session's part of a pass."""

    session: Session
    segment: Segment


class Scheduler:
    """Fills passes.

    Args:
        kv_pool: where keys and values of all sessions lie.
        budget: how much fits into a pass.
        evicted: called for each session that loses its keys and values.
    """

    def __init__(self, kv_pool: KVPool, budget: PassBudget, evicted: Callable[[Session], None]) -> None:
        self._kv_pool = kv_pool
        self._budget = budget
        self._evicted = evicted

    def gather(self, sessions: Collection[Session], now: float) -> list[ScheduledUnit]:
        """The next pass: the rounds that waited longest, then a share of the rest for each prompt.

        The prompt that waited longest comes first, so that none waits for ever, and then the
        shortest; what it leaves of its share goes to the longer ones. Of prompts that begin
        alike the first computes that beginning, and the others wait for it.
        """
        behind = share_prefixes([one for one in sessions if one.waiting and not one.kv_cache.length], sessions)
        waiting = [one for one in sessions if one.waiting and one not in behind]
        waiting.sort(key=lambda one: one.waiting_since)
        batch = _BatchBuilder(self._kv_pool, sessions, self._evicted)
        left = self._budget.tokens
        for session in (one for one in waiting if not one.backlog):
            if session.round_len > left and batch.units:
                break
            left -= batch.add(session, session.round_len)
        prompts = _in_turn([one for one in waiting if one.backlog], behind)
        if any(not one.backlog and (one.waiting or now - one.heard_at < _RUNNING_SECONDS) for one in sessions):
            left = min(left, self._budget.prompt_tokens)
        for count, session in zip(range(len(prompts), 0, -1), prompts, strict=True):
            if left < _LEAST_CHUNK and batch.units:
                break
            left -= batch.add(session, max(left // count, _LEAST_CHUNK))
        return batch.units

    def evict_idle(self, sessions: Collection[Session]) -> int:
        """Take the keys and values of all sessions that have nothing to run; gives of how many."""
        silent = [one for one in sessions if one.kv_cache.capacity and not one.waiting]
        for session in silent:
            session.evict()
            self._evicted(session)
        return len(silent)

    def check_room(self, newcomer: Session, sessions: Collection[Session], now: float) -> None:
        """Whether another session fits beside those whose devices are busy, once it holds what is there in common.

        What another is still computing counts for both.

        Raises:
            FullError: it does not; with the time after which enough devices will have been silent if none speaks.
        """
        share_prefixes([newcomer], sessions)
        busy = [one for one in sessions if one.waiting or now - one.heard_at < BUSY_SECONDS]
        busy.sort(key=lambda one: one.heard_at)
        claims = list(accumulate(_claims([*busy, newcomer])))
        excess = claims[-1] - self._kv_pool.capacity
        if excess <= 0:
            return
        newcomer.kv_cache.release()
        ends = (one.heard_at + BUSY_SECONDS for one, claim in zip(busy, claims, strict=False) if claim >= excess)
        seconds = max(1, math.ceil(next(ends, now) - now))
        told = f"the base station is full (busy sessions: {len(busy)}); come back in {seconds} s"
        raise FullError(told, seconds)


def _in_turn(prompts: Sequence[Session], behind: Mapping[Session, Session]) -> list[Session]:
    """The first, then by what is left of them; who computes for others who are ``behind`` counts as the shortest."""
    left = {one: one.backlog for one in prompts}
    for waiter, source in behind.items():
        if source in left:
            left[source] = min(left[source], waiter.backlog)
    return [*prompts[:1], *sorted(prompts[1:], key=lambda one: left[one])]


def _claims(sessions: Sequence[Session]) -> list[int]:
    """The room that each session needs for its tokens and one more; a block counts for the last of its ref_count."""
    last = {block: one for one in sessions for block in one.kv_cache.blocks}
    held = [sum(last[block] is not one for block in one.kv_cache.blocks) * STEP for one in sessions]
    return [KVPool.rounded(len(one.tokens) + 1) - elsewhere for one, elsewhere in zip(sessions, held, strict=True)]


class _BatchBuilder:
    """A pass while it is filled."""

    def __init__(self, kv_pool: KVPool, sessions: Collection[Session], evicted: Callable[[Session], None]) -> None:
        self.units: list[ScheduledUnit] = []
        self._kv_pool = kv_pool
        self._sessions = sessions
        self._evicted = evicted
        self._promised = 0

    def add(self, session: Session, limit: int) -> int:
        """Take a session in, with ``limit`` tokens at most, if room is found; gives how many."""
        segment = session.segment(limit)
        kv_cache, count = session.kv_cache, len(segment.token_ids)
        growth = max(0, KVPool.rounded(kv_cache.length + count) - kv_cache.capacity)
        if not self._find_room(session, growth):
            return 0
        self._promised += growth
        self.units.append(ScheduledUnit(session, segment))
        return count

    def _find_room(self, session: Session, growth: int) -> bool:
        """Whether there is room, or can be made."""
        while growth > self._kv_pool.free - self._promised:
            victim = self._victim(session)
            if victim is None:
                return False
            victim.evict()
            self._evicted(victim)
        return True

    def _victim(self, session: Session) -> Session | None:
        """Who loses its keys and values: the longest silent, or where nothing else could run who came last."""
        running = {id(unit.session) for unit in self.units}
        ref_count = [
            one for one in self._sessions if one.kv_cache.capacity and one is not session and id(one) not in running
        ]
        silent = [one for one in ref_count if not one.waiting]
        if silent or self.units:
            return min(silent, key=lambda one: one.heard_at, default=None)
        return max(ref_count, key=lambda one: one.waiting_since, default=None)
