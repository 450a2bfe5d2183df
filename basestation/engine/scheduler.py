"""Scheduling: what runs in the next forward pass, within a budget of tokens and of KV cache memory.

Rounds first, each device's oldest before any device's second, then chunked prefill. When
the KV pool is full, idle sessions are evicted, the longest idle first; they keep their
tokens. Sessions with a common prefix compute it once.

Knows lengths and times; not what tokens mean.
"""

import collections
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Self

from basestation.engine.prefix_sharing import share_prefixes
from basestation.engine.round_shares import RoundShares
from basestation.kv_cache.kv_pool import KVPool
from basestation.sessions.session import Session
from basestation.target.segment import Segment
from basestation.verification.verify import RoundToVerify
from protocol.errors import FullError, SettingsError

_MIN_CHUNK = 16
_ACTIVE_SECONDS = 1.0
"""A session with a Verdict or request this recent is expected to send another Draft."""
BUSY_SECONDS = 5.0
"""A session this recently active keeps its KV cache when another one asks to be opened."""


@dataclass(frozen=True)
class PassBudget:
    """Tokens of a forward pass.

    Attributes:
        tokens: in total, unless a single round needs more.
        prompt_tokens: for prefill, while other sessions run rounds; so many times more as more devices wait for a
            prefill than run rounds.
    """

    tokens: int = 256
    prompt_tokens: int = 32

    @classmethod
    def of(cls, tokens: int | None, prompt_tokens: int | None, on_cuda: bool) -> Self:
        """The given values, or for None the default of the processor."""
        default = cls(2048, 512) if on_cuda else cls()
        return cls(
            default.tokens if tokens is None else tokens,
            default.prompt_tokens if prompt_tokens is None else prompt_tokens,
        )

    def __post_init__(self) -> None:
        for option, value in (("pass-tokens", self.tokens), ("prompt-tokens", self.prompt_tokens)):
            if value < _MIN_CHUNK:
                raise SettingsError(option, value, f"{_MIN_CHUNK} or more")


@dataclass(frozen=True, slots=True)
class ScheduledUnit:
    """A session's part of a forward pass, with the round that its logits verify, if any."""

    session: Session
    segment: Segment
    round: RoundToVerify | None


class Scheduler:
    """Fills batches.

    Args:
        kv_pool: of all sessions.
        budget: of a forward pass.
        on_eviction: called for each evicted session.
    """

    def __init__(self, kv_pool: KVPool, budget: PassBudget, on_eviction: Callable[[Session], None]) -> None:
        self._kv_pool = kv_pool
        self._budget = budget
        self._on_eviction = on_eviction
        self._round_shares = RoundShares(budget.tokens)
        self._prefilled: dict[str, int] = {}  # by owner of a waiting prompt: tokens while others waited too
        self._passes = 0

    def schedule(self, sessions: Collection[Session], now: float) -> list[ScheduledUnit]:
        """The next batch: a round of each device, then further ones, then a share of the remaining tokens for prompts.

        A device gets no more than its share of the tokens, for its rounds (``round_shares.py``)
        and for its prompts, however many sessions it has.

        In every other pass the prompt that is ready longest comes first, so that none
        starves; then those of the device that was served least. Of a device's prompts the
        shortest comes first. Tokens that one leaves unused go to the next. Of prompts with
        a common prefix the first computes it and the others wait for it.
        """
        sources = share_prefixes([one for one in sessions if one.waiting and not one.kv_cache.length], sessions)
        ready = [one for one in sessions if one.waiting and one not in sources]
        ready.sort(key=lambda one: one.ready_since)
        rounds = [one for one in ready if not one.backlog]
        prompts = [one for one in ready if one.backlog]
        waiting = {one.peer.owner for one in prompts}
        batch = _BatchBuilder(self._kv_pool, sessions, self._on_eviction)
        left = self._budget.tokens
        for session in self._round_shares.order(rounds, waiting):
            if session.round_len > left and batch.units:
                break
            if batch.add(session, session.round_len):
                left -= session.round_len
                self._round_shares.charge(session)
        if running := {one.peer.owner for one in sessions if not one.backlog and is_active(one, now)}:
            left = min(left, self._budget.prompt_tokens * max(1, len(waiting) // len(running)))
        for turn in self._prompt_turns(prompts, sources):
            for count, session in zip(range(len(turn), 0, -1), turn, strict=True):
                if left < _MIN_CHUNK and batch.units:
                    break
                added = batch.add(session, max(left // count, _MIN_CHUNK), evict_waiting=not rounds)
                self._prefilled[session.peer.owner] += added
                left -= added
        return batch.units

    def _prompt_turns(self, prompts: Sequence[Session], sources: Mapping[Session, Session]) -> list[list[Session]]:
        """Every device's first prompt, then every device's second and so on, those of devices served least first.

        In every other pass the first of ``prompts``, which is ready longest, stays first.
        """
        self._passes += 1
        oldest = prompts[:1] if self._passes % 2 == 0 else []
        least = min(self._prefilled.values(), default=0)
        self._prefilled = {one.peer.owner: self._prefilled.get(one.peer.owner, least) for one in prompts}
        turns: list[list[Session]] = []
        taken: collections.Counter[str] = collections.Counter()
        for session in [*oldest, *(one for one in _shortest_first(prompts, sources) if one not in oldest)]:
            turn = taken[session.peer.owner]
            turns += [[]] if turn == len(turns) else []
            turns[turn].append(session)
            taken[session.peer.owner] += 1
        return [sorted(turn, key=lambda one: (one not in oldest, self._prefilled[one.peer.owner])) for turn in turns]

    def evict_idle(self, sessions: Collection[Session]) -> int:
        """Evict the KV caches of all sessions that have nothing to run; returns how many."""
        idle = [one for one in sessions if one.kv_cache.capacity and not one.waiting]
        for session in idle:
            session.evict()
            self._on_eviction(session)
        return len(idle)

    def admit(self, newcomer: Session, sessions: Collection[Session], now: float) -> None:
        """Check that another session fits beside the busy ones, after it shares their prefixes.

        A prefix that a source is still computing counts for both.

        Raises:
            FullError: it does not fit; says after how many seconds enough sessions will be idle at the earliest.
        """
        share_prefixes([newcomer], sessions)
        try:
            self.check_share(newcomer, sessions, now)
            self._check_room([*_busy(sessions, now), newcomer], self._kv_pool.capacity, "the base station is full", now)
        except FullError:
            newcomer.kv_cache.release()
            raise

    def check_share(self, session: Session, sessions: Collection[Session], now: float) -> None:
        """Check that a session with new tokens and the other busy ones of its device need at most half of the KV pool.

        So one device leaves room for others. A single session may take all of it.

        Raises:
            FullError: they need more.
        """
        owner = session.peer.owner
        others = [one for one in _busy(sessions, now) if one is not session and one.peer.owner == owner]
        if others:
            half = self._kv_pool.capacity // 2
            self._check_room([*others, session], half, "this device's sessions fill half of the KV pool", now)

    def required_share(self, sessions: Collection[Session], now: float) -> float:
        """The share of the KV pool that busy sessions require; above 1 where some of them must wait."""
        return sum(self._required_positions(_busy(sessions, now))) / self._kv_pool.capacity

    def _check_room(self, sessions: Sequence[Session], allowed: int, reason: str, now: float) -> None:
        """Check that sessions, the longest idle first and the one in question last, need no more than ``allowed``."""
        totals = list(accumulate(self._required_positions(sessions)))
        excess = totals[-1] - allowed
        if excess > 0:
            pairs = zip(sessions[:-1], totals, strict=False)
            ends = (one.last_active + BUSY_SECONDS for one, total in pairs if total >= excess)
            seconds = max(1, math.ceil(next(ends, now) - now))
            raise FullError(f"{reason} (busy sessions: {len(sessions) - 1}); retry in {seconds} s", seconds)

    def _required_positions(self, sessions: Sequence[Session]) -> list[int]:
        """Positions that each session needs for its tokens and one more; a shared page counts for its last user."""
        kv_pool = self._kv_pool
        last_user = {page: one for one in sessions for page in one.kv_cache.pages}
        elsewhere = [sum(last_user[page] is not one for page in one.kv_cache.pages) for one in sessions]
        needed = [kv_pool.pages_for(len(one.tokens) + 1) - one.kv_cache.unseen for one in sessions]
        return [(pages - other) * kv_pool.page_size for pages, other in zip(needed, elsewhere, strict=True)]


def is_active(session: Session, now: float) -> bool:
    """Whether a session has something to run, or is expected to have a round soon."""
    return session.waiting or now - session.last_active < _ACTIVE_SECONDS


def is_busy(session: Session, now: float) -> bool:
    """Whether a session keeps its KV cache when another one asks to be opened."""
    return session.waiting or now - session.last_active < BUSY_SECONDS


def _busy(sessions: Collection[Session], now: float) -> list[Session]:
    """The busy sessions, the longest idle first."""
    return sorted((one for one in sessions if is_busy(one, now)), key=lambda one: one.last_active)


def _shortest_first(prompts: Sequence[Session], sources: Mapping[Session, Session]) -> list[Session]:
    """Prompts by the tokens left; a source is as short as the shortest session that waits for it."""
    left = {one: one.backlog for one in prompts}
    for newcomer, source in sources.items():
        if source in left:
            left[source] = min(left[source], newcomer.backlog)
    return sorted(prompts, key=lambda one: left[one])


class _BatchBuilder:
    """A batch while it is filled.

    Attributes:
        units: the batch so far.
    """

    def __init__(self, kv_pool: KVPool, sessions: Collection[Session], on_eviction: Callable[[Session], None]) -> None:
        self.units: list[ScheduledUnit] = []
        self._kv_pool = kv_pool
        self._sessions = sessions
        self._on_eviction = on_eviction
        self._evicted: set[Session] = set()
        self._reserved = 0

    def add(self, session: Session, limit: int, evict_waiting: bool = True) -> int:
        """Add at most ``limit`` tokens of a session; returns how many, 0 where the KV pool has no room.

        For the first of a batch others that wait are evicted too if ``evict_waiting``: a prompt evicts no round, except
        of a device whose sessions have grown beyond half of the pool. Sessions that this batch evicted are not added.
        """
        if session in self._evicted:
            return 0
        segment = session.segment(limit)
        kv_cache, count = session.kv_cache, len(segment.token_ids)
        growth = max(0, self._kv_pool.round_up(kv_cache.length + count) - kv_cache.capacity)
        if not self._make_room(session, growth, evict_waiting and not self.units):
            return 0
        self._reserved += growth
        self.units.append(ScheduledUnit(session, segment, session.round if segment.num_logits else None))
        return count

    def _make_room(self, session: Session, growth: int, evict_waiting: bool) -> bool:
        """Evict other sessions until ``growth`` positions are free; False where none is left to evict."""
        while growth > self._kv_pool.free - self._reserved:
            victim = self._victim(session, evict_waiting)
            if victim is None:
                return False
            victim.evict()
            self._evicted.add(victim)
            self._on_eviction(victim)
        return True

    def _victim(self, session: Session, evict_waiting: bool) -> Session | None:
        """The session to evict: the longest idle, else the last to become ready of those that may be evicted.

        These are all if ``evict_waiting``, and for a prompt those of devices that have grown beyond half of the pool.
        """
        scheduled = {id(unit.session) for unit in self.units}
        candidates = [
            one for one in self._sessions if one.kv_cache.capacity and one is not session and id(one) not in scheduled
        ]
        idle = [one for one in candidates if not one.waiting]
        if idle:
            return min(idle, key=lambda one: one.last_active)
        if not evict_waiting:
            greedy = self._beyond_half() - {session.peer.owner} if session.backlog else set()
            candidates = [one for one in candidates if one.peer.owner in greedy]
        return max(candidates, key=lambda one: one.ready_since, default=None)

    def _beyond_half(self) -> set[str]:
        """The owners of several sessions that have more than half of the KV pool together."""
        held: dict[str, list[Session]] = collections.defaultdict(list)
        for one in self._sessions:
            if one.kv_cache.pages:
                held[one.peer.owner].append(one)
        half = self._kv_pool.pages_for(self._kv_pool.capacity) // 2
        return {
            owner
            for owner, sessions in held.items()
            if len(sessions) > 1 and len({page for one in sessions for page in one.kv_cache.pages}) > half
        }
