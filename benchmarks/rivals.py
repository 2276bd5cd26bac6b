"""Does one longer training with exact dropout beat a deep ensemble? What ``dropout.py``'s problem ``3bpa`` does not ask.

    python benchmarks/dropout.py train 3bpa --members    # the ensembles of five, and
    python benchmarks/dropout.py judge 3bpa              # one network of the usual length beside them
    python benchmarks/rivals.py train 0                  # one network of 1.4 times the epochs; also 1 and 2; resumes
    python benchmarks/rivals.py judge                    # those that are there: ``longer`` in results/rivals.json

Networks, splits and judged frames are those of ``dropout.py``; ``longer`` spends on the network what error bars may cost, half as
much again as a plain training. All else in ``results/rivals.json`` and ``rivals.png`` is of the posterior as it was before exact
dropout.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from common import environment, read_results, write_results
from dropout import PROBLEMS, SEEDS, VARIANTS, judged, split, trained, with_functions

from forcedrop.report import comparison_table
from forcedrop.uncertainty.calibrate import calibrate

LONGER, EPOCHS = "3bpa_longer", 56
SHORT = PROBLEMS["3bpa"]
PROBLEMS[LONGER] = replace(SHORT, changes=SHORT.changes | {"epochs": EPOCHS})


def main() -> None:
    """Train one network, or judge all that are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    parts.add_parser("train").add_argument("seed", type=int, choices=range(SEEDS))
    parts.add_parser("judge")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.part == "train":
        trained(LONGER, "none", arguments.seed)
    else:
        judge()


def judge() -> None:
    """Find functions by exact dropout, calibrate, and write the rows of every network."""
    every = []
    for seed in range(SEEDS):
        frames = split(LONGER, seed)
        found = with_functions(LONGER, seed, "exact", VARIANTS["exact"], frames, {})
        if found is None:
            continue
        model, minutes = found
        held = model.graphs(frames["calibration"])
        model = replace(model, calibration=calibrate(model.potential, held, seed=model.seed))
        rows = judged("exact, longer", model, frames)
        print(f"seed {seed}: {minutes:.1f} min\n{comparison_table(rows)}", flush=True)
        every += [row | {"seed": seed, "minutes": round(minutes, 2)} for row in rows]
    if not every:
        raise SystemExit("no network is there yet: rivals.py train 0")
    longer = {"rows": every, "environment": environment(0)}
    write_results("rivals", read_results("rivals") | {"longer": longer})


if __name__ == "__main__":
    main()
