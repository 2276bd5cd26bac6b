"""What a start structure carries goes through dynamics: constraints, masses, velocities; what cannot run is refused in words."""

from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.constraints import (
    FixAtoms,
    FixBondLengths,
    FixCartesian,
    FixCom,
    FixedLine,
    FixedPlane,
    FixInternals,
    FixScaled,
    FixSymmetry,
    Hookean,
)

from forcedrop import DropoutCalculator, FrameStore, run_md
from forcedrop.md import NPT, NVE, NVT, Band, GuardSettings, RollBack
from forcedrop.md.ensembles import draw_velocities
from forcedrop.structures import Frame, write_frames
from tests.conftest import emt_frames
from tests.field.commands import run


def crystal(repeat: tuple[int, int, int] = (2, 1, 1)) -> Atoms:
    """Two cells, of which one can be held."""
    return bulk("Cu", a=3.62, cubic=True).repeat(repeat)


WIDE = (2, 2, 2)
"""Cells in which a bond has one shortest image."""


LOWEST = [0, 1, 2, 3]


@pytest.mark.parametrize("ensemble", ["nve", "nvt"])
@pytest.mark.parametrize("name", ["a.traj", "a.xyz", "POSCAR", "a.h5"])
def test_fixed_atoms_stay_where_they_are(model, tmp_path, name: str, ensemble: str) -> None:
    atoms = crystal()
    atoms.set_constraint(FixAtoms(LOWEST))
    if name == "POSCAR":
        ase.io.write(tmp_path / name, atoms, format="vasp", sort=False, direct=False)
    elif name == "a.h5":
        write_frames(tmp_path / name, [Frame.from_atoms(atoms)])
    else:
        ase.io.write(tmp_path / name, atoms)
    run("md", model, tmp_path / name, "--ensemble", ensemble, "--temperature", 300, "--steps", 20, "--samples", 4,
        "--output", tmp_path / "md")  # fmt: skip
    first, last = ase.io.read(tmp_path / "md" / "md.xyz", 0), ase.io.read(tmp_path / "md" / "md.xyz", -1)
    assert abs(last.positions - first.positions)[LOWEST].max() == 0.0
    assert abs(last.positions - first.positions)[4:].max() > 0.01
    assert list(last.constraints[0].index) == LOWEST
    row = (tmp_path / "md" / "md.csv").read_text().splitlines()[1].split(",")
    assert 100 < float(row[5]) < 600  # of the atoms that are free: 300 K at first
    stored = FrameStore(tmp_path / "md" / "md.h5")[-1]
    assert stored.constraints
    assert abs(stored.arrays["momenta"][LOWEST]).max() == 0.0


HELD = {
    "plane": (FixedPlane(5, (0, 0, 1)), lambda a, b: abs((b.positions - a.positions)[5, 2])),
    "line": (FixedLine(5, (0, 0, 1)), lambda a, b: abs((b.positions - a.positions)[5, :2]).max()),
    "direction": (FixCartesian([5], [True, False, False]), lambda a, b: abs((b.positions - a.positions)[5, 0])),
    "bond": (FixBondLengths([(0, 1)], tolerance=1e-10), lambda a, b: abs(b.get_distance(0, 1) - a.get_distance(0, 1))),
    "centre": (FixCom(), lambda a, b: abs(b.get_center_of_mass() - a.get_center_of_mass()).max()),
}


@pytest.mark.parametrize("ensemble", [NVE(), NVT(0.02)], ids=["nve", "nvt"])
@pytest.mark.parametrize("kind", list(HELD))
def test_constraints_that_dynamics_obeys_are_obeyed(trained, tmp_path, kind: str, ensemble) -> None:
    constraint, change = HELD[kind]
    atoms = crystal(WIDE if kind == "bond" else (2, 1, 1))
    atoms.set_constraint(constraint)
    first = atoms.copy()
    run_md(atoms, DropoutCalculator(trained, 8), tmp_path, ensemble=ensemble, steps=15, temperature=300, timestep=1.0)
    assert change(first, atoms) < 1e-6
    assert abs(atoms.positions - first.positions).max() > 0.01


def test_energy_is_conserved_with_fixed_atoms_and_springs(trained, tmp_path) -> None:
    atoms = crystal(WIDE)
    atoms.set_constraint([FixAtoms([3]), Hookean(0, 1, k=2.0, rt=2.0)])
    run = run_md(atoms, DropoutCalculator(trained, 8), tmp_path, steps=40, timestep=1.0, temperature=200)
    kinetic = np.std([row["kinetic_eV"] for row in run.rows])
    assert np.ptp([row["total_eV"] for row in run.rows]) < 0.05 * kinetic


def test_a_run_with_fixed_atoms_is_resumed_to_the_same_bits(trained, tmp_path) -> None:
    def go(folder: Path, steps: int, resume: bool = False):
        atoms = crystal()
        atoms.set_constraint(FixAtoms(LOWEST))
        return run_md(
            atoms, DropoutCalculator(trained, 8), folder, ensemble=NVT(0.02), steps=steps, timestep=2.0, resume=resume
        )

    whole = go(tmp_path / "a", 40)
    go(tmp_path / "b", 20)
    assert go(tmp_path / "b", 40, resume=True).rows == whole.rows
    free = crystal()
    with pytest.raises(ValueError, match="another structure"):
        run_md(
            free, DropoutCalculator(trained, 8), tmp_path / "b", ensemble=NVT(0.02), steps=60, timestep=2.0, resume=True
        )


def test_going_back_leaves_fixed_atoms_alone(trained, tmp_path) -> None:
    atoms = crystal()
    atoms.set_constraint(FixAtoms(LOWEST))
    before = atoms.positions.copy()
    low = 0.5 * trained.calibration.threshold("max_force", 0.5)
    guard = GuardSettings(Band(low, 1.001 * low), RollBack(most=3), spacing=2.0, check_every=1)
    run = run_md(atoms, DropoutCalculator(trained, 8), tmp_path, steps=30, timestep=2.0, temperature=900, guard=guard)
    assert any(event.back_to is not None for event in run.events) or run.stopped is not None
    np.testing.assert_array_equal(atoms.positions[LOWEST], before[LOWEST])
    assert all(frame.constraints for frame in run.flagged_frames)


def test_velocities_of_held_crystals_are_not_shifted_to_hold_its_centre() -> None:
    atoms = crystal()
    atoms.set_constraint(FixAtoms(LOWEST))
    draw_velocities(atoms, 500.0, np.random.default_rng(0))
    assert abs(atoms.get_momenta()[LOWEST]).max() == 0.0
    plain = crystal()
    momenta = np.random.default_rng(0).standard_normal((8, 3)) * np.sqrt(plain.get_masses() * units.kB * 500)[:, None]
    np.testing.assert_allclose(atoms.get_momenta()[4:], momenta[4:])  # no drift taken away, no rescaling


def test_masses_tags_and_charges_go_through(model, tmp_path) -> None:
    atoms = bulk("Cu", a=3.62, cubic=True)
    atoms.set_masses([62.93, 64.93, 62.93, 64.93])
    atoms.set_tags([0, 1, 2, 3])
    atoms.set_initial_charges([0.1, -0.1, 0.0, 0.0])
    ase.io.write(tmp_path / "a.traj", atoms)
    run("md", model, tmp_path / "a.traj", "--repeat", 2, 1, 1, "--steps", 10, "--samples", 4, "--output", tmp_path / "md",
        "--low", 0, "--high", 1e6)  # fmt: skip
    images = [ase.io.read(tmp_path / "md" / "md.xyz", -1), FrameStore(tmp_path / "md" / "md.h5")[-1].to_atoms()]
    images.append(FrameStore(tmp_path / "md" / "flagged.h5")[0].to_atoms())
    for image in images:
        np.testing.assert_allclose(image.get_masses(), [62.93, 64.93] * 4)
        np.testing.assert_array_equal(image.get_tags(), [0, 1, 2, 3] * 2)
        np.testing.assert_allclose(image.get_initial_charges(), [0.1, -0.1, 0, 0] * 2)
    # momenta of a heavier isotope are drawn with its mass
    assert images[0].get_kinetic_energy() > 0


def test_constraints_are_repeated_with_the_cell(model, tmp_path) -> None:
    atoms = bulk("Cu", a=3.62, cubic=True)
    atoms.set_constraint(FixAtoms([0]))
    ase.io.write(tmp_path / "a.traj", atoms)
    run(
        "md", model, tmp_path / "a.traj", "--repeat", 2, 1, 1, "--steps", 4, "--samples", 4, "--output", tmp_path / "md"
    )
    last = ase.io.read(tmp_path / "md" / "md.xyz", -1)
    assert sorted(last.constraints[0].index) == [0, 4]


@pytest.mark.parametrize("constraint", [FixScaled([2], [True, True, False]), FixInternals(bonds=[[2.5, [0, 1]]])])
def test_constraints_that_dynamics_would_not_obey_are_refused(trained, tmp_path, constraint) -> None:
    atoms = crystal()
    atoms.set_constraint(constraint)
    with pytest.raises(ValueError, match=f"would not obey the constraint {type(constraint).__name__}"):
        run_md(atoms, DropoutCalculator(trained, 8), tmp_path, steps=2)
    perfect = bulk("Cu", a=3.6, cubic=True)
    perfect.set_constraint(FixSymmetry(perfect))
    with pytest.raises(ValueError, match="FixSymmetry"):
        run_md(perfect, DropoutCalculator(trained, 8), tmp_path, steps=2)


def test_npt_and_fixed_atoms_do_not_go_together(trained, tmp_path) -> None:
    atoms = bulk("Cu", a=3.6, cubic=True)
    atoms.set_constraint(FixAtoms([0]))
    with pytest.raises(ValueError, match=r"NPT scales .*FixAtoms"):
        run_md(atoms, DropoutCalculator(trained, 8), tmp_path, ensemble=NPT(), steps=2)
    atoms.set_constraint(FixAtoms([0, 1, 2, 3]))
    with pytest.raises(ValueError, match="hold all atoms"):
        run_md(atoms, DropoutCalculator(trained, 8), tmp_path, ensemble=NVT(), steps=2)
    assert not list(tmp_path.iterdir())


def test_velocities_are_kept_or_refused(model, tmp_path) -> None:
    keep = ["--keep-velocities", "--temperature", 300, "--steps", 2, "--samples", 4, "--output", tmp_path / "md"]
    ase.io.write(tmp_path / "none.xyz", emt_frames(1)[0].to_atoms())
    assert "has no velocities to keep" in run("md", model, tmp_path / "none.xyz", *keep, code=1)
    other = emt_frames(1)[0].to_atoms()
    other.set_array("vel", np.ones((4, 3)))
    ase.io.write(tmp_path / "vel.xyz", other)
    assert "unknown unit: vel" in run("md", model, tmp_path / "vel.xyz", *keep, code=1)
    rest = emt_frames(1)[0].to_atoms()
    rest.set_momenta(np.zeros((4, 3)))
    ase.io.write(tmp_path / "rest.traj", rest)
    assert "all velocities of the start structure are 0" in run("md", model, tmp_path / "rest.traj", *keep, code=1)
    assert not (tmp_path / "md").exists()
    moving = emt_frames(1)[0].to_atoms()
    draw_velocities(moving, 450.0, np.random.default_rng(0))
    ase.io.write(tmp_path / "moving.traj", moving)
    run("md", model, tmp_path / "moving.traj", *keep)
    first = FrameStore(tmp_path / "md" / "md.h5")[0]
    np.testing.assert_allclose(first.arrays["momenta"], moving.get_momenta())


def one_atom(tmp_path: Path) -> Path:
    ase.io.write(tmp_path / "one.xyz", bulk("Cu", a=3.6))
    return tmp_path / "one.xyz"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ensemble", "npt", "--temperature", 0], "NPT needs a temperature above 0 K"),
        (["--ensemble", "npt"], "NPT needs at least two atoms"),
        (["--ensemble", "nve"], "would stay at 0 K in NVE"),
        (["--ensemble", "nvt", "--friction", 0], "friction of NVT must be positive"),
        (["--timestep", 0], "must be positive"),
        (["--timestep", "nan"], "must be positive"),
        (["--timestep", -1], "must be positive"),
        (["--temperature", "inf"], "temperature must not be negative"),
        (["--pressure", 1], "--pressure belongs to --ensemble npt, got nve"),
        (["--ensemble", "npt", "--friction", 0.1], "--friction belongs to --ensemble nvt, got npt"),
        (["--ensemble", "npt", "--pressure", "nan"], "pressure must be a number"),
        (["--ensemble", "nvt", "--repeat", 0, 1, 1], "--repeat needs positive numbers"),
    ],
)
def test_what_cannot_run_is_said_in_one_line(model, tmp_path, options: list[object], words: str) -> None:
    file = one_atom(tmp_path)
    out = run("md", model, file, *options, "--steps", 2, "--samples", 4, "--output", tmp_path / "md", code=1)
    assert words in out
    assert out.startswith("error: ")
    assert len(out.strip().splitlines()) == 1
    assert not (tmp_path / "md").exists()


def test_a_molecule_is_not_repeated(trained, tmp_path, model) -> None:
    atoms = Atoms("Cu2", [[0, 0, 0], [2.3, 0, 0]])
    ase.io.write(tmp_path / "a.xyz", atoms)
    out = run("md", model, tmp_path / "a.xyz", "--repeat", 2, 1, 1, "--output", tmp_path / "md", code=1)
    assert "only along periodic directions" in out


def test_a_bad_start_does_not_point_to_an_option_that_md_has_not(model, tmp_path) -> None:
    atoms = emt_frames(1)[0].to_atoms()
    atoms.positions[1] = atoms.positions[0]
    ase.io.write(tmp_path / "bad.xyz", atoms)
    out = run("md", model, tmp_path / "bad.xyz", "--steps", 2, "--output", tmp_path / "md", code=1)
    assert "bad.xyz#0" in out
    assert "skip" not in out
    assert len(out.strip().splitlines()) == 1


def test_frames_keep_their_numbers_where_bad_ones_are_skipped(model, tmp_path) -> None:
    images = [frame.to_atoms() for frame in emt_frames(3)]
    images[0].positions[1] = images[0].positions[0]
    ase.io.write(tmp_path / "a.xyz", images)
    md = ["md", model, tmp_path / "a.xyz", "--skip-bad", "--steps", 1, "--samples", 4, "--output", tmp_path / "md"]
    assert "has no good frame 0" in run(*md, "--index", 0, code=1)
    run(*md, "--index", 2)
    np.testing.assert_allclose(FrameStore(tmp_path / "md" / "md.h5")[0].pos, images[2].positions, atol=1e-7)
