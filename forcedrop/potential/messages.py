r"""Later layers: features of the neighbours carried to the centre, products, and what results added; and the way back."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from forcedrop.dropout import SphericalDropout
from forcedrop.potential.blocks import blocks_of
from forcedrop.potential.contract import GraphInputs
from forcedrop.potential.linear import Linear, SphereNorm, TensorLinear, by_degree
from forcedrop.potential.neighbours import gather_neighbours
from forcedrop.potential.pairs import PairGeometry, PairSlopes
from forcedrop.potential.products import Tape, Update
from forcedrop.potential.sphere import degree_index


class Message(nn.Module):
    r"""Features of the neighbours, carried to the centre by R(r) Y_lm(r̂).

    What neighbour j sends are tensors :math:`x^{l'}_{m'}`, l' ≤ L. Along the pair each is a number,
    :math:`a^{l'} = \sum_{m'} x^{l'}_{m'} Y_{l'm'}(\hat r_{ij}) / \sqrt{2l'+1}`, and
    :math:`A_{lm} = \sum_j Y_{lm}(\hat r_{ij}) \sum_{l'} R_{l'l}(r_{ij})\, a^{l'}_j`, for 1 ≤ l ≤ L also
    :math:`\sum_j R'_l(r_{ij})\, x^l_{m,j}`; every channel has radial functions of its own, R = Σ_n W_n B_n.
    """

    index: Tensor

    def __init__(self, n_channels: int, n_radial: int, l_max: int, l_in: int) -> None:
        super().__init__()
        self.l_max, self.l_in = l_max, l_in
        self.send = TensorLinear([n_channels] * (l_in + 1), n_channels)
        self.radial = nn.Parameter(
            torch.randn(n_radial, (l_in + 1) * (l_max + 1) * n_channels) / math.sqrt((l_in + 1) * n_radial)
        )
        self.radial_plain = nn.Parameter(torch.randn(n_radial, l_in * n_channels) / math.sqrt(n_radial))
        self.norm = SphereNorm(l_max)
        self.register_buffer("index", degree_index(l_in), persistent=False)

    def forward(self, sent: Tensor, pairs: PairGeometry, graph: GraphInputs, *, blocked: bool = False) -> Tensor:
        """Return A, shape (S, N, C), from what every atom sends, (N, (L+1)², C), if asked a block of atoms at a time."""
        if not blocked:
            return self.carry(sent, pairs, graph.nbr, graph.reverse)
        per_atom = 6 * graph.nbr.shape[1] * self.radial.shape[1] * sent.element_size()
        parts = [
            self.carry(sent, PairGeometry(pairs.sphere[b], pairs.radial[b]), graph.nbr[b], graph.reverse[b])
            for b in blocks_of(len(sent), per_atom, sent.device)
        ]
        return torch.cat(parts, dim=1)

    def carry(self, sent: Tensor, pairs: PairGeometry, nbr: Tensor, reverse: Tensor) -> Tensor:
        """Return A of some atoms, from what all atoms send and the geometry of their pairs."""
        c = sent.shape[-1]
        moved = gather_neighbours(sent.flatten(1), nbr, reverse)
        along = self.along(moved.unflatten(2, (-1, c)), pairs.sphere)
        radial = (pairs.radial @ self.radial).unflatten(2, (self.l_in + 1, self.l_max + 1, c))
        carried = (along[:, :, :, None] * radial).sum(2).unbind(2)
        a = [y @ f for y, f in zip(by_degree(pairs.sphere, dim=1), carried, strict=True)]
        plain = (pairs.radial.transpose(1, 2) @ moved[..., c:]).unflatten(2, (-1, c))
        sizes = [2 * l + 1 for l in range(1, self.l_in + 1)]  # noqa: E741
        for l, tensor in enumerate((plain * self.plain_weights).sum(1).split(sizes, dim=1), start=1):  # noqa: E741
            a[l] = a[l] + tensor
        return self.norm(torch.cat(a, dim=1).transpose(0, 1))

    @property
    def plain_weights(self) -> Tensor:
        """Weights of the radial functions R'_l for each component with l ≥ 1, shape (n, (L+1)² − 1, C)."""
        n_channels = self.radial.shape[1] // ((self.l_in + 1) * (self.l_max + 1))
        return self.radial_plain.unflatten(1, (self.l_in, n_channels))[:, self.index[1:] - 1]

    def along(self, moved: Tensor, sphere: Tensor) -> Tensor:
        """Return each l's component along the pair, (N, M, L+1, C), from the neighbours' (N, M, (L+1)², C) and Y (N, S, M)."""
        direction = sphere[:, : len(self.index)] * (2 * self.index + 1).to(sphere.dtype).rsqrt()[:, None]
        parts = by_degree(moved * direction.transpose(1, 2)[..., None], dim=2)
        return torch.stack([part.sum(2) for part in parts], dim=2)

    def back_to_pairs(self, by_sums: Tensor, moved: Tensor, slopes: PairSlopes, by_along: Tensor) -> Tensor:
        """Return the gradient by the pair vectors, (K, n, M, 3), of a block of atoms; fill in that by the parts along the pairs.

        Args:
            by_sums: the gradient by the sums of the messages, before their norm, (n, S, K, C).
            moved: what their neighbours send, (n, M, (L+1)², C).
            slopes: geometry of their pairs, and derivatives.
            by_along: to be filled, (n, M, L+1, K·C).
        """
        m, (n, _, k, c) = by_along.shape[1], by_sums.shape
        shape = (self.l_in + 1, self.l_max + 1, c)
        along = self.along(moved, slopes.sphere)[:, :, :, None]
        radial, slope = ((f @ self.radial).unflatten(2, shape) for f in (slopes.radial, slopes.slope))
        carried, steeper = (along * radial).sum(2), (along * slope).sum(2)
        back = by_along.unflatten(3, (k, c))
        by_sphere, by_distance = [], []
        parts = zip(by_degree(slopes.sphere, dim=1), by_degree(by_sums, dim=1), strict=True)
        for l, (y, part) in enumerate(parts):  # noqa: E741
            both = torch.cat([carried[:, :, l], steeper[:, :, l]], dim=1).transpose(1, 2)
            one, two = (part.flatten(1, 2) @ both).view(n, -1, k, 2, m).unbind(3)
            by_sphere.append(one)
            by_distance.append((two * y[:, :, None]).sum(1))
            pair = (y.transpose(1, 2) @ part.flatten(2)).view(n, m, k, c)
            for l_in in range(self.l_in + 1):
                term = radial[:, :, l_in, l, None]
                if l == 0:
                    torch.mul(pair, term, out=back[:, :, l_in])
                else:
                    back[:, :, l_in].addcmul_(pair, term)
        weights = (slopes.slope @ self.plain_weights.flatten(1)).unflatten(2, (-1, c))
        tensors = (moved[:, :, 1:] * weights).permute(0, 2, 3, 1)
        by_distance.append((by_sums[:, 1 : moved.shape[2]] @ tensors).sum(1))
        for l_in, (x, sums) in enumerate(zip(by_degree(moved, dim=2), by_sphere, strict=False)):
            sums += ((back[:, :, l_in] @ x.transpose(2, 3)) / (2 * l_in + 1) ** 0.5).permute(0, 3, 2, 1)
        return slopes.to_vectors(torch.cat(by_sphere, dim=1), torch.stack(by_distance).sum(0))

    def back_to_sent(self, reached: Tensor, tensors: Tensor, pairs: PairGeometry) -> Tensor:
        """Return the gradient by what a block of atoms sends, (n, (L+1)², K·C), from the atoms that it reaches.

        Args:
            reached: the gradient by the parts along the pairs that arrive there, (n, M, L+1, K·C).
            tensors: that by the sums of l ≥ 1 of those atoms, (n, M, ((L+1)² − 1)·K·C).
            pairs: geometry of the pairs as seen from here.
        """
        sphere = by_degree(pairs.sphere[:, : len(self.index)], dim=1)
        sums = []
        for l, y in enumerate(sphere):  # noqa: E741
            # seen from the other end a pair has the opposite direction
            sums.append((y * ((-1) ** l / (2 * l + 1) ** 0.5)) @ reached[:, :, l])
        joined = torch.cat(sums, dim=1)
        plain = pairs.radial.transpose(1, 2) @ tensors
        plain = plain.unflatten(2, (len(self.index) - 1, joined.shape[2]))
        weights = self.plain_weights.repeat(1, 1, joined.shape[2] // self.plain_weights.shape[2])
        joined[:, 1:] += (plain * weights).sum(1)
        return joined


class LayerTape(NamedTuple):
    """What a layer leaves for the way back: that of its products, and what each atom sent, (N, (L+1)², C)."""

    products: Tape
    sent: Tensor


class MessageLayer(nn.Module):
    """One round: messages, fields on the sphere, products, and the branch that results added to the features.

    Args:
        n_species: number of elements.
        n_channels: C.
        n_radial: radial functions.
        l_max: of the fields.
        l_in: of the features that come in.
        l_out: of those that come out: ``l_in``, or 0 in the last layer.
    """

    def __init__(self, n_species: int, n_channels: int, n_radial: int, l_max: int, l_in: int, l_out: int) -> None:
        super().__init__()
        c = n_channels
        self.message = Message(c, n_radial, l_max, l_in)
        self.message_dropout = SphericalDropout(l_in, c, 0.0)
        self.fields = TensorLinear([2 * c] * (l_in + 1) + [c] * (l_max - l_in), 3 * c)
        self.skip = Linear(c, c)
        self.update = Update(n_species, c, l_max, l_out)
        self.update_dropout = SphericalDropout(l_out, c, 0.0, kinds=n_species)

    def forward(
        self, x: Tensor, pairs: PairGeometry, one_hot: Tensor, graph: GraphInputs, *, blocked: bool = False
    ) -> tuple[Tensor, Tensor, LayerTape]:
        """Return the features ((l_out+1)², N, C), the invariant products (N, 3C) and what the way back needs.

        ``x`` are the features ((l_in+1)², N, C); ``blocked`` carries messages a block of atoms at a time.
        """
        sent = self.message_dropout(self.message.send(by_degree(x))).transpose(0, 1)
        sums = self.message(sent.contiguous() if blocked else sent, pairs, graph, blocked=blocked)
        parts, own = by_degree(sums), by_degree(x)
        joined = [torch.cat([a, b], -1) for a, b in zip(parts, own, strict=False)] + parts[len(own) :]
        branch, products, tape = self.update(self.fields(joined), one_hot)
        branch = self.update_dropout(branch, one_hot)
        added = (self.skip(x[0]) + branch[0])[None]
        if len(branch) > 1:
            added = torch.cat([added, x[1:] + branch[1:]])
        return added, products, LayerTape(tape, sent)

    def back(
        self,
        tape: LayerTape,
        slopes: PairSlopes,
        one_hot: Tensor,
        graph: GraphInputs,
        by_features: Tensor,
        by_products: Tensor,
        gradient: Tensor,
    ) -> Tensor:
        """Return the gradient by the features that came in, ((l_in+1)², N, K, C); add that by the pair vectors to ``gradient``.

        A block of atoms at a time, so that what is computed at once stays in the cache.

        Args:
            tape: of the way there.
            slopes: geometry and derivatives.
            one_hot: elements.
            graph: neighbours.
            by_features: the gradient by what came out, (S_out, N, K, C).
            by_products: that by the products themselves, (N, K, 3C).
            gradient: (K, N, M, 3), in place.
        """
        message, (n, k, c) = self.message, by_features.shape[1:]
        s_in, degrees, m = len(message.index), message.l_in + 1, graph.nbr.shape[1]
        each = c * (5 * m + 3 * len(tape.products.grid))
        per_atom = (6 * m * message.radial.shape[1] + k * each) * by_features.element_size()
        blocks = blocks_of(n, per_atom, by_features.device)
        own = by_features.new_empty(s_in, n, k, c)
        along = by_features.new_empty(n, m, degrees, k * c)
        tensors = by_features.new_empty(n, (s_in - 1) * k * c)
        sent = tape.sent.contiguous()
        for b in blocks:
            by_fields = self.update.back(tape.products.of(b), by_features[:, b], by_products[b], one_hot[b])
            inputs = self.fields.back(by_fields)
            torch.cat([part[..., c:] for part in inputs[:degrees]], out=own[:, b])
            by_sums = message.norm.back([part[..., :c] for part in inputs])
            tensors[b] = by_sums[:, 1:s_in].flatten(1)
            gradient[:, b] += message.back_to_pairs(by_sums, sent[graph.nbr[b]], slopes.of(b), along[b])
        room = _room(blocks, m, along, tensors)
        for b in blocks:
            reached, others = _gather_back(along, tensors, graph.nbr[b], graph.reverse[b], room)
            by_sent = message.back_to_sent(reached, others, PairGeometry(slopes.sphere[b], slopes.radial[b]))
            own[:, b] += torch.cat(message.send.back(by_sent.unflatten(2, (k, c)).transpose(0, 1)))
            own[0, b] += self.skip.back(by_features[0, b])
            own[1 : len(by_features), b] += by_features[1:, b]
        return own


def _room(blocks: list[slice], n_slots: int, *sources: Tensor) -> list[Tensor]:
    """Return memory for what is gathered, used by block after block: fresh pages cost more than the gather itself."""
    slots = (blocks[0].stop - blocks[0].start) * n_slots
    return [x.new_empty(slots, x.shape[-1] if x.dim() == 2 else x[0, 0].numel()) for x in sources]


def _gather_back(
    along: Tensor, tensors: Tensor, nbr: Tensor, reverse: Tensor, room: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return what the pairs that leave a block of atoms have at their other end: (n, M, L+1, K·C) and (n, M, …)."""
    first, second = (x[: nbr.numel()] for x in room)
    torch.index_select(along.flatten(0, 1).flatten(1), 0, reverse.flatten(), out=first)
    torch.index_select(tensors, 0, nbr.flatten(), out=second)
    return first.view(*nbr.shape, *along.shape[2:]), second.view(*nbr.shape, second.shape[1])
