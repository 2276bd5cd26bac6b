"""Reading structures with labels from every format that forcedrop knows, into :class:`Frame` with its units."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ase.db
import ase.io
import numpy as np
from ase import Atoms
from ase.io.extxyz import key_val_str_to_dict

from forcedrop.door import door
from forcedrop.structures.checks import BadFrames, Problem, check_frames
from forcedrop.structures.conversion import Conversion, Units
from forcedrop.structures.door import check_packed, open_text, reason_of, require_text, xyz_images
from forcedrop.structures.frame import COMPUTED, Frame
from forcedrop.structures.header import spelt
from forcedrop.structures.labels import LabelKeys, Labelled, Raw, labelled
from forcedrop.structures.names import Kind, meaning
from forcedrop.structures.npz import ASSUMED, read_arrays
from forcedrop.structures.occupancy import require_whole_sites
from forcedrop.structures.plausible import not_per_bohr, questions
from forcedrop.structures.predictions import Use, only_labels
from forcedrop.structures.pymatgen_io import raw_from_pymatgen
from forcedrop.structures.reading import Reading
from forcedrop.structures.results import results_of
from forcedrop.structures.store import FrameStore
from forcedrop.structures.telling import Tell, accepted, say
from forcedrop.units import unit


def read_frames(path: str | Path, **options: Any) -> list[Frame]:
    """Read and check one file; see :func:`read_checked` for the options.

    Raises:
        BadFrames: naming file, frame and field of what is wrong, unless ``skip_bad``.
        ValueError: if the file cannot be read, is empty, or lacks a label that was asked for.
    """
    return read_checked([path], **options)[0]


def read_checked(
    paths: Sequence[str | Path],
    reading: Reading | None = None,
    *,
    elements: Collection[int] | None = None,
    labels_needed: bool = False,
    predictions: Use = "refuse",
    tell: Tell | None = None,
    **options: Any,
) -> tuple[list[Frame], list[Problem]]:
    """Read several files, convert to eV and Å, and check every frame.

    Formats by suffix: ``.xyz .extxyz`` (extended XYZ), ``.traj``, ``.db`` (ASE), ``.json .json.gz`` (pymatgen, or an ASE
    database), ``.npz`` (sGDML: kcal/mol and Å unless it or you say otherwise), ``.h5 .hdf5`` (forcedrop's own), else whatever
    ``ase.io.read`` makes of it.

    A stress or virial of a frame without a periodic direction, or without a volume, does not count: there is no stress to
    compare it with. That of a slab or a wire counts where its cell has three vectors, per volume of that cell.

    Args:
        paths: the files.
        reading: names, units, and what becomes of bad frames.
        elements: atomic numbers to accept; all if not given.
        labels_needed: refuse a file in which no frame has an energy or forces.
        predictions: in the place of labels, as in files of dynamics: refused, dropped (where labels do not matter), or kept, that
            is taken for labels; see ``forcedrop.structures.predictions``.
        tell: gets each line on names and units that were read, and on what may be a mistake; without it the latter are
            warnings.
        options: fields of :class:`Reading`, instead of ``reading``.

    Returns:
        the good frames, and the problems of those that were dropped.

    Raises:
        BadFrames: for bad frames, unless ``skip_bad``.
        PredictedLabels: for predictions in the place of labels, unless ``predictions`` says otherwise.
        ValueError: if a file cannot be read, is empty, or lacks a label that was asked for; if its numbers can hardly be in their
            units, unless ``trust_units``; or nothing is left.
    """
    reading = reading or Reading(**options)
    read: dict[Path, Labelled] = {}
    for path in map(Path, paths):
        found = read_file(path, reading)
        found = read[path] = replace(found, frames=only_labels(found.frames, predictions))
        if not found.frames and not found.problems:
            raise ValueError(f"{path} holds no structures")
        if labels_needed and found.frames and all(f.energy is None and f.forces is None for f in found.frames):
            raise ValueError(_no_labels(path, found.names))
    problems = [problem for found in read.values() for problem in found.problems]
    named = {problem.source for problem in problems}
    whole = [f for found in read.values() for f in found.frames if f.source not in named]
    problems += check_frames(whole, elements=elements)
    if problems and not reading.skip_bad:
        raise BadFrames(problems, hint="--skip-bad, or `skip_bad: true`, drops and lists them")
    bad = {problem.source for problem in problems}
    good: list[Frame] = []
    for path, found in read.items():
        kept = [f for f in found.frames if f.source not in bad and str(path) not in bad]
        _question(path, kept, found, reading)
        say(found, tell)
        good += kept
    if not good:
        raise BadFrames(problems, hint="nothing is left")
    return good, problems


def frames_from_atoms(images: Iterable[Atoms], keys: LabelKeys | None = None, source: str = "<memory>") -> list[Frame]:
    """Return frames from ASE atoms, with the labels found in their calculator, ``info`` and ``arrays``.

    Raises:
        ValueError: if a label that ``keys`` names is in none of them, or is no label.
    """
    raws = [_raw(atoms, f"{source}#{index}") for index, atoms in enumerate(images)]
    return accepted(labelled(raws, keys or LabelKeys(), Conversion(), source))


def read_file(path: Path, reading: Reading) -> Labelled:
    """Read one file as ``reading`` says; nothing is checked but names, shapes and units of labels.

    Raises:
        ValueError: if the file cannot be read, lacks a label that was asked for, or says other units than ``reading``.
    """
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    suffix = path.name.lower().removesuffix(".gz")
    suffix = suffix[suffix.rfind(".") :]
    own, assumed = Units(), {}
    damaged: list[Problem] = []
    with door(path):
        check_packed(path)
        if suffix in (".h5", ".hdf5"):
            return _read_store(path, reading)
        if suffix == ".npz":
            raws, own = read_arrays(path, _asked(reading.keys))
            assumed = ASSUMED
        else:
            read = {".db": _read_ase_db, ".json": _read_json}.get(suffix, _read_ase)(path)
            raws = [entry for entry in read if isinstance(entry, Raw)]
            damaged = [entry for entry in read if isinstance(entry, Problem)]
    if damaged and not raws:
        return Labelled([], damaged)
    try:
        units = reading.units.conversion(own, assumed)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    found = labelled(raws, reading.keys, units, str(path), arrays=suffix == ".npz")
    if units.forces.name.endswith("/Bohr") and not {"forces", "length"} & units.stated and not_per_bohr(found.frames):
        units = replace(units, forces=unit(f"{units.energy}/{units.length}", "force"))
        found = labelled(raws, reading.keys, units, str(path), arrays=suffix == ".npz")
        found.doubts.append(
            f"{path}: forces are in {units.forces}, by the energies of neighbouring frames (`forces_unit`)"
        )
    found.units, found.problems = units, damaged + found.problems
    if (
        assumed
        and "energy" not in units.stated
        and any(f.energy is not None or f.forces is not None for f in found.frames)
    ):
        found.doubts.append(
            f"{path} does not say its unit of energy: kcal/mol, as in sGDML files, is assumed (`energy_unit`)"
        )
    return found


def _question(path: Path, frames: Sequence[Frame], found: Labelled, reading: Reading) -> None:
    """Add what is strange about the numbers of a file to its doubts.

    Args:
        path: of the file.
        frames: those of it that can be used.
        found: what was read.
        reading: how.

    Raises:
        ValueError: if they can hardly be in a unit that was not stated, unless ``reading`` trusts them.
    """
    if found.units is None:
        return
    refused: list[str] = []
    doubted: set[str] = set()
    for question in questions(frames, found.units):
        text, stated = f"{path}: {question.text}", set(question.about) <= found.units.stated and not question.always
        if question.grave and not stated and not reading.trust_units:
            refused.append(text)
            doubted |= set(question.about)
        else:
            found.doubts.append(text)
    if refused:
        options = ", ".join(f"`{name}_unit`" for name in sorted(doubted))
        hint = f"(state the right {options}; or, if the numbers are right, `trust_units: true`, --trust-units)"
        raise ValueError("\n".join([*refused, hint]))


def _read_store(path: Path, reading: Reading) -> Labelled:
    with FrameStore(path) as store:
        frames = list(store)
    names = sorted({name for frame in frames for name in (*frame.info, *frame.arrays)})
    lost = [frame for frame in frames if frame.stress is not None and not (frame.pbc.any() and frame.volume > 0)]
    found = Labelled([replace(f, stress=None) if f in lost else f for f in frames] if lost else frames, names=names)
    if lost:
        found.doubts.append(f"{path}: stress of {len(lost)} frames without a periodic cell does not count")
    if any(
        value not in (None, "eV", "Angstrom", "eV/Angstrom", "eV/Angstrom^3") for value in vars(reading.units).values()
    ):
        found.notes.append(f"{path} is forcedrop's own, in eV and Å; the units that you give are not for it")
    return found


def _asked(keys: LabelKeys) -> dict[str, Kind]:
    """Return the names of arrays that were asked for, and what they are."""
    found = {keys.energy: Kind.ENERGY, keys.forces: Kind.FORCES, keys.virial: Kind.VIRIAL}
    if keys.stress is not None:
        found[keys.stress] = meaning(keys.stress, arrays=True) or Kind.STRESS
    return {name: kind for name, kind in found.items() if name is not None}


def _no_labels(path: Path, names: Sequence[str]) -> str:
    return (
        f"{path}: no frame has an energy or forces under a known name; it has {', '.join(names) or 'nothing but structures'}; "
        "say which they are (`energy_key`, `forces_key`, `stress_key`, `virial_key`)"
    )


def _read_ase(path: Path) -> Sequence[Raw | Problem]:
    is_xyz = path.name.lower().removesuffix(".gz").endswith((".xyz", ".extxyz"))
    if path.stat().st_size == 0:
        return []
    images: Any = xyz_images(path, read_comment) if is_xyz else ase.io.read(path, index=":")
    return _from_atoms(images, str(path), _of_cif if path.name.lower().removesuffix(".gz").endswith(".cif") else _raw)


def read_comment(line: str) -> dict[str, Any]:
    """Read the comment line of an extended XYZ file; a stress or virial of six numbers, which ASE refuses, is left as it is."""
    line = spelt(line)
    try:
        return dict(key_val_str_to_dict(line))
    except ValueError:
        hidden = _TENSOR.sub(lambda found: f"{found[1]}{_HIDDEN}{found[2]}=", line)
        values = key_val_str_to_dict(hidden)
        return {name.removeprefix(_HIDDEN): value for name, value in values.items()}


_HIDDEN = "forcedrop-"
_TENSOR = re.compile(r"(^|\s)(stress|virial)\s*=")


def _read_ase_db(path: Path) -> Sequence[Raw | Problem]:
    with ase.db.connect(path) as database:
        rows = [(row.toatoms(), dict(row.key_value_pairs), dict(row.data)) for row in database.select()]
    for atoms, pairs, data in rows:
        atoms.info = {**data, **pairs}
    raws = _from_atoms([atoms for atoms, *_ in rows], str(path))
    for raw, (_, pairs, _) in zip(raws, rows, strict=True):
        if isinstance(raw, Raw):
            raw.frame.info.clear()
            raw.frame.info.update(pairs)
    return raws


def _read_json(path: Path) -> Sequence[Raw | Problem]:
    with open_text(path) as stream:
        text = stream.read()
    require_text(text)
    values = json.loads(text)
    if isinstance(values, dict) and "ids" in values:
        return _read_ase_db(path)
    items = values if isinstance(values, list) else [values]
    return [_or_problem(f"{path}#{index}", item, raw_from_pymatgen) for index, item in enumerate(items)]


def _from_atoms(
    images: Iterable[Atoms | Problem], source: str, read: Callable[[Atoms, str], Raw] | None = None
) -> list[Raw | Problem]:
    return [
        atoms if isinstance(atoms, Problem) else _or_problem(f"{source}#{index}", atoms, read or _raw)
        for index, atoms in enumerate(images)
    ]


def _or_problem(source: str, item: Any, read: Callable[[Any, str], Raw]) -> Raw | Problem:
    """Return a structure, or what is wrong with it, whatever that is."""
    try:
        return read(item, source)
    except Exception as error:
        return Problem(source, "structure", reason_of(error).removeprefix(f"{source}: "))


def _of_cif(atoms: Atoms, source: str) -> Raw:
    require_whole_sites(atoms, source)
    return _raw(atoms, source)


def _raw(atoms: Atoms, source: str) -> Raw:
    results = results_of(atoms, source)
    computed = {k: np.asarray(results[k]) for k in COMPUTED if np.shape(results.get(k, 0.0)) == (len(atoms),)}
    written = atoms.info.get("constraints")  # those of any kind, beside a column for the simple ones
    frame = Frame.from_atoms(
        atoms,
        source=source,
        info={k: v for k, v in atoms.info.items() if k != "constraints"},
        arrays={**{k: v for k, v in atoms.arrays.items() if k not in ("numbers", "positions")}, **computed},
        constraints=written if isinstance(written, list) else None,
    )
    return Raw(frame, {**atoms.arrays, **results, **atoms.info})
