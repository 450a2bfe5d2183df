"""A device with many sessions, or long rounds, takes no more of a forward pass than its share."""

import math

from basestation.scheduler import PassBudget
from protocol.messages import Draft, Mode, Open, Sampling, Verdict
from tests.link_pair import Station
from tests.scripted_device import ScriptedDevice, new_station, prompt_of

BUDGET = PassBudget(256, 32)
DEVICES = 8
PROMPT = 200
LONGEST_DRAFT = (1,) * 64


def greedy_device(station: Station, prompt: int) -> ScriptedDevice:
    """A device whose eight sessions each have a prompt."""
    greedy = ScriptedDevice(station, 200, prompt_of(prompt, seed=100))
    for session in range(1, 8):
        greedy.send(Open(session, 0, Mode.IDS, Sampling(), tuple(prompt_of(prompt, seed=100 + session))))
    return greedy


def passes_until_verified(station: Station, greedy: ScriptedDevice) -> int:
    """How many forward passes run until each of eight other devices has a Verdict.

    ``greedy`` sends the next Draft after each Verdict of its own.
    """
    devices = [ScriptedDevice(station, name, prompt_of(PROMPT, seed=name)) for name in range(1, 1 + DEVICES)]
    for device in devices:
        device.draft()
    for count in range(1, 200):
        station.engine.step()
        for reply in greedy.receive():
            if isinstance(reply, Verdict):
                greedy.send(Draft(reply.session_id, reply.round_id + 1, LONGEST_DRAFT))
        if all(any(isinstance(one, Verdict) for one in station.outboxes[device.peer]) for device in devices):
            return count
    raise AssertionError("never verified")


def fair_passes() -> int:
    """How many passes the prompts of the eight take if they and one other device share each alike."""
    return math.ceil(PROMPT / (BUDGET.tokens // (DEVICES + 1)))


def test_many_prompts_of_a_device_delay_those_of_others_as_one_prompt_does() -> None:
    station = new_station(BUDGET)
    greedy = greedy_device(station, prompt=2000)
    assert passes_until_verified(station, greedy) <= fair_passes() + 2


def test_long_rounds_of_a_device_delay_the_prompts_of_others_by_its_share_alone() -> None:
    station = new_station(BUDGET)
    greedy = greedy_device(station, prompt=20)
    while station.engine.busy:
        station.engine.step()
    for session in range(8):
        greedy.send(Draft(session, 1, LONGEST_DRAFT))
    assert passes_until_verified(station, greedy) <= fair_passes() + 2


def test_a_device_whose_long_rounds_wait_for_its_share_is_served() -> None:
    """While prompts of others take all the passes, each round still runs when its tokens have added up."""
    station = new_station(BUDGET)
    greedy = greedy_device(station, prompt=20)
    while station.engine.busy:
        station.engine.step()
    for name in range(1, 1 + DEVICES):
        ScriptedDevice(station, name, prompt_of(4000, seed=name))
    station.outboxes[greedy.peer].clear()
    greedy.send(Draft(0, 1, LONGEST_DRAFT))
    for _ in range(math.ceil((1 + len(LONGEST_DRAFT)) / (BUDGET.tokens // (DEVICES + 1)))):
        assert not station.outboxes[greedy.peer]
        station.engine.step()
    assert [type(one) for one in station.outboxes[greedy.peer]] == [Verdict]
