import copy
import pickle

import numpy as np
import pytest
import torch
from scipy.special import expit
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from forcedrop.dropout.cells import RecurrentMasks, Weights, gru_cell, lstm_cell
from forcedrop.dropout.recurrent import DropoutGRU, DropoutLSTM
from tests.dropout.laws import assert_mean, freeze

PAIRS = [(DropoutLSTM, nn.LSTM), (DropoutGRU, nn.GRU)]
OURS = [DropoutLSTM, DropoutGRU]
PLACES = ["input", "state", "update", "weight"]
TIGHT = {"rtol": 0.0, "atol": 1e-12}


def flat(output: tuple) -> list[Tensor]:
    """(h at every step, last states) as a flat list."""
    out, last = output
    return [out, *(last if isinstance(last, tuple) else (last,))]


def same(ours: tuple, theirs: tuple) -> None:
    for a, b in zip(flat(ours), flat(theirs), strict=True):
        torch.testing.assert_close(a, b, **TIGHT)


def double(rnn: type[nn.RNNBase], *args: int, **settings: bool) -> nn.RNNBase:
    torch.manual_seed(0)
    return rnn(*args, dtype=torch.float64, **settings)


def data(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def all_rates(p: float) -> dict[str, float]:
    return {f"p_{place}": p for place in PLACES}


# --- nothing dropped: torch's layers


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("settings", [{"batch_first": True}, {"bias": False}])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_equals_torch(
    ours: type[nn.Module], theirs: type[nn.RNNBase], settings: dict[str, bool], num_layers: int, bidirectional: bool
) -> None:
    reference = double(theirs, 3, 5, num_layers=num_layers, bidirectional=bidirectional, **settings)
    layer = ours.from_torch(reference)
    x = data(4, 6, 3)
    batch = 4 if reference.batch_first else 6
    h = data(num_layers * (1 + bidirectional), batch, 5)
    hx = (h, -h) if theirs is nn.LSTM else h
    same(layer(x), reference(x))
    same(layer(x, hx), reference(x, hx))
    dropping = ours.from_torch(reference.eval(), **all_rates(0.5))  # evaluation, and the mode is taken over
    same(dropping(x, hx), reference(x, hx))
    h = data(num_layers * (1 + bidirectional), 5)
    hx = (h, -h) if theirs is nn.LSTM else h
    same(layer(x[0], hx), reference(x[0], hx))
    same(layer(x[0]), reference(x[0]))


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_gradients_equal_torchs(ours: type[nn.Module], theirs: type[nn.RNNBase]) -> None:
    reference = double(theirs, 3, 5, num_layers=2, bidirectional=True)
    layer = ours.from_torch(reference)
    for rnn in (layer, reference):
        sum((part**2).sum() for part in flat(rnn(data(7, 4, 3)))).backward()
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(layer.get_parameter(name).grad, parameter.grad, **TIGHT)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_state_dicts_are_exchanged(ours: type[nn.Module], theirs: type[nn.RNNBase]) -> None:
    layer = ours(3, 5, num_layers=2, bidirectional=True, dtype=torch.float64, p_state=0.5).eval()
    reference = double(theirs, 3, 5, num_layers=2, bidirectional=True)
    reference.load_state_dict(layer.state_dict())
    same(layer(data(4, 2, 3)), reference(data(4, 2, 3)))
    assert max(float(parameter.detach().abs().max()) for parameter in layer.parameters()) <= 5**-0.5


def test_cells_equal_torchs() -> None:
    x, h, c = data(4, 3), data(4, 5), -data(4, 5)
    lstm, gru = double(nn.LSTMCell, 3, 5), double(nn.GRUCell, 3, 5)
    for a, b in zip(lstm_cell(x, (h, c), Weights(*lstm.parameters())), lstm(x, (h, c)), strict=True):
        torch.testing.assert_close(a, b, **TIGHT)
    torch.testing.assert_close(gru_cell(x, h, Weights(*gru.parameters())), gru(x, h), **TIGHT)


# --- each knob against torch's layer with changed inputs or weights, or against a loop in NumPy


def drawn(
    ours: type[nn.Module], theirs: type[nn.RNNBase], place: str
) -> tuple[nn.Module, nn.RNNBase, Tensor, RecurrentMasks]:
    """A layer with one rate of 0.5, torch's, one sequence as a batch, and the masks, all of one place."""
    reference = double(theirs, 3, 6)
    layer = ours.from_torch(reference, **{f"p_{place}": 0.5})
    x = data(7, 1, 3)
    (masks,) = layer.mask(x, torch.Generator().manual_seed(2))
    others = masks._replace(**{place: None})
    assert others == RecurrentMasks()  # the knobs are separate
    mask = getattr(masks, place)
    assert mask.unique().tolist() == [0.0, 2.0]
    return layer, reference, x, masks


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_input_dropout_is_locked(ours: type[nn.Module], theirs: type[nn.RNNBase]) -> None:
    layer, reference, x, masks = drawn(ours, theirs, "input")
    same(layer(x, mask=[masks]), reference(x * masks.input))


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_state_dropout_is_locked(ours: type[nn.Module], theirs: type[nn.RNNBase]) -> None:
    """(h · m) Wᵀ = h (W · m)ᵀ: one mask for all steps and gates is a mask on the columns of the recurrent weights."""
    layer, reference, x, masks = drawn(ours, theirs, "state")
    with torch.no_grad():
        reference.weight_hh_l0 *= masks.state
    same(layer(x, mask=[masks]), reference(x))


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_weight_dropout_is_locked(ours: type[nn.Module], theirs: type[nn.RNNBase]) -> None:
    layer, reference, x, masks = drawn(ours, theirs, "weight")
    with torch.no_grad():
        reference.weight_hh_l0 *= masks.weight
    same(layer(x, mask=[masks]), reference(x))
    flat(layer(x, mask=[masks]))[0].sum().backward()
    assert torch.equal(layer.weight_hh_l0.grad == 0, masks.weight == 0)  # an entry that is dropped learns nothing


def numpy_lstm(x: np.ndarray, w: list[np.ndarray], update: np.ndarray) -> np.ndarray:
    h = c = np.zeros(update.shape)
    for x_t in x:
        i, f, g, o = np.split(x_t @ w[0].T + h @ w[1].T + w[2] + w[3], 4, axis=-1)
        c = expit(f) * c + expit(i) * (np.tanh(g) * update)
        h = expit(o) * np.tanh(c)
    return h


def numpy_gru(x: np.ndarray, w: list[np.ndarray], update: np.ndarray) -> np.ndarray:
    h = np.zeros(update.shape)
    for x_t in x:
        (r, z, n), (r_h, z_h, n_h) = np.split(x_t @ w[0].T + w[2], 3, axis=-1), np.split(h @ w[1].T + w[3], 3, axis=-1)
        z = expit(z + z_h)
        h = z * h + (1 - z) * (np.tanh(n + expit(r + r_h) * n_h) * update)
    return h


@pytest.mark.parametrize(("ours", "theirs", "loop"), [(*PAIRS[0], numpy_lstm), (*PAIRS[1], numpy_gru)])
def test_update_dropout_is_locked(ours: type[nn.Module], theirs: type[nn.RNNBase], loop: object) -> None:
    layer, reference, x, masks = drawn(ours, theirs, "update")
    weights = [parameter.detach().numpy() for parameter in reference.parameters()]
    last = flat(layer(x, mask=[masks]))[1][0]
    np.testing.assert_allclose(last.detach().numpy(), loop(x.numpy(), weights, masks.update.numpy()), atol=1e-12)


def test_dropping_the_update_never_erases_the_memory() -> None:
    """With all new information dropped, and forget gates open, c is carried on for ever; dropping the state loses c's effect
    on nothing either, but h no longer enters."""
    lstm = DropoutLSTM(3, 4, dtype=torch.float64)
    with torch.no_grad():
        lstm.bias_ih_l0[4:8] = 100.0
    h, c = data(1, 2, 4), data(1, 2, 4)
    _, (_, c_last) = lstm(data(9, 2, 3), (h, c), mask=[RecurrentMasks(update=torch.zeros(2, 4, dtype=torch.float64))])
    torch.testing.assert_close(c_last, c, **TIGHT)
    deaf = [RecurrentMasks(state=torch.zeros(2, 4, dtype=torch.float64))]
    same(lstm(data(9, 2, 3), (h, c), mask=deaf), lstm(data(9, 2, 3), (-h, c), mask=deaf))


# --- laws of the masks


@pytest.mark.parametrize("ours", OURS)
def test_rates_and_shapes_of_the_masks(ours: type[nn.Module]) -> None:
    rates = dict(zip(PLACES, (0.1, 0.2, 0.3, 0.4), strict=True))
    layer = ours(5, 6, num_layers=2, bidirectional=True, **{f"p_{place}": p for place, p in rates.items()})
    masks = layer.mask(torch.ones(3, 4000, 5), torch.Generator().manual_seed(0))
    gates = 4 if ours is DropoutLSTM else 3
    assert [mask.input.shape for mask in masks] == [(4000, 5), (4000, 5), (4000, 12), (4000, 12)]
    for mask in masks:
        assert mask.state.shape == mask.update.shape == (4000, 6)
        assert mask.weight.shape == (gates * 6, 6)
        for place in PLACES[:3]:
            assert_mean((getattr(mask, place) > 0).double(), 1 - rates[place])
            assert_mean(getattr(mask, place), 1.0)
    weights = torch.cat([mask.weight.flatten() for mask in masks])
    assert_mean((weights > 0).double(), 0.6)
    kept = torch.stack([masks[0].state[:, 0], masks[0].update[:, 0], masks[1].state[:, 0], masks[2].state[:, 0]])
    assert (torch.corrcoef(kept) - torch.eye(4)).abs().max() < 5 / 4000**0.5


@pytest.mark.parametrize("ours", OURS)
def test_a_mask_is_kept_over_batches_and_a_fresh_one_is_not(ours: type[nn.Module]) -> None:
    layer = ours(3, 8, num_layers=2, batch_first=True, dtype=torch.float64, **all_rates(0.3))
    x = data(2, 6, 3)
    mask = layer.mask(x)
    same(layer(x, mask=mask), layer.eval()(x, mask=mask))
    layer.train()
    assert not torch.equal(layer(x)[0], layer(x)[0])
    seeds = [torch.Generator().manual_seed(5) for _ in range(2)]
    same(layer(x, generator=seeds[0]), layer(x, mask=layer.mask(x, seeds[1])))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("ours", OURS)
def test_frozen(ours: type[nn.Module], training: bool) -> None:
    layer = ours(3, 8, num_layers=2, dtype=torch.float64, **all_rates(0.3)).train(training)
    x = data(6, 1, 3).expand(6, 4, 3)
    outputs = []
    for k in range(3):
        freeze(layer, k)
        y = layer(x)[0]
        torch.testing.assert_close(y, y[:, :1].expand_as(y), **TIGHT)  # one function, whatever the entry of the batch
        torch.testing.assert_close(layer(x[:4, :2])[0], y[:4, :2], **TIGHT)  # or how long the sequence
        same(pickle.loads(pickle.dumps(layer))(x), layer(x))
        outputs.append(y)
    assert (
        min(float((a - b).detach().abs().max()) for a, b in zip(outputs, outputs[1:] + outputs[:1], strict=True)) > 1e-3
    )
    together = torch.func.vmap(lambda sample: freeze(layer, sample)(x)[0])(torch.arange(3))
    torch.testing.assert_close(together, torch.stack(outputs), **TIGHT)


@pytest.mark.parametrize("ours", OURS)
def test_frozen_weights_are_dropped_entry_by_entry(ours: type[nn.Module]) -> None:
    layer = freeze(ours(3, 40, p_weight=0.3), 0)
    (masks,) = layer.mask(torch.ones(5, 2, 3))
    assert masks.weight.shape == layer.weight_hh_l0.shape
    kept = (masks.weight > 0).double()
    assert_mean(kept.flatten(), 0.7)
    assert_mean(kept, 0.7)
    assert (torch.corrcoef(kept) - torch.eye(len(kept))).abs().max() < 6 / 40**0.5  # no row repeats another


@pytest.mark.parametrize("ours", OURS)
def test_gradcheck(ours: type[nn.Module]) -> None:
    layer = ours(2, 3, dtype=torch.float64, **all_rates(0.3))
    x = data(3, 2, 2).requires_grad_()
    mask = layer.mask(x, torch.Generator().manual_seed(3))
    parameters = dict(layer.named_parameters())

    def output(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (x, None, mask))[0]

    assert torch.autograd.gradcheck(output, (x, *parameters.values()))


# --- in PyTorch's machinery


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("ours", OURS)
def test_dtypes(ours: type[nn.Module], dtype: torch.dtype) -> None:
    layer = ours(3, 4, dtype=dtype, **all_rates(0.3))
    assert {part.dtype for part in flat(layer(torch.ones(5, 2, 3, dtype=dtype)))} == {dtype}


@pytest.mark.parametrize("ours", OURS)
def test_autocast(ours: type[nn.Module]) -> None:
    layer = ours(3, 4, **all_rates(0.3))
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(torch.randn(5, 2, 3))[0]
    out.sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in layer.parameters())


def test_compile() -> None:
    layer = DropoutLSTM(3, 4, **all_rates(0.3))
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.randn(3, 2, 3)
    torch.manual_seed(0)
    expected = layer(x)
    torch.manual_seed(0)
    same(compiled(x), expected)
    for sample in range(2):
        freeze(layer, sample)
        same(compiled(x), layer(x))


@pytest.mark.parametrize("ours", OURS)
def test_vmap_randomness(ours: type[nn.Module]) -> None:
    layer, x = ours(3, 8, **all_rates(0.3)), torch.ones(20, 4, 2, 3)
    y = torch.func.vmap(lambda x: layer(x)[0], randomness="different")(x)
    assert len(y.flatten(1).unique(dim=0)) == 20


def test_repr_and_copies() -> None:
    layer = copy.deepcopy(DropoutGRU(3, 4, p_state=0.25))
    assert "3, 4, num_layers=1, bias=True, batch_first=False, bidirectional=False" in repr(layer)
    assert "(state): Dropout(p=0.25)" in repr(layer)


# --- errors


def test_impossible_weights() -> None:
    with pytest.raises(TypeError, match="DropoutLSTM takes weights of LSTM, got GRU"):
        DropoutLSTM.from_torch(nn.GRU(3, 4))
    with pytest.raises(ValueError, match=r"got proj_size=2 and dropout=0\.0"):
        DropoutLSTM.from_torch(nn.LSTM(3, 4, proj_size=2))
    with pytest.raises(ValueError, match=r"got proj_size=0 and dropout=0\.3"):
        DropoutGRU.from_torch(nn.GRU(3, 4, num_layers=2, dropout=0.3))


@pytest.mark.parametrize("ours", OURS)
def test_impossible_settings(ours: type[nn.Module]) -> None:
    for place in PLACES:
        with pytest.raises(ValueError, match=r"\[0, 1\), got 1\.0"):
            ours(3, 4, **{f"p_{place}": 1.0})
    with pytest.raises(ValueError, match="at least 1, got 3, 0 and 1"):
        ours(3, 0)


@pytest.mark.parametrize("ours", OURS)
def test_impossible_inputs(ours: type[nn.Module]) -> None:
    layer = ours(3, 4)
    with pytest.raises(TypeError, match="padded tensor, got a PackedSequence"):
        layer(pack_sequence([torch.ones(2, 3)]))
    with pytest.raises(TypeError, match="floating-point"):
        layer(torch.ones(5, 2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="2 or 3 axes"):
        layer(torch.ones(3))
    with pytest.raises(ValueError, match=r"3 features, got shape \(5, 2, 4\)"):
        layer(torch.ones(5, 2, 4))
    wrong = torch.zeros(1, 3, 4)
    with pytest.raises(ValueError, match=r"initial state\(s\) of shape \(1, 2, 4\), got .*\(1, 3, 4\)"):
        layer(torch.ones(5, 2, 3), (wrong, wrong) if ours is DropoutLSTM else wrong)
    with pytest.raises(ValueError, match="one entry per layer and direction, 1, got 2"):
        layer(torch.ones(5, 2, 3), mask=[RecurrentMasks()] * 2)
    with pytest.raises(ValueError, match="at least one time step"):
        layer(torch.ones(0, 2, 3))
