"""A device and a base station set up for measurement: one draft model, one station, many answers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from device.answer import Answer, Conversation
from device.client import Client
from device.draft_model import DraftModel
from device.link import Link
from device.session import DraftSettings
from device.tokenizer import Tokenizer
from protocol.bundle import Manifest
from protocol.frames import FrameCodec


@dataclass(frozen=True)
class BenchSetup:
    """A loaded draft model with its tokenizer, greeted at a base station."""

    model: DraftModel
    tokenizer: Tokenizer
    link: Link
    client: Client

    def prompt_ids(self, prompt: str, max_len: int | None = None) -> list[int]:
        """A user's words through the chat template, cut to ``max_len`` tokens."""
        return self.tokenizer.encode_chat([{"role": "user", "content": prompt}])[:max_len]

    def conversation(self, settings: DraftSettings) -> Conversation:
        """A new conversation; close it after use."""
        return Conversation(self.link, self.client, self.model, self.tokenizer, settings)

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
    """Load the bundle and greet the base station at ``address``."""
    model = DraftModel(bundle)
    with connected(model, Tokenizer(bundle, model.manifest), address, Client) as place:
        yield place


@contextmanager
def connected(
    model: DraftModel, tokenizer: Tokenizer, address: str, greet: Callable[[Link, Manifest], Client]
) -> Iterator[BenchSetup]:
    """A loaded model, greeted at ``address``."""
    link = Link.connect(address, FrameCodec(model.manifest.vocab_size))
    try:
        yield BenchSetup(model, tokenizer, link, greet(link, model.manifest))
    finally:
        link.close()
