"""The same as ``forcedrop active``."""

import sys

from forcedrop.cli import main

if __name__ == "__main__":
    main(["active", *sys.argv[1:]])
