"""Messages against loops over pairs."""

import math

import pytest
import torch
from torch import Tensor

from forcedrop.graph import pair_vectors
from forcedrop.potential.layers import Message, PairFunctions, spread_mask
from forcedrop.potential.radial import BesselBasis
from forcedrop.potential.sphere import degree_index, spherical_harmonics
from tests.conftest import batch_of, silicon

C, CUTOFF = 3, 4.0


def by_loops(module: Message, x: Tensor, vec: Tensor, nbr: Tensor, basis: BesselBasis) -> Tensor:
    """The formula in the docstring of ``Message``, one pair, one channel, one component at a time."""
    l_of, n_atoms = degree_index(module.l_max).tolist(), x.shape[1]
    sent = torch.stack([x[s] @ module.send.maps[l_of[s]].weight for s in range(len(x))])
    carried = module.radial.reshape(-1, module.l_in + 1, module.l_max + 1, C)
    plain = module.radial_plain.reshape(-1, module.l_in, C)
    out = torch.zeros(len(l_of), n_atoms, C)
    for i in range(n_atoms):
        for slot, j in enumerate(nbr[i].tolist()):
            r = vec[i, slot].norm()
            if r >= CUTOFF:
                continue
            y, b = spherical_harmonics(vec[i, slot] / r, module.l_max), basis(r)
            for s, l in enumerate(l_of):  # noqa: E741
                for c in range(C):
                    for l_in in range(module.l_in + 1):
                        along = sum(
                            sent[t, j, c] * y[t] / math.sqrt(2 * l_in + 1) for t in range(l_in**2, (l_in + 1) ** 2)
                        )
                        out[s, i, c] += y[s] * (b @ carried[:, l_in, l, c]) * along
                    if 1 <= l <= module.l_in:
                        out[s, i, c] += (b @ plain[:, l - 1, c]) * sent[s, j, c]
    return out


@pytest.mark.parametrize("l_in", [1, 2])
def test_messages_against_loops(l_in: int) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        atoms = silicon()[:2]
        batch = batch_of([atoms], CUTOFF)
        basis, module = BesselBasis(4, CUTOFF, 2), Message(C, 4, 2, l_in)
        x = torch.randn((l_in + 1) ** 2, batch.num_nodes, C)
        vec = pair_vectors(batch, 2 * CUTOFF)
        got = module(x, PairFunctions(basis, 2)(vec), batch.nbr, batch.nbr_reverse, None)
        expected = by_loops(module, x, vec, batch.nbr, basis)
    finally:
        torch.set_default_dtype(torch.float32)
    assert (module.norm.rms == 1).all()
    assert float(expected.detach().abs().max()) > 0.1
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_a_mask_has_one_bit_for_all_components_of_a_channel() -> None:
    mask = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    spread = spread_mask(mask, degree_index(1), 3)
    assert spread.shape == (4, 1, 3)
    assert spread[:, 0].tolist() == [[1, 2, 3]] + 3 * [[4, 5, 6]]
    assert torch.equal(spread_mask(mask[0], degree_index(1), 3), spread)
