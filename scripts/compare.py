"""The same as ``forcedrop compare``."""

import sys

from forcedrop.cli import main

if __name__ == "__main__":
    main(["compare", *sys.argv[1:]])
