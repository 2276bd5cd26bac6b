"""Messages against loops over pairs."""

import math

import pytest
import torch
from torch import Tensor

from forcedrop.graph import pair_vectors
from forcedrop.potential import GraphInputs
from forcedrop.potential.linear import by_degree
from forcedrop.potential.messages import Message
from forcedrop.potential.pairs import PairFunctions
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
        vec = pair_vectors(batch, 2 * CUTOFF, batch.forces.dtype)
        graph = GraphInputs(batch.z, batch.batch, batch.nbr, batch.nbr_reverse, 1)
        sent = module.send(by_degree(x)).transpose(0, 1)
        got = module(sent, PairFunctions(basis, 2)(vec), graph)
        blocked = module(sent.contiguous(), PairFunctions(basis, 2)(vec), graph, blocked=True)
        expected = by_loops(module, x, vec, batch.nbr, basis)
    finally:
        torch.set_default_dtype(torch.float32)
    assert (module.norm.rms == 1).all()
    assert float(expected.detach().abs().max()) > 0.1
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(blocked, expected, rtol=0, atol=1e-10)
