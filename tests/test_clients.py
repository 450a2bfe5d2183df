"""Programs written for OpenAI's API run against a pair: each client has its cases in tests/clients/."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.device_service import device_service
from tests.log_likelihoods import write_questions
from tests.sample import PROJECT, SAMPLE
from tests.tool_bundle import write_tool_bundle

CASES = PROJECT / "tests" / "clients"
CLIENTS_PYTHON = PROJECT / ".venv-clients" / "bin" / "python"
NODE_FOLDER = PROJECT / "build" / "clients"
API_KEY = "sk-edgedraft-clients"
NOBODY = "tcp://127.0.0.1:9"

PYTHON_CASES = sorted(path.name for path in CASES.glob("with_*.py"))
NODE_CASES = sorted(path.name for path in CASES.glob("with_*.mjs"))

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def environment(station_address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The addresses of a service with tools, and of one without a base station, as the cases read them."""
    bundle = ("--bundle", str(write_tool_bundle(tmp_path_factory.mktemp("tools") / "bundle")))
    with (
        device_service(station_address, *bundle, api_key=API_KEY) as up,
        device_service(NOBODY, api_key=API_KEY) as down,
    ):
        addresses = {"EDGEDRAFT_URL": f"{up.url}/v1", "EDGEDRAFT_DOWN_URL": f"{down.url}/v1"}
        yield {**os.environ, **addresses, "EDGEDRAFT_API_KEY": API_KEY, "EDGEDRAFT_TARGET": str(SAMPLE)}


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions with the log-likelihoods of their choices."""
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    write_questions(path)
    return path


def run(command: Sequence[str | Path], environment: dict[str, str], folder: Path = PROJECT) -> None:
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def run_python(python: str | Path, name: str, environment: dict[str, str]) -> None:
    """Run cases as tests of their own environment, which has no edgedraft."""
    run([python, "-m", "pytest", "-q", "-c", os.devnull, "--noconftest", CASES / name], environment)


def test_openai_in_this_environment(environment: dict[str, str]) -> None:
    run_python(sys.executable, "with_openai.py", environment)


@pytest.mark.clients
@pytest.mark.parametrize("name", PYTHON_CASES)
def test_a_python_client(name: str, environment: dict[str, str], questions: Path) -> None:
    run_python(CLIENTS_PYTHON, name, environment | {"EDGEDRAFT_QUESTIONS": str(questions)})


@pytest.mark.clients
@pytest.mark.parametrize("name", NODE_CASES)
def test_a_client_in_node(name: str, environment: dict[str, str]) -> None:
    shutil.copy(CASES / name, NODE_FOLDER)  # Node looks for packages beside the file
    run(["node", "--test", name], environment, NODE_FOLDER)
