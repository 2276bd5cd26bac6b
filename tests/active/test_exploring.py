from dataclasses import replace

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk

from forcedrop.active.config import ExploreSection
from forcedrop.active.exploring import (
    Limits,
    Run,
    Seen,
    acceptable,
    before_high,
    credible,
    explore,
    plan_runs,
    summary,
)
from forcedrop.active.state import frame_key
from forcedrop.structures import Frame, FrameStore
from tests.conftest import emt_frames

LIMITS = Limits(threshold=0.1, stop_above=1.0, hottest=4.0, closest=0.6, cutoff=4.0)
RUN = Run("000_300K", 300.0, 1, "k")


def recorded(step: int, sigma: float = 0.5, temperature: float = 300.0, squeeze: float = 1.0) -> Frame:
    atoms = bulk("Cu", a=3.6 * squeeze, cubic=True)
    atoms.rattle(0.01, seed=step)
    info = {"step": float(step), "time_fs": 2.0 * step, "max_force_sigma_eV_A": sigma, "temperature_K": temperature}
    return Frame.from_atoms(atoms, info=info)


def test_limits_are_rules() -> None:
    rules = LIMITS.rules(RUN.temperature, [29])
    assert (rules.sigma, rules.temperature, rules.cutoff) == (1.0, 1200.0, 4.0)
    assert rules.closest == {(29, 29): pytest.approx(0.6 * 2 * 1.32)}


def test_nothing_after_an_explosion(tmp_path) -> None:
    steps = [recorded(0), recorded(5), recorded(10, temperature=5000), recorded(15)]
    (tmp_path / RUN.name).mkdir()
    with FrameStore(tmp_path / RUN.name / "md.h5", "w") as store:
        store.append(steps)
    seen = list(acceptable(tmp_path, RUN, LIMITS))
    assert [s.time for s in seen] == [10.0]  # neither the start, nor what is astray, nor what comes after
    assert frame_key(seen[0].frame) == frame_key(steps[1])


def test_an_atom_that_leaves_ends_the_frames_to_pick_from(tmp_path) -> None:
    def step(number: int, height: float) -> Frame:
        info = {**recorded(number).info}
        return Frame.from_atoms(Atoms("H2O", [[0, 0, 0], [0, 1, height], [0, 0, 1]]), info=info)

    for name, heights, good in (("a", (0.5, 2.9, 4.1, 0.5), 1), ("b", (7.0, 6.0, 0.5, 0.5), 2)):
        run = Run(name, 300.0, 1, "k")
        (tmp_path / name).mkdir()
        with FrameStore(tmp_path / name / "md.h5", "w") as store:
            store.append([step(5 * k, height) for k, height in enumerate(heights)])
        assert len(list(acceptable(tmp_path, run, LIMITS))) == good


def test_nothing_after_a_high_sigma() -> None:
    def seen(name: str, *values: float) -> list[Seen]:
        return [Seen(recorded(k), Run(name, 300.0, 1, "k"), 2.0 * k, value) for k, value in enumerate(values)]

    a, b = seen("a", 0.1, 0.5, 1.1, 0.2), seen("b", 0.3, 0.9)
    assert before_high([*a, *b], 1.0) == [*a[:2], *b]
    assert before_high([*a, *b], np.inf) == [*a, *b]


def test_sigma_as_large_as_the_forces_is_not_credible() -> None:
    frames = emt_frames(5)
    rms = sorted(float(np.sqrt((f.forces**2).sum(1).mean())) for f in frames)
    assert credible(frames, 0.01) == pytest.approx(rms[2], rel=1e-12)
    absurd = replace(frames[0], forces=1e3 * frames[0].forces)
    assert credible([absurd, *frames[1:]], 0.01) in [pytest.approx(r, rel=1e-12) for r in rms]
    assert credible(frames, rms[-1]) == pytest.approx(2 * rms[-1], rel=1e-12)


def test_plan() -> None:
    settings = ExploreSection(temperatures=[300, 600], starts=2, seeds=3)
    starts = emt_frames(5)
    plan = plan_runs(settings, starts, 0, 1)
    assert len(plan) == 12
    assert len({run.name for run, _ in plan}) == 12
    assert len({run.seed for run, _ in plan}) == 12
    assert len({run.start for run, _ in plan if run.temperature == 300}) == 2
    assert all(run.start == frame_key(frame) for run, frame in plan)
    assert [run for run, _ in plan_runs(settings, starts, 0, 1)] == [run for run, _ in plan]
    assert [run for run, _ in plan_runs(settings, starts, 0, 2)] != [run for run, _ in plan]
    assert len(plan_runs(settings, starts[:1], 0, 1)) == 12  # one start for all


def test_runs_are_done_once_and_are_the_same_again(trained_folder, tmp_path, monkeypatch) -> None:
    settings = ExploreSection(temperatures=[300, 900], starts=1, steps=10, timestep=2.0, record_every=5, samples=4)
    plan = plan_runs(settings, emt_frames(3), 0, 1)
    arguments = (trained_folder / "run" / "model.pt",)
    limits = Limits(0.0, 1e-6, 4.0, 0.6, 4.0)
    rest = (settings, limits, "cpu")
    found = explore(plan, *arguments, tmp_path / "a", *rest)
    assert [run["name"] for run in found] == ["000_300K", "001_900K"]
    assert all(run["stopped"] == 0.0 for run in found)  # the start itself is above this limit
    numbers = summary(found, tmp_path / "a", limits)
    assert (numbers["runs"], numbers["stopped"], numbers["exploded"], numbers["ps"]) == (2, 2, 0, 0.0)
    # one is lost, with a half of it left over
    wide = Limits(0.0, 1e6, 4.0, 0.6, 4.0)
    explore(plan, *arguments, tmp_path / "b", settings, wide, "cpu")
    before = {run.name: [s.frame.pos for s in acceptable(tmp_path / "b", run, wide)] for run, _ in plan}
    (tmp_path / "b" / "001_900K").rename(tmp_path / "b" / ".001_900K.1.part")
    calls = []
    import forcedrop.active.exploring as module

    original = module.dynamics
    monkeypatch.setattr(module, "dynamics", lambda run, *a: calls.append(run.name) or original(run, *a))
    explore(plan, *arguments, tmp_path / "b", settings, wide, "cpu")
    assert calls == ["001_900K"]
    # another plan with the same names is not taken for this one
    explore(plan_runs(settings, emt_frames(3), 1, 1), *arguments, tmp_path / "b", settings, wide, "cpu")
    assert calls == ["001_900K", "000_300K", "001_900K"]
    explore(plan, *arguments, tmp_path / "b", settings, wide, "cpu")
    for run, _ in plan:
        np.testing.assert_array_equal([s.frame.pos for s in acceptable(tmp_path / "b", run, wide)], before[run.name])


def test_several_at_once_are_the_same_runs(trained_folder, tmp_path) -> None:
    settings = ExploreSection(temperatures=[300], starts=2, steps=4, timestep=2.0, record_every=2, samples=4)
    plan = plan_runs(settings, emt_frames(3), 0, 1)
    for workers in (1, 2):
        own = settings.model_copy(update={"workers": workers})
        explore(
            plan,
            trained_folder / "run" / "model.pt",
            tmp_path / str(workers),
            own,
            Limits(0.0, 1e6, 9.0, 0.1, 4.0),
            "cpu",
        )
    for run, _ in plan:
        one, two = ([s.frame.pos for s in acceptable(tmp_path / w, run, Limits(0.0, 1e6, 9.0, 0.1, 4.0))] for w in "12")
        np.testing.assert_array_equal(one, two)


def test_a_wrong_setting_is_no_explosion(trained_folder, tmp_path) -> None:
    frame = emt_frames(1)[0]
    free = Frame(**{**vars(frame), "pbc": np.zeros(3, bool)})
    settings = ExploreSection(temperatures=[300], starts=1, steps=4, record_every=2, ensemble="npt", samples=4)
    plan = plan_runs(settings, [free], 0, 1)
    with pytest.raises(ValueError, match="NPT needs a structure that is periodic"):
        explore(plan, trained_folder / "run" / "model.pt", tmp_path, settings, LIMITS, "cpu")
