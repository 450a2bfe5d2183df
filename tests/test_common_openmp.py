"""OpenMP's idle threads leave the cores to other processes."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["basestation.target.target_model", "export.quality"])
@pytest.mark.parametrize(("chosen", "spins"), [({}, 10000), ({"GOMP_SPINCOUNT": "5"}, 5)], ids=["default", "chosen"])
def test_idle_threads_spin_briefly_unless_the_user_chooses_otherwise(
    module: str, chosen: dict[str, str], spins: int
) -> None:
    inherited = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    shown = subprocess.run(
        [sys.executable, "-c", f"import {module}"],
        env={**inherited, **chosen, "OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"GOMP_SPINCOUNT = '{spins}'" in shown.stderr
