"""Where the settings of a program come from: flag, environment variable, file or default, in this order.

Click looks each option up in this order; here it is told the names of the variables
and the values of the file. All commands of a program share them.
"""

import copy
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from common.setting import Setting, settings_of
from common.settings_file import read_settings_file, standard_file

_SOURCES = {"COMMANDLINE": "flag", "ENVIRONMENT": "environment", "DEFAULT_MAP": "file", "DEFAULT": "default"}
"""By the names of click's ``ParameterSource``."""
_HIDDEN = "(hidden: no file has this name)"


@dataclass(frozen=True)
class _Origin:
    """The value of a setting, and where it came from."""

    value: object
    source: str


def configured_group(program: str) -> type[TyperGroup]:
    """A group whose commands take settings from the environment and from a file; it also has the command ``config``.

    Args:
        program: its name in environment variables and file names.
    """

    class ConfiguredGroup(TyperGroup):
        def __init__(self, **attributes: Any) -> None:
            super().__init__(**attributes)
            _configure(self, program)

    return ConfiguredGroup


def came_from_file(context: typer.Context, name: str) -> bool:
    """Whether the file gave the value of a command's parameter."""
    return _source(context, name) == "file"


def _configure(group: Any, program: str) -> None:
    commands = [command for command in group.commands.values() if not hasattr(command, "commands")]
    settings = {setting.key: setting for command in commands for setting in settings_of(command)}
    config = _config_command(program, settings)
    file_option = _copy(next(option for option in config.params if option.name == "file"), expose_value=False)
    for command in commands:
        for setting in settings_of(command):
            setting.option.envvar = setting.variable(program)
            setting.option.show_envvar = setting.option.envvar in os.environ
        command.params.append(file_option)
    config.params.extend(_copy(setting.option, required=False) for setting in settings.values())
    group.add_command(config, "config")


def _config_command(program: str, settings: dict[str, Setting]) -> Any:
    """The command ``config``, without the options of the settings."""
    single = typer.Typer(add_completion=False)

    @single.command("config")
    def config(
        context: typer.Context,
        file: Annotated[
            Path | None,
            typer.Option(
                "--config",
                metavar="FILE",
                envvar=f"EDGEDRAFT_{program}_CONFIG".upper(),
                is_eager=True,
                callback=_reader(program, settings),
                show_default=f"~/.config/edgedraft/{program}.toml or else /etc/edgedraft/{program}.toml",
                help="File in TOML with values of options.",
            ),
        ] = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    ) -> None:
        """Print the value of each setting, and whether flag, environment, file or default gave it."""
        _print(file, dict(_origins(context, settings)), as_json)

    command: Any = typer.main.get_command(single)
    call = command.callback
    command.callback = lambda file, as_json, **_settings: call(file=file, as_json=as_json)
    return command


def _reader(program: str, settings: dict[str, Setting]) -> Callable[[typer.Context, Path | None], Path | None]:
    """What click calls before it looks up the other options of a command."""

    def read(context: typer.Context, file: Path | None) -> Path | None:
        path = file or standard_file(program)
        if path is not None and not context.resilient_parsing:
            values = read_settings_file(path, settings, context)
            context.default_map = {settings[key].option.name: value for key, value in values.items()}
        return path

    return read


def _origins(context: typer.Context, settings: dict[str, Setting]) -> Iterator[tuple[str, _Origin]]:
    for key, setting in settings.items():
        name = setting.option.name
        yield key, _Origin(_shown(setting, context.params[name]), _source(context, name))


def _source(context: typer.Context, name: str) -> str:
    source = context.get_parameter_source(name)
    assert source is not None
    return _SOURCES[source.name]


def _shown(setting: Setting, value: Any) -> object:
    """A value as it is printed; where a secret's file should stand, the secret may."""
    if setting.option.hide_input and value is not None and not _is_file(value):
        return _HIDDEN
    return list(value) if setting.kind is list else str(value) if isinstance(value, str | Path) else value


def _is_file(value: Any) -> bool:
    try:
        return Path(value).is_file()
    except (OSError, ValueError):  # too long for a path, or with a null character
        return False


def _print(file: Path | None, origins: dict[str, _Origin], as_json: bool) -> None:
    path = None if file is None else str(file)
    if as_json:
        report = {"file": path, "settings": {key: asdict(origin) for key, origin in origins.items()}}
        sys.stdout.write(json.dumps(report) + "\n")
        return
    typer.echo(f"file: {path or 'none'}")
    width = max(map(len, origins))
    for key, origin in origins.items():
        typer.echo(f"{key:{width}}  {origin.source:11}  {'' if origin.value is None else origin.value}".rstrip())


def _copy(option: Any, **attributes: object) -> Any:
    copied = copy.copy(option)
    for name, value in attributes.items():
        setattr(copied, name, value)
    return copied
