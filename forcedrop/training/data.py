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
from forcedrop.model import load_model
from forcedrop.structures import (
    BadFrames,
    Frame,
    Problem,
    is_isolated_atom,
    isolated_energies,
    read_checked,
)
from forcedrop.structures.compositions import basis, formula
from forcedrop.structures.copies import Signature, copies, signatures
from forcedrop.structures.isolated import doubtful_binding
from forcedrop.structures.prints import Prints
from forcedrop.structures.states import unseen_states
from forcedrop.training.config import DataSection, TrainConfig
from forcedrop.training.split import hold_out, make_units, rare

FEWEST_HELD = 4
"""Frames that calibrated the model to start from, at least, to calibrate again."""


@dataclass(frozen=True)
class Split:
    """Three disjoint lists of frames."""

    train: list[Frame]
    validation: list[Frame]
    calibration: list[Frame]


@dataclass(frozen=True)
class Prepared:
    """Everything that training needs to know about the data.

    Attributes:
        split: what each frame is for.
        elements: of the structures that train; an isolated atom alone teaches nothing about its element.
        isolated: energy of each isolated atom [eV] by atomic number.
        isolated_origin: where these come from.
        compositions: whose combinations have energies that the data determine; None where all have.
        energy_scale: unit of the network's output [eV/Å].
        problems: of the frames that were dropped.
        notes: what a user should know of the split, a sentence each.
        prints: of the frames that train.
    """

    split: Split
    elements: tuple[int, ...]
    isolated: dict[int, float]
    isolated_origin: str
    compositions: list[dict[str, int]] | None
    energy_scale: float
    problems: list[Problem]
    notes: list[str]
    prints: Prints


def prepare_data(config: TrainConfig, tell: Callable[[str], None] | None = None) -> Prepared:
    """Read, check and split the frames, and find the isolated-atom energies.

    Copies of a structure, and pieces of a trajectory, stay on one side of the split; a copy that is held out counts once.

    Args:
        config: of the training.
        tell: gets each line on how the files were read; without it, what may be a mistake is a warning.

    Raises:
        BadFrames: if a frame is bad, or is to be held out and trains as well, unless such frames are to be skipped.
        ValueError: if a file has no labels, or too few frames remain to split.
    """
    data, cutoff = config.data, config.model.cutoff
    frames, problems = read_labelled(data.train, data, labels_needed=True, tell=tell)
    singles = [f for f in frames if is_isolated_atom(f, cutoff)]
    frames = [f for f in frames if not is_isolated_atom(f, cutoff)] or singles
    elements = tuple(sorted({int(z) for f in frames for z in f.z}))
    known = [f for f in singles if int(f.z[0]) in elements]
    isolated, origin = isolated_energies(
        [*frames, *known], given=data.isolated_atoms, reading=data.reading, cutoff=cutoff, tell=tell
    )
    signed = signatures(frames)
    calibrates = config.gives_error_bars
    drawn_validation = 0.0 if data.validation else data.validation_fraction
    drawn_calibration = data.calibration_fraction if calibrates and not data.calibration else 0.0
    units, notes = make_units(frames, signed, data.split, (drawn_validation, drawn_calibration))
    notes += _unknown(singles, elements)
    doubts = (doubtful_binding(frames, isolated), unseen_states(frames))
    notes += [f"warning: {doubt}" for doubt in doubts if doubt is not None]
    generator = torch.Generator().manual_seed(config.seed)
    roles: dict[str, list[Frame]] = {}
    given: list[tuple[str, Sequence[Any] | None]] = [
        ("validation", data.validation),
        ("calibration", data.calibration if calibrates else None),
    ]
    before, signed_before = list(frames), list(signed)
    for name, paths in given:
        if paths:
            own, own_signed, more = _held_out(paths, config, elements, before, signed_before, tell)
            roles[name], problems = own, problems + more
            before, signed_before = before + own, signed_before + own_signed
    if drawn_calibration and (calibrated := _calibrated_start(config)) is not None:
        again = calibrated.hold(frames)
        held = [unit for unit in units if again[unit.frames].all()]
        if len(held) >= FEWEST_HELD:
            units = [unit for unit in units if not again[unit.frames].all()]
            roles["calibration"] = [frames[k] for k in sorted(k for unit in held for k in unit.frames)]
            notes.append(f"the {len(roles['calibration'])} frames that calibrated {config.start} calibrate again")
    left = 1.0
    for name, share in (("validation", drawn_validation), ("calibration", drawn_calibration)):
        if name not in roles:
            units, held = hold_out(units, share / left, generator, frames)
            roles[name] = [frames[k] for k in sorted(k for unit in held for k in unit.frames)]
            left -= share
    chosen = sorted(k for unit in units for k in [*unit.frames, *unit.copies])
    train = [frames[k] for k in chosen]
    notes += rare(units, frames)
    split = Split(train, roles["validation"], roles["calibration"])
    spanning = basis([*train, *known])
    determined = not origin.startswith(("fitted", "zero")) or len(spanning) == len(elements)
    return Prepared(
        split=split,
        elements=elements,
        isolated=isolated,
        isolated_origin=origin,
        compositions=None if determined else spanning,
        energy_scale=energy_scale(train),
        problems=problems,
        notes=[*notes, *_undetermined(None if determined else spanning)],
        prints=Prints.taken([signed[k] for k in chosen]),
    )


def _calibrated_start(config: TrainConfig) -> Prints | None:
    """Return the prints of the frames that calibrated the model to start from, if there is one and they are known."""
    if config.start is None or not config.start.is_file():
        return None
    values = load_model(config.start).provenance.get("calibration_prints")
    return None if values is None else Prints.from_dict(values)


def _unknown(singles: Sequence[Frame], elements: Sequence[int]) -> list[str]:
    """Say of which elements there is an isolated atom and nothing to learn from."""
    lonely = sorted({int(f.z[0]) for f in singles} - set(elements))
    if not lonely:
        return []
    names = ", ".join(chemical_symbols[z] for z in lonely)
    return [
        f"warning: an isolated atom is all there is of {names}: no structure to train on holds it, the model will not know it"
    ]


def _undetermined(compositions: Sequence[Mapping[str, int]] | None) -> list[str]:
    """Say which energies mean nothing, if some do."""
    if compositions is None:
        return []
    if not compositions:
        return [
            "warning: no frame has an energy: energies of the model mean nothing, only their differences at one composition do"
        ]
    names = ", ".join(formula(known) for known in compositions)
    return [
        f"warning: the energies of isolated atoms are not known, and the compositions ({names}) do not determine them: energies "
        "of other compositions than these and their combinations will mean nothing; give `data.isolated_atoms`"
    ]


def _held_out(
    paths: Sequence[Any],
    config: TrainConfig,
    elements: Sequence[int],
    others: Sequence[Frame],
    signed: Sequence[Signature],
    tell: Callable[[str], None] | None,
) -> tuple[list[Frame], list[Signature], list[Problem]]:
    """Read files that are held out: each structure once, none that is among ``others``.

    Raises:
        BadFrames: if a structure is, unless bad frames are to be skipped; or nothing is left.
    """
    data, cutoff = config.data, config.model.cutoff
    frames, problems = read_labelled(paths, data, elements, labels_needed=True, tell=tell)
    own = signatures(frames)
    first = copies([*others, *frames], [*signed, *own])[len(others) :]
    shared = [
        Problem(
            frame.source, "copy", f"the same structure as {others[k].source}, which is used for something else already"
        )
        for frame, k in zip(frames, first.tolist(), strict=True)
        if k < len(others) and not is_isolated_atom(frame, cutoff)
    ]
    hint = f"{len(shared)} of {len(frames)} frames to hold out are copies of frames that have another purpose"
    if shared and (not data.skip_bad or len(shared) == len(frames)):
        raise BadFrames(shared, hint=f"({hint}; `skip_bad: true` leaves them out)")
    kept = [k for k in range(len(frames)) if first[k] == len(others) + k or is_isolated_atom(frames[k], cutoff)]
    return [frames[k] for k in kept], [own[k] for k in kept], problems + shared


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
