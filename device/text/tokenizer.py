"""Text to token ids and back, and the chat template, from the files of a bundle.

Text inside a message never becomes a control token: a user who types ``<|im_end|>``
does not end the turn.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from tokenizers import Encoding
from tokenizers import Tokenizer as FastTokenizer

from common.chat_template import ChatTemplate
from common.grammar import Grammar, GrammarCompiler
from device.text.prompt import Prompt
from device.text.tool_calls import ToolFormat
from device.text.unicode import check_unicode
from protocol.bundle import (
    CHAT_TEMPLATE_NAME,
    DRAFT_CHAT_TEMPLATE_NAME,
    DRAFT_TOKENIZER_NAME,
    TOKENIZER_NAME,
    Manifest,
)
from protocol.errors import BundleError, SettingsError

logger = logging.getLogger(__name__)

_PRIVATE_USE = range(0xE000, 0xF900)
_REPLACEMENT = "\ufffd"
_MAX_GRAMMARS = 8
_MAX_GUESS = 2**18
"""Characters: more than an answer has, and encoded in a tenth of a second."""


class ChatMessage(TypedDict):
    """One message of a conversation; ``role`` is system, user, assistant or tool.

    Assistants may have ``tool_calls``, tools a ``tool_call_id`` and a ``name``.
    """

    role: str
    content: str
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]


class Tokenizer:
    """A bundle's tokenizer, with its chat template if there is one.

    Where the draft model has a vocabulary of its own, prompts are also encoded with its tokenizer and chat template.

    Args:
        bundle: the bundle.
        manifest: of the bundle.
        of_draft_model: the draft model's own tokenizer instead of the session's.

    Raises:
        BundleError: the tokenizer or the chat template cannot be read.
    """

    def __init__(self, bundle: Path, manifest: Manifest, *, of_draft_model: bool = False) -> None:
        own = manifest.draft_vocabulary if of_draft_model else None
        template_name = DRAFT_CHAT_TEMPLATE_NAME if own else CHAT_TEMPLATE_NAME
        self._path = bundle / (DRAFT_TOKENIZER_NAME if own else TOKENIZER_NAME)
        try:
            self._tokenizer = FastTokenizer.from_file(str(self._path))
        except Exception as error:  # the library raises Exception itself
            raise BundleError(f"{str(self._path)!r} cannot be read: {error}; export the bundle again") from error
        self._added_ids = frozenset(self._tokenizer.get_added_tokens_decoder())
        self._manifest = manifest
        self._compiler = lru_cache(1)(self._new_compiler)
        self._compiled = lru_cache(_MAX_GRAMMARS)(self._compile)
        self._template: ChatTemplate | None = None
        if template_name in manifest.files:
            source = own or manifest
            special = {"bos_token": source.bos_token, "eos_token": source.eos_token}
            self._template = ChatTemplate((bundle / template_name).read_text(encoding="utf-8"), special)
        self._draft: Tokenizer | None = None
        if manifest.draft_vocabulary and not of_draft_model:
            self._draft = Tokenizer(bundle, manifest, of_draft_model=True)

    def encode(self, text: str) -> Prompt:
        """Encode plain text, with the special tokens that the tokenizer adds; control tokens in it count as such.

        Raises:
            SettingsError: the text has no tokens.
        """
        check_unicode("prompt", text)
        ids = _encoding(self._tokenizer, text, add_special_tokens=True).ids
        return Prompt(_not_empty(text, ids), self._draft.encode(text) if self._draft else ())

    @property
    def added_tokens(self) -> frozenset[str]:
        """Texts that are one token each wherever they stand, such as marks of a chat template."""
        return frozenset(token.content for token in self._tokenizer.get_added_tokens_decoder().values())

    @property
    def tool_format(self) -> ToolFormat | None:
        """How the model writes calls of tools; None where its template knows no tools, or the format is not known."""
        template = self._template
        return ToolFormat.of_template(template.source) if template and template.knows_tools else None

    def encode_chat(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Mapping[str, Any]] = (),
        continue_final: bool = False,
    ) -> Prompt:
        """Encode a conversation, rendered by the chat template, as the prompt for the next answer.

        Args:
            messages: of the conversation.
            tools: that the answer may call.
            continue_final: whether the answer continues the last message, instead of following it.

        Raises:
            SettingsError: the bundle has no chat template, or the text is not Unicode or has every private-use
                character.
            BundleError: the chat template cannot render the conversation.
        """
        if self._template is None:
            raise SettingsError("prompt", "a conversation", "plain text with --raw: this bundle has no chat template")
        for text in _texts([messages, tools]):
            check_unicode("prompt", text)
        mark = _unused_character([messages, tools])
        marked, marked_tools = self._marked(messages, mark), self._marked(tools, mark)
        if continue_final:
            text = _render_to_final_content(self._template, marked, marked_tools)
        else:
            text = self._template.render(marked, tools=marked_tools)
        ids = _not_empty(text, self._encode_marked(text, mark))
        return Prompt(ids, self._draft_prompt(messages, tools, continue_final))

    def encode_guess(self, text: str) -> list[int]:
        """The tokens of what an answer perhaps is: as text, also control tokens; of a long text the first."""
        return self._encode_plain(text[:_MAX_GUESS], first=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Decode ids, without special tokens."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text

    def token_text(self, token_id: int) -> str:
        """The text of one token, also of a special one; "�" for a part of a character."""
        text: str = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return text

    def grammar(self, text: str, stop_ids: frozenset[int]) -> Grammar:
        """A grammar for the draft model's tokens, before the first of them.

        Args:
            text: as in ``common/grammar.py``.
            stop_ids: the target's.

        Raises:
            GrammarError: it cannot be compiled.
        """
        grammar = self._compiled(text, stop_ids)
        if grammar.exhausted:
            self._compiled.cache_clear()
            grammar = self._compiled(text, stop_ids)
        return grammar.copy()

    def _compile(self, text: str, stop_ids: frozenset[int]) -> Grammar:
        return self._compiler(stop_ids).compile(text)

    def _new_compiler(self, stop_ids: frozenset[int]) -> GrammarCompiler:
        vocab_size = self._manifest.vocab_size
        known = frozenset(token_id for token_id in stop_ids if token_id < vocab_size)
        return GrammarCompiler.of_tokenizer(self._path.read_text(encoding="utf-8"), vocab_size, known)

    def decode_stream(self, token_ids: Iterator[int]) -> Iterator[str]:
        """The text that each id adds, then what is left; empty while a character is incomplete.

        It is that of ``decode``, except after bytes that are not UTF-8: text that was yielded stays as it is.
        """
        before: list[int] = []
        new: list[int] = []
        for token_id in token_ids:
            new.append(token_id)
            text = self._added_text(before, new)
            if not text or text.endswith(_REPLACEMENT):
                yield ""
                continue
            before, new = new, []
            yield text
        if rest := self._added_text(before, new):
            yield rest

    def _added_text(self, before: Sequence[int], new: Sequence[int]) -> str:
        """The text that ``new`` ids add to that of the ids ``before`` them.

        A decoder with byte fallback replaces all bytes in a row, also those before, where some are not UTF-8.
        """
        known, whole = self.decode(before), self.decode([*before, *new])
        return whole[len(known) :] if whole.startswith(known) else self.decode(new)

    def _draft_prompt(
        self, messages: Sequence[ChatMessage], tools: Sequence[Mapping[str, Any]], continue_final: bool
    ) -> list[int]:
        """The conversation by the draft model's own chat template; empty where that cannot render it."""
        template = self._draft._template if self._draft else None
        if self._draft is None or template is None or (tools and not template.knows_tools):
            return []
        try:
            return self._draft.encode_chat(messages, tools, continue_final)
        except BundleError as error:
            logger.info("the draft model gets the target's prompt: %s", error)
            return []

    def _marked(self, value: Any, mark: str) -> Any:
        """A value of JSON with all its texts but the names of fields marked."""
        if isinstance(value, Mapping):
            return {name: self._marked(entry, mark) for name, entry in value.items()}
        if isinstance(value, list | tuple):
            return [self._marked(entry, mark) for entry in value]
        return self._mark(value, mark) if isinstance(value, str) else value

    def _mark(self, content: str, mark: str) -> str:
        """The content with ``mark`` before each added token that the tokenizer would find in it.

        Tokens for white space, such as Gemma's for two new lines, are no control tokens and stay.
        """
        parts, end = [], 0
        for start, stop, _ in self._find_added(content):
            if content[start:stop].isspace():
                continue
            parts += [content[end:start], mark, content[start:stop]]
            end = stop
        return "".join([*parts, content[end:]])

    def _find_added(self, text: str) -> list[tuple[int, int, int]]:
        """Start, end and id of each added token in a text."""
        encoding = _encoding(self._tokenizer, text)
        return [
            (start, end, token_id)
            for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
            if token_id in self._added_ids
        ]

    def _encode_marked(self, text: str, mark: str) -> list[int]:
        """Encode rendered text; an added token behind a ``mark`` is plain text."""
        if mark not in text:
            return list(_encoding(self._tokenizer, text).ids)
        ids: list[int] = []
        begin = 0
        for start, end, token_id in self._find_added(text):
            if text[max(0, start - 1) : start] == mark or text[start : start + 1] == mark:
                continue
            ids += self._encode_plain(text[begin:start].replace(mark, ""), first=begin == 0)
            ids.append(token_id)
            begin = end
        return ids + self._encode_plain(text[begin:].replace(mark, ""), first=begin == 0)

    def _encode_plain(self, text: str, first: bool) -> list[int]:
        """Encode text in which no added token counts; ``first`` where nothing precedes it."""
        return list(_encoding(self._plain_first if first else self._plain_rest, text).ids)

    @cached_property
    def _plain_first(self) -> FastTokenizer:
        return self._without_added("first")

    @cached_property
    def _plain_rest(self) -> FastTokenizer:
        return self._without_added("never")

    def _without_added(self, prepend_scheme: str) -> FastTokenizer:
        """The tokenizer without its added tokens; ``prepend_scheme`` replaces a Metaspace's "first"."""
        content = json.loads(self._path.read_text(encoding="utf-8"))
        content["added_tokens"] = []
        for part in _pre_tokenizers(content.get("pre_tokenizer")):
            if part.get("type") == "Metaspace" and part.get("prepend_scheme") == "first":
                part["prepend_scheme"] = prepend_scheme
        return FastTokenizer.from_str(json.dumps(content))


def _encoding(tokenizer: FastTokenizer, text: str, add_special_tokens: bool = False) -> Encoding:
    """Encode a text; unlike ``encode``, ``encode_batch`` lets other threads run meanwhile."""
    (encoding,) = tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
    return encoding


def _render_to_final_content(
    template: ChatTemplate, messages: Sequence[dict[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> str:
    """The text of a conversation up to the end of its last message's content.

    Raises:
        BundleError: the template does not show that content.
    """
    end = _unused_character([messages, tools])
    final = messages[-1] | {"content": messages[-1]["content"] + end}
    text = template.render([*messages[:-1], final], add_generation_prompt=False, tools=tools)
    if end not in text:
        raise BundleError("the chat template does not show the last message; send it without continue_final_message")
    return text.rpartition(end)[0]


def _pre_tokenizers(part: Any) -> Iterator[dict[str, Any]]:
    if part:
        yield part
        for inner in part.get("pretokenizers", ()):
            yield from _pre_tokenizers(inner)


def _texts(value: Any) -> Iterator[str]:
    """All texts in a value of JSON, the names of fields included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts([*value, *value.values()])
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _texts(entry)


def _unused_character(messages: Any) -> str:
    """A private-use character that no message contains.

    Raises:
        SettingsError: there is none.
    """
    used = {character for text in _texts(messages) for character in text}
    unused = next((character for code in _PRIVATE_USE if (character := chr(code)) not in used), None)
    if unused is None:
        raise SettingsError("prompt", "a text with every private-use character", "any text without one of them")
    return unused


def _not_empty(text: str, ids: list[int]) -> list[int]:
    if not ids:
        raise SettingsError("prompt", text, "a text of at least one token")
    return ids
