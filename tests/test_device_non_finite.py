"""A draft model whose logits are not finite ends the answer it drafts for; base station and service go on."""

from typing import cast

import numpy as np
import pytest
from starlette.testclient import TestClient

from device.answers.worker import Worker
from device.drafting.draft_model import DraftModel
from device.http.service import Access, application
from device.settings import DraftSettings
from device.text.tokenizer import Tokenizer
from protocol.errors import NonFiniteError
from protocol.messages import Close, Mode, Open, Sampling
from tests.fakes import PROMPT, FakeDraftModel, FakeTarget, target_alone
from tests.link_pair import MemoryTransport, Station, join, open_session
from tests.number_service import DEFAULTS, TARGET, NumberTokenizer, complete, text_of

DAMAGED = 7
"""The draft model's logits after this token are not finite."""
DAMAGED_PROMPT = [3, 1, DAMAGED, 5]


def damaged_model(value: float) -> DraftModel:
    table = TARGET.copy()
    table[:, DAMAGED] = value
    return FakeDraftModel.make(table)


def prompt_fields(token_ids: list[int]) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": " ".join(map(str, token_ids))}], "max_tokens": 3}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("prompt", [[3, 1, DAMAGED], [DAMAGED, 3, 1, DAMAGED, 2]])
def test_the_service_answers_with_an_error_and_serves_the_next_request(
    prompt: list[int], value: float, stream: bool
) -> None:
    station, model = Station(FakeTarget.make(TARGET)), damaged_model(value)
    transport = MemoryTransport(station)
    worker = Worker(
        model, cast(Tokenizer, NumberTokenizer()), lambda: join(station, model, transport)[0], 4096, lambda: 0.0
    )
    worker.start()
    try:
        client = TestClient(application(worker, "numbers", DEFAULTS, Access()))
        refused = complete(client, **prompt_fields(prompt), stream=stream)
        answered = [complete(client, **prompt_fields(PROMPT)) for _ in range(2)]
    finally:
        worker.stop(5)
    if prompt[-1] == DAMAGED:
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == NonFiniteError.code
        assert "NaN or infinite" in refused.json()["error"]["message"]
    else:  # run together with a token whose logits are finite
        assert refused.status_code == 200
    for one in answered:
        assert one.status_code == 200
        assert one.json()["choices"][0]["message"]["content"] == text_of(target_alone(TARGET, PROMPT, 3))
    sent = [station.codec.decode(frame) for frame in transport.uplink]
    opened, closed = ({one.session_id for one in sent if isinstance(one, kind)} for kind in (Open, Close))
    assert opened == closed


def test_another_session_of_the_base_station_goes_on() -> None:
    station = Station(FakeTarget.make(TARGET))
    settings = DraftSettings(Mode.IDS, Sampling(), 4, 2)
    sound, damaged = FakeDraftModel.make(TARGET), damaged_model(np.nan)
    other_client, _ = join(station, sound, MemoryTransport(station, b"b"))
    other = open_session(other_client, settings, sound, PROMPT)
    tokens = [token.token_id for token, _ in zip(other.answer(12), range(5), strict=False)]
    client, _ = join(station, damaged, MemoryTransport(station, b"a"))
    with pytest.raises(NonFiniteError):
        list(open_session(client, settings, damaged, [3, 1, DAMAGED]).answer(4))
    tokens = other.tokens[len(PROMPT) :]
    tokens += [token.token_id for token in other.answer(12 - len(tokens))]
    assert tokens == target_alone(TARGET, PROMPT, 12)


def test_a_last_token_that_fails_while_waiting_ends_the_session_cleanly() -> None:
    """The device runs its last drafted token while the Verdict is on its way."""
    drafted = target_alone(TARGET, PROMPT, 2)
    table = TARGET.copy()
    table[drafted[0], drafted[1]] = np.nan
    station, model = Station(FakeTarget.make(TARGET)), FakeDraftModel.make(table)
    transport = MemoryTransport(station)
    client, _ = join(station, model, transport)
    session = open_session(client, DraftSettings(Mode.IDS, Sampling(), 4, 2), model, PROMPT)
    with pytest.raises(NonFiniteError):
        list(session.answer(8))
    session.close()
    while station.engine.busy:
        station.engine.step()
    assert isinstance(station.codec.decode(transport.uplink[-1]), Close)
    assert station.engine.idle
