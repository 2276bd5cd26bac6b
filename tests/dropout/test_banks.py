import copy
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from forcedrop.dropout.banks import MaskBankDropout, mask_bank_dropout, masksembles_masks, normalised, overlap
from forcedrop.dropout.function import FunctionSample


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def frozen(site: MaskBankDropout, sample: int | Tensor = 0, seed: int = 0) -> MaskBankDropout:
    site._function, site._site = FunctionSample(seed, sample), "s"
    return site


def mean_overlap(masks: Tensor) -> float:
    n = len(masks)
    return float((overlap(masks).sum() - n) / (n * (n - 1)))


# --- the masks


@settings(deadline=None, max_examples=60)
@given(features=st.integers(1, 60), n=st.integers(1, 7), scale=st.floats(1, 50), seed=st.integers(-5, 2**40))
def test_masks_of_any_setting(features: int, n: int, scale: float, seed: int) -> None:
    """Equal sizes, every feature covered, a pure function of the arguments."""
    masks = masksembles_masks(features, n, scale, seed=seed)
    assert masks.shape == (n, features)
    assert masks.dtype == torch.bool
    assert len(masks.sum(1).unique()) == 1
    assert bool(masks.any(0).all())
    assert torch.equal(masks, masksembles_masks(features, n, scale, seed=seed))


@pytest.mark.parametrize("scale", [1.0, 1.3, 2.0, 4.0, 8.0])
def test_size_and_overlap_follow_the_law_of_the_scale(scale: float) -> None:
    """m = C/(s(1 − (1 − 1/s)ⁿ)); two random sets of m out of m·s positions share m/s: intersection over union 1/(2s−1)."""
    features, n = 400, 4
    banks = [masksembles_masks(features, n, scale, seed=seed) for seed in range(12)]
    m = features / (scale * (1 - (1 - 1 / scale) ** n))
    assert all(abs(int(bank[0].sum()) - m) <= 0.5 for bank in banks)
    values = torch.tensor([mean_overlap(bank) for bank in banks])
    # 5 standard errors, and what rounding m to an integer changes
    assert abs(float(values.mean()) - 1 / (2 * scale - 1)) < 5 * float(values.std()) / len(banks) ** 0.5 + 1 / m


def authors_masks(m: int, n: int, positions: int, features: int, rng: np.random.Generator) -> np.ndarray:
    """Sets of m out of the positions, columns nobody uses removed, until the number of columns is right."""
    while True:
        masks = np.zeros((n, positions), dtype=bool)
        for row in masks:
            row[rng.choice(positions, m, replace=False)] = True
        used = masks.any(0)
        if used.sum() == features:
            return masks[:, used]


def test_distribution_is_that_of_the_published_algorithm() -> None:
    """How many masks keep a feature, and how much masks overlap: against brute force from another generator."""
    features, n, scale, draws = 30, 4, 2.0, 300
    rng = np.random.default_rng(0)
    ours = [masksembles_masks(features, n, scale, seed=seed) for seed in range(draws)]
    m = int(ours[0][0].sum())
    theirs = [torch.from_numpy(authors_masks(m, n, round(m * scale), features, rng)) for _ in range(draws)]
    for statistic in (
        mean_overlap,
        *(lambda bank, k=k: float((bank.sum(0) == k).double().mean()) for k in range(1, n + 1)),
    ):
        a, b = (torch.tensor([statistic(bank) for bank in banks]) for banks in (ours, theirs))
        assert abs(float(a.mean() - b.mean())) < 5 * float((a.var() + b.var()) / draws) ** 0.5
    # and every feature and every mask is like any other
    kept = torch.stack(ours).double()
    p = m / features
    assert (kept.mean((0, 1)) - p).abs().max() < 5 * (p * (1 - p) / (draws * n)) ** 0.5 * 1.1
    assert (kept.mean(0) - p).abs().max() < 5 * (p * (1 - p) / draws) ** 0.5


def test_extremes() -> None:
    assert bool(masksembles_masks(50, 4, 1.0).all())
    assert torch.equal(overlap(masksembles_masks(50, 5, 1e9)), torch.eye(5, dtype=torch.float64))
    assert torch.equal(masksembles_masks(50, 5, 1e9).sum(0), torch.ones(50, dtype=torch.int64))
    assert bool(masksembles_masks(9, 1, 3.0).all())
    assert masksembles_masks(3, 8, 5.0).sum(1).tolist() == [1] * 8


def test_known_bits() -> None:
    """Written down once: a bank of today can be built again in ten years."""
    rows = ["".join("01"[int(v)] for v in row) for row in masksembles_masks(12, 3, 2.0, seed=1)]
    assert rows == KNOWN
    assert not torch.equal(masksembles_masks(12, 3, 2.0, seed=2), masksembles_masks(12, 3, 2.0, seed=1))


KNOWN = ["010011111010", "111100110100", "001100011111"]


def test_neither_numpy_nor_the_global_generator_matters() -> None:
    code = (
        "import torch; torch.manual_seed(7); from forcedrop.dropout.banks import masksembles_masks as f;"
        "print(f(12, 3, 2.0, seed=1).tolist())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert eval(out) == masksembles_masks(12, 3, 2.0, seed=1).tolist()


def test_overlap_of_masks_by_hand() -> None:
    masks = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [2, 3, 0, 0]])
    assert torch.allclose(overlap(masks), torch.tensor([[1, 1 / 3, 1], [1 / 3, 1, 1 / 3], [1, 1 / 3, 1]]).double())


# --- the layer


def test_expectation_over_the_bank_is_the_identity() -> None:
    x = torch.randn(6, 40, generator=seeded(), dtype=torch.float64)
    site = MaskBankDropout(40, 5, 3.0).eval()
    mean = torch.stack([frozen(site, k)(x) for k in range(5)]).mean(0)
    assert torch.allclose(mean, x, rtol=1e-14, atol=0)


def test_a_function_sample_is_a_mask_of_the_bank() -> None:
    x = torch.ones(6, 40)
    site = MaskBankDropout(40, 4).eval()
    for k in range(9):
        for seed in (0, 1):
            assert torch.equal(frozen(site, k, seed)(x) != 0, site.bank[k % 4].expand(6, 40))
    together = torch.func.vmap(lambda k: frozen(site, k)(x))(torch.arange(9))
    assert torch.equal(together != 0, site.bank[torch.arange(9) % 4, None].expand(9, 6, 40))


def test_each_entry_of_a_training_batch_takes_one_mask() -> None:
    n, batch = 4, 8000
    site, x = MaskBankDropout(16, n), torch.ones(batch, 16)
    kept = site(x, generator=seeded()) != 0
    matches = (kept[:, None] == site.bank).all(2)
    assert bool((matches.sum(1) == 1).all())
    shares = matches.double().mean(0)
    assert ((shares - 1 / n).abs() < 5 * (1 / n * (1 - 1 / n) / batch) ** 0.5).all()


def test_chunks_go_by_place() -> None:
    site = MaskBankDropout(16, 4, chunks=True)
    kept = site(torch.ones(8, 16)) != 0
    assert torch.equal(kept, site.bank.repeat_interleave(2, 0))
    assert torch.equal(site.choice(10), torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 3, 3]))
    with pytest.raises(ValueError, match="for 4 masks needs as many entries, got 3"):
        site(torch.ones(3, 16))


@pytest.mark.parametrize(("dim", "shape"), [(1, (6, 10, 4, 3)), (-1, (6, 4, 3, 10)), (2, (6, 4, 10))])
def test_axis_of_the_features(dim: int, shape: tuple[int, ...]) -> None:
    site = MaskBankDropout(10, 3, dim=dim)
    x = torch.randn(shape, generator=seeded())
    out = site(x, generator=seeded(1)).movedim(dim, -1).flatten(1, -2)
    assert torch.equal(out != 0, (out != 0)[:, :1].expand_as(out))
    functional = mask_bank_dropout(x, site.bank, dim=dim, generator=seeded(1)).movedim(dim, -1).flatten(1, -2)
    assert torch.equal(functional, out)


def test_evaluation_and_explicit_masks() -> None:
    site, x = MaskBankDropout(16), torch.randn(5, 16, generator=seeded())
    mask = site.mask(x, seeded(1))
    assert mask.shape == (5, 16)
    assert torch.equal(site(x, generator=seeded(1)), x * mask)
    assert site.eval()(x) is x
    assert torch.equal(site(x, mask), x * mask)
    assert mask_bank_dropout(x, site.bank, False) is x
    assert torch.equal(mask_bank_dropout(x, site.bank, False, mask=mask), x * mask)
    assert MaskBankDropout(16, 4, 1.0)(x) is x


def test_features_that_no_mask_keeps_stay_zero() -> None:
    masks = torch.tensor([[1, 0, 1], [0, 0, 1]])
    assert torch.equal(normalised(masks, torch.float32), torch.tensor([[2.0, 0, 1], [0, 0, 1]]))


def test_gradients() -> None:
    x = torch.randn(4, 10, generator=seeded(), dtype=torch.float64, requires_grad=True)
    site = MaskBankDropout(10)
    assert torch.autograd.gradcheck(lambda t: site(t, generator=seeded(3)), x)
    assert torch.autograd.gradcheck(lambda t: mask_bank_dropout(t, site.bank, generator=seeded(3)), x)


def test_compiles_whole() -> None:
    site, x = MaskBankDropout(10), torch.ones(4, 10)
    assert bool(torch.compile(site, backend="eager", fullgraph=True)(x).isfinite().all())
    frozen(site, torch.tensor(6))
    assert torch.equal(torch.compile(site, backend="eager", fullgraph=True)(x), site(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    site = MaskBankDropout(16).to(dtype)
    assert site.bank.dtype == torch.bool
    assert site(torch.ones(4, 16, dtype=dtype)).dtype == dtype


def test_copies_pickles_and_prints() -> None:
    site, x = MaskBankDropout(16, 4, 2.0), torch.ones(5, 16)
    assert site.p == 1 - int(site.bank[0].sum()) / 16
    assert repr(site) == "MaskBankDropout(16, n=4, scale=2.0, p=0.4375, dim=1, chunks=False)"
    for twin in (copy.deepcopy(site), pickle.loads(pickle.dumps(site))):
        assert torch.equal(twin(x, generator=seeded()), site(x, generator=seeded()))
    other = MaskBankDropout(16, 4, 2.0, seed=9)
    assert not torch.equal(other.bank, site.bank)
    other.load_state_dict(site.state_dict())
    assert torch.equal(other.bank, site.bank)
    assert nn.Sequential(site).eval()(x) is x


def test_wrong_settings() -> None:
    for features, n in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match="`features` and `n` must be at least 1"):
            masksembles_masks(features, n)
    for scale in (0.9, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="`scale` must be finite and at least 1"):
            MaskBankDropout(4, 2, scale)
    with pytest.raises(ValueError, match=r"shape \(n, C\), got \(4,\)"):
        overlap(torch.ones(4))
    with pytest.raises(ValueError, match=r"shape \(n, C\), got \(4,\)"):
        mask_bank_dropout(torch.ones(2, 4), torch.ones(4))
    with pytest.raises(ValueError, match="got 0, which is the batch"):
        MaskBankDropout(4, dim=0)
    with pytest.raises(ValueError, match="got 0, which is the batch"):
        mask_bank_dropout(torch.ones(2, 4), torch.ones(2, 4), dim=0)


def test_wrong_input() -> None:
    site = MaskBankDropout(16)
    for bad in (torch.ones(16), torch.ones(3, 15), torch.ones(16, 3)):
        with pytest.raises(ValueError, match="16 features on axis 1 and the batch on axis 0, got shape"):
            site(bad)
    with pytest.raises(ValueError, match="on axis -2"):
        MaskBankDropout(16, dim=-2)(torch.ones(16, 16))
    with pytest.raises(TypeError, match="floating-point"):
        site(torch.ones(3, 16, dtype=torch.int64))
