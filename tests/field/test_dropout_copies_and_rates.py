"""Copies made while a network is frozen, and rates that are set later or are no numbers."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from forcedrop.dropout import (
    ConcreteDropout,
    DropBlock2d,
    Dropout,
    EdgeCutDropout,
    IrrepsDropout,
    LinearSchedule,
    MaskBankDropout,
    SphericalDropout,
    TensorDropout,
    frozen,
    linear_rate,
    mc_samples,
)
from tests.dropout.test_abilities import copied


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.read = nn.LSTM(3, 4, 2, dropout=0.5, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.read(self.lstm(x[:, None].expand(-1, 5, -1))[0][:, -1])
        return out


class Twice(nn.Module):
    """A layer of torch's in two places, each with a mask of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(3, 8), nn.Linear(8, 8), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.drop(self.b(self.drop(self.a(x))))
        return out


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True)
    return nn.Sequential(nn.Linear(3, 8), nn.Unflatten(1, (1, 8)), nn.TransformerEncoder(layer, 1), nn.Flatten())


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ours": lambda: nn.Sequential(nn.Linear(3, 8), Dropout(0.5)),
    "torch's": lambda: nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5)),
    "alpha": lambda: nn.Sequential(nn.Linear(3, 8), nn.AlphaDropout(0.5)),
    "inside": Recurrent,
    "twice": Twice,
    "transformer": transformer,
    "attention": lambda: nn.Sequential(transformer(), nn.Linear(8, 2), ConcreteDropout(0.5)),
}
EVERY = pytest.mark.parametrize("kind", NETWORKS)


def network(kind: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return NETWORKS[kind]().eval()


X = torch.linspace(-1, 1, 6).reshape(2, 3)


@EVERY
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
def test_a_copy_has_weights_of_its_own_and_stays_the_function(kind: str, way: str) -> None:
    net = network(kind)
    with torch.no_grad():
        plain = net(X)
        with frozen(net, 0, 1):
            expected = net(X)
            twin = copied(net, way)
            torch.testing.assert_close(twin(X), expected)
        assert not torch.equal(plain, expected)
        torch.testing.assert_close(net(X), plain)  # the original has thawed
        torch.testing.assert_close(twin(X), expected)  # the copy has not
        with frozen(net, 0, 2), frozen(twin, 0, 2):
            torch.testing.assert_close(twin(X), net(X))
        torch.testing.assert_close(twin(X), expected)
        for weight in twin.parameters():
            weight.mul_(2)
        assert not torch.allclose(twin(X), expected)
        with frozen(net, 0, 1):
            torch.testing.assert_close(net(X), expected)
    assert torch.backends.mha.get_fastpath_enabled()


@EVERY
def test_a_shallow_copy_shares_the_layers_and_thaws_with_them(kind: str) -> None:
    net = network(kind)
    plain = net(X)
    with frozen(net, 0, 1):
        expected, twin = net(X), copy.copy(net)
        torch.testing.assert_close(twin(X), expected)
    torch.testing.assert_close(twin(X), plain)


@EVERY
def test_weights_come_and_go_while_frozen(kind: str) -> None:
    net, other = network(kind), network(kind)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.5)
    with frozen(other, 0, 1):
        expected = other(X)
    with frozen(net, 0, 1):
        weights = other.state_dict()
        if kind != "inside":  # torch.nn.LSTM counts its weights when it is made
            torch.testing.assert_close(torch.func.functional_call(net, weights, (X,)), expected)
        assert list(net.state_dict()) == list(weights)
        net.load_state_dict(weights)
        torch.testing.assert_close(net(X), expected)
        linear = next(m for m in net.modules() if type(m) is nn.Linear)
        nn.utils.parametrize.register_parametrization(linear, "weight", nn.Identity())
        torch.testing.assert_close(net(X), expected)


@EVERY
def test_an_error_inside_leaves_the_network_as_it_was(kind: str) -> None:
    net = network(kind)
    plain = net(X)
    with frozen(net, 0, 1):
        expected = net(X)
        with pytest.raises(RuntimeError):
            net(torch.ones(2, 4))
        torch.testing.assert_close(net(X), expected)
    with pytest.raises(RuntimeError), frozen(net, 0, 1):
        net(torch.ones(2, 4))
    torch.testing.assert_close(net(X), plain)
    assert not net.training
    assert torch.backends.mha.get_fastpath_enabled()


@EVERY
def test_threads_with_networks_of_their_own(kind: str) -> None:
    nets = [network(kind) for _ in range(4)]
    expected, got = [], [[] for _ in nets]
    for k, net in enumerate(nets):
        with frozen(net, 0, k), torch.no_grad():
            expected.append(net(X))

    def work(k: int) -> None:
        for _ in range(5):
            with frozen(nets[k], 0, k), torch.no_grad():
                got[k].append(nets[k](X))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(nets))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k, results in enumerate(got):
        assert len(results) == 5
        for result in results:
            torch.testing.assert_close(result, expected[k])
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_network_that_copies_itself_among_samples() -> None:
    class Copying(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network("ours")

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = copy.deepcopy(self.inner)(x)
            return out

    net = Copying()
    samples = mc_samples(net, X, 4, vectorised=True)
    for k in range(4):
        with frozen(net, 0, k):
            torch.testing.assert_close(net.inner(X), samples[k])


# --- rates

WRONG = [
    (math.nan, ValueError, r"`p` must lie in .*, got nan"),
    (1.0, ValueError, r"`p` must lie in .*, got 1.0"),
    (-0.1, ValueError, r"`p` must lie in .*, got -0.1"),
    (math.inf, ValueError, r"`p` must lie in .*, got inf"),
    (10**400, ValueError, r"`p` must lie in .*, got inf"),
    ("0.5", TypeError, "p must be a number, got '0.5'"),
    (None, TypeError, "p must be a number, got None"),
    (True, TypeError, "p must be a number, got True"),
    (0.5j, TypeError, "p must be a number, got 0.5j"),
    ([0.5], TypeError, r"p must be a number, got \[0.5\]"),
    (torch.tensor([0.5, 0.5]), TypeError, r"p must be a number, got a tensor of shape \(2,\)"),
    (torch.tensor(0.5, requires_grad=True), TypeError, "p must be a number, got a tensor that requires a gradient"),
]
LAYERS: dict[str, Callable[..., nn.Module]] = {
    "Dropout": Dropout,
    "ConcreteDropout": ConcreteDropout,
    "DropBlock2d": DropBlock2d,
    "EdgeCutDropout": lambda p=0.5: EdgeCutDropout(2, 5.0, p),
    "TensorDropout": lambda p=0.5: TensorDropout(1, p, shared=True),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("p", "error", "message"), WRONG, ids=lambda value: str(value)[:20])
def test_a_wrong_rate_at_the_start_and_later(layer: str, p: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LAYERS[layer](p)
    made = LAYERS[layer](0.25)
    with pytest.raises(error, match=message):
        made.p = p
    assert made.p == pytest.approx(0.25)


@pytest.mark.parametrize("p", [np.float32(0.25), np.float64(0.25), torch.tensor(0.25)], ids=repr)
def test_other_numbers_become_floats(p: object) -> None:
    layer = Dropout()
    layer.p = p  # type: ignore[assignment]
    assert type(layer.p) is float
    assert layer.p == 0.25


@pytest.mark.parametrize(
    ("layer", "name", "value", "message"),
    [
        (DropBlock2d(), "block_size", 0, "`block_size` must be at least 1, got 0"),
        (DropBlock2d(), "block_size", 2.5, "block_size must be an integer, got 2.5"),
        (DropBlock2d(), "per_channel", "no", "per_channel must be True or False, got 'no'"),
        (TensorDropout(1, shared=True), "rank", -1, "`rank` must not be negative, got -1"),
        (ConcreteDropout(), "temperature", 0, "`temperature` must be positive, got 0"),
        (ConcreteDropout(), "length_scale", math.nan, "`length_scale` must be positive, got nan"),
        (EdgeCutDropout(2, 5.0), "first", 6.0, "0 ≤ first < cutoff"),
        (EdgeCutDropout(2, 5.0), "cutoff", math.nan, "0 ≤ first < cutoff"),
        (EdgeCutDropout(2, 5.0), "width", 0.0, "width > 0"),
        (EdgeCutDropout(2, 5.0), "kinds", 3, "`kinds` of EdgeCutDropout is fixed"),
        (IrrepsDropout("2x1o", shared=True), "irreps", "3x1o", "`irreps` of IrrepsDropout is fixed"),
        (SphericalDropout(1, 4), "channels", 5, "`channels` of SphericalDropout is fixed"),
        (MaskBankDropout(8), "dim", 0, "`dim` is the features' axis, got 0"),
        (MaskBankDropout(8), "p", 0.9, "`p` of MaskBankDropout is that of its bank"),
    ],
)
def test_other_settings_are_checked_later_too(layer: nn.Module, name: str, value: object, message: str) -> None:
    before = getattr(layer, name)
    with pytest.raises((ValueError, TypeError), match=message):
        setattr(layer, name, value)
    assert getattr(layer, name) == before


def test_a_bank_that_is_loaded_brings_its_rate() -> None:
    everything, some = MaskBankDropout(8, scale=1.0), MaskBankDropout(8, scale=3.0)
    assert everything.p == 0
    everything.load_state_dict(some.state_dict())
    assert everything.p == some.p > 0
    with frozen(everything, 0, 1), frozen(some, 0, 1):
        assert torch.equal(everything(torch.ones(2, 8)), some(torch.ones(2, 8)))


def test_schedules_say_what_they_want() -> None:
    with pytest.raises(TypeError, match=r"p must be a number, got '0.5'"):
        linear_rate(1, 10, "0.5")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`start` must lie in \[0, 1\), got nan"):
        LinearSchedule([Dropout()], 0.5, 10, math.nan)
    with pytest.raises(TypeError, match="layers must be dropout layers, got Linear"):
        LinearSchedule([nn.Linear(1, 1)], 0.5, 10)  # type: ignore[list-item]
    schedule = LinearSchedule([nn.Dropout()], 0.5, 10)
    with pytest.raises(ValueError, match="the state of a LinearSchedule"):
        schedule.load_state_dict({})


# --- masks and extreme settings


def test_a_mask_never_makes_the_output_larger() -> None:
    layer, x = Dropout(0.5), torch.ones(3, 4)
    for shape in ((2, 3, 4), (1, 3, 4), (4, 4), (5,)):
        with pytest.raises(ValueError, match=r"`mask` of shape .* does not fit an input of shape \(3, 4\)"):
            layer(x, torch.ones(shape))
    with pytest.raises(TypeError, match="mask must be a tensor, got 2"):
        layer(x, 2)
    with pytest.raises(TypeError, match="mask must be real"):
        layer(x, torch.ones(3, 4) * 1j)
    for mask in (torch.ones(4), torch.ones(1, 4), torch.tensor(2.0), torch.ones(3, 4, dtype=torch.float64)):
        assert layer(x, mask).shape == x.shape
        assert layer(x, mask).dtype == x.dtype


@pytest.mark.parametrize("p", [1e-300, 1e-12, 1 - 1e-7, 1 - 1e-8, 1 - 1e-12, 1 - 1e-16])
def test_learned_rates_near_0_and_1(p: float) -> None:
    layer, x = ConcreteDropout(p), torch.ones(1000, requires_grad=True)
    assert layer.p == pytest.approx(p, rel=1e-4)
    y = layer(x).sum() + layer.regulariser(torch.ones(2, 3), 10)
    y.backward()
    assert bool(y.isfinite())
    assert bool(layer.logit.grad.isfinite())
    with frozen(layer, 0, 1):
        assert bool(layer(x).isfinite().all())


def test_irreps_of_no_possible_size() -> None:
    for irreps in ("100000000000x0e", [(10**11, 1)], "1x99999999999e", "9" * 5000 + "x0e"):
        with pytest.raises(ValueError, match="components"):
            IrrepsDropout(irreps, shared=True)
    assert IrrepsDropout("100000x1o", shared=True).channels == 100_000
