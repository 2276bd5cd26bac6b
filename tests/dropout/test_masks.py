import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from forcedrop.dropout import edge_identity, edge_mask, feature_mask, normal_noise
from forcedrop.testing import assert_unbiased_mask


def masks(p: float, n: int, **settings: object) -> torch.Tensor:
    return feature_mask(p, n, **{"seed": 0, "samples": 16, "site": "a", **settings})


@pytest.mark.parametrize("p", [0.0, 0.05, 0.2, 0.5, 0.9])
def test_values_and_mean(p: float) -> None:
    mask = masks(p, 4096)
    assert mask.shape == (16, 4096)
    assert_unbiased_mask(mask, p)
    assert abs(float((mask == 0).double().mean()) - p) < 5 * (p * (1 - p) / mask.numel()) ** 0.5 + 1e-12


@given(p=st.floats(0, 0.99), seed=st.integers(-(2**62), 2**62), site=st.text(max_size=8))
def test_any_rate_seed_and_site(p: float, seed: int, site: str) -> None:
    mask = masks(p, 7, seed=seed, site=site, samples=3, dtype=torch.float64)
    assert set(mask.unique().tolist()) <= {0.0, 1 / (1 - p)}


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.2, float("nan")])
def test_rate_outside(p: float) -> None:
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
        masks(p, 4)


def test_noise_is_normal_and_a_function_of_seed_sample_and_site() -> None:
    settings = {"seed": 0, "site": "a", "dtype": torch.float64}
    noise = normal_noise(2000, samples=50, **settings)
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-3
    correlation = np.corrcoef(noise.numpy())
    assert np.abs(correlation - np.eye(50)).max() < 5 / 2000**0.5
    assert torch.equal(normal_noise(2000, samples=[7, 3], **settings), noise[[7, 3]])
    assert torch.equal(normal_noise(10, samples=50, **settings), noise[:, :10])
    assert not torch.equal(normal_noise(10, samples=50, **{**settings, "site": "b"}), noise[:, :10])


def test_bits_are_a_function_of_seed_sample_site_and_channel() -> None:
    whole = masks(0.3, 100, samples=8)
    assert torch.equal(masks(0.3, 100, samples=[5, 2]), whole[[5, 2]])
    assert torch.equal(masks(0.3, 40, samples=8), whole[:, :40])
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(masks(0.3, 100, samples=8), whole)
    torch.set_rng_state(state)


def test_known_bits() -> None:
    """Written down once: a model of today must have the masks of today in ten years."""
    mask = feature_mask(0.5, 16, seed=1, samples=2, site="readout.hidden")
    assert ["".join("01"[int(v > 0)] for v in row) for row in mask] == KNOWN


KNOWN = ["1101001001011000", "1100110001100000"]


def test_sites_samples_seeds_and_channels_are_independent() -> None:
    n = 20000
    bits = {
        name: (masks(0.5, n, samples=1, **kw)[0] > 0).double().numpy()
        for name, kw in {
            "base": {},
            "site": {"site": "b"},
            "seed": {"seed": 1},
        }.items()
    }
    bits["sample"] = (masks(0.5, n, samples=[1])[0] > 0).double().numpy()
    bits["shifted"] = np.roll(bits["base"], 1)
    matrix = np.corrcoef(list(bits.values()))
    assert np.abs(matrix - np.eye(len(bits))).max() < 5 / np.sqrt(n)


def test_same_bits_in_another_process() -> None:
    code = "import torch; from forcedrop.dropout import feature_mask as f; print(f(.5, 9, seed=3, samples=2, site='x').tolist())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert eval(out) == feature_mask(0.5, 9, seed=3, samples=2, site="x").tolist()


def test_dropout_imports_torch_only() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import forcedrop.dropout;"
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert set(eval(out)) - set(sys.stdlib_module_names) == {"forcedrop"}


def brute_identity(i: int, j: int, s: tuple[int, int, int]) -> tuple:
    return min((i, j, s), (j, i, tuple(-x for x in s)))


def test_edge_bits_follow_the_undirected_pair() -> None:
    generator = np.random.default_rng(0)
    i, j = generator.integers(0, 4, size=(2, 600))
    shift = generator.integers(-2, 3, size=(600, 3))
    identity = edge_identity(torch.tensor(np.stack([i, j])), torch.tensor(shift)).tolist()
    expected = [brute_identity(int(a), int(b), tuple(map(int, s))) for a, b, s in zip(i, j, shift, strict=True)]
    seen: dict[tuple, int] = {}
    for key, value in zip(expected, identity, strict=True):
        assert seen.setdefault(key, value) == value
    assert len(set(seen.values())) == len(seen) > 100


def test_edge_mask_survives_a_reordered_list() -> None:
    pairs = torch.randint(0, 50, (2, 400), generator=torch.Generator().manual_seed(0))
    mask = edge_mask(0.3, pairs, seed=0, samples=4, site="e")
    order = torch.randperm(400, generator=torch.Generator().manual_seed(1))
    assert torch.equal(edge_mask(0.3, pairs[:, order], seed=0, samples=4, site="e"), mask[:, order])
    assert torch.equal(edge_mask(0.3, pairs.flip(0), seed=0, samples=4, site="e"), mask)
