import copy
import pickle
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from e3nn import nn as e3nn_nn
from e3nn import o3
from torch import Tensor, nn

from forcedrop.dropout.equivariant import IrrepsDropout, TensorDropout, irreps_dropout, parse_irreps, tensor_dropout
from forcedrop.dropout.function import FunctionSample
from forcedrop.dropout.site import DropoutSite
from forcedrop.testing import assert_unbiased_mask

IRREPS = "5x0e + 3x1o + 2x2e + 1o + 0x4e + 2x3e"
BLOCKS = [(5, 0), (3, 1), (2, 2), (1, 1), (0, 4), (2, 3)]
DIM = 5 + 9 + 10 + 3 + 14
CHANNELS = 13


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def frozen(site: DropoutSite, sample: int | Tensor = 0) -> DropoutSite:
    site._function, site._site = FunctionSample(0, sample), "s"
    return site


def features(*shape: int) -> Tensor:
    return torch.randn(shape, generator=seeded(), dtype=torch.float64)


def rotation(improper: bool) -> Tensor:
    q, r = torch.linalg.qr(torch.randn(3, 3, generator=seeded(7), dtype=torch.float64))
    q = q * torch.diagonal(r).sign()
    return q * torch.linalg.det(q).sign() * (-1 if improper else 1)


def channel_masks(mask: Tensor) -> Tensor:
    """The first component of every channel."""
    starts, at = [], 0
    for multiplicity, degree in BLOCKS:
        for _ in range(multiplicity):
            starts.append(at)
            at += 2 * degree + 1
    return mask[..., starts]


@pytest.mark.parametrize(
    "irreps",
    [
        IRREPS,
        o3.Irreps(IRREPS),
        BLOCKS,
        [(5, 0, 1), (3, 1, -1), (2, 2, 1), (1, 1, -1), (0, 4, 1), (2, 3, 1)],
        [(5, (0, 1)), (3, 1), [2, 2], (1, (1, -1)), (0, 4), (2, 3)],
        "5x0+3x1+2x2+1+0x4+2x3",
    ],
)
def test_every_way_to_write_irreps(irreps: object) -> None:
    assert parse_irreps(irreps) == BLOCKS
    assert IrrepsDropout(irreps, shared=True).channel_of.shape == (DIM,)
    assert o3.Irreps(IRREPS).dim == DIM


def test_no_irreps_at_all() -> None:
    x = torch.zeros(3, 0)
    for empty in ("", [], o3.Irreps("")):
        assert irreps_dropout(x, empty, shared=True).shape == (3, 0)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("improper", [True, False])
@pytest.mark.parametrize("source", ["fresh", "frozen", "mask"])
def test_commutes_with_wigner_matrices(shared: bool, improper: bool, source: str) -> None:
    wigner = o3.Irreps(IRREPS).D_from_matrix(rotation(improper))
    site, x = IrrepsDropout(IRREPS, 0.5, shared=shared), features(9, 4, DIM)
    if source == "frozen":
        frozen(site)
    mask = site.mask(x, seeded()) if source == "mask" else None
    turned_first = site(x @ wigner.T, mask, seeded())
    turned_last = site(x, mask, seeded()) @ wigner.T
    assert (turned_first - turned_last).abs().max() < 1e-12
    assert (turned_first - x @ wigner.T).abs().max() > 0.1
    # the check can fail: bits per component do not commute
    loose = (torch.rand(DIM, generator=seeded(), dtype=torch.float64) > 0.5) * 2.0
    assert (loose * (x @ wigner.T) - (loose * x) @ wigner.T).abs().max() > 0.1


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("improper", [True, False])
def test_cartesian_tensors_commute_with_rotations(shared: bool, improper: bool) -> None:
    turn = rotation(improper)
    vector: Callable[[Tensor], Tensor] = lambda t: torch.einsum("ai,nci->nca", turn, t)  # noqa: E731
    matrix: Callable[[Tensor], Tensor] = lambda t: torch.einsum("ai,bj,ncij->ncab", turn, turn, t)  # noqa: E731
    for rank, turned in ((1, vector), (2, matrix)):
        x = features(6, 20, *[3] * rank)
        site = TensorDropout(rank, 0.5, shared=shared)
        assert (site(turned(x), None, seeded()) - turned(site(x, None, seeded()))).abs().max() < 1e-12
        alive = (site(x, None, seeded()) != 0).flatten(2)
        assert torch.equal(alive.all(2), alive.any(2))
        assert 0 < int(alive.any(2).sum()) < 120


def test_shared_and_per_row_bits() -> None:
    x = features(500, DIM)
    shared = IrrepsDropout(IRREPS, 0.5, shared=True)(x, None, seeded()) / x
    assert torch.equal(shared.round(decimals=9), shared[:1].expand_as(x).round(decimals=9))
    rows = channel_masks(IrrepsDropout(IRREPS, 0.5, shared=False).mask(x, seeded()))
    assert_unbiased_mask(rows, 0.5)
    bits = rows - 1
    correlation = bits.T @ bits / len(x)
    assert (correlation - torch.eye(CHANNELS)).abs().max() < 5 / 500**0.5
    assert abs(float((bits[1:] * bits[:-1]).mean())) < 5 / (499 * CHANNELS) ** 0.5


def test_frozen_bits_belong_to_channels_alone() -> None:
    x = features(8, 3, DIM)
    masks = [frozen(IrrepsDropout(IRREPS, 0.5, shared=shared)).eval().mask(x) for shared in (True, False)]
    assert masks[0].shape == (1, 1, DIM)
    assert torch.equal(*masks)
    assert torch.equal(
        frozen(TensorDropout(0, 0.5, shared=False)).mask(torch.zeros(1, CHANNELS)), channel_masks(masks[0])[0]
    )
    others = torch.stack([frozen(IrrepsDropout(IRREPS, 0.5, shared=True), k).mask(x) for k in range(4)])
    assert len(others.unique(dim=0)) == 4


def test_variance_law_of_e3nn() -> None:
    """Mean x, variance p/(1−p)·x², covariance within a channel p/(1−p)·x_i·x_j and 0 across, as e3nn's layer has them."""
    p, n = 0.3, 4000
    x = features(1, DIM).abs() + 0.5
    torch.manual_seed(0)
    theirs = e3nn_nn.Dropout(IRREPS, p).train()(x.expand(n, DIM)) / x
    ours = IrrepsDropout(o3.Irreps(IRREPS), p, shared=False)(x.expand(n, DIM), None, seeded()) / x
    channel = IrrepsDropout(IRREPS, shared=True).channel_of
    law = (channel[:, None] == channel).double() * p / (1 - p)
    top = 1 / (1 - p) - 1
    fourth = p + top**4 * (1 - p)  # E (m − 1)⁴
    tolerance = 5.5 * (fourth / n) ** 0.5
    for sample in (theirs, ours):
        noise = sample - 1
        assert (noise.mean(0)).abs().max() < 5 * (p / (1 - p) / n) ** 0.5
        assert (noise.T @ noise / n - law).abs().max() < tolerance


@pytest.mark.parametrize("shared", [True, False])
def test_explicit_masks_and_generators(shared: bool) -> None:
    x = features(5, 2, DIM)
    site = IrrepsDropout(IRREPS, 0.4, shared=shared)
    mask = site.mask(x, seeded(1))
    assert mask.shape == (1 if shared else 5, 1, DIM)
    assert torch.equal(site(x, None, seeded(1)), x * mask)
    assert torch.equal(irreps_dropout(x, IRREPS, 0.4, shared=shared, generator=seeded(1)), x * mask)
    assert torch.equal(irreps_dropout(x, IRREPS, 0.4, False, shared=shared, mask=mask), x * mask)
    y = features(5, 2, 4, 3, 3)
    cartesian = TensorDropout(2, 0.4, shared=shared)
    mask = cartesian.mask(y, seeded(1))
    assert mask.shape == (1 if shared else 5, 1, 4, 1, 1)
    assert torch.equal(tensor_dropout(y, 2, 0.4, shared=shared, generator=seeded(1)), y * mask)
    assert torch.equal(cartesian.eval()(y, mask), y * mask)


def test_evaluation_is_the_identity() -> None:
    x = features(5, DIM)
    assert IrrepsDropout(IRREPS, 0.4, shared=True).eval()(x) is x
    assert IrrepsDropout(IRREPS, 0.0, shared=True)(x) is x
    assert TensorDropout(0, 0.4, shared=True).eval()(x) is x


def test_gradients() -> None:
    x = features(2, DIM).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: irreps_dropout(t, IRREPS, 0.4, shared=True, generator=seeded()), x)
    assert torch.autograd.gradcheck(lambda t: irreps_dropout(t, IRREPS, 0.4, shared=False, generator=seeded()), x)
    y = features(2, 5, 3, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: tensor_dropout(t, 2, 0.4, shared=False, generator=seeded()), y)


def test_vmap_over_samples_is_the_loop() -> None:
    x, y = features(3, DIM), features(3, 6, 3)

    def once(sample: Tensor) -> tuple[Tensor, Tensor]:
        return frozen(IrrepsDropout(IRREPS, 0.4, shared=True), sample)(x), frozen(
            TensorDropout(1, 0.4, shared=True), sample
        )(y)

    together = torch.func.vmap(once)(torch.arange(5))
    for k in range(5):
        for ours, alone in zip(together, once(torch.tensor(k)), strict=True):
            assert torch.equal(ours[k], alone)


def test_compiles_whole() -> None:
    site, x = IrrepsDropout(IRREPS, 0.4, shared=True), features(3, DIM)
    compiled = torch.compile(site, backend="eager", fullgraph=True)
    alive = compiled(x) != 0
    assert torch.equal(alive, alive[:1].expand_as(alive))
    frozen(site, torch.tensor(2))
    assert torch.equal(torch.compile(site, backend="eager", fullgraph=True)(x), site(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_dtypes(dtype: torch.dtype) -> None:
    x = features(4, DIM).to(dtype)
    assert irreps_dropout(x, IRREPS, shared=False).dtype == dtype
    assert tensor_dropout(x, 0, shared=False).dtype == dtype


def test_copies_pickles_and_prints() -> None:
    site = IrrepsDropout(IRREPS, 0.4, shared=False)
    assert repr(site) == "IrrepsDropout(5x0 + 3x1 + 2x2 + 1x1 + 0x4 + 2x3, p=0.4, shared=False)"
    assert repr(TensorDropout(2, 0.4, shared=True)) == "TensorDropout(rank=2, p=0.4, shared=True)"
    x = features(3, DIM)
    for twin in (copy.deepcopy(site), pickle.loads(pickle.dumps(site))):
        assert torch.equal(twin(x, None, seeded()), site(x, None, seeded()))
    assert not site.state_dict()
    assert nn.Sequential(site).eval()(x) is x


def test_e3nn_is_not_imported() -> None:
    code = "import sys; import forcedrop.dropout.equivariant as m; m.parse_irreps('2x1o'); print('e3nn' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "False"
    )


def test_wrong_input() -> None:
    site = IrrepsDropout(IRREPS, shared=True)
    for bad in (features(DIM), features(3, DIM + 1)):
        with pytest.raises(ValueError, match=rf"input of shape \(rows, …, {DIM}\), got"):
            site(bad)
    with pytest.raises(ValueError, match="rank 2 needs an input of at least 4 axes"):
        tensor_dropout(features(4, 3, 3), 2, shared=True)
    for layer in (site, TensorDropout(0, shared=True)):
        with pytest.raises(TypeError, match="floating-point"):
            layer(torch.ones(2, DIM, dtype=torch.int64))
    with pytest.raises(TypeError, match="shared"):
        IrrepsDropout(IRREPS)  # whether bits are shared has no default


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_rate_outside(p: float) -> None:
    for build in (lambda: IrrepsDropout(IRREPS, p, shared=True), lambda: TensorDropout(1, p, shared=True)):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
            build()


@pytest.mark.parametrize(
    ("irreps", "error", "match"),
    [
        ("5x0e + x1o", ValueError, "got the term"),
        ("5x0e,1o", ValueError, "got the term"),
        ([(1, 2, 3, 4)], ValueError, "a block of irreps is"),
        ([(1,)], ValueError, "a block of irreps is"),
        ([5], TypeError, "a block of irreps is"),
        ([(2, 1.0)], TypeError, "are integers"),
        ([(2, "1o")], TypeError, "are integers"),
        ([(-1, 1)], ValueError, "not negative"),
        ([(1, -1)], ValueError, "not negative"),
    ],
)
def test_wrong_irreps(irreps: object, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        parse_irreps(irreps)
    with pytest.raises(ValueError, match="`rank` must not be negative"):
        TensorDropout(-1, shared=True)
