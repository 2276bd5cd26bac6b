"""What dynamics of other packages did in public reports, tried with ours; see README.md of this folder."""

from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.io import read
from ase.md.langevin import Langevin
from ase.md.verlet import VelocityVerlet

from forcedrop import DropoutCalculator, FrameStore, run_md
from forcedrop.md import NPT, NVE, NVT
from forcedrop.model import TrainedModel
from tests.conftest import banked_potential, ethanol


@pytest.fixture(scope="module")
def calculator() -> DropoutCalculator:
    return DropoutCalculator(TrainedModel(banked_potential()), 4, device="cpu")


def moving(seed: int = 0) -> Atoms:
    atoms = ethanol(seed)
    atoms.set_velocities(np.random.default_rng(seed).normal(scale=0.02, size=(len(atoms), 3)))
    return atoms


def test_a_time_step_is_in_femtoseconds(calculator: DropoutCalculator, tmp_path: Path) -> None:
    """materialyzeai/m3gnet#18: is a time step in fs, or in the unit of time of ASE?"""
    atoms, same = moving(), moving()
    run = run_md(atoms, calculator, tmp_path, steps=8, timestep=0.25, record_every=4, velocities=False)
    same.calc = calculator
    VelocityVerlet(same, 0.25 * units.fs).run(8)
    np.testing.assert_allclose(atoms.positions, same.positions, atol=1e-12)
    assert [row["time_fs"] for row in run.rows] == [0.0, 1.0, 2.0]


def test_friction_is_in_inverse_femtoseconds(calculator: DropoutCalculator, tmp_path: Path) -> None:
    """infretis/infretis#132: the friction of Langevin dynamics was in another unit than the time step."""
    atoms, same = moving(), moving()
    run_md(
        atoms, calculator, tmp_path, ensemble=NVT(friction=0.05), temperature=300.0, steps=6, timestep=0.5, velocities=False,
        seed=3,
    )  # fmt: skip
    same.calc = calculator
    rng = np.random.default_rng(3)
    Langevin(same, 0.5 * units.fs, temperature_K=300, friction=0.05 / units.fs, rng=rng, fixcm=False).run(6)
    np.testing.assert_allclose(atoms.positions, same.positions, atol=1e-12)
    half = moving()
    half.positions += 100 * np.arange(len(half))[:, None]  # free atoms: v decays by exp(−γ t)
    start = np.linalg.norm(half.get_velocities())
    run_md(
        half, calculator, tmp_path / "free", ensemble=NVT(friction=0.05), temperature=0.0, steps=40, timestep=0.5,
        velocities=False,
    )  # fmt: skip
    assert np.linalg.norm(half.get_velocities()) / start == pytest.approx(np.exp(-0.05 * 20), rel=0.02)


def test_times_of_thermostat_and_barostat_are_in_femtoseconds(calculator: DropoutCalculator) -> None:
    """CederGroupHub/chgnet#67: the times of the Berendsen barostat were multiplied by the unit twice."""
    atoms = bulk("Cu", a=3.6, cubic=True)
    atoms.calc = calculator
    found = NPT(pressure=2.0, thermostat_time=70.0, barostat_time=900.0).dynamics(
        atoms, 1.5, 400.0, np.random.default_rng(0)
    )
    assert found.dt == pytest.approx(1.5 * units.fs)
    # Martyna, Tobias & Klein, J. Chem. Phys. 101, 4177 (1994): W = 3 (N + 1) kT τ², Q = 3 N kT τ²
    assert pytest.approx(3 * (len(atoms) + 1) * 400 * units.kB * (900 * units.fs) ** 2) == found._barostat._W
    assert found._thermostat._Q[0] == pytest.approx(3 * len(atoms) * 400 * units.kB * (70 * units.fs) ** 2)
    assert found._pressure_au == pytest.approx(2 * units.GPa)


@pytest.mark.parametrize("ensemble", [NVE(), NVT()])
@pytest.mark.parametrize("first", [8, 10])
def test_a_run_that_goes_on_repeats_and_skips_no_frame(
    calculator: DropoutCalculator, tmp_path: Path, ensemble: NVE | NVT, first: int
) -> None:
    """facebookresearch/fairchem#2097: a restart wrote a frame twice, or lost it, as the step happened to be."""
    settings = {"ensemble": ensemble, "timestep": 0.5, "record_every": 4, "temperature": 100.0}
    run_md(ethanol(), calculator, tmp_path / "a", steps=20, **settings)
    run_md(ethanol(), calculator, tmp_path / "b", steps=first, **settings)
    run = run_md(ethanol(), calculator, tmp_path / "b", steps=20, resume=True, **settings)
    times = [row["time_fs"] for row in run.rows]
    assert sorted(set(times)) == times
    assert set(times) >= {0.0, 2.0, 4.0, 6.0, 8.0, 10.0}
    assert len(read(tmp_path / "b" / "md.xyz", ":")) == len(times)
    with FrameStore(tmp_path / "a" / "md.h5") as a, FrameStore(tmp_path / "b" / "md.h5") as b:
        np.testing.assert_array_equal(a[len(a) - 1].pos, b[len(b) - 1].pos)


def test_numbers_of_a_trajectory_are_those_of_its_positions(calculator: DropoutCalculator, tmp_path: Path) -> None:
    """stfc/janus-core#200: energies and stress of a trajectory could not be read back, and differed when computed again."""
    atoms = bulk("Cu", a=3.6, cubic=True)
    run_md(atoms, calculator, tmp_path, steps=4, timestep=1.0, record_every=2, temperature=200.0)
    with FrameStore(tmp_path / "md.h5") as store:
        frames = list(store)
    written = read(tmp_path / "md.xyz", ":")
    assert len(frames) == len(written) == 3
    for frame, text in zip(frames, written, strict=True):
        again = frame.to_atoms()
        again.calc = calculator
        assert again.get_potential_energy() == pytest.approx(frame.energy, abs=1e-12)
        np.testing.assert_allclose(again.get_forces(), frame.forces, atol=1e-12)
        assert text.get_potential_energy() == pytest.approx(frame.energy, abs=1e-6)
        np.testing.assert_allclose(text.get_forces(), frame.forces, atol=1e-6)
        np.testing.assert_allclose(text.get_velocities(), again.get_velocities(), atol=1e-6)


def test_a_run_that_goes_on_is_that_of_the_same_structure(calculator: DropoutCalculator, tmp_path: Path) -> None:
    """rosswhitfield/ase#12: what a trajectory is continued with is up to the user, and nothing is checked."""
    run_md(ethanol(), calculator, tmp_path, steps=4, timestep=0.5, record_every=2)
    with pytest.raises(ValueError, match=r"start|structure"):
        run_md(ethanol(seed=1), calculator, tmp_path, steps=8, timestep=0.5, record_every=2, resume=True)
    with pytest.raises(ValueError, match="timestep_fs"):
        run_md(ethanol(), calculator, tmp_path, steps=8, timestep=1.0, record_every=2, resume=True)


def test_starting_anew_keeps_what_is_there(calculator: DropoutCalculator, tmp_path: Path) -> None:
    """openmm/openmm#3946: starting a second run deleted the trajectory of the first."""
    run_md(ethanol(), calculator, tmp_path, steps=4, timestep=0.5, record_every=2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="overwrite"):
        run_md(ethanol(), calculator, tmp_path, steps=4, timestep=0.5, record_every=2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_velocities_of_a_file_are_read_in_the_unit_of_the_file(calculator: DropoutCalculator, tmp_path: Path) -> None:
    """molmod/psiflow#47, in part: momenta between positions and forces."""
    atoms = moving()
    ase.io.write(tmp_path / "start.xyz", atoms, format="extxyz")
    again = read(tmp_path / "start.xyz")
    run = run_md(again, calculator, tmp_path / "run", steps=1, timestep=0.5, velocities=False)
    assert run.rows[0]["kinetic_eV"] == pytest.approx(atoms.get_kinetic_energy(), rel=1e-5)
