"""Dropout on graphs, from heterophily to homophily: when does it hurt to drop features, nodes or edges, and when does it help?

Networks with weights for a node's own features and others for the mean over its neighbours learn two classes from 40 labelled
nodes of a contextual stochastic block model (400 nodes, 4 neighbours on average). Homophily is the share of neighbours of the
own class: at 0 and at 1 neighbours tell the class, at 0.5 they tell nothing. Dropout acts like a ridge penalty, so each kind
makes the network rely on what it does not drop, and that is good or bad according to where the information is. One should see:

1. Edge dropout makes the neighbours count two to three times less, at any homophily. It helps in the middle, where neighbours are
   noise (three points of accuracy), and hurts towards both ends, where they are the signal (two to five points).
2. Node dropout makes them count about twice as much, feature dropout somewhat more: what is dropped from a mean over neighbours
   does less harm than what is dropped from the node itself. Both cost most in the middle, node dropout 13 points, and nothing
   that shows at the ends.
3. Zachary's karate club (34 members, only the heads of the two factions are labelled, a member's features are his friends): the
   accuracy is about 31 of 32 with or without dropout. But samples of edge dropout tell whose faction is open: they disagree seven
   times as much about the seven members who have a quarter or more of their friends in the other faction.

The features' strength was chosen, on other seeds, so that edge dropout shows both signs: with stronger features its losses at the
ends shrink to a point or less. Accuracies are on unlabelled nodes, in percent; ± is one standard error over graphs, labels and
initialisations; gains are paired.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import gallery
import torch
from gallery import Numbers
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional
from torch_geometric.datasets import KarateClub

from forcedrop.dropout import EdgeDropout, NodeDropout, NodeFeatureDropout, classification_summary, mc_samples
from forcedrop.dropout.summaries import ClassificationSummary

N_NODES, N_TRAIN, N_FEATURES, DEGREE, STRENGTH = 400, 40, 128, 4, 1.5
FIRST_SEED = 1000  # the settings were chosen on other seeds
# a node meets four edges and only one bit of its own, so edges need a larger rate for an effect of the same size
RATES = {"none": 0.0, "feature": 0.5, "node": 0.5, "edge": 0.8}
KARATE_RATE = 0.5
STYLES = {"none": ("k", "o"), "feature": ("tab:blue", "s"), "node": ("tab:orange", "D"), "edge": ("tab:red", "^")}
# who went with Mr. Hi; W. W. Zachary, J. Anthropological Research 33, 452 (1977), table 3, counted from 0; edges: torch_geometric
MR_HI = (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 16, 17, 19, 21)
HEADS = (0, 33)


class Graph(NamedTuple):
    """A graph of N nodes and E directed edges, each undirected one in both directions.

    Attributes:
        x: features, shape (N, F).
        edge_index: sender and receiver, shape (2, E).
        weight: one over the receiver's degree, shape (E,).
        labels: shape (N,).
    """

    x: Tensor
    edge_index: Tensor
    weight: Tensor
    labels: Tensor


class GraphNetwork(nn.Module):
    """Two layers of own features plus the mean over neighbours, each with its own weights.

    GraphSAGE with mean aggregation: Hamilton, Ying & Leskovec, NIPS 2017, arXiv 1706.02216.
    """

    def __init__(self, n_features: int, kind: str, p: float, width: int = 32) -> None:
        super().__init__()
        sizes = [(n_features, width), (width, 2)]
        rates = {name: p if name == kind else 0.0 for name in RATES}
        self.own = nn.ModuleList(nn.Linear(*size) for size in sizes)
        self.neighbours = nn.ModuleList(nn.Linear(*size, bias=False) for size in sizes)
        self.node = NodeDropout(rates["node"])
        self.feature = nn.ModuleList(NodeFeatureDropout(rates["feature"]) for _ in sizes)
        self.edge = nn.ModuleList(EdgeDropout(rates["edge"]) for _ in sizes)

    def forward(self, x: Tensor, edge_index: Tensor, weight: Tensor) -> Tensor:
        """Return logits, shape (N, 2)."""
        sender, receiver = edge_index
        x = self.node(x)
        for layer, (own, neighbours) in enumerate(zip(self.own, self.neighbours, strict=True)):
            x = self.feature[layer](x if layer == 0 else x.relu())
            # the degrees stay those of the whole graph, so that the expected mean over neighbours is the mean
            messages = neighbours(x)[sender] * self.edge[layer](edge_index, weight)[:, None]
            x = own(x).index_add(0, receiver, messages)
        return x


def main(fast: bool = False, figure: Path | None = None) -> Numbers:
    """Sweep homophily, then split the karate club."""
    homophilies = (0.05, 0.5, 0.95) if fast else (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95)
    n_seeds, n_steps = (2, 60) if fast else (6, 100)
    found = {kind: sweep(kind, homophilies, n_seeds, n_steps) for kind in STYLES}  # shape (homophilies, seeds, 2)
    accuracies = {kind: values[..., 0] for kind, values in found.items()}
    reliances = {kind: values[..., 1] for kind, values in found.items()}
    gains = {kind: values - accuracies["none"] for kind, values in accuracies.items() if kind != "none"}
    for title, shown in (
        (f"accuracy [%], {n_seeds} graphs", {"none": accuracies["none"]}),
        ("gain over no dropout [percentage points]", gains),
        ("spread of what the neighbours add to the logit, relative to that without them", reliances),
    ):
        rows = [(kind, RATES[kind], *map(pm, values)) for kind, values in shown.items()]
        gallery.table(title, ("dropped", "p", *(f"homophily {h}" for h in homophilies)), rows)

    club, n_clubs = karate_club(), 2 if fast else 8
    split = {kind: karate_accuracy(club, kind, n_clubs) for kind in STYLES}
    gallery.table("karate club", ("dropped", "accuracy [%]"), [(kind, pm(values)) for kind, values in split.items()])
    samples = [karate_samples(club, FIRST_SEED + i) for i in range(n_clubs)]
    open_ones = other_friends(club) >= 0.25
    doubt = torch.tensor([[float(s.mutual_information[m].mean()) for m in (open_ones, ~open_ones)] for s in samples])
    print(
        f"\nepistemic part [nat], members {open_ones.nonzero().ravel().tolist()}: {pm(doubt[:, 0])}; others: {pm(doubt[:, 1])}"
    )

    gallery.save(draw(homophilies, accuracies["none"], gains, reliances, club, samples[0]), figure)
    middle = homophilies.index(0.5)
    numbers = {f"gain at 0.5, {kind}": float(values[middle].mean()) for kind, values in gains.items()}
    numbers |= {f"reliance at 0.5, {kind}": float(values[middle].mean()) for kind, values in reliances.items()}
    return numbers | {"doubt, open": float(doubt[:, 0].mean()), "doubt, others": float(doubt[:, 1].mean())}


def sweep(kind: str, homophilies: tuple[float, ...], n_seeds: int, n_steps: int) -> Tensor:
    """Return accuracy [%] and reliance on neighbours, shape (homophilies, seeds, 2)."""
    found = torch.zeros(len(homophilies), n_seeds, 2)
    for i, homophily in enumerate(homophilies):
        for number in range(n_seeds):
            seed = FIRST_SEED + number
            graph = block_model(homophily, seed)
            order = torch.randperm(N_NODES, generator=torch.Generator().manual_seed(seed))
            model = trained(graph, order[:N_TRAIN], kind, RATES[kind], seed, n_steps)
            found[i, number] = torch.tensor([accuracy(model, graph, order[N_TRAIN:]), reliance(model, graph)])
    return found


def block_model(homophily: float, seed: int) -> Graph:
    """Return a contextual stochastic block model: two classes of equal size, Gaussian features, neighbours by class.

    Source: Deshpande et al., NeurIPS 2018, arXiv 1807.08494, section 1, with the share of neighbours of the own class for λ.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(N_NODES) % 2
    rate = 2 * DEGREE / N_NODES * torch.where(labels[:, None] == labels, homophily, 1 - homophily)
    i, j = (torch.rand(N_NODES, N_NODES, generator=generator) < rate).triu(1).nonzero(as_tuple=True)
    direction = functional.normalize(torch.randn(N_FEATURES, generator=generator), dim=0)
    noise = torch.randn(N_NODES, N_FEATURES, generator=generator)
    x = STRENGTH * (2 * labels - 1)[:, None] * direction + noise
    return with_degrees(x, torch.stack([torch.cat([i, j]), torch.cat([j, i])]), labels)


def karate_club() -> Graph:
    """Return the club: class 0 for Mr. Hi's faction, 1 for the officer's; features tell who is a friend, or oneself."""
    labels = torch.ones(34, dtype=torch.long)
    labels[list(MR_HI)] = 0
    edge_index = KarateClub()[0].edge_index
    x = torch.eye(34).index_put(tuple(edge_index), torch.tensor(1.0))
    return with_degrees(x, edge_index, labels)


def with_degrees(x: Tensor, edge_index: Tensor, labels: Tensor) -> Graph:
    """Return the graph with the weights of a mean over neighbours."""
    receiver = edge_index[1]
    return Graph(x, edge_index, 1 / torch.bincount(receiver, minlength=len(x))[receiver], labels)


def trained(graph: Graph, train: Tensor, kind: str, p: float, seed: int, n_steps: int) -> GraphNetwork:
    """Return a network trained on the labels of the nodes ``train``, in evaluation mode."""
    torch.manual_seed(seed)
    model = GraphNetwork(graph.x.shape[1], kind, p)
    optimiser = torch.optim.Adam(model.parameters(), 1e-2, weight_decay=5e-4)
    for _ in range(n_steps):
        loss = functional.cross_entropy(model(*graph[:3])[train], graph.labels[train])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


def accuracy(model: GraphNetwork, graph: Graph, test: Tensor) -> float:
    """Return the accuracy on the nodes ``test`` [%]."""
    with torch.no_grad():
        return 100 * float((model(*graph[:3]).argmax(-1) == graph.labels)[test].double().mean())


def reliance(model: GraphNetwork, graph: Graph) -> float:
    """Return the spread, over nodes, of what the neighbours add to the logit, relative to that of the logit without them."""
    with torch.no_grad():
        full, alone = (model(graph.x, graph.edge_index, weight).diff() for weight in (graph.weight, 0 * graph.weight))
    return float((full - alone).std() / alone.std())


def karate_accuracy(club: Graph, kind: str, n_seeds: int) -> Tensor:
    """Return the accuracy on the 32 others after training on the two heads, for every seed [%]."""
    others = torch.tensor([i for i in range(34) if i not in HEADS])
    models = [trained(club, torch.tensor(HEADS), kind, KARATE_RATE, FIRST_SEED + i, 100) for i in range(n_seeds)]
    return torch.tensor([accuracy(model, club, others) for model in models])


def karate_samples(club: Graph, seed: int) -> ClassificationSummary:
    """Return what 200 samples of edge dropout say about each member."""
    model = trained(club, torch.tensor(HEADS), "edge", KARATE_RATE, seed, 100)
    with torch.no_grad():
        return classification_summary(mc_samples(model, club[:3], 200, seed))


def other_friends(club: Graph) -> Tensor:
    """Return the share of each member's friends that went with the other faction, shape (34,)."""
    sender, receiver = club.edge_index
    return torch.zeros(34).index_add(0, receiver, club.weight * (club.labels[sender] != club.labels[receiver]))


def layout(club: Graph) -> Tensor:
    """Return places of the members in the plane whose distances are the numbers of steps between them, as far as possible.

    Least squares with weights 1/steps²: Kamada & Kawai, Inf. Process. Lett. 31, 7 (1989).
    """
    steps = torch.full((34, 34), 9.0).index_put(tuple(club.edge_index), torch.tensor(1.0)).fill_diagonal_(0)
    for via in range(34):
        steps = torch.minimum(steps, steps[:, via, None] + steps[via])
    pairs = torch.triu_indices(34, 34, 1)
    wanted = steps[*pairs]
    at = torch.randn(34, 2, generator=torch.Generator().manual_seed(4)).requires_grad_()
    optimiser = torch.optim.Adam([at], 0.05)
    for _ in range(400):
        distance = (at[pairs[0]] - at[pairs[1]]).norm(dim=1)
        stress = ((distance / wanted - 1) ** 2).mean()
        optimiser.zero_grad()
        stress.backward()
        optimiser.step()
    return at.detach()


def pm(values: Tensor) -> str:
    """Return mean ± standard error as text."""
    return f"{values.mean():.3g} ± {values.std() / len(values) ** 0.5:.2g}"


def draw(
    homophilies: tuple[float, ...],
    plain: Tensor,
    gains: dict[str, Tensor],
    reliances: dict[str, Tensor],
    club: Graph,
    summary: ClassificationSummary,
) -> Figure:
    """Show accuracy, gains and reliance against homophily, and the club."""
    figure, (accuracies, gained, relied, picture) = gallery.panels(2, 2, size=(4.8, 3.7))
    for axis, values in ((accuracies, {"none": plain}), (gained, gains), (relied, reliances)):
        for kind, found in values.items():
            colour, marker = STYLES[kind]
            mean, error = found.mean(1), found.std(1) / found.shape[1] ** 0.5
            label = f"{kind} dropout, p = {RATES[kind]}" if RATES[kind] else "no dropout"
            axis.errorbar(homophilies, mean, error, color=colour, marker=marker, ms=4, capsize=2, label=label)
        axis.set(xlabel="homophily (share of neighbours of the own class)", xlim=(0, 1))
    accuracies.set(ylabel="test accuracy [%]", title="Block model: accuracy without dropout")
    gained.axhline(0, color="k", lw=0.8)
    gained.set(ylabel="gain [percentage points]", title="Gain over no dropout, paired (± 1 s.e.)")
    relied.set(ylabel="neighbours’ share of the logit / own share", title="What the network relies on", yscale="log")
    relied.set(yticks=[0.25, 0.5, 1, 2, 4], yticklabels=["0.25", "0.5", "1", "2", "4"], ylim=(0.12, 13))
    relied.legend(fontsize=8, loc="upper center", ncols=2)
    draw_club(figure, picture, club, summary)
    return figure


def draw_club(figure: Figure, axis: Any, club: Graph, summary: ClassificationSummary) -> None:
    """Show the club: the predicted faction as colour, the epistemic part as size, the true faction as shape."""
    at = layout(club)
    for i, j in club.edge_index.T.tolist():
        axis.plot(*at[[i, j]].T, color="0.8", lw=0.6, zorder=1)
    probability, doubt = summary.probabilities[:, 1], summary.mutual_information
    for faction, marker in ((0, "o"), (1, "s")):
        members = club.labels == faction
        style = {"c": probability[members], "s": 100 + 700 * doubt[members], "marker": marker, "cmap": "coolwarm"}
        dots = axis.scatter(*at[members].T, **style, vmin=0, vmax=1, edgecolors="k", linewidths=0.6, zorder=2)
    for i in torch.nonzero(other_friends(club) >= 0.25).ravel().tolist():
        axis.annotate(str(i), at[i].tolist(), ha="center", va="center", fontsize=7, zorder=3)
    figure.colorbar(dots, ax=axis, label="P(goes with the officer)")
    axis.set(xticks=[], yticks=[], xlabel="circles: Mr. Hi’s, squares: the officer’s; size: epistemic part")
    axis.set_title("Karate club, samples of edge dropout")


if __name__ == "__main__":
    gallery.run(main)
