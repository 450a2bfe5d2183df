"""What one device has in rounds, prompts and KV caches leaves room for the others."""

import math
from collections.abc import Sequence

from basestation.engine.scheduler import PassBudget
from basestation.kv_cache.kv_pool import PAGE_SIZE
from protocol.messages import Draft, Extend, Fault, Mode, Open, Opened, Sampling, Verdict
from tests.link_pair import Station
from tests.raw_device import CODEC
from tests.scripted_device import ScriptedDevice, new_station, prompt_of, settle, target_of

EIGHT_SHARES = PassBudget(256, 32)
DEVICES = 8
PROMPT = 200
LONGEST_DRAFT = 64
FAIR_PASSES = math.ceil(PROMPT / (EIGHT_SHARES.tokens // (DEVICES + 1)))
"""Passes that the prompts of eight devices take, if a ninth device has the same share."""


def passes_beside_rounds(station: Station, runners: Sequence[ScriptedDevice], count: int) -> list[int]:
    """The tokens of each of ``count`` passes, in all of which each runner has a round verified."""
    target_of(station).tokens.clear()
    for _ in range(count):
        station.now += 1.0
        for runner in runners:
            runner.receive()
            runner.draft()
        station.engine.step()
        for runner in runners:
            runner.commit()
    return target_of(station).tokens


def push_drafts(station: Station, peer: int, sessions: Sequence[int], draft_len: int, round_id: int = 1) -> None:
    for session_id in sessions:
        station.push(bytes([peer]), CODEC.encode(Draft(session_id, round_id, (3,) * draft_len)))


def test_long_rounds_of_one_device_wait_for_their_share_and_delay_the_rounds_of_no_other() -> None:
    station = new_station()
    runners = [ScriptedDevice(station, name, prompt_of(5, name)) for name in range(3)]
    ScriptedDevice(station, 9, prompt_of(3))
    open_sessions(station, 9, [2] * 4)
    settle(station)
    push_drafts(station, 9, range(1, 5), 39)
    waiting, long = 3 * 5, 40 + 3 * 5
    tokens = passes_beside_rounds(station, runners, 10)
    assert tokens == [waiting, waiting, long, waiting, long] * 2, "a quarter of 64 tokens: 2 rounds of 40 in 5 passes"
    verdicts = [one for one in station.outboxes[bytes([9])] if isinstance(one, Verdict)]
    assert [one.session_id for one in verdicts] == [1, 2, 3, 4]


def test_a_device_that_did_not_wait_has_no_share_left_over() -> None:
    station = new_station()
    runners = [ScriptedDevice(station, name, prompt_of(5, name)) for name in range(3)]
    ScriptedDevice(station, 9, prompt_of(3))
    open_sessions(station, 9, [2])
    settle(station)
    push_drafts(station, 9, [1], 3)
    assert passes_beside_rounds(station, runners, 4) == [4 + 3 * 5, *[3 * 5] * 3]
    push_drafts(station, 9, [1], 39, round_id=2)
    assert passes_beside_rounds(station, runners, 3) == [3 * 5, 3 * 5, 40 + 3 * 5]


def test_rounds_of_few_tokens_wait_for_no_share() -> None:
    station = new_station()
    runners = [ScriptedDevice(station, name, prompt_of(5, name)) for name in range(8)]
    ScriptedDevice(station, 9, prompt_of(3))
    open_sessions(station, 9, [2])
    settle(station)
    push_drafts(station, 9, [1], 15)
    assert passes_beside_rounds(station, runners, 1) == [16 + 8 * 5]


def test_short_rounds_of_one_device_share_a_pass() -> None:
    station = new_station()
    ScriptedDevice(station, 9, prompt_of(3))
    open_sessions(station, 9, [2] * 6)
    settle(station)
    target_of(station).tokens.clear()
    push_drafts(station, 9, range(1, 7), 4)
    settle(station)
    assert target_of(station).tokens == [6 * 5]


def open_sessions(station: Station, peer: int, lengths: Sequence[int], first: int = 1) -> list[str]:
    """The faults of sessions that a device opens beside its first one."""
    outbox = station.outboxes[bytes([peer])]
    outbox.clear()
    for session_id, length in enumerate(lengths, first):
        prompt = tuple(prompt_of(length, seed=100 * peer + session_id))
        station.push(bytes([peer]), CODEC.encode(Open(session_id, 0, Mode.IDS, Sampling(), prompt)))
    return [one.text for one in outbox if isinstance(one, Fault)]


def test_the_sessions_of_one_device_leave_half_of_the_kv_pool_to_others() -> None:
    station = new_station(capacity=20 * PAGE_SIZE)
    ScriptedDevice(station, 9, prompt_of(3))
    (refused,) = open_sessions(station, 9, [4 * PAGE_SIZE - 10] * 3)
    assert refused == "this device's sessions fill half of the KV pool (busy sessions: 3); retry in 5 s"
    other = ScriptedDevice(station, 1, prompt_of(9 * PAGE_SIZE))
    settle(station)
    assert other.receive() == [Opened(0, 0)]


def test_a_turn_that_grows_a_session_counts_too() -> None:
    station = new_station(capacity=20 * PAGE_SIZE)
    ScriptedDevice(station, 9, prompt_of(3))
    assert open_sessions(station, 9, [4 * PAGE_SIZE, 10]) == []
    settle(station)
    station.push(bytes([9]), CODEC.encode(Extend(2, 1, 1, tuple(prompt_of(7 * PAGE_SIZE)))))
    fault = station.outboxes[bytes([9])][-1]
    assert isinstance(fault, Fault)
    assert (fault.session_id, fault.code) == (2, "full")


def test_a_single_session_may_take_the_whole_kv_pool() -> None:
    station = new_station(capacity=20 * PAGE_SIZE)
    device = ScriptedDevice(station, 1, prompt_of(19 * PAGE_SIZE))
    settle(station)
    assert device.receive() == [Opened(0, 0)]


def test_a_device_with_many_prompts_delays_anothers_prompt_little() -> None:
    station = new_station(PassBudget(64, 32))
    runner = ScriptedDevice(station, 0, prompt_of(3))
    ScriptedDevice(station, 9, prompt_of(3))
    settle(station)
    open_sessions(station, 9, [2 * PAGE_SIZE] * 12)
    for _ in range(10):
        runner.receive()
        runner.draft()
        station.engine.step()
        runner.commit()
    newcomer = ScriptedDevice(station, 1, prompt_of(4 * PAGE_SIZE, seed=3))
    newcomer.receive()
    newcomer.draft()
    passes = 0
    while not station.outboxes[newcomer.peer]:
        runner.receive()
        runner.draft()
        station.engine.step()
        runner.commit()
        passes += 1
    assert passes <= 1.5 * 4 * PAGE_SIZE / 16


def test_prompts_of_many_devices_get_more_of_a_pass_than_that_of_one() -> None:
    """Five devices that wait for a prefill are not slowed by two that run rounds."""
    station = new_station(PassBudget(256, 32))
    runners = [ScriptedDevice(station, name, prompt_of(5, name)) for name in range(2)]
    settle(station)
    for name in range(3, 8):
        ScriptedDevice(station, name, prompt_of(PAGE_SIZE, name))
    assert passes_beside_rounds(station, runners, 1) == [2 * 5 + 2 * 32]


def test_further_rounds_of_a_device_get_its_share_of_the_pass_alone() -> None:
    station = new_station()
    runners = [ScriptedDevice(station, name, prompt_of(5, name)) for name in range(3)]
    ScriptedDevice(station, 9, prompt_of(3))
    open_sessions(station, 9, [2] * 6)
    settle(station)
    push_drafts(station, 9, range(1, 7), 6)
    assert passes_beside_rounds(station, runners, 1) == [3 * 5 + 2 * 7], "a quarter of 64 tokens is two rounds of 7"


def greedy_station(prompt: int) -> Station:
    """A base station with a device, 200, whose eight sessions each have a prompt."""
    station = new_station(EIGHT_SHARES)
    ScriptedDevice(station, 200, prompt_of(prompt, seed=99))
    open_sessions(station, 200, [prompt] * 7)
    return station


def passes_until_verified(station: Station) -> int:
    """How many passes run until each of eight other devices has a Verdict; 200 drafts on after each of its own."""
    devices = [ScriptedDevice(station, name, prompt_of(PROMPT, seed=name)) for name in range(1, 1 + DEVICES)]
    for device in devices:
        device.draft()
    for count in range(1, 200):
        station.engine.step()
        verdicts = [one for one in station.outboxes[bytes([200])] if isinstance(one, Verdict)]
        station.outboxes[bytes([200])].clear()
        for verdict in verdicts:
            push_drafts(station, 200, [verdict.session_id], LONGEST_DRAFT, verdict.round_id + 1)
        if all(any(isinstance(one, Verdict) for one in station.outboxes[device.peer]) for device in devices):
            return count
    raise AssertionError("never verified")


def test_many_prompts_of_a_device_delay_those_of_others_as_one_prompt_does() -> None:
    assert passes_until_verified(greedy_station(prompt=2000)) <= FAIR_PASSES + 2


def test_long_rounds_of_a_device_delay_the_prompts_of_others_by_its_share_alone() -> None:
    station = greedy_station(prompt=20)
    settle(station)
    push_drafts(station, 200, range(8), LONGEST_DRAFT)
    assert passes_until_verified(station) <= FAIR_PASSES + 2


def test_a_long_round_runs_beside_prompts_when_its_tokens_have_added_up() -> None:
    station = greedy_station(prompt=20)
    settle(station)
    for name in range(1, 1 + DEVICES):
        ScriptedDevice(station, name, prompt_of(4000, seed=name))
    station.outboxes[bytes([200])].clear()
    push_drafts(station, 200, [0], LONGEST_DRAFT)
    for _ in range(math.ceil((1 + LONGEST_DRAFT) / (EIGHT_SHARES.tokens // (DEVICES + 1)))):
        assert not station.outboxes[bytes([200])]
        station.engine.step()
    assert [type(one) for one in station.outboxes[bytes([200])]] == [Verdict]


def test_a_prompt_does_not_evict_a_session_whose_long_round_waits_for_its_share() -> None:
    station = new_station(capacity=4 * PAGE_SIZE)
    ScriptedDevice(station, 9, prompt_of(PAGE_SIZE + 10))
    growing = ScriptedDevice(station, 1, prompt_of(2 * PAGE_SIZE - 10, seed=1))
    settle(station)
    push_drafts(station, 9, [0], LONGEST_DRAFT)
    growing.send(Extend(0, 1, 2 * PAGE_SIZE - 20, tuple(prompt_of(PAGE_SIZE, seed=2))))
    target_of(station).tokens.clear()
    settle(station)
    assert isinstance(station.outboxes[bytes([9])][-1], Verdict)
    run = sum(target_of(station).tokens)
    assert run == 1 + LONGEST_DRAFT + PAGE_SIZE - 1, (
        "nothing twice; the last token of a prompt runs with its first round"
    )
