"""What dropout layers of other packages did in public reports, tried with these ones; see README.md of this folder."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from forcedrop.dropout import (
    AttentionDropout,
    ChannelDropout,
    DropBlock2d,
    Dropout,
    DropoutGRU,
    DropoutLSTM,
    DropPath,
    EdgeDropout,
    LockedDropout,
    NodeDropout,
    NodeFeatureDropout,
    frozen,
    mc_samples,
    regression_summary,
)
from forcedrop.dropout.structured import seed_rate


def seeded(layer: nn.Module, x: Tensor, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return layer.train()(x)


def test_channels_are_dropped_as_a_whole_along_the_second_axis() -> None:
    """pytorch/pytorch#69801: an image (C, H, W) without a batch lost rows instead of channels, silently."""
    layer = ChannelDropout(0.5)
    image = torch.ones(8, 16, 5)
    out = seeded(layer, image[None])[0]
    assert (out.flatten(1).std(1) == 0).all()
    assert 0 < (out[:, 0, 0] == 0).sum() < 8
    batch = seeded(layer, image)  # three axes: a batch of sequences, as the documentation says
    assert (batch.std(2) == 0).all()
    assert batch.std(1).max() > 0
    with pytest.raises(ValueError, match=r"3, 4 or 5|axes"):
        layer.train()(torch.ones(4, 5))


@pytest.mark.parametrize("shape", [(4, 8, 5), (4, 8, 5, 6), (4, 8, 5, 6, 7)])
def test_one_layer_for_all_numbers_of_axes(shape: tuple[int, ...]) -> None:
    """pytorch/pytorch#22879: two layers of different names did the same to inputs that neither was meant for."""
    out = seeded(ChannelDropout(0.5), torch.ones(shape))
    assert set(out.unique().tolist()) == {0.0, 2.0}
    assert (out.flatten(2).std(2) == 0).all()
    assert out.flatten(2)[:, :, 0].std(0).max() > 0  # each entry of a batch has a mask of its own
    block = DropBlock2d(0.2, 3).train()
    if len(shape) == 4:
        assert block(torch.ones(shape)).shape == shape
    else:
        with pytest.raises(ValueError, match="4 axes"):
            block(torch.ones(shape))


class Functional(nn.Module):
    """A network that drops by ``F.dropout``, which evaluation does not switch off."""

    def __init__(self, layer: nn.Module | None) -> None:
        super().__init__()
        self.layer = layer or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(self.layer(x), 0.5)


def test_dropout_that_nobody_sees_is_no_error_bar() -> None:
    """pytorch/pytorch#26338: ``F.dropout`` goes on in evaluation mode. Samples must not hang on it."""
    x = torch.ones(3, 50)
    with pytest.raises(ValueError, match="no dropout layer"):
        mc_samples(Functional(None), x, 4)
    with pytest.raises(ValueError, match="no dropout layer"), frozen(Functional(None)):
        pass
    model = Functional(Dropout(0.2)).eval()
    with pytest.warns(RuntimeWarning, match="one after the other|one by one"):
        first = mc_samples(model, x, 4)
    state = torch.get_rng_state()
    with pytest.warns(RuntimeWarning, match="one after the other|one by one"):
        second = mc_samples(model, x, 4)
    assert torch.equal(first, second)  # "the same call gives the same bits"
    assert torch.equal(torch.get_rng_state(), state)


def test_graphs_are_whole_in_evaluation() -> None:
    """pyg-team/pytorch_geometric#5513: in evaluation the mask of what is kept came back inverted."""
    x, edges = torch.randn(6, 4), torch.tensor([[0, 1, 2, 3], [1, 0, 3, 2]])
    torch.testing.assert_close(NodeDropout(0.5).eval()(x), x, rtol=0, atol=0)
    torch.testing.assert_close(NodeFeatureDropout(0.5).eval()(x), x, rtol=0, atol=0)
    layer = EdgeDropout(0.5)
    assert layer.eval()(edges).tolist() == [1.0] * 4
    weight = torch.rand(4)
    assert torch.equal(layer(edges, weight), weight)
    kept = layer.filter(edges)
    assert torch.equal(kept[0] if isinstance(kept, tuple) else kept, edges)
    many = torch.stack([torch.arange(2000), torch.arange(2000) + 2000])
    torch.manual_seed(0)
    weights = layer.train()(many)
    assert 0.45 < (weights > 0).double().mean() < 0.55
    assert set(weights.tolist()) == {0.0, 2.0}


def test_samples_leave_batch_norm_alone() -> None:
    """lightning-uq-box/lightning-uq-box#173: switching a network to training for its dropout changed batch norm."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), Dropout(0.5), nn.Linear(8, 1))
    model.train()(torch.randn(64, 4))
    before, flags = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    x = torch.randn(5, 4) + 10
    samples = mc_samples(model, x, 16)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == flags
    alone = torch.cat([mc_samples(model, row[None], 16) for row in x], dim=1)
    torch.testing.assert_close(samples, alone)  # batch norm by running statistics: rows do not see one another


def test_samples_differ_in_evaluation_mode() -> None:
    """TiagoCortinhal/SalsaNext#40: dropout was off at inference, so every variance was 0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 1)).eval()
    with torch.no_grad():
        samples = mc_samples(model, torch.randn(5, 4), 64)
    assert (samples.std(0) > 0).all()
    assert not samples.requires_grad
    model[2].p = 0.0
    with pytest.raises(ValueError, match="rate"):
        mc_samples(model, torch.randn(5, 4), 64)


@pytest.mark.parametrize("kind", [Dropout, nn.Dropout])
def test_one_mask_for_all_inputs(kind: type[nn.Module]) -> None:
    """keras-team/keras#9412: functions need one mask for all inputs; every row had its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), kind(0.3), nn.Linear(64, 1))
    x = torch.linspace(-1, 1, 200)[:, None]
    samples = mc_samples(model, x, 8)
    rough = samples.diff(n=2, dim=1).abs().max() / samples.std(0).mean()
    assert rough < 0.05  # each sample is a smooth function of x
    torch.testing.assert_close(samples[3, 100:], mc_samples(model, x[100:], 4)[3])


@pytest.mark.parametrize("size", [1, 2, 5, 7, 9, 16])
def test_blocks_of_every_size_that_fits(size: int) -> None:
    """miguelvr/dropblock#20: blocks of 7 gave outputs of another shape, blocks of 9 an error."""
    x = torch.ones(200, 2, 16, 16)
    out = seeded(DropBlock2d(0.2, size), x)
    assert out.shape == x.shape
    dropped = (out == 0).double().mean()
    assert dropped == pytest.approx(0.2, abs=0.05)
    with pytest.raises(ValueError, match="block"):
        DropBlock2d(0.2, 17).train()(x)


def test_block_rates_of_oblong_images() -> None:
    """miguelvr/dropblock#10: γ took the number of channels for the size of the map."""
    p, block, height, width = 0.1, 3, 6, 20
    by_paper = p / block**2 * (height / (height - block + 1)) * (width / (width - block + 1))  # arXiv 1810.12890
    assert seed_rate(p, block, (height, width), exact=False) == pytest.approx(by_paper)
    for channels in (1, 7):
        out = seeded(DropBlock2d(p, block), torch.ones(2000 // channels, channels, height, width))
        assert (out == 0).double().mean() == pytest.approx(p, abs=0.01)


@pytest.mark.parametrize("kind", [DropoutLSTM, DropoutGRU])
def test_batches_of_different_sizes_through_one_layer(kind: type[nn.Module]) -> None:
    """clab/dynet#1053: the mask of the first batch stayed, and later batches of other sizes failed or were widened."""
    torch.manual_seed(0)
    layer = kind(3, 4, p_state=0.5, p_input=0.3).train()
    for batch in (2, 3, 1):
        out, _ = layer(torch.randn(5, batch, 3))
        assert out.shape == (5, batch, 4)
    with frozen(layer.eval(), 0, 2):
        x = torch.randn(5, 3, 3)
        together = layer(x)[0]
        alone = torch.cat([layer(x[:, b : b + 1])[0] for b in range(3)], dim=1)
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("batch_first", [False, True])
def test_locked_means_along_time(batch_first: bool) -> None:
    """PetrochukM/PyTorch-NLP#71: the mask was shared by the entries of a batch, not by the steps of time."""
    x = torch.ones(6, 7, 50)  # (B, T, F) with ``batch_first``
    out = seeded(LockedDropout(0.5, batch_first=batch_first), x)
    time, batch = (1, 0) if batch_first else (0, 1)
    assert (out.std(time) == 0).all()
    assert out.std(batch).max() > 0


def test_attention_weights_can_sum_to_one() -> None:
    """pytorch/pytorch#42929: after dropout rows of attention summed to 1.25 or to nothing."""
    weights = torch.softmax(torch.randn(4, 2, 6, 8), -1)
    plain = seeded(AttentionDropout(0.3), weights)
    assert (plain.sum(-1) - 1).abs().max() > 0.1  # as in the paper, and as the documentation says
    many = torch.stack([seeded(AttentionDropout(0.3), weights, seed) for seed in range(2000)])
    torch.testing.assert_close(many.mean(0), weights, atol=0.03, rtol=0)
    rows = seeded(AttentionDropout(0.3, renormalise=True), weights).sum(-1)
    assert ((rows - 1).abs() < 1e-5).logical_or(rows == 0).all()
    assert (rows > 0).double().mean() > 0.99
    torch.testing.assert_close(AttentionDropout(0.3, renormalise=True).eval()(weights), weights, rtol=0, atol=0)


def test_paths_are_dropped_by_sample_and_scaled() -> None:
    """huggingface/pytorch-image-models#2118: is it the batch or the sample, and why is the rest divided?"""
    x = torch.ones(4000, 3, 2)
    out = seeded(DropPath(0.25), x).flatten(1)
    assert (out.std(1) == 0).all()
    assert out.unique().tolist() == pytest.approx([0, 4 / 3])
    assert out.mean() == pytest.approx(1, abs=0.03)
    torch.testing.assert_close(DropPath(0.25).eval()(x), x, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precision_stays(dtype: torch.dtype) -> None:
    """facebookresearch/dinov2#442, in part: scales of 1/(1−p) are right in every precision, and the mean is kept."""
    x = torch.ones(2000, 16, dtype=dtype)
    for layer in (Dropout(0.1), DropPath(0.1), NodeDropout(0.1)):
        out = seeded(layer, x)
        assert out.dtype == dtype
        assert out.double().mean() == pytest.approx(1, abs=0.03)


def test_a_summary_of_samples_is_of_variances() -> None:
    """uncertainty-toolbox/uncertainty-toolbox#21: σ of samples had to be put together by hand."""
    samples = torch.randn(50, 7, 2, dtype=torch.float64)
    summary = regression_summary(samples)
    deviation = samples - samples.mean(0)
    torch.testing.assert_close(summary.variance, (deviation**2).sum(0) / 49)
    torch.testing.assert_close(summary.covariance.diagonal(dim1=-2, dim2=-1), summary.variance)
    with pytest.raises(ValueError, match="2 samples"):
        regression_summary(samples[:1])
