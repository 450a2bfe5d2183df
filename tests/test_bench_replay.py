"""Replayed devices say what real ones would, and come through whatever the target answers."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from basestation.server import Server
from bench.station.replay import Pace, Player, Recording, Stage, read_recordings, record, write_recordings
from device.session import DraftSettings
from protocol.errors import FaultError, SettingsError
from protocol.messages import Draft, Mode, Sampling
from tests.fakes import FakeDraftModel, FakeTarget, blend, manifest, random_table, target_alone
from tests.link_pair import MemoryTransport, Station, join
from tests.serving import serving

VOCAB = 12
TARGET = random_table(VOCAB, seed=1)
DRAFT = blend(TARGET, random_table(VOCAB, seed=2), 0.7)
PROMPTS = ([3, 1, 4, 1, 5], [9, 2, 6])
ANSWER_LEN = 20


def recordings() -> list[Recording]:
    return record(FakeDraftModel.make(DRAFT), FakeTarget.make(TARGET), PROMPTS, ANSWER_LEN, 4, lambda: None)


@pytest.fixture
def address() -> Iterator[str]:
    with serving(Server(FakeTarget.make(TARGET), "tcp://127.0.0.1:0")) as server:
        yield server.address


def play(address: str, players: list[Player], seconds: float = 0.5) -> None:
    stage = Stage(address, VOCAB, players)
    stage.play(seconds)
    stage.pause()
    stage.close()


def test_recorded_drafts_are_those_of_a_device() -> None:
    recording = recordings()[0]
    assert list(recording.answer_ids) == target_alone(TARGET, PROMPTS[0], ANSWER_LEN)
    station, model = Station(FakeTarget.make(TARGET)), FakeDraftModel.make(DRAFT)
    transport = MemoryTransport(station)
    client, _ = join(station, model, transport)
    session = client.open(DraftSettings(Mode.IDS, Sampling(), 4, 4), model, PROMPTS[0])
    place = 0
    for _ in session.answer(ANSWER_LEN):
        pass
    for message in (station.codec.decode(frame) for frame in transport.uplink):
        if isinstance(message, Draft):
            assert message.token_ids == recording.drafts[place][: ANSWER_LEN - 1 - place]
            stands = zip(message.token_ids, recording.answer_ids[place:], strict=False)
            place += 1 + next(
                (index for index, (one, other) in enumerate(stands) if one != other), len(message.token_ids)
            )
    assert place == ANSWER_LEN


@pytest.mark.parametrize("mode", [Mode.IDS, Mode.TARGET])
def test_players_commit_the_recorded_answers_over_and_over(address: str, mode: Mode) -> None:
    players = [Player(one, mode, Pace(0.0), manifest(VOCAB)) for one in recordings()]
    play(address, players)
    for player in players:
        assert player.score.tokens > 2 * ANSWER_LEN
        assert player.score.diverged == 0
        assert (player.score.accepted > 0) == (mode is Mode.IDS)
        assert len(player.score.rounds) + player.score.accepted == player.score.tokens


def test_a_player_takes_up_the_recorded_answer_where_the_target_leaves_it(address: str) -> None:
    one = recordings()[0]
    answer = list(one.answer_ids)
    answer[7] = (answer[7] + 1) % VOCAB
    player = Player(Recording(one.prompt_ids, tuple(answer), one.drafts, 0.0), Mode.IDS, Pace(), manifest(VOCAB))
    play(address, [player])
    assert player.score.tokens > 2 * ANSWER_LEN
    assert player.score.diverged > 1


def test_thinking_and_the_link_take_their_time(address: str) -> None:
    slow, quick = (Player(recordings()[0], Mode.IDS, pace, manifest(VOCAB)) for pace in (Pace(0.01, 0.02), Pace(0.0)))
    play(address, [slow, quick])
    assert min(slow.score.rounds) >= 0.04
    assert 0 < len(slow.score.rounds) <= 0.5 / 0.04
    assert min(quick.score.rounds) < 0.04


def test_a_newcomer_sends_its_prompt_again(address: str) -> None:
    player = Player(Recording((1, 2, 3), (5,), ((),), 0.0), Mode.IDS, Pace(), manifest(VOCAB), afresh=True)
    play(address, [player])
    assert len(player.score.rounds) > 2


def test_a_fault_ends_the_play(address: str) -> None:
    stage = Stage(address, VOCAB, [Player(recordings()[0], Mode.IDS, Pace(), manifest(VOCAB, stop_ids=(3,)))])
    with pytest.raises(FaultError, match="stops at"):
        stage.play(2.0)
    stage.close()


def test_recordings_are_kept_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    write_recordings(path, recordings())
    kept = read_recordings(path)
    assert [(one.prompt_ids, one.answer_ids, one.drafts) for one in kept] == [
        (one.prompt_ids, one.answer_ids, one.drafts) for one in recordings()
    ]
    for text in ("{}", "no json", '{"prompt_ids": 3}'):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(SettingsError, match="recording"):
            read_recordings(path)
    with pytest.raises(SettingsError, match="recording"):
        read_recordings(tmp_path / "none")


def test_players_come_and_go_and_the_others_play_on(address: str) -> None:
    players = [Player(one, Mode.IDS, Pace(0.0), manifest(VOCAB)) for one in recordings() * 2]
    stage = Stage(address, VOCAB, players[:2])
    stage.play(0.2)
    stage.leave(players[0], without_a_word=True)
    for player in players[2:]:
        stage.enter(player)
    stage.play(0.2)
    stage.leave(players[1])
    stage.settle(players[2:])
    assert all(player.score.diverged == 0 for player in players)
    stage.pause()
    stage.close()
