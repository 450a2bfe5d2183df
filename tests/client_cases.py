"""Run the cases of tests/clients/, each in the environment of its client, which has no edgedraft."""

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.device_service import device_service
from tests.sample import PROJECT

CASES = PROJECT / "tests" / "clients"
CLIENTS_PYTHON = PROJECT / ".venv-clients" / "bin" / "python"
_NODE_FOLDER = PROJECT / "build" / "clients"
_API_KEY = "sk-edgedraft-clients"
_NOBODY = "tcp://127.0.0.1:9"


@contextmanager
def services(station_address: str, bundle: Path, target: Path) -> Iterator[dict[str, str]]:
    """The variables that the cases read: the addresses of a service, and of one without a base station."""
    options = ("--bundle", str(bundle), "--alias", "sample")
    with (
        device_service(station_address, *options, api_key=_API_KEY) as up,
        device_service(_NOBODY, *options, api_key=_API_KEY) as down,
    ):
        addresses = {"EDGEDRAFT_URL": f"{up.url}/v1", "EDGEDRAFT_DOWN_URL": f"{down.url}/v1"}
        yield {**os.environ, **addresses, "EDGEDRAFT_API_KEY": _API_KEY, "EDGEDRAFT_TARGET": str(target)}


def run_python(python: str | Path, name: str, environment: Mapping[str, str], *selection: str) -> None:
    """Run the cases of a client in Python, or those that options of pytest select."""
    cases = [python, "-m", "pytest", "-q", "-c", os.devnull, "--noconftest", CASES / name, *selection]
    _run(cases, environment, PROJECT)


def run_node(name: str, environment: Mapping[str, str], *selection: str) -> None:
    """Run the cases of a client in Node, or those that options of its test runner select."""
    shutil.copy(CASES / name, _NODE_FOLDER)  # Node looks for packages beside the file
    _run(["node", "--test", *selection, name], environment, _NODE_FOLDER)


def _run(command: Sequence[str | Path], environment: Mapping[str, str], folder: Path) -> None:
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
