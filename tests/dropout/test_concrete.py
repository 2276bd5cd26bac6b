import copy
import math
import pickle
from itertools import pairwise

import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import brentq
from torch import Tensor, nn

from forcedrop.dropout.concrete import ConcreteDropout, concrete_dropout, concrete_mask
from forcedrop.dropout.function import FunctionSample
from forcedrop.testing import assert_unbiased_mask


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def frozen(site: ConcreteDropout, sample: int | Tensor = 0) -> ConcreteDropout:
    site._function, site._site = FunctionSample(0, sample), "s"
    return site


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def moment(p: float, temperature: float, power: int) -> float:
    """E mᵖᵒʷᵉʳ of the relaxed mask by quadrature over the logistic noise."""

    def integrand(noise: float) -> float:
        density = math.exp(-abs(noise)) / (1 + math.exp(-abs(noise))) ** 2
        kept = 0.5 * (1 - math.tanh((logit(p) + noise) / (2 * temperature)))
        return density * (kept / (1 - p)) ** power

    return quad(integrand, -40, 40, points=[-logit(p)], limit=400, epsabs=1e-12)[0]


@pytest.mark.parametrize("p", [0.05, 0.3, 0.8])
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_mask_has_the_law_of_the_paper(p: float, temperature: float) -> None:
    """P(more than half dropped) = p for every temperature; mean and mean square as by quadrature."""
    n = 200_000
    site = ConcreteDropout(p, temperature=temperature).double()
    mask = site.mask(torch.zeros(n, dtype=torch.float64), seeded()).detach()
    dropped = float((mask * (1 - p) < 0.5).double().mean())
    assert abs(dropped - p) < 5 * (p * (1 - p) / n) ** 0.5
    for power in (1, 2):
        error = float(mask.pow(power).std()) / n**0.5
        assert abs(float(mask.pow(power).mean()) - moment(p, temperature, power)) < 5 * error


def test_bias_of_the_mean_is_of_second_order_in_the_temperature() -> None:
    bias = [abs(moment(0.2, t, 1) - 1) for t in (0.1, 0.05, 0.025)]
    assert bias[0] < 5e-3
    for coarse, fine in pairwise(bias):
        assert coarse / fine == pytest.approx(4, rel=0.05)


def test_cold_mask_is_the_bernoulli_mask() -> None:
    uniform = torch.rand(1000, generator=seeded(), dtype=torch.float64)
    mask = concrete_mask(torch.tensor(0.3, dtype=torch.float64), uniform, 1e-6)
    assert torch.allclose(mask, (uniform < 0.7).double() / 0.7)


def test_relaxation_is_the_formula() -> None:
    p, u, t = 0.3, 0.4, 0.2
    z = 1 / (1 + math.exp(-(math.log(p) - math.log(1 - p) + math.log(u) - math.log(1 - u)) / t))
    assert float(concrete_mask(torch.tensor(p).double(), torch.tensor(u).double(), t)) == pytest.approx(
        (1 - z) / (1 - p)
    )


def test_regulariser_is_the_formula() -> None:
    """As the authors' code has it for l and N, which is twice ours: l²/N·‖W‖²/(1−p) + (2/N)·K·(p ln p + (1−p) ln(1−p))."""
    p, scale, n = 0.3, 0.7, 50
    weight = torch.randn(4, 6, generator=seeded(), dtype=torch.float64)
    site = ConcreteDropout(p, length_scale=scale).double()
    theirs = scale**2 / n * float(weight.square().sum()) / (1 - p)
    theirs += 2 / n * 6 * (p * math.log(p) + (1 - p) * math.log(1 - p))
    assert site.regulariser(weight, n).item() == pytest.approx(theirs / 2, rel=1e-6)
    more = (site.regulariser(weight, n, units=10) - site.regulariser(weight, n)).item()
    assert more == pytest.approx(4 / n * (p * math.log(p) + (1 - p) * math.log(1 - p)), rel=1e-6)


def test_regulariser_alone_has_its_minimum_where_calculus_puts_it() -> None:
    """Without weights the entropy wins: p = 1/2."""
    site = ConcreteDropout(0.1)
    optimiser = torch.optim.Adam(site.parameters(), lr=0.1)
    for _ in range(300):
        optimiser.zero_grad()
        site.regulariser(torch.zeros(3, 8), 1).backward()
        optimiser.step()
    assert site.p == pytest.approx(0.5, abs=1e-3)


def optimum(energy: float, units: int) -> float:
    """Where energy/(2(1−p)²) + K·logit p = 0."""
    return brentq(lambda p: energy / (2 * (1 - p) ** 2) + units * logit(p), 1e-6, 1 - 1e-6)


@pytest.mark.parametrize("target", [0.1, 0.25, 0.4])
@pytest.mark.parametrize("start", [0.02, 0.5])
def test_recovers_a_known_rate(target: float, start: float) -> None:
    r"""Linear regression with known weights, where the optimal rate has a closed form.

    N·(mean loss) is A·p/(1−p)/2 + const, A = τ·Σ_data Σ_j w_j² x_j²; adding the regulariser, B = l²·Σ w², the optimum obeys
    (A + B)/(2(1−p)²) + K·logit p = 0. The data are scaled so that it lies at ``target``.
    """
    n, units, scale = 64, 32, 0.3
    x = torch.randn(n, units, generator=seeded(), dtype=torch.float64)
    w = torch.randn(1, units, generator=seeded(1), dtype=torch.float64)
    y = x @ w.T
    shrink = scale**2 * float(w.square().sum())
    energy = -2 * (1 - target) ** 2 * units * logit(target)
    precision = (energy - shrink) / float(((w * x) ** 2).sum())
    assert precision > 0
    assert optimum(energy, units) == pytest.approx(target)

    site = ConcreteDropout(start, temperature=0.05, length_scale=scale).double()
    optimiser = torch.optim.Adam(site.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.99)
    generator, rates = seeded(2), []
    for _ in range(500):
        optimiser.zero_grad()
        prediction = site(x.repeat(16, 1), generator=generator) @ w.T
        loss = 0.5 * precision * (prediction - y.repeat(16, 1)).square().mean() + site.regulariser(w, n)
        loss.backward()
        optimiser.step()
        schedule.step()
        rates.append(site.p)
    assert sum(rates[-50:]) / 50 == pytest.approx(target, abs=0.015)


def test_gradients_under_fixed_noise() -> None:
    site = ConcreteDropout(0.3).double()
    x = torch.randn(4, 3, generator=seeded(), dtype=torch.float64, requires_grad=True)
    start = torch.tensor(-0.7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, generator=seeded(1), dtype=torch.float64, requires_grad=True)

    def forward(value: Tensor, inputs: Tensor) -> Tensor:
        return torch.func.functional_call(site, {"logit": value}, (inputs,), {"generator": seeded(5)})

    class Regulariser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.site = site

        def forward(self, w: Tensor) -> Tensor:
            return self.site.regulariser(w, 10)

    def regulariser(value: Tensor, w: Tensor) -> Tensor:
        return torch.func.functional_call(Regulariser(), {"site.logit": value}, (w,))

    def functional(value: Tensor, inputs: Tensor) -> Tensor:
        return concrete_dropout(inputs, torch.sigmoid(value), generator=seeded(5))

    assert torch.autograd.gradcheck(forward, (start, x))
    assert torch.autograd.gradcheck(functional, (start, x))
    assert torch.autograd.gradcheck(regulariser, (start, weight))
    assert torch.allclose(forward(start, x), functional(start, x))


def test_frozen_masks_are_hard_and_pass_no_gradient_to_the_rate() -> None:
    site = frozen(ConcreteDropout(0.3)).eval()
    mask = site.mask(torch.zeros(7, 20_000))
    assert mask.shape == (1, 20_000)
    assert_unbiased_mask(mask, site.p)
    assert not mask.requires_grad
    x = torch.ones(7, 20)
    assert torch.equal(site(x), site(x)[:1].expand(7, 20))
    site.p = 0.6
    wider = site.mask(torch.zeros(7, 20_000))
    assert bool((wider[mask == 0] == 0).all())
    assert_unbiased_mask(wider, site.p)


def test_vmap_over_samples_is_the_loop() -> None:
    site, x = ConcreteDropout(0.4), torch.ones(3, 50)
    together = torch.func.vmap(lambda k: frozen(site, k)(x))(torch.arange(5))
    for k in range(5):
        assert torch.equal(together[k], frozen(site, k)(x))
    assert len(together.unique(dim=0)) == 5


def test_compiles_whole() -> None:
    site, x = ConcreteDropout(0.4), torch.ones(3, 50)
    torch.compile(site, backend="eager", fullgraph=True)(x).sum().backward()
    assert site.logit.grad is not None
    frozen(site, torch.tensor(1))
    assert torch.equal(torch.compile(site, backend="eager", fullgraph=True)(x), site(x))


def test_evaluation_explicit_masks_and_generators() -> None:
    site, x = ConcreteDropout(0.3), torch.randn(5, 8, generator=seeded())
    mask = site.mask(x, seeded(1)).detach()
    assert torch.equal(site(x, generator=seeded(1)), x * mask)
    assert site.eval()(x) is x
    assert torch.equal(site(x, mask), x * mask)
    rate = torch.tensor(0.3)
    assert concrete_dropout(x, rate, False) is x
    assert torch.equal(concrete_dropout(x, rate, False, mask=mask), x * mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    for site in (ConcreteDropout(0.3), ConcreteDropout(0.3).to(dtype)):
        for layer in (site, frozen(copy.deepcopy(site))):
            out = layer(torch.ones(4, 8, dtype=dtype))
            assert out.dtype == dtype
            assert bool(out.isfinite().all())


def test_rate_is_read_and_set() -> None:
    site = ConcreteDropout(0.3)
    assert site.p == pytest.approx(0.3)
    parameter = site.logit
    site.p = 0.7
    assert site.logit is parameter
    assert site.p == pytest.approx(0.7)
    assert site.rate.requires_grad
    assert [name for name, _ in site.named_parameters()] == ["logit"]


def test_copies_pickles_and_prints() -> None:
    site = ConcreteDropout(0.3)
    assert repr(site) == "ConcreteDropout(p=0.3, temperature=0.1, length_scale=1.0)"
    for twin in (copy.deepcopy(site), pickle.loads(pickle.dumps(site))):
        assert repr(twin) == repr(site)
    other = ConcreteDropout(0.5)
    other.load_state_dict(site.state_dict())
    assert other.p == site.p
    x = torch.ones(2, 2)
    assert nn.Sequential(site).eval()(x) is x


@pytest.mark.parametrize("p", [-0.1, 0.0, 1.0, float("nan")])
def test_rate_outside(p: float) -> None:
    with pytest.raises(ValueError, match="`p` must lie in"):
        ConcreteDropout(p)
    site = ConcreteDropout(0.2)
    with pytest.raises(ValueError, match=r"`p` must lie in \(0, 1\)"):
        site.p = p


def test_wrong_input() -> None:
    with pytest.raises(TypeError, match="floating-point"):
        ConcreteDropout()(torch.ones(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="floating-point"):
        concrete_dropout(torch.ones(3, dtype=torch.int64), torch.tensor(0.5))
    with pytest.raises(ValueError, match="`rate` must have no axes"):
        concrete_dropout(torch.ones(3), torch.tensor([0.5]))
    for setting in ({"temperature": 0.0}, {"temperature": math.inf}, {"length_scale": -1.0}):
        with pytest.raises(ValueError, match="must be positive, got"):
            ConcreteDropout(0.1, **setting)
    site = ConcreteDropout()
    with pytest.raises(ValueError, match="`n_data` must be at least 1"):
        site.regulariser(torch.ones(2, 2), 0)
    with pytest.raises(ValueError, match=r"shape \(outputs, inputs, …\), got \(2,\)"):
        site.regulariser(torch.ones(2), 1)
    with pytest.raises(ValueError, match="`units` must be at least 1"):
        site.regulariser(torch.ones(2, 2), 1, units=0)
