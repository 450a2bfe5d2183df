"""How PyTorch's threads wait for work on a CPU."""

import os


def spin_briefly() -> None:
    """Let OpenMP's idle threads sleep soon, unless the environment says otherwise; call it before PyTorch is imported.

    By default they spin for milliseconds, which slows forward passes by up to ten times
    where other processes use the same cores.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
