import json

import ase.db
import ase.io
import numpy as np
import pytest
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from pymatgen.core import Lattice, Molecule, Structure

from forcedrop.structures import (
    BadFrames,
    FrameStore,
    LabelKeys,
    frames_from_atoms,
    frames_from_pymatgen,
    read_frames,
)
from forcedrop.structures.readers import read_checked

FORCES = np.array([[0.1, -0.2, 0.3], [-0.1, 0.2, -0.3]])
STRESS = np.array([0.01, 0.02, 0.03, 0.004, 0.005, 0.006])


def labelled(shift: float = 0.0) -> Atoms:
    atoms = Atoms("CO", positions=[[0, 0, 0], [1.13 + shift, 0, 0]], cell=[8, 9, 10], pbc=True)
    atoms.calc = SinglePointCalculator(atoms, energy=-5.5 + shift, forces=FORCES, stress=STRESS)
    atoms.info["config_type"] = "dimer"
    return atoms


def check(frames, n: int = 2, stress: bool = True) -> None:
    assert len(frames) == n
    for k, frame in enumerate(frames):
        assert frame.z.tolist() == [6, 8]
        assert frame.energy == pytest.approx(-5.5 + 0.1 * k)
        np.testing.assert_allclose(frame.forces, FORCES, atol=1e-7)
        np.testing.assert_allclose(frame.pos[1], [1.13 + 0.1 * k, 0, 0], atol=1e-7)
        if stress:
            np.testing.assert_allclose(frame.stress, STRESS, atol=1e-7)


@pytest.mark.parametrize("name", ["a.xyz", "a.extxyz", "a.traj", "a.db", "a.xyz.gz"])
def test_ase_formats(tmp_path, name: str) -> None:
    path = tmp_path / name
    images = [labelled(), labelled(0.1)]
    if name.endswith(".db"):
        with ase.db.connect(path) as database:
            for atoms in images:
                database.write(atoms, config_type="dimer")
    else:
        ase.io.write(path, images, format="extxyz" if "xyz" in name else None)
    frames = read_frames(path)
    check(frames)
    assert frames[1].source == f"{path}#1"
    if not name.endswith(".traj"):
        assert frames[0].info["config_type"] == "dimer"


@pytest.mark.parametrize(("energy", "forces", "stress"), [
    ("REF_energy", "REF_forces", "REF_stress"), ("dft_energy", "dft_forces", "dft_stress"),
])  # fmt: skip
def test_labels_in_info_and_arrays(tmp_path, energy: str, forces: str, stress: str) -> None:
    atoms = labelled()
    atoms.calc = None
    atoms.info[energy], atoms.arrays[forces] = -5.5, FORCES
    atoms.info[stress] = STRESS[[0, 5, 4, 5, 1, 3, 4, 3, 2]]
    ase.io.write(tmp_path / "a.xyz", atoms, format="extxyz")
    frames = read_frames(tmp_path / "a.xyz")
    check(frames, 1)
    assert energy not in frames[0].info
    assert forces not in frames[0].arrays


def test_reference_labels_win_over_a_calculator_and_keys_win_over_both(tmp_path) -> None:
    atoms = labelled()
    atoms.info["REF_energy"], atoms.info["ccsd"] = -7.0, -8.0
    ase.io.write(tmp_path / "a.xyz", atoms, format="extxyz")
    with pytest.warns(UserWarning, match="REF_energy is taken, not energy, which differs in all frames"):
        assert read_frames(tmp_path / "a.xyz")[0].energy == -7.0
    assert read_frames(tmp_path / "a.xyz", keys=LabelKeys(energy="ccsd"))[0].energy == -8.0
    assert read_frames(tmp_path / "a.xyz", keys=LabelKeys(energy="CCSD"))[0].energy == -8.0
    with pytest.raises(ValueError, match=r"no energy label 'mp2'.*ccsd"):
        read_frames(tmp_path / "a.xyz", keys=LabelKeys(energy="mp2"))


def test_virial_becomes_stress(tmp_path) -> None:
    atoms = labelled()
    atoms.calc = None
    atoms.info["virial"] = np.diag([7.2, 14.4, 0.0])
    ase.io.write(tmp_path / "a.xyz", atoms, format="extxyz")
    np.testing.assert_allclose(read_frames(tmp_path / "a.xyz")[0].stress, [-0.01, -0.02, 0, 0, 0, 0], atol=1e-9)


def test_missing_labels_stay_missing(tmp_path) -> None:
    atoms = labelled()
    atoms.calc = None
    ase.io.write(tmp_path / "a.xyz", atoms, format="extxyz")
    frame = read_frames(tmp_path / "a.xyz")[0]
    assert (frame.energy, frame.forces, frame.stress) == (None, None, None)


def test_sgdml_npz_is_in_kcal_per_mol(tmp_path) -> None:
    kcal = units.kcal / units.mol
    pos = np.array([[[0, 0, 0], [1.13, 0, 0]]])
    np.savez(tmp_path / "a.npz", R=pos, z=[6, 8], E=[[-5.5 / kcal]], F=FORCES[None] / kcal)
    with pytest.warns(UserWarning, match="kcal/mol"):
        check(read_frames(tmp_path / "a.npz"), 1, stress=False)
    np.savez(tmp_path / "b.npz", R=pos, z=[6, 8], E=[-5.5], F=FORCES[None], e_unit="eV", r_unit="Angstrom")
    check(read_frames(tmp_path / "b.npz"), 1, stress=False)
    check(read_frames(tmp_path / "a.npz", energy_unit="kcal/mol"), 1, stress=False)
    np.savez(tmp_path / "c.npz", R=pos, z=[6, 8, 1])
    with pytest.raises(ValueError, match=r"R must have shape \(n, 3, 3\), got \(1, 2, 3\)"):
        read_frames(tmp_path / "c.npz")
    np.savez(tmp_path / "d.npz", E=[1.0])
    with pytest.raises(ValueError, match="needs the arrays R"):
        read_frames(tmp_path / "d.npz")


def test_units_are_converted(tmp_path) -> None:
    ase.io.write(tmp_path / "a.xyz", labelled(), format="extxyz")
    with pytest.warns(UserWarning, match=r"covalent radii|typical frame"):
        frame = read_frames(tmp_path / "a.xyz", energy_unit="Hartree", length_unit="Bohr", trust_units=True)[0]
    assert frame.energy == pytest.approx(-5.5 * units.Hartree)
    np.testing.assert_allclose(frame.forces, FORCES * units.Hartree / units.Bohr, rtol=1e-7)
    np.testing.assert_allclose(frame.stress, STRESS * units.Hartree / units.Bohr**3, rtol=1e-7)
    with pytest.raises(ValueError, match="unknown energy unit 'Rydbirds'"):
        read_frames(tmp_path / "a.xyz", energy_unit="Rydbirds")


def test_pymatgen_objects_and_json(tmp_path) -> None:
    structure = Structure(
        Lattice.orthorhombic(8, 9, 10), ["C", "O"], [[0, 0, 0], [1.13, 0, 0]], coords_are_cartesian=True
    )
    item = {"structure": structure, "energy": -5.5, "forces": FORCES, "stress": STRESS}
    check(frames_from_pymatgen([item]), 1)
    gpa = {
        **item,
        "stress": (STRESS[[0, 5, 4, 5, 1, 3, 4, 3, 2]] / units.GPa).reshape(3, 3).tolist(),
        "stress_unit": "GPa",
    }
    check(frames_from_pymatgen([gpa]), 1)
    plain = {
        "structure": structure.as_dict(),
        "energy": -5.5,
        "forces": FORCES.tolist(),
        "stress": STRESS.tolist(),
    }
    (tmp_path / "a.json").write_text(json.dumps([plain]))
    check(read_frames(tmp_path / "a.json"), 1)
    labelled_structure = structure.copy(site_properties={"forces": FORCES.tolist()})
    labelled_structure.properties["energy"] = -5.5
    check(frames_from_pymatgen([labelled_structure]), 1, stress=False)
    molecule = Molecule(["C", "O"], [[0, 0, 0], [1.13, 0, 0]])
    frame = frames_from_pymatgen([{"molecule": molecule, "energy": 1.0}])[0]
    assert not frame.pbc.any()
    with pytest.raises(ValueError, match=r"list#1: not a pymatgen"):
        frames_from_pymatgen([molecule, 3], source="list")


def test_store_is_read_like_a_file(tmp_path) -> None:
    with FrameStore(tmp_path / "a.h5", "w") as store:
        store.append(frames_from_atoms([labelled(), labelled(0.1)]))
    check(read_frames(tmp_path / "a.h5"))


@pytest.mark.parametrize("name", ["a.xyz", "a.traj", "a.db", "a.json", "a.npz", "a.h5"])
def test_garbage_is_one_clear_error(tmp_path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"this is not what it says it is\n")
    with pytest.raises(ValueError, match=name):
        read_frames(path)


def test_missing_and_empty_files(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"no such file: .*nowhere\.xyz"):
        read_frames(tmp_path / "nowhere.xyz")
    (tmp_path / "empty.xyz").write_text("")
    with pytest.raises(ValueError, match=r"empty\.xyz holds no structures"):
        read_frames(tmp_path / "empty.xyz")


def test_bad_frames_are_named_or_dropped(tmp_path) -> None:
    good, broken = labelled(), labelled(0.1)
    broken.calc.results["forces"] = FORCES.copy()
    broken.calc.results["forces"][1, 2] = np.nan
    ase.io.write(tmp_path / "a.xyz", [good, broken, good], format="extxyz")
    with pytest.raises(BadFrames, match=r"a\.xyz#1: forces: NaN or infinite at atom 1"):
        read_frames(tmp_path / "a.xyz")
    frames, problems = read_checked([tmp_path / "a.xyz"], skip_bad=True)
    assert len(frames) == 2
    assert [p.source for p in problems] == [f"{tmp_path / 'a.xyz'}#1"]
    with pytest.raises(BadFrames, match="nothing is left"):
        read_frames(tmp_path / "a.xyz", elements=[1], skip_bad=True)
