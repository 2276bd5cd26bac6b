"""The same as ``forcedrop train``."""

import sys

from forcedrop.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
