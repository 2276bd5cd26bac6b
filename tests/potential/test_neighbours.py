import torch
from torch.autograd import gradcheck, gradgradcheck

from forcedrop.potential.neighbours import gather_neighbours, sum_incoming
from tests.conftest import batch_of, silicon


def test_gather_and_its_adjoint_against_loops() -> None:
    batch = batch_of([silicon()], 3.5)
    n, m = batch.nbr.shape
    x = torch.randn(n, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = gather_neighbours(x, batch.nbr, batch.nbr_reverse)
    edges = torch.randn(n, m, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    incoming = torch.zeros_like(x)
    for i in range(n):
        for k in range(m):
            assert torch.equal(out[i, k], x[batch.nbr[i, k]])
            incoming[batch.nbr[i, k]] += edges[i, k]
    torch.testing.assert_close(sum_incoming(edges, batch.nbr, batch.nbr_reverse), incoming)


def test_gradients_of_first_and_second_order() -> None:
    batch = batch_of([silicon()], 3.0)
    x = torch.randn(batch.num_nodes, 2, dtype=torch.float64, requires_grad=True)

    def function(x: torch.Tensor) -> torch.Tensor:
        return gather_neighbours(x, batch.nbr, batch.nbr_reverse).pow(3).sum(1)

    assert gradcheck(function, (x,))
    assert gradgradcheck(function, (x,))


def test_vmap_equals_a_loop() -> None:
    batch = batch_of([silicon()], 3.5)
    x = torch.randn(3, batch.num_nodes, 2, dtype=torch.float64)
    mapped = torch.func.vmap(lambda y: gather_neighbours(y, batch.nbr, batch.nbr_reverse))(x)
    for k in range(3):
        assert torch.equal(mapped[k], gather_neighbours(x[k], batch.nbr, batch.nbr_reverse))
