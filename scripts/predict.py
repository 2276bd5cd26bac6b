"""The same as ``forcedrop predict``."""

import sys

from forcedrop.cli import main

if __name__ == "__main__":
    main(["predict", *sys.argv[1:]])
