"""Invariant 1: the device samples from the distribution that the base station decodes.

tests/test_protocol_sparse.py tests the encoding; here the frames of whole answers are decoded.
"""

from collections.abc import Iterator, Sequence

import pytest

from device.settings import DraftSettings
from protocol.messages import Draft, Verdict
from protocol.randomness import Stream, random_bits
from tests.invariants import (
    PROMPT,
    SAMPLED_SETTINGS,
    RecordingTransport,
    draft_model,
    new_station,
    settings_name,
    token_ids_of,
)
from tests.link_pair import join, open_session
from tests.raw_device import CODEC


def drafts_by_position(uplink: Sequence[bytes], downlink: Sequence[bytes]) -> Iterator[tuple[int, Draft]]:
    """The Drafts of an answer, each with the number of tokens committed before it."""
    drafts = [message for message in map(CODEC.decode, uplink) if isinstance(message, Draft)]
    verdicts = [message for message in map(CODEC.decode, downlink) if isinstance(message, Verdict)]
    committed = len(PROMPT)
    for draft, verdict in zip(drafts, verdicts, strict=True):
        yield committed, draft
        committed += verdict.accepted + 1


@pytest.mark.parametrize("settings", SAMPLED_SETTINGS, ids=settings_name)
def test_each_drafted_token_is_sampled_from_the_decoded_distribution(settings: DraftSettings) -> None:
    station, model = new_station(), draft_model()
    transport = RecordingTransport(station)
    client, _ = join(station, model, transport)
    session = open_session(client, settings, model, PROMPT)
    token_ids_of(session)
    checked = 0
    for committed, draft in drafts_by_position(transport.uplink, transport.downlink):
        first_drafted = committed if settings.block_verification else None
        for index, (token_id, decoded) in enumerate(zip(draft.token_ids, draft.distributions, strict=True)):
            word = random_bits(settings.sampling.seed, committed + index, Stream.DRAFT, first_drafted)
            assert decoded.sample(word) == token_id
            checked += 1
    assert checked == session.counters.drafted > 0
