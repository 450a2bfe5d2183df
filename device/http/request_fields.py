"""Fields of a JSON request, each checked for its type."""

from typing import Any, TypeAlias

from protocol.errors import SettingsError

Fields: TypeAlias = dict[str, Any]

ANY = -1
"""What clients send as ``seed`` for a random one, as ``max_tokens`` for no limit, and as ``top_k`` for all tokens."""


def field(fields: Fields, name: str, kind: type | tuple[type, ...], default: Any, allowed: str) -> Any:
    """A field's value; null selects the default, and a boolean is not a number.

    Raises:
        SettingsError: it is of another type; ``allowed`` says what it may be.
    """
    value = fields.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise SettingsError(name, value, allowed)
    return value


def number(fields: Fields, name: str, default: float) -> float:
    """A number.

    Raises:
        SettingsError: it is not one, or not finite.
    """
    return as_number(name, field(fields, name, (int, float), default, "a number"))


def as_number(name: str, value: Any) -> float:
    """The value of the field ``name`` as a number.

    Raises:
        SettingsError: it is not one, or not finite.
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise SettingsError(name, value, "a number")
    try:
        return float(value)
    except OverflowError:
        raise SettingsError(name, "a number of that many digits", "a finite number") from None
