"""Tools, and their calls in an answer's text: how a family of models writes them, and how they are read.

Hermes and Qwen write ``<tool_call>`` and ``</tool_call>`` around the JSON of each
call. Llama 3 answers with the JSON of one call alone.
"""

import json
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeAlias

from common.grammar import JSON_OPTIONS, lark_grammar
from device.text.unicode import is_unicode

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_PYTHON = "<|python_tag|>"
_BY_NAME = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")
"""Of a JSON schema, the parts that are schemas by names of the author's."""
_VALUES = ("const", "enum", "default", "examples")
"""The parts that are no schemas."""
ToolCallPart: TypeAlias = "str | ToolCall"


@dataclass(frozen=True)
class Tools:
    """Tools that a model may call.

    Attributes:
        known: as OpenAI's API describes them, for the chat template.
        forced: those of which the answer must call one; empty where it need not.
        parallel: whether an answer may have several calls.
    """

    known: Sequence[Mapping[str, Any]] = ()
    forced: Sequence[Mapping[str, Any]] = ()
    parallel: bool = True

    @property
    def names(self) -> frozenset[str]:
        """Names of the known tools."""
        return frozenset(tool["function"]["name"] for tool in self.known)


@dataclass(frozen=True)
class ToolCall:
    """A call: the tool's name, its arguments as JSON text, and an id that its result refers to."""

    name: str
    arguments: str
    call_id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}", compare=False)


class ToolFormat(StrEnum):
    """How a model writes calls; the value is the name of the arguments in their JSON."""

    HERMES = "arguments"
    LLAMA3 = "parameters"

    @classmethod
    def of_template(cls, source: str) -> "ToolFormat | None":
        """The format that a chat template declares; None for one that is not known."""
        if _OPEN in source:
            return cls.HERMES
        return cls.LLAMA3 if '"parameters"' in source and "ipython" in source else None

    def grammar(self, tools: Sequence[Mapping[str, Any]], added_tokens: Collection[str] = ()) -> str:
        """The grammar of exactly one call of one of the ``tools``.

        Args:
            tools: of the request.
            added_tokens: texts that the tokenizer writes as one token each, which a grammar must name as such.
        """
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool["function"]["name"]},
                    self.value: _moved(
                        tool["function"].get("parameters") or {"type": "object", "properties": {}},
                        f"#/anyOf/{index}/properties/{self.value}",
                    ),
                },
                "required": ["name", self.value],
                "additionalProperties": False,
            }
            for index, tool in enumerate(tools)
        ]
        schema = json.dumps({"anyOf": calls, "x-guidance": JSON_OPTIONS})
        start = "call"
        if self is ToolFormat.HERMES:
            opening, closing = (mark if mark in added_tokens else f'"{mark}"' for mark in (_OPEN, _CLOSE))
            start = f'{opening} "\\n" call "\\n" {closing}'
        return lark_grammar(f"start: {start}\ncall: %json {schema}")

    def parser(self, names: Collection[str]) -> "ToolCallParser":
        """A parser of one answer; what calls none of the tools with these ``names`` is text."""
        return HermesParser(names) if self is ToolFormat.HERMES else Llama3Parser(names)


class HermesParser:
    """Reads an answer part by part; the text of a call is held back until it ends."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._inside = False
        self._called = False
        self._held = ""

    def feed(self, text: str) -> list[ToolCallPart]:
        """Add ``text``; return the text and the calls that are complete."""
        self._held += text
        parts: list[ToolCallPart] = []
        while (mark := _CLOSE if self._inside else _OPEN) in self._held:
            before, self._held = self._held.split(mark, 1)
            if self._inside:
                call = _read(before, ToolFormat.HERMES, self._names)
                parts.append(call or f"{_OPEN}{before}{_CLOSE}")
                self._called = call is not None
            else:
                parts += self._shown(before)
            self._inside = not self._inside
        if not self._inside:
            end = len(self._held) - _partial(self._held, _OPEN)
            if shown := self._shown(self._held[:end]):
                parts += shown
                self._held = self._held[end:]
        return parts

    def flush(self) -> list[ToolCallPart]:
        """What is held back, once no more follows: a call whose end is missing, or text."""
        if self._inside:
            return [_read(self._held, ToolFormat.HERMES, self._names) or _OPEN + self._held]
        return self._shown(self._held)

    def _shown(self, text: str) -> list[ToolCallPart]:
        """Text outside of calls; white space after a call belongs to its format."""
        return [text] if text and not (self._called and text.isspace()) else []


class Llama3Parser:
    """Reads an answer that is a call as a whole, or else text."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._held = ""
        self._is_text = False

    def feed(self, text: str) -> list[ToolCallPart]:
        """Add ``text``; return it unless it may be a call."""
        self._held += text
        start = self._held.lstrip()
        if not self._is_text and (not start or start[0] == "{" or _PYTHON.startswith(start[: len(_PYTHON)])):
            return []
        self._is_text = True
        text, self._held = self._held, ""
        return [text]

    def flush(self) -> list[ToolCallPart]:
        """The call, or the text that looked like one."""
        if not self._held:
            return []
        text = self._held.strip().removeprefix(_PYTHON)
        return [_read(text, ToolFormat.LLAMA3, self._names) or self._held]


ToolCallParser: TypeAlias = HermesParser | Llama3Parser


def _moved(schema: Any, pointer: str) -> Any:
    """A JSON schema as a part of another one, at ``pointer``: references to its own parts lead there."""
    if isinstance(schema, list):
        return [_moved(entry, pointer) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    moved: dict[str, Any] = {}
    for name, part in schema.items():
        if name in _BY_NAME and isinstance(part, dict):
            moved[name] = {own: _moved(inner, pointer) for own, inner in part.items()}
        else:
            moved[name] = part if name in _VALUES else _moved(part, pointer)
    reference = schema.get("$ref")
    if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
        moved["$ref"] = pointer + reference[1:]
    return moved


def _partial(text: str, mark: str) -> int:
    """How many characters at the end of a text may be the start of a mark."""
    return next((size for size in range(min(len(text), len(mark) - 1), 0, -1) if mark.startswith(text[-size:])), 0)


def _read(text: str, tool_format: ToolFormat, names: Collection[str]) -> ToolCall | None:
    """The call in a JSON text, if it is one."""
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str) or name not in names:
        return None
    arguments = value.get(tool_format.value, {} if tool_format is ToolFormat.HERMES else None)
    if not isinstance(arguments, dict):
        return None
    written = json.dumps(arguments, ensure_ascii=False)
    return ToolCall(name, written if is_unicode(written) else json.dumps(arguments))
