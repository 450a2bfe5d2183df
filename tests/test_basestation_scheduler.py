"""Scheduling under a budget of tokens and memory: no session delays another or changes its answer."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from basestation.engine.scheduler import BUSY_SECONDS, PassBudget
from basestation.kv_cache.kv_pool import PAGE_SIZE
from basestation.verification.verify import RoundToVerify, VerificationResult, verify_rounds
from protocol.errors import SettingsError
from protocol.messages import (
    OLDEST_VERSION,
    Close,
    Decode,
    Extend,
    Fault,
    Mode,
    Open,
    Opened,
    Sampling,
    Verdict,
)
from tests.fakes import TARGET, target_alone
from tests.link_pair import Station
from tests.raw_device import CODEC
from tests.scripted_device import BUDGET, ScriptedDevice, new_station, prompt_of, settle, target_of


def test_a_long_prompt_does_not_stall_the_rounds_of_others() -> None:
    station = new_station()
    runners = [ScriptedDevice(station, name, prompt_of(5, name)) for name in range(3)]
    settle(station)
    target_of(station).tokens.clear()
    newcomer = ScriptedDevice(station, 9, prompt_of(2000, seed=9))
    for _ in range(20):
        for runner in runners:
            runner.receive()
            runner.draft()
        station.engine.step()
        for runner in runners:
            runner.commit()
    assert newcomer.receive() == [Opened(0, 0)]
    assert target_of(station).tokens == [3 * 5 + BUDGET.prompt_tokens] * 20
    newcomer.draft()
    settle(station)
    newcomer.commit()


def test_a_session_in_a_decode_is_not_idle() -> None:
    station = new_station()
    runner = ScriptedDevice(station, 1, prompt_of(5))
    settle(station)
    runner.send(Decode(0, 1, 1000))
    for second in range(700):
        station.now = second
        station.engine.step()
        station.engine.drop_idle()
        assert not station.engine.idle
    newcomer = ScriptedDevice(station, 2, prompt_of(200))
    target_of(station).tokens.clear()
    station.engine.step()
    assert target_of(station).tokens == [1 + BUDGET.prompt_tokens]
    settle(station)
    assert len([one for one in runner.receive() if isinstance(one, Verdict)]) == 1000
    assert newcomer.receive() == [Opened(0, 0)]


def test_a_prompt_beyond_the_context_gets_that_fault_even_if_the_kv_pool_is_full() -> None:
    station = new_station(capacity=4 * PAGE_SIZE)
    (fault,) = ScriptedDevice(station, 1, prompt_of(4 * PAGE_SIZE)).receive()
    assert isinstance(fault, Fault)
    assert fault.code == "context_length"


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    station = new_station()
    ScriptedDevice(station, 1, prompt_of(2000))
    station.engine.step()
    short = ScriptedDevice(station, 2, prompt_of(10))
    short.receive()
    short.draft()
    station.engine.step()
    short.commit()


def test_a_prompt_alone_takes_the_whole_forward_pass() -> None:
    station = new_station()
    ScriptedDevice(station, 1, prompt_of(200))
    settle(station)
    assert target_of(station).tokens == [64, 64, 64, 7]


def test_rounds_that_exceed_a_forward_pass_are_verified_in_order_of_arrival() -> None:
    station = new_station(PassBudget(16, 16))
    devices = [ScriptedDevice(station, name, prompt_of(5, name)) for name in range(5)]
    settle(station)
    for late, device in enumerate(reversed(devices)):
        station.now = float(late)
        device.receive()
        device.draft()
    station.engine.step()
    assert [bool(station.outboxes[device.peer]) for device in devices] == [False, False, True, True, True]
    settle(station)
    for device in devices:
        device.commit()


def test_a_round_of_more_tokens_than_a_forward_pass_is_verified() -> None:
    station = new_station(PassBudget(16, 16))
    device = ScriptedDevice(station, 1, prompt_of(3))
    settle(station)
    device.receive()
    device.draft(40)
    settle(station)
    device.commit()


@pytest.mark.parametrize("capacity", [3 * PAGE_SIZE, 2**20], ids=["little memory", "much memory"])
@pytest.mark.parametrize("memory", [None, 70], ids=["", "short"])
def test_answers_do_not_depend_on_other_sessions(capacity: int, memory: int | None) -> None:
    """Sessions open, draft, extend, become idle and close in the middle of rounds."""
    rng = np.random.default_rng(5)
    station = new_station(capacity=capacity, memory=memory)
    devices: dict[int, ScriptedDevice] = {}
    verified = 0
    for turn in range(400):
        station.now += float(rng.exponential(2.0))
        name = int(rng.integers(12))
        device = devices.get(name)
        if device is None:
            devices[name] = ScriptedDevice(station, name, prompt_of(int(rng.integers(1, 90)), turn))
            if isinstance(devices[name].receive()[-1], Fault):
                del devices[name]
        elif rng.random() < 0.1 or len(device.tokens) > 300:
            device.draft()
            device.send(Close(0))
            device.receive()
            del devices[name]
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
            settle(station)
            device.commit()
            verified += 1
    assert verified > 150
    for name in devices:
        station.push(bytes([name]), CODEC.encode(Close(0)))
    assert target_of(station).kv_pool.used == 0


def test_the_longest_idle_are_evicted_and_keep_their_tokens() -> None:
    station = new_station(capacity=3 * PAGE_SIZE)
    devices = []
    for name in range(5):
        devices.append(ScriptedDevice(station, name, prompt_of(50, name)))
        settle(station)
        station.now += 10
    kv_pool = target_of(station).kv_pool
    assert kv_pool.used == 3 * PAGE_SIZE
    assert target_of(station).tokens == [49] * 5
    for cached in (4, 3, 2):
        devices[cached].receive()
        devices[cached].draft()
        settle(station)
        devices[cached].commit()
    assert target_of(station).tokens[5:] == [5] * 3
    station.now += 10
    devices[0].receive()
    devices[0].draft()
    settle(station)
    devices[0].commit()
    assert target_of(station).tokens[8:] == [54]
    assert kv_pool.used == 3 * PAGE_SIZE


def test_a_full_station_says_when_to_retry() -> None:
    station = new_station(capacity=3 * PAGE_SIZE)
    devices = []
    for name in range(3):
        devices.append(ScriptedDevice(station, name, prompt_of(50, name)))
        settle(station)
        station.now += 1
    refused = ScriptedDevice(station, 7, prompt_of(50))
    (fault,) = refused.receive()
    assert isinstance(fault, Fault)
    assert (fault.session_id, fault.code) == (0, "full")
    assert fault.text == "the base station is full (busy sessions: 3); retry in 2 s"
    assert fault.retry_seconds == 2
    (fault,) = ScriptedDevice(station, 8, prompt_of(50), OLDEST_VERSION).receive()
    assert isinstance(fault, Fault)
    assert (fault.code, fault.retry_seconds) == ("full", 0)  # version 1 has no such field
    for device in devices[1:]:
        device.receive()
        device.draft()
    settle(station)
    for device in devices[1:]:
        device.commit()
    station.now += 2
    assert ScriptedDevice(station, 7, prompt_of(50)).receive() == [Opened(0, 0)]


def test_the_load_counts_what_busy_sessions_require_and_no_idle_kv_caches() -> None:
    station = new_station(capacity=8 * PAGE_SIZE)
    for name in (1, 2):
        ScriptedDevice(station, name, prompt_of(2 * PAGE_SIZE - 1, name))
    settle(station)
    station.engine.measure_load()
    assert station.engine.load.kv_share == 0.5
    station.now += BUSY_SECONDS
    station.engine.measure_load()
    assert station.engine.load.kv_share == 0
    assert target_of(station).kv_pool.used == 4 * PAGE_SIZE


def test_a_forward_pass_that_runs_out_of_memory_is_split() -> None:
    station = new_station(PassBudget(256, 64), memory=12)
    devices = [ScriptedDevice(station, name, prompt_of(5, name)) for name in range(8)]
    settle(station)
    for device in devices:
        device.receive()
        device.draft()
    target_of(station).tokens.clear()
    station.engine.step()
    assert target_of(station).tokens == [10] * 4
    for device in devices:
        device.commit()


def test_a_round_that_runs_out_of_memory_alone_ends_only_its_session() -> None:
    station = new_station(memory=12)
    devices = [ScriptedDevice(station, name, prompt_of(5, name)) for name in range(3)]
    settle(station)
    for device in devices:
        device.receive()
    devices[0].draft(20)
    devices[1].draft()
    settle(station)
    devices[1].commit()
    (fault,) = devices[0].receive()
    assert isinstance(fault, Fault)
    assert (fault.session_id, fault.code) == (0, "full")
    assert (fault.text, fault.retry_seconds) == ("the base station is out of memory; retry in 5 s", 5)
    assert target_of(station).kv_pool.used == PAGE_SIZE  # the idle session is evicted
    devices[2].draft()
    settle(station)
    devices[2].commit()


def test_a_session_reaches_the_whole_announced_context_in_a_pool_full_of_idle_sessions() -> None:
    station = new_station(capacity=20 * PAGE_SIZE)
    target = target_of(station)
    for name in range(10):
        ScriptedDevice(station, name, prompt_of(2 * PAGE_SIZE, name))
        settle(station)
        station.now += 10
    assert target.kv_pool.free == 0
    device = ScriptedDevice(station, 99, prompt_of(300))
    settle(station)
    device.receive()
    device.send(Decode(0, 1, target.context_length - 300))
    settle(station)
    verdicts = [message for message in device.receive() if isinstance(message, Verdict)]
    expected = target_alone(TARGET, device.tokens, target.context_length - 300)
    assert [verdict.token_id for verdict in verdicts] == expected
    assert target.kv_pool.used == target.kv_pool.capacity == target.context_length


@pytest.mark.parametrize(
    "error",
    [RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"), MemoryError()],
    ids=["PyTorch", "NumPy"],
)
def test_running_out_of_memory_in_verification_loses_no_token(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def verify_one(logits: torch.Tensor, rounds: Sequence[RoundToVerify]) -> list[VerificationResult]:
        if len(rounds) > 1:
            raise error
        return verify_rounds(logits, rounds)

    monkeypatch.setattr("basestation.engine.engine.verify_rounds", verify_one)
    station = new_station()
    devices = [ScriptedDevice(station, name, prompt_of(5, name)) for name in range(4)]
    for device in devices:
        device.receive()
        device.draft()
    settle(station)
    for device in devices:
        device.commit()


def test_other_errors_in_a_forward_pass_are_not_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    station = new_station()
    ScriptedDevice(station, 1, prompt_of(5))
    monkeypatch.setattr(target_of(station), "forward", lambda _: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        station.engine.step()


def test_decodes_and_drafts_share_forward_passes() -> None:
    station = new_station()
    drafting, decoding = ScriptedDevice(station, 1, prompt_of(5)), ScriptedDevice(station, 2, prompt_of(7))
    settle(station)
    drafting.receive()
    decoding.receive()
    decoding.send(Decode(0, 1, 6))
    target_of(station).passes.clear()
    for _ in range(6):
        drafting.draft()
        station.engine.step()
        drafting.commit()
    assert target_of(station).passes == [2] * 6
    verdicts = [message for message in decoding.receive() if isinstance(message, Verdict)]
    assert [verdict.token_id for verdict in verdicts] == target_alone(TARGET, decoding.tokens, 6)


@pytest.mark.parametrize("value", [0, -1, 15])
def test_a_budget_below_the_smallest_chunk_is_refused(value: int) -> None:
    with pytest.raises(SettingsError, match=rf"pass-tokens is {value}; allowed: 16 or more"):
        PassBudget(value, 64)
    with pytest.raises(SettingsError, match=rf"prompt-tokens is {value}; allowed: 16 or more"):
        PassBudget(256, value)


@pytest.mark.parametrize("shared", [False, True])
def test_a_long_prompt_does_not_starve_behind_shorter_ones(shared: bool) -> None:
    """Two shorter prompts arrive per pass; with ``shared``, another session waits for the long prompt's prefix."""
    station = new_station(PassBudget(64, 32))
    runner = ScriptedDevice(station, 0, prompt_of(3))
    settle(station)
    runner.receive()
    long = ScriptedDevice(station, 1, prompt_of(6 * PAGE_SIZE, seed=9))
    station.engine.step()
    waiter = ScriptedDevice(station, 2, [*prompt_of(6 * PAGE_SIZE, seed=9)[: 2 * PAGE_SIZE], 1]) if shared else long
    waiter.draft()
    for name in range(3, 103):
        runner.draft()
        station.now += 0.1
        ScriptedDevice(station, name, prompt_of(40, seed=name))
        ScriptedDevice(station, name + 100, prompt_of(40, seed=name + 100))
        station.engine.step()
        runner.commit()
        if any(isinstance(message, Verdict) for message in station.outboxes[waiter.peer]):
            return
    pytest.fail("never verified")


def test_sessions_of_a_device_that_grow_beyond_half_of_the_pool_keep_no_other_device_waiting() -> None:
    station = new_station(capacity=8 * PAGE_SIZE)
    victim = ScriptedDevice(station, 1, prompt_of(PAGE_SIZE, seed=1))
    settle(station)
    greedy = ScriptedDevice(station, 2, prompt_of(10))
    for number in (1, 2):
        greedy.send(Open(number, 0, Mode.IDS, Sampling(), tuple(prompt_of(10, number))))
    for number in range(3):
        greedy.send(Decode(number, 1, 4 * PAGE_SIZE))
    pool = target_of(station).kv_pool
    while pool.free >= PAGE_SIZE or victim_is_cached(station):
        station.now += 0.1
        station.engine.step()
    victim.receive()
    victim.draft()
    for _ in range(50):
        station.engine.step()
    victim.commit()
    settle(station)
    answered = [(one.session_id, one.token_id) for one in greedy.receive() if isinstance(one, Verdict)]
    for number, seed in enumerate((0, 1, 2)):
        expected = target_alone(TARGET, prompt_of(10, seed), 4 * PAGE_SIZE)
        assert [token_id for session_id, token_id in answered if session_id == number] == expected


def victim_is_cached(station: Station) -> bool:
    return any(one.kv_cache.pages for one in vars(station.engine)["_sessions"].all() if one.peer.address == b"\1")


def test_a_session_that_begins_anew_gives_back_what_it_had_reserved() -> None:
    station = new_station(capacity=8 * PAGE_SIZE)
    device = ScriptedDevice(station, 1, prompt_of(5 * PAGE_SIZE))
    settle(station)
    device.send(Extend(0, 1, 0, (1, 2)))
    settle(station)
    assert target_of(station).kv_pool.used == PAGE_SIZE


def test_the_queueing_delay_of_a_first_round_begins_with_its_draft() -> None:
    station = new_station()
    device = ScriptedDevice(station, 1, prompt_of(150))
    station.engine.step()
    station.now = 2
    device.receive()
    device.draft()
    station.now = 3
    settle(station)
    device.commit()
    registry = vars(station.engine)["_metrics"].registry
    assert registry.get_sample_value("edgedraft_queueing_delay_seconds_sum") == 1
