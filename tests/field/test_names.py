"""What a number is comes from one table of names, wherever it is kept; what is not used is said."""

import json
from pathlib import Path

import ase.db
import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from pymatgen.core import Lattice, Structure

from forcedrop.structures import BadFrames, LabelKeys, frames_from_pymatgen, read_checked, read_frames
from forcedrop.structures.names import Kind, candidates, looks_like, meaning

FORCES = np.linspace(-1, 1, 12).reshape(4, 3)
STRESS = np.array([0.01, 0.02, 0.03, 0.004, 0.005, 0.006])
TENSOR = STRESS[[0, 5, 4, 5, 1, 3, 4, 3, 2]].reshape(3, 3)


def copper() -> Atoms:
    atoms = bulk("Cu", a=3.6, cubic=True)
    atoms.rattle(0.05, seed=0)
    return atoms


def written(path: Path, energy: str, forces: str, stress: str, tensor: np.ndarray) -> Path:
    atoms = copper()
    atoms.info[energy], atoms.arrays[forces], atoms.info[stress] = -3.0, FORCES, tensor
    ase.io.write(path, atoms, format="extxyz")
    return path


def right(frame) -> None:
    assert frame.energy == pytest.approx(-3.0)
    np.testing.assert_allclose(frame.forces, FORCES, atol=1e-7)
    np.testing.assert_allclose(frame.stress, STRESS, atol=1e-7)


VIRIAL = -TENSOR * copper().get_volume()
FAMILIES = {
    "ase": ("energy", "forces", "stress", TENSOR),
    "mace": ("REF_energy", "REF_forces", "REF_virials", VIRIAL),
    "gap": ("dft_energy", "dft_force", "dft_virial", VIRIAL),
    "capitals": ("DFT_Energy", "DFT_Forces", "DFT_Virials", VIRIAL),
    "gpumd": ("energy", "force", "virial", VIRIAL),
    "nequip": ("total_energy", "forces", "virial", VIRIAL),
    "short": ("TotEnergy", "Force", "vir", VIRIAL),
    "behind": ("energy_ref", "forces_ref", "stress_ref", TENSOR),
}


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("shape", [(3, 3), (9,), (6,)])
def test_families_of_names(tmp_path: Path, family: str, shape: tuple[int, ...]) -> None:
    energy, forces, stress, tensor = FAMILIES[family]
    numbers = tensor[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]] if shape == (6,) else tensor.reshape(shape)
    if shape == (6,) or stress != "stress":
        frame = read_frames(written(tmp_path / "a.xyz", energy, forces, f"{stress}", numbers))[0]
        right(frame)
        assert not {energy, stress} & set(frame.info)


@pytest.mark.parametrize("name", ["Virial", "vir", "VIRIALS", "DFT-virial", "virial"])
def test_a_virial_is_one_whatever_it_is_asked_by(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / "a.xyz", "e_dft", "f_dft", name, VIRIAL)
    right(read_frames(path, keys=LabelKeys("e_dft", "f_dft", name))[0])
    right(read_frames(path, keys=LabelKeys("E_DFT", "f_dft", name.upper()))[0])
    right(read_frames(path, keys=LabelKeys("e_dft", "f_dft", virial=name))[0])


def test_a_name_that_says_nothing_must_be_explained(tmp_path: Path) -> None:
    path = written(tmp_path / "a.xyz", "energy", "forces", "W", VIRIAL)
    with pytest.raises(ValueError, match=r"a\.xyz: whether 'W' is a stress or a virial.*`virial_key`"):
        read_frames(path, keys=LabelKeys(stress="W"))
    right(read_frames(path, keys=LabelKeys(virial="W"))[0])
    path = written(tmp_path / "b.xyz", "energy", "forces", "W", TENSOR)
    right(read_frames(path, keys=LabelKeys(stress="W"), stress_unit="eV/Angstrom^3")[0])
    with pytest.raises(ValueError, match="not both"):
        LabelKeys(stress="a", virial="b")


def test_what_is_left_and_what_was_taken_is_said(tmp_path: Path) -> None:
    atoms = copper()
    atoms.info |= {"energy": -3.0, "REF_energy": -2.0, "MACE_energy": -2.5, "energy_weight": 1.0, "config_type": "x"}
    atoms.arrays["MACE_forces"] = FORCES
    ase.io.write(tmp_path / "a.xyz", [atoms, atoms], format="extxyz")
    said: list[str] = []
    frames, _ = read_checked([tmp_path / "a.xyz"], tell=said.append)
    assert frames[0].energy == -2.0
    assert any("energy from REF_energy" in line for line in said)
    assert any("REF_energy is taken, not energy, which differs in all frames" in line for line in said)
    left = [line for line in said if "not used" in line]
    assert len(left) == 1
    assert "MACE_energy, MACE_forces" in left[0]
    assert "weight" not in left[0]
    with pytest.warns(UserWarning, match=r"is taken|not used") as caught:
        read_frames(tmp_path / "a.xyz")
    assert len(caught) == 2


def test_equal_numbers_under_two_names_need_no_word(tmp_path: Path) -> None:
    path = written(tmp_path / "a.xyz", "energy", "forces", "REF_stress", TENSOR)
    atoms = ase.io.read(path)
    atoms.info |= {"REF_energy": -3.0, "virial": VIRIAL}
    ase.io.write(tmp_path / "b.xyz", atoms, format="extxyz")
    right(read_frames(tmp_path / "b.xyz")[0])


def test_a_free_energy_is_the_last_resort_and_said(tmp_path: Path) -> None:
    atoms = copper()
    atoms.info["free_energy"] = -3.0
    ase.io.write(tmp_path / "a.xyz", atoms, format="extxyz")
    with pytest.warns(UserWarning, match="energies are free energies"):
        assert read_frames(tmp_path / "a.xyz")[0].energy == -3.0
    atoms.info["DFT_energy"] = -2.0
    ase.io.write(tmp_path / "b.xyz", atoms, format="extxyz")
    with pytest.warns(UserWarning, match="DFT_energy is taken, not free_energy, which differs"):
        assert read_frames(tmp_path / "b.xyz")[0].energy == -2.0


def test_database_data_and_pairs(tmp_path: Path) -> None:
    with ase.db.connect(tmp_path / "a.db") as database:
        database.write(
            copper(), dft_energy=-3.0, config_type="x", data={"dft_forces": FORCES, "REF_virial": VIRIAL, "note": "n"}
        )
    frame = read_frames(tmp_path / "a.db")[0]
    right(frame)
    assert frame.info == {"config_type": "x"}


def test_pymatgen_properties() -> None:
    atoms = copper()
    structure = Structure(
        Lattice(atoms.cell.array), ["Cu"] * 4, atoms.positions, coords_are_cartesian=True,
        site_properties={
            "DFT_forces": FORCES.tolist(), "selective_dynamics": [[False] * 3, [True, True, False], [True] * 3, None]
        },
    )  # fmt: skip
    structure.properties |= {"uncorrected_total_energy": -3.0, "virial": VIRIAL.tolist()}
    frame = frames_from_pymatgen([structure])[0]
    right(frame)
    assert frame.constraints == [
        {"name": "FixAtoms", "kwargs": {"indices": [0]}},
        {"name": "FixScaled", "kwargs": {"a": [1], "mask": [False, False, True]}},
    ]
    right(
        frames_from_pymatgen([{"structure": structure, "e": -3.0, "DFT_energy": -1.0}], keys=LabelKeys(energy="e"))[0]
    )


def test_pymatgen_json_with_names_of_a_database(tmp_path: Path) -> None:
    atoms = copper()
    structure = Structure(Lattice(atoms.cell.array), ["Cu"] * 4, atoms.positions, coords_are_cartesian=True)
    item = {
        "structure": structure.as_dict(), "energy_total": -3.0, "force": FORCES.tolist(),
        "stress": (TENSOR / 0.00624150912588).tolist(), "stress_unit": "GPa",
    }  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps([item]), encoding="utf-8")
    right(read_frames(tmp_path / "a.json")[0])
    with pytest.raises(BadFrames, match="`stress_unit` says kbar"):
        read_frames(tmp_path / "a.json", stress_unit="kbar")


def test_a_file_without_labels_is_refused_where_they_are_needed(tmp_path: Path) -> None:
    atoms = molecule("H2O")
    atoms.info["heat_of_formation"] = -1.0
    atoms.arrays["dipoles"] = np.ones((3, 3))
    ase.io.write(tmp_path / "a.xyz", atoms, format="extxyz")
    assert len(read_frames(tmp_path / "a.xyz")) == 1
    with pytest.raises(ValueError, match=r"a\.xyz: no frame has an energy or forces.*dipoles, heat_of_formation"):
        read_checked([tmp_path / "a.xyz"], labels_needed=True)


def test_the_table() -> None:
    assert meaning("ccsd(t) energy") is Kind.ENERGY
    assert meaning("kinetic_energy") is None
    assert meaning("F") is None
    assert meaning("F", arrays=True) is Kind.FORCES
    assert looks_like("kinetic_energy") is None
    assert looks_like("xtb_forces") is Kind.FORCES
    names = ["virial", "stress", "REF_virials", "dft_stress"]
    assert candidates(names, [Kind.STRESS, Kind.VIRIAL]) == ["REF_virials", "stress", "virial", "dft_stress"]
