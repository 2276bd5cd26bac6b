import importlib.util
import pickle

import numpy as np
import pytest
from ase.build import bulk, molecule
from ase.calculators.emt import EMT

from forcedrop.active.oracles import Task, compute, find_oracle, refusal


def test_emt_is_ases() -> None:
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.1, seed=0)
    found = compute(Task("k", atoms, pickle.loads(pickle.dumps(find_oracle("emt"))), stress=True))
    atoms.calc = EMT()
    assert found["energy"] == atoms.get_potential_energy()
    np.testing.assert_array_equal(found["forces"], atoms.get_forces())
    np.testing.assert_array_equal(found["stress"], atoms.get_stress())


def test_tblite_and_its_settings() -> None:
    tblite = pytest.importorskip("tblite.ase")
    atoms = molecule("H2O")
    found = compute(Task("k", atoms, find_oracle("tblite:GFN1-xTB", {"accuracy": 0.5})))
    atoms.calc = tblite.TBLite(method="GFN1-xTB", accuracy=0.5, verbosity=0)
    assert found["energy"] == pytest.approx(atoms.get_potential_energy(), abs=1e-8)
    assert found["stress"] is None


def test_own_factory_from_a_folder_and_without_stress(tmp_path) -> None:
    (tmp_path / "my_lj.py").write_text(
        "from ase.calculators.lj import LennardJones\n\n"
        "class Plain(LennardJones):\n"
        "    def get_stress(self, atoms=None):\n        raise NotImplementedError\n\n"
        "def make(epsilon=1.0):\n    return Plain(epsilon=epsilon)\n"
    )
    oracle = find_oracle("my_lj:make", {"epsilon": 2.0}, folder=tmp_path)
    atoms = bulk("Ar", a=1.6, cubic=True)
    assert compute(Task("k", atoms, oracle))["energy"] == pytest.approx(
        2 * compute(Task("k", atoms, find_oracle("my_lj:make", folder=tmp_path)))["energy"]
    )
    assert compute(Task("k", atoms, oracle, stress=True))["stress"] is None


def test_retry_settings_hold_from_the_second_attempt_on() -> None:
    oracle = find_oracle("tests.active.faulty:oracle", {"log": "a"}, {"log": "b", "healthy": True})
    assert oracle.calculator(1).log == "a"
    assert not oracle.calculator(1).healthy
    assert oracle.calculator(2).log == oracle.calculator(3).log == "b"
    assert oracle.calculator(2).healthy


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("EMT", "an oracle is named emt, tblite:GFN2-xTB"),
        ("tblite:GFN3", "tblite knows the methods GFN2-xTB"),
        ("no_such_module:make", "cannot be imported: No module named 'no_such_module'"),
        ("json:nothing", "json has no function 'nothing'"),
        ("json:", "an oracle is named"),
    ],
)
def test_mistakes(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_oracle(name)


def test_a_missing_package_names_the_extra(monkeypatch) -> None:
    monkeypatch.setattr("forcedrop.active.oracles.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package tblite: pip install 'forcedrop\[label\]'"):
        find_oracle("tblite:GFN2-xTB")
    assert importlib.util.find_spec("ase") is not None


def test_refusals() -> None:
    good = {"energy": 1.0, "forces": np.full((2, 3), 0.1), "stress": None}
    assert refusal(good, 2, 50.0) is None
    assert "shape (2, 3) for 3 atoms" in str(refusal(good, 3, 50.0))
    assert "energy not finite" in str(refusal({**good, "energy": np.inf}, 2, 50.0))
    assert "stress not finite" in str(refusal({**good, "stress": np.full(6, np.nan)}, 2, 50.0))
    # the norm of the vector counts, not its components
    assert refusal({**good, "forces": np.full((2, 3), 10.0)}, 2, 17.4) is None
    assert "a force of 17.3 eV/Å is above" in str(refusal({**good, "forces": np.full((2, 3), 10.0)}, 2, 17.3))
