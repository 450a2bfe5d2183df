"""Invariant 8: models that do not match are refused at Hello; those that agree are served, padded or not."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
import pytest

from basestation.devices.peer import Peer
from basestation.target.target_model import TargetModel
from basestation.target.vocabulary import Vocabulary
from device.link.link import Link
from device.session.client import Client
from protocol.errors import FaultError
from protocol.frames import FrameCodec
from protocol.messages import (
    OLDEST_VERSION,
    PROTOCOL_VERSION,
    VOCABULARY_VERSION,
    Decode,
    Draft,
    Extend,
    Fault,
    Hello,
    Message,
    Mode,
    Open,
    Sampling,
    Verdict,
    Welcome,
)
from protocol.sparse import SparseDistribution
from protocol.vocabulary import first_difference, hash_with_padding, vocabulary_hash, vocabulary_size
from tests.fakes import VOCAB, FakeTarget, random_table
from tests.invariants import draft_model, new_station, open_request
from tests.link_pair import MemoryTransport, Station
from tests.raw_device import RawDevice, hello

TOKENS = {name: token_id for token_id, name in enumerate(["a", "b", "é", '"', "<|end|>", "c", "d", "e", "f", "g"])}
USED = len(TOKENS)
STOP_IDS = (4,)
REMEDY = "export the draft model again with --target"


def padded(size: int, tokens: Mapping[str, int] = TOKENS) -> dict[str, int]:
    """A vocabulary whose converter named the unused ids up to ``size``."""
    return {**tokens, **{f"[PAD{token_id}]": token_id for token_id in range(len(tokens), size)}}


def first(count: int) -> dict[str, int]:
    return {token: token_id for token, token_id in TOKENS.items() if token_id < count}


@dataclass
class TargetWithTokens(FakeTarget):
    ids: Mapping[str, int] = field(default_factory=dict)

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.ids, len(self.table), self.stop_ids)


def station_with(tokens: Mapping[str, int], rows: int = 0) -> Station:
    table = random_table(rows or len(tokens), seed=1)
    return Station(cast(TargetModel, TargetWithTokens(table, frozenset(STOP_IDS), ids=tokens)))


def greeting(tokens: Mapping[str, int], version: int = PROTOCOL_VERSION, stop_ids: tuple[int, ...] = STOP_IDS) -> Hello:
    """The Hello of a bundle with these tokens, as the bundles of a version describe them."""
    if version < VOCABULARY_VERSION:
        return Hello(version, max(tokens.values()) + 1, bytes.fromhex(hash_with_padding(tokens)), stop_ids)
    return Hello(version, vocabulary_size(tokens), bytes.fromhex(vocabulary_hash(tokens)), stop_ids)


def reply(station: Station, message: Hello) -> Message | None:
    return RawDevice(station, greet=False).request(message)


def refusal(station: Station, message: Hello) -> str:
    fault = reply(station, message)
    assert isinstance(fault, Fault)
    assert (fault.session_id, fault.code) == (None, "mismatch")
    assert "\n" not in fault.text
    return fault.text


FAMILY = {
    "without padding": (TOKENS, USED),
    "padded": (padded(13), 13),
    "padded further": (padded(20), 20),
    "rows without names": (TOKENS, 16),
}


@pytest.mark.parametrize("target", FAMILY)
@pytest.mark.parametrize("draft", FAMILY)
def test_padding_does_not_count(draft: str, target: str) -> None:
    tokens, rows = FAMILY[target]
    welcome = reply(station_with(tokens, rows), greeting(FAMILY[draft][0]))
    assert isinstance(welcome, Welcome)
    assert (welcome.version, welcome.vocab_size, welcome.stop_ids) == (PROTOCOL_VERSION, len(tokens), STOP_IDS)


@pytest.mark.parametrize("count", [1, 5, USED])
@pytest.mark.parametrize("target", FAMILY)
def test_a_draft_model_may_know_only_the_first_tokens(target: str, count: int) -> None:
    tokens, rows = FAMILY[target]
    welcome = reply(station_with(tokens, rows), greeting(first(count)))
    assert isinstance(welcome, Welcome)
    assert welcome.vocab_size == len(tokens)


@pytest.mark.parametrize("target", [name for name in FAMILY if name != "without padding"])
def test_a_draft_model_with_more_tokens_is_refused_with_the_remedy(target: str) -> None:
    tokens, rows = FAMILY[target]
    text = refusal(station_with(tokens, rows), greeting({**TOKENS, "new": USED}))
    with_padding = f" ({len(tokens)} with padding)" if len(tokens) > USED else ""
    assert text == f"a draft model of {USED + 1} tokens; the target has {USED}{with_padding}; {REMEDY}"


@pytest.mark.parametrize("changed", range(USED))
@pytest.mark.parametrize("target", FAMILY)
def test_one_other_token_is_refused_with_sizes_and_hashes(target: str, changed: int) -> None:
    tokens, rows = FAMILY[target]
    other = {("z" if token_id == changed else token): token_id for token, token_id in TOKENS.items()}
    text = refusal(station_with(tokens, rows), greeting(other))
    own, expected = vocabulary_hash(other)[:12], vocabulary_hash(TOKENS)[:12]
    assert text == (
        f"the draft model's {USED} tokens (SHA-256 {own}…) are not the first of the target's {USED} ({expected}…); "
        + REMEDY
    )
    assert first_difference(other, tokens) == (changed, "z", list(TOKENS)[changed])


@pytest.mark.parametrize("stop_ids", [(), (4, 7), (7,), (4, 4)])
def test_the_stop_ids_are_the_targets(stop_ids: tuple[int, ...]) -> None:
    welcome = reply(station_with(TOKENS), greeting(TOKENS, stop_ids=stop_ids))
    assert isinstance(welcome, Welcome)
    assert welcome.stop_ids == STOP_IDS


@pytest.mark.parametrize("version", range(OLDEST_VERSION, VOCABULARY_VERSION))
def test_older_versions_are_served_where_all_tokens_and_stop_ids_are_equal(version: int) -> None:
    for tokens, rows in FAMILY.values():
        welcome = reply(station_with(tokens, rows), greeting(tokens, version))
        assert isinstance(welcome, Welcome)
        assert (welcome.version, welcome.vocab_size, welcome.stop_ids) == (version, 0, ())


@pytest.mark.parametrize("version", range(OLDEST_VERSION, PROTOCOL_VERSION + 1))
@pytest.mark.parametrize("size", [USED, 13, 300])
def test_frames_of_every_version_are_encoded_for_all_ids_of_a_padded_target(version: int, size: int) -> None:
    """Ids, distributions and noise depend on the number of tokens that both ends count."""
    tokens, sampling = padded(size), Sampling(1.0, seed=3)
    device = RawDevice(station_with(tokens, USED if size == USED else size + 7), greet=False)
    device.request(greeting(tokens, version))
    codec = FrameCodec(size)
    one = SparseDistribution.quantize(size, np.array([1, 8]), np.array([0.25, 0.75]), 12)
    received: list[Message] = []
    dispatch = device.station.engine.receive

    def recording(peer: Peer, message: Message) -> None:
        received.append(message)
        dispatch(peer, message)

    device.station.engine.receive = recording  # type: ignore[assignment]
    for mode, draft in ((Mode.TOPK, Draft(0, 1, (8, 1, 8), (one,) * 3)), (Mode.COUPLED, Draft(1, 1, (8, 1, 8)))):
        session_id = draft.session_id
        device.send_frame(codec.encode(Open(session_id, 0, mode, sampling, (1, 2))))
        assert isinstance(device.send_frame(codec.encode(draft)), Verdict)
        assert received[-1] == draft


@pytest.mark.parametrize("version", range(OLDEST_VERSION, VOCABULARY_VERSION))
def test_older_versions_are_refused_where_padding_or_stop_ids_differ(version: int) -> None:
    station = station_with(padded(13))
    for tokens in (TOKENS, padded(12), padded(14), first(5)):
        size = len(tokens)
        text = refusal(station, greeting(tokens, version))
        assert text == f"a draft model of {size} tokens; the target has {USED} (13 with padding); {REMEDY}"
    assert "not the first" in refusal(station, greeting({**padded(13), "z": 11}, version))
    for stop_ids in ((), (4, 7), (7,)):
        text = refusal(station, greeting(padded(13), version, stop_ids))
        assert f"stops at the tokens {list(stop_ids)}; the target stops at [4]; {REMEDY}" in text


def test_the_hash_of_the_first_tokens_is_that_of_a_vocabulary_of_them() -> None:
    gap = {"a": 0, "b": 3, "é\n": 4, "[PAD7]": 7, "[PAD6]": 5, "c": 9}
    for tokens in (TOKENS, padded(20), gap):
        vocabulary = Vocabulary(tokens, 20, frozenset())
        for size in range(22):
            assert vocabulary.hash_of_first(size).hex() == vocabulary_hash(tokens, size)
        assert vocabulary.hash_with_padding.hex() == hash_with_padding(tokens)
    gap_vocabulary = Vocabulary({**gap, "[PAD10]": 10}, 20, frozenset())
    assert (gap_vocabulary.used_size, gap_vocabulary.size) == (10, 11)


def test_ids_beyond_the_output_layer_do_not_count() -> None:
    vocabulary = Vocabulary(TOKENS, 7, frozenset({3, 7, 100}))
    assert vocabulary.stop_ids == {3}
    assert (vocabulary.used_size, vocabulary.size) == (7, 7)
    assert vocabulary.hash_of_first(7).hex() == vocabulary_hash(first(7))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"vocabulary_hash": "ab" * 32}, f"{VOCAB} tokens .SHA-256 abababababab…. are not the first of"),
        ({"vocab_size": VOCAB + 1}, f"a draft model of {VOCAB + 1} tokens; the target has {VOCAB}; "),
    ],
)
def test_a_refused_draft_model_is_reported_to_the_user(change: dict[str, object], match: str) -> None:
    station = new_station(stop_ids=(2,))
    manifest = draft_model(stop_ids=(2,)).manifest
    link = Link(MemoryTransport(station), FrameCodec(VOCAB), "memory")
    assert Client(link, manifest).welcome.model == "table"
    with pytest.raises(FaultError, match=f"{match}.*{REMEDY}") as caught:
        Client(link, replace(manifest, **change))  # type: ignore[arg-type]
    assert caught.value.fault_code == "mismatch"


def test_an_old_protocol_version_is_refused_at_hello() -> None:
    device = RawDevice(new_station(), b"a", greet=False)
    fault = device.request(replace(hello(VOCAB), version=OLDEST_VERSION - 1))
    assert isinstance(fault, Fault)
    assert fault.code == "mismatch"
    assert (
        f"version {OLDEST_VERSION - 1}; this base station speaks {OLDEST_VERSION} to {PROTOCOL_VERSION}" in fault.text
    )


@pytest.mark.parametrize(
    "refused_hello", [None, replace(hello(VOCAB), vocabulary_hash=bytes(32))], ids=["none", "refused"]
)
@pytest.mark.parametrize(
    "request_", [open_request(), Draft(0, 1, ()), Decode(0, 1, 1), Extend(0, 1, 0, (1,))], ids=repr
)
def test_requests_before_hello_are_refused(request_: Message, refused_hello: Hello | None) -> None:
    station = new_station()
    RawDevice(station, b"b")  # the Hello of another device does not count
    device = RawDevice(station, b"a", greet=False)
    if refused_hello is not None:
        device.request(refused_hello)
    fault = device.request(request_)
    assert isinstance(fault, Fault)
    assert (fault.code, fault.text) == ("unknown_session", f"{type(request_).__name__} before Hello")
