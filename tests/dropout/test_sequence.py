import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from forcedrop.dropout.sequence import LockedDropout, Zoneout, locked_dropout, zoneout
from tests.dropout.laws import assert_mean, assert_not_mean, freeze

# --- locked dropout


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_mask_is_constant_in_time_and_of_each_sequence(batch_first: bool) -> None:
    drop = LockedDropout(0.5, batch_first)
    torch.manual_seed(0)
    x = torch.ones(4, 30, 50) if batch_first else torch.ones(30, 4, 50)
    y = drop(x) if batch_first else drop(x).transpose(0, 1)
    assert torch.equal(y, y[:, :1].expand_as(y))
    assert len(y[:, 0].unique(dim=0)) == 4
    assert y.unique().tolist() == [0.0, 2.0]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_locked_mean_variance_and_independence(p: float) -> None:
    h = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    y = LockedDropout(p, batch_first=True)(h.expand(20000, 3, 6))
    assert_mean(y, h)
    assert_mean((y - h) ** 2, p / (1 - p) * h**2)
    kept = (y[:, 0] != 0).double()
    assert (torch.corrcoef(kept.T) - torch.eye(6)).abs().max() < 5 / 20000**0.5


def test_batch_first_only_says_where_the_batch_is() -> None:
    x = torch.randn(5, 7, 3)
    seeds = [torch.Generator().manual_seed(2) for _ in range(2)]
    y = LockedDropout(0.5)(x, generator=seeds[0])
    assert torch.equal(LockedDropout(0.5, True)(x.transpose(0, 1), generator=seeds[1]), y.transpose(0, 1))


@pytest.mark.parametrize("batch_first", [True, False])
def test_one_sequence_without_a_batch(batch_first: bool) -> None:
    y = LockedDropout(0.5, batch_first)(torch.ones(9, 60))
    assert torch.equal(y, y[:1].expand(9, 60))
    assert y.unique().tolist() == [0.0, 2.0]


def test_a_mask_fits_sequences_of_any_length() -> None:
    drop = LockedDropout(0.5)
    mask = drop.mask(torch.randn(5, 3, 8))
    assert mask.shape == (1, 3, 8)
    for length in (1, 12):
        x = torch.randn(length, 3, 8)
        assert torch.equal(drop.eval()(x, mask), x * mask)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_frozen_locked_dropout(batch_first: bool, training: bool) -> None:
    drop = LockedDropout(0.5, batch_first).train(training)
    x = torch.ones(4, 5, 30)
    rows = []
    for k in range(3):
        y = freeze(drop, k)(x)
        assert torch.equal(y, y[:1, :1].expand_as(y))  # over the batch and over time
        assert torch.equal(drop(x[:2]), y[:2])
        assert torch.equal(drop(torch.ones(7, 30))[0], y[0, 0])
        assert torch.equal(pickle.loads(pickle.dumps(drop))(x), y)
        rows.append(y)
    assert len(torch.stack(rows)[:, 0, 0].unique(dim=0)) == 3
    assert not torch.equal(freeze(drop, 0, prefix="other")(x), rows[0])
    together = torch.func.vmap(lambda sample: freeze(drop, sample)(x))(torch.arange(3))
    assert torch.equal(together, torch.stack(rows))


def test_locked_evaluation_is_the_identity() -> None:
    x = torch.randn(3, 2, 4)
    assert LockedDropout(0.5).eval()(x) is x
    assert LockedDropout(0.0)(x) is x


# --- zoneout


@pytest.fixture
def states() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(6, dtype=torch.float64, generator=generator) for _ in range(2))


@pytest.mark.parametrize("p", [0.1, 0.4])
def test_zoneout_takes_one_state_or_the_other(p: float, states: tuple[Tensor, Tensor]) -> None:
    new, old = (state.expand(20000, 6) for state in states)
    torch.manual_seed(0)
    y = Zoneout(p)(new, old)
    assert ((y == new) | (y == old)).all()
    assert_mean((y == old).double(), p)
    expectation = Zoneout(p).eval()(new, old)[0]
    assert torch.allclose(expectation, p * old[0] + (1 - p) * new[0], rtol=1e-15)
    assert_mean(y, expectation)
    assert_not_mean(y, (1 - p) * old[0] + p * new[0])


def test_zoneout_masks(states: tuple[Tensor, Tensor]) -> None:
    new, old = states
    layer = Zoneout(0.5).eval()
    assert torch.equal(layer(new, old, torch.ones(6)), new)
    assert torch.equal(layer(new, old, torch.zeros(6)), old)
    mask = layer.mask(new, torch.Generator().manual_seed(0))
    assert torch.equal(layer(new, old, mask), torch.where(mask > 0, new, old))
    drawn = layer.train()(new, old, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn, layer(new, old, mask))


@pytest.mark.parametrize("training", [True, False])
def test_zoneout_of_rate_zero_returns_the_new_state(training: bool, states: tuple[Tensor, Tensor]) -> None:
    assert Zoneout(0.0).train(training)(*states) is states[0]


def test_a_frozen_zoneout_has_a_mask_for_every_step() -> None:
    layer = freeze(Zoneout(0.5).eval(), 3)
    new, old = torch.ones(4, 2000), torch.zeros(4, 2000)
    steps = torch.stack([layer(new, old, step=t) for t in range(3)])
    assert torch.equal(steps, steps[:, :1].expand_as(steps))
    assert (torch.corrcoef(steps[:, 0]) - torch.eye(3)).abs().max() < 5 / 2000**0.5
    assert torch.equal(layer(new[:1], old[:1], step=2), steps[2, :1])
    together = torch.func.vmap(lambda sample: freeze(layer, sample)(new, old, step=1))(torch.arange(4))
    assert torch.equal(together[3], steps[1])


def test_zoneout_keeps_the_state_of_a_cell() -> None:
    """In a loop over time a unit's value is always one that the cell, fed with the same states, proposed before."""
    cell, layer = nn.LSTMCell(3, 8), Zoneout(0.4)
    h = c = torch.zeros(2, 8)
    for t, x in enumerate(torch.randn(5, 2, 3)):
        h_new, c_new = cell(x, (h, c))
        h_next, c_next = layer(h_new, h, step=t), layer(c_new, c, step=t)
        assert ((h_next == h_new) | (h_next == h)).all()
        assert ((c_next == c_new) | (c_next == c)).all()
        h, c = h_next, c_next
    h.sum().backward()
    assert torch.isfinite(cell.weight_hh.grad).all()


@pytest.mark.parametrize(("new", "old"), [((2, 3), (3,)), ((2, 3), (2, 4))])
def test_zoneout_of_states_that_differ(new: tuple[int, ...], old: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="two states of one shape, got"):
        Zoneout(0.5)(torch.ones(new), torch.ones(old))


# --- both


def test_gradcheck() -> None:
    x, y = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = torch.rand(1, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(LockedDropout(0.5), (x, mask))
    assert torch.autograd.gradcheck(Zoneout(0.5), (x, y, mask))
    assert torch.autograd.gradcheck(Zoneout(0.5).eval(), (x, y))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    x = torch.ones(5, 4, 6, dtype=dtype)
    for training in (True, False):
        assert LockedDropout(0.5).train(training)(x).dtype == dtype
        assert Zoneout(0.5).train(training)(x, 0 * x).dtype == dtype


def test_autocast() -> None:
    linear = nn.Linear(6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = LockedDropout(0.5)(linear(torch.randn(5, 3, 6)))
        assert y.dtype == torch.bfloat16
        assert Zoneout(0.5)(y, torch.zeros_like(y)).dtype == torch.bfloat16
    y.sum().backward()
    assert torch.isfinite(linear.weight.grad).all()


def test_vmap_randomness() -> None:
    x = torch.ones(30, 5, 4, 6)
    for function in (LockedDropout(0.5), lambda new: Zoneout(0.5)(new, 0 * new)):
        assert len(torch.func.vmap(function, randomness="different")(x).flatten(1).unique(dim=0)) == 30
        assert len(torch.func.vmap(function, randomness="same")(x).flatten(1).unique(dim=0)) == 1


def test_compile() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.locked, self.zoneout = LockedDropout(0.5), Zoneout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.zeros_like(x[0])
            for t, new in enumerate(self.locked(x)):
                h = self.zoneout(new, h, step=t)
            return h

    net, x = Net(), torch.randn(3, 2, 5)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    torch.manual_seed(0)
    expected = net(x)
    torch.manual_seed(0)
    assert torch.equal(compiled(x), expected)
    for sample in range(2):
        freeze(net, sample)
        assert torch.equal(compiled(x), net(x))


def test_functional_forms(states: tuple[Tensor, Tensor]) -> None:
    x = torch.ones(4, 5, 6)
    seeds = [torch.Generator().manual_seed(3) for _ in range(4)]
    expected = LockedDropout(0.5, True)(x, generator=seeds[0])
    assert torch.equal(locked_dropout(x, 0.5, batch_first=True, generator=seeds[1]), expected)
    assert locked_dropout(x, 0.5, training=False) is x
    assert torch.equal(zoneout(*states, 0.5, generator=seeds[2]), Zoneout(0.5)(*states, generator=seeds[3]))
    assert torch.equal(zoneout(*states, 0.3, training=False), Zoneout(0.3).eval()(*states))


def test_repr_and_copies() -> None:
    assert repr(LockedDropout(0.2, batch_first=True)) == "LockedDropout(p=0.2, batch_first=True)"
    assert repr(copy.deepcopy(Zoneout(0.2))) == "Zoneout(p=0.2)"


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4, 5)])
def test_wrong_ranks(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="LockedDropout needs an input of 2 or 3 axes, got shape"):
        LockedDropout(0.5)(torch.ones(shape))


def test_integers_and_rates() -> None:
    integers = torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(TypeError, match="LockedDropout needs a floating-point input"):
        LockedDropout(0.5)(integers)
    with pytest.raises(TypeError, match="Zoneout needs a floating-point input"):
        Zoneout(0.5)(torch.ones(2, 3), integers)
    for layer in (LockedDropout, Zoneout):
        with pytest.raises(ValueError, match=r"\[0, 1\), got 1"):
            layer(1.0)
