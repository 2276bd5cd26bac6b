"""Two real processes over gloo train to the weights of one."""

import csv
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from forcedrop.model import load_model
from forcedrop.structures import write_frames
from forcedrop.training import ConfigError, parse_config, train
from forcedrop.training.parallel import World, own_device
from tests.conftest import emt_frames, settings

# what torchrun is given: a script, so that a test can poison a step in one process alone
SCRIPT = """
import os, sys, warnings
import yaml
from forcedrop.training import TrainingDiverged, TrainingInterrupted, parse_config, train
from forcedrop.training.loop import Trainer

file, resume, poison = sys.argv[1], sys.argv[2] == "resume", int(sys.argv[3])
run_step, count = Trainer.run_step, [0]

def poisoned(trainer, batch, stop):
    count[0] += 1
    if count[0] == poison and trainer.world.rank == 1:
        batch.forces[0] = float("nan")
    run_step(trainer, batch, stop)

Trainer.run_step = poisoned
try:
    train(parse_config(yaml.safe_load(open(file))), resume=resume)
except (TrainingDiverged, TrainingInterrupted) as error:
    print(f"rank {os.environ['RANK']}: {type(error).__name__}: {error}", flush=True)
"""


def start(
    folder: Path, config: dict, *, command_line: bool = False, resume: bool = False, poison: int = 0
) -> subprocess.Popen[str]:
    """Start a training of two processes."""
    (folder / "two.py").write_text(SCRIPT)
    (folder / "t.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = (
        ["-m", "forcedrop", "train", str(folder / "t.yaml")]
        if command_line
        else [str(folder / "two.py"), str(folder / "t.yaml"), "resume" if resume else "new", str(poison)]
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        command + arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    return output


def rows(folder: Path) -> list[list[float]]:
    with (folder / "run" / "log.csv").open() as stream:
        return [[float(v) for k, v in row.items() if k != "seconds"] for row in csv.DictReader(stream)]


def assert_same_training(one: Path, two: Path, tolerance: float = 1e-9) -> None:
    expected, found = (load_model(folder / "run" / "model.pt") for folder in (one, two))
    for name, value in expected.potential.state_dict().items():
        # what is solved from the normal equations carries their rounding on
        own = 1e-5 * float(value.abs().max()) if name.startswith("correction") else tolerance
        torch.testing.assert_close(found.potential.state_dict()[name], value, rtol=tolerance, atol=own)
    assert found.calibration.curve.scale == pytest.approx(expected.calibration.curve.scale, rel=1e-7)
    assert rows(one) == [pytest.approx(row, rel=1e-7, nan_ok=True) for row in rows(two)]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """25 frames: 20 to train on, some without forces, so the last batch of 3 leaves 2."""
    frames = [replace(f, forces=None) if k in (2, 9) else f for k, f in enumerate(emt_frames(25))]
    made = tmp_path / "one", tmp_path / "two"
    for folder in made:
        folder.mkdir()
        write_frames(folder / "train.h5", frames)
    return made


def changes(**more: object) -> dict:
    return {
        "batch_size": 3, "eval_batch_size": 1, "dropout": {"edge": 0.1, "message": 0.1}, "epochs": 3, **more,
    }  # fmt: skip


def test_two_processes_train_as_one(folders: tuple[Path, Path]) -> None:
    one, two = folders
    train(parse_config(settings(one, **changes())))
    output = finish(start(two, settings(two, **changes()), command_line=True))
    assert_same_training(one, two)
    for said_once in ("frames to train on", "validation RMSE"):
        assert output.count(said_once) == 1
    assert len(list((two / "run" / "tensorboard").iterdir())) == 1


def test_batches_of_one_structure_leave_a_process_without(folders: tuple[Path, Path]) -> None:
    one, two = folders
    lonely = changes(batch_size=1, epochs=2)
    train(parse_config(settings(one, **lonely)))
    finish(start(two, settings(two, **lonely)))
    assert_same_training(one, two)


def test_a_signal_to_one_process_stops_both_with_a_checkpoint_to_resume_from(folders: tuple[Path, Path]) -> None:
    one, two = folders
    epochs = changes(epochs=20, checkpoint_seconds=1000)
    train(parse_config(settings(one, **epochs)))
    process = start(two, settings(two, **epochs))
    deadline = time.monotonic() + 120
    while not (two / "run" / "log.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("needs /proc to find the processes of torchrun")
    os.kill(int(children.read_text().split()[1]), signal.SIGTERM)
    output = finish(process)
    assert "rank 1: TrainingInterrupted: stopped by SIGTERM" in output
    assert "rank 0: TrainingInterrupted: stopped by a signal to another process" in output
    assert not (two / "run" / "model.pt").exists()
    finish(start(two, settings(two, **epochs), resume=True))
    assert_same_training(one, two)


def test_divergence_in_one_process_ends_both(folders: tuple[Path, Path]) -> None:
    _, two = folders
    output = finish(start(two, settings(two, **changes()), poison=5))
    for rank in (0, 1):
        assert f"rank {rank}: TrainingDiverged: the loss is nan" in output
    assert output.count("epoch 1, step 5, in a batch of") == 2
    assert output.count(".h5#") == 6  # each names the whole batch


def test_one_process_is_left_alone() -> None:
    world, values = World(), torch.ones(2)
    assert world.sum(values) is values
    assert world.share([3, 1, 2]) == [3, 1, 2]
    assert [World(r, 3).share(range(7)) for r in range(3)] == [[0, 3, 6], [1, 4], [2, 5]]


def test_processes_choose_their_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert own_device("auto") == own_device("cuda") == torch.device("cuda:1")
    assert own_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="cpu, cuda or auto for 2 processes, got cuda:0"):
        own_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="process 1 of this machine has no GPU of its own"):
        own_device("auto")
