"""The fields of requests to complete a chat or a text: the JSON schema of each, with what it does.

Readers refuse a field that is not named here. ``openapi.py`` makes the service's
description of these tables.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from protocol.logprobs import MAX_TOP_LOGPROBS
from protocol.messages import MAX_BIASED_TOKENS, MAX_STOP_TOKEN_IDS, MAX_TEMPERATURE, Mode

Schema: TypeAlias = Mapping[str, Any]

MAX_STOPS = 4
MAX_CHOICES = 8
MAX_PROMPTS = 128
MAX_TOOLS = 128


def schema(kind: str | Sequence[str], description: str, **limits: Any) -> Schema:
    """The JSON schema of a field; null, where the type is one, stands for the default."""
    return {"type": kind if isinstance(kind, str) else [*kind], **limits, "description": description}


_SAMPLING: Mapping[str, Schema] = {
    "temperature": schema(
        "number",
        "0 takes the most likely token; else 0.001 or more",
        minimum=0,
        maximum=int(MAX_TEMPERATURE),
    ),
    "top_k": schema("integer", "sample from as many most likely tokens; 0 and -1: all", minimum=-1),
    "top_p": schema(
        "number", "sample from the fewest most likely tokens with this probability", exclusiveMinimum=0, maximum=1
    ),
    "min_p": schema("number", "sample from tokens this times as likely as the most likely one", minimum=0, maximum=1),
    "seed": schema("integer", "repeats an answer; -1 or left out: a random one", minimum=-1, maximum=2**63 - 1),
    "repetition_penalty": schema(
        "number", "divides the logits of tokens in prompt and answer; 1: none", minimum=0.01, maximum=100
    ),
    "presence_penalty": schema("number", "subtracted from the logits of tokens in the answer", minimum=-2, maximum=2),
    "frequency_penalty": schema("number", "the same, as often as the token is in the answer", minimum=-2, maximum=2),
    "logit_bias": schema(
        "object",
        f"token ids, as text, and what is added to their logits, -100 to 100; up to {MAX_BIASED_TOKENS} tokens",
        maxProperties=MAX_BIASED_TOKENS,
        additionalProperties={"type": "number", "minimum": -100, "maximum": 100},
    ),
}

_ENDS: Mapping[str, Schema] = {
    "max_tokens": schema("integer", "most tokens of an answer; -1: as many as the context has", minimum=-1),
    "max_completion_tokens": schema("integer", "the same, by its newer name", minimum=-1),
    "min_tokens": schema("integer", "tokens before the first that may end the answer; not with a grammar", minimum=0),
    "ignore_eos": schema("boolean", "the model's stop tokens do not end the answer; not with a grammar"),
    "stop": schema(
        ["string", "array"], f"up to {MAX_STOPS} texts, any of which ends the answer", items={"type": "string"}
    ),
    "stop_token_ids": schema(
        "array",
        f"up to {MAX_STOP_TOKEN_IDS} token ids, any of which ends the answer",
        items={"type": "integer"},
        maxItems=MAX_STOP_TOKEN_IDS,
    ),
}

_GRAMMARS: Mapping[str, Schema] = {
    "response_format": schema(
        "object",
        "`type` is `text`, `json_object`, also with a `schema`, or `json_schema` with a schema in `json_schema.schema`",
        required=["type"],
    ),
    "grammar": schema("string", "a Lark grammar that the answer follows, as llguidance reads it"),
    "regex": schema("string", "a regular expression that the whole answer matches"),
}

EXTENSION_FIELDS: Mapping[str, Schema] = {
    "mode": schema("string", "as `--mode`; `target` turns speculation off", enum=["auto", *Mode]),
    "draft_len": schema(["integer", "string"], 'as `--draft-len`: a number of tokens, or `"auto"`'),
    "rounds": schema("boolean", "report each round with the origins of its tokens; not with tools or `logprobs`"),
    "unverified": schema(
        "boolean",
        "in an outage (`--on-outage draft`, `--offline`) stream text before it is verified; a chunk says how many "
        "characters before it it replaces. Not with tools, `logprobs`, `echo` or `edgedraft.rounds`",
    ),
}
"""The fields of the field ``edgedraft``."""

SHARED_FIELDS: Mapping[str, Schema] = {
    "model": schema("string", "the name in `/v1/models`, or left out"),
    **_SAMPLING,
    **_ENDS,
    **_GRAMMARS,
    "n": schema(
        "integer", "answers to each prompt, with the seeds `seed`, `seed` + 1, …", minimum=1, maximum=MAX_CHOICES
    ),
    "stream": schema("boolean", "send the answer as server-sent events while it is written"),
    "stream_options": schema(
        "object", "of a stream", properties={"include_usage": schema("boolean", "a last chunk with the token counts")}
    ),
    "edgedraft": schema("object", "what is edgedraft's own", properties=EXTENSION_FIELDS, additionalProperties=False),
}
"""The fields of both kinds of request."""

CHAT_FIELDS: Mapping[str, Schema] = {
    "messages": schema(
        "array",
        "the conversation: `role` is system (or developer), user, assistant or tool; `content` is a text or a list of "
        "parts of type text; an assistant's may have `tool_calls`, a tool's has `tool_call_id` and `name`",
        items={"type": "object", "required": ["role"]},
        minItems=1,
    ),
    "continue_final_message": schema("boolean", "continue the last message, an assistant's, instead of answering it"),
    "add_generation_prompt": schema("boolean", "false with `continue_final_message` only"),
    "tools": schema(
        "array",
        "functions that the answer may call; a call that must be made is valid under its schema; not with a grammar",
        items={"type": "object"},
        maxItems=MAX_TOOLS,
    ),
    "tool_choice": schema(["string", "object"], "auto, none, required, or an object that names one of the tools"),
    "parallel_tool_calls": schema("boolean", "false: the first call ends the answer"),
    "prediction": schema(
        "object",
        "what the answer perhaps is, as `content` of type `content`: proposed to the target, like any draft",
        properties={
            "type": schema("string", "`content`"),
            "content": schema(["string", "array"], "a text, or parts of type text"),
        },
        required=["content"],
    ),
    "logprobs": schema("boolean", "send the target's log-probability of each token"),
    "top_logprobs": schema("integer", "and those of as many most likely tokens", minimum=0, maximum=MAX_TOP_LOGPROBS),
}
"""Further fields of a request to complete a chat."""

TEXT_FIELDS: Mapping[str, Schema] = {
    "prompt": schema(
        ["string", "array"], f"a text, token ids, or a list of up to {MAX_PROMPTS} of either", maxItems=MAX_PROMPTS
    ),
    "echo": schema("boolean", "put the prompt first, with its log-probabilities if asked for; `max_tokens` may be 0"),
    "logprobs": schema(
        "integer",
        "send the target's log-probability of each token, and those of as many most likely tokens",
        minimum=0,
        maximum=MAX_TOP_LOGPROBS,
    ),
}
"""Further fields of a request to complete a text."""

ONLY_VALUES: Mapping[str, Sequence[Any]] = {
    "best_of": [1],
    "chat_template_kwargs": [{}],
    "echo": [False],
    "function_call": ["none", "auto"],
    "functions": [[]],
    "include_stop_str_in_output": [False],
    "length_penalty": [1],
    "modalities": [["text"]],
    "reasoning_effort": ["none"],
    "skip_special_tokens": [True],
    "suffix": [""],
    "tools": [[]],
    "typical_p": [1],
    "use_beam_search": [False],
}
"""Fields of other services, or of the other kind of request, that may have a value that does not change the answer."""

MESSAGE_FIELDS: Sequence[str] = ("role", "content", "name", "tool_calls", "tool_call_id")
"""Fields of a message; the ``name`` is of a tool, that of other roles is ignored."""

STREAM_FIELDS: Sequence[str] = ("include_usage", "include_obfuscation")
"""Fields of ``stream_options``; the second asks for padding that hides lengths, and changes no answer."""

IGNORED: Sequence[str] = (
    "cache_prompt",
    "metadata",
    "priority",
    "prompt_cache_key",
    "prompt_cache_retention",
    "request_id",
    "safety_identifier",
    "service_tier",
    "store",
    "timings_per_token",
    "user",
)
"""Fields of other services that do not change the answer."""
