"""Invariant 8: models that do not match are refused at Hello."""

from dataclasses import replace

import pytest

from device.client import Client
from device.link import Link
from protocol.errors import FaultError
from protocol.frames import FrameCodec
from protocol.messages import OLDEST_VERSION, PROTOCOL_VERSION, Decode, Draft, Extend, Fault, Hello, Message
from tests.invariants import VOCAB_SIZE, draft_model, new_station, open_request
from tests.link_pair import MemoryTransport
from tests.raw_device import RawDevice, hello


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"vocabulary_hash": "ab" * 32}, "tokens are not the target's"),
        ({"vocab_size": VOCAB_SIZE + 1}, f"a draft model of {VOCAB_SIZE + 1} tokens; the target has {VOCAB_SIZE}"),
        ({"stop_ids": (3,)}, r"stops at the tokens \[3\]; the target stops at \[2\]"),
        ({"stop_ids": ()}, r"stops at the tokens \[\]; the target stops at \[2\]"),
    ],
)
def test_a_mismatched_draft_model_is_refused_at_hello(change: dict[str, object], match: str) -> None:
    station = new_station(stop_ids=(2,))
    manifest = draft_model(stop_ids=(2,)).manifest
    link = Link(MemoryTransport(station), FrameCodec(VOCAB_SIZE), "memory")
    assert Client(link, manifest).welcome.model == "table"
    with pytest.raises(FaultError, match=match) as caught:
        Client(link, replace(manifest, **change))  # type: ignore[arg-type]
    assert caught.value.fault_code == "mismatch"


def test_an_old_protocol_version_is_refused_at_hello() -> None:
    device = RawDevice(new_station(), b"a", greet=False)
    fault = device.request(replace(hello(VOCAB_SIZE), version=OLDEST_VERSION - 1))
    assert isinstance(fault, Fault)
    assert fault.code == "mismatch"
    assert (
        f"version {OLDEST_VERSION - 1}; this base station speaks {OLDEST_VERSION} to {PROTOCOL_VERSION}" in fault.text
    )


@pytest.mark.parametrize(
    "refused_hello", [None, replace(hello(VOCAB_SIZE), vocabulary_hash=bytes(32))], ids=["none", "refused"]
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
