"""Programs written for OpenAI's API run against a pair: each client has its cases in tests/clients/."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.client_cases import CASES, CLIENTS_PYTHON, run_node, run_python, services
from tests.log_likelihoods import write_questions
from tests.sample import SAMPLE
from tests.tool_bundle import write_tool_bundle

PYTHON_CASES = sorted(path.name for path in CASES.glob("with_*.py"))
NODE_CASES = sorted(path.name for path in CASES.glob("with_*.mjs"))

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def environment(station_address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The variables of the cases, for a service with tools."""
    bundle = write_tool_bundle(tmp_path_factory.mktemp("tools") / "bundle")
    with services(station_address, bundle, SAMPLE) as variables:
        yield variables


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions with the log-likelihoods of their choices."""
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    write_questions(path)
    return path


def test_openai_in_this_environment(environment: dict[str, str]) -> None:
    run_python(sys.executable, "with_openai.py", environment)


@pytest.mark.clients
@pytest.mark.parametrize("name", PYTHON_CASES)
def test_a_python_client(name: str, environment: dict[str, str], questions: Path) -> None:
    run_python(CLIENTS_PYTHON, name, environment | {"EDGEDRAFT_QUESTIONS": str(questions)})


@pytest.mark.clients
@pytest.mark.parametrize("name", NODE_CASES)
def test_a_client_in_node(name: str, environment: dict[str, str]) -> None:
    run_node(name, environment)
