import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, optimize
from torch import Tensor, nn

from forcedrop.dropout.elementwise import Dropout
from forcedrop.dropout.schedule import LinearSchedule, linear_rate
from forcedrop.dropout.structured import (
    ChannelDropout,
    DropBlock,
    DropBlock1d,
    DropBlock2d,
    DropBlock3d,
    DropPath,
    channel_dropout,
    drop_block,
    drop_path,
    seed_rate,
)
from tests.dropout.laws import assert_mean, assert_not_mean, freeze

BLOCKS = {1: DropBlock1d, 2: DropBlock2d, 3: DropBlock3d}


def layers(p: float = 0.5) -> list[nn.Module]:
    return [ChannelDropout(p), DropBlock2d(p, 3), DropBlock2d(p, 2, per_channel=False), DropPath(p)]


def names(layer: object) -> str:
    return str(layer)


# --- channels


@pytest.mark.parametrize("size", [(7,), (4, 5), (2, 3, 4)])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_channels_live_or_die_as_a_whole(size: tuple[int, ...], p: float) -> None:
    torch.manual_seed(0)
    y = ChannelDropout(p)(torch.ones(4000, 5, *size, dtype=torch.float64)).flatten(2)
    assert torch.equal(y, y[:, :, :1].expand_as(y))
    assert set(y.unique().tolist()) == {0.0, 1 / (1 - p)}
    kept = (y[:, :, 0] > 0).double()
    assert_mean(kept, 1 - p)
    assert (torch.corrcoef(kept.T) - torch.eye(5)).abs().max() < 5 / 4000**0.5


@pytest.mark.parametrize("theirs", [nn.Dropout1d, nn.Dropout2d, nn.Dropout3d])
def test_channel_dropout_has_the_law_of_torchs(theirs: type[nn.Module]) -> None:
    spatial = int(theirs.__name__[-2])
    x = torch.ones(2000, 8, *[2] * spatial)
    torch.manual_seed(0)
    ours, reference = ChannelDropout(0.3)(x), theirs(0.3)(x)
    assert ours.unique().tolist() == reference.unique().tolist()
    difference = (ours > 0).double().flatten(1).mean(1) - (reference > 0).double().flatten(1).mean(1)
    assert_mean(difference, 0.0)


def test_channel_mask_fits_images_of_other_sizes() -> None:
    drop = ChannelDropout(0.5)
    mask = drop.mask(torch.randn(1, 20, 8, 8))
    assert mask.shape == (1, 20, 1, 1)
    x = torch.randn(3, 20, 5, 7)
    assert torch.equal(drop.eval()(x, mask), x * mask)


# --- DropBlock: the rate of seeds


def covering_seeds(block_size: int, sizes: tuple[int, ...]) -> np.ndarray:
    """How many seeds drop each place, counted block by block."""
    count = np.zeros(sizes, dtype=int)
    for corner in itertools.product(*(range(n - block_size + 1) for n in sizes)):
        count[tuple(slice(c, c + block_size) for c in corner)] += 1
    return count


SHAPES = [(3, (20,)), (1, (4, 6)), (3, (8, 8)), (2, (5, 9)), (5, (5, 12)), (7, (7, 7)), (2, (4, 5, 6)), (3, (6, 4, 5))]


@pytest.mark.parametrize("p", [0.0, 0.05, 0.3, 0.9])
@pytest.mark.parametrize(("block_size", "sizes"), SHAPES)
def test_seed_rates_against_brute_force(block_size: int, sizes: tuple[int, ...], p: float) -> None:
    count = covering_seeds(block_size, sizes)
    expected = optimize.brentq(lambda gamma: ((1 - gamma) ** count).mean() - (1 - p), 0, 1, xtol=1e-15, rtol=1e-14)
    assert seed_rate(p, block_size, sizes) == pytest.approx(expected, rel=1e-10, abs=1e-14)
    # equation 1 is the first order: it drops γ · (mean number of covering seeds) = p if blocks do not overlap
    assert seed_rate(p, block_size, sizes, exact=False) * count.mean() == pytest.approx(p, abs=1e-14)


def test_seed_rate_of_the_paper() -> None:
    """Equation 1 as in the paper, for a feature map of 28 × 28 and its block of 7."""
    assert seed_rate(0.1, 7, (28, 28), exact=False) == pytest.approx(0.1 / 7**2 * 28**2 / (28 - 7 + 1) ** 2, rel=1e-14)


def test_how_much_less_the_paper_drops() -> None:
    gamma = seed_rate(0.3, 3, (8, 8), exact=False)
    assert 1 - ((1 - gamma) ** covering_seeds(3, (8, 8))).mean() == pytest.approx(0.256, abs=5e-4)


# --- DropBlock: masks


def dropped_places(drop: DropBlock, sizes: tuple[int, ...], n: int, channels: int = 2) -> Tensor:
    torch.manual_seed(0)
    return drop(torch.ones(n, channels, *sizes, dtype=torch.float64)) == 0


@pytest.mark.parametrize("p", [0.1, 0.4])
@pytest.mark.parametrize(("block_size", "sizes"), SHAPES)
def test_kept_fraction(block_size: int, sizes: tuple[int, ...], p: float) -> None:
    """1−p over samples within 5 standard errors; the paper's γ has what brute force says of it, which is more."""
    layer, n = BLOCKS[len(sizes)], 6000
    kept = (~dropped_places(layer(p, block_size), sizes, n, 1)).double().flatten(1).mean(1)
    assert_mean(kept, 1 - p)
    assert_not_mean(kept, 1 - 1.3 * p)
    kept = (~dropped_places(layer(p, block_size, exact=False), sizes, n, 1)).double().flatten(1).mean(1)
    gamma = seed_rate(p, block_size, sizes, exact=False)
    assert_mean(kept, float(((1 - gamma) ** covering_seeds(block_size, sizes)).mean()))


@pytest.mark.parametrize(("block_size", "sizes"), SHAPES)
def test_kept_fraction_of_each_place(block_size: int, sizes: tuple[int, ...]) -> None:
    """Seeds are uniform over the valid region: a place covered by s seeds is kept with (1−γ)ˢ."""
    kept = ~dropped_places(BLOCKS[len(sizes)](0.3, block_size), sizes, 6000, 1)[:, 0]
    assert_mean(kept, torch.from_numpy((1 - seed_rate(0.3, block_size, sizes)) ** covering_seeds(block_size, sizes)))


def is_union_of_whole_blocks(dropped: np.ndarray, block_size: int) -> bool:
    block = np.ones([block_size] * dropped.ndim)
    return np.array_equal(ndimage.binary_opening(dropped, block), dropped)


@pytest.mark.parametrize("block_size", [2, 3, 4])
@pytest.mark.parametrize("sizes", [(9,), (6, 8), (4, 5, 6)])
def test_the_border_cuts_no_block(sizes: tuple[int, ...], block_size: int) -> None:
    for image in dropped_places(BLOCKS[len(sizes)](0.2, block_size), sizes, 60).flatten(0, 1).numpy():
        assert is_union_of_whole_blocks(image, block_size)
    scattered = dropped_places(BLOCKS[len(sizes)](0.2, 1), sizes, 60).flatten(0, 1).numpy()
    assert not all(is_union_of_whole_blocks(image, block_size) for image in scattered)  # the check can fail


@pytest.mark.parametrize("layer", [DropBlock2d(0.3, 3), DropBlock2d(0.3, 3, per_channel=False)], ids=names)
def test_each_sample_is_divided_by_its_kept_fraction(layer: DropBlock) -> None:
    mask = layer.mask(torch.ones(50, 4, 8, 8, dtype=torch.float64), torch.Generator().manual_seed(0))
    assert mask.shape == (50, 4 if layer.per_channel else 1, 8, 8)
    assert torch.allclose(mask.mean((1, 2, 3)), torch.ones(50, dtype=torch.float64), atol=1e-14)
    for sample in mask:
        assert float(sample.max()) == pytest.approx(sample.numel() / float((sample > 0).sum()), rel=1e-14)
        assert set(sample.unique().tolist()) <= {0.0, float(sample.max())}
    assert len(mask.amax((1, 2, 3)).unique()) > 10


def test_channels_have_blocks_of_their_own_unless_shared() -> None:
    x = torch.ones(20, 3, 9, 9)
    torch.manual_seed(0)
    own, shared = DropBlock2d(0.3, 3)(x), DropBlock2d(0.3, 3, per_channel=False)(x)
    assert torch.equal(shared, shared[:, :1].expand_as(shared))
    assert not torch.equal(own[:, 0] > 0, own[:, 1] > 0)


@pytest.mark.parametrize("sizes", [(9,), (6, 8), (4, 5, 6)])
def test_block_size_one_is_elementwise_dropout(sizes: tuple[int, ...]) -> None:
    """The same units from the same generator and the same frozen function; the scale is the realised fraction's."""
    x = torch.ones(4, 3, *sizes)
    block, single = BLOCKS[len(sizes)](0.3, 1), Dropout(0.3)
    masks = [layer.mask(x, torch.Generator().manual_seed(0)) for layer in (block, single)]
    assert torch.equal(masks[0] > 0, masks[1] > 0)
    assert torch.equal(freeze(block, 5).mask(x) > 0, freeze(single, 5).mask(x) > 0)


def test_a_block_as_large_as_the_image() -> None:
    """All or nothing: the mask is 1 or 0, never 0/0."""
    torch.manual_seed(0)
    y = DropBlock2d(0.3, 5)(torch.ones(4000, 1, 5, 5))
    assert y.flatten(1).unique(dim=0).tolist() == [[0.0] * 25, [1.0] * 25]
    assert_mean(y[:, 0, 0, 0], 0.7)


@pytest.mark.parametrize(
    "drop", [DropBlock2d(0.1, 6), DropBlock2d(0.1, 6, exact=False), DropBlock2d(0.0, 6)], ids=names
)
def test_a_block_larger_than_the_image(drop: DropBlock) -> None:
    x = torch.ones(2, 3, 5, 9)
    with pytest.raises(ValueError, match=r"`block_size` must lie between 1 and .* edge, got 6 for \(5, 9\)"):
        drop(x)
    assert drop.eval()(x) is x


def test_large_images_in_half_precision() -> None:
    """Places are counted outside float16, whose largest number is 65504."""
    x = torch.ones(1, 2, 300, 300, dtype=torch.float16)
    torch.manual_seed(0)
    y = DropBlock2d(0.1, 7)(x)
    assert y.dtype == torch.float16
    assert y.double().mean() == pytest.approx(1.0, abs=1e-3)


# --- schedule


def test_linear_rate() -> None:
    assert [linear_rate(k, 4, 0.2) for k in (0, 1, 2, 4, 9)] == pytest.approx([0.0, 0.05, 0.1, 0.2, 0.2])
    assert linear_rate(1, 2, 0.1, start=0.5) == pytest.approx(0.3)
    # Huang et al., equation 4: survival 1 − l/L · (1 − p_L)
    assert [1 - linear_rate(block, 54, 0.5) for block in range(1, 55)] == pytest.approx(
        [1 - block / 54 * (1 - 0.5) for block in range(1, 55)]
    )


@pytest.mark.parametrize(("arguments", "message"), [((1, 0, 0.1), "got 0 and 1"), ((-1, 4, 0.1), "got 4 and -1")])
def test_impossible_steps(arguments: tuple[int, int, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_rate(*arguments)


def test_schedule_sets_the_rates_and_resumes() -> None:
    net = nn.Sequential(DropBlock2d(0.3, 3), nn.Conv2d(2, 2, 1), DropBlock2d(0.3, 5), Dropout(0.4))
    schedule = LinearSchedule((m for m in net.modules() if isinstance(m, DropBlock)), p=0.2, n_steps=4)
    seen = [net[0].p] + [schedule.step() for _ in range(6)]
    assert seen == pytest.approx([0, 0.05, 0.1, 0.15, 0.2, 0.2, 0.2])
    assert net[0].p == net[2].p == 0.2
    assert net[3].p == 0.4
    schedule.load_state_dict({"steps": 2})
    assert net[2].p == pytest.approx(0.1)
    assert schedule.state_dict() == {"steps": 2}
    kept = (~dropped_places(net[0], (8, 8), 4000, 1)).double().flatten(1).mean(1)
    assert_mean(kept, 0.9)


def test_impossible_schedules() -> None:
    with pytest.raises(ValueError, match="at least one layer, got none"):
        LinearSchedule([], 0.1, 10)
    with pytest.raises(ValueError, match=r"\[0, 1\), got 1.1"):
        LinearSchedule([Dropout()], 1.1, 10)


# --- drop path


@pytest.mark.parametrize("shape", [(), (3,), (3, 4, 5)])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_a_path_is_lost_for_a_whole_sample(shape: tuple[int, ...], p: float) -> None:
    torch.manual_seed(0)
    y = DropPath(p)(torch.ones(8000, *shape, dtype=torch.float64)).reshape(8000, -1)
    assert torch.equal(y, y[:, :1].expand_as(y))
    assert set(y.unique().tolist()) == {0.0, 1 / (1 - p)}
    assert_mean(y[:, 0], 1.0)
    assert_mean((y[:, 0] - 1) ** 2, p / (1 - p))


@pytest.mark.parametrize("shape", [(), (3,), (3, 4, 5)])
def test_a_frozen_path_is_there_for_all_or_for_none(shape: tuple[int, ...]) -> None:
    x = torch.ones(6, *shape)
    lost = [freeze(DropPath(0.3), k)(x).unique().tolist() for k in range(400)]
    assert all(len(values) == 1 for values in lost)
    assert_mean(torch.tensor([values[0] for values in lost]), 1.0)


def test_path_of_a_scalar() -> None:
    with pytest.raises(ValueError, match="batch axis, got a scalar"):
        DropPath(0.5)(torch.tensor(1.0))


# --- what all members share


@pytest.mark.parametrize("layer", layers(), ids=names)
def test_evaluation_masks_and_generators(layer: nn.Module) -> None:
    x = torch.randn(6, 4, 7, 8)
    mask = layer.mask(x, torch.Generator().manual_seed(1))
    assert torch.equal(layer(x, generator=torch.Generator().manual_seed(1)), x * mask)
    assert not torch.equal(layer(x, generator=torch.Generator().manual_seed(2)), x * mask)
    assert torch.equal(layer.eval()(x, mask), x * mask)
    assert layer(x) is x
    layer.train().p = 0.0
    assert layer(x) is x
    layer.p = 0.5


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layer", layers(), ids=names)
def test_frozen(layer: nn.Module, training: bool) -> None:
    layer = copy.deepcopy(layer).train(training)
    x = torch.ones(5, 4, 7, 8)
    out = [freeze(layer, k)(x) for k in range(20)]
    assert len({tuple(y[0].flatten().tolist()) for y in out}) > 1
    assert all(torch.equal(y, y[:1].expand_as(y)) for y in out)
    assert torch.equal(layer(x[:2]), out[-1][:2])
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), out[-1])
    other_site = [freeze(layer, k, prefix="other")(x) for k in range(20)]
    assert not all(torch.equal(a, b) for a, b in zip(out, other_site, strict=True))
    together = torch.func.vmap(lambda sample: freeze(layer, sample)(x))(torch.arange(20))
    assert torch.equal(together, torch.stack(out))


def test_frozen_blocks_keep_the_fraction_over_samples() -> None:
    drop, x = DropBlock2d(0.3, 3), torch.ones(1, 1, 8, 8)
    y = torch.func.vmap(lambda sample: freeze(drop, sample)(x))(torch.arange(4000))
    assert_mean((y > 0).double().flatten(1).mean(1), 0.7)


@pytest.mark.parametrize("layer", layers(), ids=names)
def test_vmap_randomness(layer: nn.Module) -> None:
    x = torch.ones(50, 1, 4, 6, 6)
    torch.manual_seed(0)
    y = torch.func.vmap(layer, randomness="different")(x)
    assert len(y.flatten(1).unique(dim=0)) > 1
    y = torch.func.vmap(layer, randomness="same")(x)
    assert len(y.flatten(1).unique(dim=0)) == 1


@pytest.mark.parametrize("layer", layers(), ids=names)
def test_gradcheck(layer: nn.Module) -> None:
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    mask = layer.mask(x.detach(), torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(layer, (x, mask))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
@pytest.mark.parametrize("layer", layers(), ids=names)
def test_dtypes(layer: nn.Module, dtype: torch.dtype) -> None:
    x = torch.ones(8, 4, 6, 6, dtype=dtype)
    assert layer(x).dtype == dtype
    assert torch.isfinite(layer(x)).all()
    assert freeze(copy.deepcopy(layer), 0)(x).dtype == dtype


def test_autocast_in_a_network() -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3), *layers())
    with torch.autocast("cpu", torch.bfloat16):
        y = net(torch.randn(3, 2, 9, 9))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert torch.isfinite(net[0].weight.grad).all()


def test_compile_with_frozen_functions_and_a_schedule() -> None:
    net = nn.Sequential(*layers(0.4))
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    x = torch.ones(3, 4, 7, 8)
    for p in (0.4, 0.2, 0.3):
        net[1].p = p
        torch.manual_seed(0)
        expected = net(x)
        torch.manual_seed(0)
        assert torch.equal(compiled(x), expected)
    for sample in range(2):
        freeze(net, sample)
        assert torch.equal(compiled(x), net(x))


@pytest.mark.parametrize(
    ("layer", "shape", "wanted"),
    [
        (ChannelDropout(), (3, 4), "3 or 4 or 5 axes"),
        (ChannelDropout(), (1, 2, 3, 4, 5, 6), "3 or 4 or 5 axes"),
        (DropBlock1d(), (2, 3, 8, 8), "3 axes"),
        (DropBlock2d(), (2, 3, 8), "4 axes"),
        (DropBlock3d(), (2, 3, 8, 8), "5 axes"),
    ],
    ids=str,
)
def test_wrong_ranks(layer: nn.Module, shape: tuple[int, ...], wanted: str) -> None:
    for module in (layer.train(), layer.eval()):
        with pytest.raises(ValueError, match=rf"{type(layer).__name__} needs an input of {wanted}, got shape"):
            module(torch.ones(shape))


@pytest.mark.parametrize("layer", layers(), ids=names)
def test_integers_are_refused(layer: nn.Module) -> None:
    with pytest.raises(TypeError, match=r"needs a floating-point input, got torch\.int64"):
        layer(torch.ones(2, 3, 8, 8, dtype=torch.int64))


@pytest.mark.parametrize("p", [-0.1, 1.0])
@pytest.mark.parametrize("layer", [ChannelDropout, DropBlock1d, DropBlock2d, DropBlock3d, DropPath])
def test_rate_outside(layer: type[nn.Module], p: float) -> None:
    with pytest.raises(ValueError, match=r"`p` must lie in \[0, 1\)"):
        layer(p)


def test_block_size_below_one() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        DropBlock2d(0.1, 0)
    with pytest.raises(ValueError, match="3 or 4 or 5 axes"):
        drop_block(torch.ones(3, 4))


@settings(max_examples=30)
@given(sizes=st.lists(st.integers(2, 6), min_size=1, max_size=3), block_size=st.integers(1, 2), p=st.floats(0.0, 0.9))
def test_functional_forms(sizes: list[int], block_size: int, p: float) -> None:
    x = torch.ones(3, 2, *sizes)
    pairs = [
        (channel_dropout, {}, ChannelDropout(p)),
        (drop_path, {}, DropPath(p)),
        (drop_block, {"block_size": block_size}, BLOCKS[len(sizes)](p, block_size)),
    ]
    for function, extra, layer in pairs:
        torch.manual_seed(0)
        expected = layer(x)
        torch.manual_seed(0)
        assert torch.equal(function(x, p, **extra), expected)
        assert function(x, p, training=False, **extra) is x
        mask = torch.full_like(x, 2.0)
        assert torch.equal(function(x, p, mask=mask, **extra), 2 * x)


def test_repr() -> None:
    assert repr(ChannelDropout(0.2)) == "ChannelDropout(p=0.2)"
    assert repr(DropBlock2d(0.2, 3)) == "DropBlock2d(p=0.2, block_size=3, per_channel=True, exact=True)"
