"""The predicted tokens per second against those of an answer, in a time that advances by known steps."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from device.drafting.draft_model import DraftModel
from device.link.link import Link
from device.planning.planner import Planner
from device.planning.speed_prediction import _PROMPTS, ShortSession, SpeedPrediction
from device.session.client import Client
from device.session.session import DeviceSession
from device.settings import DraftSettings, Timeouts
from device.text.tokenizer import ChatMessage, Tokenizer
from protocol.errors import ModelError, SettingsError
from protocol.frames import FrameCodec
from protocol.messages import Message, Mode, Sampling, Verdict
from tests.fakes import TARGET, VOCAB, FakeDraftModel, FakeTarget, Table, blend, manifest, random_table
from tests.link_pair import MemoryTransport, Station

TOLERANCE = 0.25
IDS = DraftSettings(Mode.IDS, Sampling(), 1, None)
ALONE = DraftSettings(Mode.TARGET, Sampling(), 1, None)
ANSWER = 128


@dataclass
class Site:
    """A link and models whose steps take these seconds."""

    draft: float
    target: float
    round_trip: float
    table: Table
    now: float = 0.0
    target_table: Table = field(default_factory=lambda: TARGET)
    stop_ids: frozenset[int] = frozenset()

    def client(self) -> Client:
        link = Link(TimedTransport(self), FrameCodec(VOCAB), "memory")
        return Client(link, manifest(VOCAB), Timeouts(), clock=lambda: self.now)

    def model(self) -> DraftModel:
        return cast(DraftModel, TimedDraftModel(self))


class TimedTransport(MemoryTransport):
    """Each first reply takes a round trip, and each Verdict a forward pass."""

    def __init__(self, site: Site) -> None:
        super().__init__(Station(FakeTarget.make(site.target_table, site.stop_ids)))
        self.site = site
        self.awaits_first = False

    def send(self, frame: bytes) -> None:
        super().send(frame)
        self.awaits_first = True

    def receive(self, timeout: float) -> bytes | None:
        frame = super().receive(timeout)
        if frame is not None:
            message: Message = self.station.codec.decode(frame)
            self.site.now += self.site.round_trip * self.awaits_first
            self.site.now += self.site.target * isinstance(message, Verdict)
            self.awaits_first = False
        return frame


class TimedDraftModel(FakeDraftModel):
    """Each forward pass takes time."""

    def __init__(self, site: Site) -> None:
        super().__init__(site.table, manifest(VOCAB))
        self.site = site

    def forward(self, token_ids: Sequence[int]) -> Any:
        self.site.now += self.site.draft
        return super().forward(token_ids)


class LengthTokenizer:
    """A prompt has tokens that depend on its length."""

    def __init__(self, has_template: bool = True) -> None:
        self.has_template = has_template

    def encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        if not self.has_template:
            raise SettingsError("prompt", "a conversation", "plain text")
        return self.encode(messages[0]["content"])

    def encode(self, text: str) -> list[int]:
        return [len(text) % VOCAB, 3, len(text) % 7]


def predicted(site: Site, settings: DraftSettings = IDS, has_template: bool = True) -> SpeedPrediction:
    tokenizer = cast(Tokenizer, LengthTokenizer(has_template))
    session = ShortSession(site.client(), site.model(), tokenizer, settings, lambda: site.now)
    return session.predict(ANSWER)


def measured(site: Site, settings: DraftSettings = IDS) -> float:
    """Tokens per second of a few answers, each with a planner that knows nothing."""
    began, client, model = site.now, site.client(), site.model()
    prompts = [[3, 1, 4], [1, 5, 9], [2, 6, 5], [8, 2, 8]]
    for prompt in prompts:
        planner = Planner(model.manifest.quality, greedy=True)
        session = DeviceSession(client, planner, settings, model, prompt)
        assert len(list(session.answer(ANSWER))) == ANSWER
        session.close()
    return len(prompts) * ANSWER / (site.now - began)


@pytest.mark.parametrize("round_trip", [0.0, 0.05])
@pytest.mark.parametrize("likeness", [1.0, 0.85, 0.7])
@pytest.mark.parametrize("draft", [0.002, 0.01])
def test_an_answer_is_as_fast_as_predicted(draft: float, likeness: float, round_trip: float) -> None:
    table = blend(TARGET, random_table(VOCAB, seed=2), likeness)
    prediction = predicted(Site(draft, 0.03, round_trip, table))
    speed = measured(Site(draft, 0.03, round_trip, table))
    assert prediction.drafting_tokens_per_second is not None
    best = max(prediction.drafting_tokens_per_second, prediction.target_tokens_per_second)
    assert abs(best / speed - 1) < TOLERANCE, f"predicted {best:.1f}, measured {speed:.1f}; {prediction.text}"


@pytest.mark.parametrize("round_trip", [0.0, 0.05])
def test_the_target_alone_is_as_fast_as_predicted(round_trip: float) -> None:
    prediction = predicted(Site(0.01, 0.03, round_trip, TARGET), ALONE)
    assert prediction.drafting_tokens_per_second is None
    assert prediction.target_tokens_per_second == pytest.approx(
        measured(Site(0.01, 0.03, round_trip, TARGET), ALONE), rel=0.05
    )


def test_a_draft_model_slower_than_the_target_does_not_pay() -> None:
    assert not predicted(Site(0.05, 0.03, 0.0, TARGET)).pays
    assert predicted(Site(0.005, 0.03, 0.0, TARGET)).pays


def ending_at_once(*prompts: str) -> Site:
    """A target that ends its answers to these prompts after one token, and no other answer."""
    table, stop_id = TARGET.copy(), 0
    table[:, :, stop_id] = -20.0
    for prompt in prompts:
        *_, before, last = LengthTokenizer().encode(prompt)
        table[before, last, stop_id] = 20.0
    return Site(0.005, 0.03, 0.0, table, target_table=table, stop_ids=frozenset({stop_id}))


@pytest.mark.parametrize("settings", [ALONE, IDS])
def test_a_target_that_ends_one_answer_at_once_is_measured_with_another(settings: DraftSettings) -> None:
    assert predicted(ending_at_once(_PROMPTS[-1]), settings).target_seconds == pytest.approx(0.03, rel=0.2)


@pytest.mark.parametrize("settings", [ALONE, IDS])
def test_a_target_that_ends_every_answer_at_once_is_refused_by_name(settings: DraftSettings) -> None:
    with pytest.raises(ModelError, match="the target table ends each answer after one token"):
        predicted(ending_at_once(*_PROMPTS), settings)


def test_a_bundle_without_a_chat_template_is_measured_too() -> None:
    assert predicted(Site(0.005, 0.03, 0.0, TARGET), has_template=False).pays


def test_a_slow_pair_is_measured_with_one_drafted_answer() -> None:
    site = Site(0.5, 2.0, 0.0, TARGET)
    prediction = predicted(site)
    assert prediction.draft_seconds == pytest.approx(0.5, rel=0.2)
    assert site.now < 19 * 2 + 60
