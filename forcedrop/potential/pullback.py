r"""Energies and gradients of many samples at once, where they differ only at the end of the network.

Samples of a posterior or a shallow ensemble differ in the weights that the energy is read from (``READOUT_SHIFT``); masks of the
last layer's update and of the hidden channels come late too. Such samples share the forward pass but for its end, the geometry
and its derivatives. What is left of each is the way back through products, fields and messages to the pair vectors. It is
linear, and is written out here for all samples at once, so that every step is a large matrix product or one pass over memory;
automatic differentiation repeats small steps for each sample.

The network itself is in ``network.py`` and ``layers.py``; tests hold the two against each other. Layouts: (S, N, K, C),
components first, where maps between channels are undone; (N, S, K, C) where messages are, a block of atoms at a time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from forcedrop.potential.layers import Message, PairGeometry, TensorLinear, Update, by_degree
from forcedrop.potential.network import (
    HIDDEN,
    READOUT_SHIFT,
    GraphInputs,
    Masks,
    Potential,
    element_fields,
    message_fields,
    spread_elements,
)
from forcedrop.potential.sphere import harmonics_and_gradients

BLOCK_BYTES = 20 * 2**20
"""What a block of atoms may take on a processor: larger blocks leave the cache, smaller ones cost more calls."""
GPU_BLOCK_BYTES = 2**30
"""The same on a GPU, which wants large ones: there it only limits memory."""


class _Geometry(NamedTuple):
    """The functions of every pair and their derivatives.

    Attributes:
        sphere: Y_lm, shape (N, S, M).
        sphere_grad: their derivatives by x, y, z of the pair vector [1/Å], shape (3, N, S, M).
        radial: B_n, shape (N, M, n).
        slope: dB_n/dr [1/Å], shape (N, M, n).
        unit: directions, shape (N, M, 3).
    """

    sphere: Tensor
    sphere_grad: Tensor
    radial: Tensor
    slope: Tensor
    unit: Tensor


class _Tape(NamedTuple):
    """What a layer leaves for the way back.

    Attributes:
        fields: shape (S, N, 3, C).
        grid: the fields on the grid, shape (G, N, 3, C).
        sent: what each atom sends, shape (N, (L+1)², C); None in the first layer.
    """

    fields: Tensor
    grid: Tensor
    sent: Tensor | None


def late_sites(potential: Potential) -> set[str]:
    """Return the names of what may differ between samples here: masks (K, channels) and what is added to the readouts, (K, F)."""
    return {READOUT_SHIFT, HIDDEN, _last_update(potential)}


def _last_update(potential: Potential) -> str:
    return f"layers.{potential.config.n_layers - 1}.update"


@torch.no_grad()
def late_gradients(potential: Potential, vec: Tensor, graph: GraphInputs, masks: Masks) -> tuple[Tensor, Tensor]:
    """Return K functions' energies of the atoms [eV], (K, N), and the gradients of their sums [eV/Å], (K, N, M, 3).

    Args:
        potential: the network.
        vec: pair vectors [Å], shape (N, M, 3).
        graph: the rest of the batch.
        masks: of :func:`late_sites`, sample axis first; empty for the plain network, K = 1.
    """
    one_hot = torch.nn.functional.one_hot(graph.species, len(potential.config.elements)).to(vec.dtype)
    geometry = _geometry(potential, vec)
    energy, features, stem, branch, tapes = _forward(potential, geometry, graph, one_hot)
    end = _End(potential, one_hot, masks)
    weights = _weights(potential, graph, masks, vec)
    energies, back = end(stem, branch, weights[-1])
    for values, own in zip(features, weights, strict=False):
        energies = energies + (own @ values[..., None])[..., 0]
    energies = (energies + (energy + one_hot @ potential.species_bias)).T
    gradient = _backward(potential, geometry, graph, one_hot, weights, back, end.update, tapes)
    energies, gradient = energies * potential.energy_scale, gradient * potential.energy_scale
    if potential.zbl is None:
        return energies, gradient
    own_energy, by_vec = _repulsion(potential, vec, graph)
    return energies + own_energy, gradient + by_vec


def _weights(potential: Potential, graph: GraphInputs, masks: Masks, like: Tensor) -> list[Tensor]:
    """Return what is added to the weights that the energy is read with, (N, K, …) for each layer and the hidden channels."""
    config = potential.config
    shifts = masks.get(READOUT_SHIFT)
    if shifts is None:
        k = len(next(iter(masks.values()))) if masks else 1
        shifts = like.new_zeros(k, potential.n_readout)
    if potential.refit is not None:
        shifts = shifts + potential.refit
    by_atom = shifts.unflatten(-1, (len(config.elements), -1)).transpose(0, 1)[graph.species]
    return list(by_atom.split([3 * config.n_channels] * config.n_layers + [config.n_hidden], -1))


class _End:
    """The end of the network, where samples part: the last layer's sum and the hidden channels, with their masks."""

    def __init__(self, potential: Potential, one_hot: Tensor, masks: Masks) -> None:
        self.potential, self.one_hot = potential, one_hot
        self.update, self.hidden = masks.get(_last_update(potential)), masks.get(HIDDEN)

    def __call__(self, stem: Tensor, branch: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the energies (N, K) and the gradient by the last scalars, (N, K, C).

        Args:
            stem: what the last layer's branch is added to, (N, C).
            branch: its scalars, (N, C).
            weights: what is added to those of the hidden channels, (N, K, H).
        """
        net: Any = self.potential
        layer = net.layers[-1]
        added = branch[:, None]
        if self.update is not None:
            added = added + (self.update - 1) * (branch - self.one_hot @ layer.mask.centre)[:, None]
        x = stem[:, None] + added
        before = net.hidden(x) + net.hidden_bias
        gate = torch.sigmoid(before)
        hidden, slope = before * gate, gate * (1 + before * (1 - gate))
        if self.hidden is not None:
            hidden = hidden + (self.hidden - 1) * (hidden - (self.one_hot @ net.mask.centre)[:, None])
            slope = slope * self.hidden
        weights = weights + net.output.weight[:, 0]
        readout = net.readouts[-1].weight[:, 0]
        return (hidden * weights).sum(-1) + x @ readout, (weights * slope) @ net.hidden.weight.T + readout


def _repulsion(potential: Potential, vec: Tensor, graph: GraphInputs) -> tuple[Tensor, Tensor]:
    zbl: Any = potential.zbl
    with torch.enable_grad():
        leaf = vec.detach().requires_grad_(True)
        own = zbl(leaf, graph.species, graph.nbr, potential.config.cutoff)
        (by_vec,) = torch.autograd.grad(own.sum(), leaf)
    return own.detach(), by_vec


def _geometry(potential: Potential, vec: Tensor) -> _Geometry:
    r = vec.square().sum(-1).sqrt()
    unit = vec / r[..., None]
    sphere, gradient = harmonics_and_gradients(unit, r, potential.config.l_max)
    bessel: Any = potential.pairs.radial
    radial, slope = bessel.with_slope(r)
    return _Geometry(sphere.transpose(1, 2).contiguous(), gradient.transpose(2, 3).contiguous(), radial, slope, unit)


def _forward(
    potential: Potential, geometry: _Geometry, graph: GraphInputs, one_hot: Tensor
) -> tuple[Tensor, list[Tensor], Tensor, Tensor, list[_Tape]]:
    """Go to the end of the network, where samples part.

    Returns:
        the energies read from all but the last layer, (N, 1); what may be read besides, (N, 3C) a layer; the last layer's
        scalars before its branch is added, (N, C); this branch, (N, C); and the tapes.
    """
    x, energy = geometry.unit.new_zeros(()), geometry.unit.new_zeros(len(one_hot), 1)
    stem, branch = x, x
    features, tapes = [], []
    layers: Any = potential.layers
    for t, layer in enumerate(layers):
        sent = None
        if t == 0:
            fields = element_fields(layer, PairGeometry(geometry.sphere, geometry.radial), one_hot, graph)
        else:
            energy = energy + potential.readouts[t - 1](x[0])
            sent = layer.message.send(by_degree(x)).transpose(0, 1).contiguous()
            fields = message_fields(layer, _carry(layer.message, sent, geometry, graph), x)
            stem = layer.skip(x[0])
        products: Any = layer.update.products
        grid = (products.to_grid @ fields.flatten(1)).unflatten(1, fields.shape[1:]).unflatten(2, (3, -1))
        branch, every = _multiply(layer.update, fields.unflatten(2, (3, -1)), grid, one_hot)
        tensors = branch[1:] if t == 0 else branch[1:] + x[1 : len(branch)]
        x = torch.cat([(stem + branch[0])[None], tensors])
        features.append(every)
        tapes.append(_Tape(fields.unflatten(2, (3, -1)), grid, sent))
    return energy, features, stem.expand_as(branch[0]), branch[0], tapes


def _backward(
    potential: Potential,
    geometry: _Geometry,
    graph: GraphInputs,
    one_hot: Tensor,
    weights: list[Tensor],
    back: Tensor,
    mask: Tensor | None,
    tapes: list[_Tape],
) -> Tensor:
    """Return the gradient by the pair vectors, shape (K, N, M, 3).

    ``weights`` (N, K, …) are those of each layer's products, ``back`` (N, K, C) is the gradient by the last scalars, ``mask``
    (K, C) that of the last branch.
    """
    layers: Any = potential.layers
    readouts: Any = potential.readouts
    back = back[None]
    gradient = back.new_zeros(back.shape[2], *geometry.unit.shape)
    for t in reversed(range(len(tapes))):
        if t < len(tapes) - 1:
            back[0] += readouts[t].weight[:, 0]
            mask = None
        back = _LayerBack(layers[t], tapes[t], geometry, graph, one_hot)(back, weights[t], gradient, mask)
    return gradient


def _to_vectors(by_sphere: Tensor, by_distance: Tensor, geometry: _Geometry, block: slice) -> Tensor:
    """Return a block's gradient (K, n, M, 3) from those by Y_lm, (n, S, K, M), and by the distance, (n, K, M)."""
    slopes, unit = geometry.sphere_grad[:, block], geometry.unit[block]
    columns = [(by_sphere * slopes[i][:, :, None]).sum(1) + by_distance * unit[:, None, :, i] for i in range(3)]
    return torch.stack(columns, dim=-1).transpose(0, 1)


def blocks_of(n_atoms: int, bytes_per_atom: int, device: torch.device) -> list[slice]:
    """Cut atoms into blocks of about :data:`BLOCK_BYTES`, on a GPU of :data:`GPU_BLOCK_BYTES`."""
    size = max(1, (BLOCK_BYTES if device.type == "cpu" else GPU_BLOCK_BYTES) // bytes_per_atom)
    return [slice(first, min(first + size, n_atoms)) for first in range(0, n_atoms, size)]


def _multiply(update: Update, fields: Tensor, grid: Tensor, one_hot: Tensor) -> tuple[Tensor, Tensor]:
    """Return the branch and its invariants, as :class:`Update` does, from fields (S, N, 3, C) and their values on the grid."""
    one, two, three = grid.unbind(2)
    pair = one * two
    project = update.products.from_grid
    second, third = ((project @ x.flatten(1)).unflatten(1, x.shape[1:]) for x in (pair, pair * three))
    terms = (fields[: len(second), :, 0], second, third)
    every = torch.cat([norm(x) for norm, x in zip(update.norms, terms, strict=True)], dim=-1)
    every = update.species(every, one_hot)
    return update.mix(by_degree(every)), every[0]


def _undo_products(update: Update, tape: _Tape, back: Tensor, weights: Tensor, one_hot: Tensor) -> Tensor:
    """Return the gradient by the fields, (S, N, K, 3C), from that by the branch, (S_out, N, K, C), and the weights (N, K, 3C)."""
    by_every = _undo_linear(update.mix, back)
    by_every[0] = by_every[0] + weights
    own: Any = one_hot @ update.species.weight
    norms: Any = update.norms
    c = back.shape[-1]
    terms = []
    for l, part in enumerate(by_every):  # noqa: E741
        scale = torch.cat([(1 / norm.rms[l]).expand(c) for norm in norms])
        terms.append((part * (own * scale)[:, None]).unflatten(-1, (3, c)))
    joined = torch.cat(terms)  # (S_out, N, K, 3, C)
    first, second, third = joined.unbind(3)
    products: Any = update.products
    one, two, three = tape.grid[:, :, None].unbind(3)
    if update.l_out == 0:
        # of scalars the way back is one number per channel times what is common to all samples
        on_grid = products.from_grid[0][:, None, None, None] * torch.stack(
            [
                tape.grid[:, :, 1] * tape.grid[:, :, 2],
                tape.grid[:, :, 0] * tape.grid[:, :, 2],
                tape.grid[:, :, 0] * tape.grid[:, :, 1],
            ],
            dim=2,
        )
        common = (products.to_grid.T @ on_grid.flatten(1)).unflatten(1, on_grid.shape[1:])  # (S, N, 3, C)
        result = common[:, :, None] * third[0][:, :, None]
        result[..., 0, :].addcmul_(tape.fields[:, :, None, 1], second[0])
        result[..., 1, :].addcmul_(tape.fields[:, :, None, 0], second[0])
        result[0, ..., 0, :] += first[0]
        return result.flatten(3)
    on_grid = (products.from_grid.T @ joined[..., 1:, :].flatten(1)).unflatten(1, joined[..., 1:, :].shape[1:])
    by_pair, by_triple = on_grid.unbind(3)
    by_pair = by_pair + by_triple * three
    by_grid = torch.stack([by_pair * two, by_pair * one, by_triple * (one * two)], dim=3)
    result = (products.to_grid.T @ by_grid.flatten(1)).unflatten(1, by_grid.shape[1:])
    result[: len(first), ..., 0, :] += first
    return result.flatten(3)


def _undo_linear(linear: TensorLinear, back: Tensor) -> list[Tensor]:
    """Return the gradients by what went into the maps of each l."""
    maps: Any = linear.maps
    return [part @ m.weight.T for part, m in zip(by_degree(back), maps, strict=True)]


def _atoms_first(parts: list[Tensor], rms: Tensor) -> Tensor:
    """Join the parts of each l, divided by its norm, with the atoms first: (N, S, K, C)."""
    return torch.cat([part.transpose(0, 1) / norm for norm, part in zip(rms, parts, strict=True)], dim=1)


def _carry(message: Message, sent: Tensor, geometry: _Geometry, graph: GraphInputs) -> Tensor:
    """Return the sums of the messages, shape (S, N, C), as :meth:`Message.carry` does."""
    per_atom = 6 * graph.nbr.shape[1] * message.radial.shape[1] * sent.element_size()
    parts = [
        message.carry(sent, PairGeometry(geometry.sphere[b], geometry.radial[b]), graph.nbr[b], graph.reverse[b])
        for b in blocks_of(len(sent), per_atom, sent.device)
    ]
    return torch.cat(parts, dim=1)


class _LayerBack:
    """The way back through one layer: a block of atoms at a time, so that what is computed at once stays in the cache."""

    def __init__(self, layer: Any, tape: _Tape, geometry: _Geometry, graph: GraphInputs, one_hot: Tensor) -> None:
        self.layer, self.tape, self.geometry, self.graph, self.one_hot = layer, tape, geometry, graph, one_hot

    def __call__(self, back: Tensor, weights: Tensor, gradient: Tensor, mask: Tensor | None) -> Tensor:
        """Return the gradient by what came into the layer, ((L+1)², N, K, C); add that by the pair vectors to ``gradient``.

        Args:
            back: gradient by what the layer returned, (S_out, N, K, C).
            weights: of its products, (N, K, 3C).
            gradient: (K, N, M, 3), in place.
            mask: of what the layer added, (K, C).
        """
        blocks = self._blocks(back)
        branch = back if mask is None else back * mask
        if self.tape.sent is None:
            for b in blocks:
                gradient[:, b] += self._undo_elements(self._inputs(branch[:, b], weights[b], b), b)
            return back[:0]
        message, c = self.layer.message, back.shape[-1]
        n, k = back.shape[1:3]
        s_in, degrees, m = len(message.index), message.l_in + 1, self.graph.nbr.shape[1]
        own = back.new_empty(s_in, n, k, c)
        along = back.new_empty(n, m, degrees, k * c)
        tensors = back.new_empty(n, (s_in - 1) * k * c)
        for b in blocks:
            inputs = self._inputs(branch[:, b], weights[b], b)
            torch.cat([part[..., c:] for part in inputs[:degrees]], out=own[:, b])
            by_sums = _atoms_first([part[..., :c] for part in inputs], message.norm.rms)
            tensors[b] = by_sums[:, 1:s_in].flatten(1)
            gradient[:, b] += self._undo_pairs(by_sums, b, along[b])
        room = self._room(blocks, along, tensors)
        for b in blocks:
            sent = self._undo_gather(along, tensors, b, room).unflatten(2, (k, c)).transpose(0, 1)
            own[:, b] += torch.cat([x @ w.weight.T for x, w in zip(by_degree(sent), message.send.maps, strict=True)])
            own[0, b] += back[0, b] @ self.layer.skip.weight.T
            own[1 : len(back), b] += back[1:, b]
        return own

    def _blocks(self, back: Tensor) -> list[slice]:
        """Cut the atoms into blocks; a GPU takes all at once."""
        n, k, c = back.shape[1:]
        m = self.graph.nbr.shape[1]
        common = 0 if self.tape.sent is None else 6 * m * self.layer.message.radial.shape[1]
        each = c * (5 * m + 3 * len(self.tape.grid))
        per_atom = (common + k * each) * back.element_size()
        return blocks_of(n, per_atom, back.device)

    def _inputs(self, back: Tensor, weights: Tensor, block: slice) -> list[Tensor]:
        """Return the gradients by what went into the maps to the fields, for each l (2l+1, n, K, …)."""
        tape = _Tape(self.tape.fields[:, block], self.tape.grid[:, block], None)
        by_fields = _undo_products(self.layer.update, tape, back, weights, self.one_hot[block])
        return _undo_linear(self.layer.fields, by_fields)

    def _undo_elements(self, inputs: list[Tensor], block: slice) -> Tensor:
        """Return the gradient by the pair vectors (K, n, M, 3) in the layer that knows the neighbours' elements alone."""
        by_sums = _atoms_first(inputs, self.layer.norm.rms)  # (n, S, K, elements × functions)
        n, s, k = by_sums.shape[:3]
        geometry, nbr = self.geometry, self.graph.nbr[block]
        functions = (geometry.radial[block], geometry.slope[block])
        both = torch.cat([spread_elements(f, self.one_hot, nbr) for f in functions], dim=1)
        by_sphere, steep = (by_sums.flatten(1, 2) @ both.transpose(1, 2)).view(n, s, k, 2, -1).unbind(3)
        by_distance = (steep * geometry.sphere[block][:, :, None]).sum(1)
        return _to_vectors(by_sphere, by_distance, geometry, block)

    def _undo_pairs(self, by_sums: Tensor, block: slice, back: Tensor) -> Tensor:
        """Return the gradient by the pair vectors, (K, n, M, 3); fill in that by the parts along the pairs, (n, M, L+1, K·C).

        Args:
            by_sums: gradient by the sums of the messages, (n, S, K, C).
            block: the n atoms.
            back: to be filled.
        """
        message, geometry = self.layer.message, self.geometry
        sphere, m, (n, _, k, c) = geometry.sphere[block], back.shape[1], by_sums.shape
        moved = self.tape.sent[self.graph.nbr[block]]  # type: ignore[index]
        shape = (message.l_in + 1, message.l_max + 1, c)
        along = message.along(moved, sphere)[:, :, :, None]
        radial, slope = ((f[block] @ message.radial).unflatten(2, shape) for f in (geometry.radial, geometry.slope))
        carried, steeper = (along * radial).sum(2), (along * slope).sum(2)
        back = back.unflatten(3, (k, c))
        by_sphere, by_distance = [], []
        for l, (y, part) in enumerate(zip(by_degree(sphere, dim=1), by_degree(by_sums, dim=1), strict=True)):  # noqa: E741
            both = torch.cat([carried[:, :, l], steeper[:, :, l]], dim=1).transpose(1, 2)
            one, two = (part.flatten(1, 2) @ both).view(n, -1, k, 2, m).unbind(3)
            by_sphere.append(one)
            by_distance.append((two * y[:, :, None]).sum(1))
            pair = (y.transpose(1, 2) @ part.flatten(2)).view(n, m, k, c)
            for l_in in range(message.l_in + 1):
                term = radial[:, :, l_in, l, None]
                if l == 0:
                    torch.mul(pair, term, out=back[:, :, l_in])
                else:
                    back[:, :, l_in].addcmul_(pair, term)
        weights = (geometry.slope[block] @ message.plain_weights.flatten(1)).unflatten(2, (-1, c))
        tensors = (moved[:, :, 1:] * weights).permute(0, 2, 3, 1)
        by_distance.append((by_sums[:, 1 : moved.shape[2]] @ tensors).sum(1))
        for l_in, (x, sums) in enumerate(zip(by_degree(moved, dim=2), by_sphere, strict=False)):
            sums += ((back[:, :, l_in] @ x.transpose(2, 3)) / (2 * l_in + 1) ** 0.5).permute(0, 3, 2, 1)
        return _to_vectors(torch.cat(by_sphere, dim=1), torch.stack(by_distance).sum(0), geometry, block)

    def _room(self, blocks: list[slice], *sources: Tensor) -> list[Tensor]:
        """Return memory for what is gathered, used by block after block: fresh pages cost more than the gather itself."""
        slots = (blocks[0].stop - blocks[0].start) * self.graph.nbr.shape[1]
        return [x.new_empty(slots, x.shape[-1] if x.dim() == 2 else x[0, 0].numel()) for x in sources]

    def _undo_gather(self, along: Tensor, tensors: Tensor, block: slice, room: list[Tensor]) -> Tensor:
        """Return the gradient by what a block of atoms sends, (n, (L+1)², K·C), from those that reach it along its pairs."""
        message, geometry = self.layer.message, self.geometry
        nbr, reverse = self.graph.nbr[block], self.graph.reverse[block]
        first, second = (x[: nbr.numel()] for x in room)
        torch.index_select(along.flatten(0, 1).flatten(1), 0, reverse.flatten(), out=first)
        reached = first.view(*nbr.shape, *along.shape[2:])
        sphere = by_degree(geometry.sphere[block, : len(message.index)], dim=1)
        sums = []
        for l, y in enumerate(sphere):  # noqa: E741
            # seen from the other end a pair has the opposite direction
            sums.append((y * ((-1) ** l / (2 * l + 1) ** 0.5)) @ reached[:, :, l])
        joined = torch.cat(sums, dim=1)
        torch.index_select(tensors, 0, nbr.flatten(), out=second)
        plain = geometry.radial[block].transpose(1, 2) @ second.view(*nbr.shape, second.shape[1])
        plain = plain.unflatten(2, (len(message.index) - 1, joined.shape[2]))
        weights = message.plain_weights.repeat(1, 1, joined.shape[2] // message.plain_weights.shape[2])
        joined[:, 1:] += (plain * weights).sum(1)
        return joined
