"""Fields of a JSON request, each checked for its type."""

from collections.abc import Collection, Sequence
from typing import Any, TypeAlias

from protocol.errors import SettingsError

Fields: TypeAlias = dict[str, Any]

ANY = -1
"""What clients send as ``seed`` for a random one, as ``max_tokens`` for no limit, and as ``top_k`` for all tokens."""


MAX_DEPTH = 64
"""Levels of objects and lists inside each other: more than any client sends, and few enough for every reader."""

_NOTHING: Sequence[Any] = (None, False, "", [], {})
"""What clients send for a field that they do not use."""


def check_depth(name: str, value: Any) -> None:
    """Refuse a value of JSON that is nested too deep.

    Raises:
        SettingsError: it has more than ``MAX_DEPTH`` levels.
    """
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [inner for outer in level for inner in _inner(outer)]
        if not level:
            return
    raise SettingsError(name, "nested deeper", f"up to {MAX_DEPTH} levels of objects and lists")


def _inner(value: Any) -> Collection[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def check_inner_names(name: str, fields: Fields, known: Collection[str]) -> None:
    """Check that an object in a request, ``name``, has no field with a value that nobody reads.

    Raises:
        SettingsError: it has.
    """
    for inner, value in fields.items():
        if inner not in known and value not in _NOTHING:
            raise SettingsError(f"{name}.{inner}", value, f"left out; fields: {', '.join(known)}")


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
    """A number, which may be infinite or NaN.

    Raises:
        SettingsError: it is not one, or a whole number with too many digits.
    """
    return as_number(name, field(fields, name, (int, float), default, "a number"))


def as_number(name: str, value: Any) -> float:
    """The value of the field ``name`` as a number, which may be infinite or NaN.

    Raises:
        SettingsError: it is not one, or a whole number with too many digits.
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise SettingsError(name, value, "a number")
    try:
        return float(value)
    except OverflowError:
        raise SettingsError(name, "a number of that many digits", "a finite number") from None
