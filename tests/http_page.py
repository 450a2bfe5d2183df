"""Writes docs/http.md, the service's description as a page: ``python -m tests.http_page docs/http.md``."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from device.http.openapi import openapi

_HEAD = """# HTTP

What `edgedraft-device serve` reads and sends. [Operations](operations.md#the-service-on-a-device) says how it answers,
whom it serves and which errors it has; [the protocol](protocol.md#sampling-settings) what each sampling setting does.

`.venv/bin/python -m tests.http_page docs/http.md` writes this page from what the service sends as `/openapi.json`.
"""


def page() -> str:
    """The page."""
    document = openapi()
    rows = [
        f"| {method.upper()} | `{path}` | {operation['summary']} | {_body(operation)} | {_answer(operation)} |"
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    addresses = [
        "## Addresses",
        "",
        "| method | address | answer | body | answer's body |",
        "|---|---|---|---|---|",
        *rows,
    ]
    schemas = document["components"]["schemas"].items()
    return "\n".join([_HEAD, *addresses, *(line for name, schema in schemas for line in _section(name, schema)), ""])


def _body(operation: Any) -> str:
    return (
        _type(operation["requestBody"]["content"]["application/json"]["schema"]) if "requestBody" in operation else ""
    )


def _answer(operation: Any) -> str:
    content = operation["responses"]["200"]["content"]
    return (
        ", ".join(_type(entry["schema"]) for entry in content.values() if "$ref" in entry.get("schema", {})) or "text"
    )


def _section(name: str, schema: Any) -> Iterator[str]:
    yield from ("", f"## {name}", "")
    if "description" in schema:
        yield from (schema["description"], "")
    yield from ("| field | value | meaning |", "|---|---|---|", *_rows("", schema))


def _rows(prefix: str, schema: Any) -> Iterator[str]:
    """A row for each field, and for those of the objects in it."""
    for name, field in schema.get("properties", {}).items():
        yield f"| `{prefix}{name}` | {_type(field)} | {field.get('description', '')} |"
        yield from _rows(f"{prefix}{name}.", field)
        yield from _rows(f"{prefix}{name}[].", field.get("items", {}))


def _type(schema: Any) -> str:
    """What a value may be."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    items = f" of {_type(schema['items'])}" if "$ref" in schema.get("items", {}) else ""
    return " or ".join(kinds).replace("integer", "whole number") + items + _range(schema)


def _range(schema: Any) -> str:
    if "exclusiveMinimum" in schema:
        return f" above {schema['exclusiveMinimum']}, up to {schema['maximum']}"
    if "maximum" in schema:
        return f" from {schema['minimum']} to {schema['maximum']}"
    return f" from {schema['minimum']}" if "minimum" in schema else ""


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
