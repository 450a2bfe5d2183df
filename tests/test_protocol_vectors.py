"""What earlier versions said is still understood, and still said to those who speak them."""

from typing import Any, get_args

import numpy as np
import pytest

from device.client import Client
from device.draft_model import DraftModel
from device.link import Link
from device.session import DraftSettings
from protocol.coupling import PositionNoise
from protocol.errors import FaultError, MismatchError
from protocol.frames import FrameCodec
from protocol.messages import OLDEST_VERSION, PROTOCOL_VERSION, Fault, Hello, Message, Mode, Resume, Sampling
from protocol.randomness import Stream, random_bits, random_word
from protocol.sparse import SparseDistribution
from tests.fakes import FakeDraftModel, FakeTarget, blend, random_table, target_alone
from tests.link_pair import MemoryTransport, Station
from tests.vectors import all_vectors, counting_table, describe, kept, replies_of

VERSIONS = range(OLDEST_VERSION, PROTOCOL_VERSION + 1)
every_version = pytest.mark.parametrize("version", VERSIONS)


def alike(kept_value: Any, value: Any) -> bool:
    """Whether a described message has all that was kept; fields that came later may be there too."""
    if isinstance(kept_value, dict):
        return all(alike(entry, value[name]) for name, entry in kept_value.items())
    return bool(kept_value == value)


@every_version
def test_kept_frames_are_read_and_written_as_ever(version: int) -> None:
    for vector in kept(version)["frames"]:
        codec, frame = FrameCodec(vector["vocab_size"]), bytes.fromhex(vector["frame"])
        message = codec.decode(frame)
        assert alike(vector["message"], describe(message))
        assert codec.encode(message) == frame


@every_version
def test_kept_random_numbers_are_drawn_as_ever(version: int) -> None:
    vectors = kept(version)
    for one in vectors["random_words"]:
        assert f"{random_word(one['seed'], one['position'], Stream(one['stream'])):016x}" == one["word"]
    for one in vectors["drawn_tokens"]:
        said = one["distribution"]
        drawn_from = SparseDistribution(300, np.array(said["support"]), np.array(said["weights"]), said["total"])
        assert drawn_from.sample(random_bits(one["seed"], one["position"], Stream.DRAFT)) == one["token_id"]
    for one in vectors["noise"]:
        noise = PositionNoise(one["seed"], one["position"], one["vocab_size"])
        assert noise.of(np.array(one["token_ids"])).tolist() == pytest.approx(one["noise"], rel=1e-12)
        assert noise.choose(np.arange(300, dtype=np.float32) / -64)[0] == one["chosen"]


@every_version
def test_a_device_of_every_version_is_answered_as_ever(version: int) -> None:
    answers = replies_of(Station(FakeTarget.make(counting_table())))
    for said in kept(version)["conversation"]:
        assert answers(bytes.fromhex(said["device"])) == said["station"]


def test_the_newest_file_has_vectors_of_all_that_there_is() -> None:
    newest, written = kept(PROTOCOL_VERSION), all_vectors()
    assert {name: len(newest[name]) for name in newest if name != "version"} == {
        name: len(written[name]) for name in written if name != "version"
    }
    said = {vector["message"]["kind"] for vector in newest["frames"]}
    assert said == {kind.__name__ for kind in get_args(Message)}


class OldStation(MemoryTransport):
    """A base station of version 1 behind a link: it refuses other versions, and knows no Resume."""

    def send(self, frame: bytes) -> None:
        message = self.station.codec.decode(frame)
        assert not isinstance(message, Resume)
        if isinstance(message, Hello) and message.version != 1:
            refusal = MismatchError(f"protocol version {message.version}; this base station speaks 1")
            self.station.outboxes[self.peer].append(Fault(None, refusal.code, str(refusal)))
            return
        super().send(frame)


def greet(station: Station, model: DraftModel) -> Client:
    return Client(Link(OldStation(station), FrameCodec(12), "memory"), model.manifest)


def test_a_device_is_served_by_a_station_one_version_behind() -> None:
    target = random_table(12, seed=1)
    model = FakeDraftModel.make(blend(target, random_table(12, seed=2), 0.7))
    client = greet(Station(FakeTarget.make(target)), model)
    assert (client.welcome.version, client.welcome.window) == (1, 1)
    session = client.open(DraftSettings(Mode.IDS, Sampling(), 4, 4), model, [3, 1, 4])
    assert [token.token_id for token in session.answer(30)] == target_alone(target, [3, 1, 4], 30)


def test_a_mismatch_of_models_is_told_whatever_the_versions() -> None:
    model = FakeDraftModel.make(random_table(11, seed=1))
    with pytest.raises(FaultError, match="a draft model of 11 tokens; the target has 12"):
        greet(Station(FakeTarget.make(random_table(12, seed=1))), model)
