"""The sample pair through a relay that is cut: what the draft model adds alone is verified once the link is back."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from bench.setup.bench_setup import BenchSetup, connected
from device.answers.answer import TextChunk
from device.planning.planners import Planners
from device.session.session import Origin
from device.settings import DraftSettings, Timeouts
from protocol.messages import Mode, Sampling
from tests.outages import Reader
from tests.relay import CountingRelay, port_of

PROMPT, COUNT, ALONE = "Describe how a refrigerator keeps food cold.", 96, 12
UNREACHABLE_PORT = 1
SETTINGS = [
    DraftSettings(Mode.IDS, Sampling(), 1, None, drafts_ahead=None),
    DraftSettings(Mode.COUPLED, Sampling(1.0, seed=5), 1, 4, drafts_ahead=0),
]

pytestmark = pytest.mark.model


class RelayCut(Reader):
    """Reads an answer; cuts the link after ``cut_at`` tokens, and restores it after some unverified ones."""

    def __init__(self, relay: CountingRelay, cut_at: int) -> None:
        super().__init__()
        self.alone = 0
        self._relay = relay
        self._station_port = relay.station_port
        self._tokens, self._cut_at = 0, cut_at
        self._cut_if_due()

    def show(self, chunk: TextChunk) -> None:
        super().show(chunk)
        self._tokens += 1
        self._cut_if_due()

    def _cut_if_due(self) -> None:
        if self._tokens == self._cut_at:
            self._relay.station_port = UNREACHABLE_PORT
            self._relay.drop_connections()

    def show_unverified(self, chunk: TextChunk) -> bool:
        self.alone += 1
        if self.alone == ALONE:
            self._relay.station_port = self._station_port
        return super().show_unverified(chunk)


@contextmanager
def device(setup: BenchSetup, relay: CountingRelay) -> Iterator[BenchSetup]:
    planners, timeouts = Planners(setup.model.manifest.quality), Timeouts(outage=1.0)
    model = setup.model.fork(0)
    with connected(model, setup.tokenizer, f"tcp://127.0.0.1:{relay.port}", planners, timeouts) as bridging:
        yield bridging


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings.mode)
@pytest.mark.parametrize("cut_at", [0, 20])
def test_an_answer_over_a_link_that_is_cut_is_the_targets_own(
    settings: DraftSettings, cut_at: int, station_address: str, sample_setup: BenchSetup
) -> None:
    alone = DraftSettings(Mode.TARGET, settings.sampling, 1, None)
    ids = sample_setup.prompt_ids(PROMPT)
    expected = sample_setup.answer(ids, COUNT, alone)
    with (
        CountingRelay(port_of(station_address)) as relay,
        device(sample_setup, relay) as setup,
    ):
        reader, conversation = RelayCut(relay, cut_at), setup.conversation(settings)
        answer = reader.read(conversation.ask(ids, COUNT, show_unverified=reader.show_unverified))
        conversation.close()
    assert reader.alone >= ALONE
    assert answer.unverified == 0
    assert answer.token_ids == expected.token_ids
    assert reader.text == answer.text == expected.text
    assert Origin.ACCEPTED in answer.origins
