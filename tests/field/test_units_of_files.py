"""Units: of energy, length, forces and stress each on its own, said, and questioned where numbers cannot be in them."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from typer.testing import CliRunner

from forcedrop.cli import app
from forcedrop.structures import BadFrames, Frame, read_checked, read_frames, write_frames
from forcedrop.structures.plausible import all_electrons, work
from forcedrop.training import ConfigError, parse_config
from forcedrop.training.data import prepare_data
from forcedrop.units import unit
from tests.conftest import settings

KCAL = units.kcal / units.mol
SPELLINGS = {
    "energy": {
        1.0: ["eV", "EV", b"eV", np.array(b"eV"), np.array(["eV"]), "electron volt", "Electronvolts", " ev "],
        KCAL: ["kcal/mol", "KCAL/MOL", "kcal mol^-1", "kcal mol-1", "kcal mol⁻¹", "kcal.mol-1", "kcal/mole", "kcalmol",
               "kcal per mol"],
        units.kJ / units.mol: ["kJ/mol", "kj mol^-1"],
        units.Hartree: ["Hartree", "hartrees", "Ha", "Eh", "E_h", "au", "a.u.", "atomic units", b"HARTREE"],
        units.Rydberg: ["Ry", "rydberg", "RYD"],
        1e-3: ["meV"],
    },
    "length": {
        1.0: ["Angstrom", "ANGSTROM", "angstroms", "Ang", "A", "Å", "\u212b", b"Ang", "A\u030a", "\\AA"],
        units.Bohr: ["Bohr", "bohrs", "a0", "a_0", "au", "Bohr radius"],
        10.0: ["nm", "nanometers"],
    },
    "force": {
        1.0: ["eV/Ang", "eV/A", "eV/Å", "eV Å^-1", "eV*A^-1", "eV Å⁻¹", "eV per Angstrom"],
        units.Hartree / units.Bohr: ["Hartree/Bohr", "Ha/a0", "Eh/bohr", "Hartree/a.u.", "au"],
        KCAL: ["kcal/mol/Ang", "kcal/mol/A", "kcal mol^-1 Angstrom^-1", "kcal/(mol*A)", "Kcal/mole-Angstrom", "kcal/mol·Å"],
        units.kJ / units.mol / 10: ["kJ/mol/nm"],
        units.Rydberg / units.Bohr: ["Ry/bohr", "Ry/au"],
    },
    "stress": {
        1.0: ["eV/Angstrom^3", "eV/A^3", "eV/Å³", "eV/A3", "eV Å**-3"],
        units.GPa: ["GPa", "gpa"],
        0.1 * units.GPa: ["kbar", "kBar", "KB"],
        units.Hartree / units.Bohr**3: ["Hartree/Bohr^3", "Ha/a0^3", "au"],
    },
}  # fmt: skip


@pytest.mark.parametrize("what", list(SPELLINGS))
def test_spellings(what: str) -> None:
    for factor, texts in SPELLINGS[what].items():
        for text in texts:
            assert unit(text, what).factor == pytest.approx(factor, rel=1e-12), text


@pytest.mark.parametrize(("text", "what"), [
    ("Rydbirds", "energy"), ("eV/Angstrom", "energy"), ("eV", "force"), ("eV", "stress"), ("", "length"), ("-GPa", "stress"),
    (np.array(["eV", "eV"]), "energy"), (3, "energy"), ("eV/Å/atom", "force"),
])  # fmt: skip
def test_no_units(text: object, what: str) -> None:
    with pytest.raises(ValueError, match="unit"):
        unit(text, what)


def copper(n: int = 12, seed: int = 0, strained: bool = False) -> list[Frame]:
    """Neighbouring structures with EMT's energies counted from −100 eV an atom."""
    rng, frames = np.random.default_rng(seed), []
    for k in range(n):
        atoms = bulk("Cu", a=3.6, cubic=True)
        if strained:
            noise = rng.normal(scale=0.01, size=(3, 3))
            atoms.set_cell(atoms.cell.array @ (np.eye(3) + 0.5 * (noise + noise.T)), scale_atoms=True)
        atoms.positions += rng.normal(scale=0.05, size=(4, 3))
        atoms.calc = EMT()
        labels = {
            "energy": atoms.get_potential_energy() - 400.0,
            "forces": atoms.get_forces(),
            "stress": atoms.get_stress(),
        }
        frames.append(Frame.from_atoms(atoms, source=f"emt#{k}", **labels))
    return frames


def scaled(frame: Frame, energy: float = 1, length: float = 1, forces: float = 1, stress: float = 1) -> Frame:
    return replace(
        frame, pos=frame.pos * length, cell=frame.cell * length, energy=frame.energy * energy, forces=frame.forces * forces,
        stress=None if frame.stress is None or not stress else frame.stress * stress,
    )  # fmt: skip


def file_of(path: Path, frames: list[Frame], **factors: float) -> Path:
    write_frames(path, [scaled(frame, **factors) for frame in frames])
    return path


HA, PER_BOHR = 1 / units.Hartree, units.Bohr / units.Hartree
FILES = {
    "usual": ({"energy": HA, "forces": PER_BOHR, "stress": PER_BOHR * units.Bohr**2}, {"energy_unit": "Hartree"}),
    "all of it atomic": (
        {"energy": HA, "forces": PER_BOHR, "length": 1 / units.Bohr, "stress": HA * units.Bohr**3},
        {"energy_unit": "Hartree", "length_unit": "Bohr"},
    ),
    "said": (
        {"energy": HA, "forces": HA, "stress": 1 / units.GPa},
        {"energy_unit": "Ha", "forces_unit": "Hartree/Ang", "stress_unit": "GPa"},
    ),
    "kcal": (
        {"energy": 1 / KCAL, "forces": 1 / KCAL, "stress": 10 / units.GPa},
        {"energy_unit": "kcal/mol", "stress_unit": "kBar"},
    ),
    "forces alone": ({"energy": 1 / KCAL, "forces": 1 / KCAL, "stress": 0}, {"forces_unit": "kcal/mol/A"}),
    "nm": ({"length": 0.1, "forces": 10, "stress": 1e3}, {"length_unit": "nm"}),
}


@pytest.mark.parametrize("name", list(FILES))
def test_each_quantity_has_its_unit(tmp_path: Path, name: str) -> None:
    factors, options = FILES[name]
    made = copper()
    for found, frame in zip(read_frames(file_of(tmp_path / "a.xyz", made, **factors), **options), made, strict=True):
        assert found.energy == pytest.approx(frame.energy, rel=1e-6)
        np.testing.assert_allclose(found.forces, frame.forces, atol=2e-5)
        np.testing.assert_allclose(found.pos, frame.pos, atol=1e-6)
        if factors["stress"]:
            np.testing.assert_allclose(found.stress, frame.stress, rtol=1e-5)


def test_what_is_converted_is_said(tmp_path: Path) -> None:
    factors, options = FILES["usual"]
    result = CliRunner().invoke(
        app, ["info", str(file_of(tmp_path / "a.xyz", copper(), **factors)), "--energy-unit", "hartree"]
    )
    assert result.exit_code == 0, result.output
    assert "energies Hartree → eV, forces Hartree/Bohr → eV/Å (assumed)" in result.output.replace("\n", " ")
    assert options == {"energy_unit": "Hartree"}


WRONG = {
    "positions scaled too": (
        {"energy": HA, "forces": PER_BOHR, "stress": 0}, {"energy_unit": "Hartree", "length_unit": "Bohr"},
        "0.49 times the sum of covalent radii.*read as Bohr"),
    "Hartree as eV": (
        {"energy": HA, "forces": PER_BOHR, "stress": 0}, {},
        "1.[89].* times as much as forces say.*forces are per Bohr"),
    "energies alone": (
        {"energy": HA, "stress": 0}, {},
        "0.03.* times as much as forces say.*energies are in Hartree"),
    "kcal forces": (
        {"forces": 1 / KCAL, "stress": 0}, {},
        "0.04.*forces are in kcal/mol"),
    "gradients": (
        {"forces": -1, "stress": 0}, {},
        "they are gradients"),
    "per atom": (
        {"energy": 0.25, "stress": 0}, {},
        "0.2.* times.*energies are per atom"),
    "gigapascal": (
        {"stress": 30 / units.GPa}, {},
        "stress of a typical frame.*GPa or kbar"),
    "in Bohr": (
        {"energy": HA, "forces": PER_BOHR, "length": 1 / units.Bohr, "stress": 0}, {},
        "positions in Bohr read as Angstrom"),
    "kJ energies": (
        {"energy": 96.4853 * 400}, {},
        "which no electrons have"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(WRONG))
def test_numbers_that_cannot_be_in_their_unit(tmp_path: Path, name: str) -> None:
    factors, options, message = WRONG[name]
    path = file_of(tmp_path / "a.xyz", copper(), **factors)
    with pytest.raises(ValueError, match=rf"a\.xyz: .*{message}"):
        read_frames(path, **options)
    said: list[str] = []
    assert len(read_checked([path], tell=said.append, trust_units=True, **options)[0]) == 12
    assert said


def test_an_order_is_obeyed_with_a_word(tmp_path: Path) -> None:
    path = file_of(tmp_path / "a.xyz", copper(), energy=HA, stress=0)
    with pytest.warns(UserWarning, match="energies are in Hartree"):
        frames = read_frames(path, energy_unit="eV", forces_unit="eV/Angstrom")
    assert frames[0].energy == pytest.approx(copper()[0].energy * HA)


def test_energies_of_all_electrons(tmp_path: Path) -> None:
    """Water −76.4, methane −40.5, copper atom −1640 Hartree."""
    for formula, energy in (("H2O", -76.4), ("CH4", -40.5), ("Cu", -1640.0)):
        atoms = Atoms(formula) if formula == "Cu" else molecule(formula)
        assert all_electrons(atoms.numbers) == pytest.approx(energy * units.Hartree, rel=0.02)
        atoms.info["energy"] = energy
        ase.io.write(tmp_path / "a.xyz", atoms, format="extxyz")
        with pytest.raises(ValueError, match=r"those of all electrons in Hartree\n.*`energy_unit`"):
            read_frames(tmp_path / "a.xyz")
        assert read_frames(tmp_path / "a.xyz", energy_unit="Hartree")[0].energy == pytest.approx(energy * units.Hartree)


def test_stress_against_energies() -> None:
    frames = strained_crystals()
    for a, b in pairwise(frames):
        between = work(a, b)
        if between is None:
            continue
        assert between.stress != 0
        assert between.change == pytest.approx(between.forces + between.stress, abs=0.25 * between.doubt + 0.002)


def test_stress_of_the_other_sign(tmp_path: Path) -> None:
    frames = strained_crystals()
    read_frames(file_of(tmp_path / "a.xyz", frames))
    with pytest.raises(ValueError, match=r"-(1|0\.9).*times as much as stress says.*VASP"):
        read_frames(file_of(tmp_path / "b.xyz", frames, stress=-1))


def strained_crystals() -> list[Frame]:
    rng, frames = np.random.default_rng(3), []
    for k in range(16):
        atoms = bulk("Cu", a=3.55 + 0.02 * rng.normal(), cubic=True)
        noise = rng.normal(scale=0.01, size=(3, 3))
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + 0.5 * (noise + noise.T)), scale_atoms=True)
        atoms.positions += rng.normal(scale=0.01, size=(4, 3))
        atoms.calc = EMT()
        labels = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces(), "stress": atoms.get_stress()}
        frames.append(Frame.from_atoms(atoms, source=f"emt#{k}", **labels))
    return frames


def test_two_units_in_one_file(tmp_path: Path) -> None:
    frames = copper(12)
    mixed = [scaled(f, 1 / KCAL, 1, 1 / KCAL, 0) if k > 8 else scaled(f, stress=0) for k, f in enumerate(frames)]
    path = file_of(tmp_path / "a.xyz", mixed, stress=0)
    with pytest.raises(
        BadFrames, match=r"3 bad frames.*:\n.*a\.xyz#9: energy: is -230. eV per atom.*-99.*kcal/mol instead of eV"
    ):
        read_frames(path)
    assert len(read_frames(path, skip_bad=True)) == 9


@pytest.mark.filterwarnings("error")
def test_sound_files_raise_no_alarm(tmp_path: Path) -> None:
    read_frames(file_of(tmp_path / "a.xyz", copper()))
    read_frames(file_of(tmp_path / "b.xyz", copper(strained=True)))
    dimers = []
    for k in range(20):
        atoms = Atoms("Cu2", positions=[[0, 0, 0], [1.9 + 0.05 * k, 0, 0]])
        atoms.calc = EMT()
        dimers.append(Frame.from_atoms(atoms, energy=atoms.get_potential_energy(), forces=atoms.get_forces()))
    read_frames(file_of(tmp_path / "c.xyz", dimers, stress=0))
    noise = np.random.default_rng(0)
    random = [replace(f, energy=float(noise.normal()), forces=noise.normal(size=(4, 3))) for f in copper()]
    read_frames(file_of(tmp_path / "d.xyz", random))


def npz(path: Path, **changes: object) -> Path:
    kcal = molecule("CH3CH2OH").positions
    values = {"R": kcal[None] + np.zeros((2, 1, 1)), "z": molecule("CH3CH2OH").numbers, "E": np.array([-235.9, -235.8])}
    np.savez(path, **{**values, **changes})
    return path


def test_arrays_obey_orders_and_say_their_units(tmp_path: Path) -> None:
    path = npz(tmp_path / "a.npz")
    assert read_frames(path, energy_unit="eV")[0].energy == pytest.approx(-235.9)
    with pytest.warns(UserWarning, match="which no electrons have"):
        assert read_frames(path, energy_unit="Hartree")[0].energy == pytest.approx(-235.9 * units.Hartree)
    with pytest.warns(UserWarning, match="does not say its unit of energy: kcal/mol"):
        assert read_frames(path)[0].energy == pytest.approx(-235.9 * KCAL)
    path = npz(tmp_path / "b.npz", e_unit=b"EV", r_unit=np.array([b"Ang"]))
    assert read_frames(path)[0].energy == pytest.approx(-235.9)
    assert read_frames(path, energy_unit="ev")[0].energy == pytest.approx(-235.9)
    with pytest.raises(
        ValueError, match=r"b\.npz: the file says that its energies are in eV, `energy_unit` says kcal/mol"
    ):
        read_frames(path, energy_unit="kcal/mol")


def water(energy: float) -> Atoms:
    atoms = molecule("H2O")
    atoms.rattle(0.02, seed=int(abs(1000 * energy)))
    atoms.info["e_tot"], atoms.arrays["f_tot"] = energy, np.full((3, 3), 0.01)
    return atoms


@pytest.fixture
def section(tmp_path: Path) -> dict[str, object]:
    """A data section in Hartree under names of one's own, with a file of isolated atoms."""
    ase.io.write(tmp_path / "t.xyz", [water(-17.2 - 0.001 * k) for k in range(10)], format="extxyz")
    singles = [Atoms("H"), Atoms("O")]
    for atoms, energy in zip(singles, (-0.5, -15.8), strict=True):
        atoms.info["e_tot"] = energy
    ase.io.write(tmp_path / "i.xyz", singles, format="extxyz")
    return {
        "train": [str(tmp_path / "t.xyz")], "isolated_atoms": str(tmp_path / "i.xyz"), "energy_key": "e_tot",
        "forces_key": "f_tot", "energy_unit": "Hartree",
    }  # fmt: skip


def test_a_section_is_read_with_its_keys_and_units(tmp_path: Path, section: dict[str, object]) -> None:
    values = settings(tmp_path)
    said: list[str] = []
    data = prepare_data(parse_config({**values, "data": section}), said.append)
    assert data.isolated == {1: pytest.approx(-0.5 * units.Hartree), 8: pytest.approx(-15.8 * units.Hartree)}
    assert data.split.train[0].energy == pytest.approx(-17.2 * units.Hartree, rel=1e-2)
    assert data.split.train[0].forces[0, 0] == pytest.approx(0.01 * units.Hartree / units.Bohr)
    assert any("i.xyz" in line and "energies Hartree → eV" in line for line in said)
    given = {**section, "isolated_atoms": {1: -0.5, "O": -15.8}}
    assert prepare_data(parse_config({**values, "data": given})).isolated == data.isolated


@pytest.mark.parametrize(("change", "message"), [
    ({"energy_unit": "Hartrees per mile"}, "unknown energy unit"), ({"forces_unit": "eV"}, "unknown force unit 'eV'"),
    ({"stress_key": "a", "virial_key": "b"}, "not both"), ({"force_unit": "eV/A"}, "did you mean `data.forces_unit`"),
])  # fmt: skip
def test_a_section_that_cannot_be_read(
    tmp_path: Path, section: dict[str, object], change: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({**settings(tmp_path), "data": {**section, **change}})


def test_training_stops_before_it_starts_without_labels(tmp_path: Path, section: dict[str, object]) -> None:
    atoms = water(-17.0)
    atoms.info["value"], atoms.arrays["vectors"] = atoms.info.pop("e_tot"), atoms.arrays.pop("f_tot")
    ase.io.write(tmp_path / "t.xyz", [atoms] * 10, format="extxyz")
    unnamed = {"train": section["train"], "isolated_atoms": {"H": 0.0, "O": 0.0}}
    with pytest.raises(
        ValueError, match=r"t\.xyz: no frame has an energy or forces under a known name; it has value, vectors"
    ):
        prepare_data(parse_config({**settings(tmp_path), "data": unnamed}))


def test_commands_take_the_same_options() -> None:
    for command in ("evaluate", "compare", "fill", "info", "md", "flag"):
        text = CliRunner(env={"COLUMNS": "200"}).invoke(app, [command, "--help"]).output
        for option in ("energy-key", "forces-key", "stress-key", "virial-key", "energy-unit", "length-unit", "forces-unit",
                       "stress-unit", "skip-bad", "trust-units"):  # fmt: skip
            assert f"--{option}" in text, (command, option)


def test_two_units_of_length_in_one_file(tmp_path: Path) -> None:
    frames = copper(12)
    mixed = [scaled(f, length=1 / units.Bohr, stress=0) if k > 7 else scaled(f, stress=0) for k, f in enumerate(frames)]
    with pytest.warns(UserWarning, match="ratio of Bohr and Angstrom"):
        read_frames(file_of(tmp_path / "a.xyz", mixed, stress=0))
    squeezed = [scaled(f, length=0.65, stress=0) if k > 9 else scaled(f, stress=0) for k, f in enumerate(frames)]
    assert len(read_frames(file_of(tmp_path / "b.xyz", squeezed, stress=0))) == 12


def test_forces_in_hartree_per_angstrom_are_recognised(tmp_path: Path) -> None:
    made = copper()
    path = file_of(tmp_path / "a.xyz", made, energy=HA, forces=HA, stress=0)
    with pytest.warns(UserWarning, match="forces are in Hartree/Angstrom, by the energies of neighbouring frames"):
        np.testing.assert_allclose(read_frames(path, energy_unit="Hartree")[0].forces, made[0].forces, atol=2e-5)
    with pytest.raises(ValueError, match="forces are not per Bohr"):
        read_frames(path, energy_unit="Hartree", length_unit="Angstrom")
