"""Passes under a budget of tokens and of memory: nobody waits for a neighbour, and nobody's answer changes."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from basestation.kv_pool import STEP
from basestation.scheduler import PassBudget
from basestation.verify import Round, VerificationResult, verify_rounds
from protocol.errors import SettingsError
from protocol.messages import OLDEST_VERSION, Close, Decode, Extend, Fault, Opened, Verdict
from tests.fakes import target_alone
from tests.talkers import BUDGET, CODEC, TARGET, Talker, new_station, prompt_of, settle, target_of


def test_a_long_prompt_stalls_no_round_of_others() -> None:
    station = new_station()
    runners = [Talker(station, name, prompt_of(5, name)) for name in range(3)]
    settle(station)
    target_of(station).tokens.clear()
    newcomer = Talker(station, 9, prompt_of(2000, seed=9))
    for _ in range(20):
        for runner in runners:
            runner.heard()
            runner.draft()
        station.engine.step()
        for runner in runners:
            runner.commit()
    assert newcomer.heard() == [Opened(0, 0)]
    assert target_of(station).tokens == [3 * 5 + BUDGET.prompt_tokens] * 20
    newcomer.draft()
    settle(station)
    newcomer.commit()


def test_a_session_that_the_target_decodes_for_is_not_silent() -> None:
    station = new_station()
    runner = Talker(station, 1, prompt_of(5))
    settle(station)
    runner.say(Decode(0, 1, 1000))
    for second in range(700):
        station.now = second
        station.engine.step()
        station.engine.drop_idle()
        assert not station.engine.quiet
    newcomer = Talker(station, 2, prompt_of(200))
    target_of(station).tokens.clear()
    station.engine.step()
    assert target_of(station).tokens == [1 + BUDGET.prompt_tokens]
    settle(station)
    assert len([one for one in runner.heard() if isinstance(one, Verdict)]) == 1000
    assert newcomer.heard() == [Opened(0, 0)]


def test_a_prompt_beyond_the_context_is_that_and_no_matter_of_room() -> None:
    station = new_station(capacity=4 * STEP)
    (fault,) = Talker(station, 1, prompt_of(4 * STEP)).heard()
    assert isinstance(fault, Fault)
    assert fault.code == "context_length"


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    station = new_station()
    Talker(station, 1, prompt_of(2000))
    station.engine.step()
    short = Talker(station, 2, prompt_of(10))
    short.heard()
    short.draft()
    station.engine.step()
    short.commit()


def test_where_nobody_else_runs_a_prompt_takes_the_whole_pass() -> None:
    station = new_station()
    Talker(station, 1, prompt_of(200))
    settle(station)
    assert target_of(station).tokens == [64, 64, 64, 7]


def test_rounds_that_exceed_a_pass_are_judged_in_the_order_they_came() -> None:
    station = new_station(PassBudget(16, 16))
    talkers = [Talker(station, name, prompt_of(5, name)) for name in range(5)]
    settle(station)
    for late, talker in enumerate(reversed(talkers)):
        station.now = float(late)
        talker.heard()
        talker.draft()
    station.engine.step()
    assert [bool(station.outboxes[talker.peer]) for talker in talkers] == [False, False, True, True, True]
    settle(station)
    for talker in talkers:
        talker.commit()


def test_a_round_of_more_tokens_than_a_pass_is_judged_all_the_same() -> None:
    station = new_station(PassBudget(16, 16))
    talker = Talker(station, 1, prompt_of(3))
    settle(station)
    talker.heard()
    talker.draft(40)
    settle(station)
    talker.commit()


@pytest.mark.parametrize("capacity", [3 * STEP, 2**20], ids=["little memory", "much memory"])
@pytest.mark.parametrize("memory", [None, 70], ids=["", "short"])
def test_answers_do_not_depend_on_neighbours(capacity: int, memory: int | None) -> None:
    """Sessions come, speak, extend, fall silent and vanish in the middle of rounds."""
    rng = np.random.default_rng(5)
    station = new_station(capacity=capacity, memory=memory)
    talkers: dict[int, Talker] = {}
    judged = 0
    for turn in range(400):
        station.now += float(rng.exponential(2.0))
        name = int(rng.integers(12))
        talker = talkers.get(name)
        if talker is None:
            talkers[name] = Talker(station, name, prompt_of(int(rng.integers(1, 90)), turn))
            if isinstance(talkers[name].heard()[-1], Fault):
                del talkers[name]
        elif rng.random() < 0.1 or len(talker.tokens) > 300:
            talker.draft()
            talker.say(Close(0))
            talker.heard()
            del talkers[name]
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
            settle(station)
            talker.commit()
            judged += 1
    assert judged > 150
    for name in talkers:
        station.push(bytes([name]), CODEC.encode(Close(0)))
    assert target_of(station).kv_pool.used == 0


def test_the_longest_silent_lose_their_cache_and_keep_their_tokens() -> None:
    station = new_station(capacity=3 * STEP)
    talkers = []
    for name in range(5):
        talkers.append(Talker(station, name, prompt_of(50, name)))
        settle(station)
        station.now += 10
    kv_pool = target_of(station).kv_pool
    assert kv_pool.used == 3 * STEP
    assert target_of(station).tokens == [49] * 5
    for cached in (4, 3, 2):
        talkers[cached].heard()
        talkers[cached].draft()
        settle(station)
        talkers[cached].commit()
    assert target_of(station).tokens[5:] == [5] * 3
    station.now += 10
    talkers[0].heard()
    talkers[0].draft()
    settle(station)
    talkers[0].commit()
    assert target_of(station).tokens[8:] == [54]
    assert kv_pool.used == 3 * STEP


def test_a_full_station_says_when_to_come_back() -> None:
    station = new_station(capacity=3 * STEP)
    talkers = []
    for name in range(3):
        talkers.append(Talker(station, name, prompt_of(50, name)))
        settle(station)
        station.now += 1
    refused = Talker(station, 7, prompt_of(50))
    (fault,) = refused.heard()
    assert isinstance(fault, Fault)
    assert (fault.session_id, fault.code) == (0, "full")
    assert fault.text == "the base station is full (busy sessions: 3); come back in 2 s"
    assert fault.retry_seconds == 2
    (fault,) = Talker(station, 8, prompt_of(50), OLDEST_VERSION).heard()
    assert isinstance(fault, Fault)
    assert (fault.code, fault.retry_seconds) == ("full", 0)  # version 1 takes no further field
    for talker in talkers[1:]:
        talker.heard()
        talker.draft()
    settle(station)
    for talker in talkers[1:]:
        talker.commit()
    station.now += 2
    assert Talker(station, 7, prompt_of(50)).heard() == [Opened(0, 0)]


def test_a_pass_that_is_too_much_for_the_memory_is_split() -> None:
    station = new_station(PassBudget(256, 64), memory=12)
    talkers = [Talker(station, name, prompt_of(5, name)) for name in range(8)]
    settle(station)
    for talker in talkers:
        talker.heard()
        talker.draft()
    target_of(station).tokens.clear()
    station.engine.step()
    assert target_of(station).tokens == [10] * 4
    for talker in talkers:
        talker.commit()


def test_a_round_that_is_too_much_for_the_memory_ends_its_session_and_no_other() -> None:
    station = new_station(memory=12)
    talkers = [Talker(station, name, prompt_of(5, name)) for name in range(3)]
    settle(station)
    for talker in talkers:
        talker.heard()
    talkers[0].draft(20)
    talkers[1].draft()
    settle(station)
    talkers[1].commit()
    (fault,) = talkers[0].heard()
    assert isinstance(fault, Fault)
    assert (fault.session_id, fault.code) == (0, "full")
    assert (fault.text, fault.retry_seconds) == ("the base station is out of memory; come back in 5 s", 5)
    assert target_of(station).kv_pool.used == STEP  # of the silent one nothing is left
    talkers[2].draft()
    settle(station)
    talkers[2].commit()


def test_memory_that_is_short_for_judging_alone_costs_nobody_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    def judge_few(logits: torch.Tensor, rounds: Sequence[Round]) -> list[VerificationResult]:
        if len(rounds) > 1:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        return verify_rounds(logits, rounds)

    monkeypatch.setattr("basestation.engine.verify_rounds", judge_few)
    station = new_station()
    talkers = [Talker(station, name, prompt_of(5, name)) for name in range(4)]
    for talker in talkers:
        talker.heard()
        talker.draft()
    settle(station)
    for talker in talkers:
        talker.commit()


def test_another_failure_of_a_pass_is_not_taken_for_short_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    station = new_station()
    Talker(station, 1, prompt_of(5))
    monkeypatch.setattr(target_of(station), "forward", lambda _: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        station.engine.step()


def test_the_target_alone_decodes_in_the_same_passes() -> None:
    station = new_station()
    drafting, decoding = Talker(station, 1, prompt_of(5)), Talker(station, 2, prompt_of(7))
    settle(station)
    drafting.heard()
    decoding.heard()
    decoding.say(Decode(0, 1, 6))
    target_of(station).passes.clear()
    for _ in range(6):
        drafting.draft()
        station.engine.step()
        drafting.commit()
    assert target_of(station).passes == [2] * 6
    verdicts = [message for message in decoding.heard() if isinstance(message, Verdict)]
    assert [verdict.token_id for verdict in verdicts] == target_alone(TARGET, decoding.tokens, 6)


@pytest.mark.parametrize("value", [0, -1, 15])
def test_a_budget_that_no_chunk_fits_is_refused(value: int) -> None:
    with pytest.raises(SettingsError, match=rf"pass-tokens is {value}; allowed: 16 and more"):
        PassBudget(value, 64)
    with pytest.raises(SettingsError, match=rf"prompt-tokens is {value}; allowed: 16 and more"):
        PassBudget(256, value)


@pytest.mark.parametrize("alike", [False, True])
def test_a_prompt_is_read_however_many_shorter_ones_come(alike: bool) -> None:
    """Two strangers a pass, each with a shorter prompt; ``alike``, another waits for the long one's beginning."""
    station = new_station(PassBudget(64, 32))
    runner = Talker(station, 0, prompt_of(3))
    settle(station)
    runner.heard()
    long = Talker(station, 1, prompt_of(6 * STEP, seed=9))
    station.engine.step()
    waiter = Talker(station, 2, [*prompt_of(6 * STEP, seed=9)[: 2 * STEP], 1]) if alike else long
    waiter.draft()
    for name in range(3, 103):
        runner.draft()
        station.now += 0.1
        Talker(station, name, prompt_of(40, seed=name))
        Talker(station, name + 100, prompt_of(40, seed=name + 100))
        station.engine.step()
        runner.commit()
        if any(isinstance(message, Verdict) for message in station.outboxes[waiter.peer]):
            return
    pytest.fail("never judged")
