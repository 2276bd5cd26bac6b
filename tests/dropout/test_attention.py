import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from forcedrop.dropout.attention import (
    AttentionDropout,
    ValueDropout,
    attention_dropout,
    dropout_attention,
    value_dropout,
)
from tests.dropout.laws import assert_mean, assert_not_mean, freeze

TIGHT = {"rtol": 0.0, "atol": 1e-12}
N, H, L, S, E = 2, 3, 5, 7, 4


def qkv(n_queries: int = L) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(N, H, n, E, dtype=torch.float64, generator=generator) for n in (n_queries, S, S))


def weights() -> Tensor:
    q, k, _ = qkv()
    return (q @ k.mT / math.sqrt(E)).softmax(-1)


def biases() -> dict[str, dict]:
    generator = torch.Generator().manual_seed(2)
    some = torch.rand(L, S, generator=generator) < 0.6
    some[0] = False  # a query without keys
    return {
        "none": {},
        "boolean": {"attn_mask": some},
        "added": {"attn_mask": torch.randn(N, 1, L, S, dtype=torch.float64, generator=generator)},
        "infinite": {"attn_mask": torch.zeros(L, S, dtype=torch.float64).masked_fill(~some, -math.inf)},
        "causal": {"is_causal": True},
        "scale": {"scale": 0.3},
    }


# --- the functional attention against PyTorch's


@pytest.mark.parametrize("settings", biases().values(), ids=biases())
def test_evaluation_is_pytorchs_attention(settings: dict) -> None:
    expected = scaled_dot_product_attention(*qkv(), **settings)
    assert torch.equal(dropout_attention(*qkv(), **settings), expected)
    assert torch.equal(dropout_attention(*qkv(), **settings, dropout=AttentionDropout(0.5).eval()), expected)
    assert torch.equal(dropout_attention(*qkv(), **settings, dropout=AttentionDropout(0.0)), expected)


@pytest.mark.parametrize("settings", biases().values(), ids=biases())
def test_a_mask_of_ones_drops_nothing(settings: dict) -> None:
    """The path that writes the weights out agrees with the fused one, rows without keys included."""
    ones = torch.ones(L, S, dtype=torch.float64)
    expected = scaled_dot_product_attention(*qkv(), **settings)
    for drop in (None, AttentionDropout(0.5), AttentionDropout(0.5, renormalise=True)):
        torch.testing.assert_close(dropout_attention(*qkv(), **settings, mask=ones, dropout=drop), expected, **TIGHT)


@pytest.mark.parametrize("settings", biases().values(), ids=biases())
def test_renormalised_dropout_is_attention_to_the_kept_keys(settings: dict) -> None:
    drop = AttentionDropout(0.6, renormalise=True)
    mask = drop.mask(weights(), torch.Generator().manual_seed(3))
    keep = mask > 0
    assert not keep.any(-1).all()  # a row lost all its keys
    both = dict(settings)
    if both.pop("is_causal", False):
        both["attn_mask"] = keep & torch.ones(L, S, dtype=torch.bool).tril()
    elif "attn_mask" in both and both["attn_mask"].dtype != torch.bool:
        both["attn_mask"] = both["attn_mask"].masked_fill(~keep, -math.inf)
    else:
        both["attn_mask"] = keep & both.get("attn_mask", torch.tensor(True))
    expected = scaled_dot_product_attention(*qkv(), **both)
    torch.testing.assert_close(dropout_attention(*qkv(), **settings, dropout=drop, mask=mask), expected, **TIGHT)
    torch.testing.assert_close(dropout_attention(*qkv(), **settings, dropout=drop.eval(), mask=mask), expected, **TIGHT)


def test_plain_dropout_against_the_formula() -> None:
    q, k, v = qkv()
    drop = AttentionDropout(0.5)
    mask = drop.mask(q @ k.mT)
    expected = torch.zeros(N, H, L, E, dtype=torch.float64)
    for n, h, i in torch.cartesian_prod(torch.arange(N), torch.arange(H), torch.arange(L)).tolist():
        w = torch.exp(k[n, h] @ q[n, h, i] / E**0.5)
        expected[n, h, i] = (w / w.sum() * mask[n, h, i]) @ v[n, h]
    torch.testing.assert_close(dropout_attention(q, k, v, dropout=drop, mask=mask), expected, **TIGHT)
    torch.testing.assert_close(dropout_attention(q, k, v, mask=mask), expected, **TIGHT)
    drawn = dropout_attention(q, k, v, dropout=drop, generator=torch.Generator().manual_seed(4))
    mask = drop.mask(weights(), torch.Generator().manual_seed(4))
    torch.testing.assert_close(dropout_attention(q, k, v, mask=mask), drawn, **TIGHT)


# --- laws of the masks


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_plain_dropout_keeps_the_mean_but_not_the_sum(p: float) -> None:
    w = weights()[0, 0]
    torch.manual_seed(0)
    y = AttentionDropout(p)(w.expand(20000, L, S))
    assert_mean(y, w)
    assert_mean((y - w) ** 2, p / (1 - p) * w**2)
    assert y.sum(-1).std() > 0.05


def test_renormalised_dropout_keeps_the_sum_but_not_the_mean() -> None:
    w = weights()[0, 0]
    torch.manual_seed(0)
    y = AttentionDropout(0.3, renormalise=True)(w.expand(20000, L, S))
    sums = y.sum(-1)
    lost = sums < 0.5
    torch.testing.assert_close(sums[~lost], torch.ones_like(sums[~lost]), **TIGHT)
    assert torch.equal(y[lost], torch.zeros_like(y[lost]))
    assert_mean(lost.double(), 0.3**S)
    assert_not_mean(y, w)


@pytest.mark.parametrize("renormalise", [True, False])
def test_gradients_are_finite_where_a_row_is_lost(renormalise: bool) -> None:
    q, k, v = (x.requires_grad_() for x in qkv())
    mask = torch.ones(L, S, dtype=torch.float64)
    mask[1] = 0
    allowed = torch.ones(L, S, dtype=torch.bool)
    allowed[0] = False
    drop = AttentionDropout(0.5, renormalise=renormalise)
    out = dropout_attention(q, k, v, allowed, dropout=drop, mask=mask)
    assert torch.equal(out[:, :, :2], torch.zeros_like(out[:, :, :2]))
    for gradient in torch.autograd.grad(out.square().sum(), (q, k, v)):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("renormalise", [True, False])
def test_gradcheck(renormalise: bool) -> None:
    q, k, v = (x[:1, :1].clone().requires_grad_() for x in qkv(3))
    drop = freeze(AttentionDropout(0.3, renormalise=renormalise), 0)
    assert torch.autograd.gradcheck(lambda q, k, v: dropout_attention(q, k, v, is_causal=True, dropout=drop), (q, k, v))
    assert torch.autograd.gradcheck(freeze(ValueDropout(0.3), 0), (v,))


# --- dropout of the values' features


def test_value_dropout_is_dropout_of_the_heads_outputs() -> None:
    q, k, v = qkv()
    drop = ValueDropout(0.5)
    mask = drop.mask(v)
    assert mask.shape == (N, H, 1, E)
    expected = scaled_dot_product_attention(q, k, v) * mask
    torch.testing.assert_close(scaled_dot_product_attention(q, k, drop(v, mask)), expected, **TIGHT)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_value_dropout_mean_and_variance(p: float) -> None:
    v = qkv()[2][0, 0]
    torch.manual_seed(0)
    y = ValueDropout(p)(v.expand(10000, S, E))
    assert_mean(y, v)
    assert_mean((y - v) ** 2, p / (1 - p) * v**2)
    kept = y != 0
    assert torch.equal(kept, kept[:, :1].expand_as(kept))


# --- frozen function samples


def frozen_keep(sample: int, *shape: int) -> Tensor:
    return freeze(AttentionDropout(0.5), sample).mask(torch.ones(shape)) > 0


def test_bits_belong_to_head_query_and_key() -> None:
    """A longer sequence, or more heads, keep the bits of what was there: decoding token by token sees one function."""
    large = frozen_keep(3, 2, 4, 9, 11)
    assert large.shape == (1, 4, 9, 11)
    assert torch.equal(frozen_keep(3, 5, 2, 6, 7), large[:, :2, :6, :7])
    assert torch.equal(frozen_keep(3, 5, 6, 7), large[0, :1, :6, :7])
    assert torch.equal(frozen_keep(3, 6, 7), large[0, 0, :6, :7])
    assert torch.equal(frozen_keep(3, 5, 2, 2, 6, 7)[0].flatten(0, 1), large[0, :4, :6, :7])


@pytest.mark.parametrize("renormalise", [True, False])
def test_decoding_step_by_step_with_a_frozen_mask(renormalise: bool) -> None:
    q, k, v = qkv(S)
    drop = freeze(AttentionDropout(0.4, renormalise=renormalise).eval(), 1)
    whole = dropout_attention(q, k, v, is_causal=True, dropout=drop)
    mask = drop.mask(q @ k.mT)
    for t in range(S):
        seen = slice(t + 1)
        step = dropout_attention(
            q[:, :, t : t + 1], k[:, :, seen], v[:, :, seen], dropout=drop, mask=mask[..., t : t + 1, seen]
        )
        torch.testing.assert_close(step[:, :, 0], whole[:, :, t], **TIGHT)
        prefix = dropout_attention(q[:, :, seen], k[:, :, seen], v[:, :, seen], is_causal=True, dropout=drop)
        torch.testing.assert_close(prefix, whole[:, :, seen], **TIGHT)


@pytest.mark.parametrize("shape", [(6000, 1, 1), (3, 60, 100), (1, 6000)])
def test_frozen_rate_and_independence(shape: tuple[int, ...]) -> None:
    keep = torch.stack([frozen_keep(k, 1, *shape).flatten() for k in range(4)]).double()
    assert_mean(keep.T, 0.5)
    shifted = torch.cat([keep, keep.roll(1, dims=1)])
    n = keep.shape[1]
    assert (torch.corrcoef(shifted) - torch.eye(8)).abs().max() < 5 / n**0.5


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "layer", [AttentionDropout(0.5), AttentionDropout(0.5, renormalise=True), ValueDropout(0.5)], ids=str
)
def test_frozen(layer: nn.Module, training: bool) -> None:
    layer = copy.deepcopy(layer).train(training)
    x = weights()[:1].expand(4, H, L, S)
    rows = []
    for k in range(3):
        y = freeze(layer, k)(x)
        assert torch.equal(y, y[:1].expand_as(y))
        assert torch.equal(layer(x[:2]), y[:2])
        assert torch.equal(pickle.loads(pickle.dumps(layer))(x), y)
        rows.append(y)
    assert len(torch.stack(rows).flatten(1).unique(dim=0)) == 3
    assert not torch.equal(freeze(layer, 0, prefix="other")(x), rows[0])
    together = torch.func.vmap(lambda sample: freeze(layer, sample)(x))(torch.arange(3))
    assert torch.equal(together, torch.stack(rows))


@pytest.mark.parametrize("renormalise", [True, False])
def test_vmap_of_attention_over_samples(renormalise: bool) -> None:
    drop, inputs = AttentionDropout(0.5, renormalise=renormalise).eval(), qkv()

    def function(sample: int | Tensor) -> Tensor:
        return dropout_attention(*inputs, is_causal=True, dropout=freeze(drop, sample))

    together = torch.func.vmap(function)(torch.arange(3))
    torch.testing.assert_close(together, torch.stack([function(k) for k in range(3)]), **TIGHT)


# --- in PyTorch's machinery


@pytest.mark.parametrize(
    "layer", [AttentionDropout(0.5), AttentionDropout(0.5, renormalise=True), ValueDropout(0.5)], ids=str
)
def test_evaluation_masks_and_generators(layer: nn.Module) -> None:
    layer = copy.deepcopy(layer)
    x = weights()
    mask = layer.mask(x, torch.Generator().manual_seed(1))
    drawn = layer(x, generator=torch.Generator().manual_seed(1))
    assert torch.equal(layer.eval()(x, mask), drawn)
    assert layer(x) is x
    x = x.expand(20, N, H, L, S)
    assert len(torch.func.vmap(layer.train(), randomness="different")(x).flatten(1).unique(dim=0)) == 20


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("renormalise", [True, False])
def test_dtypes(dtype: torch.dtype, renormalise: bool) -> None:
    q, k, v = (x.to(dtype) for x in qkv())
    for drop in (AttentionDropout(0.5, renormalise=renormalise), freeze(AttentionDropout(0.5), 0)):
        assert dropout_attention(q, k, ValueDropout(0.5)(v), dropout=drop).dtype == dtype


def test_autocast_and_training() -> None:
    linear, drop = nn.Linear(E, 3 * E), AttentionDropout(0.3, renormalise=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = dropout_attention(*linear(torch.randn(N, L, E)).chunk(3, -1), is_causal=True, dropout=drop)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert torch.isfinite(linear.weight.grad).all()


def test_compile() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.values = AttentionDropout(0.5), ValueDropout(0.5)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return dropout_attention(q, k, self.values(v), is_causal=True, dropout=self.drop)

    net = Net()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    torch.manual_seed(0)
    expected = net(*qkv())
    torch.manual_seed(0)
    assert torch.equal(compiled(*qkv()), expected)
    for sample in range(2):
        freeze(net, sample)
        assert torch.equal(compiled(*qkv()), net(*qkv()))


def test_functional_forms() -> None:
    x = weights()
    seeds = [torch.Generator().manual_seed(3) for _ in range(4)]
    expected = AttentionDropout(0.5, renormalise=True)(x, generator=seeds[0])
    assert torch.equal(attention_dropout(x, 0.5, renormalise=True, generator=seeds[1]), expected)
    assert torch.equal(value_dropout(x, 0.5, generator=seeds[2]), ValueDropout(0.5)(x, generator=seeds[3]))
    assert attention_dropout(x, 0.5, training=False) is x
    assert value_dropout(x, 0.5, training=False) is x


def test_repr() -> None:
    assert repr(AttentionDropout(0.2)) == "AttentionDropout(p=0.2, renormalise=False)"


# --- errors


def test_impossible_inputs() -> None:
    for layer in (AttentionDropout(0.5), ValueDropout(0.5)):
        with pytest.raises(ValueError, match=r"got \(3,\)"):
            layer(torch.ones(3))
        with pytest.raises(TypeError, match="floating-point"):
            layer(torch.ones(3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="exclude each other"):
        dropout_attention(*qkv(), torch.ones(L, S, dtype=torch.bool), is_causal=True)
    with pytest.raises(TypeError, match="dropout_attention needs a floating-point input"):
        dropout_attention(*(x.long() for x in qkv()))


@pytest.mark.parametrize("layer", [AttentionDropout, ValueDropout])
def test_rate_outside(layer: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\), got 1"):
        layer(1.0)
