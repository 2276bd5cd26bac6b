"""The same as ``forcedrop flag``."""

import sys

from forcedrop.cli import main

if __name__ == "__main__":
    main(["flag", *sys.argv[1:]])
