"""Damaged and hostile inputs: a valid small file of each kind, and what is done to it, as a function of (category, index)."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import ase.db
import ase.io
import numpy as np
import torch
import yaml
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator

from forcedrop.md.restart import Restart
from forcedrop.model import TrainedModel, save_model
from forcedrop.uncertainty.calibration import Calibration, Growth
from tests.conftest import banked_potential, settings

EVIL = "forcedrop_fuzz_evil"
"""A module that the worker puts on the path; whoever imports it leaves a mark."""
TOKENS = (
    "nan", "inf", "-inf", "-1", "0", "1e300", "-1e300", "1e-300", "99999999999", "1e6", "1e9", "2e5", "1e-3", "0.05", "", "x",
    "1,5", "1 2", "None", "T", "[]", "{}", '"', "\x00", "é", "0x10", "1_000", "H", "Zz", "119", "-5", "species:S:1", "pos:R:3",
    "forces:R:9999999999", 'Lattice="0 0 0 0 0 0 0 0 0"', 'Lattice="1e6 0 0 0 5 0 0 0 5"', 'pbc="T F F"', "energy=x",
)  # fmt: skip
SCALARS: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**64, 10**30, 0.5, -1e300, 1e300, float("nan"), float("inf"), "", "x", "nan", [], [[]], {},
    [1, "a"], {"a": 1}, {"@module": EVIL, "@class": "Evil"}, "H", 119, 1e12, {"@module": "numpy", "@class": "array", "data": "x"},
)  # fmt: skip
LENGTHS = (
    0.0,
    1e-12,
    1e-3,
    0.02,
    0.1,
    0.3,
    1.0,
    5.0,
    1e3,
    2e5,
    1e6,
    1e9,
    1e12,
    1e300,
    float("nan"),
    float("inf"),
    -3.0,
)


def labelled(periodic: bool, seed: int = 0) -> Atoms:
    """Return ethanol, or four atoms of copper, with numbers in the place of labels."""
    atoms = bulk("Cu", cubic=True) if periodic else molecule("CH3CH2OH")
    generator = np.random.default_rng(seed)
    atoms.positions += generator.normal(scale=0.05, size=(len(atoms), 3))
    results = {"energy": -3.5, "forces": generator.normal(size=(len(atoms), 3))}
    if periodic:
        results["stress"] = 0.01 * generator.normal(size=6)
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def _written(name: str, kind: str, images: list[Atoms], folder: Path) -> bytes:
    path = folder / name
    ase.io.write(path, images, format=kind)
    return path.read_bytes()


def seeds(folder: Path) -> dict[str, list[tuple[str, bytes]]]:
    """Return valid files by category, as (name, content); ``folder`` is a place to make them."""
    mixed, molecules = [labelled(False), labelled(True), labelled(False, 1)], [labelled(False), labelled(False, 1)]
    xyz = _written("a.xyz", "extxyz", mixed, folder)
    npz = io.BytesIO()
    first = molecules[0]
    np.savez(
        npz, R=np.stack([m.positions for m in molecules]), z=first.numbers, E=np.array([[-1.0], [-2.0]]),
        F=np.stack([m.get_forces() for m in molecules]),
    )  # fmt: skip
    for name in ("a.db", "b.json"):
        with ase.db.connect(folder / name) as database:
            for atoms in mixed:
                database.write(atoms, tag="a", data={"x": [1.0, 2.0]})
    model = _model(folder)
    return {
        "xyz": [("a.xyz", xyz)],
        "packed": [("a.xyz.gz", gzip.compress(xyz)), ("a.json.gz", gzip.compress(_pymatgen()))],
        "traj": [("a.traj", _written("a.traj", "traj", mixed, folder))],
        "npz": [("a.npz", npz.getvalue())],
        "json": [("a.json", _pymatgen()), ("b.json", (folder / "b.json").read_bytes())],
        "db": [("a.db", (folder / "a.db").read_bytes())],
        "other": [
            ("a.cif", _written("a.cif", "cif", mixed[1:2], folder)), ("POSCAR", _written("POSCAR", "vasp", mixed[1:2], folder)),
            ("a.pdb", _written("a.pdb", "proteindatabank", mixed[:1], folder)),
        ],
        "train": [("train.yaml", yaml.safe_dump(settings("there")).encode())],
        "active": [("active.yaml", yaml.safe_dump(_active()).encode())],
        "model": [("model.pt", model)],
        "fields": [("model.pt", model)],
        "restart": [("restart.pt", _restart(folder))],
        "state": [("pick.json", json.dumps({"picked": 2, "ready": 1, "looking": "abc", "candidates": 10}).encode())],
    }  # fmt: skip


def _pymatgen() -> bytes:
    from pymatgen.io.ase import AseAtomsAdaptor

    structure = AseAtomsAdaptor.get_structure(bulk("Cu", cubic=True)).as_dict()
    for site in structure["sites"]:
        site["properties"] = {"forces": [0.1, 0.2, 0.3]}
    values = {"structure": structure, "energy": -3.0, "stress": np.eye(3).tolist(), "stress_unit": "GPa"}
    return json.dumps([values, structure]).encode()


def _active() -> dict[str, Any]:
    training = settings("there")
    data = {"isolated_atoms": {"Cu": 0.0}}
    return {
        "state": "state", "start": {"files": ["a.xyz"]}, "oracle": {"name": "emt"}, "explore": {"temperatures": [300.0]},
        "training": {**{k: v for k, v in training.items() if k not in ("output", "data")}, "data": data},
        "stop": {"labels": 10}, "pick": {"batch": [2, 3]},
    }  # fmt: skip


def _model(folder: Path) -> bytes:
    calibration = Calibration(
        Growth(1.3, 0.5, 0.01), {6: 1.1}, {"energy": 1.4}, {"forces": 1.3}, {"forces": {0.9: 1.8}}, 10, 8,
        {name: [0.1, 0.2] for name in ("max_force", "mean_force", "energy_per_atom")},
    )  # fmt: skip
    about = {"method": "posterior", "functions": 8, "seed": 0}
    save_model(
        TrainedModel(banked_potential().float(), calibration, about, {"training_set": {"hash": "a"}}), folder / "m.pt"
    )
    return (folder / "m.pt").read_bytes()


def _restart(folder: Path) -> bytes:
    atoms = labelled(False)
    recorder = {"csv": 10, "xyz": 20, "frames": 1, "flagged": 0, "first": [1.0, 2.0]}
    settings_ = {"numbers": atoms.numbers.tolist(), "steps": 10}
    Restart(
        settings_, 5, atoms.positions, np.zeros((9, 3)), np.zeros((3, 3)), {"rng": "{}"}, recorder, None
    ).save(folder / "r.pt")  # fmt: skip
    return (folder / "r.pt").read_bytes()


# what is done to them


def _bytes(data: bytes, draw: np.random.Generator) -> bytes:
    """Flip bits, cut, repeat, overwrite."""
    found = bytearray(data)
    for _ in range(draw.integers(1, 4)):
        place, length = int(draw.integers(len(found) + 1)), int(draw.integers(1, 33))
        what = draw.integers(6)
        if what <= 1 and found:
            found[min(place, len(found) - 1)] ^= 1 << int(draw.integers(8))
        elif what == 2:
            del found[place : place + length]
        elif what == 3:
            found[place:place] = found[place : place + length]
        elif what == 4:
            found[place : place + length] = draw.bytes(length)
        else:
            del found[place:]
    return bytes(found)


def _text(data: bytes, draw: np.random.Generator) -> bytes:
    """Replace words, remove, repeat and swap lines."""
    lines = data.decode("utf-8", "replace").split("\n")
    for _ in range(draw.integers(1, 4)):
        k, what = int(draw.integers(len(lines))), draw.integers(6)
        if what <= 2:
            words = lines[k].split(" ")
            filled = [i for i, word in enumerate(words) if word] or [0]
            words[draw.choice(filled)] = str(draw.choice(TOKENS))
            lines[k] = " ".join(words)
        elif what == 3 and len(lines) > 1:
            del lines[k]
        elif what == 4:
            lines.insert(k, lines[int(draw.integers(len(lines)))])
        else:
            lines = lines[: k + 1]
    return "\n".join(lines).encode()


def _places(values: Any) -> list[tuple[Any, Any]]:
    """Return every (container, key) of nested lists and dictionaries."""
    keys = list(values) if isinstance(values, dict) else range(len(values)) if isinstance(values, list) else []
    return [place for key in keys for place in [(values, key), *_places(values[key])]]


def replaced(values: Any, draw: np.random.Generator, scalars: tuple[Any, ...] = SCALARS) -> Any:
    """Replace, remove or double entries of nested values, in place."""
    for _ in range(draw.integers(1, 4)):
        places = _places(values)
        if not places:
            break
        container, key = places[int(draw.integers(len(places)))]
        what = draw.integers(5)
        if what == 0 and isinstance(container, dict):
            del container[key]
        elif what == 1 and isinstance(container, dict):
            container[str(draw.choice(("x", "epochs", "@module", "seed", "cutoff")))] = container.pop(key)
        elif what == 2 and isinstance(container[key], int | float) and not isinstance(container[key], bool):
            container[key] = container[key] * float(draw.choice([-1.0, 1e6, 1e-6, 1e12]))
        else:
            container[key] = deepcopy(scalars[int(draw.integers(len(scalars)))])
    return values


def _npz(data: bytes, draw: np.random.Generator) -> bytes:
    """Replace arrays by others, of other shapes and kinds."""
    with np.load(io.BytesIO(data)) as file:
        arrays = {name: file[name] for name in file.files}
    name = str(draw.choice(list(arrays)))
    shape = tuple(int(n) for n in draw.integers(0, 4, draw.integers(0, 4)))
    others = (
        np.zeros(shape), np.full(arrays[name].shape, float(draw.choice(LENGTHS))), arrays[name].astype("U8"),
        arrays[name].astype(complex), arrays[name][:1], arrays[name].astype(bool), np.array("x"), arrays[name].T,
    )  # fmt: skip
    what = int(draw.integers(len(others) + 3))
    if what < len(others):
        arrays[name] = others[what]
    elif what == len(others):
        del arrays[name]
    elif what == len(others) + 1:
        arrays["lattice"] = np.full((3, 3), float(draw.choice(LENGTHS)))
    else:
        arrays["e_unit"] = np.array(str(draw.choice(TOKENS)))
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


@lru_cache
def _bomb() -> bytes:
    """Return 300 MB of zeros, packed."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    return b"".join([*(packer.compress(bytes(2**20)) for _ in range(300)), packer.flush()])


def _packed(data: bytes, draw: np.random.Generator) -> bytes:
    if draw.integers(2):
        return _bytes(data, draw)
    if not draw.integers(40):
        return _bomb()
    return gzip.compress(_text(gzip.decompress(data), draw))


def _yaml(data: bytes, draw: np.random.Generator) -> bytes:
    what = draw.integers(8)
    if what == 0:
        return _bytes(data, draw)
    if what == 1:
        return _text(data, draw)
    if what == 2:
        depth = int(draw.integers(2, 30))
        bomb = "a0: &a0 [x, x]\n" + "".join(f"a{k}: &a{k} [*a{k - 1}, *a{k - 1}]\n" for k in range(1, depth))
        return bomb.encode() + data
    if what == 3:
        odd = (
            "2001-99-99", "9" * 5000, "0x_", "!!bool maybe", "!!float ''", "!!timestamp x", "[" * 2000, "&a [*a]", "x" * 200000,
            "!!python/object/apply:os.system ['true']", "!!python/name:os.system", "!x y", "{? [a] : b}", "*b",
        )  # fmt: skip
        key = str(draw.choice(["epochs", "device", "model", "output", "seed", "data"]))
        return data + f"\n{key}2: {odd[int(draw.integers(len(odd)))]}\n".encode()
    return yaml.safe_dump(replaced(yaml.safe_load(data), draw)).encode()


def _json(data: bytes, draw: np.random.Generator) -> bytes:
    what = draw.integers(5)
    if what <= 1:
        return _bytes(data, draw)
    if what == 2 and not draw.integers(6):
        return b"[" * int(draw.integers(10, 100_000))
    values = [json.loads(data)]
    return json.dumps(replaced(values, draw)[0]).encode() if values else b""


def _tensors(data: bytes, draw: np.random.Generator) -> bytes:
    """Replace what a file of tensors says."""
    values = torch.load(io.BytesIO(data), weights_only=True)
    if "json" in values and draw.integers(2):
        values["json"] = json.dumps(replaced(json.loads(values["json"]), draw))
    elif draw.integers(2):
        tensors = [(c, k) for c, k in _places(values) if isinstance(c[k], torch.Tensor)]
        container, key = tensors[int(draw.integers(len(tensors)))]
        x = container[key].clone()
        bad = float(np.float32(np.clip(draw.choice(LENGTHS), -1e38, 1e38)))  # NaN stays
        others = (
            torch.full_like(x, bad),
            x.double(),
            x.long(),
            x.flatten(),
            x[:0] if x.ndim else x,
            x.to(torch.complex64),
        )
        container[key] = others[int(draw.integers(len(others)))]
    else:
        safe = tuple(s for s in SCALARS if not isinstance(s, dict))
        replaced(values, draw, safe)
    out = io.BytesIO()
    torch.save(values, out)
    return out.getvalue()


def _either(*ways: Callable[[bytes, np.random.Generator], bytes]) -> Callable[[bytes, np.random.Generator], bytes]:
    return lambda data, draw: ways[int(draw.integers(len(ways)))](data, draw)


DAMAGE: dict[str, Callable[[bytes, np.random.Generator], bytes]] = {
    "xyz": _either(_bytes, _text, _text), "packed": _packed, "traj": _bytes, "npz": _either(_bytes, _npz), "json": _json,
    "db": _bytes, "other": _either(_bytes, _text), "train": _yaml, "active": _yaml, "model": _bytes, "fields": _tensors,
    "restart": _either(_bytes, _tensors), "state": _json,
}  # fmt: skip


def damaged(category: str, index: int, valid: dict[str, list[tuple[str, bytes]]]) -> tuple[str, bytes]:
    """Return the name and the content of one damaged file."""
    draw = np.random.default_rng([zlib.crc32(category.encode()), index])
    choices = valid[category]
    name, data = choices[int(draw.integers(len(choices)))]
    return name, DAMAGE[category](data, draw)


def strange_atoms(index: int) -> Atoms:
    """Return atoms for the calculator that nobody would compute on purpose."""
    draw = np.random.default_rng([17, index])
    atoms = labelled(bool(draw.integers(2)), index)
    atoms.calc = None
    for _ in range(draw.integers(1, 4)):
        what, length = draw.integers(10), float(draw.choice(LENGTHS))
        one = int(draw.integers(len(atoms)))
        if what == 0:
            atoms.positions[one, int(draw.integers(3))] = length
        elif what == 1:
            atoms.positions[one] = atoms.positions[int(draw.integers(len(atoms)))] + length * 1e-3
        elif what == 2:
            atoms.positions += length
        elif what == 3:
            atoms.positions *= length
        elif what == 4:
            cell = atoms.cell.array.copy()
            cell[int(draw.integers(3)), int(draw.integers(3))] = length
            atoms.set_cell(cell)
        elif what == 5:
            atoms.set_cell(
                length * draw.normal(size=(3, 3)) if np.isfinite(length) and length < 1e200 else np.full((3, 3), length)
            )
        elif what == 6:
            atoms.pbc = draw.integers(0, 2, 3).astype(bool)
        elif what == 7:
            atoms.numbers[one] = int(draw.choice([0, -1, 119, 200, 1, 2, 6, 92, 10**6]))
        elif what == 8:
            atoms.set_cell(np.eye(3) * length if np.isfinite(length) else np.eye(3))
        else:
            atoms = atoms[: int(draw.integers(0, 3))]
            if not len(atoms):
                break
    return atoms
