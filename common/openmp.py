"""How PyTorch's threads wait for work on a CPU."""

import os


def spin_briefly() -> None:
    """Let OpenMP's idle threads sleep soon, unless the environment says otherwise; call it before PyTorch is imported.

    By default they spin for milliseconds, which makes forward passes two to ten times as long
    where other processes use the same cores. Much fewer spins slow them on cores of their own.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
