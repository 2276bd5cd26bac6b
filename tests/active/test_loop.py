"""Whole loops on four atoms of copper with a tiny network."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from ase import units
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from typer.testing import CliRunner

from forcedrop.active import ActiveLoop, resolve_threshold
from forcedrop.active import loop as module
from forcedrop.active.config import parse_active_config
from forcedrop.active.state import frame_key
from forcedrop.cli import app
from forcedrop.evaluation import predict_frames
from forcedrop.model import load_model
from forcedrop.structures import Frame, read_frames, write_frames
from forcedrop.training import ConfigError
from tests.active import faulty
from tests.conftest import emt_frames


def values(folder: Path, **changes: object) -> dict:
    """The file of a loop for a few seconds: 12 labels, then 4 a round to 19."""
    start = {
        "state": "state",
        "start": {"files": ["start.h5"]},
        "oracle": {"name": "tests.active.faulty:oracle", "settings": {"log": str(folder / "calls")}},
        "training": {
            "model": {"cutoff": 4.0, "n_channels": 4, "l_max": 2, "n_radial": 4, "n_hidden": 4},
            "optimiser": {"warmup_steps": 5, "ema_decay": 0.8},
            "data": {"validation_fraction": 0.15, "calibration_fraction": 0.25},
            "batch_size": 4,
            "device": "cpu",
        },
        "retraining": {"steps": 12},
        "explore": {
            "temperatures": [600], "starts": 2, "steps": 24, "timestep": 2.0, "record_every": 4, "samples": 4,
            "quantile": 0.2, "stop_above": 100.0,
        },
        "pick": {"batch": 4, "check": 1, "min_distance": 0.01},
        "label": {"timeout": 30},
        "stop": {"labels": 19},
        "device": "cpu",
    }  # fmt: skip
    for key, change in changes.items():
        start[key] = {**start.get(key, {}), **change} if isinstance(change, dict) else change
    return start


def loop(folder: Path, **changes: object) -> ActiveLoop:
    if not (folder / "start.h5").exists():
        write_frames(folder / "start.h5", emt_frames(12))
    return ActiveLoop(parse_active_config(values(folder, **changes), folder=folder))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> ActiveLoop:
    found = loop(tmp_path_factory.mktemp("loop"))
    assert found.run() == "the budget of 19 labels is spent"
    return found


def rows(loop: ActiveLoop, name: str) -> list[dict[str, str]]:
    with (loop.state.folder / name).open() as stream:
        return list(csv.DictReader(stream))


def test_settings_are_kept(done) -> None:
    kept = yaml.safe_load((done.state.folder / "config.yaml").read_text())
    assert kept["stop"]["labels"] == 19
    assert kept["training"]["model"]["n_channels"] == 4
    assert "folder" not in kept


def test_labels_are_right_and_all_different(done) -> None:
    frames = done.state.frames()
    assert len({frame_key(f) for f in frames}) == len(frames) == 19
    assert [f.info["round"] for f in frames] == [0] * 12 + [1] * 4 + [2] * 3  # the last batch is cut to the budget
    for frame in frames:
        atoms = frame.to_atoms()
        atoms.calc = EMT()
        assert frame.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-9)
        np.testing.assert_allclose(frame.forces, atoms.get_forces(), atol=1e-9)
        np.testing.assert_allclose(frame.stress, atoms.get_stress(), atol=1e-9)
    assert len(faulty.calls(done.state.folder.parent / "calls")) == 7  # labels that were given are not computed


def test_picks_come_from_their_runs_and_are_flagged(done) -> None:
    for frame in done.state.frames()[12:]:
        info, folder = frame.info, done.state.round(frame.info["round"])
        md = {frame_key(f): f for f in read_frames(folder / "runs" / info["run"] / "md.h5", predictions="keep")}[
            info["key"]
        ]
        assert md.info["time_fs"] == info["time_fs"]
        assert md.info["max_force_sigma_eV_A"] == info["sigma_pick"]
        threshold = json.loads((folder / "explore.json").read_text())["threshold"]
        assert info["sigma_pick"] > threshold or info["reason"] == "check"
    reasons = [f.info["reason"] for f in done.state.frames()[12:]]
    assert reasons == ["check"] + ["uncertain"] * 3 + ["check"] + ["uncertain"] * 2


def test_fresh_labels_are_judged_by_the_model_that_has_not_seen_them(done) -> None:
    audit = {row["key"]: row for row in rows(done, "audit.csv")}
    assert len(audit) == 19
    for number in (1, 2):
        model = load_model(done.state.round(number) / "model" / "model.pt")
        fresh = [f for f in done.state.frames() if f.info["round"] == number]
        assert model.provenance["training_set"]["frames"] < len(done.known(number)) == 12 + 4 * (number - 1)
        for frame, p in zip(fresh, predict_frames(model, fresh), strict=True):
            row = audit[frame_key(frame)]
            assert float(row["error_energy_eV"]) == pytest.approx(float(p.mean["energy"]) - frame.energy, rel=1e-4)
            wrong = np.linalg.norm(p.mean["forces"] - frame.forces, axis=1).max()
            assert float(row["error_max_force_eV_A"]) == pytest.approx(wrong, rel=1e-4)
            assert float(row["sigma_energy_eV"]) == pytest.approx(float(p.sigma["energy"]), rel=1e-4)
            assert (row["status"], row["attempts"], row["calls"]) == ("labelled", "1", "1")
            assert frame.info["error_max_force"] == pytest.approx(wrong)


def test_tables_agree(done) -> None:
    table = rows(done, "rounds.csv")
    assert [(row["round"], row["labels"], row["labelled"]) for row in table] == [
        ("1", "12", "4"),
        ("2", "16", "3"),
        ("3", "19", ""),
    ]
    for row in table[:2]:
        fresh = [r for r in rows(done, "audit.csv") if r["round"] == row["round"]]
        whole = np.sqrt(np.mean([float(r["error_force_rms_eV_A"]) ** 2 for r in fresh]))
        assert float(row["force_rmse_eV_A"]) == pytest.approx(whole, rel=1e-4)
        assert float(row["z2_low"]) <= float(row["z2"]) <= float(row["z2_high"])
        assert float(row["explored_ps"]) == pytest.approx(2 * 24 * 2.0 / 1000)


@pytest.mark.parametrize("stage", ["pick", "label", "append", "appended"])
def test_cut_off_anywhere_in_the_last_round(done, tmp_path, stage: str) -> None:
    """The folder as a kill leaves it just before the last file of a stage; what follows must be the same."""
    folder = done.state.folder.parent
    for name in ("state", "calls", "start.h5"):
        (shutil.copytree if (folder / name).is_dir() else shutil.copy)(folder / name, tmp_path / name)
    cut = loop(tmp_path, oracle={"settings": {"log": str(folder / "calls")}})
    last, frames, calls = cut.state.round(2), cut.state.frames(), len(faulty.calls(folder / "calls"))
    shutil.rmtree(cut.state.round(3))
    (cut.state.folder / "model.pt").unlink()
    if stage != "appended":
        write_frames(cut.state.store, [Frame(**{**vars(f), "source": "<memory>"}) for f in frames[:16]])
    order = ["pick", "label", "judge", "append"]
    for name in order[order.index(stage.removesuffix("ed")) :]:
        (last / f"{name}.json").unlink()
    if stage == "pick":
        shutil.rmtree(last / "labels")
    if stage == "label":
        next((last / "labels").iterdir()).unlink()  # one label was not on disk yet
    assert cut.run() == "the budget of 19 labels is spent"
    assert [(frame_key(f), f.energy) for f in cut.state.frames()] == [(frame_key(f), f.energy) for f in frames]
    assert rows(cut, "rounds.csv")[2]["labels"] == "19"
    assert (
        load_model(cut.state.folder / "model.pt").provenance["training_set"]
        == (load_model(done.state.folder / "model.pt").provenance["training_set"])
    )
    assert len(faulty.calls(folder / "calls")) == calls + {"pick": 3, "label": 1}.get(stage, 0)


def test_verdicts_are_by_the_limits_of_now(done) -> None:
    folder, anything = done.state.folder.parent, {"labels": 99, "z2": [0, 1e9]}
    assert "errors on fresh labels agree" in str(loop(folder, stop=anything | {"force_rmse": 1e9}).stopped())
    assert loop(folder, stop=anything | {"force_rmse": 1e-9}).stopped() is None


def test_again_does_nothing_and_more_budget_goes_on(done) -> None:
    folder = done.state.folder.parent
    before = (folder / "state" / "rounds" / "003" / "model" / "model.pt").stat().st_mtime_ns
    calls = len(faulty.calls(folder / "calls"))
    assert loop(folder).run() == "the budget of 19 labels is spent"
    assert len(faulty.calls(folder / "calls")) == calls
    assert loop(folder, stop={"labels": 19, "rounds": 1}).stopped() == "the budget of 19 labels is spent"
    more = loop(folder, stop={"labels": 21})
    assert more.stopped() is None
    assert more.run() == "the budget of 21 labels is spent"
    assert len(more.state.frames()) == 21
    assert (folder / "state" / "rounds" / "003" / "model" / "model.pt").stat().st_mtime_ns == before


def test_runs_that_would_end_before_anything_is_flagged(done) -> None:
    low = loop(done.state.folder.parent, explore={"stop_above": 1e-9})
    with pytest.raises(ValueError, match="must be above the threshold of flagging, got 1e-09 and"):
        low.limits(1, load_model(done.state.folder / "model.pt"))


def test_the_threshold_never_rises(done) -> None:
    model = load_model(done.state.round(1) / "model" / "model.pt")
    own = resolve_threshold(model.calibration, "max_force", None, 0.2)
    assert done.limits(1, model).threshold == own
    before = [json.loads((done.state.round(n) / "explore.json").read_text())["threshold"] for n in (1, 2)]
    assert before[1] <= before[0] == own
    assert done.limits(3, model).threshold == min(before)


def test_the_threshold_in_use_decides_where_runs_may_end(done, monkeypatch) -> None:
    monkeypatch.setattr(module, "resolve_threshold", lambda *arguments: 1e3)
    model = load_model(done.state.round(1) / "model" / "model.pt")
    with pytest.raises(ValueError, match="above the threshold of flagging, got 100 and"):
        done.limits(1, model)
    assert done.limits(2, model).threshold < 1e3


def test_another_oracle_and_another_loop_are_refused(done) -> None:
    folder = done.state.folder.parent
    with pytest.raises(ConfigError, match=r"holds labels of .* choose another `state`"):
        loop(folder, oracle={"name": "emt", "settings": {}})
    from filelock import FileLock

    with (
        FileLock(done.state.folder / "lock"),
        pytest.raises(ValueError, match="another loop runs in"),
    ):
        loop(folder).run()


def test_labels_that_fail_do_not_stop_the_loop(tmp_path) -> None:
    changes = {"oracle": {"settings": {"log": str(tmp_path / "calls"), "unlucky": 2}}, "label": {"retries": 1}}
    found = loop(tmp_path, **changes, stop={"labels": 15, "rounds": 3}, pick={"batch": 3})
    found.run()
    audit = [row for row in rows(found, "audit.csv") if row["round"] != "0"]
    failed = [row for row in audit if row["status"] == "failed"]
    assert failed
    assert all(row["attempts"] == row["calls"] == "2" for row in failed)
    assert all("SCF not converged" in row["failures"] for row in failed)
    assert len({row["key"] for row in audit}) == len(audit)  # what failed is not picked again
    assert {row["key"] for row in failed}.isdisjoint(f.info["key"] for f in found.state.frames())
    good = sum(row["status"] == "labelled" for row in audit)
    assert len(found.state.frames()) == 12 + good
    assert sum(int(row["failed"] or 0) for row in rows(found, "rounds.csv")) == len(failed)


def test_what_was_broken_is_tried_again(tmp_path) -> None:
    """An oracle that is not there ends the loop; once it is there, the same command goes on."""
    (tmp_path / "calls.broken").touch()
    reason = "no label of the last two rounds succeeded: see the reasons in audit.csv"
    found = loop(tmp_path)
    assert found.run() == reason
    calls = len(faulty.calls(tmp_path / "calls"))
    assert calls == sum(2 * int(row["picked"]) for row in rows(found, "rounds.csv") if row["picked"])  # one retry
    assert found.run() == reason
    assert len(faulty.calls(tmp_path / "calls")) == 2 * calls
    (tmp_path / "calls.broken").unlink()
    assert found.run() == "the budget of 19 labels is spent"
    audit = [row for row in rows(found, "audit.csv") if row["round"] != "0"]
    assert [row["status"] for row in audit] == ["labelled"] * 7
    assert len(faulty.calls(tmp_path / "calls")) == 2 * calls + 7
    assert found.run() == "the budget of 19 labels is spent"
    assert len(faulty.calls(tmp_path / "calls")) == 2 * calls + 7


def test_start_frames_that_failed_are_tried_again(tmp_path) -> None:
    frames = [Frame(**{**vars(f), "energy": None, "forces": None, "stress": None}) for f in emt_frames(12)]
    write_frames(tmp_path / "start.h5", frames)
    wrong = {"settings": {"log": str(tmp_path / "calls"), "unlucky": 1}}
    with pytest.raises(ValueError, match="none of the start frames has a label"):
        loop(tmp_path, oracle=wrong, stop={"labels": 12}).run()
    assert (
        loop(tmp_path, stop={"labels": 12}).run() == "the budget of 12 labels is spent"
    )  # no label was of the wrong one


def test_exploring_anew_where_nothing_was_picked_once_settings_change(tmp_path) -> None:
    narrow = {"pick": {"batch": 4, "check": 0, "min_distance": 1e6}, "stop": {"labels": 15}}
    found = loop(tmp_path, **narrow)
    assert found.run() == "exploration finds nothing that the model is unsure of"
    explored = found.state.round(1) / "explore.json"
    before = explored.stat().st_mtime_ns
    assert loop(tmp_path, **narrow).run() == "exploration finds nothing that the model is unsure of"
    assert explored.stat().st_mtime_ns == before
    assert loop(tmp_path, stop={"labels": 15}).run() == "the budget of 15 labels is spent"
    assert explored.stat().st_mtime_ns != before


def test_a_committee_from_one_network(tmp_path) -> None:
    loop(tmp_path, stop={"labels": 12}).run()
    found = loop(tmp_path, pick={"strategy": "committee", "members": 2}, stop={"labels": 15})
    assert found.run() == "the budget of 15 labels is spent"
    assert {f.info["reason"] for f in found.state.frames()[12:]} == {"check", "uncertain"}
    assert (found.state.round(1) / "model-1" / "model.pt").exists()


def test_start_files_have_the_units_of_training(tmp_path) -> None:
    atoms = emt_frames(1)[0].to_atoms()
    atoms.calc = SinglePointCalculator(atoms, energy=-100.0, forces=np.zeros((len(atoms), 3)))
    atoms.write(tmp_path / "start.xyz")
    data = {"calibration_fraction": 0.25, "energy_unit": "kcal/mol"}
    ready, _ = loop(tmp_path, start={"files": ["start.xyz"]}, training={"data": data})._start_frames()
    assert ready[0].energy == pytest.approx(-100.0 * units.kcal / units.mol)


def test_start_frames_without_labels_are_labelled(tmp_path) -> None:
    given = emt_frames(12)
    frames = [Frame(**{**vars(f), "energy": None, "forces": None, "stress": None}) for f in given[:5]] + given[5:]
    write_frames(tmp_path / "start.h5", [*frames, frames[0]])  # one of them twice
    for count in (4, 9):
        some = loop(tmp_path, start={"frames": count})._start_frames()
        assert len(some[0]) + len(some[1]) == count
    found = loop(tmp_path, stop={"labels": 12})
    assert found.run() == "the budget of 12 labels is spent"
    assert len(faulty.calls(tmp_path / "calls")) == 5
    energies = {frame_key(f): f.energy for f in given}
    assert {frame_key(f): f.energy for f in found.state.frames()} == pytest.approx(energies)


@pytest.mark.parametrize("strategy", ["random", "committee"])
def test_other_strategies(tmp_path, strategy: str) -> None:
    found = loop(tmp_path, pick={"strategy": strategy, "members": 2}, stop={"labels": 15})
    assert found.run() == "the budget of 15 labels is spent"
    fresh = found.state.frames()[12:]
    members = sorted(path.name for path in found.state.round(1).glob("model*"))
    if strategy == "random":
        assert {f.info["reason"] for f in fresh} == {"check", "random"}
        assert members == ["model"]
        return
    assert members == ["model", "model-1"]
    potentials = [load_model(found.state.round(1) / name / "model.pt") for name in members]
    for frame in fresh:
        first, second = (predict_frames(p, [frame])[0].plain["forces"] for p in potentials)
        spread = np.linalg.norm(np.abs(first - second) / np.sqrt(2), axis=1).max()
        assert frame.info["sigma_pick"] == pytest.approx(spread, rel=1e-3)


def test_command_line(done, tmp_path) -> None:
    folder = done.state.folder.parent
    (folder / "loop.yaml").write_text(yaml.safe_dump(values(folder)))
    runner = CliRunner()
    out = runner.invoke(app, ["active", str(folder / "loop.yaml"), "--dry-run"]).output
    assert "start: 12 frames, 12 of them labelled already" in out
    assert "exploration: 2 runs a round of at most 0.048 ps at 600 K, nvt" in out
    out = runner.invoke(app, ["active", str(folder / "loop.yaml"), "--status"]).output
    assert "95 % of z²" in out
    assert "the budget of 19 labels is spent" in out
    found = runner.invoke(app, ["active", str(folder / "loop.yaml")])
    assert "model.pt is trained on" in found.output
    assert (folder / "state" / "rounds.png").stat().st_size > 5000
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({**values(tmp_path), "explor": 1}))
    found = runner.invoke(app, ["active", str(tmp_path / "bad.yaml")])
    assert found.exit_code == 1
    assert "unknown key `explor`; did you mean `explore`?" in found.output


def test_no_frame_that_ever_trained_calibrates(done) -> None:
    """Not even in a round before, whose network may be the start of this one's."""
    files = {role: [done.state.round(n) / f"{role}.h5" for n in range(3)] for role in ("train", "calibration")}
    keys = {role: {frame_key(f) for p in paths if p.exists() for f in read_frames(p)} for role, paths in files.items()}
    assert len(keys["calibration"]) == round(0.25 * 19)
    assert not keys["train"] & keys["calibration"]
    for number, labels in ((1, 12), (2, 16), (3, 19)):
        split = json.loads((done.state.round(number) / "model" / "split.json").read_text())
        assert sum(len(part) for part in split.values()) == labels
        for role in files:
            assert {Path(source.rpartition("#")[0]).name for source in split[role]} == {f"{role}.h5"}


def test_fine_tuning_goes_on_with_the_network_of_the_round_before(done, tmp_path) -> None:
    made = loop(tmp_path, retraining={"steps": 12, "fine_tune_steps": 3, "fine_tune_rate": 1e-6})
    made.run()
    networks = [load_model(made.state.round(n) / "model" / "model.pt").potential for n in (1, 2, 3)]
    anew = [load_model(done.state.round(n) / "model" / "model.pt").potential for n in (1, 2)]
    for name, first in networks[0].named_parameters():
        torch.testing.assert_close(anew[0].get_parameter(name), first, rtol=0, atol=0)  # the first round is the same
        if name.startswith("correction"):
            continue  # regression, which is of all labels
        for later in networks[1:]:  # at such a rate weights stay where they were
            torch.testing.assert_close(later.get_parameter(name), first, rtol=1e-4, atol=1e-4)
    assert any(
        not torch.allclose(weight, anew[1].get_parameter(name), atol=1e-2)
        for name, weight in networks[1].named_parameters()
        if not name.startswith("correction")
    )
    assert not torch.equal(networks[1].correction.bank, networks[0].correction.bank)  # functions are of all labels
    assert [row["labels"] for row in rows(made, "rounds.csv")] == ["12", "16", "19"]


def test_members_that_train_side_by_side_are_the_same(tmp_path) -> None:
    for name, workers in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        made = loop(
            tmp_path / name, retraining={"steps": 4, "workers": workers}, pick={"strategy": "committee", "members": 2},
            stop={"labels": 12},
        )  # fmt: skip
        made.run()
    for member in ("model", "model-1"):
        a, b = (
            load_model(tmp_path / name / "state" / "rounds" / "001" / member / "model.pt").potential.state_dict()
            for name in ("one", "two")
        )
        for key, weight in a.items():
            torch.testing.assert_close(b[key], weight, rtol=1e-5, atol=1e-6)


def test_informative_picks_look_at_a_part_of_many_candidates(tmp_path, monkeypatch) -> None:
    looked_at, look = [], module.information
    monkeypatch.setattr(module, "MOST", 7)
    monkeypatch.setattr(
        module, "information", lambda model, frames, *rest: looked_at.append(len(frames)) or look(model, frames, *rest)
    )
    made = loop(
        tmp_path, pick={"strategy": "informative", "batch": 3, "check": 1, "min_distance": 0.001}, stop={"labels": 15}
    )
    made.run()
    (row, _) = rows(made, "rounds.csv")
    assert looked_at == [7]
    assert (row["candidates"], row["labelled"]) == ("12", "3")
    reasons = [row["reason"] for row in rows(made, "audit.csv")]
    assert reasons == ["start"] * 12 + ["check"] + ["informative"] * 2
