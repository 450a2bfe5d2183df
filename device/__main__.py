"""``python -m device`` is ``edgedraft-device``."""

from device.cli import main

main()
