"""Text to token ids and back, and the chat template, from the files of a bundle."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypedDict

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import DecodeStream

from protocol.bundle import CHAT_TEMPLATE_NAME, TOKENIZER_NAME, Manifest
from protocol.errors import BundleError, SettingsError


class ChatMessage(TypedDict):
    """One message of a conversation; ``role`` is system, user or assistant."""

    role: str
    content: str


class Tokenizer:
    """A bundle's tokenizer, with its chat template if there is one."""

    def __init__(self, bundle: Path, manifest: Manifest) -> None:
        self._tokenizer = FastTokenizer.from_file(str(bundle / TOKENIZER_NAME))
        self._tokens = {"bos_token": manifest.bos_token, "eos_token": manifest.eos_token}
        template = bundle / CHAT_TEMPLATE_NAME
        self._template = template.read_text(encoding="utf-8") if template.is_file() else None

    def encode(self, text: str) -> list[int]:
        """Encode plain text, with the special tokens that the tokenizer adds.

        Raises:
            SettingsError: the text has no tokens.
        """
        return self._encode(text, add_special_tokens=True)

    def encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Encode a conversation, rendered by the chat template, as the prompt for the next answer.

        Raises:
            SettingsError: the bundle has no chat template.
            BundleError: the chat template cannot render the conversation.
        """
        if self._template is None:
            raise SettingsError("prompt", "a conversation", "plain text with --raw: this bundle has no chat template")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        try:
            text = environment.from_string(self._template).render(
                messages=messages, add_generation_prompt=True, **self._tokens
            )
        except TemplateError as error:
            raise BundleError(f"the bundle's chat template refuses the conversation: {error}") from error
        return self._encode(text, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Decode ids, without special tokens."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text

    def decode_stream(self, token_ids: Iterator[int]) -> Iterator[str]:
        """The text that each id adds; empty while a character is incomplete."""
        stream = DecodeStream(skip_special_tokens=True)
        for token_id in token_ids:
            yield stream.step(self._tokenizer, token_id) or ""

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        if not ids:
            raise SettingsError("prompt", text, "a text of at least one token")
        return ids


def _refuse(reason: str) -> None:
    raise TemplateError(reason)
