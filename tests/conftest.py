"""Fixtures: one base station with the sample model in float32 and one browser, each shared; no state or settings."""

import os
import secrets
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import basestation  # noqa: F401 - sets how OpenMP's threads wait, before PyTorch is loaded
from bench.setup.bench_setup import BenchSetup, bench_setup
from bench.setup.station_process import running_station
from tests.sample import BUNDLE, SAMPLE

# Ray reads these once, when a test file first imports it.
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="session", autouse=True)
def _no_kept_state() -> Iterator[None]:
    """Devices in processes of their own neither use nor change what the user's own devices learnt."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", os.devnull)  # no folder can be made there
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_settings_of_this_machine() -> Iterator[None]:
    """No test reads the files of a program that is installed here, nor its variables."""
    with pytest.MonkeyPatch.context() as patch:
        for variable in [name for name in os.environ if name.startswith("EDGEDRAFT_")]:
            patch.delenv(variable)
        for program in ("BASESTATION", "DEVICE", "EXPORT"):
            patch.setenv(f"EDGEDRAFT_{program}_CONFIG", os.devnull)
        yield


@pytest.fixture(scope="session")
def station_address() -> Iterator[str]:
    with running_station(str(SAMPLE), "float32") as address:
        yield address


@pytest.fixture(scope="session")
def sample_setup(station_address: str) -> Iterator[BenchSetup]:
    with bench_setup(BUNDLE, station_address) as ready:
        yield ready


@pytest.fixture(scope="session")
def browser() -> "Iterator[Browser]":
    from tests.browser import chromium  # other environments have no Playwright

    with chromium() as browser:
        yield browser
