"""What the dropout library costs, in one run with interleaved repetitions: ``benchmarks/results/layers.json``.

    OMP_NUM_THREADS=1 python benchmarks/layers.py            # a minute; writes the file
    OMP_NUM_THREADS=1 python benchmarks/layers.py --quick    # seconds; writes nothing

1. *A layer in training*, forward and backward on a 4096 × 1024 tensor, against ``torch.nn.Dropout``. Target: at most 1.2 times.
2. *64 Monte-Carlo samples* of a three-layer perceptron (32 inputs, two hidden layers with ReLU and dropout, one output) by
   ``mc_samples``, against 64 forward passes in training mode with torch's dropout. Target: at least 5 times as fast.

   ``mc_samples`` remembers small masks, so after the warm-up their drawing is not in its time, as in a second batch of real use.

Times are medians; ratios are medians over repetitions, each of which ran all contestants once, in a new random order.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import environment, write_results
from torch import Tensor, nn
from tqdm import tqdm

from forcedrop.dropout.elementwise import Dropout
from forcedrop.dropout.freeze import frozen
from forcedrop.dropout.montecarlo import mc_samples

SEED = 0
RATE = 0.2
SHAPE = (4096, 1024)
SAMPLES = 64
INPUTS = 32
SIZES = [(1, 64), (1, 128), (16, 64), (16, 128), (64, 64), (64, 128), (64, 256), (256, 128), (256, 256)]
OVERHEAD_TARGET = 1.2
SPEEDUP_TARGET = 5.0


def race(contestants: dict[str, Callable[[], Any]], repetitions: int) -> dict[str, list[float]]:
    """Return the times of all contestants [s], interleaved, after two rounds to warm up."""
    order, times = list(contestants), {name: [] for name in contestants}
    shuffle = random.Random(SEED)
    for repetition in range(-2, repetitions):
        shuffle.shuffle(order)
        for name in order:
            start = time.perf_counter()
            contestants[name]()
            if repetition >= 0:
                times[name].append(time.perf_counter() - start)
    return times


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def milliseconds(times: list[float]) -> float:
    return round(1e3 * statistics.median(times), 4)


def layer_overhead(repetitions: int) -> dict[str, Any]:
    """Time a layer forward and backward; the last two contestants do what torch's layer cannot."""
    x = torch.randn(SHAPE, requires_grad=True)
    gradient = torch.randn(SHAPE)
    generator = torch.Generator().manual_seed(SEED)
    theirs, ours, ours_frozen = nn.Dropout(RATE), Dropout(RATE), Dropout(RATE)

    def step(output: Tensor) -> None:
        x.grad = None
        output.backward(gradient)

    with frozen(ours_frozen, SEED):
        times = race(
            {
                "torch.nn.Dropout": lambda: step(theirs(x)),
                "forcedrop Dropout": lambda: step(ours(x)),
                "forcedrop Dropout, own generator": lambda: step(ours(x, generator=generator)),
                "forcedrop Dropout, frozen function": lambda: step(ours_frozen(x)),
            },
            repetitions,
        )
    base = times["torch.nn.Dropout"]
    ratio = median_ratio(times["forcedrop Dropout"], base)
    return {
        "shape": SHAPE,
        "p": RATE,
        "rows": [
            {"layer": name, "median_ms": milliseconds(values), "ratio": round(median_ratio(values, base), 3)}
            for name, values in times.items()
        ],
        "target": f"at most {OVERHEAD_TARGET} times torch.nn.Dropout",
        "ratio": round(ratio, 3),
        "met": ratio <= OVERHEAD_TARGET,
    }


def perceptron(width: int) -> nn.Sequential:
    torch.manual_seed(SEED)
    hidden = (
        nn.Linear(INPUTS, width),
        nn.ReLU(),
        nn.Dropout(RATE),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Dropout(RATE),
    )
    return nn.Sequential(*hidden, nn.Linear(width, 1))


def sampling(batch: int, width: int, repetitions: int) -> dict[str, Any]:
    """Time 64 samples of one perceptron."""
    model = perceptron(width).train()
    x = torch.randn(batch, INPUTS)

    def passes() -> Tensor:
        return torch.stack([model(x) for _ in range(SAMPLES)])

    with torch.no_grad():
        contestants = {
            "passes": passes,
            "vectorised": lambda: mc_samples(model, x, SAMPLES, SEED),
            "one by one": lambda: mc_samples(model, x, SAMPLES, SEED, vectorised=False),
        }
        difference = (contestants["vectorised"]() - contestants["one by one"]()).abs().max()
        times = race(contestants, repetitions)
    return {
        "batch": batch,
        "width": width,
        "forward_passes_ms": milliseconds(times["passes"]),
        "mc_samples_ms": milliseconds(times["vectorised"]),
        "mc_samples_one_by_one_ms": milliseconds(times["one by one"]),
        "speedup": round(median_ratio(times["passes"], times["vectorised"]), 2),
        "largest_difference": float(difference),
    }


def print_tables(results: dict[str, Any]) -> None:
    layer, samples = results["layer"], results["sampling"]
    print(f"\n{'layer, forward + backward, ' + ' × '.join(map(str, SHAPE)):44}{'median ms':>10}{'ratio':>8}")
    for row in layer["rows"]:
        print(f"{row['layer']:44}{row['median_ms']:10.2f}{row['ratio']:8.2f}")
    print(f"target: {layer['target']}: {'met' if layer['met'] else 'missed'}")
    title = f"{SAMPLES} samples, perceptron {INPUTS}-w-w-1"
    print(f"\n{title:32}{'passes ms':>10}{'mc_samples':>11}{'one by one':>11}{'speedup':>9}")
    for row in samples["rows"]:
        size = f"batch {row['batch']}, width w = {row['width']}"
        print(
            f"{size:32}{row['forward_passes_ms']:10.2f}{row['mc_samples_ms']:11.2f}"
            f"{row['mc_samples_one_by_one_ms']:11.2f}{row['speedup']:9.2f}"
        )
    print(f"target: {samples['target']}: met at {samples['met_at']} of {len(samples['rows'])} sizes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three repetitions, nothing is written")
    quick = parser.parse_args().quick
    torch.manual_seed(SEED)
    rows = []
    layer = layer_overhead(3 if quick else 31)
    for batch, width in tqdm(SIZES, desc="sizes", disable=None):
        rows.append(sampling(batch, width, 3 if quick else 31))
    results = {
        "environment": environment(SEED),
        "layer": layer,
        "sampling": {
            "samples": SAMPLES,
            "p": RATE,
            "dtype": "float32",
            "rows": rows,
            "target": f"at least {SPEEDUP_TARGET:g} times as fast as forward passes",
            "met_at": sum(row["speedup"] >= SPEEDUP_TARGET for row in rows),
        },
    }
    print_tables(results)
    if not quick:
        write_results("layers", results)


if __name__ == "__main__":
    main()
