"""The device reopens its session where a restarted base station no longer has it; the answer does not change."""

import random

import pytest

from device.planning.planner import Planner
from device.settings import DraftSettings
from protocol.limits import Limits
from protocol.messages import Draft, Extend, Message, Mode, Open, Sampling, Verdict
from tests.fakes import DRAFT, TARGET, FakeDraftModel, FakeTarget, target_alone
from tests.link_pair import MemoryTransport, Station, join, open_session

PROMPTS = ([3, 1, 4, 1, 5], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5])
SETTINGS = [
    DraftSettings(mode, sampling, uplink_k=4, draft_len=4)
    for mode in Mode
    for sampling in (Sampling(), Sampling(1.0, seed=3))
    if mode is not Mode.IDS or sampling.greedy
]


class RestartingTransport(MemoryTransport):
    """A link to a base station that can be restarted, with other ``limits``."""

    restarts = 0
    limits: Limits | None = None

    def restart(self) -> None:
        self.station = Station(FakeTarget.make(TARGET), self.limits)
        self.restarts += 1


def answer(settings: DraftSettings, restart_rate: float) -> tuple[list[int], int]:
    """The tokens of two turns, and how often the base station restarted."""
    rng = random.Random(1)  # noqa: S311 - not a secret
    transport = RestartingTransport(Station(FakeTarget.make(TARGET)))

    def restart_at_random(message: Message) -> int:
        if isinstance(message, Draft | Verdict) and rng.random() < restart_rate:
            transport.restart()
            return 0
        return 1

    transport.up = transport.down = restart_at_random
    model = FakeDraftModel.make(DRAFT)
    session = open_session(join(transport.station, model, transport)[0], settings, model, PROMPTS[0])
    tokens = [token.token_id for token in session.answer(30)]
    session.extend(PROMPTS[1])
    tokens += [token.token_id for token in session.answer(30)]
    session.close()
    return tokens, transport.restarts


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s.mode}-{s.sampling.temperature:g}")
def test_restarts_do_not_change_the_answer(settings: DraftSettings) -> None:
    uninterrupted, _ = answer(settings, restart_rate=0)
    interrupted, restarts = answer(settings, restart_rate=0.2)
    assert restarts > 2
    assert interrupted == uninterrupted


def test_lower_limits_after_a_restart_are_respected() -> None:
    transport = RestartingTransport(Station(FakeTarget.make(TARGET)))
    transport.limits = Limits(max_draft_len=2)
    model = FakeDraftModel.make(TARGET)
    client, _ = join(transport.station, model, transport)
    settings = DraftSettings(Mode.IDS, Sampling(), uplink_k=4, draft_len=None)
    stream = open_session(client, settings, model, PROMPTS[0]).answer(40)
    tokens = [next(stream).token_id for _ in range(10)]
    transport.restart()
    tokens += [token.token_id for token in stream]
    assert tokens == target_alone(TARGET, PROMPTS[0], 40)


def test_a_turn_whose_session_is_lost_opens_one_on_its_prompt_alone() -> None:
    """The tokens before may fill the context, and those that the turn removes need not be sent."""
    stations = [Station(FakeTarget.make(TARGET, context_length=40)) for _ in range(2)]
    transport, model, sent = MemoryTransport(stations[0]), FakeDraftModel.make(DRAFT), list[Message]()
    session = open_session(join(stations[0], model, transport)[0], SETTINGS[0], model, PROMPTS[0])
    assert len(list(session.answer(100))) == 40 - len(PROMPTS[0])

    def note(message: Message) -> int:
        sent.append(message)
        return 1

    transport.station, transport.up = stations[1], note
    session.extend(PROMPTS[1])
    answer = [token.token_id for token in session.answer(20)]
    assert answer == target_alone(TARGET, PROMPTS[1], 20)
    assert [message.prompt_ids for message in sent if isinstance(message, Open)] == [tuple(PROMPTS[1])]
    assert sum(isinstance(message, Extend) for message in sent) == 1


@pytest.mark.parametrize("restart_at", [1, 8])
def test_tokens_decoded_alone_around_a_restart_tell_no_speed_of_the_target(
    restart_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them waits until the new session has run all tokens before it."""
    decoded: list[tuple[int, float | None, float]] = []
    prefilled: list[int] = []
    monkeypatch.setattr(Planner, "observe_decoded", lambda _, *times: decoded.append(times))
    monkeypatch.setattr(Planner, "observe_target_prefill", lambda _, tokens, __: prefilled.append(tokens))
    model, transport = FakeDraftModel.make(DRAFT), RestartingTransport(Station(FakeTarget.make(TARGET)))
    client, _ = join(transport.station, model, transport)
    session = open_session(client, DraftSettings(Mode.TARGET, Sampling(), 1, None), model, PROMPTS[0])
    tokens: list[int] = []
    for token in session.answer(20):
        tokens.append(token.token_id)
        if len(tokens) == restart_at:
            transport.restart()
    assert tokens == target_alone(TARGET, PROMPTS[0], 20)
    assert decoded == [(1, None, 0.0)]
    assert prefilled == [len(PROMPTS[0])]
