"""The same as ``forcedrop evaluate``."""

import sys

from forcedrop.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
