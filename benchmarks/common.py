"""What every benchmark records beside its numbers, and where it writes them: ``benchmarks/results/NAME.json``."""

from __future__ import annotations

import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"


def cpu_model() -> str:
    """Return the processor's name as the operating system gives it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def environment(seed: int) -> dict[str, Any]:
    """Return what a number depends on: machine, versions, threads, seed and date; no names of hosts, users or folders."""
    return {
        "machine": f"{platform.system()} {platform.machine()}, {cpu_model()}",
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "seed": seed,
        "date": datetime.now(UTC).date().isoformat(),
    }


def write_results(name: str, results: dict[str, Any]) -> Path:
    """Write ``benchmarks/results/NAME.json`` and return its path; NaN and infinity are errors, since JSON has neither.

    Raises:
        ValueError: if a number is not finite, or if ``name`` is not a plain file name.
    """
    if not name or Path(name).name != name:
        raise ValueError(f"`name` must be a plain file name without folders, got {name!r}")
    text = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(text, encoding="utf-8")
    return path


def read_results(name: str) -> dict[str, Any]:
    """Return what ``benchmarks/results/NAME.json`` holds, nothing if it is not there."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def with_changes(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a training file's values with others in their place; sections are merged key by key."""
    merged = {k: values.get(k, {}) | v if isinstance(v, dict) else v for k, v in changes.items()}
    return values | merged
