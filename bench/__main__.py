"""``python -m bench`` is ``edgedraft-bench``."""

from bench.cli import main

main()
