"""Beginnings that sessions have in common: held once, right for each, and gone with the last."""

import logging
from typing import cast

import numpy as np
import pytest
import torch

from basestation.kv_pool import STEP, SequenceKVCache, Workspace
from basestation.session import Session
from protocol.messages import Close, Extend, Fault, Opened
from tests.fakes import FakeSequenceKVCache, new_kv_pool
from tests.link_pair import Station
from tests.talkers import BUDGET, CODEC, Talker, new_station, prompt_of, settle, target_of

COMMON = prompt_of(2 * STEP + 50, seed=77)
KINDS = [prompt_of(300, seed=100 + kind) for kind in range(3)]


def sessions_of(station: Station) -> list[Session]:
    return list(vars(station.engine)["_sessions"].values())


def leave(station: Station, *talkers: Talker) -> None:
    for talker in talkers:
        station.push(talker.peer, CODEC.encode(Close(0)))


def check_arena(station: Station) -> None:
    """What is held is what the sessions' own tokens are, counted once, and within the budget."""
    kv_pool, kv_caches = target_of(station).kv_pool, [one.kv_cache for one in sessions_of(station)]
    for session in sessions_of(station):
        assert cast(FakeSequenceKVCache, session.kv_cache).tokens == session.tokens[: session.kv_cache.length]
    ref_count = [block for kv_cache in kv_caches for block in kv_cache.blocks]
    own = sum(kv_cache.capacity - STEP * len(kv_cache.blocks) for kv_cache in kv_caches)
    assert kv_pool.used == own + STEP * len(set(ref_count)) <= kv_pool.capacity
    assert kv_pool.shared == STEP * (len(ref_count) - len(set(ref_count)))


def store(kv_cache: SequenceKVCache, numbers: list[float], workspace: Workspace) -> list[float]:
    """Write keys that are these numbers; gives all keys up to there, each value being its key's negative."""
    kv_cache.reserve(kv_cache.length + len(numbers))
    keys = torch.tensor(numbers).reshape(1, -1, 1)
    all_keys, all_values = kv_cache.store(0, keys, -keys, workspace)
    kv_cache.length += len(numbers)
    assert torch.equal(all_keys, -all_values)
    found: list[float] = all_keys.flatten().tolist()
    return found


def test_stretches_keep_what_was_written_whoever_joins_goes_back_or_leaves() -> None:
    rng = np.random.default_rng(3)
    kv_pool, workspace = new_kv_pool(2**20), Workspace(2**16)
    kv_caches = [SequenceKVCache(kv_pool) for _ in range(6)]
    written: list[list[float]] = [[] for _ in kv_caches]
    most_shared = 0
    for _ in range(2000):
        one, other = (int(index) for index in rng.choice(len(kv_caches), 2, replace=False))
        action = rng.random()
        if action < 0.7:
            numbers: list[float] = rng.integers(2**20, size=int(rng.integers(1, 300))).astype(float).tolist()
            written[one] += numbers
            assert store(kv_caches[one], numbers, workspace) == written[one]
        elif action < 0.9:
            length = int(rng.integers(len(written[other]) // STEP + 1)) * STEP
            kv_caches[one].join(kv_caches[other], length)
            written[one] = written[other][:length]
        elif action < 0.97:
            length = int(rng.integers(len(written[one]) + 1))
            blocks = len(kv_caches[one].blocks)
            kv_caches[one].rollback(length)
            left = kv_caches[one].length
            assert left == length or (left == length // STEP * STEP and length < blocks * STEP)
            del written[one][left:]
        else:
            kv_caches[one].release()
            written[one] = []
        ref_count = [block for kv_cache in kv_caches for block in kv_cache.blocks]
        own = sum(kv_cache.capacity - STEP * len(kv_cache.blocks) for kv_cache in kv_caches)
        assert kv_pool.used == own + STEP * len(set(ref_count))
        assert kv_pool.shared == STEP * (len(ref_count) - len(set(ref_count)))
        assert all(kv_cache.length <= kv_cache.capacity for kv_cache in kv_caches)
        most_shared = max(most_shared, kv_pool.shared)
    assert most_shared > 10 * STEP
    for kv_cache in kv_caches:
        kv_cache.release()
    assert (kv_pool.used, kv_pool.shared) == (0, 0)


@pytest.mark.parametrize("capacity", [5 * STEP, 2**20], ids=["little memory", "much memory"])
@pytest.mark.parametrize("memory", [None, 70], ids=["", "short"])
@pytest.mark.parametrize("seed", range(3))
def test_answers_do_not_depend_on_who_began_alike(capacity: int, memory: int | None, seed: int) -> None:
    """Sessions of three kinds of prompts come, speak, go back, fall silent and vanish in the middle of rounds."""
    rng = np.random.default_rng(seed)
    station = new_station(capacity=capacity, memory=memory)
    talkers: dict[int, Talker] = {}
    judged, most_shared = 0, 0
    for turn in range(250):
        station.now += float(rng.exponential(2.0))
        name = int(rng.integers(8))
        talker = talkers.get(name)
        if talker is None:
            beginning = KINDS[int(rng.integers(3))][: int(rng.integers(100, 301))]
            newcomer = Talker(station, name, [*beginning, *prompt_of(int(rng.integers(1, 90)), turn)])
            if not isinstance(newcomer.heard()[-1], Fault):
                talkers[name] = newcomer
        elif rng.random() < 0.1 or len(talker.tokens) > 450:
            talker.draft()
            leave(station, talkers.pop(name))
            talker.heard()
        elif rng.random() < 0.2:
            talker.round_id += 1
            talker.tokens = talker.tokens[: int(rng.integers(1, len(talker.tokens) + 1))]
            talker.say(Extend(0, talker.round_id, len(talker.tokens), (3, 1)))
            talker.tokens += [3, 1]
            assert talker.heard() == [Opened(0, talker.round_id)]
        else:
            talker.draft(int(rng.integers(1, 9)))
            for _ in range(int(rng.integers(3))):
                station.engine.step()
                check_arena(station)
            settle(station)
            talker.commit()
            judged += 1
        check_arena(station)
        most_shared = max(most_shared, target_of(station).kv_pool.shared)
    assert judged > 90
    assert most_shared >= 2 * STEP
    leave(station, *talkers.values())
    kv_pool = target_of(station).kv_pool
    assert (kv_pool.used, kv_pool.shared) == (0, 0)


def test_a_newcomer_runs_only_what_nobody_has_run() -> None:
    station = new_station()
    first = Talker(station, 1, [*COMMON, 5, 6])
    settle(station)
    target_of(station).tokens.clear()
    second = Talker(station, 2, [*COMMON, 7])
    settle(station)
    assert sum(target_of(station).tokens) == 50
    assert target_of(station).kv_pool.shared == 2 * STEP
    for talker in (first, second):
        talker.heard()
        talker.draft()
    settle(station)
    for talker in (first, second):
        talker.commit()


def test_the_last_token_is_run_by_each_even_where_all_are_common() -> None:
    station = new_station()
    prompt = prompt_of(2 * STEP + 1)
    talkers = [Talker(station, name, prompt) for name in (1, 2)]
    settle(station)
    assert sum(target_of(station).tokens) == 2 * STEP
    for talker in talkers:
        talker.heard()
        talker.draft()
    settle(station)
    for talker in talkers:
        talker.commit()


@pytest.mark.parametrize("length", [STEP - 1, STEP])
def test_what_is_shorter_than_a_block_is_not_shared(length: int) -> None:
    station = new_station()
    for name in (1, 2):
        Talker(station, name, prompt_of(length))
        settle(station)
    assert target_of(station).kv_pool.shared == 0
    assert sum(target_of(station).tokens) == 2 * (length - 1)


def test_of_prompts_that_come_together_the_first_runs_for_all() -> None:
    station = new_station()
    talkers = [Talker(station, name, [*COMMON, *prompt_of(20 + name, name)]) for name in range(8)]
    settle(station)
    assert sum(target_of(station).tokens) == 2 * STEP + sum(50 + 20 + name - 1 for name in range(8))
    assert target_of(station).kv_pool.shared == 7 * 2 * STEP
    assert max(target_of(station).tokens) <= BUDGET.tokens
    for talker in talkers:
        talker.heard()
        talker.draft()
    settle(station)
    for talker in talkers:
        talker.commit()


def test_who_waits_for_a_beginning_goes_on_alone_when_its_maker_leaves() -> None:
    station = new_station()
    maker = Talker(station, 1, [*COMMON, 1])
    waiter = Talker(station, 2, [*COMMON, 2, 3])
    station.engine.step()
    assert [one.kv_cache.length for one in sessions_of(station)] == [BUDGET.tokens, 0]
    leave(station, maker)
    waiter.heard()
    waiter.draft()
    settle(station)
    waiter.commit()


def test_a_beginning_outlives_who_computed_it() -> None:
    station = new_station()
    maker = Talker(station, 1, [*COMMON, 1])
    settle(station)
    others = [Talker(station, name, [*COMMON, name]) for name in (2, 3)]
    settle(station)
    leave(station, maker)
    check_arena(station)
    for talker in others:
        talker.heard()
        talker.draft()
    settle(station)
    for talker in others:
        talker.commit()
    leave(station, *others)
    assert target_of(station).kv_pool.used == 0


def test_an_evicted_session_takes_the_beginning_from_who_still_has_it() -> None:
    station = new_station(capacity=5 * STEP)
    first = Talker(station, 1, [*COMMON, 1])
    settle(station)
    station.now += 10
    Talker(station, 2, [*COMMON, 2])
    settle(station)
    assert target_of(station).kv_pool.used == 4 * STEP
    station.now += 10
    Talker(station, 3, prompt_of(STEP + 20, 3))
    settle(station)
    assert [one.kv_cache.length > 0 for one in sessions_of(station)] == [False, True, True]
    target_of(station).tokens.clear()
    station.now += 10
    first.heard()
    first.draft()
    settle(station)
    first.commit()
    assert sum(target_of(station).tokens) == 50 + 5
    check_arena(station)


def test_going_back_into_a_common_beginning_leaves_it_to_the_other() -> None:
    station = new_station()
    talkers = [Talker(station, name, [*COMMON, name]) for name in (1, 2)]
    settle(station)
    for talker in talkers:
        talker.heard()
    talkers[1].say(Extend(0, 1, STEP + 20, (3, 1)))
    talkers[1].tokens[STEP + 20 :] = [3, 1]
    talkers[1].round_id = 1
    talkers[1].heard()
    assert [len(one.kv_cache.blocks) for one in sessions_of(station)] == [2, 1]
    check_arena(station)
    for talker in talkers:
        talker.draft()
    settle(station)
    for talker in talkers:
        talker.commit()
    check_arena(station)


def test_a_full_station_has_room_for_who_shares() -> None:
    """Four steps, three of them taken: for another session of three there is room only beside two in common."""
    station = new_station(capacity=4 * STEP)
    Talker(station, 1, [*COMMON, 1])
    settle(station)
    (fault,) = Talker(station, 2, prompt_of(len(COMMON), 5)).heard()
    assert isinstance(fault, Fault)
    assert fault.code == "full"
    assert Talker(station, 3, [*COMMON, 3]).heard() == [Opened(0, 0)]
    settle(station)
    assert target_of(station).kv_pool.used == 4 * STEP
    (fault,) = Talker(station, 4, [*COMMON, 4]).heard()
    assert isinstance(fault, Fault)
    assert fault.text == "the base station is full (busy sessions: 2); come back in 5 s"
    assert target_of(station).kv_pool.shared == 2 * STEP
    check_arena(station)


def test_a_block_counts_until_the_last_of_its_holders_is_silent() -> None:
    station = new_station(capacity=5 * STEP)
    for name in (1, 2):
        Talker(station, name, [*COMMON, name])
        settle(station)
        station.now += 2
    (fault,) = Talker(station, 3, prompt_of(2 * STEP)).heard()
    assert isinstance(fault, Fault)
    assert fault.text.endswith("come back in 3 s")  # the first being silent frees one step, and the second three
    station.now += 2
    assert isinstance(Talker(station, 4, prompt_of(2 * STEP)).heard()[-1], Fault)
    station.now += 1
    assert Talker(station, 5, prompt_of(2 * STEP)).heard() == [Opened(0, 0)]


def test_where_memory_is_short_for_sharing_a_newcomer_runs_all_itself(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("none left")

    station = new_station()
    talkers = [Talker(station, 1, [*COMMON, 1])]
    settle(station)
    monkeypatch.setattr(SequenceKVCache, "_share", fail)
    with caplog.at_level(logging.WARNING):
        talkers.append(Talker(station, 2, [*COMMON, 2]))
        settle(station)
    assert "no memory to make a beginning of 256 tokens a shared one: none left" in caplog.text
    assert target_of(station).kv_pool.shared == 0
    for talker in talkers:
        talker.heard()
        talker.draft()
    settle(station)
    for talker in talkers:
        talker.commit()
