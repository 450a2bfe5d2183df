"""Tools and schemas of clients against the pair of Qwen2.5-Coder, by its own template; `make test-pair` runs it."""

from collections.abc import Iterator

import pytest

from bench.setup.station_process import running_station
from tests.client_cases import CLIENTS_PYTHON, run_node, run_python, services
from tests.sample import PAIR

pytestmark = [pytest.mark.pair, pytest.mark.timeout(1800)]

CASES = {
    "with_openai.py": "parsed or tool",
    "with_langchain.py": "structure or tool",
    "with_llm.py": "schema or tools",
    "with_instructor.py": "object",
    "with_pydantic_ai.py": "object",
}
"""The cases with tools or schemas, by the client's file."""


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """The variables of the cases, for a service with the draft model and a target in bfloat16."""
    target = PAIR / "target"
    with (
        running_station(str(target), "bfloat16") as address,
        services(address, PAIR / "bundle", target) as variables,
    ):
        yield variables


@pytest.mark.parametrize("name", CASES)
def test_a_python_client(name: str, environment: dict[str, str]) -> None:
    run_python(CLIENTS_PYTHON, name, environment, "-k", CASES[name])


def test_a_client_in_node(environment: dict[str, str]) -> None:
    run_node("with_ai.mjs", environment, "--test-name-pattern", "schema")
