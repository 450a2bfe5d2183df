"""Replay clients send what real devices would, and handle any answer of the target."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from basestation.server import Server
from bench.station.capacity import known_recordings
from bench.station.load_generator import LoadGenerator
from bench.station.recorder import record
from bench.station.recording import Recording, read_recordings, write_recordings
from bench.station.replay import CapacitySettings
from bench.station.replay_client import ReplayClient, ReplayTiming
from protocol.errors import FaultError, SettingsError
from protocol.messages import Decode, Draft, Mode, Opened, Verdict
from tests.fakes import DRAFT, TARGET, VOCAB, FakeDraftModel, FakeTarget, manifest, target_alone
from tests.link_pair import IDS, MemoryTransport, Station, join, open_session
from tests.serving import ANY_PORT, serving

PROMPTS = ([3, 1, 4, 1, 5], [9, 2, 6])
ANSWER_LEN = 20
NO_DELAY = ReplayTiming(0.0)


def recordings() -> list[Recording]:
    return record(FakeDraftModel.make(DRAFT), FakeTarget.make(TARGET), PROMPTS, ANSWER_LEN, 4, lambda: None)


@pytest.fixture
def address() -> Iterator[str]:
    with serving(Server(FakeTarget.make(TARGET), ANY_PORT)) as server:
        yield server.address


def run(address: str, clients: list[ReplayClient], seconds: float = 0.5) -> None:
    load = LoadGenerator(address, VOCAB, clients)
    load.run(seconds)
    load.drain()
    load.close()


def test_recorded_drafts_equal_those_of_a_device() -> None:
    recording = recordings()[0]
    assert list(recording.answer_ids) == target_alone(TARGET, PROMPTS[0], ANSWER_LEN)
    station, model = Station(FakeTarget.make(TARGET)), FakeDraftModel.make(DRAFT)
    transport = MemoryTransport(station)
    client, _ = join(station, model, transport)
    session = open_session(client, IDS, model, PROMPTS[0])
    committed = 0
    for _ in session.answer(ANSWER_LEN):
        pass
    for message in (station.codec.decode(frame) for frame in transport.uplink):
        if isinstance(message, Draft):
            assert message.token_ids == recording.drafts[committed][: ANSWER_LEN - 1 - committed]
            pairs = zip(message.token_ids, recording.answer_ids[committed:], strict=False)
            rejected = (index for index, (one, other) in enumerate(pairs) if one != other)
            committed += 1 + next(rejected, len(message.token_ids))
    assert committed == ANSWER_LEN


@pytest.mark.parametrize("mode", [Mode.IDS, Mode.TARGET])
def test_clients_commit_the_recorded_answers_repeatedly(address: str, mode: Mode) -> None:
    clients = [ReplayClient(one, mode, NO_DELAY, manifest(VOCAB)) for one in recordings()]
    run(address, clients)
    for client in clients:
        assert client.score.tokens > 2 * ANSWER_LEN
        assert client.score.diverged == 0
        assert (client.score.accepted > 0) == (mode is Mode.IDS)
        assert len(client.score.rounds) + client.score.accepted == client.score.tokens


def test_a_client_returns_to_the_recorded_answer_where_the_target_diverges(address: str) -> None:
    one = recordings()[0]
    answer = list(one.answer_ids)
    answer[7] = (answer[7] + 1) % VOCAB
    recording = Recording(one.prompt_ids, tuple(answer), one.drafts, 0.0)
    client = ReplayClient(recording, Mode.IDS, ReplayTiming(), manifest(VOCAB))
    run(address, [client])
    assert client.score.tokens > 2 * ANSWER_LEN
    assert client.score.diverged > 1


def test_drafting_and_the_link_take_their_time(address: str) -> None:
    slow, fast = (
        ReplayClient(recordings()[0], Mode.IDS, timing, manifest(VOCAB))
        for timing in (ReplayTiming(0.01, 0.02), NO_DELAY)
    )
    run(address, [slow, fast])
    assert min(slow.score.rounds) >= 0.04
    assert 0 < len(slow.score.rounds) <= 0.5 / 0.04
    assert min(fast.score.rounds) < 0.04


def test_a_stream_of_the_target_alone_waits_for_the_link_once() -> None:
    recording = recordings()[0]
    client = ReplayClient(recording, Mode.TARGET, ReplayTiming(delay_seconds=0.5), manifest(VOCAB))
    following = client.reply_to(Opened(0, 0), 0.0)
    assert following is not None
    assert (following[0], type(following[1])) == (1.0, Decode)
    client.mark_sent(2.0)
    for index, token_id in enumerate(recording.answer_ids[:3]):
        assert client.reply_to(Verdict(0, 1 + index, 0, token_id), 3.0 + index) is None
    assert client.score.rounds == [2.0, 1.0, 1.0]


def test_a_client_can_recompute_its_prompt_for_every_answer(address: str) -> None:
    recording = Recording((1, 2, 3), (5,), ((),), 0.0)
    client = ReplayClient(recording, Mode.IDS, ReplayTiming(), manifest(VOCAB), recompute_prompt=True)
    run(address, [client])
    assert len(client.score.rounds) > 2


def test_a_fault_ends_the_run(address: str) -> None:
    client = ReplayClient(recordings()[0], Mode.IDS, ReplayTiming(), manifest(VOCAB + 1))
    load = LoadGenerator(address, VOCAB, [client])
    with pytest.raises(FaultError, match=f"a draft model of {VOCAB + 1} tokens"):
        load.run(2.0)
    load.close()


def test_ids_are_encoded_for_the_targets_vocabulary() -> None:
    """The draft model knows fewer tokens, so that its own ids would take fewer bits."""
    padded = np.pad(TARGET, (0, 257 - VOCAB), constant_values=-20.0)
    with serving(Server(FakeTarget.make(padded), ANY_PORT)) as server:
        client = ReplayClient(recordings()[0], Mode.IDS, NO_DELAY, manifest(VOCAB))
        run(server.address, [client])
    assert client.score.accepted > 0


def test_recordings_survive_a_round_trip_through_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    write_recordings(path, recordings())
    assert [(one.prompt_ids, one.answer_ids, one.drafts) for one in read_recordings(path)] == [
        (one.prompt_ids, one.answer_ids, one.drafts) for one in recordings()
    ]
    for text in ("{}", "no json", '{"prompt_ids": 3}', ""):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(SettingsError, match="recording"):
            read_recordings(path)
    with pytest.raises(SettingsError, match="recording"):
        read_recordings(tmp_path / "none")


def test_clients_can_be_added_and_removed_while_others_run(address: str) -> None:
    clients = [ReplayClient(one, Mode.IDS, NO_DELAY, manifest(VOCAB)) for one in recordings() * 2]
    load = LoadGenerator(address, VOCAB, clients[:2])
    load.run(0.2)
    load.remove(clients[0], abruptly=True)
    for client in clients[2:]:
        load.add(client)
    load.run(0.2)
    load.remove(clients[1])
    load.warm_up(clients[2:])
    assert all(client.score.diverged == 0 for client in clients)
    load.drain()
    load.close()


def test_recordings_of_other_lengths_are_refused(tmp_path: Path) -> None:
    path, one = tmp_path / "rounds.jsonl", recordings()[0]
    write_recordings(path, [one])
    length, longest = len(one.prompt_ids), max(map(len, one.drafts))
    settings = CapacitySettings(1, (length, length), longest)
    assert len(known_recordings(path, settings)) == 1
    assert known_recordings(tmp_path / "none", settings) == []
    for other in (CapacitySettings(2, (length, length), longest), CapacitySettings(1, (length, length), longest + 1)):
        with pytest.raises(SettingsError, match="this one has 1 prompts of"):
            known_recordings(path, other)
