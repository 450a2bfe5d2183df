"""``python -m export`` runs ``edgedraft-export``."""

from export.cli import main

main()
