"""``python -m basestation`` is ``edgedraft-basestation``."""

from basestation.cli import main

main()
