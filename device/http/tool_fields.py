"""The tools of a chat request, and which of them the answer must call."""

import json
from typing import Any

from device.http.http_fields import MAX_TOOLS
from device.http.request_fields import Fields, check_depth, field
from device.text.tool_calls import Tools
from protocol.errors import SettingsError

_CHOICES = "auto, none, required, or an object that names one of the tools"


def read_tools(fields: Fields) -> Tools:
    """Read ``tools``, ``tool_choice`` and ``parallel_tool_calls``.

    Raises:
        SettingsError: a value is not allowed.
    """
    tools = field(fields, "tools", list, [], "a list of tools")
    if len(tools) > MAX_TOOLS or not all(map(_is_tool, tools)):
        allowed = f"up to {MAX_TOOLS} objects with type function, and function with a name and parameters, an object"
        raise SettingsError("tools", tools, allowed)
    choice = field(fields, "tool_choice", (str, dict), "auto", _CHOICES)
    parallel = field(fields, "parallel_tool_calls", bool, True, "true or false")
    if choice == "none" or (choice == "auto" and not tools):
        return Tools()
    if choice == "auto":
        return Tools(tools, parallel=parallel)
    name = choice.get("function", {}).get("name") if _names_function(choice) else None
    forced = [tool for tool in tools if choice == "required" or tool["function"]["name"] == name]
    if not forced:
        raise SettingsError("tool_choice", choice, _CHOICES)
    return Tools(tools, forced, parallel)


def read_tool_calls(name: str, message: Fields) -> list[Fields]:
    """The calls of an assistant's message, with their arguments as objects, as chat templates expect them.

    Raises:
        SettingsError: a call is not one.
    """
    calls = field(message, "tool_calls", list, [], "a list of calls")
    return [_call(f"{name}.tool_calls[{index}]", call) for index, call in enumerate(calls)]


def _call(name: str, call: Any) -> Fields:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise SettingsError(name, call, "an object with function, which has a name and arguments")
    try:
        arguments = json.loads(function.get("arguments") or "{}")
    except (ValueError, TypeError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise SettingsError(f"{name}.function.arguments", function.get("arguments"), "the text of a JSON object")
    check_depth(f"{name}.function.arguments", arguments)
    call_id = field(call, "id", str, "", "a text")
    return {"id": call_id, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _is_tool(tool: Any) -> bool:
    function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
    return (
        isinstance(function, dict)
        and isinstance(function.get("name"), str)
        and bool(function["name"])
        and isinstance(function.get("parameters") or {}, dict)
    )


def _names_function(choice: Any) -> bool:
    return isinstance(choice, dict) and choice.get("type") == "function" and isinstance(choice.get("function"), dict)
