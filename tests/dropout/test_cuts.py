"""Edge dropout as a function of kind and distance: smooth, unbiased, the same for both ends of a pair."""

import pytest
import torch
from torch import nn

from forcedrop.dropout import EdgeCutDropout, edge_cut_dropout, frozen
from tests.dropout.laws import assert_mean, assert_not_mean, freeze

R = torch.linspace(0.5, 4.5, 41, dtype=torch.float64)[:, None]


def kinds(r: torch.Tensor, kind: int = 0) -> torch.Tensor:
    return torch.full_like(r, kind, dtype=torch.int64)


def test_mean_over_draws_is_one_at_every_distance() -> None:
    layer = EdgeCutDropout(3, 4.0, 0.4).train()
    generator = torch.Generator().manual_seed(0)
    inside = R[R[:, 0] < 4.0]
    draws = torch.stack([layer(inside, kinds(inside, 1), generator=generator)[:, 0] for _ in range(4000)])
    assert_mean(draws, 1.0)
    assert_not_mean(draws, 0.97)


def test_the_share_of_cuts_and_their_place() -> None:
    layer = EdgeCutDropout(2000, 5.0, 0.25, first=2.0).train()
    radii = layer.radii(R, torch.Generator().manual_seed(1))
    cut = radii[radii < 10]
    assert abs(len(cut) / 2000 - 0.25) < 5 * (0.25 * 0.75 / 2000) ** 0.5
    assert float(cut.min()) >= 2.0
    assert float(cut.max()) <= 5.0
    assert_mean(cut, 3.5)


def test_one_cut_by_hand() -> None:
    layer = EdgeCutDropout(1, 4.0, 0.3)
    radii = torch.tensor([2.5], dtype=torch.float64)
    r = torch.tensor([[2.4], [2.75], [3.1]], dtype=torch.float64)
    found = layer.weights(r, kinds(r), radii)[:, 0]
    grid = torch.linspace(1.8, 4.0, 200001, dtype=torch.float64)
    t = ((r - grid) / 0.5).clamp(0, 1)
    mean = 1 - 0.3 * (6 * t**5 - 15 * t**4 + 10 * t**3).mean(1)
    assert torch.allclose(found * mean, torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64), atol=1e-5)


def test_smooth_to_second_order() -> None:
    layer = EdgeCutDropout(1, 4.0, 0.3)
    radii = torch.tensor([2.5], dtype=torch.float64)

    def f(x: torch.Tensor) -> torch.Tensor:
        return layer.weights(x[None, None], torch.zeros(1, 1, dtype=torch.int64), radii)[0, 0]

    slope, bend = torch.func.grad(f), torch.func.grad(torch.func.grad(f))
    for place in (1.8, 2.3, 2.5, 3.0):
        below, above = (torch.tensor(place + d, dtype=torch.float64) for d in (-1e-7, 1e-7))
        for g in (f, slope, bend):
            assert float(g(above) - g(below)) == pytest.approx(0.0, abs=2e-4)


def test_frozen_functions_rows_and_banks() -> None:
    net = nn.ModuleDict({"cuts": EdgeCutDropout(4, 4.0, 0.5)}).eval()
    generator = torch.Generator().manual_seed(0)
    r, kind = 4 * torch.rand(5, 3, generator=generator), torch.randint(4, (5, 3), generator=generator)
    layer = net["cuts"]
    assert layer(r, kind) is None
    single = []
    for k in range(5):
        freeze(net, k, seed=3)
        single.append(layer(r, kind))
    assert len({float(x.sum()) for x in single}) >= 4  # two may have no cut at all
    freeze(net, torch.arange(5), seed=3)
    by_row = layer(r, kind)
    assert torch.equal(by_row, torch.stack([single[k][k] for k in range(5)]))
    mapped = torch.func.vmap(lambda k: freeze(net, k, seed=3)["cuts"](r, kind))(torch.arange(5))
    assert torch.allclose(mapped, torch.stack(single))
    layer._function = None
    layer.bank = torch.tensor([[2.0, 3.0, 9.0, 9.0], [9.0, 9.0, 9.0, 9.0]])
    freeze(net, 1, seed=77)
    whole = layer(r, kind)
    freeze(net, 0)
    assert torch.allclose(whole * 0 + layer.weights(r, kind, layer.bank[0]), layer(r, kind))
    freeze(net, 2)
    with pytest.raises(ValueError, match="function 2 of a bank of 2"):
        layer(r, kind)


def test_banks_of_other_sizes_load() -> None:
    layer = EdgeCutDropout(3, 4.0)
    layer.bank = torch.rand(7, 3)
    other = EdgeCutDropout(3, 4.0)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.bank, layer.bank)


def test_wrong_input() -> None:
    with pytest.raises(ValueError, match="0 ≤ first < cutoff"):
        EdgeCutDropout(1, 1.0)
    with pytest.raises(TypeError, match="floating"):
        edge_cut_dropout(torch.ones(2, 2, dtype=torch.int64), torch.ones(2, 2, dtype=torch.int64), 2, 4.0)
    with pytest.raises(ValueError, match="shape of the distances"):
        edge_cut_dropout(torch.ones(2, 2), torch.ones(2, 1, dtype=torch.int64), 2, 4.0)
    assert torch.equal(edge_cut_dropout(R, kinds(R), 1, 4.0, training=False), torch.ones_like(R))


def test_frozen_context() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cuts = EdgeCutDropout(1, 4.0, 0.5)

        def forward(self, r: torch.Tensor) -> torch.Tensor:
            weights = self.cuts(r, kinds(r))
            return r.sum() if weights is None else (weights * r).sum()

    net = Net().eval()
    plain = net(R)
    with frozen(net, 0, 1):
        first = net(R)
    with frozen(net, 0, torch.ones(len(R), dtype=torch.int64)):
        assert torch.allclose(net(R), first)
    assert torch.equal(net(R), plain)
