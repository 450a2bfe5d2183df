"""``edgedraft-device doctor`` with the sample pair: all is well, and answers are as fast as predicted."""

import json
import subprocess
from collections.abc import Iterator
from statistics import median
from typing import Any

import pytest

from bench.link.relay import LinkDirection, relay_command
from bench.setup.prompts import OWN_PROMPTS
from bench.setup.server_process import serving
from tests.device_service import device_command

TOLERANCE = 0.25
REPETITIONS = 5
ANSWER = ("--max-new-tokens", "128", "--json")


def printed(name: str, address: str, *options: str) -> Any:
    done = subprocess.run(device_command(name, address, *options), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done
    return json.loads(done.stdout)


@pytest.mark.model
def test_the_sample_pair_is_healthy_and_has_a_prediction(station_address: str) -> None:
    report = printed("doctor", station_address, "--json")
    assert {check["status"] for check in report["checks"]} <= {"ok", "warning", "not checked"}
    assert next(check for check in report["checks"] if check["name"] == "draft model")["status"] == "ok"
    assert report["prediction"]["drafting_tokens_per_second"] > 0
    assert report["prediction"]["acceptance"] > 0.8


@pytest.fixture(params=[0.0, 0.05], ids=["loopback", "50 ms"])
def link(request: pytest.FixtureRequest, station_address: str) -> Iterator[str]:
    """The base station's address, over a link with this round trip."""
    if not request.param:
        yield station_address
        return
    one_way = LinkDirection(delay_seconds=request.param / 2)
    with serving(relay_command(station_address, one_way, one_way)) as relay:
        yield relay.address


@pytest.mark.model
@pytest.mark.endurance
def test_answers_are_as_fast_as_predicted(link: str) -> None:
    """Predictions and answers alternate, so that other programs disturb both alike; prints each ratio."""
    drafting, alone = [], []
    for prompt in OWN_PROMPTS[:REPETITIONS]:
        prediction = printed("doctor", link, *ANSWER)["prediction"]
        predicted = prediction["drafting_tokens_per_second"], prediction["target_tokens_per_second"]
        drafting.append(max(predicted) / printed("generate", link, *ANSWER, prompt)["tokens_per_second"])
        target = printed("generate", link, *ANSWER, "--mode", "target", prompt)["tokens_per_second"]
        alone.append(predicted[1] / target)
        print(
            f"predicted {predicted[0]:.1f} and {predicted[1]:.1f}: {drafting[-1]:.2f} and {alone[-1]:.2f} of measured"
        )
    print(f"medians: {median(drafting):.2f} with drafting, {median(alone):.2f} without")
    assert abs(median(drafting) - 1) < TOLERANCE
    assert abs(median(alone) - 1) < TOLERANCE
