"""The guard on a potential whose σ and forces are known: it needs no network."""

from collections.abc import Callable

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.md.langevin import Langevin
from ase.md.melchionna import MelchionnaNPT
from ase.md.nose_hoover_chain import IsotropicMTKNPT
from ase.md.velocitydistribution import thermalize_momenta
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS

from forcedrop.md import Band, Guard, GuardStop, Kind, RollBack, Stop, run_guarded


class Scripted(EMT):
    """EMT with a σ that is a function of the number of looks, or of the atoms."""

    sigma_kind = "std"

    def __init__(self, sigma: Callable[[Atoms, int], float]) -> None:
        super().__init__()
        self.sigma, self.looks = sigma, -1

    def get_property(self, name: str, atoms: Atoms, allow_calculation: bool = True) -> object:
        if name == "forces_std":
            self.looks += 1
            forces = np.zeros((len(atoms), 3))
            forces[-1] = 0.6 * self.sigma(atoms, self.looks), 0.8 * self.sigma(atoms, self.looks), 0
            return forces
        if name == "energy_std":
            return 0.1
        return super().get_property(name, atoms, allow_calculation)


def copper(sigma: Callable[[Atoms, int], float], temperature: float = 300.0) -> Atoms:
    atoms = bulk("Cu", a=3.62, cubic=True)
    thermalize_momenta(atoms, temperature_K=temperature, rng=np.random.default_rng(0))
    atoms.calc = Scripted(sigma)
    return atoms


def script(*values: float) -> Callable[[Atoms, int], float]:
    return lambda atoms, look: values[min(look, len(values) - 1)]


BAND = Band(1.0, 2.0)


def test_below_nothing_between_flagged_above_stopped() -> None:
    atoms = copper(script(0.5, 1.0, 1.5, 0.5, 2.0, 2.5))
    guard = Guard(atoms.calc, atoms, BAND, spacing=1)
    dynamics = VelocityVerlet(atoms, units.fs)
    dynamics.attach(guard, interval=2)
    event = run_guarded(dynamics, steps=100)
    assert dynamics.nsteps == 10
    assert [(e.step, e.kind, e.sigma) for e in guard.events] == [
        (2, Kind.FLAGGED, pytest.approx(1.5)), (4, Kind.FLAGGED, pytest.approx(2.0)), (5, Kind.HIGH, pytest.approx(2.5)),
    ]  # fmt: skip
    assert event is guard.events[-1]
    assert "σ 2.5 above 2" in event.sentence()
    assert len(guard.flagged) == 2
    frame = guard.flagged[0]
    assert frame.energy is None
    assert frame.forces is None  # a prediction is no label
    assert frame.info["sigma_max_force"] == pytest.approx(1.5)
    np.testing.assert_allclose(frame.arrays["forces_std"][-1], [0.9, 1.2, 0])


def test_steps_are_those_of_the_dynamics_when_it_watches() -> None:
    atoms = copper(script(0.5, 1.5, 2.5))
    guard = Guard(atoms.calc, atoms, BAND)
    dynamics = VelocityVerlet(atoms, units.fs)
    guard.watch(dynamics, every=5)
    assert run_guarded(dynamics, steps=100).step == 10
    assert guard.flagged[0].info["step"] == 5


def test_flagged_frames_are_spaced() -> None:
    atoms = copper(script(1.5))
    seen = []
    guard = Guard(atoms.calc, atoms, BAND, spacing=7, on_flag=seen.append)
    dynamics = VelocityVerlet(atoms, units.fs)
    guard.watch(dynamics)
    assert run_guarded(dynamics, steps=30) is None
    assert [frame.info["step"] for frame in guard.flagged] == [0, 7, 14, 21, 28]
    assert seen == guard.flagged


def test_an_optimiser_is_stopped() -> None:
    atoms = copper(script(0.5, 1.5, 2.5))
    atoms.rattle(0.2, seed=0)
    guard = Guard(atoms.calc, atoms, BAND)
    optimiser = BFGS(atoms, logfile=None)
    guard.watch(optimiser)
    event = run_guarded(optimiser, fmax=1e-6, steps=50)
    assert (event.step, event.kind) == (2, Kind.HIGH)
    assert [frame.info["step"] for frame in guard.flagged] == [1]
    with pytest.raises(ValueError, match="cannot go back in BFGS"):
        Guard(atoms.calc, atoms, BAND, on_high=RollBack(300.0)).watch(optimiser)


def test_overlapping_and_hot_frames_are_never_flagged() -> None:
    atoms = copper(script(1.5))
    close = atoms.copy()
    close.calc = atoms.calc
    close.positions[1] = close.positions[0] + [0, 0, 1.0]
    guard = Guard(atoms.calc, close, BAND)
    with pytest.raises(GuardStop, match=r"overlap, Cu\d and Cu\d are 1.000 Å apart, at least 1.848 Å"):
        guard()
    assert guard.flagged == []
    image = bulk("Cu", a=2.0)  # 1.4 Å from its own images
    with pytest.raises(GuardStop, match=r"Cu0 and Cu0 are 1\.414 Å apart"):
        Guard(atoms.calc, image, BAND)()
    hot = copper(script(1.5), 3000.0)
    guard = Guard(hot.calc, hot, BAND, temperature_limit=1000.0)
    with pytest.raises(GuardStop, match="K above 1000 K"):
        guard()
    assert (guard.flagged, guard.events[0].kind) == ([], Kind.HOT)


def test_an_atom_that_leaves_is_trouble_and_one_that_was_alone_is_not() -> None:
    """Within 0.8 of 5 Å: σ of a network fades to nothing beyond, however far off its force is."""
    pair = [[0, 0, 0], [2.5, 0, 0]]
    away = Atoms("Cu4", [*pair, [5.0, 0, 0], [0, 0, 30.0]])
    away.calc = Scripted(script(0.5))
    for cutoff, ends in ((5.0, True), (None, False)):
        atoms = away.copy()
        guard = Guard(away.calc, atoms, BAND, cutoff=cutoff)
        guard()
        atoms.positions[2, 0] = 2.5 + 3.9
        guard()  # in sight
        atoms.positions[2, 0] = 2.5 + 4.1
        if ends:
            with pytest.raises(GuardStop, match=r"lost, Cu2 left all others by more than 4 Å"):
                guard()
        else:
            guard()
    visitor = away.copy()
    guard = Guard(Scripted(script(0.5, 1.5)), visitor, BAND, cutoff=5.0)
    guard()
    visitor.positions[3, 2] = 3.0
    guard()
    visitor.positions[3, 2] = 30.0
    with pytest.raises(GuardStop, match="Cu3"):
        guard()
    back = Guard(away.calc, atoms, BAND, cutoff=5.0)
    back.restore(guard_state(away), [])
    assert back.events == []
    with pytest.raises(GuardStop, match="Cu2"):
        back()  # a resumed run remembers whom it had in sight


def guard_state(atoms: Atoms) -> dict[str, object]:
    guard = Guard(atoms.calc, atoms, BAND, cutoff=5.0)
    guard()
    return guard.state()


def test_nan_is_trouble() -> None:
    atoms = copper(script(np.nan))
    with pytest.raises(GuardStop):
        Guard(atoms.calc, atoms, Band(1.0))()


def integrators(atoms: Atoms) -> dict[str, Callable[[], object]]:
    return {
        "verlet": lambda: VelocityVerlet(atoms, units.fs),
        "langevin": lambda: Langevin(
            atoms, units.fs, temperature_K=300, friction=0.01, rng=np.random.default_rng(0), fixcm=False
        ),
        "npt": lambda: IsotropicMTKNPT(
            atoms, units.fs, temperature_K=300, pressure_au=0.1, tdamp=20 * units.fs, pdamp=50 * units.fs
        ),
    }


@pytest.mark.parametrize("name", ["verlet", "langevin", "npt"])
def test_going_back(name: str) -> None:
    atoms = copper(script(0.5, 0.5, 1.5, 2.5, 0.5))
    places: list[np.ndarray] = []
    cells: list[float] = []
    guard = Guard(atoms.calc, atoms, BAND, on_high=RollBack(300.0, seed=3))
    dynamics = integrators(atoms)[name]()
    dynamics.attach(lambda: (places.append(atoms.get_positions()), cells.append(atoms.get_volume())), interval=4)
    guard.watch(dynamics, every=4)
    assert run_guarded(dynamics, steps=12) is None
    assert guard.times_back == 1
    assert guard.events[-1].back_to == 4  # the last below the band, not the flagged one
    np.testing.assert_allclose(atoms.positions, places[1], atol=1e-12)
    assert atoms.get_volume() == pytest.approx(cells[1])
    if name == "npt":
        assert abs(cells[3] - cells[1]) > 1e-3  # it had moved on
    expected = copper(script(0.0))
    expected.calc = EMT()
    expected.set_cell(atoms.cell)
    expected.set_positions(atoms.get_positions())
    expected.set_momenta(atoms.get_momenta())
    again = integrators(expected)["verlet" if name == "langevin" else name]()
    if name == "npt":  # the strain counts from the first cell; all that was kept of the past is forgotten
        assert dynamics._p_eps == 0
        assert not dynamics._thermostat._p_eta.any()
        assert not dynamics._barostat._p_xi.any()
    dynamics.run(3)
    if name != "langevin":
        again.run(3)
        np.testing.assert_allclose(atoms.positions, expected.positions, atol=1e-7 if name == "npt" else 1e-12)


def test_new_velocities_depend_on_seed_and_time_only() -> None:
    momenta = []
    for seed in (3, 3, 4):
        atoms = copper(script(0.5, 2.5, 2.5, 0.5))
        guard = Guard(atoms.calc, atoms, BAND, on_high=RollBack(300.0, seed=seed))
        dynamics = VelocityVerlet(atoms, units.fs)
        drawn: list[np.ndarray] = []
        guard.watch(dynamics)
        dynamics.attach(lambda atoms=atoms, drawn=drawn: drawn.append(atoms.get_momenta()))
        run_guarded(dynamics, steps=2)
        momenta.append(drawn[1:])
    np.testing.assert_array_equal(momenta[0], momenta[1])
    assert np.abs(momenta[0][0] - momenta[0][1]).max() > 0.1
    assert np.abs(momenta[0][0] - momenta[2][0]).max() > 0.1
    assert np.abs(momenta[0][0].sum(axis=0)).max() < 1e-9


def test_going_back_has_an_end() -> None:
    atoms = copper(script(0.5, 2.5))
    guard = Guard(atoms.calc, atoms, BAND, on_high=RollBack(300.0, most=3))
    dynamics = VelocityVerlet(atoms, units.fs)
    guard.watch(dynamics)
    event = run_guarded(dynamics, steps=100)
    assert (guard.times_back, dynamics.nsteps, event.back_to) == (3, 4, None)
    assert [e.back_to for e in guard.events] == [0, 0, 0, None]


def test_a_start_above_the_band_has_nowhere_to_go() -> None:
    atoms = copper(script(2.5))
    guard = Guard(atoms.calc, atoms, BAND, on_high=RollBack(300.0))
    dynamics = VelocityVerlet(atoms, units.fs)
    guard.watch(dynamics)
    assert run_guarded(dynamics, steps=5).step == 0


def test_what_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    atoms = copper(script(0.5, 2.5))
    with pytest.raises(ValueError, match=r"0 ≤ low ≤ high, got 2.0 and 1.0"):
        Band(2.0, 1.0)
    with pytest.raises(ValueError, match="unknown criterion"):
        Band(1.0, criterion="sigma")
    with pytest.raises(ValueError, match="needs a temperature"):
        Guard(atoms.calc, atoms, BAND, on_high=RollBack())
    with pytest.raises(ValueError, match="spacing of flagged frames must be at least 1"):
        Guard(atoms.calc, atoms, BAND, spacing=0)
    guard = Guard(atoms.calc, atoms, BAND, on_high=RollBack(300.0))
    dynamics = VelocityVerlet(atoms, units.fs)
    dynamics.attach(guard)
    with pytest.raises(ValueError, match=r"needs guard.watch\(dynamics\)"):
        dynamics.run(5)
    other = MelchionnaNPT(atoms, units.fs, temperature_K=300, externalstress=0.0)
    with pytest.raises(ValueError, match="cannot go back in MelchionnaNPT"):
        guard.watch(other)
    Guard(atoms.calc, atoms, BAND, on_high=Stop()).watch(other)


def test_state_goes_through_json() -> None:
    import json

    atoms = copper(script(0.5, 1.5, 2.5, 0.5))
    guard = Guard(atoms.calc, atoms, BAND, on_high=RollBack(300.0), spacing=5)
    dynamics = VelocityVerlet(atoms, units.fs)
    guard.watch(dynamics)
    run_guarded(dynamics, steps=3)
    other = Guard(atoms.calc, atoms, BAND, on_high=RollBack(300.0), spacing=5)
    other.restore(json.loads(json.dumps(guard.state())), guard.flagged)
    assert other.state() == guard.state()
    assert other.events == guard.events
    assert other.times_back == 1
