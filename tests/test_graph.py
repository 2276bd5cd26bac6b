import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.neighborlist import neighbor_list

from forcedrop.graph import SIGHT, NeighbourFinder, batch_graphs, build_graph, graph_loader, out_of_sight, pair_vectors
from forcedrop.structures import Frame
from tests.conftest import STRUCTURES, graph_of
from tests.shapes import check_batch, check_graph


def listed(edge_index: np.ndarray, shift: np.ndarray) -> set[tuple[int, ...]]:
    rows = np.concatenate([np.asarray(edge_index).T, np.asarray(shift)], axis=1)
    return {tuple(map(int, row)) for row in rows}


def ase_list(atoms: Atoms, cutoff: float) -> set[tuple[int, ...]]:
    i, j, shift = neighbor_list("ijS", atoms, cutoff)
    return listed(np.stack([i, j]), shift)


@pytest.mark.parametrize("cutoff", [2.5, 4.0, 6.5])
def test_pairs_against_ase(structure: Atoms, cutoff: float) -> None:
    graph = graph_of(structure, cutoff)
    check_graph(graph)
    assert listed(graph.edge_index.numpy(), graph.edge_shift.numpy()) == ase_list(structure, cutoff)


def test_skin_gives_the_same_list_as_no_skin() -> None:
    """Over a walk long enough to rebuild several times; also bit for bit the same order."""
    generator = np.random.default_rng(0)
    atoms = bulk("Si", cubic=True)
    skin, plain = NeighbourFinder(4.0, skin=0.5), NeighbourFinder(4.0)
    for _ in range(60):
        atoms.positions += generator.normal(scale=0.05, size=atoms.positions.shape)
        for a, b in zip(
            skin(atoms.positions, atoms.cell.array, atoms.pbc), plain(atoms.positions, atoms.cell.array, atoms.pbc),
            strict=True,
        ):  # fmt: skip
            assert np.array_equal(a, b)


def test_skin_follows_a_changing_cell_and_another_structure() -> None:
    finder = NeighbourFinder(4.0, skin=1.0)
    for name in ("silicon", "ethanol", "silicon", "copper", "slab"):
        atoms = STRUCTURES[name]()
        for scale in (1.0, 0.97, 0.8, 1.1):
            changed = atoms.copy()
            changed.set_cell(atoms.cell.array * scale, scale_atoms=True)
            edge_index, shift, _ = finder(changed.positions, changed.cell.array, changed.pbc)
            assert listed(edge_index, shift) == ase_list(changed, 4.0), (name, scale)


def test_pair_vectors_and_padding() -> None:
    images = [make() for make in STRUCTURES.values()]
    batch = batch_graphs([graph_of(atoms, 4.0) for atoms in images])
    check_batch(batch)
    vec = pair_vectors(batch, 8.0, batch.forces.dtype)
    distances = vec.norm(dim=-1)
    assert bool((distances[batch.nbr_used] < 4.0).all())
    assert bool((distances[~batch.nbr_used] == 8.0).all())
    expected = np.sort(np.concatenate([neighbor_list("d", atoms, 4.0) for atoms in images]))
    np.testing.assert_allclose(np.sort(distances[batch.nbr_used].numpy()), expected, atol=1e-12)


@pytest.mark.parametrize("names", [list(STRUCTURES), ["slab"], ["copper", "copper"]])
def test_a_batch_against_pyg(names: list[str]) -> None:
    from torch_geometric.data import Batch as PyGBatch
    from torch_geometric.data import Data

    class Graph(Data):
        def __inc__(self, key: str, value: object, *args: object, **kwargs: object) -> object:
            return self.edge_index.shape[1] if key == "edge_reverse" else super().__inc__(key, value, *args, **kwargs)

    graphs = [graph_of(STRUCTURES[name](), 4.0, energy=1.5 * k, source=name) for k, name in enumerate(names)]
    expected = PyGBatch.from_data_list([Graph(**vars(graph), num_nodes=graph.num_nodes) for graph in graphs])
    batch = batch_graphs(graphs)
    assert (batch.num_graphs, batch.num_nodes) == (expected.num_graphs, expected.num_nodes)
    assert {*vars(batch), "num_nodes"} == {*expected.keys(), "nbr", "nbr_reverse", "nbr_shift", "nbr_used"}
    for key in set(expected.keys()) - {"num_nodes"}:
        found, wanted = getattr(batch, key), expected[key]
        if torch.is_tensor(wanted):
            assert torch.equal(found, wanted)
            assert found.dtype == wanted.dtype
        else:
            assert found == wanted


def test_a_loader_in_other_processes_gives_the_same_batches() -> None:
    graphs = [graph_of(make(), 4.0) for make in STRUCTURES.values()]
    chosen = [[0, 2], [3], [1, 1]]
    for indices, batch in zip(chosen, graph_loader(graphs, chosen, workers=1), strict=True):
        for name, value in vars(batch_graphs([graphs[i] for i in indices])).items():
            found = getattr(batch, name)
            assert torch.equal(found, value) if torch.is_tensor(value) else found == value


def test_moving_leaves_the_original_alone() -> None:
    batch = batch_graphs([graph_of(STRUCTURES["copper"](), 4.0)])
    there = batch.to("meta")
    assert {x.device.type for x in vars(there).values() if torch.is_tensor(x)} == {"meta"}
    assert {x.device.type for x in vars(batch).values() if torch.is_tensor(x)} == {"cpu"}
    assert (there.source, there.num_nodes, there.num_graphs) == (batch.source, 1, 1)


def test_labels_and_their_absence() -> None:
    graph = graph_of(STRUCTURES["ethanol"](), 4.0, energy=-1.5)
    assert graph.energy.item() == -1.5
    assert [bool(graph[f"has_{n}"]) for n in ("energy", "forces", "stress")] == [True, False, False]


@pytest.mark.parametrize("cutoff", [1.2, 2.4, 3.5])
def test_atoms_out_of_sight_against_ase(structure: Atoms, cutoff: float) -> None:
    seen = set(neighbor_list("i", structure, SIGHT * cutoff))
    found = out_of_sight(structure.positions, structure.cell.array, structure.pbc, cutoff)
    assert set(np.flatnonzero(found)) == set(range(len(structure))) - seen


def test_a_bad_cell_names_the_frame() -> None:
    frame = Frame.from_atoms(Atoms("H", pbc=True), source="file.xyz#7")
    with pytest.raises(ValueError, match=r"file\.xyz#7: periodic along a"):
        build_graph(frame, NeighbourFinder(4.0))


def test_nothing_to_batch() -> None:
    with pytest.raises(ValueError, match="zero graphs"):
        batch_graphs([])
