"""From files to three disjoint sets of graphs: to train on, to stop and choose on, to calibrate on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ase.data import chemical_symbols
from tqdm import tqdm

from forcedrop.graph import AtomicGraph, NeighbourFinder, build_graph
from forcedrop.structures import Frame, Problem, is_isolated_atom, isolated_energies, read_checked
from forcedrop.training.config import DataSection, TrainConfig


@dataclass(frozen=True)
class Split:
    """Three disjoint lists of frames."""

    train: list[Frame]
    validation: list[Frame]
    calibration: list[Frame]


@dataclass(frozen=True)
class Prepared:
    """Everything that training needs to know about the data."""

    split: Split
    elements: tuple[int, ...]
    isolated: dict[int, float]
    isolated_origin: str
    energy_scale: float
    problems: list[Problem]


def prepare_data(config: TrainConfig, tell: Callable[[str], None] | None = None) -> Prepared:
    """Read, check and split the frames, and find the isolated-atom energies.

    Args:
        config: of the training.
        tell: gets each line on how the files were read; without it, what may be a mistake is a warning.

    Raises:
        ValueError: if a frame is bad (and not skipped), a file has no labels, or too few frames remain to split.
    """
    data, cutoff, left = config.data, config.model.cutoff, 1.0
    frames, problems = read_labelled(data.train, data, labels_needed=True, tell=tell)
    alone = [is_isolated_atom(f, cutoff) for f in frames]
    elements = tuple(sorted({int(z) for f in frames for z in f.z}))
    isolated, origin = isolated_energies(
        frames, given=data.isolated_atoms, reading=data.reading, cutoff=cutoff, tell=tell
    )
    frames = [f for f, single in zip(frames, alone, strict=True) if not single] or frames
    generator = torch.Generator().manual_seed(config.seed)
    if data.validation:
        validation, more = read_labelled(data.validation, data, elements, labels_needed=True, tell=tell)
        problems = problems + more
    else:
        frames, validation = _hold_out(frames, data.validation_fraction, generator)
        left = 1 - data.validation_fraction
    if data.calibration and config.gives_error_bars:
        calibration, more = read_labelled(data.calibration, data, elements, labels_needed=True, tell=tell)
        problems = problems + more
    else:
        share = data.calibration_fraction if config.gives_error_bars else 0.0
        frames, calibration = _hold_out(frames, share / left, generator)
    split = Split(frames, validation, calibration)
    return Prepared(split, elements, isolated, origin, energy_scale(frames), problems)


def read_labelled(
    paths: Sequence[Any],
    data: DataSection,
    elements: Sequence[int] | None = None,
    *,
    labels_needed: bool = False,
    tell: Callable[[str], None] | None = None,
) -> tuple[list[Frame], list[Problem]]:
    """Read and check files with the label keys and units of a ``data`` section; see :func:`read_checked`."""
    return read_checked(
        paths,
        data.reading,
        elements=elements,
        labels_needed=labels_needed,
        predictions="keep" if data.predictions_as_labels else "refuse",
        tell=tell,
    )


def _hold_out(frames: list[Frame], fraction: float, generator: torch.Generator) -> tuple[list[Frame], list[Frame]]:
    count = max(1, round(fraction * len(frames))) if fraction else 0
    if len(frames) - count < 1:
        raise ValueError(f"{len(frames)} frames are too few to hold out a share of {fraction}")
    order = torch.randperm(len(frames), generator=generator).tolist()
    held = set(order[:count])
    return [f for i, f in enumerate(frames) if i not in held], [frames[i] for i in sorted(held)]


def energy_scale(frames: Sequence[Frame]) -> float:
    """Return the root mean square of all force components [eV/Å], which sets the unit of the network's output."""
    components = [f.forces.ravel() for f in frames if f.forces is not None]
    rms = float(np.sqrt(np.mean(np.concatenate(components) ** 2))) if components else 0.0
    return rms if rms > 1e-8 else 1.0


def residual_bias(
    frames: Sequence[Frame], elements: Sequence[int], isolated: Mapping[int, float], predicted: np.ndarray
) -> np.ndarray:
    """Return the energy per atom of each element [eV] that a least-squares fit of what is left of the energies gives.

    Minimum-norm where the compositions do not determine it. It is where the network's own bias starts.
    """
    rows, left = [], []
    for frame, already in zip(frames, predicted, strict=True):
        if frame.energy is not None:
            rows.append([np.count_nonzero(frame.z == z) for z in elements])
            left.append(frame.energy - sum(isolated.get(int(z), 0.0) for z in frame.z) - already)
    if not rows:
        return np.zeros(len(elements))
    return np.linalg.lstsq(np.asarray(rows, float), np.asarray(left), rcond=None)[0]


def build_graphs(
    frames: Sequence[Frame], cutoff: float, dtype: torch.dtype, what: str, quiet: bool = False
) -> list[AtomicGraph]:
    """Return the graphs of frames, with a progress bar named ``what`` unless ``quiet``."""
    finder = NeighbourFinder(cutoff)
    bar = tqdm(frames, desc=what, unit="frame", leave=False, disable=quiet)
    return [build_graph(f, finder, dtype) for f in bar]


def content_hash(frames: Sequence[Frame]) -> str:
    """Return the sha256 of geometry and labels, in order."""
    digest = hashlib.sha256()
    for f in frames:
        for array in (f.z, f.pos, f.cell, f.pbc, f.energy, f.forces, f.stress):
            digest.update(b"none" if array is None else np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def ranges(frames: Sequence[Frame], graphs: Sequence[AtomicGraph], elements: Sequence[int]) -> dict[str, Any]:
    """Return what the training set covers: frames, atoms, and the shortest pair of each two elements [Å]."""
    shortest: dict[str, float] = {}
    for graph in graphs:
        i, j = graph.edge_index
        vec = graph.pos[j] - graph.pos[i] + graph.edge_shift.to(graph.pos.dtype) @ graph.cell[0]
        distance = vec.norm(dim=1)
        for a in elements:
            for b in (e for e in elements if e >= a):
                found = distance[(graph.z[i] == a) & (graph.z[j] == b)]
                if len(found):
                    pair = f"{chemical_symbols[a]}-{chemical_symbols[b]}"
                    shortest[pair] = min(shortest.get(pair, float("inf")), float(found.min()))
    energies = [f.energy / len(f) for f in frames if f.energy is not None]
    return {
        "frames": len(frames),
        "atoms": sum(len(f) for f in frames),
        "shortest_distance": shortest,
        "energy_per_atom": [min(energies), max(energies)] if energies else None,
    }
