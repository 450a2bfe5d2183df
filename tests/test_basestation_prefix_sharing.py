"""Shared prefixes: stored once, correct for every session, and freed with the last one."""

from array import array
from collections.abc import Sequence
from typing import cast

import numpy as np
import pytest

from basestation.kv_cache.kv_pool import PAGE_SIZE
from basestation.sessions.committed_tokens import CommittedTokens
from basestation.sessions.session import Session
from protocol.messages import Close, Decode, Extend, Fault, Opened
from tests.fakes import VOCAB, FakeSequenceKVCache
from tests.link_pair import Station
from tests.raw_device import CODEC
from tests.scripted_device import BUDGET, ScriptedDevice, new_station, prompt_of, settle, target_of

PREFIX = prompt_of(2 * PAGE_SIZE + 50, seed=77)
PROMPTS = [prompt_of(300, seed=100 + index) for index in range(3)]


def sessions_of(station: Station) -> list[Session]:
    return list(vars(station.engine)["_sessions"].all())


def close(station: Station, *devices: ScriptedDevice) -> None:
    for device in devices:
        station.push(device.peer, CODEC.encode(Close(0)))


def check_kv_pool(station: Station) -> None:
    """Each KV cache has its session's tokens; the pool counts every position once and stays within its budget."""
    kv_pool, kv_caches = target_of(station).kv_pool, [one.kv_cache for one in sessions_of(station)]
    for session in sessions_of(station):
        assert cast(FakeSequenceKVCache, session.kv_cache).tokens == list(session.tokens[: session.kv_cache.length])
    pages = [page for kv_cache in kv_caches for page in kv_cache.pages]
    assert kv_pool.used == PAGE_SIZE * len(set(pages)) <= kv_pool.capacity
    assert kv_pool.shared == PAGE_SIZE * (len(pages) - len(set(pages)))


def shared_pages(station: Station) -> list[int]:
    """How many pages of each session another one uses too."""
    every = [one.kv_cache.pages for one in sessions_of(station)]
    return [sum(sum(page in pages for pages in every) > 1 for page in own) for own in every]


@pytest.mark.parametrize("capacity", [5 * PAGE_SIZE, 2**20], ids=["little memory", "much memory"])
@pytest.mark.parametrize("memory", [None, 70], ids=["", "short"])
@pytest.mark.parametrize("seed", range(3))
def test_answers_do_not_depend_on_shared_prefixes(capacity: int, memory: int | None, seed: int) -> None:
    """Sessions with three prompts open, draft, extend, become idle and close in the middle of rounds."""
    rng = np.random.default_rng(seed)
    station = new_station(capacity=capacity, memory=memory)
    devices: dict[int, ScriptedDevice] = {}
    verified, most_shared = 0, 0
    for turn in range(250):
        station.now += float(rng.exponential(2.0))
        name = int(rng.integers(8))
        device = devices.get(name)
        if device is None:
            prefix = PROMPTS[int(rng.integers(3))][: int(rng.integers(100, 301))]
            newcomer = ScriptedDevice(station, name, [*prefix, *prompt_of(int(rng.integers(1, 90)), turn)])
            if not isinstance(newcomer.receive()[-1], Fault):
                devices[name] = newcomer
        elif rng.random() < 0.1 or len(device.tokens) > 450:
            device.draft()
            close(station, devices.pop(name))
            device.receive()
        elif rng.random() < 0.2:
            device.round_id += 1
            device.tokens = device.tokens[: int(rng.integers(1, len(device.tokens) + 1))]
            device.send(Extend(0, device.round_id, len(device.tokens), (3, 1)))
            device.tokens += [3, 1]
            assert device.receive() == [Opened(0, device.round_id)]
        else:
            device.draft(int(rng.integers(1, 9)))
            for _ in range(int(rng.integers(3))):
                station.engine.step()
                check_kv_pool(station)
            settle(station)
            device.commit()
            verified += 1
        check_kv_pool(station)
        most_shared = max(most_shared, target_of(station).kv_pool.shared)
    assert verified > 90
    assert most_shared >= 2 * PAGE_SIZE
    close(station, *devices.values())
    kv_pool = target_of(station).kv_pool
    assert (kv_pool.used, kv_pool.shared) == (0, 0)


def test_a_newcomer_runs_only_tokens_that_are_not_cached() -> None:
    station = new_station()
    first = ScriptedDevice(station, 1, [*PREFIX, 5, 6])
    settle(station)
    target_of(station).tokens.clear()
    second = ScriptedDevice(station, 2, [*PREFIX, 7])
    settle(station)
    assert sum(target_of(station).tokens) == 50
    assert target_of(station).kv_pool.shared == 2 * PAGE_SIZE
    for device in (first, second):
        device.receive()
        device.draft()
    settle(station)
    for device in (first, second):
        device.commit()


def test_each_session_runs_its_last_token_even_if_all_tokens_are_shared() -> None:
    station = new_station()
    prompt = prompt_of(2 * PAGE_SIZE + 1)
    devices = [ScriptedDevice(station, name, prompt) for name in (1, 2)]
    settle(station)
    assert sum(target_of(station).tokens) == 2 * PAGE_SIZE
    for device in devices:
        device.receive()
        device.draft()
    settle(station)
    for device in devices:
        device.commit()


@pytest.mark.parametrize("length", [PAGE_SIZE - 1, PAGE_SIZE])
def test_a_prefix_shorter_than_a_page_is_not_shared(length: int) -> None:
    station = new_station()
    for name in (1, 2):
        ScriptedDevice(station, name, prompt_of(length))
        settle(station)
    assert target_of(station).kv_pool.shared == 0
    assert sum(target_of(station).tokens) == 2 * (length - 1)


def test_of_simultaneous_prompts_the_first_computes_the_prefix_for_all() -> None:
    station = new_station()
    devices = [ScriptedDevice(station, name, [*PREFIX, *prompt_of(20 + name, name)]) for name in range(8)]
    settle(station)
    assert sum(target_of(station).tokens) == 2 * PAGE_SIZE + sum(50 + 20 + name - 1 for name in range(8))
    assert target_of(station).kv_pool.shared == 7 * 2 * PAGE_SIZE
    assert max(target_of(station).tokens) <= BUDGET.tokens
    for device in devices:
        device.receive()
        device.draft()
    settle(station)
    for device in devices:
        device.commit()


def test_a_session_computes_a_prefix_itself_when_its_source_closes() -> None:
    station = new_station()
    source = ScriptedDevice(station, 1, [*PREFIX, 1])
    newcomer = ScriptedDevice(station, 2, [*PREFIX, 2, 3])
    station.engine.step()
    assert [one.kv_cache.length for one in sessions_of(station)] == [BUDGET.tokens, 0]
    close(station, source)
    newcomer.receive()
    newcomer.draft()
    settle(station)
    newcomer.commit()


def test_a_prompt_that_is_evicted_before_its_draft_keeps_no_newcomer_waiting() -> None:
    """A round needs the page that would be the prompt's last one; the prompt's device sends nothing more."""
    station = new_station(capacity=8 * PAGE_SIZE)
    runner = ScriptedDevice(station, 1, prompt_of(4 * PAGE_SIZE - 3, seed=5))
    settle(station)
    station.now += 10
    prompt = prompt_of(5 * PAGE_SIZE - 1)
    ScriptedDevice(station, 2, prompt)
    evicted = sessions_of(station)[1].kv_cache
    while evicted.length < 4 * PAGE_SIZE:
        station.engine.step()
    runner.send(Decode(0, 1, 6))
    settle(station)
    assert evicted.pages == []
    station.now += 10
    newcomer = ScriptedDevice(station, 3, [*prompt[: 2 * PAGE_SIZE], 1])
    newcomer.receive()
    newcomer.draft()
    for _ in range(10):
        station.engine.step()
    newcomer.commit()


def test_a_newcomer_shares_what_a_source_that_runs_nothing_has_cached() -> None:
    station = new_station()
    ScriptedDevice(station, 1, [*PREFIX, 1])
    (source,) = sessions_of(station)
    source.evict()
    target_of(station).forward([source.segment(PAGE_SIZE + 10)])
    assert not station.engine.busy
    newcomer = ScriptedDevice(station, 2, [*PREFIX, 2])
    newcomer.receive()
    newcomer.draft()
    for _ in range(10):
        station.engine.step()
    newcomer.commit()
    assert target_of(station).kv_pool.shared == PAGE_SIZE


def test_a_prefix_whose_pages_were_given_back_is_computed_again() -> None:
    station = new_station()
    ScriptedDevice(station, 1, [*PREFIX, 1])
    settle(station)
    sessions_of(station)[0].kv_cache.give_back_unseen(200, 8)
    ScriptedDevice(station, 2, [*PREFIX[:200], 2])
    settle(station)
    assert target_of(station).kv_pool.shared == 0
    device = ScriptedDevice(station, 3, [*PREFIX, 3])
    settle(station)
    assert target_of(station).kv_pool.shared == PAGE_SIZE, "the second page; the first one is gone, and not seen"
    device.receive()
    device.draft()
    settle(station)
    device.commit()


def test_a_prefix_outlives_its_source() -> None:
    station = new_station()
    source = ScriptedDevice(station, 1, [*PREFIX, 1])
    settle(station)
    others = [ScriptedDevice(station, name, [*PREFIX, name]) for name in (2, 3)]
    settle(station)
    close(station, source)
    check_kv_pool(station)
    for device in others:
        device.receive()
        device.draft()
    settle(station)
    for device in others:
        device.commit()
    close(station, *others)
    assert target_of(station).kv_pool.used == 0


def test_an_evicted_session_shares_the_prefix_of_another_session_again() -> None:
    station = new_station(capacity=5 * PAGE_SIZE)
    first = ScriptedDevice(station, 1, [*PREFIX, 1])
    settle(station)
    station.now += 10
    ScriptedDevice(station, 2, [*PREFIX, 2])
    settle(station)
    assert target_of(station).kv_pool.used == 4 * PAGE_SIZE
    station.now += 10
    ScriptedDevice(station, 3, prompt_of(PAGE_SIZE + 20, 3))
    settle(station)
    assert [one.kv_cache.length > 0 for one in sessions_of(station)] == [False, True, True]
    target_of(station).tokens.clear()
    station.now += 10
    first.receive()
    first.draft()
    settle(station)
    first.commit()
    assert sum(target_of(station).tokens) == 50 + 5
    check_kv_pool(station)


def test_rollback_into_a_shared_prefix_does_not_affect_the_other_session() -> None:
    station = new_station()
    devices = [ScriptedDevice(station, name, [*PREFIX, name]) for name in (1, 2)]
    settle(station)
    for device in devices:
        device.receive()
    devices[1].send(Extend(0, 1, PAGE_SIZE + 20, (3, 1)))
    devices[1].tokens[PAGE_SIZE + 20 :] = [3, 1]
    devices[1].round_id = 1
    devices[1].receive()
    assert shared_pages(station) == [1, 1]
    check_kv_pool(station)
    for device in devices:
        device.draft()
    settle(station)
    for device in devices:
        device.commit()
    check_kv_pool(station)


def test_a_full_station_admits_a_session_that_shares_a_prefix() -> None:
    """Three of four pages are used; another session of three pages fits only if it shares two."""
    station = new_station(capacity=4 * PAGE_SIZE)
    ScriptedDevice(station, 1, [*PREFIX, 1])
    settle(station)
    (fault,) = ScriptedDevice(station, 2, prompt_of(len(PREFIX), 5)).receive()
    assert isinstance(fault, Fault)
    assert fault.code == "full"
    assert ScriptedDevice(station, 3, [*PREFIX, 3]).receive() == [Opened(0, 0)]
    settle(station)
    assert target_of(station).kv_pool.used == 4 * PAGE_SIZE
    (fault,) = ScriptedDevice(station, 4, [*PREFIX, 4]).receive()
    assert isinstance(fault, Fault)
    assert fault.text == "the base station is full (busy sessions: 2); retry in 5 s"
    assert target_of(station).kv_pool.shared == 2 * PAGE_SIZE
    check_kv_pool(station)


def test_a_shared_page_is_required_until_its_last_user_is_idle() -> None:
    station = new_station(capacity=5 * PAGE_SIZE)
    for name in (1, 2):
        ScriptedDevice(station, name, [*PREFIX, name])
        settle(station)
        station.now += 2
    (fault,) = ScriptedDevice(station, 3, prompt_of(2 * PAGE_SIZE)).receive()
    assert isinstance(fault, Fault)
    assert fault.text.endswith("retry in 3 s")  # the first idle session frees one page, the second three
    station.now += 2
    assert isinstance(ScriptedDevice(station, 4, prompt_of(2 * PAGE_SIZE)).receive()[-1], Fault)
    station.now += 1
    assert ScriptedDevice(station, 5, prompt_of(2 * PAGE_SIZE)).receive() == [Opened(0, 0)]


def test_a_pass_looks_at_each_session_once_however_many_wait_for_a_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    station, many, looks, reads = new_station(), 20, 0, 0
    keys, part_of = vars(CommittedTokens)["shareable_keys"].fget, CommittedTokens.__getitem__

    def counted_keys(self: CommittedTokens) -> Sequence[bytes]:
        nonlocal looks
        looks += 1
        return cast(Sequence[bytes], keys(self))

    def counted_part(self: CommittedTokens, part: slice) -> "array[int]":
        nonlocal reads
        found = part_of(self, part)
        reads += len(found)
        return found

    running, new = (prompt_of(10 * PAGE_SIZE, seed=seed) for seed in (1, 2))
    for name in range(many):
        ScriptedDevice(station, name, [*running, name % VOCAB])
    settle(station)
    for name in range(many):
        ScriptedDevice(station, 100 + name, [*new, name % VOCAB])
    station.engine.step()
    monkeypatch.setattr(CommittedTokens, "shareable_keys", property(counted_keys))
    monkeypatch.setattr(CommittedTokens, "__getitem__", counted_part)
    station.engine.step()
    assert 0 < looks <= 4 * many
    assert 0 < reads <= 2 * BUDGET.tokens


def test_sessions_that_differ_inside_a_page_share_only_the_pages_before_it() -> None:
    station = new_station()
    first, other = prompt_of(4 * PAGE_SIZE + 1), prompt_of(4 * PAGE_SIZE + 1)
    other[2 * PAGE_SIZE + 5] = (other[2 * PAGE_SIZE + 5] + 1) % VOCAB
    ScriptedDevice(station, 1, first)
    settle(station)
    ScriptedDevice(station, 2, other)
    settle(station)
    assert shared_pages(station) == [2, 2]


def test_replaced_tokens_have_other_keys() -> None:
    tokens, fresh = CommittedTokens(PAGE_SIZE), CommittedTokens(PAGE_SIZE)
    tokens.append([1] * (3 * PAGE_SIZE + 1))
    before = list(tokens.shareable_keys)
    tokens.replace_from(PAGE_SIZE + 1, [2] * 2 * PAGE_SIZE)
    fresh.append([*[1] * (PAGE_SIZE + 1), *[2] * 2 * PAGE_SIZE])
    assert list(tokens.shareable_keys) == list(fresh.shareable_keys)
    assert [one == other for one, other in zip(tokens.shareable_keys, before, strict=True)] == [True, False, False]
