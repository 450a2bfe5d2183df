"""What one device has in rounds, prompts and KV caches leaves room for the others."""

from collections.abc import Sequence

from basestation.kv_pool import PAGE_SIZE
from basestation.scheduler import PassBudget
from protocol.messages import Draft, Extend, Fault, Mode, Open, Opened, Sampling, Verdict
from tests.link_pair import Station
from tests.scripted_device import CODEC, ScriptedDevice, new_station, prompt_of, settle, target_of


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
