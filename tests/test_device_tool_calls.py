"""Calls of tools: read from the text as each family writes it, forced by a grammar, returned as OpenAI's API does."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from llguidance import LLTokenizer, TokenizerWrapper
from tokenizers import AddedToken, Tokenizer

from common.chat_template import ChatTemplate
from common.grammar import GrammarCompiler
from device.http.chat_request import ChatRequest
from device.text.tool_calls import HermesParser, ToolCall, ToolFormat
from protocol.errors import SettingsError
from tests.hostile_grammars import STOP, VOCAB, tokenizer_json
from tests.number_service import DEFAULTS, FIELDS, NumberTokenizer, complete, http_client, new_station, streamed

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
CALL = {"name": "weather", "arguments": {"city": "Oslo"}}
OSLO = ToolCall("weather", json.dumps(CALL["arguments"]))


def hermes(call: object = CALL) -> str:
    return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"


def parts_of(tool_format: ToolFormat, text: str, size: int) -> tuple[str, list[ToolCall]]:
    """The text and the calls in an answer that comes in parts of ``size`` characters."""
    parser = tool_format.parser(("weather", "clock"))
    parts = [part for start in range(0, len(text), size) for part in parser.feed(text[start : start + size])]
    parts += parser.flush()
    return "".join(one for one in parts if isinstance(one, str)), [one for one in parts if isinstance(one, ToolCall)]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize(
    ("answer", "text", "calls"),
    [
        ("No call < here <tool", "No call < here <tool", []),
        (hermes(), "", [OSLO]),
        (f"I look.\n{hermes()}\n{hermes({'name': 'clock'})}", "I look.\n", [OSLO, ToolCall("clock", "{}")]),
        (hermes().removesuffix("\n</tool_call>"), "", [OSLO]),
        ('<tool_call>{"name": 3}</tool_call> so', '<tool_call>{"name": 3}</tool_call> so', []),
        ('a <tool_call>{"name"', 'a <tool_call>{"name"', []),
        (hermes({"name": "clock", "arguments": []}), hermes({"name": "clock", "arguments": []}), []),
        (f"{hermes({'name': 'stock'})}\n", f"{hermes({'name': 'stock'})}\n", []),
    ],
)
def test_hermes_calls_are_read_however_the_text_is_divided(
    size: int, answer: str, text: str, calls: Sequence[ToolCall]
) -> None:
    assert parts_of(ToolFormat.HERMES, answer, size) == (text, calls)


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("answer", "text", "calls"),
    [
        ("It is {late}.", "It is {late}.", []),
        ('{"name": "weather", "parameters": {"city": "Oslo"}}', "", [OSLO]),
        ('<|python_tag|>{"name": "weather", "parameters": {"city": "Oslo"}}', "", [OSLO]),
        ('{"a": 1}', '{"a": 1}', []),
        ('{"name": "clock"}', '{"name": "clock"}', []),
        ('{"name": "stock", "parameters": {}}', '{"name": "stock", "parameters": {}}', []),
        ("{", "{", []),
    ],
)
def test_llama_calls_are_read_however_the_text_is_divided(
    size: int, answer: str, text: str, calls: Sequence[ToolCall]
) -> None:
    assert parts_of(ToolFormat.LLAMA3, answer, size) == (text, calls)


class _Bytes:
    eos_token_id = 256
    bos_token_id = None
    tokens = (*(bytes([byte]) for byte in range(256)), b"<stop>")
    special_token_ids = (256,)

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def follows(grammar: str, text: str) -> bool:
    """Whether a text is one of a grammar."""
    compiled = GrammarCompiler(lambda: LLTokenizer(TokenizerWrapper(_Bytes()), eos_token=256), 257).compile(grammar)
    return compiled.follow([*text.encode(), 256])


def test_a_forced_call_is_one_of_the_tools_with_valid_arguments() -> None:
    grammar = ToolFormat.HERMES.grammar([WEATHER, CLOCK])
    assert follows(grammar, hermes())
    assert follows(grammar, hermes({"name": "clock", "arguments": {}}))
    assert not follows(grammar, hermes({"name": "weather", "arguments": {"city": "Paris"}}))
    assert not follows(grammar, hermes({"name": "stock", "arguments": {}}))
    assert not follows(grammar, "Hello")
    assert not follows(ToolFormat.HERMES.grammar([CLOCK]), hermes())
    assert follows(
        ToolFormat.LLAMA3.grammar([WEATHER]), '{"name": "weather", "parameters": {"city": "Rome", "days": 2}}'
    )


@pytest.mark.parametrize(
    ("source", "knows_tools", "tool_format"),
    [
        ("{% if tools %}<tool_call>{% endif %}", True, ToolFormat.HERMES),
        ('{% for tool in tools %}{"parameters": 1}{% endfor %}ipython', True, ToolFormat.LLAMA3),
        ("{% for message in messages %}{{ message.content }}{% endfor %}", False, None),
        ("{{ tools }}", True, None),
    ],
)
def test_the_template_tells_whether_and_how_a_model_calls_tools(
    source: str, knows_tools: bool, tool_format: ToolFormat | None
) -> None:
    assert ChatTemplate(source, {}).knows_tools == knows_tools
    assert ToolFormat.of_template(source) is tool_format


@pytest.mark.parametrize(
    ("choice", "known", "forced"),
    [
        (None, 2, []),
        ("auto", 2, []),
        ("none", 0, []),
        ("required", 2, ["weather", "clock"]),
        ({"type": "function", "function": {"name": "clock"}}, 2, ["clock"]),
    ],
)
def test_the_tool_choice_says_which_tools_must_be_called(choice: object, known: int, forced: list[str]) -> None:
    fields = FIELDS | {"tools": [WEATHER, CLOCK], "tool_choice": choice}
    tools = ChatRequest.read(fields, DEFAULTS).choices[0].tools
    assert len(tools.known) == known
    assert [tool["function"]["name"] for tool in tools.forced] == forced


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": "sometimes"},
        {"tool_choice": {"type": "function", "function": {"name": "stock"}}},
        {"logprobs": True},
        {"tool_choice": "required", "response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_object"}},
        {"tool_choice": "auto", "regex": "[0-9]"},
        {"tools": [WEATHER] * 129},
    ],
    ids=str,
)
def test_tools_that_cannot_be_honoured_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="tool"):
        ChatRequest.read(FIELDS | {"tools": [WEATHER]} | fields, DEFAULTS)


def test_a_grammar_is_honoured_beside_tools_that_are_not_to_be_called() -> None:
    fields = FIELDS | {"tools": [WEATHER], "tool_choice": "none", "response_format": {"type": "json_object"}}
    assert ChatRequest.read(fields, DEFAULTS).choices[0].settings.sampling.grammar


def test_calls_and_results_of_a_conversation_reach_the_template_with_arguments_as_objects() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    messages = [
        *FIELDS["messages"],  # type: ignore[misc]
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "7"},
    ]
    read = ChatRequest.read(FIELDS | {"messages": messages}, DEFAULTS).choices[0].prompt
    template = ChatTemplate("{{ messages[1].tool_calls[0].function.arguments | tojson }} {{ messages[2].content }}", {})
    assert template.render(read) == '{"city": "Oslo"} 7'  # type: ignore[arg-type]


class CallingTokenizer(NumberTokenizer):
    """Every token is the text of a call."""

    tool_format = ToolFormat.HERMES

    def decode_stream(self, token_ids: Any) -> Any:
        return (hermes() for _ in token_ids)


def test_calls_are_returned_whole_and_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NumberTokenizer, "tool_format", ToolFormat.HERMES)
    monkeypatch.setattr(NumberTokenizer, "decode_stream", CallingTokenizer.decode_stream)
    with http_client(new_station()) as client:
        choice = complete(client, tools=[WEATHER], max_tokens=2).json()["choices"][0]
        chunks = streamed(client, tools=[WEATHER], max_tokens=2)
        plain = complete(client, max_tokens=1).json()["choices"][0]
    calls = choice["message"]["tool_calls"]
    assert choice["message"]["content"] is None
    assert [(one["type"], one["function"]) for one in calls] == [
        ("function", {"name": "weather", "arguments": OSLO.arguments})
    ] * 2
    assert len({one["id"] for one in calls}) == 2
    deltas = [one for chunk in chunks for one in chunk["choices"][0]["delta"].get("tool_calls", [])]
    assert [(one["index"], one["function"]) for one in deltas] == [(index, calls[0]["function"]) for index in (0, 1)]
    assert plain["message"] == {"role": "assistant", "content": hermes()}


def test_a_json_answer_that_calls_no_tool_is_text(monkeypatch: pytest.MonkeyPatch) -> None:
    person = '{"name": "Alice", "age": 3}'
    monkeypatch.setattr(NumberTokenizer, "tool_format", ToolFormat.LLAMA3)
    monkeypatch.setattr(NumberTokenizer, "decode_stream", lambda _, token_ids: (person for _ in token_ids))
    with http_client(new_station()) as client:
        choice = complete(client, tools=[WEATHER], max_tokens=1).json()["choices"][0]
        deltas = [chunk["choices"][0]["delta"] for chunk in streamed(client, tools=[WEATHER], max_tokens=1)]
    assert choice["message"] == {"role": "assistant", "content": person}
    assert choice["finish_reason"] == "length"
    assert "".join(delta.get("content") or "" for delta in deltas) == person
    assert not any("tool_calls" in delta for delta in deltas)


def test_without_parallel_calls_the_first_one_ends_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NumberTokenizer, "tool_format", ToolFormat.HERMES)
    monkeypatch.setattr(NumberTokenizer, "decode_stream", CallingTokenizer.decode_stream)
    with http_client(new_station()) as client:
        answer = complete(client, tools=[WEATHER], max_tokens=5, parallel_tool_calls=False).json()
    assert len(answer["choices"][0]["message"]["tool_calls"]) == 1
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    assert answer["usage"]["completion_tokens"] == 1


def test_a_model_whose_template_knows_no_tools_is_told_by_name() -> None:
    with http_client(new_station()) as client:
        response = complete(client, tools=[WEATHER])
        assert response.status_code == 400
        assert "chat template declares no tools" in response.json()["error"]["message"]
        assert complete(client, tools=[WEATHER], tool_choice="none").status_code == 200


@pytest.mark.parametrize("added", [(), ("<tool_call>", "</tool_call>")], ids=["text", "added tokens"])
def test_the_marks_of_a_forced_call_may_be_tokens_of_their_own(added: tuple[str, ...]) -> None:
    tokenizer = Tokenizer.from_str(tokenizer_json())
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in added])
    compiler = GrammarCompiler.of_tokenizer(tokenizer.to_str(), VOCAB + len(added), frozenset({STOP}))
    tool = {"function": {"name": "weather", "parameters": {"const": {"city": "Oslo"}}}}
    grammar, answer = compiler.compile(ToolFormat.HERMES.grammar([tool], added)), list[int]()
    while (token_id := int(np.flatnonzero(grammar.allowed())[-1])) != STOP:
        assert grammar.advance(token_id)
        answer.append(token_id)
    assert tokenizer.decode(answer) == hermes()
    assert all(tokenizer.token_to_id(text) in answer for text in added)


@pytest.mark.parametrize("tool_format", ToolFormat)
def test_the_schema_of_a_forced_call_may_refer_to_its_own_parts(tool_format: ToolFormat) -> None:
    """As Pydantic writes the schema of a class with another class in it."""
    place: dict[str, Any] = {
        "type": "object",
        "properties": {"city": {"type": "string"}, "enum": {"$ref": "#/$defs/Place"}},
    }
    place |= {"required": ["city"], "additionalProperties": False}
    parameters: dict[str, Any] = {
        "type": "object",
        "properties": {"to": {"$ref": "#/$defs/Place"}},
        "$defs": {"Place": place},
    }
    parameters |= {"required": ["to"], "additionalProperties": False}
    tools = [CLOCK, {"type": "function", "function": {"name": "travel", "parameters": parameters}}]
    grammar = tool_format.grammar(tools)

    def call(arguments: object) -> str:
        value = {"name": "travel", tool_format.value: arguments}
        return hermes(value) if tool_format is ToolFormat.HERMES else json.dumps(value)

    assert follows(grammar, call({"to": {"city": "Rome", "enum": {"city": "Italy"}}}))
    assert not follows(grammar, call({"to": {"enum": {"city": "Italy"}}}))


def test_half_a_surrogate_pair_in_a_call_can_be_sent() -> None:
    arguments = '{"name": "clock", "arguments": {"zone": "\\ud800"}}'
    (call,) = HermesParser(["clock"]).feed(f"<tool_call>{arguments}</tool_call>")
    assert isinstance(call, ToolCall)
    assert json.loads(call.arguments.encode()) == {"zone": "\ud800"}
    named = '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>'
    assert HermesParser(["clock"]).feed(named) == [named]
