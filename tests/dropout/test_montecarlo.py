"""Frozen functions, Monte-Carlo samples of whole networks, and what is said about samples."""

import copy
import math
import pickle
import warnings
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from forcedrop import dropout as layers
from forcedrop.dropout.elementwise import ClassicDropout, Dropout, GaussianDropout
from forcedrop.dropout.freeze import dropout_sites, frozen
from forcedrop.dropout.montecarlo import mc_samples
from forcedrop.dropout.summaries import classification_summary, regression_summary

TORCH_LAYERS = {
    nn.Dropout: (2, 40, 6),
    nn.AlphaDropout: (2, 40, 6),
    nn.Dropout1d: (2, 40, 6),
    nn.Dropout2d: (2, 40, 3, 2),
    nn.Dropout3d: (2, 40, 3, 2, 2),
    nn.FeatureAlphaDropout: (2, 40, 3),
}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def perceptron(dtype: torch.dtype = torch.float64, p: float = 0.3, width: int = 16) -> nn.Sequential:
    """Layers of both houses, and batch norm with statistics that are not trivial."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(5, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(p)),
        *(nn.Linear(width, width), nn.Tanh(), Dropout(p), GaussianDropout(p)),
        *(nn.Linear(width, width), nn.SELU(), nn.AlphaDropout(p), ClassicDropout(p), nn.Linear(width, 2)),
    )
    model(torch.randn(50, 5))
    return model.to(dtype).eval()


def convolutional() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(
            nn.Conv2d(2, 6, 3),
            nn.Dropout2d(0.4),
            nn.ReLU(inplace=True),
            nn.Conv2d(6, 6, 3),
            nn.FeatureAlphaDropout(0.2),
        ),
        *(nn.Flatten(), nn.Dropout(0.5, inplace=True), nn.Linear(6 * 16, 3)),
    ).double()


class Shared(nn.Module):
    """One layer in two places."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.drop = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.drop(x))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.input = nn.Dropout(0.2)
        self.lstm = nn.LSTM(4, 6, num_layers=2, dropout=0.5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(self.input(x))[0]


def transformer(dropout: float = 0.3) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()


# frozen


@pytest.mark.parametrize("layer", TORCH_LAYERS, ids=lambda layer: layer.__name__)
def test_frozen_masks_of_torch_layers_are_as_torch_draws_them(layer: type[nn.Module]) -> None:
    """Same two values, same axes; kept fraction within 5 standard errors; the same for every entry of the batch."""
    p, n = 0.3, 60
    module, x = layer(p), torch.ones(TORCH_LAYERS[layer], dtype=torch.float64)
    torch.manual_seed(0)
    fresh = torch.stack([module.train()(x) for _ in range(n)])
    masks = mc_samples(module, x, n)
    torch.testing.assert_close(masks.unique(), fresh.unique(), rtol=1e-12, atol=1e-12)
    assert (masks == masks[:, :1]).all()
    whole_channels = (masks == masks.flatten(3)[..., 0].reshape(n, 2, 40, *[1] * (x.dim() - 2))).all()
    assert whole_channels == (fresh == fresh.flatten(3)[..., 0].reshape(n, 2, 40, *[1] * (x.dim() - 2))).all()
    units = 40 if whole_channels else 240
    kept = (masks[:, 0] == masks.max()).double().mean()
    assert abs(kept - (1 - p)) < 5 * math.sqrt(p * (1 - p) / (n * units))


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Dropout1d, (30, 4)), (nn.Dropout3d, (30, 2, 2, 2)), (nn.Dropout, (30,))]
)
def test_frozen_masks_without_a_batch_axis(layer: type[nn.Module], shape: tuple[int, ...]) -> None:
    with frozen(layer(0.5)) as module:
        y = module(torch.ones(shape)).reshape(30, -1)
    assert (y == y[:, :1]).all()
    assert set(y.unique().tolist()) == {0.0, 2.0}


def test_alpha_dropout_keeps_mean_and_variance_of_normal_numbers() -> None:
    x, n = normal(1, 500), 200
    y = mc_samples(nn.AlphaDropout(0.3), x, n)
    for moment in (1, 2):
        per_sample = y.pow(moment).mean((1, 2))
        # exact moments are those of a standard normal: x itself has others, by its own error
        expected = 0.0 if moment == 1 else 1.0
        assert abs(per_sample.mean() - expected) < 5 * math.hypot(per_sample.std() / n**0.5, moment**0.5 / 500**0.5)


def test_frozen_is_one_function_of_an_entry_alone() -> None:
    model, x = perceptron(), normal(7, 5)
    with frozen(model, seed=3, sample=2):
        whole = model(x)
        assert torch.equal(model(x), whole)
        one_by_one = torch.cat([model(row[None]) for row in x])
    torch.testing.assert_close(one_by_one, whole, rtol=1e-12, atol=1e-12)
    for settings in ({"seed": 3, "sample": 1}, {"seed": 4, "sample": 2}):
        with frozen(model, **settings):
            assert not torch.allclose(model(x), whole)
    with frozen(copy.deepcopy(model), 3, torch.tensor(2)) as other:
        assert torch.equal(other(x), whole)


def test_frozen_acts_in_training_and_evaluation() -> None:
    model, x = convolutional(), normal(3, 2, 8, 8)
    with frozen(model):
        assert torch.equal(model.train()(x), model.eval()(x))


def test_frozen_restores_also_nested_and_after_an_error() -> None:
    model, x = perceptron(), normal(4, 5)
    plain, before = model(x), [dict(vars(module)) for module in model.modules()]
    with frozen(model, sample=1):
        outer = model(x)
        with frozen(model, sample=2):
            assert not torch.equal(model(x), outer)
        with pytest.raises(RuntimeError, match="cannot be multiplied"), frozen(model, sample=2):
            model(x[:, :2])
        assert torch.equal(model(x), outer)
    assert [dict(vars(module)) for module in model.modules()] == before
    assert torch.equal(model(x), plain)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), plain)


def test_a_layer_of_torch_in_two_places_has_two_masks() -> None:
    p, n, units = 0.3, 40, 500
    model, x = Shared(p), torch.ones(1, units, dtype=torch.float64)
    with frozen(model):
        first, both = model.drop(x), model(x)
        assert torch.equal(model(x), both)
        assert torch.equal(model.drop(x), first)
        assert torch.equal(both > 0, (both > 0) & (first > 0))
    kept = (mc_samples(model, x, n) > 0).double().mean()
    fraction = (1 - p) ** 2
    assert abs(kept - fraction) < 5 * math.sqrt(fraction * (1 - fraction) / (n * units))


def test_counts_of_calls_survive_an_error() -> None:
    class Fails(Shared):
        def forward(self, x: Tensor) -> Tensor:
            if x.dim() == 1:
                raise RuntimeError("stop")
            return super().forward(x)

    model, x = Fails(0.5), torch.ones(1, 50)
    with frozen(model):
        first = model.drop(x)
        with pytest.raises(RuntimeError, match="stop"):
            model(x[0])
        assert torch.equal(model.drop(x), first)


@pytest.mark.parametrize(
    ("model", "shape"), [(Recurrent(), (3, 5, 4)), (transformer(), (3, 5, 8))], ids=["lstm", "attention"]
)
def test_modules_that_drop_inside_are_seeded(model: nn.Module, shape: tuple[int, ...]) -> None:
    model, x = copy.deepcopy(model).double().eval(), normal(*shape)
    state, flags = torch.get_rng_state(), [module.training for module in model.modules()]
    with frozen(model, sample=1), torch.no_grad():
        y = model(x)
        torch.rand(3)
        assert torch.equal(model(x), y)
    torch.set_rng_state(state)
    with pytest.warns(RuntimeWarning, match="one by one.*(LSTM|MultiheadAttention)"):
        samples = mc_samples(model, x, 3)
    torch.testing.assert_close(samples[1], y, rtol=1e-12, atol=1e-12)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(mc_samples(model, x, 3, vectorised=False), samples)
    with pytest.raises(ValueError, match="inside"):
        mc_samples(model, x, 3, vectorised=True)


def test_inside_of_an_lstm_it_is_the_dropout_of_an_lstm() -> None:
    """The spread of its samples is that of torch in training, within 5 standard errors."""
    torch.manual_seed(0)
    lstm, x, n = nn.LSTM(4, 6, num_layers=2, dropout=0.5).double(), normal(5, 3, 4), 200
    with torch.no_grad():
        samples = mc_samples(lstm, x, n, vectorised=False)[0]
        fresh = torch.stack([lstm.train()(x)[0] for _ in range(n)])
    spread, expected = ((y - y.mean(0)).square().mean((1, 2, 3)) for y in (samples, fresh))
    assert abs(spread.mean() - expected.mean()) < 5 * math.hypot(spread.std(), expected.std()) / n**0.5
    assert expected.mean() > 5 * expected.std() / n**0.5


def test_transformers_do_not_pass_by_their_dropout() -> None:
    """Without gradients, torch's fused encoder layer skips every dropout layer in evaluation mode."""
    model, x = transformer(), normal(3, 5, 8)
    with torch.no_grad(), frozen(model):
        without_gradients = model(x)
    assert torch.backends.mha.get_fastpath_enabled()
    with frozen(model):
        torch.testing.assert_close(model(x), without_gradients, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(model(x), without_gradients)


def test_subclass_with_its_own_forward_is_seeded() -> None:
    class Doubled(nn.Dropout):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    samples = mc_samples(Doubled(0.5), torch.ones(1, 100), 4, vectorised=False)
    assert set(samples.unique().tolist()) == {0.0, 4.0}
    assert not torch.equal(samples[0], samples[1])


def test_frozen_networks_compile() -> None:
    model, x = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), Dropout(0.5)).eval(), normal(3, 5, dtype=torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    plain = compiled(x)
    with frozen(model, sample=1), frozen(compiled, sample=2):
        torch.testing.assert_close(compiled(x), model(x))
        second = model(x)
    assert not torch.allclose(second, plain)
    with frozen(model, sample=2):
        assert torch.equal(model(x), second)
    torch.testing.assert_close(compiled(x), plain)


def test_what_cannot_be_frozen() -> None:
    with pytest.raises(ValueError, match="Linear has no dropout layer"), frozen(nn.Linear(2, 2)):
        pass
    model = nn.Sequential(Dropout(0.5), nn.Dropout(1.0))
    with pytest.raises(ValueError, match=r"layer '1' must lie in \[0, 1\), got 1"), frozen(model):
        pass
    assert model[0]._function is None
    with frozen(nn.Dropout(0.5)) as layer, pytest.raises(TypeError, match="floating"):
        layer(torch.ones(3, dtype=torch.int64))
    with frozen(nn.Dropout2d(0.5)) as layer, pytest.raises(ValueError, match="2 axes or more"):
        layer(torch.ones(3))


def test_sites_by_name() -> None:
    assert list(dropout_sites(transformer())) == [
        f"layers.{layer}.{name}" for layer in (0, 1) for name in ("self_attn", "dropout", "dropout1", "dropout2")
    ]
    assert not dropout_sites(nn.Sequential(nn.LSTM(2, 2), nn.MultiheadAttention(2, 1)))


# mc_samples


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_vectorised_equals_loop_and_frozen(dtype: torch.dtype, tolerance: float) -> None:
    model, x = perceptron(dtype), normal(7, 5, dtype=dtype)
    samples = mc_samples(model, x, 6, seed=1, vectorised=True)
    assert samples.shape == (6, 7, 2)
    torch.testing.assert_close(
        mc_samples(model, x, 6, seed=1, vectorised=False), samples, rtol=tolerance, atol=tolerance
    )
    for k in range(6):
        with frozen(model, 1, k):
            torch.testing.assert_close(model(x), samples[k], rtol=tolerance, atol=tolerance)


class First(nn.Module):
    """The first output of a module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module.double()

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.module(*inputs)[0]


@pytest.mark.parametrize(
    ("layer", "shapes"),
    [
        (layers.ChannelDropout(0.4), [(2, 5, 4, 4)]),
        (layers.DropBlock2d(0.3, 3), [(2, 5, 8, 8)]),
        (layers.DropPath(0.5), [(2, 5)]),
        (layers.LockedDropout(0.4), [(2, 7, 5)]),
        (layers.Zoneout(0.4), [(2, 5), (2, 5)]),
        (layers.ConcreteDropout(), [(2, 5)]),
        (layers.MaskBankDropout(5), [(2, 5)]),
        (layers.ExactDropout(5).double(), [(2, 5)]),
        (layers.AttentionDropout(0.4), [(2, 5, 5)]),
        (layers.NodeDropout(0.4), [(5, 3)]),
        (First(layers.DropoutLSTM(3, 4, p_input=0.3, p_state=0.3, p_update=0.3, p_weight=0.3)), [(5, 2, 3)]),
        (First(layers.DropoutGRU(3, 4, p_state=0.3)), [(5, 2, 3)]),
    ],
    ids=lambda case: type(case).__name__ if isinstance(case, nn.Module) else "",
)
def test_layers_of_this_library(layer: nn.Module, shapes: list[tuple[int, ...]]) -> None:
    inputs = tuple(normal(*shape, seed=seed) for seed, shape in enumerate(shapes))
    samples = mc_samples(layer, inputs, 8, vectorised=True)
    torch.testing.assert_close(mc_samples(layer, inputs, 8, vectorised=False), samples, rtol=1e-12, atol=1e-12)
    assert samples.std(0).max() > 0


def test_convolutions_in_place_layers_and_chunks() -> None:
    model, x = convolutional(), normal(3, 2, 8, 8)
    before = x.clone()
    samples = mc_samples(model, x, 5)
    for settings in ({"vectorised": False}, {"chunk": 2}, {"chunk": 9}):
        torch.testing.assert_close(mc_samples(model, x, 5, **settings), samples, rtol=1e-12, atol=1e-12)
    assert torch.equal(x, before)


def test_samples_depend_on_seed_and_index_only() -> None:
    model, x = perceptron(), normal(7, 5)
    samples = mc_samples(model, x, 8, seed=5)
    state = torch.get_rng_state()
    torch.rand(3)
    assert torch.equal(mc_samples(model, x, 8, seed=5), samples)
    torch.testing.assert_close(mc_samples(model, x, 3, seed=5), samples[:3], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(mc_samples(model, x, 8, seed=6), samples)
    for vectorised in (True, False):
        torch.set_rng_state(state)
        mc_samples(model, x, 3, vectorised=vectorised)
        assert torch.equal(torch.get_rng_state(), state)


def test_flags_and_statistics_are_left_alone() -> None:
    model, x = perceptron().train(), normal(7, 5)
    model[1].eval()
    flags, state = [module.training for module in model.modules()], copy.deepcopy(model.state_dict())
    in_training = mc_samples(model, x, 3)
    with pytest.raises(RuntimeError):
        mc_samples(model, x[:, :2], 3)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(mc_samples(model.eval(), x, 3), in_training)


class Output(NamedTuple):
    energy: Tensor
    parts: list[Tensor]


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = Dropout(0.4)

    def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Output | tuple[Tensor, Tensor]]:
        y = self.drop(x) * scale
        return {"a": Output(y.sum(), [y]), "b": (x, y)}


@pytest.mark.parametrize("vectorised", [True, False])
def test_inputs_by_name_and_nested_outputs(vectorised: bool) -> None:
    x = normal(3, 4)
    samples = mc_samples(Nested(), {"x": x, "scale": torch.tensor(2.0)}, 5, vectorised=vectorised)
    assert isinstance(samples["a"], Output)
    assert samples["a"].energy.shape == (5,)
    torch.testing.assert_close(samples["a"].parts[0].sum((1, 2)), samples["a"].energy)
    assert torch.equal(samples["b"][0], x.expand(5, 3, 4))
    assert torch.equal(samples["b"][1], samples["a"].parts[0])


def test_inputs_as_a_tuple() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.drop(x) + y

    x, y = normal(2, 30), normal(2, 30, seed=1)
    samples = mc_samples(Sum(), (x, y), 4)
    assert ((samples == y) | torch.isclose(samples, 2 * x + y)).all()


class Force(nn.Module):
    """Differentiates inside, which vmap cannot see through."""

    def __init__(self) -> None:
        super().__init__()
        self.net = perceptron()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        energy = self.net(x)[:, 0]
        return energy, torch.autograd.grad(energy.sum(), x, create_graph=True)[0]


def test_what_cannot_be_vectorised_says_so_and_goes_one_by_one() -> None:
    model, x = Force(), normal(4, 5)
    with pytest.warns(RuntimeWarning, match="one by one .*requires_grad_"):
        energy, force = mc_samples(model, x, 3)
    assert (energy.shape, force.shape) == ((3, 4), (3, 4, 5))
    step = 1e-6 * torch.eye(5)[1]
    ahead, behind = (mc_samples(model, x + sign * step, 3, vectorised=False)[0] for sign in (1, -1))
    slope = (ahead - behind) / 2e-6
    torch.testing.assert_close(slope, force[..., 1], rtol=1e-5, atol=1e-8)
    with pytest.raises(RuntimeError, match="requires_grad_"):
        mc_samples(model, x, 3, vectorised=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(mc_samples(model, x, 3, vectorised=False)[0], energy)


def test_control_flow_and_other_randomness_go_one_by_one() -> None:
    class Odd(nn.Module):
        def __init__(self, noise: bool) -> None:
            super().__init__()
            self.drop, self.noise = Dropout(0.5), noise

        def forward(self, x: Tensor) -> Tensor:
            y = self.drop(x)
            if self.noise:
                return y + torch.rand_like(x)
            return y if y.sum() > x.sum() else -y

    x, state = torch.ones(2, 9), torch.get_rng_state()
    for noise in (True, False):
        with pytest.warns(RuntimeWarning, match="one by one"):
            samples = mc_samples(Odd(noise), x, 4)
        assert torch.equal(mc_samples(Odd(noise), x, 4, vectorised=False), samples)
        assert torch.equal(mc_samples(Odd(noise), x, 2, vectorised=False), samples[:2])
    assert torch.equal(torch.get_rng_state(), state)


def test_gradients_flow() -> None:
    model, x = perceptron(), normal(7, 5)
    gradients = []
    for vectorised in (True, False):
        model.zero_grad()
        mc_samples(model, x, 4, vectorised=vectorised).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layer", [Dropout, nn.Dropout, GaussianDropout])
def test_moments_of_a_linear_network(layer: type[nn.Module]) -> None:
    """Mean w·x and variance p/(1−p) Σ (w_j x_j)², within 5 standard errors."""
    p, n = 0.3, 4000
    w, x = normal(20), normal(1, 20, seed=1)
    head = nn.Linear(20, 1, bias=False).double()
    head.weight.data = w[None]
    y = mc_samples(nn.Sequential(layer(p), head), x, n)[:, 0, 0].detach()
    variance = p / (1 - p) * (w * x).square().sum()
    assert abs(y.mean() - (w * x).sum()) < 5 * (variance / n) ** 0.5
    # the fourth moment of y gives the error of its variance
    error = ((y - y.mean()).pow(4).mean() - variance**2).sqrt() / n**0.5
    assert abs(y.var() - variance) < 5 * error


def test_moments_are_those_of_torch_in_training() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(5, 20), nn.ReLU(), nn.Dropout(0.4), nn.Linear(20, 20), nn.ReLU(), nn.Dropout(0.4)
    ).double()
    model, x, n = nn.Sequential(net, nn.Linear(20, 1).double()), normal(1, 5), 4000
    with torch.no_grad():
        samples = mc_samples(model, x, n)[:, 0, 0]
        fresh = model.train()(x.expand(n, 5))[:, 0]
    assert abs(samples.mean() - fresh.mean()) < 5 * math.hypot(samples.std(), fresh.std()) / n**0.5
    squares = [(y - y.mean()).square() for y in (samples, fresh)]
    assert abs(squares[0].mean() - squares[1].mean()) < 5 * math.hypot(*(s.std() for s in squares)) / n**0.5


class InTrainingOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x) if self.training else functional.relu(x)


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (nn.Linear(3, 1), {}, "Linear has no dropout layer"),
        (nn.Sequential(Dropout(0), nn.Dropout(0), nn.Linear(3, 1)), {}, r"rate 0 \(0 \(Dropout\), 1 \(Dropout\)\)"),
        (InTrainingOnly(), {}, r"reaches none of its dropout layers \(drop \(Dropout\)\)"),
        (InTrainingOnly(), {"vectorised": False}, "reaches none"),
        (nn.Dropout(0.5), {"n": 0}, "`n` must be at least 1, got 0"),
        (nn.Dropout(0.5), {"chunk": 0}, "`chunk` must be at least 1, got 0"),
    ],
)
def test_no_error_bars_is_an_error(model: nn.Module, settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mc_samples(model, torch.ones(2, 3), **{"n": 4, **settings})


def test_output_of_another_kind() -> None:
    class Words(nn.Dropout):
        def forward(self, input: Tensor) -> str:
            return str(super().forward(input))

    with pytest.raises(TypeError, match=r"must return tensors.*got str"):
        mc_samples(Words(0.5), torch.ones(2), 3)


# summaries


def test_regression_summary_against_numpy() -> None:
    samples = normal(6, 4, 3)
    summary = regression_summary(samples)
    assert [tuple(part.shape) for part in summary] == [(4, 3), (4, 3), (4, 3, 3)]
    np.testing.assert_allclose(summary.mean, samples.numpy().mean(0), rtol=1e-12)
    for entry in range(4):
        np.testing.assert_allclose(summary.covariance[entry], np.cov(samples[:, entry].numpy().T), rtol=1e-12)
    torch.testing.assert_close(summary.covariance.diagonal(dim1=-2, dim2=-1), summary.variance)
    assert regression_summary(samples[..., 0]).covariance.shape == (4, 4)


def entropy(*p: float) -> float:
    return -sum(x * math.log(x) for x in p if x)


def test_classification_that_disagrees_completely() -> None:
    """Every sample sure of another of C classes: all uncertainty is epistemic, log C."""
    summary = classification_summary(torch.eye(4, dtype=torch.float64)[:, None], logits=False)
    assert summary.probabilities.tolist() == [[0.25] * 4]
    expected = {"predictive_entropy": math.log(4), "expected_entropy": 0, "mutual_information": math.log(4)}
    for name, value in expected.items():
        assert getattr(summary, name).item() == pytest.approx(value, abs=1e-12)
    assert summary.variation_ratio.item() == pytest.approx(0.75)


def test_classification_that_agrees() -> None:
    """Equal samples: all uncertainty is aleatoric."""
    p = torch.tensor([0.7, 0.3, 0.0], dtype=torch.float64).expand(5, 2, 3)
    summary = classification_summary(p, logits=False)
    torch.testing.assert_close(summary.expected_entropy, torch.full((2,), entropy(0.7, 0.3), dtype=torch.float64))
    torch.testing.assert_close(summary.predictive_entropy, summary.expected_entropy)
    assert summary.mutual_information.abs().max() < 1e-12
    assert summary.variation_ratio.tolist() == [0, 0]


@pytest.mark.parametrize("q", [0.5, 0.8, 0.999, 1.0])
def test_mutual_information_of_a_binary_channel(q: float) -> None:
    """Samples (q, 1−q) and (1−q, q) are a binary symmetric channel with a uniform input: I = log 2 − h(q)."""
    p = torch.tensor([[q, 1 - q], [1 - q, q]], dtype=torch.float64)
    summary = classification_summary(p, logits=False)
    assert summary.mutual_information.item() == pytest.approx(math.log(2) - entropy(q, 1 - q), abs=1e-12)
    assert summary.variation_ratio.item() == pytest.approx(0.0 if q == 0.5 else 0.5)


def test_logits_and_probabilities_agree_and_parts_add_up() -> None:
    logits = 3 * normal(9, 4, 5)
    summary = classification_summary(logits)
    for part, other in zip(summary, classification_summary(logits.softmax(-1), logits=False), strict=True):
        torch.testing.assert_close(part, other)
    torch.testing.assert_close(summary.expected_entropy + summary.mutual_information, summary.predictive_entropy)
    assert (summary.mutual_information > 0).all()
    divergence = (logits.log_softmax(-1) - summary.probabilities.log()).mul(logits.softmax(-1)).sum(-1).mean(0)
    torch.testing.assert_close(summary.mutual_information, divergence)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_logits(dtype: torch.dtype) -> None:
    logits = torch.tensor([[1000.0, -1000.0, -math.inf], [-1000.0, 1000.0, -math.inf]], dtype=dtype)
    summary = classification_summary(logits)
    assert all(torch.isfinite(part).all() for part in summary)
    assert summary.mutual_information.item() == pytest.approx(math.log(2), rel=1e-6)


def test_one_sample_has_no_spread() -> None:
    for summary in (regression_summary, classification_summary):
        with pytest.raises(ValueError, match="2 samples or more, got 1"):
            summary(normal(1, 3))
        with pytest.raises(ValueError, match="2 axes or more"):
            summary(normal(3))
        with pytest.raises(TypeError, match="floating-point"):
            summary(torch.ones(3, 3, dtype=torch.int64))


@pytest.mark.parametrize("p", [[[0.5, 0.6], [0.5, 0.5]], [[1.5, -0.5], [0.5, 0.5]], [[math.nan, 1.0], [0.5, 0.5]]])
def test_what_is_no_probability(p: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="no probabilities"):
        classification_summary(torch.tensor(p), logits=False)
    with pytest.raises(ValueError, match="2 or more classes"):
        classification_summary(torch.tensor(p)[:, :1])


def test_remembered_masks_serve_autograd_other_seeds_and_few_at_a_time() -> None:
    from forcedrop.dropout import montecarlo

    model, x = perceptron(), normal(3, 5)
    montecarlo._TABLES.clear()
    with torch.inference_mode():  # its tensors could not be differentiated later
        first = mc_samples(model, x, 4)
    again = mc_samples(model, x.clone().requires_grad_(), 4)
    again.sum().backward()
    assert torch.equal(first.clone(), again.detach())
    assert not torch.equal(first.clone(), mc_samples(model, x, 4, seed=1).detach())
    for seed in range(40):
        mc_samples(model, x, 2, seed=seed)
    assert len(montecarlo._TABLES) <= montecarlo._MOST_TABLES
    assert torch.equal(mc_samples(model, x, 4).detach(), first.clone())
