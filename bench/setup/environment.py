"""The environment of the processes that a benchmark starts."""

import os

_PREFIX = "EDGEDRAFT_"


def flags_alone() -> dict[str, str]:
    """This process's environment without settings of edgedraft, nor their files: a published command tells all."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_PREFIX)}
    return kept | {f"{_PREFIX}{program}_CONFIG": os.devnull for program in ("BASESTATION", "DEVICE")}
