"""The same as ``forcedrop fill``."""

import sys

from forcedrop.cli import main

if __name__ == "__main__":
    main(["fill", *sys.argv[1:]])
