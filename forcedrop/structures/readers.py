"""Reading structures with labels from every format that forcedrop knows, into :class:`Frame` with its units."""

from __future__ import annotations

import gzip
import json
import sqlite3
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ase.db
import ase.io
import numpy as np
from ase import Atoms

from forcedrop.structures.checks import BadFrames, Problem, check_frames
from forcedrop.structures.frame import COMPUTED, Frame
from forcedrop.structures.predictions import Use, settle
from forcedrop.structures.pymatgen_io import frames_from_pymatgen
from forcedrop.structures.store import FrameStore
from forcedrop.units import energy_factor, length_factor

VOIGT_FROM_9 = (0, 4, 8, 5, 2, 1)


@dataclass(frozen=True)
class LabelKeys:
    """Names of the labels in a file; where one is None the candidates below are tried in order.

    ``REF_energy``, ASE's own ``energy``, ``dft_energy``; ``REF_forces``, ``forces``, ``force``, ``dft_forces``; ``REF_stress``,
    ``stress``, ``dft_stress``, and ``REF_virial``, ``virial``, ``virials``, ``dft_virial`` (energies; stress = −virial/volume).
    """

    energy: str | None = None
    forces: str | None = None
    stress: str | None = None


_CANDIDATES = {
    "energy": ("REF_energy", "energy", "dft_energy"),
    "forces": ("REF_forces", "forces", "force", "dft_forces"),
    "stress": ("REF_stress", "stress", "dft_stress", "REF_virial", "virial", "virials", "dft_virial"),
}
_LABELS = {name for names in _CANDIDATES.values() for name in names} | {"free_energy", "energies", "stresses"}


def read_frames(path: str | Path, **options: Any) -> list[Frame]:
    """Read and check one file; see :func:`read_checked` for the options.

    Raises:
        BadFrames: naming file, frame and field of what is wrong, unless ``skip_bad``.
        ValueError: if the file cannot be read, is empty, or lacks a label that was asked for.
    """
    return read_checked([path], **options)[0]


def read_checked(
    paths: Sequence[str | Path],
    *,
    keys: LabelKeys | None = None,
    energy_unit: str = "eV",
    length_unit: str = "Angstrom",
    elements: Collection[int] | None = None,
    skip_bad: bool = False,
    predictions: Use = "refuse",
) -> tuple[list[Frame], list[Problem]]:
    """Read several files, convert to eV and Å, and check every frame.

    Formats by suffix: ``.xyz .extxyz`` (extended XYZ), ``.traj``, ``.db`` (ASE), ``.json .json.gz`` (pymatgen, or an ASE
    database), ``.npz`` (sGDML: kcal/mol and Å unless it says otherwise), ``.h5 .hdf5`` (forcedrop's own), else whatever
    ``ase.io.read`` makes of it.

    Args:
        paths: the files.
        keys: names of the labels.
        energy_unit: of the files; own stores and npz files know theirs.
        length_unit: of the files.
        elements: atomic numbers to accept; all if not given.
        skip_bad: drop bad frames instead of raising.
        predictions: in the place of labels, as in files of dynamics: refused, dropped (where labels do not matter), or kept, that
            is taken for labels; see ``forcedrop.structures.predictions``.

    Returns:
        the good frames, and the problems of those that were dropped.

    Raises:
        BadFrames: for bad frames, unless ``skip_bad``.
        PredictedLabels: for predictions in the place of labels, unless ``predictions`` says otherwise.
        ValueError: if a file cannot be read, is empty, or lacks a label that was asked for; or nothing is left.
    """
    frames: list[Frame] = []
    for path in map(Path, paths):
        found = _read(path, keys or LabelKeys(), energy_factor(energy_unit), length_factor(length_unit))
        if not found:
            raise ValueError(f"{path} holds no structures")
        frames += settle(found, predictions)
    problems = check_frames(frames, elements=elements)
    if problems and not skip_bad:
        raise BadFrames(problems, hint="(--skip-bad, or `skip_bad: true`, drops and lists them)")
    bad = {problem.source for problem in problems}
    good = [f for f in frames if f.source not in bad and f.source.rpartition("#")[0] not in bad]
    if not good:
        raise BadFrames(problems, hint="nothing is left")
    return good, problems


def frames_from_atoms(images: Iterable[Atoms], keys: LabelKeys | None = None, source: str = "<memory>") -> list[Frame]:
    """Return frames from ASE atoms, with the labels found in their calculator, ``info`` and ``arrays``.

    Raises:
        ValueError: if a label that ``keys`` names is in none of them.
    """
    return _from_atoms(list(images), keys or LabelKeys(), source)


def _read(path: Path, keys: LabelKeys, energy: float, length: float) -> list[Frame]:
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    suffix = path.name.lower().removesuffix(".gz")
    suffix = suffix[suffix.rfind(".") :]
    if suffix in (".h5", ".hdf5"):
        with FrameStore(path) as store:
            return list(store)
    reader = {".db": _read_ase_db, ".json": _read_json}.get(suffix, _read_ase)
    try:
        if suffix == ".npz":
            return read_npz(path, None if energy == 1.0 else energy, None if length == 1.0 else length)
        frames = reader(path, keys)
    except (
        ValueError,
        KeyError,
        OSError,
        IndexError,
        StopIteration,
        sqlite3.Error,
        zipfile.BadZipFile,
    ) as error:
        message = str(error) if str(path) in str(error) else f"cannot read {path}: {type(error).__name__}: {error}"
        raise ValueError(message) from error
    return [_convert(f, energy, length) for f in frames] if (energy, length) != (1.0, 1.0) else frames


def _convert(frame: Frame, energy: float, length: float) -> Frame:
    def times(values: Any, factor: float) -> Any:
        return None if values is None else values * factor

    return Frame(
        z=frame.z, pos=frame.pos * length, cell=frame.cell * length, pbc=frame.pbc,
        energy=times(frame.energy, energy), forces=times(frame.forces, energy / length),
        stress=times(frame.stress, energy / length**3), info=frame.info, arrays=frame.arrays,
        constraints=frame.constraints, source=frame.source,
    )  # fmt: skip


def _read_ase(path: Path, keys: LabelKeys) -> list[Frame]:
    is_xyz = path.name.lower().removesuffix(".gz").endswith((".xyz", ".extxyz"))
    if path.stat().st_size == 0:
        return []
    images: Any = ase.io.read(path, index=":", format="extxyz" if is_xyz else None)
    return _from_atoms(images, keys, str(path))


def _read_ase_db(path: Path, keys: LabelKeys) -> list[Frame]:
    with ase.db.connect(path) as database:
        images = [row.toatoms(add_additional_information=True) for row in database.select()]
    for atoms in images:
        extra = atoms.info.pop("key_value_pairs", {})
        atoms.info.pop("data", None)
        atoms.info.pop("unique_id", None)
        atoms.info.update(extra)
    return _from_atoms(images, keys, str(path))


def _read_json(path: Path, keys: LabelKeys) -> list[Frame]:
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as stream:
        values = json.load(stream)
    if isinstance(values, dict) and "ids" in values:
        return _read_ase_db(path, keys)
    return frames_from_pymatgen(values if isinstance(values, list) else [values], source=str(path))


def read_npz(path: Path, energy: float | None = None, length: float | None = None) -> list[Frame]:
    """Read an sGDML-style file with arrays ``R`` (n, N, 3), ``z`` (N,), and ``E``, ``F`` where present.

    Units are those the file states in ``e_unit`` and ``r_unit``, else the factors given, else kcal/mol and Å, which is what
    sGDML and rMD17 files use.

    Raises:
        ValueError: if an array is missing or shapes do not fit.
    """
    with np.load(path, allow_pickle=False) as file:
        data = {name: file[name] for name in file.files}
    names = {
        "R": ("R", "coords"),
        "z": ("z", "nuclear_charges"),
        "E": ("E", "energies"),
        "F": ("F", "forces"),
    }
    found = {k: next((data[n] for n in alternatives if n in data), None) for k, alternatives in names.items()}
    pos, z = found["R"], found["z"]
    if pos is None or z is None:
        raise ValueError(f"{path} needs the arrays R (positions) and z (atomic numbers); it has {', '.join(data)}")
    if pos.ndim != 3 or pos.shape[1:] != (len(z), 3):
        raise ValueError(f"{path}: R must have shape (n, {len(z)}, 3), got {pos.shape}")
    e = energy_factor(str(data["e_unit"])) if "e_unit" in data else (energy or energy_factor("kcal/mol"))
    r = length_factor(str(data["r_unit"])) if "r_unit" in data else (length or 1.0)
    energies, forces = found["E"], found["F"]
    for name, array in (("E", energies), ("F", forces)):
        if array is not None and len(array) != len(pos):
            raise ValueError(f"{path}: {name} has {len(array)} entries, R has {len(pos)}")
    return [
        Frame(
            z=z.astype(np.int64), pos=pos[i].astype(float) * r, cell=np.zeros((3, 3)), pbc=np.zeros(3, bool),
            energy=None if energies is None else float(np.ravel(energies)[i]) * e,
            forces=None if forces is None else forces[i].astype(float) * (e / r),
            source=f"{path}#{i}",
        )
        for i in range(len(pos))
    ]  # fmt: skip


def _from_atoms(images: Sequence[Atoms], keys: LabelKeys, source: str) -> list[Frame]:
    values = [_available(atoms) for atoms in images]
    for name in ("energy", "forces", "stress"):
        asked = getattr(keys, name)
        if asked is not None and images and not any(asked in v for v in values):
            have = sorted({key for v in values for key in v})
            raise ValueError(f"{source} has no {name} label {asked!r} in any frame; it has {', '.join(have) or 'none'}")
    return list(_labelled(images, values, keys, source))


def _labelled(
    images: Sequence[Atoms], values: Sequence[dict[str, Any]], keys: LabelKeys, source: str
) -> Iterator[Frame]:
    for index, (atoms, have) in enumerate(zip(images, values, strict=True)):
        labels: dict[str, Any] = {}
        for name, candidates in _CANDIDATES.items():
            asked = getattr(keys, name)
            key = next((k for k in ((asked,) if asked else candidates) if k in have), None)
            if key is not None:
                labels[name] = _label(name, key, have[key], atoms)
        used = _LABELS | {keys.energy, keys.forces, keys.stress}
        core = {"numbers", "positions", *used}
        written = atoms.info.get("constraints")
        if isinstance(written, list):  # those of any kind, beside a column for the simple ones
            labels["constraints"] = written
            used = used | {"constraints"}
        computed = {k: np.asarray(have[k]) for k in COMPUTED if k in have and np.shape(have[k]) == (len(atoms),)}
        yield Frame.from_atoms(
            atoms,
            source=f"{source}#{index}",
            info={k: v for k, v in atoms.info.items() if k not in used},
            arrays={**{k: v for k, v in atoms.arrays.items() if k not in core}, **computed},
            **labels,
        )


def _available(atoms: Atoms) -> dict[str, Any]:
    """Return everything that could be a label: the calculator's results, ``info`` and ``arrays``."""
    results = atoms.calc.results if atoms.calc is not None else {}
    return {**atoms.arrays, **results, **atoms.info}


def _label(name: str, key: str, value: Any, atoms: Atoms) -> Any:
    if name == "energy":
        return float(value)
    array = np.asarray(value, dtype=np.float64)
    if name == "forces":
        return array
    if "virial" in key:
        array = -array / atoms.get_volume()
    return array.reshape(9)[list(VOIGT_FROM_9)] if array.size == 9 else array
