r"""The network on the sphere: products of fields, with dropout sites.

Layer 0 sums B_n(r) Y_lm(r̂) over the neighbours of each element; the weights act on that small array, per atom. Later layers
carry scalars, vectors and tensors (l ≤ 2) of the neighbours the same way. In each layer three fields per channel are multiplied
pointwise on a grid of the sphere and integrated: invariants of body order up to 4 per layer, exactly equivariant (see
``products.py``). Every layer has a linear readout, the last a small MLP besides.

Dropout sites: ``edges``, cut radii of pairs of elements, for all layers alike; ``layers.t.message_dropout`` and
``layers.t.update_dropout``, one bit per channel and l of what a later layer sends and adds; ``hidden_dropout``, one bit per
hidden channel. A mask multiplies a *branch*, never the stream of features itself; it is the same for every atom of a structure,
so each mask is one smooth, conservative and extensive potential. And ``correction``, exact dropout of what energies are read
from: the invariant products of every layer and the hidden channels of the last.

The way back of functions that differ in ``correction`` alone is written out by hand, layer by layer beside the way there, for all
of them at once: every step is a large matrix product or one pass over memory. Masks within the network, and training, go through
automatic differentiation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from forcedrop.dropout import SphericalDropout
from forcedrop.potential.contract import DropoutRates, EnergyModel, Gradients, GraphInputs, lengths
from forcedrop.potential.first import FirstLayer
from forcedrop.potential.limits import with_slopes
from forcedrop.potential.linear import Linear
from forcedrop.potential.messages import MessageLayer
from forcedrop.potential.pairs import PairFunctions
from forcedrop.potential.radial import BesselBasis


@dataclass(frozen=True)
class SphereShape:
    """Everything that fixes the shape of the network.

    Attributes:
        cutoff: [Å].
        n_channels: channels C of features and fields.
        n_layers: message-passing layers.
        l_max: highest l of the fields on the sphere, at most 6.
        l_message: highest l of an atom's features, which it sends to its neighbours; ``l_max`` if that is lower.
        n_radial: Bessel functions.
        cutoff_power: p of the polynomial cutoff; the lower, the more near neighbours weigh.
        n_hidden: hidden channels of the last readout.
        repulsion: whether the repulsion of GFN2-xTB is below the network; see ``repulsion.py``.
        bonds: whether the attraction of bonds is there, too; without it the repulsion acts only closer than any training
            structure. To be judged on structures unlike those in training.
        zbl: whether the repulsion of Ziegler, Biersack & Littmark is below, instead.
    """

    cutoff: float = 5.0
    n_channels: int = 64
    n_layers: int = 2
    l_max: int = 3
    l_message: int = 2
    n_radial: int = 6
    cutoff_power: int = 6
    n_hidden: int = 64
    repulsion: bool = True
    bonds: bool = True
    zbl: bool = False

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: naming what is out of range.
        """
        if not self.cutoff > 0:
            raise ValueError(f"`cutoff` must be positive [Å], got {self.cutoff}")
        for name in ("n_channels", "n_layers", "l_max", "l_message", "n_radial", "cutoff_power", "n_hidden"):
            if getattr(self, name) < 1 or (name.startswith("l_") and getattr(self, name) > 6):
                most = " and at most 6" if name.startswith("l_") else ""
                raise ValueError(f"`{name}` must be at least 1{most}, got {getattr(self, name)}")

    @property
    def l_features(self) -> int:
        """Highest l of an atom's features."""
        return min(self.l_message, self.l_max)


class SpherePotential(EnergyModel):
    """The network on the sphere; see the module's page.

    Args:
        shape: its settings.
        elements: atomic numbers it knows, ascending.
        isolated_energies: energy of each isolated atom [eV] by atomic number; 0 where not given.
        energy_scale: the energy [eV] of one unit of output.
    """

    kind = "sphere"
    Shape = SphereShape
    shape: SphereShape

    def __init__(
        self,
        shape: SphereShape,
        elements: tuple[int, ...],
        isolated_energies: Mapping[int, float] | None = None,
        energy_scale: float = 1.0,
    ) -> None:
        super().__init__(shape, elements, isolated_energies, energy_scale)
        c, n_species, l_in, last = shape.n_channels, len(elements), shape.l_features, shape.n_layers - 1
        self.pairs = PairFunctions(BesselBasis(shape.n_radial, shape.cutoff, shape.cutoff_power), shape.l_max)
        self.add_edges()
        degrees = [0 if t == last else l_in for t in range(shape.n_layers)]
        self.layers = nn.ModuleList(
            FirstLayer(n_species, c, shape.n_radial, shape.l_max, l_out)
            if t == 0
            else MessageLayer(n_species, c, shape.n_radial, shape.l_max, l_in, l_out)
            for t, l_out in enumerate(degrees)
        )
        # readouts start small: a random energy landscape is a worse start than a nearly flat one
        self.readouts = nn.ModuleList(Linear(c, 1, gain=0.1) for _ in range(shape.n_layers))
        self.hidden = Linear(c, shape.n_hidden)
        self.hidden_bias = nn.Parameter(torch.zeros(shape.n_hidden))
        self.hidden_dropout = SphericalDropout(0, shape.n_hidden, 0.0, kinds=n_species)
        self.output = Linear(shape.n_hidden, 1, gain=0.1)
        self.species_bias = nn.Parameter(torch.zeros(n_species, 1))
        self.add_correction(3 * shape.n_layers * c + shape.n_hidden)

    def read(self, vec: Tensor, graph: GraphInputs) -> tuple[Tensor, Tensor]:
        """Return every atom's energy, (N,), and the products of every layer and hidden channels, (N, F)."""
        one_hot = self.one_hot(graph, vec.dtype)
        pairs = self.pairs(vec)
        pairs = pairs._replace(radial=self.cut(pairs.radial, vec.square().sum(-1).sqrt(), graph))
        layers: Any = self.layers
        x, products, _ = layers[0](pairs, one_hot, graph)
        energy, features = self.readouts[0](x[0]), [products]
        for layer, readout in zip(layers[1:], self.readouts[1:], strict=True):
            x, products, _ = layer(x, pairs, one_hot, graph)
            energy = energy + readout(x[0])
            features.append(products)
        hidden = nn.functional.silu(self.hidden(x[0]) + self.hidden_bias)
        hidden = self.hidden_dropout(hidden[None], one_hot)[0]
        energy = (energy + self.output(hidden) + one_hot @ self.species_bias)[:, 0]
        return energy, torch.cat([*features, hidden], dim=-1)

    def read_weights(self) -> Tensor:
        """Return the weights (F,) of the features, through every map between a product and the energies."""
        layers: Any = self.layers
        readouts: Any = self.readouts
        maps = [layer.update.mix.maps[0].weight for layer in layers]
        outer = readouts[-1].weight[:, 0]
        found = [maps[-1] @ outer]
        for t in reversed(range(len(layers) - 1)):
            outer = readouts[t].weight[:, 0] + layers[t + 1].skip.weight @ outer
            found.append(maps[t] @ outer)
        return torch.cat([*reversed(found), self.output.weight[:, 0]]).detach()

    def trained_readouts(self) -> Tensor:
        """Return the weights of all trained readouts as they are: their mean square is the scale of the prior."""
        readouts: Any = [*self.readouts, self.output]
        return torch.cat([readout.weight.detach().flatten() for readout in readouts])

    def set_rates(self, rates: DropoutRates) -> None:
        """Set the rates of the dropout sites within the network; one layer has no messages and no updates to drop."""
        edges: Any = self.edges
        edges.p, self.hidden_dropout.p = rates.edge, rates.readout
        layers: Any = self.layers
        for layer in layers[1:]:
            layer.message_dropout.p, layer.update_dropout.p = rates.message, rates.update

    def offset(self, bias: Tensor) -> None:
        """Start the biases of the elements there."""
        with torch.no_grad():
            self.species_bias[:, 0] = bias

    def element_vectors(self) -> Tensor:
        """Return the weights that depend on an atom's element: of every layer's products."""
        layers: Any = self.layers
        return torch.cat([layer.update.species.weight for layer in layers], dim=1).detach()

    def bytes_per_function(self, n_atoms: int, n_slots: int) -> float:
        """Estimate what one more function takes: per atom and channel so many numbers for each slot and for its own tensors."""
        shape, size = self.shape, self.isolated.new_empty((), dtype=self.dtype).element_size()
        degrees = shape.l_features + 1
        if self.centred:
            per_atom = n_slots * degrees + 4 * degrees**2 + 4 * shape.n_layers
        else:  # automatic differentiation keeps the way there as well
            per_atom = shape.n_layers * (n_slots * (degrees * (shape.l_max + 1) + 4 * degrees**2) + 12 * 50)
        return float(n_atoms * shape.n_channels * per_atom * size)

    def gradients(self, vec: Tensor, graph: GraphInputs) -> Gradients:
        """Return energies and gradients of one function, by hand where nothing within the network is dropped."""
        site: Any = self.correction
        if site.active or any(inner.active for inner in self.inner_sites.values()):
            return super().gradients(vec, graph)
        (energies, gradient), _ = self.centred_gradients(vec, graph, site.weight.new_zeros((1, *site.weight.shape)))
        return Gradients(energies[0], gradient[0])

    @torch.no_grad()
    def centred_gradients(self, vec: Tensor, graph: GraphInputs, weights: Tensor) -> tuple[Gradients, Tensor]:
        """Return energies, gradients and features of K functions that differ in ``weights`` (K, R, F), by hand."""
        r = lengths(vec)
        told = self.told(vec, r, graph) if self.approach.near(r, graph.species, graph.nbr) else vec
        one_hot, slopes = self.one_hot(graph, vec.dtype), self.pairs.with_slopes(told)
        layers: Any = self.layers
        readouts: Any = self.readouts
        x, products, tape = layers[0](slopes.pairs, one_hot, graph)
        energy, features, tapes = self.readouts[0](x[0]), [products], [tape]
        for layer, readout in zip(layers[1:], self.readouts[1:], strict=True):
            x, products, tape = layer(x, slopes.pairs, one_hot, graph, blocked=True)
            energy = energy + readout(x[0])
            features.append(products)
            tapes.append(tape)
        before = self.hidden(x[0]) + self.hidden_bias
        gate = torch.sigmoid(before)
        hidden, rise = before * gate, gate * (1 + before * (1 - gate))
        energy = energy + self.output(hidden) + one_hot @ self.species_bias
        every = torch.cat([*features, hidden], dim=-1)
        own = self._weights_by_atom(weights, graph)
        energies = (energy + (own @ every[..., None])[..., 0]).T
        share = None
        if (presence := self.presence) is not None:
            share, by_share = with_slopes(lambda r: presence(r, graph.species, graph.nbr, self.cutoff), r)
            own = own * share[:, None, None]
        seed = vec.new_ones(len(vec)) if share is None else share
        *by_products, by_hidden = own.split([p.shape[1] for p in (*features, hidden)], -1)
        by_hidden = (by_hidden + seed[:, None, None] * self.output.weight[:, 0]) * rise[:, None]
        into = [seed[:, None, None] * readout.weight[:, 0] for readout in readouts]
        back = (self.hidden.back(by_hidden) + into[-1])[None]
        gradient = back.new_zeros(len(weights), *vec.shape)
        for t in reversed(range(1, len(layers))):
            back = layers[t].back(tapes[t], slopes, one_hot, graph, back, by_products[t], gradient)
            back[0] += into[t - 1]
        layers[0].back(tapes[0], slopes, one_hot, graph, back, by_products[0], gradient)
        if told is not vec:
            gradient = self._by_true_vectors(gradient, vec, r, graph)
        unit = vec / r[..., None]
        if share is not None:
            gradient.addcmul_(energies[:, :, None, None], by_share[..., None] * unit)
            energies, every = energies * share, every * share[:, None]
        energies = energies * self.energy_scale
        gradient.mul_(self.energy_scale)
        if (repulsion := self.repulsion) is not None:
            below, steep = with_slopes(lambda r: repulsion(r, graph.species, graph.nbr, self.cutoff), r)
            energies = energies + below
            gradient.add_(steep[..., None] * unit)
        return Gradients(energies, gradient), every

    def _by_true_vectors(self, gradient: Tensor, vec: Tensor, r: Tensor, graph: GraphInputs) -> Tensor:
        """Return the gradient (K, N, M, 3) by the true pair vectors, from that by those that the network is told."""
        told, slope = with_slopes(lambda r: self.approach(r, graph.species, graph.nbr), r)
        ratio, unit = told / r, vec / r[..., None]
        along = (gradient * unit).sum(-1, keepdim=True) * ((slope - ratio)[..., None] * unit)
        return gradient * ratio[..., None] + along

    def _weights_by_atom(self, weights: Tensor, graph: GraphInputs) -> Tensor:
        """Return what is added to the trained weights of each atom's features, shape (N, K, F)."""
        site: Any = self.correction
        if self._corrected:
            weights = weights + site.weight
        by_element = torch.einsum("sr,krf->skf", self.basis, weights)
        return by_element[graph.species]
