"""``python -m tests.fuzz CATEGORY … --first 0 --count 1000``: a campaign, its counts and its faults as lines of JSON."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from tests.fuzz.campaign import CATEGORIES, run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("category", nargs="*", default=list(CATEGORIES))
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    for category in options.category:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            found = run(category, range(options.first, options.first + options.count), Path(folder), options.keep)
        row = {"category": category, "counts": dict(found.counts), "slowest_s": round(found.slowest, 1)}
        print(json.dumps({**row, "seconds": round(time.monotonic() - start, 1)}), flush=True)
        for fault in found.faults:
            print(json.dumps(fault, ensure_ascii=False), flush=True)


main()
