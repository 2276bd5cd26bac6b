r"""The potential: products on the sphere, with dropout sites.

A graph and (optionally) masks go in, an energy per atom comes out. Nothing here draws a random number or differentiates.

Layer 0 sums B_n(r) Y_lm(r̂) over the neighbours of each element; the weights act on that small array, per atom. Later layers
carry scalars, vectors and tensors (l ≤ 2) of the neighbours the same way. In each layer three fields per channel are multiplied
pointwise on a grid of the sphere and integrated: invariants of body order up to 4 per layer, exactly equivariant (see
``layers.py``).

Dropout sites (``Potential.sites``): ``layers.t.edges`` one bit per undirected pair; ``layers.t.message`` and
``layers.t.update`` one bit per channel of what a later layer sends and adds, ``readout.hidden`` one bit per hidden channel. A
mask multiplies a *branch*, never the stream of features itself; it is the same for every atom of a structure, so each mask is
one smooth, conservative and extensive potential.

What an atom's energy could be read from linearly, the invariant products of every layer and the hidden channels of the last
(``Potential.features``), may have weights of its own for every element, found by regression after training
(``Potential.refit``), and their posterior (``Potential.posterior``): a sample then adds a random vector to them,
``READOUT_SHIFT`` among the masks, and is no less a smooth potential. Or these weights are learned (``Potential.heads``): a
shallow ensemble.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch_geometric.data import Batch

from forcedrop.potential.layers import (
    CentredMask,
    Linear,
    Message,
    PairFunctions,
    PairGeometry,
    SphereNorm,
    TensorLinear,
    Update,
    by_degree,
    spread_mask,
)
from forcedrop.potential.radial import BesselBasis
from forcedrop.potential.zbl import ZBLRepulsion


@dataclass(frozen=True)
class DropoutRates:
    """The rate of each kind of site, each in [0, 1); a site with rate 0 does not exist."""

    edge: float = 0.0
    message: float = 0.0
    update: float = 0.0
    readout: float = 0.0


@dataclass(frozen=True)
class PotentialConfig:
    """Everything that fixes the shape of a network.

    Attributes:
        elements: atomic numbers it knows, ascending.
        cutoff: [Å].
        n_channels: channels C of features and fields.
        n_layers: message-passing layers.
        l_max: highest l of the fields on the sphere.
        l_message: highest l of an atom's features, which it sends to its neighbours; ``l_max`` if that is lower.
        n_radial: Bessel functions.
        cutoff_power: p of the polynomial cutoff; the lower, the more near neighbours weigh.
        n_hidden: hidden channels of the last readout.
        zbl: whether the short-range ZBL repulsion is added.
        n_heads: readouts of a shallow ensemble; 0 for none.
        dropout: the rates of the dropout sites.
    """

    elements: tuple[int, ...]
    cutoff: float = 5.0
    n_channels: int = 64
    n_layers: int = 2
    l_max: int = 3
    l_message: int = 2
    n_radial: int = 6
    cutoff_power: int = 6
    n_hidden: int = 64
    zbl: bool = False
    n_heads: int = 0
    dropout: DropoutRates = field(default_factory=DropoutRates)

    @property
    def l_features(self) -> int:
        """Highest l of an atom's features."""
        return min(self.l_message, self.l_max)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists, for a checkpoint."""
        return {**asdict(self), "elements": list(self.elements)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PotentialConfig:
        """Undo :meth:`to_dict`."""
        values = dict(values)
        return cls(**{**values, "elements": tuple(values["elements"]), "dropout": DropoutRates(**values["dropout"])})


READOUT_SHIFT = "readout.shift"
"""Name, among the masks, of what a sample adds to the weights that the energy is read from, shape (F,) or (N, F)."""


HIDDEN = "readout.hidden"
"""Name of the mask of the last readout's hidden channels."""


class Site(NamedTuple):
    """A place where a mask multiplies: its name, its rate, and its channels (0 for a mask over edges)."""

    name: str
    rate: float
    n_channels: int


class GraphInputs(NamedTuple):
    """What the network needs of a batch besides the pair vectors, as plain tensors (see ``forcedrop.graph``)."""

    species: Tensor
    batch: Tensor
    nbr: Tensor
    reverse: Tensor
    n_graphs: int


Masks = Mapping[str, Tensor]
"""Site name → mask: (C,) or (N, C) for channels, (N, M) for edges; ``READOUT_SHIFT`` → (F,) or (N, F)."""


class Layer(nn.Module):
    """One round: fields on the sphere from the neighbours, products, and the branch that results."""

    def __init__(self, config: PotentialConfig, first: bool, last: bool) -> None:
        super().__init__()
        c, n_species, l_in = config.n_channels, len(config.elements), config.l_features
        if first:
            self.norm = SphereNorm(config.l_max)
            self.fields = TensorLinear([config.n_radial * n_species] * (config.l_max + 1), 3 * c)
        else:
            self.message = Message(c, config.n_radial, config.l_max, l_in)
            self.fields = TensorLinear([2 * c] * (l_in + 1) + [c] * (config.l_max - l_in), 3 * c)
            self.skip = Linear(c, c)
            self.mask = CentredMask(n_species, c)
        self.update = Update(n_species, c, config.l_max, 0 if last else l_in)


class Potential(nn.Module):
    """The network: (pair vectors, graph, masks) → interaction energy per atom [eV].

    Args:
        config: its shape.
        isolated_energies: energy of each isolated atom [eV] by atomic number; 0 where not given.
        energy_scale: the energy [eV] of one unit of output, of the order of the forces' root mean square times 1 Å.
    """

    isolated: Tensor
    energy_scale: Tensor
    species_of_z: Tensor
    posterior: Tensor | None
    refit: Tensor | None

    def __init__(
        self,
        config: PotentialConfig,
        isolated_energies: Mapping[int, float] | None = None,
        energy_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.config = config
        c = config.n_channels
        n_species = len(config.elements)
        self.pairs = PairFunctions(BesselBasis(config.n_radial, config.cutoff, config.cutoff_power), config.l_max)
        last = config.n_layers - 1
        self.layers = nn.ModuleList(Layer(config, t == 0, t == last) for t in range(config.n_layers))
        # readouts start small: a random energy landscape is a worse start than a nearly flat one
        self.readouts = nn.ModuleList(Linear(c, 1, gain=0.1) for _ in range(config.n_layers))
        self.hidden = Linear(c, config.n_hidden)
        self.hidden_bias = nn.Parameter(torch.zeros(config.n_hidden))
        self.mask = CentredMask(n_species, config.n_hidden)
        self.output = Linear(config.n_hidden, 1, gain=0.1)
        self.species_bias = nn.Parameter(torch.zeros(n_species, 1))
        self.zbl = ZBLRepulsion(config.elements) if config.zbl else None
        isolated_energies = isolated_energies or {}
        isolated = torch.tensor([isolated_energies.get(z, 0.0) for z in config.elements], dtype=torch.float64)
        self.register_buffer("isolated", isolated)
        self.register_buffer("energy_scale", torch.tensor(float(energy_scale)))
        lookup = torch.full((max(config.elements) + 1,), -1)
        lookup[list(config.elements)] = torch.arange(n_species)
        self.register_buffer("species_of_z", lookup, persistent=False)
        self.register_buffer("posterior", None)
        self.register_buffer("refit", None)
        heads = torch.randn(config.n_heads, self.n_readout) * (0.1 / math.sqrt(c))
        self.heads = nn.Parameter(heads) if config.n_heads else None

    def _apply(self, fn: Any, recurse: bool = True) -> Potential:
        """Move or cast the module, but keep the isolated-atom energies in float64: they are large."""
        isolated = self.isolated
        super()._apply(fn, recurse)
        self.isolated = isolated.to(self.isolated.device)
        return self

    @property
    def n_readout(self) -> int:
        """Number F of weights that a sample may shift: of each element, one for each of :meth:`features`."""
        config = self.config
        return len(config.elements) * (3 * config.n_layers * config.n_channels + config.n_hidden)

    @property
    def has_samples(self) -> bool:
        """Whether there is anything to sample: a dropout site, a posterior of what it is read from, or heads."""
        return bool(self.sites) or self.posterior is not None or self.heads is not None

    def shifts(self, n_heads: int) -> Tensor:
        """Return what the first heads of a shallow ensemble add to the weights, about their mean, shape (n_heads, F).

        Raises:
            ValueError: if there are not so many.
        """
        if self.heads is None or n_heads > len(self.heads):
            raise ValueError(f"this network has {self.config.n_heads} heads, asked for {n_heads} samples")
        chosen = self.heads[:n_heads]
        return chosen - chosen.mean(0)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The dropout sites with a rate above 0."""
        rates, c = self.config.dropout, self.config.n_channels
        found = []
        for t in range(self.config.n_layers):
            found.append(Site(f"layers.{t}.edges", rates.edge, 0))
            if t > 0:
                every = c * (self.config.l_features + 1)
                found.append(Site(f"layers.{t}.message", rates.message, every))
                found.append(Site(f"layers.{t}.update", rates.update, c if t == self.config.n_layers - 1 else every))
        found.append(Site(HIDDEN, rates.readout, self.config.n_hidden))
        return tuple(site for site in found if site.rate > 0)

    def inputs(self, batch: Batch) -> GraphInputs:
        """Translate a batch of graphs.

        Raises:
            ValueError: if the batch holds an element that the model does not know.
        """
        known = self.species_of_z
        z = batch.z
        bad = (z < 0) | (z >= known.shape[0])
        species = torch.where(bad, torch.full_like(z, -1), known[torch.where(bad, torch.zeros_like(z), z)])
        if not torch.compiler.is_compiling() and bool((species < 0).any()):
            atom = int((species < 0).nonzero()[0, 0])
            raise ValueError(
                f"atom {atom} has atomic number {int(z[atom])}; the model knows {list(self.config.elements)}"
            )
        return GraphInputs(species, batch.batch, batch.nbr, batch.nbr_reverse, batch.num_graphs)

    def isolated_energy(self, species: Tensor) -> Tensor:
        """Return the isolated-atom energy of every atom [eV], float64, shape (N,)."""
        return self.isolated[species]

    def forward(self, vec: Tensor, graph: GraphInputs, masks: Masks | None = None) -> Tensor:
        """Return the energy of every atom above its isolated energy [eV], shape (N,).

        Args:
            vec: vectors to the neighbours in each slot [Å], shape (N, M, 3); beyond the cutoff where the slot is empty.
            graph: the rest of the batch.
            masks: one mask per site; none is the plain (weight-scaled) network.
        """
        masks = masks or {}
        one_hot, energy, features = self._read(vec, graph, masks)
        shift = masks.get(READOUT_SHIFT)
        if self.refit is not None:
            shift = self.refit if shift is None else self.refit + shift
        if shift is not None:
            shift = shift.unflatten(-1, (len(self.config.elements), -1))
            own = one_hot @ shift if shift.dim() == 2 else (one_hot[..., None] * shift).sum(1)
            energy = energy + (features * own).sum(-1)
        energy = energy * self.energy_scale
        if self.zbl is not None:
            energy = energy + self.zbl(vec, graph.species, graph.nbr, self.config.cutoff)
        return energy

    def features(self, vec: Tensor, graph: GraphInputs) -> Tensor:
        """Return what an atom's energy could be read from linearly, shape (N, F / number of elements).

        The invariant products of every layer and the hidden channels of the last, without masks; in units of which the energy
        is ``energy_scale``.
        """
        return self._read(vec, graph, {})[2]

    def _read(self, vec: Tensor, graph: GraphInputs, masks: Masks) -> tuple[Tensor, Tensor, Tensor]:
        """Return the elements (N, n_species), the energies (N,) in units of ``energy_scale``, and :meth:`features`."""
        one_hot = nn.functional.one_hot(graph.species, len(self.config.elements)).to(vec.dtype)
        pairs = self.pairs(vec)
        x = energy = vec.new_zeros(())
        features = []
        layers: Any = self.layers
        for t, layer in enumerate(layers):
            edges = masks.get(f"layers.{t}.edges")
            carried = pairs if edges is None else pairs._replace(radial=pairs.radial * edges[..., None])
            if t == 0:
                x, products = layer.update(element_fields(layer, carried, one_hot, graph), one_hot)
            else:
                mask = masks.get(f"layers.{t}.message")
                fields = message_fields(layer, layer.message(x, carried, graph.nbr, graph.reverse, mask), x)
                branch, products = layer.update(fields, one_hot)
                x = self._add(layer, x, branch, one_hot, masks.get(f"layers.{t}.update"))
            energy = energy + self.readouts[t](x[0])
            features.append(products)
        hidden = nn.functional.silu(self.hidden(x[0]) + self.hidden_bias)
        hidden = self.mask(hidden, one_hot, masks.get(HIDDEN))
        energy = (energy + self.output(hidden) + one_hot @ self.species_bias)[:, 0]
        return one_hot, energy, torch.cat([*features, hidden], dim=-1)

    @staticmethod
    def _add(layer: Any, x: Tensor, branch: Tensor, one_hot: Tensor, mask: Tensor | None) -> Tensor:
        """Return the features ((L+1)², N, C) with the branch added; in the last layer, whose branch has scalars alone, these."""
        c = branch.shape[-1]
        scalars, tensors = branch[0], branch[1:]
        added = layer.skip(x[0]) + layer.mask(scalars, one_hot, None if mask is None else mask[..., :c])
        if not len(tensors):
            return added[None]
        if mask is not None:
            tensors = tensors * spread_mask(mask, layer.message.index, c)[1:]
        return torch.cat([added[None], x[1:] + tensors])

    def measure_norms(self, batch: Batch, vec: Tensor) -> None:
        """Measure and store every root mean square on one batch of data, layer after layer, in one pass."""
        self._measure(SphereNorm, vec, self.inputs(batch))

    def measure_centres(self, graph: GraphInputs, vec: Tensor) -> None:
        """Measure and store what masks act about: the mean over each element's atoms in one batch of data, without masks."""
        self._measure(CentredMask, vec, graph)

    def _measure(self, kind: type[SphereNorm] | type[CentredMask], vec: Tensor, graph: GraphInputs) -> None:
        modules = [m for m in self.modules() if isinstance(m, kind)]
        for module in modules:
            module.measuring = True
        try:
            with torch.no_grad():
                self(vec, graph)
        finally:
            for module in modules:
                module.measuring = False

    def extra_repr(self) -> str:
        """Say the elements and the number of parameters."""
        n = sum(p.numel() for p in self.parameters())
        return f"elements={list(self.config.elements)}, cutoff={self.config.cutoff} Å, parameters={n}"


def spread_elements(radial: Tensor, one_hot: Tensor, nbr: Tensor) -> Tensor:
    """Return radial functions (N, M, n) in the columns of the neighbour's element, 0 elsewhere, (N, M, n × elements)."""
    return (radial[..., :, None] * one_hot[nbr][..., None, :]).flatten(2)


def element_fields(layer: Any, pairs: PairGeometry, one_hot: Tensor, graph: GraphInputs) -> Tensor:
    """Return the fields (S, N, 3C) from the neighbours of each element, known by their radial functions alone."""
    by_element = spread_elements(pairs.radial, one_hot, graph.nbr)
    return layer.fields(by_degree(layer.norm((pairs.sphere @ by_element).transpose(0, 1))))


def message_fields(layer: Any, sums: Tensor, x: Tensor) -> Tensor:
    """Return the fields (S, N, 3C) from the sums of the messages (S, N, C), joined by the atom's own features."""
    parts, own = by_degree(sums), by_degree(x)
    return layer.fields([torch.cat([a, b], -1) for a, b in zip(parts, own, strict=False)] + parts[len(own) :])


def require_samples(potential: Potential) -> None:
    """Say so if there is nothing to sample.

    Raises:
        ValueError: if the network has no dropout site with a rate above 0, no posterior of its readouts and no heads.
    """
    if not potential.has_samples:
        raise ValueError(
            "this network has no dropout site (all rates are 0) and no posterior of its readouts: it cannot give error bars"
        )
