"""OpenMP's idle threads leave the cores to other processes."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("package", ["basestation", "export"])
@pytest.mark.parametrize(("chosen", "spins"), [({}, 10000), ({"GOMP_SPINCOUNT": "5"}, 5)], ids=["default", "chosen"])
def test_idle_threads_spin_briefly_unless_the_user_chooses_otherwise(
    package: str, chosen: dict[str, str], spins: int
) -> None:
    """Any module of a package imports the package first, and with it what must be chosen before PyTorch starts."""
    inherited = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    shown = subprocess.run(
        [sys.executable, "-c", f"import {package}, torch"],
        env={**inherited, **chosen, "OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"GOMP_SPINCOUNT = '{spins}'" in shown.stderr
