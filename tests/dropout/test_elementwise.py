import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional

from forcedrop.dropout.elementwise import (
    ClassicDropout,
    Dropout,
    GaussianDropout,
    classic_dropout,
    dropout,
    gaussian_dropout,
)
from forcedrop.dropout.site import DropoutSite
from tests.dropout.laws import assert_mean, assert_not_mean, freeze

LAYERS = [Dropout, ClassicDropout, GaussianDropout]
RATES = [0.05, 0.3, 0.5, 0.8]
N = 40000
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def mean_factor(layer: type[DropoutSite], p: float) -> float:
    return 1 - p if layer is ClassicDropout else 1.0


def variance_factor(layer: type[DropoutSite], p: float) -> float:
    return p * (1 - p) if layer is ClassicDropout else p / (1 - p)


def draws(layer: DropoutSite, h: Tensor, n: int = N) -> Tensor:
    torch.manual_seed(0)
    return layer(h.expand(n, *h.shape))


@pytest.fixture
def h() -> Tensor:
    return torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# --- laws of a fresh draw


@pytest.mark.parametrize("p", RATES)
@pytest.mark.parametrize("layer", LAYERS)
def test_expectation(layer: type[DropoutSite], p: float, h: Tensor) -> None:
    y = draws(layer(p), h)
    assert_mean(y, mean_factor(layer, p) * h)
    assert_not_mean(y, 1.1 * mean_factor(layer, p) * h)


@pytest.mark.parametrize("p", RATES)
@pytest.mark.parametrize("layer", LAYERS)
def test_variance(layer: type[DropoutSite], p: float, h: Tensor) -> None:
    squares = (draws(layer(p), h) - mean_factor(layer, p) * h) ** 2
    assert_mean(squares, variance_factor(layer, p) * h**2)


def test_units_are_dropped_independently(h: Tensor) -> None:
    kept = (draws(Dropout(0.3), h) != 0).double()
    correlation = torch.corrcoef(kept.T) - torch.eye(len(h))
    assert correlation.abs().max() < 5 / N**0.5


def test_gaussian_noise_is_gaussian() -> None:
    noise = draws(GaussianDropout(0.2), torch.ones(1, dtype=torch.float64))[:, 0] - 1
    assert stats.kstest(noise.numpy() / 0.5, "norm").pvalue > 1e-6
    frozen = freeze(GaussianDropout(0.2), 0)(torch.ones(1, N, dtype=torch.float64))[0] - 1
    assert stats.kstest(frozen.numpy() / 0.5, "norm").pvalue > 1e-6


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("p", RATES)
def test_same_bits_as_torch(shape: tuple[int, ...], p: float) -> None:
    x = torch.randn(shape)
    torch.manual_seed(3)
    expected = functional.dropout(x, p)
    torch.manual_seed(3)
    assert torch.equal(Dropout(p)(x), expected)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("before", [True, False], ids=["before the ReLU", "after the ReLU"])
def test_expected_gradient_through_relu_does_not_depend_on_p(p: float, before: bool) -> None:
    """d/dx of v·drop(relu(W x)) averages, over masks, to the gradient without dropout: Wᵀ(v · 1[W x > 0])."""
    generator = torch.Generator().manual_seed(5)
    w = torch.randn(8, 4, dtype=torch.float64, generator=generator)
    v, x = (torch.randn(n, dtype=torch.float64, generator=generator) for n in (8, 4))
    rows = x.expand(N, 4).clone().requires_grad_()
    torch.manual_seed(0)
    drop = Dropout(p)
    hidden = drop(rows @ w.T).relu() if before else drop((rows @ w.T).relu())
    (gradient,) = torch.autograd.grad((hidden @ v).sum(), rows)
    assert_mean(gradient, w.T @ (v * (w @ x > 0)))
    assert_not_mean(gradient, (1 - p) * w.T @ (v * (w @ x > 0)))


# --- evaluation, explicit masks, generators


@pytest.mark.parametrize("layer", LAYERS)
def test_evaluation(layer: type[DropoutSite], h: Tensor) -> None:
    out = layer(0.3).eval()(h)
    if layer is ClassicDropout:
        assert torch.equal(out, h * 0.7)
    else:
        assert out is h


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layer", LAYERS)
def test_rate_zero_is_the_identity(layer: type[DropoutSite], training: bool, h: Tensor) -> None:
    assert layer(0.0).train(training)(h) is h


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layer", LAYERS)
def test_an_explicit_mask_is_kept_over_batches_and_modes(layer: type[DropoutSite], training: bool) -> None:
    drop = layer(0.4).train(training)
    mask = drop.mask(torch.randn(1, 50))
    assert not torch.equal(mask, torch.ones_like(mask))
    for n in (1, 3):
        x = torch.randn(n, 50)
        assert torch.equal(drop(x, mask), x * mask)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_generator_reproduces_and_leaves_the_global_one_alone(layer: type[DropoutSite]) -> None:
    x, drop = torch.randn(4, 100), layer(0.4)
    state = torch.get_rng_state()
    first, again, other = (drop(x, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("layer", LAYERS)
def test_gradcheck(layer: type[DropoutSite]) -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    mask = layer(0.4).mask(x.detach(), torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(layer(0.4), (x, mask))
    assert torch.autograd.gradcheck(freeze(layer(0.4), 0), (x,))
    assert torch.autograd.gradcheck(layer(0.4).eval(), (x,))


@pytest.mark.parametrize(
    ("function", "layer"),
    [(dropout, Dropout), (classic_dropout, ClassicDropout), (gaussian_dropout, GaussianDropout)],
)
def test_functional_forms(function: object, layer: type[DropoutSite], h: Tensor) -> None:
    torch.manual_seed(0)
    expected = layer(0.3)(h)
    torch.manual_seed(0)
    assert torch.equal(function(h, 0.3), expected)
    assert torch.equal(function(h, 0.3, training=False), layer(0.3).eval()(h))
    mask = torch.arange(6.0, dtype=h.dtype)
    assert torch.equal(function(h, 0.3, training=False, mask=mask), h * mask)
    generators = [torch.Generator().manual_seed(4) for _ in range(2)]
    assert torch.equal(function(h, 0.3, generator=generators[0]), layer(0.3)(h, generator=generators[1]))


# --- frozen function samples


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layer", LAYERS)
def test_frozen_masks_belong_to_the_function_not_to_the_batch(layer: type[DropoutSite], training: bool) -> None:
    drop = freeze(layer(0.5).train(training), 3)
    ones = torch.ones(5, 40)
    out = drop(ones)
    assert not torch.equal(out, ones)
    assert torch.equal(out, out[:1].expand(5, 40))
    torch.manual_seed(123)
    assert torch.equal(drop(torch.ones(2, 40)), out[:2])
    assert torch.equal(drop.mask(ones)[0], out[0])


@pytest.mark.parametrize("layer", LAYERS)
def test_frozen_functions_differ_over_samples_sites_and_seeds(layer: type[DropoutSite]) -> None:
    n = 20000
    rows = [
        freeze(layer(0.5), sample, seed, site)(torch.ones(1, n, dtype=torch.float64))[0]
        for sample, seed, site in [(0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b")]
    ]
    correlation = torch.corrcoef(torch.stack(rows)) - torch.eye(4)
    assert correlation.abs().max() < 5 / n**0.5


@pytest.mark.parametrize("layer", LAYERS)
def test_frozen_mean_and_variance_over_samples(layer: type[DropoutSite], h: Tensor) -> None:
    p, k = 0.3, 4000
    y = torch.func.vmap(lambda sample: freeze(layer(p), sample)(h[None])[0])(torch.arange(k))
    assert_mean(y, mean_factor(layer, p) * h)
    assert_mean((y - mean_factor(layer, p) * h) ** 2, variance_factor(layer, p) * h**2)


@pytest.mark.parametrize("layer", LAYERS)
def test_vmap_over_samples_is_the_loop(layer: type[DropoutSite]) -> None:
    x = torch.randn(3, 4, 5)
    drop = layer(0.5)
    together = torch.func.vmap(lambda sample: freeze(drop, sample)(x))(torch.arange(6))
    assert torch.equal(together, torch.stack([freeze(drop, k)(x) for k in range(6)]))


@given(p=st.floats(0, 0.99), shape=st.lists(st.integers(1, 4), min_size=1, max_size=4), sample=st.integers(0, 2**31))
def test_any_frozen_mask_has_two_values(p: float, shape: list[int], sample: int) -> None:
    x = torch.ones(shape, dtype=torch.float64)
    assert set(freeze(Dropout(p), sample)(x).unique().tolist()) <= {0.0, 1 / (1 - p)}
    if p > 0:
        assert set(freeze(ClassicDropout(p), sample)(x).unique().tolist()) <= {0.0, 1.0}


# --- in PyTorch's machinery


@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64])
@pytest.mark.parametrize("layer", [Dropout, ClassicDropout])
def test_dtypes(layer: type[DropoutSite], dtype: torch.dtype) -> None:
    x = torch.ones(4, 500, dtype=dtype)
    for drop in (layer(0.5), freeze(layer(0.5), 0)):
        y = drop(x)
        assert y.dtype == dtype
        assert sorted(y.real.unique().tolist()) == [0.0, 1.0 if layer is ClassicDropout else 2.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_gaussian_dtypes(dtype: torch.dtype) -> None:
    x = torch.ones(4, 500, dtype=dtype)
    for drop in (GaussianDropout(0.5), freeze(GaussianDropout(0.5), 0)):
        y = drop(x)
        assert y.dtype == dtype
        assert torch.isfinite(y).all()


@pytest.mark.parametrize("layer", LAYERS)
def test_autocast(layer: type[DropoutSite]) -> None:
    net = nn.Sequential(nn.Linear(8, 16), layer(0.5), nn.Linear(16, 1))
    with torch.autocast("cpu", torch.bfloat16):
        assert net[:2](torch.randn(4, 8)).dtype == torch.bfloat16
        net(torch.randn(4, 8)).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in net.parameters())


@pytest.mark.parametrize("layer", LAYERS)
def test_compile(layer: type[DropoutSite]) -> None:
    x = torch.randn(4, 6)
    drop = layer(0.5)
    compiled = torch.compile(drop, fullgraph=True, backend="eager")
    torch.manual_seed(0)
    expected = drop(x)
    torch.manual_seed(0)
    assert torch.equal(compiled(x), expected)
    assert torch.equal(compiled.eval()(x), drop.eval()(x))
    assert [len(compiled.train()(torch.ones(n, 6))) for n in (5, 7)] == [5, 7]  # a batch of changing size
    for sample in range(3):
        freeze(drop, sample)
        assert torch.equal(compiled(x), drop(x))


@pytest.mark.parametrize("layer", LAYERS)
def test_vmap_randomness(layer: type[DropoutSite], h: Tensor) -> None:
    rows, drop = h.expand(2000, 6), layer(0.3)
    torch.manual_seed(0)
    different = torch.func.vmap(drop, randomness="different")(rows)
    assert_mean(different, mean_factor(layer, 0.3) * h)
    assert_mean((different - mean_factor(layer, 0.3) * h) ** 2, variance_factor(layer, 0.3) * h**2)
    same = torch.func.vmap(drop, randomness="same")(rows)
    assert torch.equal(same, same[:1].expand_as(same))


@pytest.mark.parametrize("layer", LAYERS)
def test_copies_pickles_and_sequential(layer: type[DropoutSite]) -> None:
    drop = freeze(layer(0.25), 2)
    x = torch.randn(3, 30)
    for other in (copy.deepcopy(drop), pickle.loads(pickle.dumps(drop)), nn.Sequential(drop)):
        assert torch.equal(other(x), drop(x))
    assert repr(drop) == f"{layer.__name__}(p=0.25)"
    assert not drop.state_dict()


# --- errors


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.2, float("nan")])
@pytest.mark.parametrize("layer", LAYERS)
def test_rate_outside(layer: type[DropoutSite], p: float) -> None:
    with pytest.raises(ValueError, match=rf"`p` must lie in \[0, 1\), got {p}"):
        layer(p)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
@pytest.mark.parametrize("layer", LAYERS)
def test_integers_are_refused(layer: type[DropoutSite], dtype: torch.dtype, training: bool) -> None:
    with pytest.raises(TypeError, match=rf"{layer.__name__} needs a floating-point input, got {dtype}"):
        layer(0.5).train(training)(torch.ones(3, dtype=dtype))
