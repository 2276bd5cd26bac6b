"""What readers of other packages did in public reports, tried with ours; see README.md of this folder."""

import json
import warnings
from pathlib import Path

import ase.db
import ase.io
import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from pymatgen.core import Lattice, Structure
from pymatgen.io.ase import AseAtomsAdaptor

from forcedrop.active.oracles import Task, compute, find_oracle
from forcedrop.structures import LabelKeys, frames_from_atoms, frames_from_pymatgen, read_frames

STRESS = np.array([0.01, 0.02, 0.03, 0.004, 0.005, 0.006])
TENSOR = STRESS[[0, 5, 4, 5, 1, 3, 4, 3, 2]].reshape(3, 3)
KBAR = 0.1 * units.GPa


def copper(seed: int = 0) -> Atoms:
    atoms = bulk("Cu", a=3.6, cubic=True)
    atoms.rattle(0.05, seed=seed)
    return atoms


FORCES = np.linspace(-1, 1, 12).reshape(4, 3)


def quiet(path: Path, **options: object):
    """Read a file of which nothing is to be said."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return read_frames(path, **options)


@pytest.mark.parametrize("name", ["a.xyz", "a.traj", "a.db"])
def test_forces_of_fixed_atoms_are_labels_too(tmp_path: Path, name: str) -> None:
    """ACEsuit/mace#1448: forces of constrained atoms were read as 0."""
    path, atoms = tmp_path / name, copper()
    atoms.set_constraint(FixAtoms([0, 1]))
    atoms.calc = SinglePointCalculator(atoms, energy=-1.0, forces=FORCES)
    if name == "a.xyz":  # as written here, for a writer may keep less
        rows = [(*x, *f, free) for x, f, free in zip(atoms.positions, FORCES, "FFTT", strict=True)]
        text = "\n".join("Cu " + " ".join(map(str, row)) for row in rows)
        header = 'Lattice="3.6 0 0 0 3.6 0 0 0 3.6" Properties=species:S:1:pos:R:3:forces:R:3:move_mask:L:1 energy=-1.0'
        path.write_text(f"4\n{header}\n{text}\n")
    elif name == "a.db":
        with ase.db.connect(path) as database:
            database.write(atoms)
    else:
        ase.io.write(path, atoms)
    frame = quiet(path)[0]
    np.testing.assert_allclose(frame.forces, FORCES, atol=1e-7)
    assert frame.to_atoms().constraints[0].get_indices().tolist() == [0, 1]


def test_labels_of_fixed_atoms_are_computed_whole() -> None:
    """ACEsuit/mace#1448 again, where labels are computed: ``get_forces`` of ASE is 0 on fixed atoms."""
    atoms = copper()
    atoms.calc = EMT()
    expected = atoms.get_forces()
    atoms.set_constraint(FixAtoms([0, 1]))
    np.testing.assert_array_equal(compute(Task("a", atoms, find_oracle("emt")))["forces"], expected)


def test_stress_in_kilobar_beside_two_names(tmp_path: Path) -> None:
    """ACEsuit/mace#994: VASP's stress of −251 kbar under two names, with nine and with six numbers."""
    atoms = copper()
    tensor = np.array([[-251.1, 13.8, 73.4], [13.8, -229.3, -11.8], [73.4, -11.8, 55.7]])
    atoms.info |= {
        "dft_energy": -12.0,
        "dft_stress": tensor[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]],
        "REF_stress": tensor,
    }
    atoms.arrays["dft_forces"] = FORCES
    ase.io.write(tmp_path / "a.xyz", atoms, format="extxyz")
    with pytest.raises(ValueError, match=r"a\.xyz.*stress.*GPa or kbar"):
        read_frames(tmp_path / "a.xyz")
    frame = read_frames(tmp_path / "a.xyz", stress_unit="kbar")[0]
    np.testing.assert_allclose(frame.stress, KBAR * np.array([-251.1, -229.3, 55.7, -11.8, 73.4, 13.8]), rtol=1e-6)
    assert frame.energy == -12.0


def test_a_stress_and_a_virial_that_do_not_agree(tmp_path: Path) -> None:
    """brucefan1983/GPUMD#278: which counts where a frame has both, and what if they differ?"""
    atoms = copper()
    atoms.info |= {"energy": -1.0, "REF_stress": TENSOR, "REF_virial": -TENSOR * atoms.get_volume()}
    ase.io.write(tmp_path / "same.xyz", atoms, format="extxyz")
    np.testing.assert_allclose(quiet(tmp_path / "same.xyz")[0].stress, STRESS, atol=1e-8)
    atoms.info["REF_virial"] = TENSOR * atoms.get_volume()
    ase.io.write(tmp_path / "other.xyz", atoms, format="extxyz")
    with pytest.warns(UserWarning, match=r"other\.xyz: REF_stress is taken, not REF_virial, which differs"):
        frame = read_frames(tmp_path / "other.xyz")[0]
    np.testing.assert_allclose(frame.stress, STRESS, atol=1e-8)


def test_stress_of_a_json_file_in_kilobar(tmp_path: Path) -> None:
    """materialyzeai/matpes#6: is the stress beside a structure in eV/Å³ or in kbar?"""
    structure = Structure(Lattice.cubic(3.6), ["Cu"] * 4, [[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
    entry = {"structure": structure.as_dict(), "energy": -13.19, "forces": FORCES.tolist()}
    entry["stress"] = [-5.71186022, -9.34590239, 13.64346365, 22.84178803, 23.6719352, 6.22290851]
    (tmp_path / "a.json").write_text(json.dumps([entry]))
    with pytest.raises(ValueError, match=r"a\.json.*stress.*GPa or kbar"):
        read_frames(tmp_path / "a.json")
    (tmp_path / "b.json").write_text(json.dumps([{**entry, "stress_unit": "kbar"}]))
    np.testing.assert_allclose(quiet(tmp_path / "b.json")[0].stress, KBAR * np.array(entry["stress"]), rtol=1e-9)


@pytest.mark.parametrize("shape", [(6,), (9,), (3, 3)])
def test_stress_of_a_calculator_in_every_shape(shape: tuple[int, ...]) -> None:
    """deepmodeling/dpdata#975: nine numbers of a stress in a calculator were an AssertionError."""
    atoms = copper()
    stress = STRESS if shape == (6,) else TENSOR.reshape(shape)
    atoms.calc = SinglePointCalculator(atoms, energy=-1.0, forces=FORCES, stress=stress)
    np.testing.assert_allclose(frames_from_atoms([atoms])[0].stress, STRESS)


def test_names_and_columns_of_others(tmp_path: Path) -> None:
    """deepmodeling/dpdata#983: ``Energy``, six numbers of stress, unknown columns, no lattice: labels were lost silently."""
    (tmp_path / "a.xyz").write_text(
        "2\n"
        'Lattice="6 0 0 0 6 0 0 0 6" Properties=species:S:1:pos:R:3:forces:R:3:magmom:R:1:tags:I:1 Energy=-3.5 '
        'stress="0.01 0.02 0.03 0.004 0.005 0.006" pbc="T T T"\n'
        "Cu 0 0 0 0.1 0.2 0.3 0.5 1\n"
        "Cu 0 0 2.4 -0.1 -0.2 -0.3 0.5 2\n"
        "2\n"
        "Properties=species:S:1:pos:R:3:forces:R:3 Energy=-3.0\n"
        "Cu 0 0 0 0 0 0.4\n"
        "Cu 0 0 2.4 0 0 -0.4\n"
    )
    first, second = read_frames(tmp_path / "a.xyz")
    assert (first.energy, second.energy) == (-3.5, -3.0)
    np.testing.assert_allclose(first.stress, STRESS)
    np.testing.assert_allclose(second.forces[:, 2], [0.4, -0.4])
    assert first.arrays["tags"].tolist() == [1, 2]
    assert first.pbc.all()
    assert not second.pbc.any()


def test_the_data_set_of_molecules_in_kilocalories(tmp_path: Path) -> None:
    """jla-gardner/load-atoms#78: energies of rMD17 were multiplied by 23.06 instead of divided: forces of 1000s of eV/Å."""
    atoms = molecule("CH3CH2OH")
    n = len(atoms)
    coords = np.array([atoms.positions + 0.02 * np.random.default_rng(k).normal(size=(n, 3)) for k in range(3)])
    energies = np.array([-97195.2, -97190.1, -97188.7])
    forces = np.random.default_rng(0).normal(scale=25, size=(3, n, 3))
    np.savez(
        tmp_path / "rmd17.npz", coords=coords, nuclear_charges=atoms.numbers, energies=energies, forces=forces,
        old_indices=np.arange(3), old_energies=energies, old_forces=forces,
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"not used: old_energies, old_forces"):
        frames = read_frames(tmp_path / "rmd17.npz", energy_unit="kcal/mol")
    assert [f.energy for f in frames] == pytest.approx((energies * units.kcal / units.mol).tolist())
    np.testing.assert_allclose(frames[1].forces, forces[1] * units.kcal / units.mol)
    wrong = []
    for k in range(3):
        image = Atoms(numbers=atoms.numbers, positions=coords[k])
        image.info["REF_energy"] = energies[k] / (units.kcal / units.mol)
        image.arrays["REF_forces"] = forces[k] / (units.kcal / units.mol)
        wrong.append(image)
    ase.io.write(tmp_path / "wrong.xyz", wrong, format="extxyz")
    with pytest.raises(ValueError, match=r"wrong\.xyz.*(forces|energies)"):
        read_frames(tmp_path / "wrong.xyz")


@pytest.mark.parametrize("order", [("momenta", "forces"), ("forces", "momenta")])
def test_columns_are_what_the_header_says(tmp_path: Path, order: tuple[str, str]) -> None:
    """molmod/psiflow#47: columns 4 to 7 were taken for forces whatever the header said."""
    atoms = molecule("H2O")
    values = {"momenta": np.full((3, 3), 7.0), "forces": FORCES[:3]}
    for name in order:
        atoms.arrays[name] = values[name]
    atoms.info["energy"] = -1.0
    ase.io.write(tmp_path / "a.xyz", atoms, format="extxyz", columns=["symbols", "positions", *order])
    frame = quiet(tmp_path / "a.xyz")[0]
    np.testing.assert_allclose(frame.forces, FORCES[:3], atol=1e-7)


@pytest.mark.parametrize("row", ["Cu 0 0 2.4 -0.1 -0.2 -0.3 9.9", "Cu 0 0 2.4 -0.1 -0.2"])
def test_rows_of_another_length_than_the_header_says(tmp_path: Path, row: str) -> None:
    """libAtoms/QUIP#199: rows with one number more or fewer than the header has; the message did not say which file."""
    (tmp_path / "a.xyz").write_text(
        "2\nProperties=species:S:1:pos:R:3:forces:R:3 energy=-3.0\n"
        "Cu 0 0 0 0.1 0.2 0.3\nCu 0 0 2.4 -0.1 -0.2 -0.3\n"
        f"2\nProperties=species:S:1:pos:R:3:forces:R:3 energy=-3.0\nCu 0 0 0 0.1 0.2 0.3\n{row}\n"
    )
    with pytest.raises(ValueError, match=r"a\.xyz#1"):
        read_frames(tmp_path / "a.xyz")
    assert len(read_frames(tmp_path / "a.xyz", skip_bad=True)) == 1


@pytest.mark.parametrize(
    ("header", "pbc"),
    [
        ('Lattice="6 0 0 0 6 0 0 0 6"', (True, True, True)),
        ('Lattice="6 0 0 0 6 0 0 0 6" pbc="T T F"', (True, True, False)),
        ('Lattice="6 0 0 0 6 0 0 0 6" pbc="F F F"', (False, False, False)),
        ("", (False, False, False)),
        ('Lattice="6 0 0 0 6 0 0 0 6" PBC="1 0 0"', (True, False, False)),
        ('Lattice="6 0 0 0 6 0 0 0 6" PBC="0 0 0"', (False, False, False)),
    ],
)
def test_periodic_directions(tmp_path: Path, header: str, pbc: tuple[bool, ...]) -> None:
    """libAtoms/ExtXYZ.jl#54 and openkim/kliff#2: which directions are periodic, with and without ``pbc`` or ``PBC``?"""
    (tmp_path / "a.xyz").write_text(f"2\n{header} Properties=species:S:1:pos:R:3 energy=-3.0\nCu 0 0 0\nCu 0 0 2.4\n")
    frame = quiet(tmp_path / "a.xyz")[0]
    assert tuple(frame.pbc) == pbc
    assert frame.cell.any() == bool(header)


@pytest.mark.parametrize(
    ("lattice", "properties", "pbc"), [("lattice", "properties", "pbc"), ("LATTICE", "Properties", "Pbc")]
)
def test_words_of_the_header_in_any_case(tmp_path: Path, lattice: str, properties: str, pbc: str) -> None:
    """brucefan1983/GPUMD#225: headers are case-insensitive there; ASE drops ``lattice`` and ``properties``."""
    (tmp_path / "a.xyz").write_text(
        f'2\nenergy=-3.5 virial="1 0 0 0 1 0 0 0 2" {pbc}="T T F" {lattice}="6 0 0 0 7 0 0 0 8" '
        f"{properties}=species:S:1:pos:R:3:force:R:3\nCu 0 0 0 0.1 0.2 0.3\nCu 0 0 2.4 -0.1 -0.2 -0.3\n"
    )
    frame = quiet(tmp_path / "a.xyz")[0]
    np.testing.assert_allclose(frame.cell, np.diag([6, 7, 8]))
    assert frame.pbc.tolist() == [True, True, False]
    np.testing.assert_allclose(frame.forces, [[0.1, 0.2, 0.3], [-0.1, -0.2, -0.3]])
    np.testing.assert_allclose(frame.stress[:3], -np.array([1, 1, 2]) / 336)
    assert frame.energy == -3.5


@pytest.mark.parametrize(("energy", "force"), [("nan", "0.1"), ("-1.0", "nan"), ("inf", "0.1")])
def test_numbers_that_are_none(tmp_path: Path, energy: str, force: str) -> None:
    """brucefan1983/GPUMD#682: a file with gaps trained to errors of nan; nothing said which frame it was."""
    head = "2\nProperties=species:S:1:pos:R:3:forces:R:3 energy="
    (tmp_path / "a.xyz").write_text(
        f"{head}-1.0\nCu 0 0 0 0 0 0.1\nCu 0 0 2.4 0 0 -0.1\n{head}{energy}\nCu 0 0 0 0 0 {force}\nCu 0 0 2.4 0 0 -0.1\n"
    )
    with pytest.raises(ValueError, match=r"a\.xyz#1: (energy|forces): .*(NaN|nan|finite)"):
        read_frames(tmp_path / "a.xyz")
    assert len(read_frames(tmp_path / "a.xyz", skip_bad=True)) == 1


def test_labels_in_the_data_of_a_database(tmp_path: Path) -> None:
    """AIRI-Institute/nablaDFT#48: energies and forces are in ``row.data``, where nobody looked."""
    with ase.db.connect(tmp_path / "a.db") as database:
        for k in range(3):
            database.write(molecule("H2O"), data={"energy": -2.0 - k, "forces": FORCES[:3]})
    frames = quiet(tmp_path / "a.db")
    assert [f.energy for f in frames] == [-2.0, -3.0, -4.0]
    np.testing.assert_allclose(frames[0].forces, FORCES[:3])


def test_an_energy_that_was_written_as_json(tmp_path: Path) -> None:
    """libAtoms/QUIP#207: a version of ASE wrote ``energy="_JSON 70.38809727285381"``, and energies were not found."""
    (tmp_path / "a.xyz").write_text(
        '2\nProperties=species:S:1:pos:R:3 energy="_JSON -70.38809727285381" pbc="F F F"\nCu 0 0 0\nCu 0 0 2.4\n'
    )
    assert read_frames(tmp_path / "a.xyz")[0].energy == pytest.approx(-70.38809727285381)


def test_arrays_of_a_converted_database(tmp_path: Path) -> None:
    """mir-group/nequip#381: ``z`` of every structure (n, N) and energies (n, 1)."""
    atoms = molecule("H2O")
    data = {"E": np.array([[-1.0], [-2.0]]), "F": np.zeros((2, 3, 3)), "R": np.array([atoms.positions] * 2)}
    np.savez(tmp_path / "a.npz", z=np.array([atoms.numbers] * 2), **data)
    with pytest.raises(ValueError, match=r"a\.npz: z must have shape \(N,\).*\(2, 3\)"):
        read_frames(tmp_path / "a.npz", energy_unit="eV")
    np.savez(tmp_path / "b.npz", z=atoms.numbers, **data)
    assert [f.energy for f in read_frames(tmp_path / "b.npz", energy_unit="eV")] == [-1.0, -2.0]


@pytest.mark.parametrize("change", ["moved", "cell", "shorter", "element"])
def test_results_of_another_structure_are_no_labels(change: str) -> None:
    """JuliaMolSim/JuLIP.jl#92: results that a calculator keeps of atoms as they were before went on into files."""
    atoms = copper()
    atoms.calc = EMT()
    right = atoms.get_potential_energy()
    assert frames_from_atoms([atoms])[0].energy == right
    for calculator in (atoms.calc, SinglePointCalculator(atoms, energy=right, forces=atoms.get_forces())):
        image = copper()
        image.calc = calculator
        if change == "moved":
            image.positions[1] += 0.3
        elif change == "cell":
            image.set_cell(image.cell * 1.1, scale_atoms=False)
        elif change == "element":
            image.numbers[0] = 47
        else:
            del image[0]
            image.calc = calculator
        with pytest.raises(ValueError, match=r"#0.*(other|another|earlier|moved|changed)"):
            frames_from_atoms([image])


def test_units_of_gromacs(tmp_path: Path) -> None:
    """zincware/IPSuite#463: energies in kJ/mol, forces in kJ/mol/nm, positions already in Å."""
    atoms = molecule("H2O")
    atoms.info["REF_energy"] = -1000.0
    atoms.arrays["REF_forces"] = 3000 * FORCES[:3]
    ase.io.write(tmp_path / "a.xyz", atoms, format="extxyz")
    frame = read_frames(tmp_path / "a.xyz", energy_unit="kJ/mol", forces_unit="kJ/mol/nm")[0]
    kj = units.kJ / units.mol
    assert frame.energy == pytest.approx(-1000 * kj)
    np.testing.assert_allclose(frame.forces, 300 * kj * FORCES[:3], atol=1e-6)
    np.testing.assert_allclose(frame.pos, atoms.positions, atol=1e-7)


def test_constraints_do_not_grow_on_the_way() -> None:
    """materialsproject/pymatgen#4354: on the way to pymatgen and back the atoms that were free were fixed as well."""
    structure = Structure(Lattice.cubic(3.6), ["Cu"] * 4, [[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
    structure.add_site_property("selective_dynamics", [[False] * 3, [True] * 3, [True] * 3, [True, True, False]])
    atoms = frames_from_pymatgen([structure])[0].to_atoms()
    moved = atoms.copy()
    moved.set_positions(atoms.positions + 0.1)
    shift = moved.positions - atoms.positions
    np.testing.assert_allclose(shift[0], 0)
    np.testing.assert_allclose(shift[1:3], 0.1)
    np.testing.assert_allclose(shift[3], [0.1, 0.1, 0], atol=1e-12)
    fixed = copper()
    fixed.set_constraint(FixAtoms([0]))
    assert frames_from_atoms([fixed])[0].to_atoms().constraints[0].get_indices().tolist() == [0]


def test_what_is_read_from_is_left_as_it_was() -> None:
    """materialsproject/pymatgen#4289: a conversion changed the structure that it was given."""
    structure = AseAtomsAdaptor.get_structure(copper())
    structure.properties |= {"energy": -1.0, "spacegroup": {"number": 225, "setting": 1}}
    before = json.dumps(structure.as_dict(), default=str)
    frame = frames_from_pymatgen([structure])[0]
    frame.pos[:] = 0.0
    frame.info["spacegroup"] = None
    assert json.dumps(structure.as_dict(), default=str) == before
    atoms = copper()
    atoms.info["name"] = "x"
    positions = atoms.positions.copy()
    frame = frames_from_atoms([atoms])[0]
    frame.pos[:] = 0.0
    frame.to_atoms().positions[:] = 1.0
    np.testing.assert_array_equal(atoms.positions, positions)
    np.testing.assert_array_equal(frame.pos, 0.0)


def test_lines_after_the_atoms(tmp_path: Path) -> None:
    """pyscf/pyscf#3104: files of QM9 have lines after the atoms, which were read as atoms or as another structure."""
    (tmp_path / "qm9.xyz").write_text(
        "3\ngdb 3\t799.58812\t437.90386\t282.94545\nO -0.0343 0.9775 0.0076\nH 0.0648 0.0205 0.0015\nH 0.8718 1.3008 0.0006\n"
        "1671.4222\t3803.6305\t3907.698\nO\tO\nInChI=1S/H2O/h1H2\tInChI=1S/H2O/h1H2\n"
    )
    with pytest.raises(ValueError, match=r"qm9\.xyz"):
        read_frames(tmp_path / "qm9.xyz")


@pytest.mark.parametrize(
    ("sites", "said"),
    [
        ("Cu 0.5 0.5\nSi 0.5 0.5", r"a\.cif#0: .*the site of atom 0 is occupied by 0\.5 Cu, 0\.5 Si"),
        ("Cu 0.5 0.7", r"a\.cif#0: .*the site of atom 0 is occupied by 0\.7 Cu"),
        ("Cu 0.5 1", None),
    ],
)
def test_sites_that_are_shared_or_partly_empty(tmp_path: Path, sites: str, said: str | None) -> None:
    """SimonEnsemble/PorousMaterials.jl#126: partial occupancies of a CIF file were rounded to whole atoms without a word."""
    rows = [f"{e} {e}{k} {x} {x} 0.75 {n}" for k, (e, x, n) in enumerate(line.split() for line in sites.splitlines())]
    cell = (
        "\n".join(f"_cell_length_{a} 4.0" for a in "abc")
        + "\n"
        + "\n".join(f"_cell_angle_{a} 90" for a in ("alpha", "beta", "gamma"))
    )
    names = "\n".join(f"_atom_site_{n}" for n in ("type_symbol", "label", "fract_x", "fract_y", "fract_z", "occupancy"))
    (tmp_path / "a.cif").write_text(
        f"data_x\n{cell}\n_symmetry_Int_Tables_number 1\nloop_\n{names}\n" + "\n".join([*rows, "Cu Cu9 0 0 0 1"]) + "\n"
    )
    if said is None:
        assert len(read_frames(tmp_path / "a.cif")[0]) == 2
    else:
        with pytest.raises(ValueError, match=said):
            read_frames(tmp_path / "a.cif")


def test_a_free_energy_that_differs_is_mentioned(tmp_path: Path) -> None:
    """libAtoms/QUIP#225: forces of VASP belong to its free energy, not to what ASE calls ``energy``."""
    atoms = copper()
    atoms.calc = SinglePointCalculator(atoms, energy=-14.9, free_energy=-15.1, forces=FORCES)
    ase.io.write(tmp_path / "a.traj", atoms)
    with pytest.warns(UserWarning, match=r"a\.traj: energy is taken, not free_energy, which differs"):
        assert read_frames(tmp_path / "a.traj")[0].energy == -14.9
    assert quiet(tmp_path / "a.traj", keys=LabelKeys(energy="free_energy"))[0].energy == -15.1
    atoms.calc = SinglePointCalculator(atoms, energy=-15.1, free_energy=-15.1, forces=FORCES)
    ase.io.write(tmp_path / "b.traj", atoms)
    assert quiet(tmp_path / "b.traj")[0].energy == -15.1
