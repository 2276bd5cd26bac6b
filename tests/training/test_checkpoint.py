import pytest
import torch

from forcedrop.calibration import Calibration, Growth
from forcedrop.derive import derive
from forcedrop.training import TrainedModel, load_model, save_model
from tests.conftest import batch_of, ethanol, make_potential


def test_a_model_comes_back_the_same(tmp_path) -> None:
    potential = make_potential(zbl=True)
    potential.posterior = torch.randn(potential.n_readout, potential.n_readout, dtype=torch.float64)
    potential.refit = torch.randn(potential.n_readout, dtype=torch.float64)
    calibration = Calibration(
        Growth(1.3, 0.5, 0.01), {29: 1.1}, {"forces": 1.3}, {"forces": {0.9: 1.8}}, 10, 16, {"max_force": [0.1, 0.2]}
    )
    model = TrainedModel(potential, calibration, bank=8, bank_seed=5, provenance={"training_set": {"hash": "abc"}})
    save_model(model, tmp_path / "model.pt")
    loaded = load_model(tmp_path / "model.pt")
    assert loaded.calibration == calibration
    assert (loaded.bank, loaded.bank_seed, loaded.provenance) == (8, 5, model.provenance)
    assert torch.equal(loaded.potential.posterior, potential.posterior)
    assert torch.equal(loaded.potential.refit, potential.refit)
    assert loaded.elements == (1, 6, 8, 14, 29)
    batch = batch_of([ethanol()], 4.0)
    for a, b in zip(derive(potential, batch), derive(loaded.potential, batch), strict=True):
        assert torch.equal(a, b)
    assert torch.load(tmp_path / "model.pt", weights_only=True)["units"]["energy"] == "eV"


def test_what_is_no_model(tmp_path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        load_model(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.pt is not a forcedrop model or checkpoint, or is damaged"):
        load_model(tmp_path / "text.pt")
    torch.save({"a": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="is not a forcedrop model"):
        load_model(tmp_path / "other.pt")
    save_model(TrainedModel(make_potential()), tmp_path / "new.pt")
    values = torch.load(tmp_path / "new.pt", weights_only=True)
    torch.save({**values, "format": 1}, tmp_path / "old.pt")
    with pytest.raises(ValueError, match=r"old\.pt has format 1.*train it anew"):
        load_model(tmp_path / "old.pt")
    torch.save({**values, "format": 99}, tmp_path / "new.pt")
    with pytest.raises(ValueError, match=r"format 99.*please update"):
        load_model(tmp_path / "new.pt")


def test_no_code_is_run_on_loading(tmp_path) -> None:
    class Evil:
        def __reduce__(self):
            return (print, ("run!",))

    torch.save({"format": 2, "config": Evil(), "weights": {}}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="not a forcedrop model"):
        load_model(tmp_path / "evil.pt")
