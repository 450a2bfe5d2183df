"""A draft model and a greeted base station, set up once for many measured answers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from device.answers.answer import Answer, Conversation
from device.drafting.draft_model import SequenceModel
from device.drafting.load_model import load_model
from device.link.link import Link
from device.planning.planners import Planners
from device.session.client import Client
from device.session.session import DeviceSession
from device.settings import DraftSettings, Timeouts
from device.text.tokenizer import Tokenizer
from protocol.frames import FrameCodec


@dataclass(frozen=True)
class BenchSetup:
    """A loaded draft model with its tokenizer, and the client of a greeted base station."""

    model: SequenceModel
    tokenizer: Tokenizer
    client: Client
    planners: Planners

    def prompt_ids(self, prompt: str, max_len: int | None = None) -> list[int]:
        """A user message rendered by the chat template, truncated to ``max_len`` tokens."""
        ids = self.tokenizer.encode_chat([{"role": "user", "content": prompt}])
        return ids if max_len is None else ids[:max_len]

    def session(self, settings: DraftSettings, prompt_ids: list[int]) -> DeviceSession:
        """A new session; close it after use."""
        planner = self.planners.for_settings(settings, self.client.welcome)
        return DeviceSession(self.client, planner, settings, self.model, prompt_ids)

    def conversation(self, settings: DraftSettings) -> Conversation:
        """A new conversation; close it after use."""
        return Conversation(self.client, self.planners, self.model, self.tokenizer, settings)

    def answer(self, prompt_ids: list[int], max_new_tokens: int, settings: DraftSettings) -> Answer:
        """One answer in a session of its own."""
        conversation = self.conversation(settings)
        stream = conversation.ask(prompt_ids, max_new_tokens)
        for _ in stream:
            pass
        conversation.close()
        return stream.answer


@contextmanager
def bench_setup(bundle: Path, address: str) -> Iterator[BenchSetup]:
    """Load the bundle, and greet the base station at ``address``."""
    model = load_model(bundle)
    planners = Planners(model.manifest.target_quality)
    with connected(model, Tokenizer(bundle, model.manifest), address, planners) as setup:
        yield setup


@contextmanager
def connected(
    model: SequenceModel, tokenizer: Tokenizer, address: str, planners: Planners, timeouts: Timeouts | None = None
) -> Iterator[BenchSetup]:
    """Greet the base station at ``address`` with a loaded model."""
    link = Link.connect(address, FrameCodec(model.manifest.vocab_size))
    try:
        yield BenchSetup(model, tokenizer, Client(link, model.manifest, timeouts), planners)
    finally:
        link.close()
