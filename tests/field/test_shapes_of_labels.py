"""Arrays are never flattened to fit; stress needs a cell; a message names the file, the key and both shapes."""

from pathlib import Path

import ase.db
import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc111, molecule

from forcedrop.structures import BadFrames, read_checked, read_frames, write_frames
from forcedrop.structures.frame import Frame

R = np.array([molecule("H2O").positions + 0.01 * k for k in range(2)])
GOOD = {"R": R, "z": [8, 1, 1], "E": [-1.0, -2.0], "F": np.zeros((2, 3, 3)), "e_unit": b"kcal/mol", "r_unit": "Ang"}
BAD = {
    "energies of three": (
        {"E": np.ones((2, 3))},
        r"E \(energy\) must have shape \(2,\), got \(2, 3\); positions have \(2, 3, 3\)"),
    "one energy": ({"E": -1.0}, r"E must have 2 entries.*got shape \(\)"),
    "z of every frame": (
        {"z": np.tile([8, 1, 1], (2, 1))},
        r"z must have shape \(N,\).*got shape \(2, 3\) with R of shape \(2, 3, 3\)"),
    "one frame": ({"R": R[0]}, r"R must have shape \(n, 3, 3\); for one structure \(1, 3, 3\), got \(3, 3\)"),
    "flat positions": ({"R": R.reshape(2, 9)}, r"R must have shape \(n, 3, 3\), got \(2, 9\)"),
    "flat forces": ({"F": np.zeros((2, 9))}, r"F \(forces\) must have shape \(2, 3, 3\), got \(2, 9\)"),
    "forces turned": (
        {"F": np.zeros((3, 2, 3))},
        r"F must have 2 entries like the positions \(2, 3, 3\), got shape \(3, 2, 3\)"),
    "text": ({"E": np.array(["-1.0", "-2.0"])}, r"E must hold numbers, got <U4"),
    "symbols": ({"z": np.array(["O", "H", "H"])}, r"z must hold numbers"),
    "half atoms": ({"z": [8.5, 1, 1]}, r"z must hold atomic numbers"),
    "lattice of six": ({"lattice": np.ones(6)}, r"lattice must have shape \(3, 3\), vectors as columns, got \(6,\)"),
    "stress of three": (
        {"lattice": 9 * np.eye(3), "stress": np.ones((2, 3))},
        r"stress \(stress\) must have shape \(2, 3, 3\), \(2, 9\) or"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(BAD))
def test_arrays_of_other_shapes(tmp_path: Path, name: str) -> None:
    change, message = BAD[name]
    np.savez(tmp_path / "a.npz", **{**GOOD, **change})
    with pytest.raises(ValueError, match=rf"a\.npz: {message}"):
        read_frames(tmp_path / "a.npz")


def test_arrays_that_fit(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **{**GOOD, "E": np.array([[-1.0], [-2.0]])})
    assert [f.energy for f in read_frames(tmp_path / "a.npz")] == pytest.approx([-0.0433641, -0.0867282], abs=1e-6)


def test_lattice_has_its_vectors_as_columns(tmp_path: Path) -> None:
    lattice = np.array([[5.0, 1.0, 0.0], [0.0, 6.0, 0.0], [0.0, 0.0, 7.0]])
    virial = np.tile(np.eye(3), (2, 1, 1))
    np.savez(tmp_path / "a.npz", **{**GOOD, "lattice": lattice, "virial": virial, "e_unit": "eV"})
    frame = read_frames(tmp_path / "a.npz")[1]
    np.testing.assert_array_equal(frame.cell[1], [1.0, 6.0, 0.0])
    assert frame.pbc.all()
    np.testing.assert_allclose(frame.stress, [-1 / 210] * 3 + [0] * 3)


def xyz(path: Path, comment: str, columns: str = "", atoms: Atoms | None = None, column: str = "") -> Path:
    atoms = atoms or bulk("Cu", a=3.6, cubic=True)
    lattice = " ".join(str(x) for x in atoms.cell.array.ravel())
    cell = (
        f'Lattice="{lattice}" pbc="{" ".join("TF"[not p] for p in atoms.pbc)}"' if atoms.cell.any() else 'pbc="F F F"'
    )
    rows = [f"{a.symbol} {a.x} {a.y} {a.z} {column}" for a in atoms]
    path.write_text(
        f"{len(atoms)}\n{cell} Properties=species:S:1:pos:R:3{columns} {comment}\n" + "\n".join(rows) + "\n"
    )
    return path


@pytest.mark.parametrize("key", ["stress", "REF_stress", "virial"])
def test_six_numbers(tmp_path: Path, key: str) -> None:
    frame = read_frames(xyz(tmp_path / "a.xyz", f'energy=-1.0 {key}="1e-2 2e-2 3e-2 4e-3 5e-3 6e-3"'))[0]
    factor = -1 / 3.6**3 if key == "virial" else 1.0
    np.testing.assert_allclose(frame.stress, factor * np.array([0.01, 0.02, 0.03, 0.004, 0.005, 0.006]))
    assert frame.energy == -1.0


WRONG = {
    "three": ('stress="1 2 3"', r"stress: stress and virial must have shape \(6,\), \(9,\) or \(3, 3\), got \(3,\)"),
    "one": ("stress=1.0", r"stress: stress and virial must have shape .*, got \(\)"),
    "words": ("energy=abc", "energy: numbers are wanted, got 'abc'"),
    "several": ('energy="1.0 2.0"', r"energy: an energy must be one number, got shape \(2,\)"),
    "a word for a tensor": ("virial=none", "virial: numbers are wanted, got 'none'"),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_wrong_labels_name_file_frame_and_key(tmp_path: Path, name: str) -> None:
    comment, message = WRONG[name]
    path = xyz(tmp_path / "a.xyz", comment)
    with pytest.raises(BadFrames, match=rf"a\.xyz#0: {message}"):
        read_frames(path)
    path.write_text(path.read_text() + xyz(tmp_path / "b.xyz", "energy=-1.0").read_text())
    frames, problems = read_checked([path], skip_bad=True)
    assert [f.source for f in frames] == [f"{path}#1"]
    assert len(problems) == 1


def test_forces_in_text_or_of_another_shape(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.xyz#0: .*could not convert string to float: 'x'"):
        read_frames(xyz(tmp_path / "a.xyz", "energy=-1.0", ":forces:S:3", column="1.0 2.0 x"))
    with pytest.raises(BadFrames, match=r"forces: forces must have shape \(4, 3\), got \(4, 2\)"):
        read_frames(xyz(tmp_path / "b.xyz", "energy=-1.0", ":forces:R:2", column="1.0 2.0"))
    with ase.db.connect(tmp_path / "a.db") as database:
        database.write(bulk("Cu", cubic=True), data={"forces": np.zeros(12)})
    with pytest.raises(BadFrames, match=r"forces must have shape \(4, 3\), got \(12,\)"):
        read_frames(tmp_path / "a.db")


@pytest.mark.parametrize("label", ["stress", "virial"])
def test_stress_without_a_periodic_cell_does_not_count(tmp_path: Path, label: str) -> None:
    tensor = f'{label}="0.1 0 0 0 0.1 0 0 0 0.1"'
    path = xyz(tmp_path / "a.xyz", f"energy=-1.0 {tensor}", atoms=molecule("H2O"))
    boxed = molecule("H2O", cell=[20, 20, 20])
    for atoms in (boxed, bulk("Cu", a=3.6, cubic=True)):
        path.write_text(path.read_text() + xyz(tmp_path / "b.xyz", f"energy=-1.0 {tensor}", atoms=atoms).read_text())
    with pytest.warns(UserWarning, match="stress of 2 frames without a periodic cell does not count"):
        frames = read_frames(path)
    assert [f.stress is None for f in frames] == [True, True, False]
    assert [f.energy for f in frames] == [-1.0] * 3


def test_stress_of_a_slab_counts_where_its_cell_has_a_volume(tmp_path: Path) -> None:
    slab = fcc111("Cu", (1, 1, 3), vacuum=5.0)
    assert slab.pbc.tolist() == [True, True, False]
    tensor = 'virial="1 0 0 0 1 0 0 0 1"'
    frame = read_frames(xyz(tmp_path / "a.xyz", tensor, atoms=slab))[0]
    np.testing.assert_allclose(frame.stress[0], -1 / slab.get_volume())
    slab.cell[2] = 0
    with pytest.warns(UserWarning, match="stress of 1 frames"):
        assert read_frames(xyz(tmp_path / "b.xyz", tensor, atoms=slab))[0].stress is None


def test_a_store_with_a_molecules_stress(tmp_path: Path) -> None:
    write_frames(tmp_path / "a.h5", [Frame.from_atoms(molecule("H2O"), energy=-1.0, stress=np.ones(6))])
    with pytest.warns(UserWarning, match="does not count"):
        assert read_frames(tmp_path / "a.h5")[0].stress is None


def test_a_tensor_that_is_not_symmetric_is_said(tmp_path: Path) -> None:
    path = xyz(tmp_path / "a.xyz", 'REF_stress="0.1 0.02 0 0.04 0.1 0 0 0 0.1"')
    with pytest.warns(UserWarning, match="not symmetric"):
        np.testing.assert_allclose(read_frames(path)[0].stress, [0.1, 0.1, 0.1, 0, 0, 0.03])
