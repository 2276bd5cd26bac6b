"""The same as ``forcedrop md``."""

import sys

from forcedrop.cli import main

if __name__ == "__main__":
    main(["md", *sys.argv[1:]])
