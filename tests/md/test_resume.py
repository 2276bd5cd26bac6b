"""Runs that are killed, by SIGKILL, at any moment, and resumed."""

import os
import signal
import time
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.io import read

from forcedrop import DropoutCalculator, FrameStore, read_frames, run_md
from forcedrop.md import NPT, NVE, NVT, Band, GuardSettings, MDRun, RollBack
from forcedrop.model import TrainedModel
from forcedrop.potential import DropoutRates
from tests.conftest import make_potential

ENSEMBLES = {"nve": NVE(), "nvt": NVT(0.02), "npt": NPT(1.0, barostat_time=300.0)}
STEPS = 36
RATES = DropoutRates(message=0.1, update=0.2, readout=0.5)


@pytest.fixture(scope="module")
def calculator() -> DropoutCalculator:
    return DropoutCalculator(TrainedModel(make_potential(elements=(29,), rates=RATES)), 2)


@pytest.fixture(scope="module")
def settings(calculator, tmp_path_factory) -> Callable[[str], GuardSettings]:
    """Guards that flag and go back now and then: their bands are quantiles of σ along a free run of the ensemble."""

    @cache
    def guard(name: str) -> GuardSettings:
        run = start(calculator, None, name, tmp_path_factory.mktemp("free"), record_every=2)
        low, high = np.quantile([row["max_force_sigma_eV_A"] for row in run.rows], [0.3, 0.85])
        return GuardSettings(Band(low, high), RollBack(seed=2, most=100), spacing=8.0, check_every=2, runaway=1e6)

    return guard


def crystal() -> Atoms:
    """Perfect, so that its σ is 0: a run has somewhere to go back to."""
    return bulk("Cu", a=3.62, cubic=True)


def start(
    calculator: DropoutCalculator,
    settings: Callable[[str], GuardSettings] | None,
    name: str,
    folder: Path,
    **changes: object,
) -> MDRun:
    arguments = {
        "steps": STEPS,
        "timestep": 2.0,
        "record_every": 3,
        "guard": settings and settings(name),
        "ensemble": ENSEMBLES[name],
    }
    return run_md(crystal(), calculator, folder, **{**arguments, **changes})


@pytest.fixture(scope="module")
def whole(calculator, settings, tmp_path_factory) -> Callable[[str], tuple[MDRun, float]]:
    """The uninterrupted run of each ensemble, and the seconds it took."""

    @cache
    def run(name: str) -> tuple[MDRun, float]:
        settings(name)  # a run of its own
        before = time.perf_counter()
        done = start(calculator, settings, name, tmp_path_factory.mktemp(name))
        return done, time.perf_counter() - before

    return run


def killed(work: Callable[[], object], seconds: float) -> bool:
    """Run in a child process that is killed after a while; return whether it was still running."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork where there are threads
        child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            work()
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return bool(os.WIFSIGNALED(os.waitpid(child, 0)[1]))


def same_files(a: Path, b: Path) -> None:
    for name in ("md.csv", "md.xyz"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    for name in ("md.h5", "flagged.h5"):
        first, second = list(FrameStore(a / name)), list(FrameStore(b / name))
        assert len(first) == len(second), name
        for one, two in zip(first, second, strict=True):
            np.testing.assert_array_equal(one.pos, two.pos)
            assert {**one.info, "source": ""} == {**two.info, "source": ""}
            for key in one.arrays:
                np.testing.assert_array_equal(one.arrays[key], two.arrays[key])


@pytest.mark.parametrize("name", ["nve", "nvt", "npt"])
def test_killed_and_resumed_is_the_same_run(calculator, settings, whole, tmp_path, name: str) -> None:
    expected, seconds = whole(name)
    assert len(expected.rows) == STEPS // 3 + 1
    assert expected.flagged_frames
    assert any(event.back_to is not None for event in expected.events)
    moments = np.random.default_rng(list(ENSEMBLES).index(name))
    folder, kills = tmp_path / "killed", 0
    for _ in range(3):
        work = lambda: start(calculator, settings, name, folder, resume=True)  # noqa: E731
        kills += killed(work, float(moments.uniform(0.2, 0.6)) * seconds)
        if (folder / "restart.pt").exists():  # readable whenever it is looked at
            assert len(read_frames(folder / "md.h5", predictions="keep")) >= 1
            read(folder / "md.xyz", 0)
    assert kills >= 1
    resumed = start(calculator, settings, name, folder, resume=True)
    assert resumed.rows == expected.rows
    assert resumed.events == expected.events
    assert resumed.stopped == expected.stopped
    assert [f.info["step"] for f in resumed.flagged_frames] == [f.info["step"] for f in expected.flagged_frames]
    same_files(expected.folder, folder)
    again = start(calculator, settings, name, folder, resume=True)  # nothing left to do
    assert again.rows == expected.rows
    assert again.events == expected.events


@pytest.mark.parametrize("what", ["csv", "xyz", "h5", "flagged", "restart"])
def test_killed_between_two_files(calculator, settings, whole, tmp_path, monkeypatch, what: str) -> None:
    """The files never agree less than here: one has the step, the next has not."""
    from forcedrop.md import recorder, restart

    class Killed(BaseException):
        pass

    calls = 0

    def dies(old: Callable[..., object], after: bool) -> Callable[..., object]:
        def new(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if calls == 7 and not after:
                raise Killed
            result = old(*args, **kwargs)
            if calls == 7:
                raise Killed
            return result

        return new

    expected, _ = whole("nvt")
    with monkeypatch.context() as patch:
        owner, name, after = {
            "csv": (recorder.Recorder, "_write", True), "xyz": (recorder, "write_frames", True),
            "h5": (recorder, "write_frames", False), "flagged": (recorder.Recorder, "keep", True),
            "restart": (restart.Restart, "save", False),
        }[what]  # fmt: skip
        calls = 5 if what == "flagged" else 0
        patch.setattr(owner, name, dies(getattr(owner, name), after))
        with pytest.raises(Killed):
            start(calculator, settings, "nvt", tmp_path / "killed")
    resumed = start(calculator, settings, "nvt", tmp_path / "killed", resume=True)
    assert resumed.rows == expected.rows
    assert resumed.events == expected.events
    same_files(expected.folder, tmp_path / "killed")


def test_a_run_is_made_longer(calculator, settings, whole, tmp_path) -> None:
    expected, _ = whole("nvt")
    start(calculator, settings, "nvt", tmp_path / "short", steps=18)
    longer = start(calculator, settings, "nvt", tmp_path / "short", resume=True)
    assert longer.rows == expected.rows
    same_files(expected.folder, tmp_path / "short")
    with pytest.raises(ValueError, match="at step 36 already, asked for 18"):
        start(calculator, settings, "nvt", tmp_path / "short", steps=18, resume=True)


def test_a_stopped_run_stays_stopped(calculator, tmp_path) -> None:
    guard = GuardSettings(Band(0.0, 1e-6), check_every=1)
    first = start(calculator, lambda name: guard, "nve", tmp_path)
    assert [row["step"] for row in first.rows] == [0, 1]  # the step that ended it is recorded, whatever its number
    assert first.stopped == 2.0
    again = start(calculator, lambda name: guard, "nve", tmp_path, resume=True)
    assert (again.rows, again.stopped, again.events) == (first.rows, 2.0, first.events)
    assert "stopped at 0.002 ps" in again.summary()


def test_other_settings_are_refused_by_name(calculator, settings, tmp_path) -> None:
    start(calculator, settings, "nvt", tmp_path, steps=6)
    other = TrainedModel(make_potential(elements=(29,), rates=RATES, seed=1))
    for changes, message in (
        ({"timestep": 1.0}, "`timestep_fs` was 2.0, now it is 1.0"),
        ({"temperature": 400.0}, "`temperature_K` was 300.0, now it is 400.0"),
        ({"ensemble": NVT(0.5)}, "`ensemble.NVT.friction` was 0.02, now it is 0.5"),
        ({"ensemble": NVE()}, "`ensemble.NVT.friction` was 0.02, now it is absent"),
        ({"guard": None}, "`guard.band.low` was"),
        ({"record_every": 2}, "`record_every` was 3, now it is 2"),
    ):
        with pytest.raises(ValueError, match=message):
            start(calculator, settings, "nvt", tmp_path, resume=True, **changes)
    with pytest.raises(ValueError, match="`n_samples` was 2, now it is 3"):
        start(DropoutCalculator(calculator.model, 3), settings, "nvt", tmp_path, resume=True)
    with pytest.raises(ValueError, match="`model` was"):
        start(DropoutCalculator(other, 2), settings, "nvt", tmp_path, resume=True)
    with pytest.raises(ValueError, match="structure of other atoms"):
        run_md(
            crystal().repeat(2), calculator, tmp_path, steps=6, timestep=2.0, record_every=3, guard=settings("nvt"),
            ensemble=ENSEMBLES["nvt"], resume=True,
        )  # fmt: skip


def test_starting_over_forgets_the_old_run(calculator, settings, tmp_path) -> None:
    start(calculator, settings, "nvt", tmp_path, steps=12)
    with pytest.raises(ValueError, match="--overwrite removes it"):
        start(calculator, None, "nve", tmp_path, steps=6)
    run = start(calculator, None, "nve", tmp_path, steps=6, overwrite=True)
    assert len(read_frames(tmp_path / "md.h5", predictions="keep")) == len(run.rows) == 3
    resumed = start(calculator, None, "nve", tmp_path, steps=6, resume=True)
    assert resumed.rows == run.rows
