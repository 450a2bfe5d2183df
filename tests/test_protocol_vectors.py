"""Compatibility with earlier protocol versions, tested by the vectors in docs/vectors."""

from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest

from device.drafting.draft_model import DraftModel
from device.link.link import Link
from device.session.client import Client
from device.settings import DraftSettings
from protocol.coupling import PositionNoise
from protocol.errors import FaultError, MismatchError
from protocol.frames import FrameCodec
from protocol.messages import OLDEST_VERSION, PROTOCOL_VERSION, Decode, Fault, Hello, Message, Mode, Resume, Sampling
from protocol.randomness import Stream, random_bits, random_word
from protocol.sparse import SparseDistribution
from tests.fakes import FakeDraftModel, FakeTarget, blend, random_table, target_alone
from tests.link_pair import IDS, MemoryTransport, Station, join, open_session
from tests.vectors import all_vectors, counting_table, describe, recorded_vectors, replies_of

VERSIONS = range(OLDEST_VERSION, PROTOCOL_VERSION + 1)
every_version = pytest.mark.parametrize("version", VERSIONS)


def matches(recorded: Any, value: Any) -> bool:
    """Whether a described message has all recorded fields; it may have later ones too."""
    if isinstance(recorded, dict):
        return all(matches(entry, value[name]) for name, entry in recorded.items())
    return bool(recorded == value)


@every_version
def test_recorded_frames_decode_and_encode_unchanged(version: int) -> None:
    for vector in recorded_vectors(version)["frames"]:
        codec, frame = FrameCodec(vector["vocab_size"]), bytes.fromhex(vector["frame"])
        message = codec.decode(frame)
        assert matches(vector["message"], describe(message))
        assert codec.encode(message) == frame


@every_version
def test_recorded_random_numbers_are_reproduced(version: int) -> None:
    vectors = recorded_vectors(version)
    for one in vectors["random_words"]:
        assert f"{random_word(one['seed'], one['position'], Stream(one['stream'])):016x}" == one["word"]
    for one in vectors.get("block_random_words", ()):
        word = random_word(one["seed"], one["position"], Stream(one["stream"]), one["first_drafted"])
        assert f"{word:016x}" == one["word"]
    for one in vectors["drawn_tokens"]:
        recorded = one["distribution"]
        support, weights = np.array(recorded["support"]), np.array(recorded["weights"])
        distribution = SparseDistribution(300, support, weights, recorded["total"])
        assert distribution.sample(random_bits(one["seed"], one["position"], Stream.DRAFT)) == one["token_id"]
    for one in vectors["noise"]:
        noise = PositionNoise(one["seed"], one["position"], one["vocab_size"])
        assert noise.of(np.array(one["token_ids"])).tolist() == pytest.approx(one["noise"], rel=1e-12)
        assert noise.choose(np.arange(300, dtype=np.float32) / -64)[0] == one["chosen"]


@every_version
def test_a_device_of_every_version_gets_the_recorded_replies(version: int) -> None:
    replies = replies_of(Station(FakeTarget.make(counting_table())))
    for exchange in recorded_vectors(version)["conversation"]:
        assert replies(bytes.fromhex(exchange["device"])) == exchange["station"]


def test_the_newest_file_covers_every_message_and_vector() -> None:
    newest, written = recorded_vectors(PROTOCOL_VERSION), all_vectors()
    assert {name: len(newest[name]) for name in newest if name != "version"} == {
        name: len(written[name]) for name in written if name != "version"
    }
    kinds = {vector["message"]["kind"] for vector in newest["frames"]}
    assert kinds == {kind.__name__ for kind in get_args(Message)}


class Version1Transport(MemoryTransport):
    """A transport to a base station of version 1, which refuses other versions and has no Resume."""

    def send(self, frame: bytes) -> None:
        message = self.station.codec.decode(frame)
        assert not isinstance(message, Resume)
        if isinstance(message, Hello) and message.version != 1:
            refusal = MismatchError(f"protocol version {message.version}; this base station speaks 1")
            self.station.outboxes[self.peer].append(Fault(None, refusal.code, str(refusal)))
            return
        super().send(frame)


def greet(station: Station, model: DraftModel) -> Client:
    return Client(Link(Version1Transport(station), FrameCodec(12), "memory"), model.manifest)


def test_a_device_falls_back_to_version_1() -> None:
    target = random_table(12, seed=1)
    model = FakeDraftModel.make(blend(target, random_table(12, seed=2), 0.7))
    client = greet(Station(FakeTarget.make(target)), model)
    assert (client.welcome.version, client.welcome.window) == (1, 1)
    session = open_session(client, IDS, model, [3, 1, 4])
    assert [token.token_id for token in session.answer(30)] == target_alone(target, [3, 1, 4], 30)


def test_a_mismatch_of_models_is_reported_in_any_version() -> None:
    model = FakeDraftModel.make(random_table(11, seed=1))
    with pytest.raises(FaultError, match="a draft model of 11 tokens; the target has 12"):
        greet(Station(FakeTarget.make(random_table(12, seed=1))), model)


class Version3Transport(MemoryTransport):
    """A transport to a base station of version 3, which answers later versions in its own."""

    def send(self, frame: bytes) -> None:
        message = self.station.codec.decode(frame)
        super().send(self.station.codec.encode(replace(message, version=3)) if isinstance(message, Hello) else frame)


def test_a_device_plans_by_its_own_measurements_at_a_base_station_of_version_3() -> None:
    target = random_table(12, seed=1)
    model = FakeDraftModel.make(blend(target, random_table(12, seed=2), 0.7))
    transport = Version3Transport(Station(FakeTarget.make(target)))
    client, _ = join(transport.station, model, transport)
    assert (client.welcome.version, client.welcome.pass_seconds) == (3, 0)
    session = open_session(client, DraftSettings(Mode.IDS, Sampling(), 4, None), model, [3, 1, 4])
    assert [token.token_id for token in session.answer(30)] == target_alone(target, [3, 1, 4], 30)
    requests = map(transport.station.codec.decode, transport.uplink[2:])
    assert isinstance(next(requests), Decode)
