"""Exact dropout: brute force for every mask, the limits that are laws, and the layer in networks, on disk and by the row."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from forcedrop.dropout import ExactDropout, exact_masks, exact_weights, frozen, mc_samples, normal_noise
from forcedrop.dropout.function import FunctionSample
from tests.dropout.laws import assert_mean, assert_not_mean, freeze

N, F, OUTPUTS = 30, 7, 2
ALL = torch.ones(1, F, dtype=torch.bool)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rows(n: int = N, features: int = F, outputs: int = OUTPUTS) -> tuple[Tensor, Tensor]:
    """Correlated features whose means are not 0, and targets that are not quite linear in them."""
    x = normal(n, features) @ normal(features, features, seed=1) + normal(features, seed=2)
    return x, (x @ normal(features, outputs, seed=3) + 0.3 * x[:, :1].square() + normal(n, outputs, seed=4)) / 3


def equations(prior: float = 0.7, outputs: int = OUTPUTS) -> tuple[Tensor, Tensor, Tensor]:
    """A and r with the prior, for trained weights w* of shape (F, OUTPUTS), which are returned as well."""
    x, y = rows(outputs=outputs)
    trained = normal(F, outputs, seed=5)
    precision = x.T @ x + prior * torch.eye(F, dtype=torch.float64)
    return precision, x.T @ x @ trained + x.T @ (y - x @ trained) + prior * trained, trained


def layer(features: int = F, outputs: int = OUTPUTS, p: float = 0.4, *, bias: bool = True) -> ExactDropout:
    torch.manual_seed(0)
    return ExactDropout(features, outputs, p, bias=bias).double().eval()


def filled(n: int = 6, **settings: float) -> ExactDropout:
    site = layer()
    site.solve(*rows(), n, **settings)
    return site


def least_squares(x: Tensor, y: Tensor, prior: float, towards: Tensor) -> Tensor:
    """argmin |y − x w|² + prior |w − towards|², as the least squares of the stacked system."""
    system = torch.cat((x, prior**0.5 * torch.eye(x.shape[1], dtype=x.dtype)))
    return torch.linalg.lstsq(system, torch.cat((y, prior**0.5 * towards)), driver="gelsd").solution


# --- masks


def test_a_mask_is_a_function_of_seed_and_index() -> None:
    masks = exact_masks(50, F, 0.4, seed=3)
    assert masks.shape == (50, F)
    assert masks.dtype == torch.bool
    assert torch.equal(exact_masks(20, F, 0.4, seed=3), masks[:20])
    assert torch.equal(exact_masks(7, F, 0.4, seed=3, first=20), masks[20:27])
    assert not torch.equal(exact_masks(50, F, 0.4, seed=4), masks)
    assert exact_masks(50, F, 0.0).all()
    assert torch.equal(masks[5], FunctionSample(3, 5).keep("exact", 0.4, (F,), device=torch.device("cpu")))


def test_the_rate_of_masks() -> None:
    kept = exact_masks(400, 100, 0.3)
    assert_mean(kept.reshape(-1, 1), 0.7)
    assert_not_mean(kept.reshape(-1, 1), 0.68)


# --- weights


def test_brute_force_for_every_mask() -> None:
    """All 128 masks of seven features, the empty one included."""
    prior, (x, y) = 0.7, rows()
    precision, pull, trained = equations(prior)
    keep = torch.cartesian_prod(*[torch.tensor([False, True])] * F)
    weights = exact_weights(precision, pull, keep)
    assert weights.shape == (2**F, F, OUTPUTS)
    assert weights.dtype == torch.float64
    expected = torch.zeros_like(weights)
    for k, mask in enumerate(keep[1:], 1):
        expected[k, mask] = least_squares(x[:, mask], y, prior, trained[mask])
    torch.testing.assert_close(weights, expected, rtol=1e-10, atol=1e-10)
    assert (weights[~keep] == 0).all()
    torch.testing.assert_close(exact_weights(precision, pull[:, 1], keep), weights[..., 1], rtol=1e-12, atol=1e-12)


def test_no_direction_lowers_the_loss_of_a_mask() -> None:
    """The definition itself: the gradient of the penalised squares vanishes on what a mask keeps, and only there."""
    prior, (x, y) = 0.7, rows()
    precision, pull, trained = equations(prior)
    keep = exact_masks(5, F, 0.4)
    weights = exact_weights(precision, pull, keep).requires_grad_()
    loss = (y - x @ weights).square().sum() + prior * (weights - trained).square().sum()
    (gradient,) = torch.autograd.grad(loss, weights)
    assert gradient[keep].abs().max() < 1e-9
    assert gradient[~keep].abs().min() > 1e-3


def test_without_dropping_it_is_ridge_regression() -> None:
    x, y = rows()
    precision, pull, trained = equations(0.7)
    expected = least_squares(x, y, 0.7, trained)
    torch.testing.assert_close(exact_weights(precision, pull, ALL)[0], expected, rtol=1e-10, atol=1e-10)


def test_an_infinite_prior_masks_the_trained_weights() -> None:
    precision, pull, trained = equations(1e12)
    keep = exact_masks(20, F, 0.4)
    weights = exact_weights(precision, pull, keep)
    torch.testing.assert_close(weights, keep[..., None] * trained, rtol=1e-8, atol=1e-8)


def test_the_posterior_on_condition_that_what_is_dropped_is_zero() -> None:
    precision, _, trained = equations()
    keep = exact_masks(20, F, 0.4, seed=1)
    weights = exact_weights(precision, precision @ trained, keep)
    for found, mask in zip(weights, keep, strict=True):
        expected = torch.zeros(F, OUTPUTS, dtype=torch.float64)
        across = precision[mask][:, ~mask] @ trained[~mask]
        expected[mask] = trained[mask] + torch.linalg.solve(precision[mask][:, mask], across)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    # and the textbook's conditional mean, from the covariance
    covariance, mask = torch.linalg.inv(precision), keep[0]
    shift = covariance[mask][:, ~mask] @ torch.linalg.solve(covariance[~mask][:, ~mask], -trained[~mask])
    torch.testing.assert_close(weights[0, mask], trained[mask] + shift, rtol=1e-9, atol=1e-9)


def test_draws_given_a_mask_have_the_covariance_of_its_posterior() -> None:
    """By unit vectors for noise, whose outer products sum to the covariance; twice the ratio, four times of it."""
    precision, pull, _ = equations(outputs=1)
    keep = exact_masks(3, F, 0.4, seed=2)
    mean = exact_weights(precision, pull[:, 0], keep)
    for mask, centre in zip(keep, mean, strict=True):
        masks, noise = mask.expand(F, F), torch.eye(F, dtype=torch.float64)
        for ratio in (1.0, 2.0):
            shifts = exact_weights(precision, pull[:, 0], masks, draw=ratio, noise=noise) - centre
            expected = torch.zeros(F, F, dtype=torch.float64)
            block = mask.nonzero().reshape(-1)
            expected[block[:, None], block] = ratio**2 * torch.linalg.inv(precision[mask][:, mask])
            torch.testing.assert_close(shifts.T @ shifts, expected, rtol=1e-10, atol=1e-12)


def test_draws_from_the_layer_are_standard_normal_in_the_posterior_s_units() -> None:
    """4000 functions without dropping: C'(w − w̄) has the covariance 1 within five standard errors, and no other."""
    site, (x, y) = layer(p=0.0), rows()
    site.solve(x, y, 4000, draw=1.0)
    precision = x.T @ x + torch.eye(F, dtype=torch.float64)
    whitened = site.bank @ torch.linalg.cholesky(precision)
    pairs = whitened.flatten(1)[:, :, None] * whitened.flatten(1)[:, None, :]
    assert_mean(pairs, torch.eye(F * OUTPUTS, dtype=torch.float64))
    assert_not_mean(pairs, 1.2 * torch.eye(F * OUTPUTS, dtype=torch.float64))


def test_gradients_of_weights() -> None:
    precision, pull, _ = equations()
    keep = exact_masks(3, F, 0.4)
    assert torch.autograd.gradcheck(lambda r: exact_weights(precision, r, keep), pull.requires_grad_())


# --- the bank


@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_solve_is_brute_force(bias: bool, refit: bool) -> None:
    """Weights, bias and every function, with labels of different noise and a prior of its own for each feature."""
    x, y = rows()
    site = layer(bias=bias)
    before, offset = site.weight.detach().clone(), site.bias.detach().clone() if bias else torch.zeros(OUTPUTS)
    sigma, prior = (
        0.5 + torch.rand(N, generator=torch.Generator().manual_seed(7)).double(),
        torch.linspace(0.2, 2, F).double(),
    )
    site.solve(x, y, 5, prior=prior, sigma=sigma, refit=refit, seed=3)

    pulls = torch.diag(prior.sqrt()).double()
    towards = pulls @ before.T
    white = 1 / sigma[:, None]
    if refit and bias:
        system = torch.cat((torch.cat((x * white, white), 1), torch.cat((pulls, torch.zeros(F, 1)), 1)))
        solution = torch.linalg.lstsq(system, torch.cat((y * white, towards))).solution
        plain, offset = solution[:F].T, solution[F]
    else:
        system = torch.cat((x * white, pulls))
        plain = torch.linalg.lstsq(system, torch.cat(((y - offset) * white, towards))).solution.T if refit else before
    system, right = torch.cat((x * white, pulls)), torch.cat(((y - offset) * white, towards))
    functions = torch.zeros(5, OUTPUTS, F, dtype=torch.float64)
    for function, mask in zip(functions, exact_masks(5, F, site.p, seed=3), strict=True):
        function[:, mask] = torch.linalg.lstsq(system[:, mask], right).solution.T
    torch.testing.assert_close(site.weight.detach(), plain, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(site.bank, functions - functions.mean(0), rtol=1e-9, atol=1e-9)
    if bias:
        torch.testing.assert_close(site.bias.detach(), offset.double(), rtol=1e-10, atol=1e-10)


def test_the_mean_of_the_bank_is_the_plain_layer() -> None:
    site, (x, _) = filled(draw=0.5), rows()
    assert site.bank.mean(0).abs().max() < 1e-14
    assert site.bank.std(0).min() > 1e-3
    torch.testing.assert_close(mc_samples(site, x, 6).mean(0), site(x), rtol=1e-12, atol=1e-12)


def test_function_k_does_not_depend_on_how_many_there_are() -> None:
    few, many = filled(6, draw=1.0).bank, filled(40, draw=1.0).bank
    torch.testing.assert_close(few - few[0], many[:6] - many[0], rtol=1e-12, atol=1e-12)
    other = filled(6, draw=1.0, seed=1).bank
    assert not torch.allclose(few - few[0], other - other[0])


def test_without_dropping_all_functions_are_equal_to_the_last_bit() -> None:
    site = layer(p=0.0)
    site.solve(*rows(), 7)
    assert (site.bank == 0).all()
    assert site.n_functions == 7


def test_joint_equations_of_one_output_are_the_shared_ones() -> None:
    x, y = rows(outputs=1)
    h, pull = x.T @ x, x.T @ y
    banks = []
    for right in (pull, pull[:, 0]):
        site = layer(outputs=1)
        site.fill(h, right, 9, prior=0.3, draw=0.5)
        banks.append(site.bank)
    assert torch.equal(*banks)


def test_joint_equations_that_do_not_couple_outputs_are_the_shared_ones() -> None:
    """Without masks the noise is the same too; with masks each weight has a bit of its own: brute force."""
    x, y = rows()
    h, pull = x.T @ x, x.T @ y
    joint, flat = torch.block_diag(h, h), pull.T.flatten()
    shared, own = layer(p=0.0), layer(p=0.0)
    shared.fill(h, pull, 5, draw=1.0)
    own.fill(joint, flat, 5, draw=1.0)
    torch.testing.assert_close(own.bank, shared.bank, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(own.weight, shared.weight, rtol=1e-9, atol=1e-12)
    assert own.bank.abs().max() > 0.01

    own = layer()
    trained = own.weight.detach().clone()
    own.fill(joint, flat, 5, prior=0.3)
    masks = exact_masks(5, OUTPUTS * F, own.p).reshape(5, OUTPUTS, F)
    assert not torch.equal(masks[:, 0], masks[:, 1])
    functions = torch.zeros(5, OUTPUTS, F, dtype=torch.float64)
    for k in range(5):
        for o in range(OUTPUTS):
            m = masks[k, o]
            functions[k, o, m] = least_squares(x[:, m], y[:, o], 0.3, trained[o, m])
    torch.testing.assert_close(own.bank, functions - functions.mean(0), rtol=1e-9, atol=1e-9)


def test_labels_that_are_derivatives() -> None:
    """A sine from its slope alone: the features' derivatives are the rows of the equations."""
    t = torch.linspace(0, 3, 40, dtype=torch.float64)[:, None]
    degrees = torch.arange(1, 7, dtype=torch.float64)
    slopes = degrees * t ** (degrees - 1)
    site = layer(6, 1, p=0.2, bias=False)
    site.fill(slopes.T @ slopes * 1e8, slopes.T @ t.cos() * 1e8, 16, prior=1.0)
    assert (site(t**degrees) - t.sin()).abs().max() < 1e-3
    with frozen(site, sample=3):
        assert 1e-3 < (site(t**degrees) - t.sin()).abs().max() < 0.5


def test_features_of_any_shape_and_solving_again() -> None:
    x, y = rows()
    site, other = layer(outputs=1), layer(outputs=1)
    site.solve(x, y[:, :1], 4)
    other.solve(x.reshape(5, 6, F), y[:, 0].reshape(5, 6), 4, sigma=1.0)
    torch.testing.assert_close(other.bank, site.bank, rtol=1e-10, atol=1e-12)
    first = site.weight.detach().clone()
    site.solve(x, y[:, :1], 3)
    assert site.n_functions == 3
    assert not torch.allclose(site.weight, first)  # the prior is around the weights of the first time now


# --- the call


def test_evaluation_is_the_linear_layer() -> None:
    x, linear = normal(3, 4, F), nn.Linear(F, OUTPUTS).double()
    for site in (layer(), filled()):
        linear.load_state_dict({"weight": site.weight, "bias": site.bias})
        assert torch.equal(site(x), linear(x))
        mask = (x > 0).double()
        assert torch.equal(site(x, mask), linear(x * mask))
        with frozen(site):
            assert torch.equal(site(x, mask), linear(x * mask))
    assert layer(bias=False)(x[0, 0]).shape == (OUTPUTS,)
    torch.manual_seed(1)
    site = ExactDropout(F, OUTPUTS)
    torch.manual_seed(1)
    assert torch.equal(site.weight, nn.Linear(F, OUTPUTS).weight)


@pytest.mark.parametrize("make", [layer, filled])
def test_training_is_dropout_before_the_linear_layer(make) -> None:
    site, x = make().train(), normal(8, F)
    torch.manual_seed(3)
    found = site(x)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, site.p)
    assert torch.equal(found, nn.functional.linear(dropped, site.weight, site.bias))
    assert not torch.allclose(found, site.eval()(x))
    generator = torch.Generator()
    mask = site.train().mask(x, generator.manual_seed(1))
    assert set(mask.unique().tolist()) == {0.0, 1 / (1 - site.p)}
    assert torch.equal(site(x, generator=generator.manual_seed(1)), site(x, mask))


def test_frozen_with_an_empty_bank_is_one_mask_of_the_features() -> None:
    site, x = layer(), normal(5, 3, F)
    samples = mc_samples(site, x, 6)
    masks = FunctionSample(0, torch.arange(6)).keep("", site.p, (1, F), device=x.device).double() / (1 - site.p)
    expected = torch.stack([site(x, mask) for mask in masks])
    torch.testing.assert_close(samples, expected, rtol=1e-12, atol=1e-12)
    with frozen(site, sample=2):
        torch.testing.assert_close(site(x[1, 2]), samples[2, 1, 2], rtol=1e-12, atol=1e-12)
    with frozen(site, sample=torch.tensor([3, 0, 1, 2, 3])):
        rows_ = site(x)
    torch.testing.assert_close(rows_, samples[torch.tensor([3, 0, 1, 2, 3]), torch.arange(5)], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_a_function_sample_is_a_function_of_the_bank(bias: bool) -> None:
    site, x = layer(bias=bias), normal(5, 3, F)
    site.solve(*rows(), 6)
    samples = mc_samples(site, x, 6, vectorised=True)
    expected = torch.stack([nn.functional.linear(x, site.weight + site.bank[k], site.bias) for k in range(6)])
    torch.testing.assert_close(samples, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mc_samples(site, x, 6, vectorised=False), samples, rtol=1e-12, atol=1e-12)
    for k in (0, 5):
        for index in (k, torch.tensor(k)):
            with frozen(site.train(), seed=9, sample=index):  # the seed does not matter
                torch.testing.assert_close(site(x), samples[k], rtol=1e-12, atol=1e-12)
    assert samples.std(0).min() > 1e-3
    with frozen(site, sample=torch.tensor([5, 0, 0, 2, 1])):
        torch.testing.assert_close(
            site(x), samples[torch.tensor([5, 0, 0, 2, 1]), torch.arange(5)], rtol=1e-12, atol=1e-12
        )
        with pytest.raises(ValueError, match=r"5 functions, one a row, do not fit features of shape \(4, 3, 7\)"):
            site(x[:4])
        with pytest.raises(ValueError, match="one a row"):
            site(x[0, 0])


def test_vmap_over_functions_and_gradients_through_one() -> None:
    site, x = freeze(filled(), 0), normal(5, F)
    together = torch.func.vmap(lambda k: freeze(site, k)(x))(torch.arange(6))
    torch.testing.assert_close(together, mc_samples(site, x, 6), rtol=1e-12, atol=1e-12)
    freeze(site, 2)
    assert torch.autograd.gradcheck(site, x.clone().requires_grad_())
    site(x).sum().backward()
    torch.testing.assert_close(site.weight.grad, x.sum(0).expand(OUTPUTS, F))


def test_inside_of_a_network() -> None:
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(3, F), nn.Tanh())
    net, x = nn.Sequential(trunk, ExactDropout(F, OUTPUTS)).double(), normal(40, 3)
    net[1].solve(trunk(x), x[:, :2].sin(), 8, sigma=0.1)
    assert not net[1].bank.requires_grad
    samples = mc_samples(net, x, 8)
    torch.testing.assert_close(samples.mean(0), net.eval()(x), rtol=1e-10, atol=1e-10)


def test_compiles_whole() -> None:
    """In evaluation too: compiled code takes `super().active` for True."""
    site, x = filled(), normal(5, F)
    compiled = torch.compile(site, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), site(x))
    for index in (2, torch.tensor(2)):
        with frozen(site, sample=index):
            torch.testing.assert_close(compiled(x), nn.functional.linear(x, site.weight + site.bank[2], site.bias))


def test_active() -> None:
    site = layer()
    assert not site.active
    assert site.train().active
    assert freeze(site.eval(), 0).active
    assert freeze(filled(), 0).active
    assert not filled().active
    for draw, differs in ((0.0, False), (1.0, True)):
        still = layer(p=0.0)
        assert not freeze(still.train(), 0).active
        still.solve(*rows(), 4, draw=draw)
        assert still.active == differs
        still._function = None
        assert not still.active
        if differs:
            assert mc_samples(still, normal(5, F), 4).std(0).min() > 1e-3
        else:
            with pytest.raises(ValueError, match="no error bar"):
                mc_samples(still, normal(5, F), 4)


def test_an_index_beyond_the_bank() -> None:
    site, x = filled(6), normal(5, F)
    message = "the bank of ExactDropout holds 6 functions, not 7: `solve` or `fill` with a larger `n`"
    with frozen(site, sample=6), pytest.raises(ValueError, match=message):
        site(x)
    for vectorised in (None, True, False):
        with pytest.raises(ValueError, match=message):
            mc_samples(site, x, 7, vectorised=vectorised)
    with frozen(site, sample=-1), pytest.raises(ValueError, match="must not be negative, got -1"):
        site(x)
    for index in (6, -1):
        with pytest.raises(ValueError, match=r"functions lie in \[0, 6\)"):
            torch.func.vmap(lambda k: freeze(site, k)(x))(torch.tensor([0, index]))
    site.clear()
    assert site.n_functions == 0
    assert mc_samples(site, x, 7).shape == (7, 5, OUTPUTS)


# --- copies, files, types


def test_saved_and_loaded_whatever_the_size_of_the_bank() -> None:
    full, x = nn.Sequential(filled(6)), normal(5, F)
    for other in (layer(), filled(3)):
        net = nn.Sequential(other)
        net.load_state_dict(full.state_dict())
        assert torch.equal(mc_samples(net, x, 6), mc_samples(full, x, 6))
    file = io.BytesIO()
    torch.save(full.state_dict(), file)
    file.seek(0)
    net = nn.Sequential(layer())
    net.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(net[0].bank, full[0].bank)
    net.load_state_dict(nn.Sequential(layer()).state_dict())
    assert net[0].n_functions == 0
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.bank"):
        nn.Sequential(layer(outputs=3)).load_state_dict(full.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*bank"):
        layer().load_state_dict({"weight": full[0].weight, "bias": full[0].bias})


def test_copies_pickles_and_prints() -> None:
    site, x = filled(6), normal(5, F)
    assert repr(site) == "ExactDropout(7, 2, p=0.4, bias=True, functions=6)"
    samples = mc_samples(site, x, 6)
    for twin in (copy.deepcopy(site), pickle.loads(pickle.dumps(site))):
        assert torch.equal(mc_samples(twin, x, 6), samples)
        twin.clear()
    assert site.n_functions == 6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_precisions(dtype: torch.dtype) -> None:
    """Cast when full, or filled as it is: equations are solved in float64 anyway."""
    exact, (x, y) = filled(6), rows()
    tolerance = 20 * torch.finfo(dtype).eps
    expected = mc_samples(exact, x, 6)
    late = copy.deepcopy(exact).to(dtype)
    early = layer().to(dtype)
    early.solve(x, y, 6)
    for site in (late, early):
        assert site.bank.dtype == site.weight.dtype == dtype
        samples = mc_samples(site, x.to(dtype), 6)
        assert samples.dtype == dtype
        assert (samples.double() - expected).abs().max() < tolerance * expected.abs().max()


# --- what is refused


def test_wrong_settings() -> None:
    for p in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"`p` must lie in \[0, 1\)"):
            ExactDropout(F, p=p)
        with pytest.raises(ValueError, match=r"`p` must lie in \[0, 1\)"):
            exact_masks(3, F, p)
    with pytest.raises(ValueError, match="`features` and `outputs` must be at least 1, got 0 and 1"):
        ExactDropout(0)
    with pytest.raises(ValueError, match="`n` and `features` must be at least 1, got 0 and 7"):
        exact_masks(0, F, 0.3)
    with pytest.raises(ValueError, match="`first` must not be negative, got -1"):
        exact_masks(3, F, 0.3, first=-1)


def test_wrong_equations() -> None:
    precision, pull, _ = equations()
    keep = exact_masks(3, F, 0.4)
    with pytest.raises(ValueError, match=r"shape \(F, F\), got \(7, 6\)"):
        exact_weights(precision[:, :6], pull, keep)
    with pytest.raises(ValueError, match=r"shape \(7,\) or \(7, O\), got \(6, 2\)"):
        exact_weights(precision, pull[:6], keep)
    with pytest.raises(ValueError, match=r"`keep` must have shape \(K, 7\), got \(3, 6\)"):
        exact_weights(precision, pull, keep[:, :6])
    with pytest.raises(TypeError, match=r"`keep` must be boolean, got torch.float32"):
        exact_weights(precision, pull, keep.float())
    with pytest.raises(ValueError, match="symmetric"):
        exact_weights(precision.tril(), pull, keep)
    with pytest.raises(ValueError, match="finite"):
        exact_weights(precision, pull * float("nan"), keep)
    with pytest.raises(ValueError, match=r"`noise` must have shape \(3, 7, 2\) where `draw` is not 0, got None"):
        exact_weights(precision, pull, keep, draw=1.0)
    with pytest.raises(ValueError, match=r"got \(3, 7\)"):
        exact_weights(precision, pull, keep, draw=1.0, noise=normal_noise(F, seed=0, samples=3, site="s"))
    for draw in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="`draw` must be finite and not negative"):
            exact_weights(precision, pull, keep, draw=draw)
    assert exact_weights(precision, pull, keep[:0]).shape == (0, F, OUTPUTS)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("n", [1, 3, 6])
def test_too_few_labels_without_a_prior(n: int, scale: float) -> None:
    """Rounding mostly leaves such matrices positive; their rank is said whatever the units of the features."""
    x = normal(n, F) * scale ** torch.linspace(0, 1, F)
    keep = torch.ones(2, F, dtype=torch.bool)
    keep[0, n:] = False
    weights = exact_weights(x.T @ x, x.T @ normal(n), keep[:1])  # as many weights as labels are fine
    assert (weights[0, n:] == 0).all()
    with pytest.raises(ValueError, match=f"mask 1 keeps 7 weights, and its equations have rank {n}: more labels, or a"):
        exact_weights(x.T @ x, x.T @ normal(n), keep)
    assert exact_weights(x.T @ x + torch.diag((x.T @ x).diagonal()), x.T @ normal(n), keep).isfinite().all()


def test_units_of_features_do_not_matter() -> None:
    """Equations that determine the weights do so in any units: weights go with one over them."""
    x, y = rows()
    units, keep = torch.logspace(-8, 8, F, dtype=torch.float64), exact_masks(5, F, 0.4)
    weights = exact_weights((x * units).T @ (x * units), (x * units).T @ y, keep)
    torch.testing.assert_close(weights * units[:, None], exact_weights(x.T @ x, x.T @ y, keep), rtol=1e-9, atol=1e-12)


def test_features_that_are_never_seen_need_a_prior_or_a_mask() -> None:
    x, y = rows()
    x[:, 2] = 0
    keep = torch.ones(1, F, dtype=torch.bool)
    with pytest.raises(ValueError, match="rank 6"):
        exact_weights(x.T @ x, x.T @ y, keep)
    keep[0, 2] = False
    assert exact_weights(x.T @ x, x.T @ y, keep).isfinite().all()


def test_an_error_leaves_the_layer_as_it_was() -> None:
    site, (x, y) = filled(), rows()
    before = copy.deepcopy(site.state_dict())
    for settings in ({"prior": -1.0}, {"prior": float("inf")}, {"sigma": 0.0}, {"draw": -1.0}, {"n": 0}):
        with pytest.raises(ValueError, match="must be"):
            site.solve(x, y, **settings)
    with pytest.raises(ValueError, match="larger prior"):
        site.solve(x[:3], y[:3], prior=0.0)
    assert all(torch.equal(value, before[key]) for key, value in site.state_dict().items())


def test_wrong_labels() -> None:
    site, (x, y) = layer(), rows()
    with pytest.raises(ValueError, match=r"`features` must have shape \(…, 7\), got \(30, 6\)"):
        site.solve(x[:, :6], y)
    with pytest.raises(ValueError, match=r"`targets` must have shape \(…, 2\), got \(30, 1\)"):
        site.solve(x, y[:, :1])
    with pytest.raises(ValueError, match="equally many rows, 1 or more, got 30 and 20"):
        site.solve(x, y[:20])
    with pytest.raises(ValueError, match="1 or more, got 0 and 0"):
        site.solve(x[:0], y[:0])
    with pytest.raises(ValueError, match="`targets` must be finite"):
        site.solve(x, y / 0)
    with pytest.raises(TypeError, match="floating-point"):
        site.solve(x, y.long())
    with pytest.raises(
        ValueError, match="`sigma` must be positive and finite, one number or 30, got 7, the smallest 1"
    ):
        site.solve(x, y, sigma=torch.ones(7))
    with pytest.raises(ValueError, match=r"`prior` must be finite and not negative, one number or 7, got shape \(2,\)"):
        site.solve(x, y, prior=torch.ones(2))
    message = r"must have shapes \(7, 7\) and \(7, 2\), or \(14, 14\) and \(14,\), got \(7, 7\) and \(14,\)"
    with pytest.raises(ValueError, match=message):
        site.fill(x.T @ x, (x.T @ y).flatten())
    with pytest.raises(ValueError, match=r"got \(14, 14\) and \(7, 2\)"):
        site.fill(torch.eye(14), x.T @ y)


def test_wrong_input() -> None:
    for bad in (torch.ones(3, 6), torch.ones(())):
        with pytest.raises(ValueError, match="7 features on the last axis, got shape"):
            layer()(bad)
    with pytest.raises(TypeError, match="floating-point"):
        layer()(torch.ones(3, F, dtype=torch.int64))
