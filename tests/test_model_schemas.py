"""200 bounded JSON schemas on the sample pair; `make test-schemas` runs it and prints its figures."""

import pytest

from bench.setup.bench_setup import BenchSetup
from tests.json_schemas import answer_schemas

pytestmark = [pytest.mark.model, pytest.mark.endurance]

SCHEMAS, PARTS = 200, 10


@pytest.mark.parametrize("part", range(PARTS))
def test_answers_under_schemas_are_valid_finished_and_the_targets_own(sample_setup: BenchSetup, part: int) -> None:
    figures = answer_schemas(sample_setup, range(part, SCHEMAS, PARTS))
    print(f"\nschemas {part}, {part + PARTS}, …: {figures}")
    print(f"acceptance {figures.acceptance:.3f}, of drafts without the grammar {figures.unmasked_acceptance:.3f}")
    assert figures.answers == SCHEMAS // PARTS
    assert figures.finished >= 0.9 * figures.answers
    assert figures.acceptance >= figures.unmasked_acceptance
