import itertools

import numpy as np
import pytest
import torch
from ase.build import bulk

from forcedrop.active.design import Design, information
from forcedrop.active.picking import (
    Informative,
    Pick,
    Pool,
    Random,
    Uncertain,
    scaled_features,
    structure_features,
)
from forcedrop.evaluation import predict_frames
from forcedrop.graph import pair_vectors
from forcedrop.model import TrainedModel
from forcedrop.structures import Frame
from tests.conftest import batch_of, emt_frames, ethanol, make_potential, silicon


def random_pool(seed: int = 0, n: int = 12, m: int = 4) -> Pool:
    rng = np.random.default_rng(seed)
    return Pool(rng.uniform(0.2, 2.0, n), 0.5, rng.normal(size=(n, 3)), rng.normal(size=(m, 3)))


def rms(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.mean((a - b) ** 2)))


@pytest.mark.parametrize("seed", range(5))
def test_greedy_against_brute_force(seed: int) -> None:
    pool = random_pool(seed)
    chosen: list[int] = []
    for _ in range(5):
        best, winner = -1.0, None
        for i in range(len(pool.sigma)):
            others = [*pool.known, *(pool.features[j] for j in chosen)]
            distance = min(rms(pool.features[i], row) for row in others)
            if pool.sigma[i] > 0.5 and distance > 0.3 and pool.sigma[i] * distance > best:
                best, winner = pool.sigma[i] * distance, i
        if winner is None:
            break
        chosen.append(winner)
    picks = Uncertain(0.3).pick(pool, 5, np.random.default_rng(0))
    assert [pick.index for pick in picks] == chosen
    assert all(pick.score == pytest.approx(pool.sigma[pick.index] * pick.distance) for pick in picks)


@pytest.mark.parametrize("strategy", [Uncertain(0.4), Random(0.4)])
def test_no_near_duplicates_of_picks_or_known(strategy) -> None:
    pool = random_pool(3, n=60)
    copies = Pool(np.tile(pool.sigma, 2), 0.5, np.tile(pool.features, (2, 1)) + 1e-3, pool.known)
    first = strategy.pick(copies, 3, np.random.default_rng(0))
    picks = [*first, *strategy.pick(copies, 50, np.random.default_rng(1), first)]
    rows = [*pool.known, *(copies.features[pick.index] for pick in picks)]
    fresh = [pair for pair in itertools.combinations(range(len(rows)), 2) if pair[1] >= len(pool.known)]
    assert len(picks) > 5
    assert min(rms(rows[i], rows[j]) for i, j in fresh) > 0.4


def test_only_flagged_ones_unless_at_random() -> None:
    pool = Pool(np.array([0.1, 0.2, 3.0, 0.3]), 0.25, np.arange(4.0)[:, None] + 10, np.zeros((1, 1)))
    assert [p.index for p in Uncertain().pick(pool, 9, np.random.default_rng(0))] == [2, 3]
    drawn = Random(reason="check").pick(pool, 9, np.random.default_rng(0))
    assert sorted(p.index for p in drawn) == [0, 1, 2, 3]
    assert {p.reason for p in drawn} == {"check"}
    assert Uncertain().pick(pool, 9, np.random.default_rng(0), [Pick(2, "check", 0.0, 1.0)])[0].index == 3


def test_random_is_uniform_and_from_its_seed() -> None:
    pool = Pool(np.array([9.0, 0.1, 0.1, 0.1]), 1.0, np.arange(4.0)[:, None], np.empty((0, 1)))
    first = [Random().pick(pool, 1, np.random.default_rng(k))[0].index for k in range(400)]
    assert np.bincount(first, minlength=4).min() > 70
    assert first == [Random().pick(pool, 1, np.random.default_rng(k))[0].index for k in range(400)]


def test_features_against_a_loop_over_atoms() -> None:
    model = TrainedModel(make_potential())
    atoms = [ethanol(), silicon()]
    found = structure_features(model, [Frame.from_atoms(a) for a in atoms])
    elements = model.elements
    for row, a in zip(found, atoms, strict=True):
        batch = batch_of([a], model.cutoff)
        with torch.no_grad():
            own = model.potential.features(
                pair_vectors(batch, 8.0, batch.forces.dtype), model.potential.inputs(batch)
            ).numpy()
        parts = [own[a.numbers == z].mean(0) if (a.numbers == z).any() else np.zeros(own.shape[1]) for z in elements]
        np.testing.assert_allclose(row, np.concatenate(parts), atol=1e-10)


def test_features_know_no_rotation_permutation_or_repetition(trained) -> None:
    frame = emt_frames(1)[0]
    atoms = frame.to_atoms()
    turned = atoms.copy()
    turned.rotate(40, (1, 2, 3), rotate_cell=True)
    found = structure_features(
        trained, [Frame.from_atoms(a) for a in (atoms, turned, atoms[[2, 0, 3, 1]], atoms.repeat((2, 1, 1)))]
    )
    np.testing.assert_allclose(found[1:], found[[0, 0, 0]], atol=1e-8)
    assert np.abs(structure_features(trained, [Frame.from_atoms(bulk("Cu", cubic=True))]) - found[0]).max() > 1e-3


def test_scaling() -> None:
    rng = np.random.default_rng(0)
    candidates, known = rng.normal(size=(50, 3)) * [1, 100, 0], rng.normal(size=(20, 3)) * [1, 100, 0]
    a, b = scaled_features(candidates, known)
    assert a.shape == (50, 2)
    np.testing.assert_allclose(np.concatenate([a, b]).std(0), 1)
    alike = scaled_features(np.ones((3, 2)), np.ones((2, 2)))
    assert alike[0].shape == (3, 1)
    assert not alike[0].any()


def linear_pool(seed: int, n: int = 9, k: int = 5) -> tuple[Pool, np.ndarray]:
    """Deviations (n, 6, k) of frames whose forces are linear in k unknown weights, and their pool; all of them are flagged."""
    rng = np.random.default_rng(seed)
    deviations = rng.normal(size=(n, 6, k)) * rng.uniform(0.2, 2.0, (n, 1, 1))
    gram = np.einsum("nmk,nml->nkl", deviations, deviations)
    return Pool(np.ones(n), 0.5, rng.normal(size=(n, 3)), np.full((1, 3), 50.0), gram), deviations


def left_over(deviations: np.ndarray, labelled: list[int]) -> float:
    """The mean over frames of the trace of the posterior covariance of their forces, by Gaussian conditioning."""
    flat = deviations.reshape(-1, deviations.shape[2])
    prior = flat @ flat.T
    rows = [6 * i + a for i in labelled for a in range(6)]
    posterior = prior
    if rows:
        cross = prior[:, rows]
        posterior = prior - cross @ np.linalg.solve(prior[np.ix_(rows, rows)] + np.eye(len(rows)), cross.T)
    return float(np.trace(posterior)) / len(deviations)


@pytest.mark.parametrize("seed", range(4))
def test_the_informative_frame_leaves_least_variance_over_the_pool(seed: int) -> None:
    pool, deviations = linear_pool(seed)
    chosen: list[int] = []
    for _ in range(4):
        rest = [i for i in range(9) if i not in chosen]
        chosen.append(min(rest, key=lambda i: left_over(deviations, [*chosen, i])))
    picks = Informative(0.0).pick(pool, 4, np.random.default_rng(0))
    assert [pick.index for pick in picks] == chosen
    for n, pick in enumerate(picks):
        gain = left_over(deviations, chosen[:n]) - left_over(deviations, chosen[: n + 1])
        assert pick.score == pytest.approx(gain, rel=1e-9)
    # what was drawn before counts as labelled
    after = Informative(0.0).pick(pool, 2, np.random.default_rng(0), picks[:2])
    assert [pick.index for pick in after] == chosen[2:]
    design = Design(pool.information)
    assert design.left() == pytest.approx(left_over(deviations, []), rel=1e-12)


def test_an_informative_copy_is_worth_little_and_what_is_not_flagged_nothing() -> None:
    pool, _ = linear_pool(7)
    gram = pool.information.copy()
    gram[4] = 30 * gram[4]
    gram[5] = gram[4]
    features = pool.features.copy()
    pool = Pool(pool.sigma, 0.5, features, pool.known, gram)
    first, second = Informative(0.0).pick(pool, 2, np.random.default_rng(0))
    assert first.index in (4, 5)
    assert second.index not in (4, 5)
    sigma = pool.sigma.copy()
    sigma[first.index] = 0.1
    assert first.index not in [
        p.index for p in Informative(0.0).pick(Pool(sigma, 0.5, features, pool.known, gram), 9, None)
    ]


def test_information_is_the_spread_of_forces(trained) -> None:
    frames = emt_frames(3, seed=9)
    found = information(trained, frames, noise=0.1)
    assert found.shape == (3, 16, 16)  # all functions of its bank
    for gram, p in zip(found, predict_frames(trained, frames, n_samples=16), strict=True):
        assert np.trace(gram) == pytest.approx(np.square(p.std["forces"] / 0.1).sum(), rel=1e-6)
        np.testing.assert_allclose(gram.sum(0), 0, atol=1e-8 * np.trace(gram))  # deviations from the mean
