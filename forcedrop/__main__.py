"""``python -m forcedrop``."""

from forcedrop.cli import main

main()
