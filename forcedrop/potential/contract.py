r"""The contract of a network: what forcedrop needs of it to train, calibrate, drive and flag, and nothing more.

An :class:`EnergyModel` turns pair vectors and neighbour lists into an energy for every atom. A network of your own is a subclass
with a ``Shape`` (a frozen dataclass of its settings) and one method, :meth:`EnergyModel.read`; everything else has defaults:

* ``read(vec, graph)`` → the energy of every atom above its isolated one, in units of ``energy_scale``, and the *features* that it
  is read from linearly, (N, F), or None where there are none (then neither exact dropout nor a posterior is possible);
* ``read_weights()`` → the weights (F,) with which ``read`` reads the features;
* ``set_rates`` for dropout sites of its own, ``element_vectors`` for similar elements, ``offset`` for a bias of each element.

In its ``__init__`` it calls ``add_correction(F)`` if it has features, and ``add_edges()`` and ``cut`` for edge dropout. Training
steps weights that are matrices with Muon, but those whose name ends in ``species.weight``.

**Functions.** Dropout sites are layers of ``forcedrop.dropout``; ``frozen(network, seed, k)`` is function k. Every network with
features has one site: ``correction``, an :class:`~forcedrop.dropout.ExactDropout` that adds to the weights of the features what
regression found for the plain network (``weight``), and for function k its own (``bank[k]``). Where this is the only one
(``centred``), the plain network is the mean of all functions, for every property.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from forcedrop.dropout import DropoutSite, EdgeCutDropout, ExactDropout, SphericalDropout, frozen
from forcedrop.graph import Batch
from forcedrop.potential.limits import ClosestApproach, Presence, filled
from forcedrop.potential.linear import SphereNorm
from forcedrop.potential.repulsion import Repulsion, TightBindingRepulsion, ZBLRepulsion


@dataclass(frozen=True)
class DropoutRates:
    """The rate of each kind of site in training, each in [0, 1).

    Attributes:
        edge: of a pair of elements to be cut at a radius, see :class:`~forcedrop.dropout.EdgeCutDropout`.
        message: of a channel of what atoms send.
        update: of a channel of what a layer adds.
        readout: of a hidden channel of the last readout.
    """

    edge: float = 0.0
    message: float = 0.0
    update: float = 0.0
    readout: float = 0.0


class NetworkShape(Protocol):
    """The settings of a kind of network: a frozen dataclass with at least a cutoff [Å]."""

    @property
    def cutoff(self) -> float:
        """Beyond it atoms do not see each other [Å]."""
        ...


class GraphInputs(NamedTuple):
    """What a network needs of a batch besides the pair vectors, as plain tensors (see ``forcedrop.graph``).

    Attributes:
        species: place of every atom's element among the network's, shape (N,).
        batch: the structure that every atom belongs to, shape (N,).
        nbr: the neighbour in each slot, shape (N, M).
        reverse: flat index of the reversed pair, shape (N, M).
        n_graphs: number of structures.
    """

    species: Tensor
    batch: Tensor
    nbr: Tensor
    reverse: Tensor
    n_graphs: int


class Gradients(NamedTuple):
    """Energies of the atoms [eV], shape (…, N), and the gradients of their sum by the pair vectors [eV/Å], (…, N, M, 3)."""

    energies: Tensor
    gradient: Tensor


def lengths(vec: Tensor) -> Tensor:
    """Return the lengths (N, M) of pair vectors (N, M, 3)."""
    return vec.square().sum(-1).sqrt()


def repulsion_of(shape: NetworkShape, elements: Sequence[int]) -> Repulsion | None:
    """Return the repulsion below a network of this shape, if any.

    Raises:
        ValueError: if two are asked for.
    """
    zbl, own = getattr(shape, "zbl", False), getattr(shape, "repulsion", False)
    if zbl and own:
        raise ValueError("`zbl` is another repulsion than the one by default: with it, set `repulsion: false`")
    return ZBLRepulsion(elements) if zbl else TightBindingRepulsion(elements) if own else None


MOST_EXACT = 5
"""Elements up to which every one has weights of its own; beyond, they share as many directions, see :func:`element_basis`."""


class EnergyModel(nn.Module):
    """A network that gives every atom an energy; base of all kinds, see the module's page.

    Args:
        shape: its settings.
        elements: atomic numbers it knows, ascending.
        isolated_energies: energy of each isolated atom [eV] by atomic number; 0 where not given.
        energy_scale: the energy [eV] of one unit of output, of the order of the forces' root mean square times 1 Å.
    """

    kind: ClassVar[str]
    Shape: ClassVar[type[Any]]

    isolated: Tensor
    energy_scale: Tensor
    species_of_z: Tensor
    basis: Tensor

    def __init__(
        self,
        shape: NetworkShape,
        elements: tuple[int, ...],
        isolated_energies: Mapping[int, float] | None = None,
        energy_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.shape, self.elements, self.cutoff = shape, tuple(elements), float(shape.cutoff)
        isolated_energies = isolated_energies or {}
        isolated = torch.tensor([isolated_energies.get(z, 0.0) for z in elements], dtype=torch.float64)
        self.register_buffer("isolated", isolated)
        self.register_buffer("energy_scale", torch.tensor(float(energy_scale)))
        lookup = torch.full((max(elements) + 1,), -1)
        lookup[list(elements)] = torch.arange(len(elements))
        self.register_buffer("species_of_z", lookup, persistent=False)
        self.repulsion = repulsion_of(shape, elements)
        self.presence: Presence | None = Presence(elements)
        self.approach = ClosestApproach(len(elements))
        self.correction: ExactDropout | None = None
        self.edges: EdgeCutDropout | None = None
        self._corrected = False

    # what a kind of network says

    def read(self, vec: Tensor, graph: GraphInputs) -> tuple[Tensor, Tensor | None]:
        """Return every atom's energy in units of ``energy_scale``, (N,), and the features it is read from linearly, (N, F).

        Args:
            vec: vectors to the neighbours in each slot [Å], shape (N, M, 3); beyond the cutoff where the slot is empty.
            graph: the rest of the batch.
        """
        raise NotImplementedError

    def read_weights(self) -> Tensor:
        """Return the weights (F,) with which :meth:`read` reads the features."""
        raise NotImplementedError

    def measure(self, vec: Tensor, graph: GraphInputs) -> None:
        """Measure and store every root mean square (``SphereNorm``) on one batch of data, before training, in one pass."""
        norms = [m for m in self.modules() if isinstance(m, SphereNorm)]
        for norm in norms:
            norm.measuring = True
        try:
            with torch.no_grad():
                self(vec, graph)
        finally:
            for norm in norms:
                norm.measuring = False

    def measure_centres(self, vec: Tensor, graph: GraphInputs) -> None:
        """Measure and store what masks act about, now and then in training: the mean over each element's atoms, without masks."""
        sites = [m for m in self.modules() if isinstance(m, SphericalDropout) and m.centre is not None]
        hooks = [site.register_forward_pre_hook(lambda own, args: own.centre_on(*args)) for site in sites]
        try:
            with torch.no_grad():
                self(vec, graph)
        finally:
            for hook in hooks:
                hook.remove()

    def set_rates(self, rates: DropoutRates) -> None:
        """Set the rates of the dropout sites within the network.

        Raises:
            ValueError: for a rate above 0 of a kind of site that this network does not have.
        """
        if asked := [name for name, rate in asdict(rates).items() if rate]:
            raise ValueError(f"a network of kind {self.kind!r} has no dropout sites of kind {', '.join(asked)}")

    def offset(self, bias: Tensor) -> None:
        """Add to the energies of each element's atoms, shape (elements,), in units of ``energy_scale``.

        Where the network's own bias starts: at what a least-squares fit of the training energies leaves.
        """

    def element_vectors(self) -> Tensor | None:
        """Return what the network has learned about each element, shape (elements, …); None if that is nothing."""
        return None

    def bytes_per_function(self, n_atoms: int, n_slots: int) -> float:
        """Estimate what one more function takes on the way back, in bytes."""
        return 4.0 * sum(p.numel() for p in self.parameters()) + 400.0 * n_atoms * n_slots

    # what follows from it

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.isolated.device

    def settings(self) -> dict[str, Any]:
        """Return the settings of its shape by name."""
        shape: Any = self.shape
        return asdict(shape)

    @property
    def n_features(self) -> int:
        """Number F of features that energies are read from, 0 if there are none."""
        return 0 if self.correction is None else self.correction.weight.shape[1]

    @property
    def inner_sites(self) -> dict[str, DropoutSite]:
        """The dropout sites within the network, by name: all but ``correction``."""
        return {
            name: module
            for name, module in self.named_modules()
            if isinstance(module, DropoutSite) and module is not self.correction
        }

    @property
    def centred(self) -> bool:
        """Whether functions differ in the weights of the features alone: then the plain network is the mean of all."""
        inner = any(site.p or len(getattr(site, "bank", ())) for site in self.inner_sites.values())
        return self.correction is not None and self.correction.n_functions > 0 and not inner

    @property
    def n_functions(self) -> int | None:
        """Number of functions; 0 if there are none, None if any number can be drawn."""
        found: list[Any] = [getattr(site, "bank", ()) for site in self._sites()]
        banks = [len(bank) for bank in found if len(bank)]
        if banks:
            return min(banks)
        return None if any(site.p for site in self.inner_sites.values()) else 0

    def _sites(self) -> list[DropoutSite]:
        return [module for module in self.modules() if isinstance(module, DropoutSite)]

    def add_correction(self, n_features: int, sets: int | None = None) -> None:
        """Make the site that adds to the weights of F features; to be called by networks that have them, in ``__init__``.

        Args:
            n_features: F.
            sets: R, how many sets of weights there are; by default one for each element, up to :data:`MOST_EXACT`.
        """
        n = min(len(self.elements), sets or MOST_EXACT)
        self.correction = ExactDropout(n_features, n, 0.0, bias=False)
        self.correction.weight.requires_grad_(False).zero_()
        self.register_buffer("basis", torch.eye(len(self.elements), n))

    def add_edges(self) -> None:
        """Make the site of edge dropout: cut radii for each pair of elements."""
        first = min(1.8, 0.5 * self.cutoff)
        self.edges = EdgeCutDropout(len(self.elements) ** 2, self.cutoff, 0.0, first=first)

    def cut(self, radial: Tensor, r: Tensor, graph: GraphInputs) -> Tensor:
        """Return radial functions (N, M, n) of distances (N, M) [Å], faded out where edge dropout cuts pairs."""
        if self.edges is None or not self.edges.active:
            return radial
        own, other = graph.species[:, None], graph.species[graph.nbr]
        kind = torch.minimum(own, other) * len(self.elements) + torch.maximum(own, other)
        return radial * self.edges(r, kind)[..., None]

    def set_functions(self, weight: Tensor | None, bank: Tensor | None, basis: Tensor | None = None) -> None:
        """Set what regression added to the weights of the features, and what each function adds to that.

        Args:
            weight: shape (R, F); 0 if None.
            bank: deviations from ``weight``, shape (K, R, F); no functions if None.
            basis: how much of each of the R weights an element has, shape (elements, R); kept if None.

        Raises:
            ValueError: if the network has no features, or the shapes do not fit it.
        """
        if self.correction is None:
            raise ValueError(f"a network of kind {self.kind!r} has no features that its energy is read from linearly")
        site, like = self.correction, self.correction.weight
        bank = like.new_zeros((0, *like.shape)) if bank is None else bank.to(like)
        if bank.shape[1:] != like.shape or (weight is not None and weight.shape != like.shape):
            raise ValueError(f"functions of shape {tuple(bank.shape)} do not fit weights of shape {tuple(like.shape)}")
        with torch.no_grad():
            like.copy_(torch.zeros_like(like) if weight is None else weight)
        site.bank = bank
        if basis is not None:
            self.basis = basis.to(self.basis)
        self._note_correction()

    def forget_functions(self) -> None:
        """Take away the functions and what regression found, and set all rates to 0: the network as its training left it."""
        for site in self.inner_sites.values():
            site.p = 0.0
            bank: Any = getattr(site, "bank", None)
            if bank is not None:
                site.bank = bank[:0]
        if self.correction is not None:
            self.set_functions(None, None)

    def _note_correction(self) -> None:
        self._corrected = self.correction is not None and bool(self.correction.weight.any())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        weight = state_dict.get(f"{prefix}correction.weight")
        self._corrected = weight is not None and bool(weight.any())

    def _apply(self, fn: Any, recurse: bool = True) -> EnergyModel:
        """Move or cast the module, but keep the isolated-atom energies in float64: they are large."""
        isolated = self.isolated
        super()._apply(fn, recurse)
        self.isolated = isolated.to(self.isolated.device)
        return self

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
            raise ValueError(f"atom {atom} has atomic number {int(z[atom])}; the model knows {list(self.elements)}")
        return GraphInputs(species, batch.batch, batch.nbr, batch.nbr_reverse, batch.num_graphs)

    def isolated_energy(self, species: Tensor) -> Tensor:
        """Return the isolated-atom energy of every atom [eV], float64, shape (N,)."""
        return self.isolated[species]

    def one_hot(self, graph: GraphInputs, dtype: torch.dtype) -> Tensor:
        """Return the elements of the atoms, shape (N, elements)."""
        return nn.functional.one_hot(graph.species, len(self.elements)).to(dtype)

    def forward(self, vec: Tensor, graph: GraphInputs) -> Tensor:
        """Return the energy of every atom above its isolated energy [eV], shape (N,), of the plain network or a frozen function.

        Arguments as in :meth:`read`.
        """
        r = lengths(vec)
        energy, features = self.read(self.told(vec, r, graph), graph)
        site = self.correction
        if features is not None and site is not None and (self._corrected or site.active):
            energy = energy + (site(features) * self.basis[graph.species]).sum(-1)
        if self.presence is not None:
            energy = energy * self.presence(r, graph.species, graph.nbr, self.cutoff)
        energy = energy * self.energy_scale
        return energy if self.repulsion is None else energy + self.repulsion(r, graph.species, graph.nbr, self.cutoff)

    def told(self, vec: Tensor, r: Tensor, graph: GraphInputs) -> Tensor:
        """Return the pair vectors (N, M, 3) that the network is told [Å], of the true ones and their lengths (N, M).

        They differ where atoms are closer than any in training (``limits.ClosestApproach``).
        """
        if not self.approach.known:
            return vec
        told: Tensor = self.approach(r, graph.species, graph.nbr)
        return vec * (told / r)[..., None]

    def features(self, vec: Tensor, graph: GraphInputs) -> Tensor:
        """Return what an atom's energy is read from linearly, shape (N, F), in units of which the energy is ``energy_scale``.

        Raises:
            ValueError: if there is nothing.
        """
        r = lengths(vec)
        found = self.read(self.told(vec, r, graph), graph)[1]
        if found is None:
            raise ValueError(f"a network of kind {self.kind!r} has no features that its energy is read from linearly")
        if self.presence is None:
            return found
        return found * self.presence(r, graph.species, graph.nbr, self.cutoff)[:, None]

    def energies_of(self, features: Tensor, graph: GraphInputs) -> Tensor:
        """Return what every function of the bank adds to the plain energies of the atoms [eV], shape (B, N), from features."""
        site: Any = self.correction
        values = (features @ site.bank.flatten(0, 1).T).unflatten(1, site.bank.shape[:2])
        return (values * self.basis[graph.species][:, None]).sum(-1).T * self.energy_scale

    def gradients(self, vec: Tensor, graph: GraphInputs) -> Gradients:
        """Return energies and gradients of one function: the plain network, or that to which it is frozen."""
        with torch.enable_grad():
            leaf = vec.detach().requires_grad_(True)
            energies = self(leaf, graph)
            (gradient,) = torch.autograd.grad(energies.sum(), leaf)
        return Gradients(energies.detach(), gradient)

    def function_gradients(self, vec: Tensor, graph: GraphInputs, samples: Tensor, seed: int = 0) -> Gradients:
        """Return energies and gradients of K functions at once, those of the indices ``samples`` (K,)."""

        def total(vec: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
            with frozen(self, seed, sample):
                local = self(vec, graph)
            return local.sum(), local

        per_function = torch.func.vmap(torch.func.grad(total, has_aux=True), in_dims=(None, 0))
        gradient, local = per_function(vec, samples)
        return Gradients(local, gradient)

    def centred_gradients(self, vec: Tensor, graph: GraphInputs, weights: Tensor) -> tuple[Gradients, Tensor]:
        """Return the same of K functions that differ from the plain network in ``weights`` (K, R, F) alone, and the features.

        One way back after the other: in a shared pass (``vmap``) a processor copies for each function what all have in common.
        """
        with torch.enable_grad():
            leaf = vec.detach().requires_grad_(True)
            features, local = self.features(leaf, graph), self(leaf, graph)
            (common,) = torch.autograd.grad(local.sum(), leaf)
        own = torch.einsum("sr,krf->ksf", self.basis, weights)[:, graph.species] * self.energy_scale
        rows = [torch.autograd.grad(features, leaf, row, retain_graph=True)[0] for row in own]
        found = features.detach()
        return Gradients(local.detach() + (own * found).sum(-1), common + torch.stack(rows)), found

    def set_shortest(self, shortest: Mapping[tuple[int, int], float]) -> None:
        """Set the shortest distance in training [Å] of pairs of elements, by their two atomic numbers in either order.

        What was set before stays where it is shorter. Pairs that never met have 1.3 times the sum of their covalent radii.
        """
        place = {z: i for i, z in enumerate(self.elements)}
        table = self.approach.shortest.clone()
        for (a, b), r in shortest.items():
            i, j = place[a], place[b]
            old = float(table[i, j])
            table[i, j] = table[j, i] = min(r, old) if old else r
        self.approach.set(filled(table, self.elements))

    def extra_repr(self) -> str:
        """Say the elements and the number of parameters."""
        n = sum(p.numel() for p in self.parameters())
        return f"elements={list(self.elements)}, cutoff={self.cutoff} Å, parameters={n}"
