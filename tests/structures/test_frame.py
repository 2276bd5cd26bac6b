import numpy as np
from ase.build import bulk

from forcedrop.structures import Frame


def test_a_frame_does_not_follow_the_atoms_it_came_from() -> None:
    """Dynamics at constant pressure change the cell in place, and frames are kept along the way."""
    atoms = bulk("Cu", a=3.6)
    frame = Frame.from_atoms(atoms)
    cell, positions = frame.cell.copy(), frame.pos.copy()
    atoms.set_cell(2 * atoms.cell.array, scale_atoms=True)
    atoms.positions += 1.0
    atoms.numbers[:] = 29 + 1
    atoms.pbc = False
    np.testing.assert_array_equal(frame.cell, cell)
    np.testing.assert_array_equal(frame.pos, positions)
    assert frame.z.tolist() == [29]
    assert frame.pbc.all()
