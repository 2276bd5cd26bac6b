"""What starting takes: fresh processes of ``import torch``, the calculator's import, and ``forcedrop info data/ethanol.pt``.

    python benchmarks/startup.py --rounds 15

The three take turns, so that whatever else the machine does meets all of them. Seconds are medians over the rounds after a
first one that fills the disk's cache; ratios are to ``import torch`` alone, which every one of them contains. Writes
``results/startup.json``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from statistics import median

from common import RESULTS, environment, write_results

COMMANDS = {
    "import torch": ["-c", "import torch"],
    "import forcedrop; forcedrop.DropoutCalculator": ["-c", "import forcedrop; forcedrop.DropoutCalculator"],
    "forcedrop info data/ethanol.pt": ["-m", "forcedrop", "info", "data/ethanol.pt"],
}


def seconds(arguments: list[str]) -> float:
    """Return how long a fresh process takes, from its start to its end."""
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, cwd=RESULTS.parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return time.perf_counter() - start


def main() -> None:
    """Let the processes take turns, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="to try the script: one round, writes nothing")
    arguments = parser.parse_args()
    rounds = 1 if arguments.quick else arguments.rounds
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for number in range(rounds + 1):
        for name, command in COMMANDS.items():
            taken = seconds(command)
            if number:
                times[name].append(taken)
    first = median(times["import torch"])
    rows = [
        {"what": name, "seconds": round(median(found), 3), "over import torch": round(median(found) / first, 3)}
        for name, found in times.items()
    ]
    for row in rows:
        print(f"{row['what']:48} {row['seconds']:7.3f} s {row['over import torch']:7.3f}")
    if arguments.quick:
        return
    about = environment(0) | {"threads": 1, "rounds": rounds}
    print(f"wrote {write_results('startup', {'environment': about, 'rows': rows}).name}")


if __name__ == "__main__":
    main()
