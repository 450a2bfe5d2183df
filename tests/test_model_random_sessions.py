"""300 random sessions with the sample pair, in float32; see tests/random_sessions.py."""

import pytest

from protocol.messages import Mode
from tests.random_sessions import check_random_sessions
from tests.sample import BUNDLE

pytestmark = [pytest.mark.model, pytest.mark.endurance]


@pytest.mark.timeout(3600)
def test_random_sessions_give_the_targets_answers(station_address: str) -> None:
    seen = check_random_sessions(BUNDLE, station_address, sessions=300)
    assert all(seen[mode] for mode in Mode)
    assert seen["breaks"] > 60
