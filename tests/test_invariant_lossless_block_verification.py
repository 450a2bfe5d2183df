"""Invariant 3 in block verification: whole answers are distributed as the target's own."""

from collections import Counter
from dataclasses import replace

import pytest

from device.link.no_link import NoLink
from device.session.client import Client
from device.session.unverified_tail import UnverifiedTail
from device.settings import DraftSettings, Timeouts
from protocol.messages import Draft, Message, Mode, Open, Sampling, Verdict, Welcome
from protocol.randomness import Stream, random_bits
from tests.fakes import FakeDraftModel, FakeTarget, blend, random_table
from tests.invariants import RecordingTransport, lossy
from tests.link_pair import MemoryTransport, Station, deliver_once, join, open_session
from tests.p_values import FALSE_ALARM, SMALL, answers_p_value

DRAFT = blend(SMALL, random_table(3, seed=5), 0.4)
PROMPT, LENGTH, SAMPLES = [0, 1], 3, 1500
SAMPLING = Sampling(0.9)


def settings_of(mode: Mode, ahead: int = 0, draft_len: int = 3) -> DraftSettings:
    return DraftSettings(
        mode, SAMPLING, len(SMALL), draft_len, uplink_p=0.95, drafts_ahead=ahead, block_verification=True
    )


def p_value(settings: DraftSettings, samples: int, loss: float = 0.0) -> float:
    """Of the hypothesis that whole answers are distributed as the target's own."""
    model, station = FakeDraftModel.make(DRAFT), Station(FakeTarget.make(SMALL))
    copies = lossy(1, loss) if loss else deliver_once
    client, _ = join(station, model, MemoryTransport(station, up=copies, down=copies))
    session = open_session(client, settings, model, PROMPT)
    counted: Counter[tuple[int, ...]] = Counter()
    for seed in range(samples):
        session.extend(PROMPT, replace(SAMPLING, seed=seed))
        counted[tuple(token.token_id for token in session.answer(LENGTH))] += 1
    return answers_p_value(counted, SMALL, PROMPT, SAMPLING)


@pytest.mark.parametrize(
    ("settings", "loss"),
    [(settings_of(Mode.FULL), 0.0), (settings_of(Mode.TOPK, ahead=3, draft_len=2), 0.2)],
    ids=["full", "topk-ahead-lossy"],
)
def test_answers_are_distributed_as_the_targets_own(settings: DraftSettings, loss: float) -> None:
    assert p_value(settings, SAMPLES, loss) > FALSE_ALARM


@pytest.mark.parametrize("ahead", [0, 3])
def test_drafted_tokens_are_sampled_with_numbers_of_their_draft(ahead: int) -> None:
    model, station = FakeDraftModel.make(DRAFT), Station(FakeTarget.make(SMALL))
    transport = RecordingTransport(station)
    client, _ = join(station, model, transport)
    settings = replace(settings_of(Mode.TOPK, ahead), sampling=replace(SAMPLING, seed=3))
    session = open_session(client, settings, model, PROMPT)
    assert len(list(session.answer(40))) == 40
    sent = {one.round_id: one for one in map(station.codec.decode, transport.uplink) if isinstance(one, Draft)}
    verdicts = [one for one in map(station.codec.decode, transport.downlink) if isinstance(one, Verdict)]
    position, differing = len(PROMPT), 0
    for verdict in verdicts:
        draft = sent[verdict.round_id]
        for index, (token_id, one) in enumerate(zip(draft.token_ids, draft.distributions, strict=True)):
            assert token_id == one.sample(random_bits(3, position + index, Stream.DRAFT, position))
            differing += token_id != one.sample(random_bits(3, position + index, Stream.DRAFT))
        position += verdict.accepted + 1
    assert differing


def test_an_unverified_tail_is_sampled_with_numbers_of_where_it_began() -> None:
    """So none of them took part in the rejection of a tail before it."""
    model = FakeDraftModel.make(DRAFT)
    settings = replace(settings_of(Mode.FULL), sampling=replace(SAMPLING, seed=3))
    tail = UnverifiedTail(Client(NoLink("--offline"), model.manifest, Timeouts(outage=0.0)), model, settings)
    tail.begin(PROMPT, 100, settings.sampling, None)
    position = start = len(PROMPT)
    differing = 0
    for is_right in (True, False, True):
        while len(tail.drafted) < 20:
            assert tail.draft_token()
        for index, token in enumerate(tail.drafted):
            assert token.distribution is not None
            number = random_bits(3, position + index, Stream.DRAFT, start)
            assert token.token_id == token.distribution.sample(number)
            differing += token.token_id != token.distribution.sample(random_bits(3, position + index, Stream.DRAFT))
        tail.commit((tail.drafted[0].token_id + (not is_right)) % len(SMALL))
        position += 1
        start = start if is_right else position
    assert differing


def test_a_base_station_without_block_verification_verifies_token_by_token() -> None:
    model, station = FakeDraftModel.make(DRAFT), Station(FakeTarget.make(SMALL))
    answers, opened = [], list[Message]()
    for block_verification, knows in ((False, True), (True, False), (True, True)):
        transport = _Transport(station, knows=knows)
        client, _ = join(station, model, transport)
        settings = replace(
            settings_of(Mode.TOPK), block_verification=block_verification, sampling=replace(SAMPLING, seed=5)
        )
        session = open_session(client, settings, model, PROMPT)
        answers.append([token.token_id for token in session.answer(40)])
        session.close()
        sent = map(station.codec.decode, transport.uplink)
        opened += [message for message in sent if isinstance(message, Open)]
        assert any(isinstance(message, Draft) for message in map(station.codec.decode, transport.uplink))
    assert answers[0] == answers[1] != answers[2]
    assert [one.block_verification for one in opened if isinstance(one, Open)] == [False, False, True]


class _Transport(MemoryTransport):
    """A transport to a base station that may not know block verification."""

    def __init__(self, station: Station, knows: bool) -> None:
        super().__init__(station)
        self.knows = knows

    def receive(self, timeout: float) -> bytes | None:
        frame = super().receive(timeout)
        message = None if frame is None else self.station.codec.decode(frame)
        if isinstance(message, Welcome) and not self.knows:
            return self.station.codec.encode(replace(message, block_verification=False))
        return frame
