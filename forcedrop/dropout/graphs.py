r"""Dropout on graphs given as plain tensors (node features, edge lists): features, whole nodes, whole edges.

Nodes and edges have identities, not places: a mask follows a node's number (or the ``ids`` you give) and an edge's
undirected pair, so a reordered or rebuilt list keeps its mask. N is the number of nodes, E of edges, F of features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from forcedrop.dropout.checks import (
    check_dtype,
    check_flag,
    check_floating,
    check_generator,
    check_integers,
    check_mask,
    check_rank,
    check_tensor,
)
from forcedrop.dropout.masks import UNIFORM_BITS, edge_identity, mix, random_bits
from forcedrop.dropout.site import DropoutSite, inverted


def _directed_identity(nodes: Tensor, edge_shift: Tensor | None) -> Tensor:
    """Return an int64 identity per directed edge (i, j, S), shape (E,), as ``edge_identity`` does per undirected one."""
    parts = [nodes[0], nodes[1]]
    if edge_shift is not None:
        parts += edge_shift.to(torch.int64).unbind(1)
    identity = torch.zeros_like(nodes[0])
    for part in parts:
        identity = mix(identity ^ part)
    return identity


def _checked_mask(mask: Tensor, n_edges: int) -> Tensor:
    check_tensor(mask, "mask")
    if mask.shape != (n_edges,):
        raise ValueError(f"`mask` must have shape ({n_edges},), one number an edge, got {tuple(mask.shape)}")
    return mask


class _IdentitySite(DropoutSite):
    """A site whose bits belong to identities of its units; units of equal identity share their fate in every draw."""

    def keep_identities(self, identity: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return which units are kept, boolean, of the shape of ``identity`` (int64).

        A fresh draw takes one random key from the generator and hashes the identities with it.
        """
        if self._function is not None:
            bits = self._function.bits(self._site, identity)
        else:
            check_generator(generator)
            key = torch.randint(1 << 62, (1,), generator=generator, device=identity.device)
            bits = random_bits(0, key, identity.reshape(-1))[0].reshape(identity.shape)
        return bits >= round(self.p * (1 << UNIFORM_BITS))

    def node_ids(self, x: Tensor, ids: Tensor | None) -> Tensor:
        """Return the identities of the rows of ``x``, shape (N,): ``ids`` if given, else the rows' numbers."""
        if ids is None:
            return torch.arange(x.shape[0], device=x.device)
        check_integers(ids, (x.shape[0],), "`ids`")
        return ids.to(torch.int64)


class NodeFeatureDropout(_IdentitySite):
    r"""Inverted dropout of node features, shape (N, F): single entries, or whole channels for every node alike.

    Entries are keyed by (node identity, feature), channels by the feature alone. Frozen, the mask of an entry is that of
    its node wherever the node stands in the list. With a batch's graph numbers for ``ids`` there is one bit per graph and
    feature.

    Source: Srivastava et al., JMLR 15, 1929 (2014), section 10; whole channels: Tompson et al., CVPR 2015, section 3.2.

    Args:
        p: the rate, in [0, 1).
        shared: one bit per feature, the same for every node, instead of one per node and feature.
    """

    settings = DropoutSite.settings | {"shared": check_flag}

    def __init__(self, p: float = 0.5, *, shared: bool = False) -> None:
        super().__init__(p)
        self.shared = shared

    def mask(self, x: Tensor, generator: torch.Generator | None = None, ids: Tensor | None = None) -> Tensor:
        """Return a mask of values 0 and 1/(1−p), shape (N, F), or (1, F) if shared.

        Args:
            x: node features, shape (N, F).
            generator: for a fresh draw.
            ids: integer identities of the nodes, shape (N,); their row numbers if not given. No two independent nodes may
                have the same. Not looked at if the mask is shared by all nodes.

        Raises:
            ValueError: if ``x`` or ``ids`` have wrong shapes.
            TypeError: if ``ids`` are not integers.
        """
        check_floating(x, "NodeFeatureDropout")
        check_rank(x, (2,), "NodeFeatureDropout")
        features = torch.arange(x.shape[1], device=x.device)
        identity = features[None] if self.shared else mix(self.node_ids(x, ids))[:, None] ^ features
        return inverted(self.keep_identities(identity, generator), self.p, x.dtype)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, generator: torch.Generator | None = None, ids: Tensor | None = None
    ) -> Tensor:
        """Drop features of ``x``, shape (N, F); arguments as in :meth:`mask`.

        Raises:
            TypeError: if ``x`` is not floating point, or ``ids`` are not integers.
            ValueError: if ``x`` or ``ids`` have wrong shapes.
        """
        check_floating(x, "NodeFeatureDropout")
        check_rank(x, (2,), "NodeFeatureDropout")
        if mask is not None:
            return x * check_mask(mask, x)
        if not self.active:
            return x
        fresh = self._function is None and generator is None and ids is None
        if fresh and not self.shared and not x.is_complex():
            return functional.dropout(x, self.p, training=True)
        return x * self.mask(x, generator, ids)

    def extra_repr(self) -> str:
        """Say the settings."""
        return f"p={self.p}, shared={self.shared}"


def _check_nodes(x: Tensor) -> None:
    check_floating(x, "NodeDropout")
    if x.dim() == 0:
        raise ValueError("NodeDropout needs an input with nodes on its first axis, got a scalar")


class NodeDropout(_IdentitySite):
    r"""Dropout of whole nodes: a row of the features is 0 with probability p, else divided by 1−p.

    Source: "DropNode", Feng et al., NeurIPS 2020 (arXiv 2005.11079), section 3.1.

    Args:
        p: the rate, in [0, 1).
    """

    def mask(self, x: Tensor, generator: torch.Generator | None = None, ids: Tensor | None = None) -> Tensor:
        """Return a mask of values 0 and 1/(1−p), shape (N, 1, …) with as many axes as ``x``.

        Args:
            x: node features, shape (N, …).
            generator: for a fresh draw.
            ids: integer identities of the nodes, shape (N,); their row numbers if not given. Rows of equal identity
                (copies of one node, such as ghost atoms) share their fate.

        Raises:
            ValueError: if ``x`` has no axes, or ``ids`` has a wrong shape.
            TypeError: if ``ids`` are not integers.
        """
        _check_nodes(x)
        keep = self.keep_identities(self.node_ids(x, ids), generator)
        return inverted(keep, self.p, x.dtype).reshape(-1, *[1] * (x.dim() - 1))

    def forward(
        self, x: Tensor, mask: Tensor | None = None, generator: torch.Generator | None = None, ids: Tensor | None = None
    ) -> Tensor:
        """Drop rows of ``x``, shape (N, …); arguments as in :meth:`mask`.

        Raises:
            TypeError: if ``x`` is not floating point, or ``ids`` are not integers.
            ValueError: if ``x`` has no axes, or ``ids`` has a wrong shape.
        """
        _check_nodes(x)
        if mask is not None:
            return x * check_mask(mask, x)
        return x * self.mask(x, generator, ids) if self.active else x


class EdgeDropout(_IdentitySite):
    r"""Dropout of edges, as weights of 0 or 1/(1−p) on messages, or as a filtered edge list (:meth:`filter`).

    One bit per undirected edge: (i, j) and (j, i) live or die together, also in fresh draws. So do (i, j, S) and (j, i, −S)
    in periodic structures, where the cell shifts S tell the images of a pair apart. A self-loop is one edge; so is the
    bond of an atom with its own image, listed as (i, i, S) and (i, i, −S). (PyTorch Geometric's
    ``dropout_edge(force_undirected=True)`` puts a surviving self-loop into the list twice.)

    The expected weight is the weight, so a sum of messages is unbiased if the weights are applied *after* any
    normalisation by degrees; weights given to a layer that normalises by weighted degrees afterwards, such as
    ``GCNConv``, lose their factor again.

    Source: "DropEdge", Rong et al., ICLR 2020 (arXiv 1907.10903), section 3.1, who do not rescale.

    Args:
        p: the rate, in [0, 1).
        undirected: whether both directions of an edge share their bit; if not, (i, j, S) and (j, i, −S) are independent.
    """

    settings = DropoutSite.settings | {"undirected": check_flag}

    def __init__(self, p: float = 0.5, *, undirected: bool = True) -> None:
        super().__init__(p)
        self.undirected = undirected

    def _identity(self, edge_index: Tensor, edge_shift: Tensor | None, ids: Tensor | None) -> Tensor:
        check_integers(edge_index, (2, None), "`edge_index`")
        if edge_shift is not None:
            check_integers(edge_shift, (edge_index.shape[1], 3), "`edge_shift`")
        if ids is not None:
            check_integers(ids, (None,), "`ids`")
            try:  # not `ids[edge_index]`, where −1 is the last node
                edge_index = ids.index_select(0, edge_index.reshape(-1).to(torch.int64)).reshape(edge_index.shape)
            except (IndexError, RuntimeError) as error:
                raise ValueError(f"`edge_index` must lie in [0, {len(ids)}), the number of `ids`: {error}") from error
        nodes = edge_index.to(torch.int64)
        return edge_identity(nodes, edge_shift) if self.undirected else _directed_identity(nodes, edge_shift)

    def mask(
        self,
        edge_index: Tensor,
        generator: torch.Generator | None = None,
        *,
        edge_shift: Tensor | None = None,
        ids: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Return a mask of values 0 and 1/(1−p), shape (E,).

        Args:
            edge_index: node numbers of both ends, shape (2, E), integers.
            generator: for a fresh draw.
            edge_shift: the cell shift S of the second end relative to the first, shape (E, 3), integers; zero if not
                given.
            ids: integer identities of the nodes, shape (N,), such as each atom's number in its own graph; the numbers in
                ``edge_index`` if not given. Edges of equal identity share their fate.
            dtype: of the result, torch's default if not given.

        Raises:
            ValueError: if one of the index tensors has a wrong shape.
            TypeError: if one of them does not hold integers.
        """
        check_dtype(dtype)
        keep = self.keep_identities(self._identity(edge_index, edge_shift, ids), generator)
        return inverted(keep, self.p, dtype or torch.get_default_dtype())

    def forward(
        self,
        edge_index: Tensor,
        edge_weight: Tensor | None = None,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        edge_shift: Tensor | None = None,
        ids: Tensor | None = None,
    ) -> Tensor:
        """Return the edges' weights times the mask, shape (E,), or (E, …) if that is the shape of ``edge_weight``.

        In evaluation, ``edge_weight`` as it is. Weights or messages: whatever has the edges on its first axis; 1 if not
        given. Other arguments as in :meth:`mask`.

        Raises:
            ValueError: if a tensor has a wrong shape.
            TypeError: if an index tensor does not hold integers, or ``edge_weight`` is not floating point.
        """
        check_integers(edge_index, (2, None), "`edge_index`")
        n_edges = edge_index.shape[1]
        if edge_weight is None:
            edge_weight = torch.ones(n_edges, device=edge_index.device)
        check_floating(edge_weight, "EdgeDropout")
        if edge_weight.dim() == 0 or edge_weight.shape[0] != n_edges:
            raise ValueError(f"`edge_weight` needs {n_edges} edges on its first axis, got {tuple(edge_weight.shape)}")
        if mask is not None:
            mask = _checked_mask(mask, n_edges).to(edge_weight.dtype)
        elif self.active:
            mask = self.mask(edge_index, generator, edge_shift=edge_shift, ids=ids, dtype=edge_weight.dtype)
        else:
            return edge_weight
        return edge_weight * mask.reshape(-1, *[1] * (edge_weight.dim() - 1))

    def filter(
        self,
        edge_index: Tensor,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        edge_shift: Tensor | None = None,
        ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the surviving edges, shape (2, E'), in their order, and which they are, boolean, shape (E,).

        Select weights, features and shifts of edges with the second. Nothing is rescaled here: divide messages by 1−p for
        an unbiased sum. Shapes depend on the draw, so for ``vmap`` and whole-graph compilation use weights. Arguments as
        in :meth:`mask`.

        Raises:
            ValueError: if a tensor has a wrong shape.
            TypeError: if an index tensor does not hold integers.
        """
        check_integers(edge_index, (2, None), "`edge_index`")
        if mask is not None:
            kept = _checked_mask(mask, edge_index.shape[1]) != 0
        elif self.active:
            kept = self.keep_identities(self._identity(edge_index, edge_shift, ids), generator)
        else:
            return edge_index, torch.ones(edge_index.shape[1], dtype=torch.bool, device=edge_index.device)
        return edge_index[:, kept], kept

    def extra_repr(self) -> str:
        """Say the settings."""
        return f"p={self.p}, undirected={self.undirected}"


def node_feature_dropout(
    x: Tensor,
    p: float = 0.5,
    training: bool = True,
    *,
    shared: bool = False,
    ids: Tensor | None = None,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Functional :class:`NodeFeatureDropout`."""
    return NodeFeatureDropout(p, shared=shared).train(training)(x, mask, generator, ids)


def node_dropout(
    x: Tensor,
    p: float = 0.5,
    training: bool = True,
    *,
    ids: Tensor | None = None,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Functional :class:`NodeDropout`."""
    return NodeDropout(p).train(training)(x, mask, generator, ids)


def edge_dropout(
    edge_index: Tensor,
    edge_weight: Tensor | None = None,
    p: float = 0.5,
    training: bool = True,
    *,
    undirected: bool = True,
    edge_shift: Tensor | None = None,
    ids: Tensor | None = None,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Functional :class:`EdgeDropout`: the edges' weights times the mask, shape (E, …)."""
    site = EdgeDropout(p, undirected=undirected).train(training)
    return site(edge_index, edge_weight, mask, generator, edge_shift=edge_shift, ids=ids)


def drop_edges(
    edge_index: Tensor,
    p: float = 0.5,
    training: bool = True,
    *,
    undirected: bool = True,
    edge_shift: Tensor | None = None,
    ids: Tensor | None = None,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Functional :meth:`EdgeDropout.filter`: the surviving edges, shape (2, E'), and which they are, shape (E,)."""
    site = EdgeDropout(p, undirected=undirected).train(training)
    return site.filter(edge_index, mask, generator, edge_shift=edge_shift, ids=ids)
