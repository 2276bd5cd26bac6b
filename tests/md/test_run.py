import csv
import json

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.io import read

from forcedrop import DropoutCalculator, read_frames, run_md
from forcedrop.md import NPT, NVE, NVT, Band, GuardSettings, RollBack, energy_drift
from forcedrop.md.astray import runaway
from forcedrop.model import TrainedModel
from forcedrop.report import run_figure
from tests.conftest import ethanol, make_potential


def crystal(repeat: int = 1) -> Atoms:
    return bulk("Cu", a=3.62, cubic=True).repeat((repeat, 1, 1))


def test_files_hold_every_recorded_step_with_sigma(trained, tmp_path) -> None:
    calculator = DropoutCalculator(trained, n_samples=4)
    run = run_md(crystal(), calculator, tmp_path, steps=25, timestep=2.0, record_every=10, threshold=0.0)
    assert [row["step"] for row in run.rows] == [0, 10, 20, 25]
    with (tmp_path / "md.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [float(r["total_eV"]) for r in rows] == [r["total_eV"] for r in run.rows]
    images = read(tmp_path / "md.xyz", ":")
    assert len(images) == 4
    frames = read_frames(tmp_path / "md.h5", predictions="keep")
    assert len(frames) == 4
    last = frames[-1]
    atoms = last.to_atoms()
    atoms.calc = calculator
    np.testing.assert_allclose(last.arrays["forces_uncertainty"], calculator.get_property("forces_uncertainty", atoms))
    np.testing.assert_allclose(last.forces, atoms.get_forces(), atol=1e-12)
    for name in ("forces_uncertainty", "energies_uncertainty", "momenta"):
        np.testing.assert_allclose(images[-1].arrays[name], last.arrays[name], atol=1e-7)
    np.testing.assert_allclose(images[-1].get_forces(), last.forces, atol=1e-7)
    assert images[-1].info["energy_uncertainty"] == pytest.approx(last.info["energy_uncertainty"], rel=1e-6)
    sigma = np.linalg.norm(last.arrays["forces_uncertainty"], axis=1)
    assert run.rows[-1]["max_force_sigma_eV_A"] == pytest.approx(sigma.max())
    assert last.info["temperature_K"] == run.rows[-1]["temperature_K"]
    assert run.flagged == [0.0, 20.0, 40.0, 50.0]
    summary = json.loads((tmp_path / "md.json").read_text())
    assert summary["settings"]["n_samples"] == 4
    assert "flagged" in run.summary()
    assert "drifts" in run.summary()


def test_same_seed_same_run(trained, tmp_path) -> None:
    for ensemble in (NVE(), NVT(0.02), NPT(1.0)):
        runs = [
            run_md(
                crystal(),
                DropoutCalculator(trained, 3),
                tmp_path / type(ensemble).__name__ / str(k),
                ensemble=ensemble,
                steps=12,
                timestep=2.0,
            )
            for k in range(2)
        ]
        assert runs[0].rows == runs[1].rows
        other = run_md(
            crystal(),
            DropoutCalculator(trained, 3),
            tmp_path / type(ensemble).__name__ / "c",
            ensemble=ensemble,
            steps=12,
            timestep=2.0,
            seed=1,
        )
        assert other.rows[-1] != runs[0].rows[-1]


def test_nvt_reaches_its_temperature(trained, tmp_path) -> None:
    run = run_md(
        crystal(2), DropoutCalculator(trained, 4), tmp_path, ensemble=NVT(0.05), temperature=400, steps=450,
        timestep=4.0, record_every=9,
    )  # fmt: skip
    temperature = np.mean([row["temperature_K"] for row in run.rows[10:]])
    assert temperature == pytest.approx(400, rel=0.2)


def test_npt_has_pressure_with_error_bars_and_moves_the_cell(trained, tmp_path) -> None:
    atoms = crystal()
    run = run_md(
        atoms, DropoutCalculator(trained, 3), tmp_path, ensemble=NPT(pressure=2.0, barostat_time=200), steps=60,
        timestep=2.0,
    )  # fmt: skip
    volumes = [row["volume_A3"] for row in run.rows]
    assert np.ptp(volumes) > 1e-3
    assert all(row["pressure_sigma_GPa"] > 0 for row in run.rows)
    stress, kinetic = atoms.get_stress(), 2 * atoms.get_kinetic_energy() / (3 * atoms.get_volume())
    assert run.rows[-1]["pressure_GPa"] == pytest.approx((-stress[:3].mean() + kinetic) * 160.21766208, rel=1e-6)
    with pytest.raises(ValueError, match="periodic in all directions"):
        run_md(ethanol(), DropoutCalculator(TrainedModel(make_potential()), 2), tmp_path, ensemble=NPT())


def test_sigma_is_recorded_where_uncertainty_every_would_skip_it(trained, tmp_path) -> None:
    calculator = DropoutCalculator(trained, 3, uncertainty_every=1000)
    run = run_md(crystal(), calculator, tmp_path, steps=20, timestep=2.0, record_every=5)
    assert all(row["max_force_sigma_eV_A"] > 0 for row in run.rows)


def test_velocities_are_kept_on_request(trained, tmp_path) -> None:
    atoms = crystal()
    with pytest.raises(ValueError, match="no velocities to keep"):
        run_md(atoms, DropoutCalculator(trained, 4), tmp_path, steps=1, timestep=0.001, velocities=False)
    atoms.set_velocities(np.full((4, 3), 0.01))
    run_md(atoms, DropoutCalculator(trained, 4), tmp_path, steps=1, timestep=0.001, velocities=False)
    np.testing.assert_allclose(atoms.get_velocities(), 0.01, atol=1e-3)


def test_a_large_sigma_ends_the_run(trained, tmp_path) -> None:
    whole = run_md(crystal(), DropoutCalculator(trained, 4), tmp_path / "a", steps=40, timestep=2.0, temperature=900)
    sigma = [row["max_force_sigma_eV_A"] for row in whole.rows]
    limit = float(np.median(sigma))
    run = run_md(
        crystal(), DropoutCalculator(trained, 4), tmp_path / "b", steps=40, timestep=2.0, temperature=900, stop_above=limit
    )  # fmt: skip
    first = next(k for k, value in enumerate(sigma) if value > limit and k > 0)
    assert run.rows == whole.rows[: first + 1]
    assert run.stopped == whole.rows[first]["time_fs"]
    assert len(read_frames(tmp_path / "b" / "md.h5", predictions="keep")) == first + 1
    assert "stopped at" in run.summary()
    assert whole.stopped is None


def test_flagged_frames_are_apart_and_on_disk(trained, tmp_path) -> None:
    calculator = DropoutCalculator(trained, n_samples=4)
    guard = GuardSettings(Band(1e-4), spacing=12.0, check_every=2)
    run = run_md(crystal(), calculator, tmp_path, steps=20, timestep=2.0, record_every=5, guard=guard)
    assert [frame.info["step"] for frame in run.flagged_frames] == [2, 8, 14, 20]
    for frame, stored in zip(run.flagged_frames, read_frames(tmp_path / "flagged.h5"), strict=True):
        np.testing.assert_array_equal(frame.pos, stored.pos)
        assert stored.energy is None
        sigma = np.linalg.norm(stored.arrays["forces_uncertainty"], axis=1).max()
        assert stored.info["sigma_max_force"] == pytest.approx(sigma)
    assert [event.step for event in run.events] == [2, 8, 14, 20]
    assert json.loads((tmp_path / "md.json").read_text())["events"][1]["kind"] == "flagged"
    figure = run_figure(run)
    labels = {line.get_label(): line for line in figure.axes[2].lines}
    np.testing.assert_allclose(labels["kept"].get_xdata(), [0.004, 0.016, 0.028, 0.04])
    np.testing.assert_allclose(labels["flagged"].get_xdata(), [0.01, 0.02, 0.03, 0.04])


def test_a_guarded_run_goes_back_and_a_hot_one_stops(trained, tmp_path) -> None:
    free = run_md(crystal(), DropoutCalculator(trained, 4), tmp_path / "a", steps=40, timestep=2.0, temperature=900)
    sigma = [row["max_force_sigma_eV_A"] for row in free.rows]
    band = Band(float(np.quantile(sigma, 0.4)), float(np.quantile(sigma, 0.7)))
    run = run_md(
        crystal(), DropoutCalculator(trained, 4), tmp_path / "b", steps=40, timestep=2.0, temperature=900,
        guard=GuardSettings(band, RollBack(most=50)),
    )  # fmt: skip
    assert run.stopped is None
    assert any(event.back_to is not None for event in run.events)
    assert all(frame.info["sigma_max_force"] <= band.high for frame in run.flagged_frames)
    assert "went back" in run.summary()
    assert "went back" in [line.get_label() for line in run_figure(run).axes[0].lines]
    hot = run_md(
        crystal(), DropoutCalculator(trained, 4), tmp_path / "c", steps=40, timestep=2.0, temperature=900,
        guard=GuardSettings(Band(1e9), runaway=0.01),
    )  # fmt: skip
    assert hot.events[-1].kind == "hot"
    assert hot.stopped == 0.0


def test_sample_drift_is_sigma_of_the_change_of_the_energy(trained, tmp_path) -> None:
    calculator = DropoutCalculator(trained, n_samples=4)
    run = run_md(crystal(), calculator, tmp_path, steps=20, timestep=2.0, temperature=600)
    assert not calculator.keep_samples
    assert run.rows[0]["sample_drift_meV_atom"] == 0
    whole = DropoutCalculator(trained, n_samples=4, keep_samples=True)
    samples = [
        whole.get_property("energy_ensemble", f.to_atoms()) for f in read_frames(tmp_path / "md.h5", predictions="keep")
    ]
    expected = 1000 * np.std(samples[2] - samples[0], ddof=1) / 4
    assert run.rows[2]["sample_drift_meV_atom"] == pytest.approx(expected, rel=1e-6)
    assert expected > 0


def test_runaway_is_beyond_any_fluctuation() -> None:
    rng = np.random.default_rng(0)
    for n in (2, 9, 200):
        kinetic = rng.chisquare(3 * n, size=200_000) / (3 * n)
        assert kinetic.max() < runaway(n)
    assert runaway(100_000) == 3.0


def test_bad_settings(trained, tmp_path) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        run_md(crystal(), DropoutCalculator(trained, 4), tmp_path, steps=0)
    with pytest.raises(ValueError, match="not both"):
        run_md(crystal(), DropoutCalculator(trained, 4), tmp_path, guard=GuardSettings(Band(1.0)), threshold=1.0)


def test_drift_of_a_line() -> None:
    rows = [{"time_fs": 100.0 * k, "total_eV": 5 + 0.002 * 0.1 * k} for k in range(10)]
    drift = energy_drift(rows, n_atoms=4)
    assert drift.mean == pytest.approx(0.5)
    assert drift.fluctuation == pytest.approx(0, abs=1e-9)
