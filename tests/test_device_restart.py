"""A base station that forgets everything in the middle of an answer changes nothing in it."""

import random

import pytest

from device.session import DraftSettings
from protocol.limits import Limits
from protocol.messages import Draft, Mode, Sampling, Verdict
from tests.fakes import FakeDraftModel, FakeTarget, blend, random_table, target_alone
from tests.link_pair import MemoryTransport, Station, join

TARGET = random_table(20, seed=1)
DRAFT = blend(TARGET, random_table(20, seed=2), 0.7)
PROMPTS = ([3, 1, 4, 1, 5], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5])
SETTINGS = [
    DraftSettings(mode, sampling, uplink_k=4, draft_len=4)
    for mode in Mode
    for sampling in (Sampling(), Sampling(1.0, seed=3))
    if mode is not Mode.IDS or sampling.greedy
]


class ForgetfulTransport(MemoryTransport):
    """Now and then the base station behind it is another one, which has heard nothing."""

    restarts = 0
    limits: Limits | None = None

    def start_anew(self) -> None:
        self.station = Station(FakeTarget.make(TARGET), self.limits)
        self.restarts += 1


def answer(settings: DraftSettings, forgets: float) -> tuple[list[int], int]:
    chance = random.Random(1)  # noqa: S311 - a fixed choice of moments
    transport = ForgetfulTransport(Station(FakeTarget.make(TARGET)))

    def fate(message: object) -> int:
        if isinstance(message, Draft | Verdict) and chance.random() < forgets:
            transport.start_anew()
            return 0
        return 1

    transport.up = transport.down = fate
    model = FakeDraftModel.make(DRAFT)
    session = join(transport.station, model, transport)[0].open(settings, model, PROMPTS[0])
    tokens = [token.token_id for token in session.answer(30)]
    session.extend(PROMPTS[1])
    tokens += [token.token_id for token in session.answer(30)]
    session.close()
    return tokens, transport.restarts


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda one: f"{one.mode}-{one.sampling.temperature:g}")
def test_the_answer_is_the_undisturbed_one(settings: DraftSettings) -> None:
    undisturbed, _ = answer(settings, forgets=0)
    disturbed, restarts = answer(settings, forgets=0.2)
    assert restarts > 2
    assert disturbed == undisturbed


def test_a_station_that_allows_less_is_asked_for_no_more() -> None:
    transport = ForgetfulTransport(Station(FakeTarget.make(TARGET)))
    transport.limits = Limits(max_draft_len=2)
    model = FakeDraftModel.make(TARGET)
    session = join(transport.station, model, transport)[0].open(
        DraftSettings(Mode.IDS, Sampling(), uplink_k=4, draft_len=None), model, PROMPTS[0]
    )
    stream = session.answer(40)
    tokens = [next(stream).token_id for _ in range(10)]
    transport.start_anew()
    tokens += [token.token_id for token in stream]
    assert tokens == target_alone(TARGET, PROMPTS[0], 40)
