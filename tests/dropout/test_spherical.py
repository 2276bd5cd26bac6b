"""Spherical tensors with components first: whole tensors, all rows alike, scalars about their kind's centre; functions by row."""

import pytest
import torch

from forcedrop.dropout import Dropout, GaussianDropout, SphericalDropout, TensorDropout, frozen
from tests.dropout.laws import assert_mean, freeze


def test_whole_tensors_for_all_rows_alike() -> None:
    layer = SphericalDropout(2, 40, 0.4).train()
    mask = layer(torch.ones(9, 3, 40), generator=torch.Generator().manual_seed(0))
    assert mask.unique().tolist() == pytest.approx([0.0, 1 / 0.6])
    assert torch.equal(mask, mask[:, :1].expand_as(mask))
    for first, last in ((1, 4), (4, 9)):
        assert torch.equal(mask[first:last], mask[first : first + 1].expand(last - first, 3, 40))
    assert not torch.equal(mask[0], mask[1])


def test_mean_is_the_input_and_centres_stay() -> None:
    layer = SphericalDropout(1, 3, 0.5, kinds=2).train()
    kind = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    x = torch.randn(4, 3, 3, generator=torch.Generator().manual_seed(0))
    layer.centre_on(x, kind)
    assert torch.allclose(layer.centre[0], x[0, :2].mean(0))
    assert torch.allclose(layer.centre[1], x[0, 2])
    generator = torch.Generator().manual_seed(1)
    draws = torch.stack([layer(x, kind, generator=generator) for _ in range(3000)])
    assert_mean(draws, x.double())
    assert torch.allclose(draws[:, 0, 2], x[0, 2].expand(3000, 3))  # alone of its kind: it is its own centre


def test_rows_with_functions_of_their_own() -> None:
    layer = SphericalDropout(1, 6, 0.5).eval()
    x = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0))
    alone = [freeze(layer, k, seed=4)(x) for k in range(3)]
    chosen = torch.tensor([2, 0, 0, 1, 2])
    found = freeze(layer, chosen, seed=4)(x)
    assert torch.equal(found, torch.stack([alone[k][:, i] for i, k in enumerate(chosen.tolist())], dim=1))


@pytest.mark.parametrize("layer", [Dropout(0.3), GaussianDropout(0.3), TensorDropout(1, 0.4, shared=True)])
def test_functions_by_row_are_those_alone(layer: torch.nn.Module) -> None:
    x = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0))
    net = torch.nn.Sequential(layer).eval()
    alone = []
    for k in (7, 1, 7, 2):
        with frozen(net, 9, k):
            alone.append(net(x))
    with frozen(net, 9, torch.tensor([7, 1, 7, 2])):
        found = net(x)
    assert torch.equal(found, torch.stack([one[i] for i, one in enumerate(alone)]))
    with frozen(net, 9, torch.tensor([7, 1])), pytest.raises((ValueError, RuntimeError)):
        net(x)


def test_wrong_input() -> None:
    layer = SphericalDropout(1, 3, 0.5, kinds=2)
    with pytest.raises(ValueError, match=r"\(4, rows, 3\)"):
        layer(torch.ones(3, 2, 3))
    with pytest.raises(ValueError, match="kind of each row"):
        layer.train()(torch.ones(4, 2, 3))
    with pytest.raises(ValueError, match="kinds=0"):
        SphericalDropout(1, 3).centre_on(torch.ones(4, 2, 3), torch.ones(2, 1))
    with pytest.raises(TypeError, match="floating"):
        layer(torch.ones(4, 2, 3, dtype=torch.int64))
