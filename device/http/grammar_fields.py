"""The grammar of a request: ``response_format`` as OpenAI has it, ``grammar`` and ``regex`` as extensions."""

from typing import Any

from common.grammar import lark_grammar, regex_grammar, schema_grammar
from device.http.request_fields import Fields, field
from device.text.unicode import check_unicode
from protocol.errors import SettingsError

_FORMATS = "text, json_object, or json_schema with an object json_schema.schema"


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
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    given: Any = response_format.get("json_schema")
    schema = given.get("schema") if kind == "json_schema" and isinstance(given, dict) else None
    if not isinstance(schema, dict):
        raise SettingsError("response_format", response_format, _FORMATS)
    return schema
