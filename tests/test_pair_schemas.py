"""40 bounded JSON schemas on the pair of Qwen2.5-Coder; `make test-pair` runs it and prints its figures."""

from collections.abc import Iterator

import pytest

from bench.setup.bench_setup import BenchSetup
from tests.json_schemas import answer_schemas
from tests.pair import pair_setup

pytestmark = [pytest.mark.pair, pytest.mark.timeout(7200)]


@pytest.fixture(scope="module")
def pair() -> Iterator[BenchSetup]:
    with pair_setup() as setup:
        yield setup


def test_answers_under_schemas_are_valid_finished_and_the_targets_own(pair: BenchSetup) -> None:
    figures = answer_schemas(pair, range(40))
    print(f"\n{figures}")
    print(f"acceptance {figures.acceptance:.3f}, of drafts without the grammar {figures.unmasked_acceptance:.3f}")
    assert figures.finished >= 36
    assert figures.acceptance >= figures.unmasked_acceptance
