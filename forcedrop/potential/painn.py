r"""PaiNN: a small equivariant network of scalars and vectors, with dropout sites.

Every atom has C scalars s, at first an embedding of its element, and C Cartesian vectors v, at first zero. In each layer

* a *message* adds :math:`\sum_j \phi_s(s_j) W_s(r_{ij})` to the scalars and
  :math:`\sum_j v_j\,\phi_{vv}(s_j) W_{vv}(r_{ij}) + \hat r_{ij}\,\phi_{vs}(s_j) W_{vs}(r_{ij})` to the vectors; filters W
  are linear in the Bessel functions, which fade out at the cutoff, so everything does;
* an *update* adds :math:`a_s + a_{sv} \langle Uv, Vv \rangle` to the scalars and :math:`a_{vv}\,Uv` to the vectors; the a are
  a small network's, of s and the lengths of Vv.

Source: Schütt, Unke & Gastegger, ICML 2021 (arXiv 2102.03150), eqs. 7 to 10. Here filters have no biases, what a layer adds is
divided by root mean squares that were measured on data, and lengths are rounded off near zero: energies stay smooth where a
vector vanishes by symmetry.

Energies are read linearly from the scalars after every layer and from the hidden channels of an MLP on the last. Dropout sites:
``edges``, cut radii of pairs of elements; ``layers.t.message_dropout``, channels of φ, not in the first layer, where φ is a
matter of the element alone; ``layers.t.update_dropout``, channels of what an update adds, a vector living or dying as a whole;
``hidden_dropout``. One bit per channel for all atoms alike; scalars are dropped about the mean of each element's atoms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from forcedrop.dropout import SphericalDropout
from forcedrop.potential.contract import DropoutRates, EnergyModel, GraphInputs
from forcedrop.potential.linear import Linear, SphereNorm
from forcedrop.potential.neighbours import gather_neighbours
from forcedrop.potential.radial import BesselBasis

ROUND = 0.1
"""A vector's length is √(v² + this): the square of typical vectors is 3."""


@dataclass(frozen=True)
class PaiNNShape:
    """Everything that fixes the shape of the network.

    Attributes:
        cutoff: [Å].
        n_channels: scalars, vectors and hidden channels C.
        n_layers: message-passing layers.
        n_radial: Bessel functions.
        cutoff_power: p of the polynomial cutoff; the lower, the more near neighbours weigh.
        repulsion: whether the repulsion of GFN2-xTB is below the network; see ``repulsion.py``.
        bonds: whether the attraction of bonds is there, too; without it the repulsion acts only closer than any training
            structure. To be judged on structures unlike those in training.
        zbl: whether the repulsion of Ziegler, Biersack & Littmark is below, instead.
    """

    cutoff: float = 5.0
    n_channels: int = 64
    n_layers: int = 3
    n_radial: int = 8
    cutoff_power: int = 6
    repulsion: bool = True
    bonds: bool = True
    zbl: bool = False

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: naming what is out of range.
        """
        if not 0 < self.cutoff < math.inf:
            raise ValueError(f"`cutoff` must be positive [Å], got {self.cutoff}")
        for name in ("n_channels", "n_layers", "n_radial", "cutoff_power"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")


class Pairs(NamedTuple):
    """What messages need of a pair: Bessel functions, shape (N, R, M), and those times the direction, (N, 3, R, M)."""

    radial: Tensor
    directed: Tensor


class Perceptron(nn.Module):
    """A linear map, SiLU, a linear map, with biases; outputs of unit size for inputs of unit size."""

    def __init__(self, n_in: int, n_hidden: int, n_out: int) -> None:
        super().__init__()
        self.hidden, self.hidden_bias = Linear(n_in, n_hidden), nn.Parameter(torch.zeros(n_hidden))
        self.output, self.output_bias = Linear(n_hidden, n_out, gain=1.7), nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        """Map the last axis."""
        hidden = nn.functional.silu(self.hidden(x) + self.hidden_bias)
        return self.output(hidden) + self.output_bias


class PaiNNLayer(nn.Module):
    """A message and an update.

    Args:
        n_species: number of elements.
        n_channels: C.
        n_radial: Bessel functions R.
        first: whether the vectors that come in are all zero; then what acts on them is left out.
        last: whether the vectors that go out are not needed.
    """

    def __init__(self, n_species: int, n_channels: int, n_radial: int, *, first: bool, last: bool) -> None:
        super().__init__()
        c, n_sent = n_channels, 2 if first else 3
        self.n_channels, self.first, self.last = c, first, last
        self.send = Perceptron(c, c, n_sent * c)
        self.filters = nn.Parameter(torch.randn(n_radial, n_sent * c) / math.sqrt(n_radial))
        self.message_dropout = SphericalDropout(0, n_sent * c, 0.0, kinds=n_species)
        self.message_norm = SphereNorm(1)
        self.left, self.right = Linear(c, c), Linear(c, c)
        self.gate = Perceptron(2 * c, c, (2 if last else 3) * c)
        self.update_norm = SphereNorm(0 if last else 1)
        self.update_dropout = SphericalDropout(0 if last else 1, c, 0.0, kinds=n_species)

    def forward(self, x: Tensor, pairs: Pairs, one_hot: Tensor, graph: GraphInputs) -> Tensor:
        """Return the new scalars and vectors, (4, N, C), the last layer scalars alone, (1, N, C), from (4, N, C)."""
        x = x + self.message_norm(self.message(x, pairs, one_hot, graph))
        added = self.update_dropout(self.update_norm(self.update(x)), one_hot)
        return x[: len(added)] + added

    def message(self, x: Tensor, pairs: Pairs, one_hot: Tensor, graph: GraphInputs) -> Tensor:
        """Return what the neighbours add, (4, N, C). Filters act on the sums over neighbours, which are small, not on pairs."""
        c = self.n_channels
        sent = self.message_dropout(self.send(x[0])[None], one_hot)[0]
        scalars, directions, *turned = sent.split(c, dim=1)
        moving = [scalars, directions, *(v * gate for gate in turned for v in x[1:])]
        moved = gather_neighbours(torch.cat(moving, dim=1), graph.nbr, graph.reverse)
        w_scalar, w_direction, *w_turned = self.filters.split(c, dim=1)
        new = [((pairs.radial @ moved[..., :c]) * w_scalar).sum(1)[None]]
        vectors = ((pairs.directed.flatten(1, 2) @ moved[..., c : 2 * c]).unflatten(1, (3, -1)) * w_direction).sum(2)
        for weights in w_turned:
            carried = (pairs.radial @ moved[..., 2 * c :]).unflatten(2, (3, c))
            vectors = vectors + (carried * weights[:, None]).sum(1)
        return torch.cat([*new, vectors.transpose(0, 1)])

    def update(self, x: Tensor) -> Tensor:
        """Return what an atom's own scalars and vectors add, (4, N, C) or (1, N, C)."""
        left, right = self.left(x[1:]), self.right(x[1:])
        length = (right.square().sum(0) + ROUND).sqrt()
        plain, product, *own = self.gate(torch.cat([x[0], length / math.sqrt(3)], dim=1)).split(self.n_channels, dim=1)
        scalars = plain + product * (left * right).sum(0) / math.sqrt(3)
        return torch.cat([scalars[None], *(gate * left for gate in own)])


class PaiNN(EnergyModel):
    """The network of scalars and vectors; see the module's page.

    Args:
        shape: its settings.
        elements: atomic numbers it knows, ascending.
        isolated_energies: energy of each isolated atom [eV] by atomic number; 0 where not given.
        energy_scale: the energy [eV] of one unit of output.
    """

    kind = "painn"
    Shape = PaiNNShape
    shape: PaiNNShape

    def __init__(
        self,
        shape: PaiNNShape,
        elements: tuple[int, ...],
        isolated_energies: Mapping[int, float] | None = None,
        energy_scale: float = 1.0,
    ) -> None:
        super().__init__(shape, elements, isolated_energies, energy_scale)
        c, n_species, last = shape.n_channels, len(elements), shape.n_layers - 1
        self.basis_functions = BesselBasis(shape.n_radial, shape.cutoff, shape.cutoff_power)
        self.add_edges()
        self.species = nn.Embedding(n_species, c)  # a name that keeps it from Muon: it is no map between channels
        self.layers = nn.ModuleList(
            PaiNNLayer(n_species, c, shape.n_radial, first=t == 0, last=t == last) for t in range(shape.n_layers)
        )
        # readouts start small: a random energy landscape is a worse start than a nearly flat one
        self.readouts = nn.ModuleList(Linear(c, 1, gain=0.1) for _ in range(shape.n_layers))
        self.hidden, self.hidden_bias = Linear(c, c), nn.Parameter(torch.zeros(c))
        self.hidden_dropout = SphericalDropout(0, c, 0.0, kinds=n_species)
        self.output = Linear(c, 1, gain=0.1)
        self.species_bias = nn.Parameter(torch.zeros(n_species, 1))
        self.add_correction((shape.n_layers + 1) * c)

    def read(self, vec: Tensor, graph: GraphInputs) -> tuple[Tensor, Tensor]:
        """Return every atom's energy, (N,), and the scalars of every layer and hidden channels, (N, F)."""
        one_hot, pairs = self.one_hot(graph, vec.dtype), self.pairs(vec, graph)
        scalars = one_hot @ self.species.weight
        x = torch.cat([scalars[None], torch.zeros_like(scalars).expand(3, -1, -1)])
        energy, features = one_hot @ self.species_bias, []
        for layer, readout in zip(self.layers, self.readouts, strict=True):
            x = layer(x, pairs, one_hot, graph)
            energy = energy + readout(x[0])
            features.append(x[0])
        hidden = nn.functional.silu(self.hidden(x[0]) + self.hidden_bias)
        hidden = self.hidden_dropout(hidden[None], one_hot)[0]
        return (energy + self.output(hidden))[:, 0], torch.cat([*features, hidden], dim=1)

    def pairs(self, vec: Tensor, graph: GraphInputs) -> Pairs:
        """Return the geometry of the pairs, faded out where edge dropout cuts them."""
        r = vec.square().sum(-1).sqrt()
        radial = self.cut(self.basis_functions(r), r, graph).transpose(1, 2)
        unit = (vec / r[..., None]).transpose(1, 2)
        return Pairs(radial, unit[:, :, None] * radial[:, None])

    def read_weights(self) -> Tensor:
        """Return the weights (F,) of the features."""
        readouts: Any = [*self.readouts, self.output]
        return torch.cat([readout.weight[:, 0] for readout in readouts]).detach()

    def set_rates(self, rates: DropoutRates) -> None:
        """Set the rates of the dropout sites within the network.

        Raises:
            ValueError: for messages to be dropped in a network of one layer.
        """
        layers: Any = self.layers
        if rates.message and len(layers) == 1:
            raise ValueError("a network of kind 'painn' with one layer has no dropout sites of kind message")
        edges: Any = self.edges
        edges.p, self.hidden_dropout.p = rates.edge, rates.readout
        for number, layer in enumerate(layers):
            layer.update_dropout.p = rates.update
            layer.message_dropout.p = rates.message if number else 0.0

    def offset(self, bias: Tensor) -> None:
        """Start the biases of the elements there."""
        with torch.no_grad():
            self.species_bias[:, 0] = bias

    def element_vectors(self) -> Tensor:
        """Return the embeddings of the elements."""
        return self.species.weight.detach()

    def bytes_per_function(self, n_atoms: int, n_slots: int) -> float:
        """Estimate what one more function takes: per atom, channel and layer so many numbers for each slot and for its sums."""
        shape, size = self.shape, self.isolated.new_empty((), dtype=self.dtype).element_size()
        if self.centred:
            return float(n_atoms * (2 * self.n_features + 12 * n_slots) * size)  # one after the other: results alone
        per_layer = 3 * (6 * n_slots + 7 * shape.n_radial + 45)  # the way there is kept, for each
        return float(n_atoms * shape.n_channels * shape.n_layers * per_layer * size)
