import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.nn import GCNConv
from torch_geometric.utils import dropout_edge

from forcedrop.dropout import edge_mask
from forcedrop.dropout.function import FunctionSample
from forcedrop.dropout.graphs import (
    EdgeDropout,
    NodeDropout,
    NodeFeatureDropout,
    drop_edges,
    edge_dropout,
    node_dropout,
    node_feature_dropout,
)
from forcedrop.dropout.site import DropoutSite
from forcedrop.testing import assert_unbiased_mask


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def frozen(site: DropoutSite, sample: int | Tensor = 0, seed: int = 0) -> DropoutSite:
    site._function, site._site = FunctionSample(seed, sample), "s"
    return site


def features(n: int = 60, f: int = 40) -> Tensor:
    return torch.randn(n, f, generator=seeded(), dtype=torch.float64)


def undirected_list(n: int = 200, edges: int = 3000, seed: int = 0) -> Tensor:
    """Every pair in both directions, self-loops once, no edge twice, in random order."""
    pairs = torch.randint(0, n, (2, edges), generator=seeded(seed)).sort(0).values.unique(dim=1)
    both = torch.cat([pairs, pairs.flip(0)], 1).unique(dim=1)
    return both[:, torch.randperm(both.shape[1], generator=seeded(seed + 1))]


def periodic_list(n: int = 20, edges: int = 2000) -> tuple[Tensor, Tensor]:
    """Every (i, j, S) with its (j, i, −S), many of them images of an atom itself."""
    rows = torch.cat(
        [torch.randint(0, n, (2, edges), generator=seeded()), torch.randint(-1, 2, (3, edges), generator=seeded(1))]
    )
    rows[1, ::2] = rows[0, ::2]
    back = torch.cat([rows[1:2], rows[0:1], -rows[2:]])
    both = torch.cat([rows, back], 1).unique(dim=1)
    return both[:2], both[2:].T


def by_key(edge_index: Tensor, values: Tensor, shift: Tensor | None = None) -> dict[tuple[int, ...], float]:
    columns = edge_index.T if shift is None else torch.cat([edge_index.T, shift], 1)
    return dict(zip(map(tuple, columns.tolist()), values.tolist(), strict=True))


SITES = [NodeFeatureDropout(0.3), NodeFeatureDropout(0.3, shared=True), NodeDropout(0.3)]


# --- nodes and their features


@pytest.mark.parametrize("site", SITES)
def test_expectation_and_variance_of_node_masks(site: DropoutSite) -> None:
    """Mean 1, variance p/(1−p) of every entry, within 5 standard errors over independent draws."""
    x, n, p = features(6, 5), 4000, site.p
    generator = seeded()
    outputs = torch.stack([site(x, generator=generator) for _ in range(n)])
    ratio = outputs / x
    spread = (p / (1 - p)) ** 0.5
    assert ((ratio.mean(0) - 1).abs() < 5 * spread / n**0.5).all()
    fourth = p + (1 / (1 - p) - 1) ** 4 * (1 - p) - spread**4  # variance of (m − 1)²
    assert (((ratio - 1).square().mean(0) - spread**2).abs() < 5 * (fourth / n) ** 0.5).all()


def test_units_of_node_masks() -> None:
    x = features()
    assert NodeFeatureDropout(0.5).mask(x, seeded()).shape == (60, 40)
    assert NodeFeatureDropout(0.5, shared=True).mask(x, seeded()).shape == (1, 40)
    assert NodeDropout(0.5).mask(x, seeded()).shape == (60, 1)
    assert NodeDropout(0.5).mask(x.reshape(60, 10, 2, 2), seeded()).shape == (60, 1, 1, 1)
    rows = NodeDropout(0.5)(x, generator=seeded())
    assert torch.equal((rows == 0).all(1), (rows == 0).any(1))
    columns = NodeFeatureDropout(0.5, shared=True)(x)
    assert torch.equal((columns == 0).all(0), (columns == 0).any(0))


def test_entries_of_a_keyed_mask_are_independent() -> None:
    mask = NodeFeatureDropout(0.5).mask(torch.zeros(400, 300), seeded(), torch.arange(400) * 7)
    assert_unbiased_mask(mask, 0.5)
    bits = (mask > 0).double() - 0.5
    for lagged in (bits[1:] * bits[:-1], bits[:, 1:] * bits[:, :-1], bits[1:, 1:] * bits[:-1, :-1]):
        assert abs(float(lagged.mean())) < 5 * 0.25 / lagged.numel() ** 0.5


@pytest.mark.parametrize("site", [NodeFeatureDropout(0.4), NodeDropout(0.4)])
@pytest.mark.parametrize("freeze", [True, False])
def test_node_mask_follows_the_identity(site: DropoutSite, freeze: bool) -> None:
    """Reordered, cut or repeated rows keep the bits of their ids; another sample or generator has others."""
    site, x, ids = copy.deepcopy(site), features(), torch.randperm(60, generator=seeded()) + 1000
    if freeze:
        frozen(site)
    mask = site.mask(x, seeded(), ids)
    rows = torch.randint(0, 60, (45,), generator=seeded(3))
    assert torch.equal(site.mask(x[rows], seeded(), ids[rows]), mask[rows])
    other = frozen(site, 1) if freeze else site
    assert not torch.equal(other.mask(x, seeded(1), ids), mask)


def test_graph_numbers_as_ids_give_a_channel_mask_per_graph() -> None:
    batch = torch.arange(5).repeat_interleave(12)
    mask = NodeFeatureDropout(0.5).mask(features(), seeded(), batch).reshape(5, 12, 40)
    assert torch.equal(mask, mask[:, :1].expand_as(mask))
    assert len(mask[:, 0].unique(dim=0)) == 5


def test_frozen_default_identity_is_the_row_number() -> None:
    x = features()
    for kind in (NodeFeatureDropout, NodeDropout):
        site = frozen(kind(0.5)).eval()
        assert torch.equal(site(x), site(x, ids=torch.arange(60)))
        assert torch.equal(site(x)[:7], site(x[:7]))


@pytest.mark.parametrize("site", SITES)
def test_evaluation_is_the_identity(site: DropoutSite) -> None:
    site, x = copy.deepcopy(site), features()
    assert site.eval()(x) is x
    assert type(site)(0.0).train()(x) is x
    assert not torch.equal(frozen(site)(x), x)


def test_fresh_feature_dropout_is_torchs_own() -> None:
    x = features()
    torch.manual_seed(3)
    ours = node_feature_dropout(x, 0.3)
    torch.manual_seed(3)
    assert torch.equal(ours, nn.functional.dropout(x, 0.3))


# --- edges


@pytest.mark.parametrize("freeze", [True, False])
def test_both_directions_agree_and_lists_may_be_rebuilt(freeze: bool) -> None:
    edges = undirected_list()
    site = frozen(EdgeDropout(0.4)) if freeze else EdgeDropout(0.4)
    mask = site.mask(edges, seeded())
    weight = by_key(edges, mask)
    assert all(weight[j, i] == value for (i, j), value in weight.items())
    order = torch.randperm(edges.shape[1], generator=seeded(5))[:1500]
    assert torch.equal(site.mask(edges[:, order], seeded()), mask[order])
    other = frozen(site, 1) if freeze else site
    assert not torch.equal(other.mask(edges, seeded(1)), mask)


def test_periodic_images_are_edges_of_their_own_and_counted_once() -> None:
    edges, shift = periodic_list()
    mask = EdgeDropout(0.5).mask(edges, seeded(), edge_shift=shift)
    weight = by_key(edges, mask, shift)
    for (i, j, *s), value in weight.items():
        assert weight[(j, i, *(-x for x in s))] == value
    images: dict[tuple[int, int], set[float]] = {}
    for (i, j, *_), value in weight.items():
        images.setdefault((i, j), set()).add(value)
    assert any(len(values) == 2 for (i, j), values in images.items() if i == j)


def test_rate_counts_undirected_edges() -> None:
    """Kept pairs, kept self-loops and kept self-images are each binomial: number of bits = number of undirected edges."""
    p, draws = 0.3, 400
    edges, shift = periodic_list()
    canonical: dict[tuple, int] = {}
    for column, key in enumerate(torch.cat([edges.T, shift], 1).tolist()):
        i, j, *s = key
        canonical.setdefault(min((i, j, *s), (j, i, *(-x for x in s))), column)
    first = torch.tensor(list(canonical.values()))
    generator = seeded()
    kept = torch.stack([EdgeDropout(p).mask(edges, generator, edge_shift=shift) > 0 for _ in range(draws)])[
        :, first
    ].double()
    n = len(first)
    counts = kept.sum(1)
    assert abs(float(counts.mean()) - n * (1 - p)) < 5 * (n * p * (1 - p) / draws) ** 0.5
    # the variance of the count is that of n independent bits, not of n/2 or 2n: 5 standard errors of a variance
    assert abs(float(counts.var()) / (n * p * (1 - p)) - 1) < 5 * (2 / draws) ** 0.5
    assert ((kept.mean(0) - (1 - p)).abs() < 5.5 * (p * (1 - p) / draws) ** 0.5).all()


def test_self_loops_stay_single_where_others_double_them() -> None:
    edges = torch.cat([undirected_list(), torch.arange(200).repeat(2, 1)], 1).unique(dim=1)
    kept, which = drop_edges(edges, 0.5, generator=seeded())
    assert torch.equal(kept, edges[:, which])
    assert kept.shape[1] == len(kept.unique(dim=1).T)
    loops = int((kept[0] == kept[1]).sum())
    assert abs(loops - 100) < 5 * 50**0.5
    theirs, _ = dropout_edge(edges, 0.5, force_undirected=True)
    assert int((theirs[0] == theirs[1]).sum()) == 2 * theirs[:, theirs[0] == theirs[1]].unique(dim=1).shape[1]


def test_directed_edges_have_a_bit_each() -> None:
    edges, shift = periodic_list()
    for freeze in (True, False):
        site = EdgeDropout(0.5, undirected=False)
        mask = (frozen(site) if freeze else site).mask(edges, seeded(), edge_shift=shift)
        assert_unbiased_mask(mask, 0.5)
        weight = by_key(edges, mask, shift)
        pairs = [
            (v, weight[(j, i, *(-x for x in s))])
            for (i, j, *s), v in weight.items()
            if (i, j, *s) > (j, i, *(-x for x in s))
        ]
        agree = sum(a == b for a, b in pairs)
        assert abs(agree - len(pairs) / 2) < 5 * (len(pairs) / 4) ** 0.5
        assert torch.equal(site.mask(edges.flip(1), seeded(), edge_shift=shift.flip(0)), mask.flip(0))
    fates = torch.stack(
        [EdgeDropout(0.5, undirected=False).mask(edges, seeded(k), edge_shift=shift) for k in range(64)]
    )
    assert len(fates.T.unique(dim=0)) == edges.shape[1]


def test_ids_name_nodes() -> None:
    """Two copies of a graph in one batch: equal under the atoms' numbers, different without."""
    edges = undirected_list(50, 400)
    both = torch.cat([edges, edges + 50], 1)
    site = frozen(EdgeDropout(0.5))
    mask = site.mask(both, ids=torch.arange(50).repeat(2))
    n = edges.shape[1]
    assert torch.equal(mask[:n], mask[n:])
    assert torch.equal(mask[:n], site.mask(edges))
    mask = site.mask(both)
    assert not torch.equal(mask[:n], mask[n:])


def test_frozen_bits_are_those_of_the_mask_function() -> None:
    edges, shift = periodic_list()
    expected = edge_mask(0.3, edges, shift, seed=4, samples=[7], site="s")[0]
    assert torch.equal(frozen(EdgeDropout(0.3), 7, seed=4).mask(edges, edge_shift=shift), expected)


def test_weights_mask_and_filter_are_one_dropout() -> None:
    edges = undirected_list()
    site = EdgeDropout(0.3)
    weight = torch.rand(edges.shape[1], 4, generator=seeded(), dtype=torch.float64)
    mask = site.mask(edges, seeded(2), dtype=torch.float64)
    kept, which = site.filter(edges, generator=seeded(2))
    assert torch.equal(which, mask > 0)
    assert torch.equal(kept, edges[:, mask > 0])
    for out in (site(edges, weight, generator=seeded(2)), site(edges, weight, mask)):
        assert torch.equal(out, weight * mask[:, None])
    assert torch.equal(edge_dropout(edges, weight, 0.3, generator=seeded(2)), weight * mask[:, None])
    assert torch.equal(site.filter(edges, mask)[0], kept)
    assert torch.equal(site(edges, generator=seeded(2)), mask.float())


def test_evaluation_leaves_edges_alone() -> None:
    edges = undirected_list()
    weight = torch.rand(edges.shape[1])
    site = EdgeDropout(0.5).eval()
    assert site(edges, weight) is weight
    assert torch.equal(site(edges), torch.ones(edges.shape[1]))
    kept, which = site.filter(edges)
    assert kept is edges
    assert bool(which.all())
    assert EdgeDropout(0.0)(edges, weight) is weight


def test_messages_of_a_graph_network_are_unbiased() -> None:
    """GCN without its own normalisation: the mean over masks of the aggregate is the aggregate."""
    torch.manual_seed(0)
    edges, x = undirected_list(12, 40), torch.randn(12, 3, dtype=torch.float64)
    conv = GCNConv(3, 2, normalize=False).double()
    weight = torch.rand(edges.shape[1], dtype=torch.float64)
    site, generator = EdgeDropout(0.4), seeded()
    with torch.no_grad():
        outputs = torch.stack([conv(x, edges, site(edges, weight, generator=generator)) for _ in range(2000)])
        expected = conv(x, edges, weight)
    error = outputs.std(0) / 2000**0.5
    assert ((outputs.mean(0) - expected).abs() <= 5 * error + 1e-12).all()
    # and with its normalisation it runs, in either form
    kept, _ = site.filter(edges, generator=generator)
    assert GCNConv(3, 2).double()(x, kept).shape == (12, 2)
    assert GCNConv(3, 2).double()(x, edges, site(edges, weight)).shape == (12, 2)


# --- everywhere


def test_gradients() -> None:
    x = features(5, 4).requires_grad_()
    edges = undirected_list(5, 8)
    weight = torch.rand(edges.shape[1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: node_feature_dropout(t, 0.4, generator=seeded()), x)
    assert torch.autograd.gradcheck(lambda t: node_feature_dropout(t, 0.4, shared=True, generator=seeded()), x)
    assert torch.autograd.gradcheck(lambda t: node_dropout(t, 0.4, generator=seeded()), x)
    assert torch.autograd.gradcheck(lambda t: edge_dropout(edges, t, 0.4, generator=seeded()), weight)


def test_vmap_over_samples_is_the_loop() -> None:
    x, edges = features(9, 4), undirected_list(9, 20)

    def once(sample: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        feature, node, edge = (frozen(s, sample) for s in (NodeFeatureDropout(0.4), NodeDropout(0.4), EdgeDropout(0.4)))
        return feature(x), node(x), edge(edges)

    together = torch.func.vmap(once)(torch.arange(5))
    for k in range(5):
        for ours, alone in zip(together, once(torch.tensor(k)), strict=True):
            assert torch.equal(ours[k], alone)


def test_vmap_of_fresh_draws() -> None:
    edges = undirected_list(20, 60)
    masks = torch.func.vmap(lambda x: EdgeDropout(0.5)(edges, x), randomness="different")(torch.ones(4, edges.shape[1]))
    assert len(masks.unique(dim=0)) == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    edges, x = undirected_list(30, 60), features(30, 4).to(dtype)
    for out in (*(s(x, ids=torch.arange(30)) for s in SITES), edge_dropout(edges, x[edges[0]], 0.5)):
        assert out.dtype == dtype
        assert bool(out.isfinite().all())


def test_compiles_whole() -> None:
    edges, x = undirected_list(9, 20), features(9, 4)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sites = nn.ModuleList([NodeFeatureDropout(0.4), NodeDropout(0.4)])
            self.edges = EdgeDropout(0.4)

        def forward(self, x: Tensor) -> Tensor:
            for site in self.sites:
                x = site(x)
            return torch.zeros_like(x).index_add(0, edges[1], x[edges[0]] * self.edges(edges)[:, None])

    network = Network()
    torch.compile(network, backend="eager", fullgraph=True)(x)
    for site in (*network.sites, network.edges):
        frozen(site, torch.tensor(3))
    assert torch.equal(torch.compile(network, backend="eager", fullgraph=True)(x), network(x))


def test_copies_pickles_and_prints() -> None:
    for site in (*SITES, EdgeDropout(0.3, undirected=False)):
        for twin in (copy.deepcopy(site), pickle.loads(pickle.dumps(site))):
            assert repr(twin) == repr(site)
        assert "p=0.3" in repr(site)
        assert not site.state_dict()
    assert "undirected=False" in repr(EdgeDropout(0.3, undirected=False))
    x = features()
    assert torch.equal(nn.Sequential(NodeDropout(0.5), NodeFeatureDropout(0.5)).eval()(x), x)


@pytest.mark.parametrize("kind", [NodeFeatureDropout, NodeDropout, EdgeDropout])
@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_rate_outside(kind: type[DropoutSite], p: float) -> None:
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
        kind(p)


def test_wrong_nodes() -> None:
    x = features()
    with pytest.raises(ValueError, match="2 axes, got shape"):
        node_feature_dropout(x[None])
    with pytest.raises(ValueError, match="scalar"):
        node_dropout(torch.tensor(1.0))
    for layer in (node_feature_dropout, node_dropout):
        with pytest.raises(TypeError, match=r"floating-point input, got torch\.int64"):
            layer(x.long())
        with pytest.raises(ValueError, match=r"`ids` must have shape \(60\), got \(59,\)"):
            layer(x, ids=torch.arange(59))
        with pytest.raises(TypeError, match=r"`ids` must hold integers, got torch\.float32"):
            layer(x, ids=torch.arange(60.0))


def test_wrong_edges() -> None:
    edges, shift = periodic_list()
    n = edges.shape[1]
    site = EdgeDropout(0.5)
    for call in (site, site.mask, site.filter):
        with pytest.raises(ValueError, match=r"`edge_index` must have shape \(2, any\), got"):
            call(edges.T)
        with pytest.raises(TypeError, match="`edge_index` must hold integers"):
            call(edges.float())
        with pytest.raises(ValueError, match=rf"`edge_shift` must have shape \({n}, 3\)"):
            call(edges, edge_shift=shift[:-1])
        with pytest.raises(TypeError, match="`edge_shift` must hold integers"):
            call(edges, edge_shift=shift.double())
        with pytest.raises(ValueError, match=r"`ids` must have shape \(any\)"):
            call(edges, ids=edges)
        with pytest.raises(ValueError, match=r"`edge_index` must lie in \[0, 3\)"):
            call(edges, ids=torch.arange(3))
    with pytest.raises(ValueError, match=rf"`edge_weight` needs {n} edges on its first axis"):
        site(edges, torch.rand(n - 1))
    with pytest.raises(TypeError, match="floating-point"):
        site(edges, torch.ones(n, dtype=torch.int64))
