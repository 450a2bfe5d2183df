"""The settings that a program would run with."""

import json
from typing import Any

from typer.testing import CliRunner

import basestation.cli
import device.cli

_APPS = {"device": device.cli.app, "basestation": basestation.cli.app}


def settings_of(program: str, *flags: str) -> dict[str, Any]:
    """What ``config`` of the device or the base station prints: value and source of each option."""
    result = CliRunner().invoke(_APPS[program], ["config", *flags, "--json"])
    assert result.exit_code == 0, result.exception
    settings: dict[str, Any] = json.loads(result.output)["settings"]
    return settings
