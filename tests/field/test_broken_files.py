"""Broken and hostile files: one clear error that names file, frame and reason, nothing executed, nothing unbounded."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from forcedrop.active.state import State
from forcedrop.cli import app
from forcedrop.md.recorder import read_rows
from forcedrop.md.restart import Restart
from forcedrop.model import TrainedModel, load_model, save_model
from forcedrop.structures import BadFrames, read_checked, read_frames
from forcedrop.structures.streaming import structures_in
from forcedrop.training.config import ConfigError, parse_config, read_yaml
from forcedrop.training.loop import Progress
from tests.conftest import banked_potential, ethanol, settings
from tests.fuzz.inputs import labelled

BODY = "\n".join(f"H 0 0 {k} 0.1 0.0 0.0" for k in (0, 0.7, 1.5))


def frame(energy: str = "energy=-1.5", count: str = "3", body: str = BODY) -> str:
    return f"{count}\nProperties=species:S:1:pos:R:3:forces:R:3 {energy}\n{body}\n"


GOOD = frame()
DAMAGED = {
    "cut behind its first line": (GOOD + GOOD + "3\n", 2, "declares 3 atoms, and the file ends there"),
    "cut in its atoms": (GOOD + GOOD + frame(body="H 0 0 0 0 0 0"), 2, "declares 3 atoms, the file ends after 1"),
    "two numbers for the energy": (GOOD + frame('energy="0.1 0.2"') + GOOD, 1, "an energy must be one number"),
    "a decimal comma": (GOOD + frame('energy="-1,5"') + GOOD, 1, "an energy must be one number"),
    "a word for the energy": (GOOD + frame("energy=unknown") + GOOD, 1, "numbers are wanted, got 'unknown'"),
    "an atom too few": (GOOD + frame(count="4") + GOOD, 1, "declares 4 atoms, there are only 3"),
    "an atom too many": (GOOD + frame(count="2") + GOOD, 1, "a line with a number of atoms should follow"),
    "a word for a position": (GOOD + frame(body=BODY.replace("0 0 0.7", "0 0 x")) + GOOD, 1, "could not convert"),
    "a column too few": (GOOD + frame(body=BODY.replace("0.1 0.0 0.0", "0.1")) + GOOD, 1, "declare 7 columns"),
    "an unknown element": (GOOD + frame(body=BODY.replace("H 0 0 0.7", "Zz 0 0 0.7")) + GOOD, 1, "Zz"),
    "a count of letters": (GOOD + GOOD + frame(count="three"), 1, "number of atoms should follow"),
}


@pytest.mark.parametrize("what", list(DAMAGED))
def test_damage_in_one_frame_is_named_and_that_frame_dropped(tmp_path: Path, what: str) -> None:
    text, index, words = DAMAGED[what]
    (tmp_path / "a.xyz").write_text(text)
    with pytest.raises(BadFrames, match=rf"a\.xyz#{index}: .*--skip-bad") as error:
        read_frames(tmp_path / "a.xyz")
    assert words in str(error.value)
    good, problems = read_checked([tmp_path / "a.xyz"], skip_bad=True)
    assert {problem.source for problem in problems} == {f"{tmp_path / 'a.xyz'}#{index}"}
    assert good
    assert all(f.energy == -1.5 and len(f) == 3 and f.source != problems[0].source for f in good)


def test_frames_after_a_damaged_one_keep_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.xyz").write_text(frame("energy=0") + frame(count="4") + frame("energy=2") + "\n" + frame("energy=3"))
    good, _ = read_checked([tmp_path / "a.xyz"], skip_bad=True)
    assert [(f.source.rpartition("#")[2], f.energy) for f in good] == [("0", 0.0), ("2", 2.0), ("3", 3.0)]
    damaged: list = []
    assert len(list(structures_in(tmp_path / "a.xyz", damaged=damaged))) == 3
    assert len(damaged) == 1


def test_an_undamaged_file_is_read_as_ase_reads_it(tmp_path: Path) -> None:
    images = [labelled(False), labelled(True), labelled(False, 3)]
    ase.io.write(tmp_path / "a.xyz", images)
    for ours, theirs in zip(read_frames(tmp_path / "a.xyz"), ase.io.read(tmp_path / "a.xyz", ":"), strict=True):
        np.testing.assert_array_equal(ours.pos, theirs.positions)
        np.testing.assert_array_equal(ours.cell, theirs.cell.array)
        np.testing.assert_array_equal(ours.forces, theirs.get_forces())
        assert ours.energy == theirs.get_potential_energy()


def test_the_command_says_it_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.xyz").write_text(GOOD + "3\n")
    found = CliRunner().invoke(app, ["info", str(tmp_path / "a.xyz")])
    assert found.exit_code == 1
    assert found.stderr.startswith(f"error: {tmp_path / 'a.xyz'}#1: ")
    assert found.stderr.count("\n") == 1
    found = CliRunner().invoke(app, ["info", "--skip-bad", str(tmp_path / "a.xyz")])
    assert found.exit_code == 0, found.stderr


def test_dynamics_name_no_option_that_they_lack(tmp_path: Path) -> None:
    save_model(TrainedModel(banked_potential()), tmp_path / "model.pt")
    (tmp_path / "a.xyz").write_text("2\n\nH 0 0 0\nH 0 0 0.01\n")
    found = CliRunner().invoke(
        app,
        [
            "md",
            str(tmp_path / "model.pt"),
            str(tmp_path / "a.xyz"),
            "--output",
            str(tmp_path / "md"),
            "--device",
            "cpu",
        ],
    )
    assert found.exit_code == 1
    assert "a.xyz#0" in found.stderr
    assert "skip" not in found.stderr


def test_a_count_of_atoms_does_not_fill_the_memory(tmp_path: Path) -> None:
    (tmp_path / "a.xyz").write_text("99999999999\n\nH 0 0 0\n")
    start = time.monotonic()
    with pytest.raises(BadFrames, match="declares 99999999999 atoms, the file ends after 1"):
        read_frames(tmp_path / "a.xyz")
    assert time.monotonic() - start < 1


def test_no_module_that_a_file_names_is_imported(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("open('ran', 'w').close()\nclass Evil:\n    pass\n")
    evil = {"@module": "evil", "@class": "Evil", "@version": None}
    site = {
        "species": [{"element": "H", "occu": 1}],
        "abc": [0, 0, 0],
        "properties": {"x": evil, "forces": [[evil, 0, 0]]},
    }
    lattice = {"matrix": np.eye(3).tolist(), "pbc": [True] * 3}
    (tmp_path / "x.json").write_text(json.dumps({"sites": [site], "lattice": lattice, "properties": {"energy": evil}}))
    subprocess.run(
        [sys.executable, "-m", "forcedrop", "info", "x.json"], cwd=tmp_path, check=False, capture_output=True,
        env={"PYTHONPATH": f"{Path.cwd()}:{tmp_path}", "PATH": "/usr/bin", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert not (tmp_path / "ran").exists()


def test_arrays_in_the_json_of_pymatgen_are_read(tmp_path: Path) -> None:
    array = {"@module": "numpy", "@class": "array", "dtype": "float64", "data": [0.1, 0.2, 0.3]}
    site = {"species": [{"element": "H", "occu": 1}], "abc": [0, 0, 0], "properties": {"forces": array}}
    lattice = {"matrix": (5 * np.eye(3)).tolist(), "pbc": [True] * 3}
    (tmp_path / "x.json").write_text(
        json.dumps({"sites": [site], "lattice": lattice, "@module": "pymatgen.core.structure"})
    )
    np.testing.assert_array_equal(read_frames(tmp_path / "x.json")[0].forces, [[0.1, 0.2, 0.3]])


@pytest.mark.parametrize("name", ["a.xyz.gz", "a.json.gz", "a.cif.gz", "a.npz"])
def test_a_bomb_is_not_unpacked(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "a.npz":
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("R.npy", bytes(100 * 2**20))
    else:
        (tmp_path / name).write_bytes(gzip.compress(bytes(100 * 2**20)))
    with pytest.raises(ValueError, match=rf"{name} has \d+ bytes and unpacks to more than .*FORCEDROP_MAX_BYTES"):
        read_frames(tmp_path / name)
    monkeypatch.setenv("FORCEDROP_MAX_BYTES", "many")
    with pytest.raises(ValueError, match="FORCEDROP_MAX_BYTES must be a positive number"):
        read_frames(tmp_path / name)


def test_the_limit_of_what_is_unpacked_can_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.xyz.gz").write_bytes(gzip.compress(GOOD.encode()))
    assert read_frames(tmp_path / "a.xyz.gz")[0].energy == -1.5
    monkeypatch.setenv("FORCEDROP_MAX_BYTES", "50")
    with pytest.raises(ValueError, match="unpacks to more than 50"):
        read_frames(tmp_path / "a.xyz.gz")


@pytest.mark.parametrize("cut", [0, 1, 10, 40])
def test_a_packed_file_that_was_cut_off(tmp_path: Path, cut: int) -> None:
    (tmp_path / "a.xyz.gz").write_bytes(gzip.compress(GOOD.encode())[:cut])
    with pytest.raises(ValueError, match=r"a\.xyz\.gz"):
        read_frames(tmp_path / "a.xyz.gz")


# models


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.pt"
    save_model(TrainedModel(banked_potential().float()), path)
    return path


def test_a_flipped_bit_in_the_weights_is_found(model: Path, tmp_path: Path) -> None:
    data = bytearray(model.read_bytes())
    entry = max(zipfile.ZipFile(model).infolist(), key=lambda e: e.file_size)
    data[entry.header_offset + 200 + entry.file_size // 2] ^= 1
    (tmp_path / "model.pt").write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.pt: .*checksum is wrong"):
        load_model(tmp_path / "model.pt")


def wrong_fields(values: dict) -> dict:
    weights, network = values["weights"], values["network"]
    shape = network["shape"]
    return {
        "nan": ({"weights": {**weights, "hidden.weight": weights["hidden.weight"] * float("nan")}}, "not finite"),
        "norm": ({"weights": {**weights, "energy_scale": torch.zeros(())}}, "energy_scale.*positive"),
        "integers": ({"weights": {**weights, "hidden.weight": weights["hidden.weight"].long()}}, "no floating-point"),
        "text": ({"weights": {**weights, "hidden.weight": "x"}}, "dense tensors"),
        "channels": ({"network": {**network, "shape": {**shape, "n_channels": 10**12}}}, "n_channels.*at most 4096"),
        "larger": ({"network": {**network, "shape": {**shape, "n_hidden": 60_000}}}, "larger network"),
        "cutoff": ({"network": {**network, "shape": {**shape, "cutoff": float("inf")}}}, "cutoff.*finite"),
        "kind of value": ({"network": {**network, "shape": {**shape, "cutoff": "5"}}}, "cutoff.*type float"),
        "elements": ({"network": {**network, "elements": [1, 6, 8, 14, 200]}}, "atomic numbers"),
        "order": ({"network": {**network, "elements": [6, 1, 8, 14, 29]}}, "ascend"),
        "no network": ({"network": None}, "network.*names and values"),
        "rates": ({"rates": {"hidden_dropout": 1.5}}, r"rates.*\[0, 1\)"),
        "site": ({"rates": {"nowhere": 0.5}}, "no dropout site 'nowhere'"),
        "calibration": ({"calibration": {"curve": {"scale": float("nan")}}}, "calibration.curve.scale"),
        "of a calibration": ({"calibration": {"slope": 1.0}}, "calibration"),
        "functions": ({"uncertainty": {"method": "posterior", "functions": "8"}}, "uncertainty.functions"),
        "format": ({"format": "six"}, "format"),
    }  # fmt: skip


FIELDS = ("nan", "norm", "integers", "text", "channels", "larger", "cutoff", "kind of value", "elements", "order", "no network",
          "rates", "site", "calibration", "of a calibration", "functions", "format")  # fmt: skip


@pytest.mark.parametrize("what", FIELDS)
def test_every_field_of_a_model_is_checked(model: Path, tmp_path: Path, what: str) -> None:
    values = torch.load(model, weights_only=True)
    change, words = wrong_fields(values)[what]
    torch.save({**values, **change}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=rf"model\.pt.*{words}") as error:
        load_model(tmp_path / "model.pt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [{"positions": torch.zeros(2, 3)}, {"momenta": torch.full((9, 3), torch.nan)},
                                    {"momenta": torch.full((9, 3), 1e30)}, {"cell": torch.full((3, 3), torch.inf)},
                                    {"json": "{}"}, {"json": "["}, {"json": None}, {"positions": None}])  # fmt: skip
def test_a_restart_file_is_checked(tmp_path: Path, change: dict) -> None:
    recorder = {"csv": 10, "xyz": 20, "frames": 1, "flagged": 0, "first": [1.0]}
    numbers = ethanol().numbers.tolist()
    Restart({"numbers": numbers}, 5, ethanol().positions, np.zeros((9, 3)), np.zeros((3, 3)), {}, recorder, None).save(
        tmp_path / "restart.pt"
    )
    assert Restart.load(tmp_path / "restart.pt").step == 5
    torch.save({**torch.load(tmp_path / "restart.pt", weights_only=True), **change}, tmp_path / "restart.pt")
    with pytest.raises(ValueError, match=r"restart\.pt"):
        Restart.load(tmp_path / "restart.pt")


# settings


def bomb(depth: int) -> str:
    return "a0: &a0 [x, x]\n" + "".join(f"a{k}: &a{k} [*a{k - 1}, *a{k - 1}]\n" for k in range(1, depth))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (bomb(40), "more than .* entries"), ("a: &a [*a]", "holds it"), ("[" * 3000, "nested too deeply"),
        ("a: 2001-99-99", "cannot read"), ("a: !!python/name:os.system", "not valid YAML"), ("a: !!bool maybe", "cannot read"),
        ("epochs: 1\nepochs: 2", "'epochs' is there twice"), ("- 1", "keys and values"), ("a: " + "x" * 2**21, "bytes"),
    ],
)  # fmt: skip
def test_yaml_that_is_none(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    start = time.monotonic()
    with pytest.raises(ConfigError, match=rf"(?=.*a\.yaml).*{words}") as error:
        read_yaml(tmp_path / "a.yaml")
    assert len(str(error.value)) < 1000
    assert time.monotonic() - start < 10


def test_yaml_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes("output: Bögen".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"a\.yaml.*not utf-8 text \(byte 9\)"):
        read_yaml(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 2**64}, "`seed` must be at most"), ({"seed": -1}, "`seed` must not be negative"),
        ({"model": {"n_channels": 10**12}}, "`n_channels` must be at most 4096|`model.n_channels`"),
        ({"model": {"cutoff": float("inf")}}, "`model.cutoff` must be a finite number"),
        ({"optimiser": {"learning_rate": float("inf")}}, "`learning_rate` must be a finite number"),
        ({"data": {"isolated_atoms": {"Cu": float("nan")}}}, "isolated_atoms"), ({"workers": 10**6}, "`workers` must be at most"),
        ({"epochs": ["x" * 10**5] * 1000}, "epochs"),
    ],
)  # fmt: skip
def test_absurd_settings(change: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        parse_config(settings("there", **change))
    assert len(str(error.value)) < 1000
    parse_config(settings("there", optimiser={"clip_gradient": float("inf")}))


def test_an_unforeseen_error_is_one_line_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import forcedrop.structures

    def broken(*_: object, **__: object) -> None:
        raise AttributeError("a fault\nof the program")

    monkeypatch.setattr(forcedrop.structures, "read_checked", broken)
    found = CliRunner().invoke(app, ["info", "a.xyz"])
    assert found.exit_code == 1
    assert found.stderr == (
        "error: AttributeError: a fault of the program (not foreseen, which is a fault of forcedrop; "
        "FORCEDROP_TRACEBACK=1 shows where)\n"
    )
    monkeypatch.setenv("FORCEDROP_TRACEBACK", "1")
    assert CliRunner().invoke(app, ["info", "a.xyz"]).exit_code == 1


def test_too_little_memory_is_no_fault_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    import forcedrop.structures

    def full(*_: object, **__: object) -> None:
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory: you tried ..."
        )

    monkeypatch.setattr(forcedrop.structures, "read_checked", full)
    found = CliRunner().invoke(app, ["info", "a.xyz"])
    assert (found.exit_code, found.stderr.count("\n")) == (1, 1)
    assert found.stderr.startswith("error: there is not enough memory; take fewer atoms")


def test_an_npz_that_lies_about_its_size(tmp_path: Path) -> None:
    out = io.BytesIO()
    np.savez(out, R=np.zeros((1, 3, 3)), z=np.array([1, 1, 8]))
    data = out.getvalue().replace(b"(1, 3, 3)", b"(9, 9, 9)")
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.npz"):
        read_frames(tmp_path / "a.npz")


# what a killed run or loop left


@pytest.mark.parametrize(
    "text", ["step,time_fs\n1,x\n", "step,time_fs\n1\n", "step\n1,2\n", "step\n\x00\n", "step\n\xff\n"]
)
def test_rows_of_dynamics_that_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "md.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"md\.csv"):
        read_rows(tmp_path / "md.csv")


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '"x"', "\xff"])
def test_the_state_of_a_loop_that_is_none(tmp_path: Path, text: str) -> None:
    state = State(tmp_path)
    state.finish(1, "pick", {"picked": 2})
    with pytest.raises(ValueError, match=r"pick\.json lacks 'ready'"):
        state.result(1, "pick")["ready"]
    (state.round(1) / "pick.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"pick\.json"):
        state.result(1, "pick")
    state.journal.note(event="label", key="a")
    with state.journal.path.open("ab") as stream:
        stream.write(b"[1]\n\xff\n")
    assert [line["key"] for line in state.journal.read()] == ["a"]


@pytest.mark.parametrize(
    "change", [{"epoch": -1}, {"step": 1.5}, {"best_loss": float("nan")}, {"done": "no"}, {"history": None}]
)
def test_progress_that_is_none(change: dict) -> None:
    Progress().check()
    with pytest.raises(ValueError, match=next(iter(change))):
        Progress(**change).check()
