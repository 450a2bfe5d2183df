"""Programs written for OpenAI's API run against a pair: each client has its cases in tests/clients/."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.device_service import device_service
from tests.sample import PROJECT

CASES = PROJECT / "tests" / "clients"
CLIENTS_PYTHON = PROJECT / ".venv-clients" / "bin" / "python"
NODE_FOLDER = PROJECT / "build" / "clients"
API_KEY = "sk-edgedraft-clients"
NOBODY = "tcp://127.0.0.1:9"

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def environment(station_address: str) -> Iterator[dict[str, str]]:
    """The addresses of a service, and of one without a base station, as the cases read them."""
    with device_service(station_address, api_key=API_KEY) as up, device_service(NOBODY, api_key=API_KEY) as down:
        addresses = {"EDGEDRAFT_URL": f"{up.url}/v1", "EDGEDRAFT_DOWN_URL": f"{down.url}/v1"}
        yield {**os.environ, **addresses, "EDGEDRAFT_API_KEY": API_KEY}


def run(command: Sequence[str | Path], environment: dict[str, str], folder: Path = PROJECT) -> None:
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def run_python(python: str | Path, name: str, environment: dict[str, str]) -> None:
    """Run cases as tests of their own environment, which has no edgedraft."""
    run([python, "-m", "pytest", "-q", "-c", os.devnull, "--noconftest", CASES / name], environment)


def test_openai_in_this_environment(environment: dict[str, str]) -> None:
    run_python(sys.executable, "with_openai.py", environment)


@pytest.mark.clients
@pytest.mark.parametrize("name", ["with_openai.py", "with_litellm.py", "with_langchain.py"])
def test_a_python_client(name: str, environment: dict[str, str]) -> None:
    run_python(CLIENTS_PYTHON, name, environment)


@pytest.mark.clients
def test_openai_in_node(environment: dict[str, str]) -> None:
    shutil.copy(CASES / "with_openai.mjs", NODE_FOLDER)  # Node looks for packages beside the file
    run(["node", "--test", "with_openai.mjs"], environment, NODE_FOLDER)
