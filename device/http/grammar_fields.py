"""The grammar of a request: ``response_format`` as OpenAI has it, ``grammar`` and ``regex`` as extensions."""

from collections.abc import Mapping, Sequence

from common.grammar import lark_grammar, regex_grammar, schema_grammar
from device.http.request_fields import Fields, check_inner_names, field
from device.text.unicode import check_unicode
from protocol.errors import SettingsError

_FORMATS = "text, json_object with or without an object schema, or json_schema with an object json_schema.schema"
_FIELDS: Mapping[str, Sequence[str]] = {
    "text": ("type",),
    "json_object": ("type", "schema"),
    "json_schema": ("type", "json_schema"),
}
"""The fields of each type of response format; ``schema`` is llama.cpp's."""


def read_grammar(fields: Fields) -> str:
    """The grammar that the answer must follow; "" for none.

    Raises:
        SettingsError: a field has a value that is not allowed, or several give a grammar.
    """
    schema = _schema(field(fields, "response_format", dict, {"type": "text"}, _FORMATS))
    lark = field(fields, "grammar", str, "", "a Lark grammar")
    regex = field(fields, "regex", str, "", "a regular expression")
    check_unicode("grammar", lark)
    check_unicode("regex", regex)
    if (schema is not None) + bool(lark) + bool(regex) > 1:
        raise SettingsError("grammar", lark or regex, "one of response_format, grammar and regex")
    if schema is not None:
        return schema_grammar(schema)
    return lark_grammar(lark) if lark else regex_grammar(regex) if regex else ""


def _schema(response_format: Fields) -> Fields | None:
    """The JSON schema that a response format asks for."""
    kind = response_format.get("type")
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise SettingsError("response_format", response_format, _FORMATS)
    check_inner_names("response_format", response_format, _FIELDS[kind])
    if kind == "text":
        return None
    if kind == "json_object":
        schema = response_format.get("schema") or {"type": "object"}
    else:
        given = response_format.get("json_schema")
        given = given if isinstance(given, dict) else {}
        check_inner_names("response_format.json_schema", given, ("name", "description", "schema", "strict"))
        schema = given.get("schema")
    if not isinstance(schema, dict):
        raise SettingsError("response_format", response_format, _FORMATS)
    return schema
