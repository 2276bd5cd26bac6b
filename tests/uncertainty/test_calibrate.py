"""What a calibration is chosen to be, on force errors whose law is known."""

from dataclasses import replace

import numpy as np
import pytest
from ase import Atoms

from forcedrop.derive import derive
from forcedrop.dropout import frozen
from forcedrop.graph import batch_graphs
from forcedrop.metrics import nll
from forcedrop.uncertainty.calibrate import CANDIDATES, ForceErrors, calibrate, choose, cross_validate, own_factors
from forcedrop.uncertainty.calibration import Calibration, Growth
from forcedrop.uncertainty.sampling import predict_graphs
from tests.conftest import emt_frames, graph_of


def made(exponent: float = 0.0, elements: dict[int, float] | None = None, frames: int = 60) -> ForceErrors:
    """Errors that are Gaussian with σ = 2 s (1 + s²)^(γ/2) e_Z; spreads differ by an order of magnitude."""
    generator = np.random.default_rng(3)
    z = np.tile([1, 6, 6, 8], frames)
    std = np.exp(generator.normal(scale=0.8, size=(len(z), 1))) * np.ones(3)
    factor = 2 * (1 + std**2) ** (exponent / 2) * np.array([(elements or {}).get(int(n), 1.0) for n in z])[:, None]
    return ForceErrors(generator.normal(size=std.shape) * factor * std, std, z, np.arange(len(z)) // 4)


def test_the_simplest_that_fits_is_chosen() -> None:
    plain = choose(made())
    assert (plain.curve.exponent, plain.elements) == (0.0, {})
    assert plain.curve.scale == pytest.approx(2.0, rel=0.1)
    grown = choose(made(1.0))
    assert grown.elements == {}
    assert grown.curve.exponent == pytest.approx(1.0, abs=0.25)
    own = choose(made(1.0, {1: 0.3, 6: 1.0, 8: 3.0}))
    assert own.elements[8] / own.elements[1] == pytest.approx(10, rel=0.2)


def test_few_frames_decide_nothing() -> None:
    found = choose(made(1.0, {1: 0.3, 8: 3.0}, frames=9))
    assert (found.curve.exponent, found.elements) == (0.0, {})


def test_scores_are_those_of_frames_left_out() -> None:
    """A calibration that fits the frames it saw perfectly is judged by others."""
    seen: list[set[int]] = []

    def candidate(forces: ForceErrors) -> Calibration:
        seen.append(set(forces.frame.tolist()))
        return Calibration(Growth(2.0))

    forces = made()
    scores = cross_validate(forces, candidate)
    assert [len(own) for own in seen] == [48] * 5
    assert set.intersection(*seen) == set()
    for own, score in zip(seen, scores, strict=True):
        out = ~np.isin(forces.frame, list(own))
        assert score == pytest.approx(nll(forces.error[out], 2 * forces.std[out]))


def test_every_candidate_is_worth_its_name() -> None:
    forces = made(1.0, {1: 0.3, 6: 1.0, 8: 3.0})
    one, growing, by_element = (cross_validate(forces, candidate).mean() for candidate in CANDIDATES)
    assert by_element < growing < one
    assert isinstance(choose(forces).curve, Growth)


@pytest.mark.parametrize(("beyond", "rel"), [(3.95, 1e-3), (30.0, 1e-9)])
def test_atoms_that_no_potential_can_know_do_not_calibrate(trained, beyond: float, rel: float) -> None:
    """An atom without neighbours has no force and no spread, whatever its label says; one at the cutoff next to none."""
    with_one, without = [], []
    for frame in emt_frames(6, seed=3):
        atoms = frame.to_atoms()
        atoms.pbc = False
        without.append(graph_of(atoms, 4.0, forces=frame.forces))
        top = atoms.positions[np.argmax(atoms.positions[:, 2])]
        atoms = atoms + Atoms("Cu", top[None] + [0, 0, beyond])
        with_one.append(graph_of(atoms, 4.0, forces=np.vstack([frame.forces, [[0.1, 0.2, 0.3]]])))
    expected = calibrate(trained.potential, without)
    alone = Atoms("Cu", cell=[12.0] * 3, pbc=True)
    with_one.append(graph_of(alone, 4.0, energy=-0.3, stress=np.full(6, 0.01)))
    with pytest.warns(UserWarning, match=r"7 atoms of the frames to calibrate on have no neighbour within 3.2 Å"):
        found = calibrate(trained.potential, with_one)
    assert found.scales["forces"] == pytest.approx(expected.scales["forces"], rel=rel)
    assert found.quantiles["atoms"] == pytest.approx(expected.quantiles["atoms"], rel=rel)
    assert found.curve.scale == pytest.approx(expected.curve.scale, rel=rel)


def entries(factor: float, frames: int = 80, per_frame: int = 1, seed: int = 0) -> tuple[np.ndarray, np.ndarray, int]:
    """Gaussian errors of ``factor`` times σ, and σ of different sizes."""
    generator = np.random.default_rng(seed)
    sigma = np.exp(generator.normal(scale=0.5, size=frames * per_frame))
    return factor * sigma * generator.normal(size=sigma.shape), sigma, frames


def test_a_property_that_is_off_takes_a_factor_of_its_own() -> None:
    found = own_factors({"energy": entries(2.0), "stress": entries(1.0, per_frame=6)})
    assert set(found) == {"energy"}
    assert found["energy"] == pytest.approx(2.0, rel=0.2)


def test_no_factor_makes_sigma_smaller() -> None:
    """Energies near the training data are the easy ones."""
    assert own_factors({"energy": entries(0.4)}) == {}


def test_honest_properties_take_none() -> None:
    """By chance a few in a hundred do: the gain must exceed its standard error over five folds."""
    adopted = [name for seed in range(40) for name in own_factors({"energy": entries(1.0, seed=seed)})]
    assert len(adopted) <= 6
    assert own_factors({"energy": entries(3.0, frames=9)}) == {}  # nine frames decide nothing
    zero = (np.zeros(20), np.zeros(20), 20)
    assert own_factors({"energy": zero}) == {}


def test_what_is_zero_by_symmetry_does_not_count_for_a_factor() -> None:
    error, sigma, n = entries(2.0)
    with_zeros = (np.concatenate([error, np.zeros(n)]), np.concatenate([sigma, np.zeros(n)]), n)
    assert own_factors({"stress": with_zeros})["stress"] == pytest.approx(
        own_factors({"stress": (error, sigma, n)})["stress"]
    )


def test_calibration_of_a_network_takes_its_factors_into_quantiles_and_levels(trained) -> None:
    """Labels are a function of its own bank, energies moved by 5 σ: energies ask for more, and that is in all that is kept."""

    graphs, potential = [], trained.potential
    for number, frame in enumerate(emt_frames(20, seed=7)):
        graph = graph_of(frame.to_atoms(), 4.0)
        with frozen(potential, 0, number % 16):
            own = derive(potential, batch_graphs([graph]))
        label = own.energy.detach() + (0.5 if number % 2 else -0.5)
        graph = graph_of(frame.to_atoms(), 4.0, energy=float(label), forces=own.forces.detach().numpy())
        graphs.append(graph)
    found = calibrate(potential, graphs)
    assert found.own["energy"] > 2
    assert "stress" not in found.own
    assert found.n_samples == 16
    bare = replace(found, own={})

    for graph, p in zip(graphs[:3], predict_graphs(potential, graphs[:3], n_samples=16), strict=True):
        z = graph.z.numpy()
        sigma, plain = found.sigma(p.samples, z)["energy"], bare.sigma(p.samples, z)["energy"]
        assert sigma == pytest.approx(found.own["energy"] * plain)
        assert any(level == pytest.approx(float(sigma) / 4, rel=1e-9) for level in found.levels["energy_per_atom"])
    errors = [
        abs(float(p.mean["energy"]) - float(g.energy)) / float(found.sigma(p.samples, g.z.numpy())["energy"])
        for g, p in zip(graphs, predict_graphs(potential, graphs, n_samples=16), strict=True)
    ]
    assert np.mean(np.array(errors) <= found.quantile("energy", 0.8)) >= 0.8
