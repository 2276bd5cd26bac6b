"""The same as ``forcedrop report``."""

import sys

from forcedrop.cli import main

if __name__ == "__main__":
    main(["report", *sys.argv[1:]])
