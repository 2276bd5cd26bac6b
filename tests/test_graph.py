import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.neighborlist import neighbor_list
from torch_geometric.data import Batch

from forcedrop.graph import SIGHT, NeighbourFinder, batch_graphs, build_graph, out_of_sight, pair_vectors
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
    vec = pair_vectors(batch, 8.0)
    distances = vec.norm(dim=-1)
    assert bool((distances[batch.nbr_used] < 4.0).all())
    assert bool((distances[~batch.nbr_used] == 8.0).all())
    expected = np.sort(np.concatenate([neighbor_list("d", atoms, 4.0) for atoms in images]))
    np.testing.assert_allclose(np.sort(distances[batch.nbr_used].numpy()), expected, atol=1e-12)


def test_a_loader_of_pyg_batches_the_graphs() -> None:
    from torch_geometric.loader import DataLoader

    graphs = [graph_of(STRUCTURES[name](), 4.0) for name in ("ethanol", "silicon")]
    batch = next(iter(DataLoader(graphs, batch_size=2)))
    reverse = batch.edge_reverse
    assert torch.equal(batch.edge_index[:, reverse], batch.edge_index.flip(0))


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


def test_a_batch_of_one_is_what_the_general_way_makes(structure: Atoms) -> None:
    graph = graph_of(structure, 4.0, energy=1.5)
    general, quick = Batch.from_data_list([graph]), batch_graphs([graph])
    assert set(general.keys()) == set(quick.keys()) - {"nbr", "nbr_reverse", "nbr_shift", "nbr_used"}
    assert quick.num_graphs == 1
    assert quick.num_nodes == len(structure)
    for key in general.keys():  # noqa: SIM118 (not a dictionary)
        if torch.is_tensor(general[key]):
            assert torch.equal(general[key], quick[key])
            assert general[key].dtype == quick[key].dtype
        else:
            assert general[key] == quick[key]
