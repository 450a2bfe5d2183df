"""``python -m export`` is ``edgedraft-export``."""

from export.cli import main

main()
