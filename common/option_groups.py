"""Options that several commands share, declared once as the fields of a dataclass."""

from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from functools import wraps
from inspect import Parameter, signature
from typing import Any, Concatenate, ParamSpec, TypeVar, get_type_hints

Group = TypeVar("Group")
Own = ParamSpec("Own")


def with_options(
    group: Callable[..., Group],
) -> Callable[[Callable[Concatenate[Group, Own], None]], Callable[..., None]]:
    """Make a typer command take the fields of a dataclass as options; its first parameter receives an instance.

    Args:
        group: the dataclass; each field is annotated with a ``typer.Option``.
    """
    entries: tuple[Field[Any], ...] = fields(group)  # type: ignore[arg-type]
    hints = get_type_hints(group, include_extras=True)

    def decorate(command: Callable[Concatenate[Group, Own], None]) -> Callable[..., None]:
        _, *own = signature(command, eval_str=True).parameters.values()
        shared = [
            Parameter(
                entry.name,
                Parameter.KEYWORD_ONLY,
                default=Parameter.empty if entry.default is MISSING else entry.default,
                annotation=hints[entry.name],
            )
            for entry in entries
        ]
        parameters = [one.replace(kind=Parameter.KEYWORD_ONLY) for one in [*own, *shared]]

        untyped: Any = command  # typer passes keywords alone

        @wraps(command)
        def run(**values: Any) -> None:
            given = {entry.name: values.pop(entry.name) for entry in entries}
            untyped(group(**given), **values)

        described: Any = run  # typer reads the signature and the annotations
        described.__signature__ = signature(command).replace(parameters=parameters)
        described.__annotations__ = {one.name: one.annotation for one in parameters}
        return run

    return decorate
