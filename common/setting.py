"""A setting: an option that may also come from an environment variable or a file.

Knows its names in all of them and the types of its value in the file; not where a value comes from.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import typer

from protocol.errors import SettingsError

_NOT_SETTINGS = ("config", "help", "json", "prompt")
"""Options that belong to one call."""
_KINDS: dict[Any, tuple[str, tuple[type, ...]]] = {
    bool: ("true or false", (bool,)),
    int: ("an integer", (int,)),
    float: ("a number", (int, float)),
    list: ("a list of texts", (list,)),
}
"""By type of a value, what the file may have for it; texts for all others."""


@dataclass(frozen=True)
class Setting:
    """A setting of a program.

    Attributes:
        option: click's option; its class depends on typer's version.
        kind: the type of its value.
    """

    option: Any
    kind: Any

    @property
    def key(self) -> str:
        """Its name in the file."""
        return _key(self.option)

    def variable(self, program: str) -> str:
        """Its environment variable."""
        return f"EDGEDRAFT_{program}_{self.key}".upper().replace("-", "_")

    def check(self, context: typer.Context, value: object, source: str) -> None:
        """Check a value from a file.

        Raises:
            SettingsError: its type or value is not allowed.
        """
        allowed, types = _KINDS.get(self.kind, ("a text", (str,)))
        if type(value) not in types:
            raise SettingsError(f"{self.key} in {source}", value, allowed)
        try:
            self.option.process_value(context, value)
        except typer.BadParameter as error:
            reason = f"{error.message[:1].lower()}{error.message[1:]}"
            raise SettingsError(f"{self.key} in {source}", value, f"{allowed} ({reason})") from error


def settings_of(command: Any) -> Iterator[Setting]:
    """The settings among the options of a click command."""
    hints = get_type_hints(command.callback)
    for option in command.params:
        if option.param_type_name == "option" and _key(option) not in _NOT_SETTINGS:
            yield Setting(option, _kind(hints[option.name]))


def _key(option: Any) -> str:
    longest: str = max(option.opts, key=len)
    return longest.lstrip("-")


def _kind(hint: Any) -> Any:
    """The type of a value, without ``| None`` and the type of its elements."""
    if get_origin(hint) in (Union, UnionType):
        hint = next(part for part in get_args(hint) if part is not type(None))
    return get_origin(hint) or hint
