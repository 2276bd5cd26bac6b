import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.emt import EMT

from forcedrop.active.labelling import DaskCluster, ProcessPool, Rules, Worker, label_frames, labelled
from forcedrop.active.oracles import Task, find_oracle
from forcedrop.active.state import Journal, frame_key
from forcedrop.structures import Frame
from tests.active import faulty


def cluster(n: int, seed: int = 0) -> Frame:
    """n copper atoms, 2.5 Å apart and more."""
    rng = np.random.default_rng(seed)
    return Frame.from_atoms(
        Atoms(f"Cu{n}", [[2.5 * k, 0.1, 0] for k in range(n)] + rng.normal(scale=0.05, size=(n, 3)))
    )


def oracle(tmp_path: Path, **retry: object):
    return find_oracle("tests.active.faulty:oracle", {"log": str(tmp_path / "calls")}, retry)


def check_faults(tmp_path: Path, executor) -> None:
    """One of each fault and healthy frames, with no retry."""
    frames = [cluster(n) for n in range(1, 8)]
    arguments = (tmp_path / "labels", Rules(retries=0, largest_force=50.0), Journal(tmp_path / "journal"))
    records = label_frames(frames, oracle(tmp_path), executor, *arguments)
    reasons = {n: r["attempts"][0]["reason"] for n, r in zip(range(1, 8), records, strict=True)}
    assert reasons[faulty.RAISES] == "RuntimeError: SCF not converged in 250 cycles"
    assert reasons[faulty.HANGS] == "no result after 5 s"
    assert not running(int((tmp_path / "calls.program").read_text()))  # nor does the program that the oracle had called
    assert reasons[faulty.DIES] == "the process died with status 3: out of memory"
    assert reasons[faulty.NAN] == "refused: forces not finite"
    assert reasons[faulty.HUGE].startswith("refused: a force of")
    assert [r["status"] for r in records] == ["failed"] * 3 + ["labelled"] + ["failed"] * 2 + ["labelled"]
    for n in (4, faulty.PRINTS):
        frame = labelled(frames[n - 1], records[n - 1])
        atoms = frames[n - 1].to_atoms()
        atoms.calc = EMT()
        assert frame.energy == atoms.get_potential_energy()
        np.testing.assert_array_equal(frame.forces, atoms.get_forces())
        assert frame.stress is None
    with pytest.raises(ValueError, match="has no label"):
        labelled(frames[0], records[0])
    assert len(faulty.calls(tmp_path / "calls")) == 7
    # all is on disk: nothing is computed again
    again = label_frames(frames, oracle(tmp_path), executor, *arguments)
    assert again == json.loads(json.dumps(records))
    assert len(faulty.calls(tmp_path / "calls")) == 7
    assert len(Journal(tmp_path / "journal").read()) == 7


def test_every_fault_in_processes(tmp_path) -> None:
    executor = ProcessPool(2, timeout=5.0)
    try:
        check_faults(tmp_path, executor)
    finally:
        executor.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:distributed")
def test_every_fault_on_a_dask_cluster(tmp_path) -> None:
    pytest.importorskip("distributed")
    executor = DaskCluster("local", workers=1, timeout=5.0)
    try:
        assert executor.slots == 1
        check_faults(tmp_path, executor)
    finally:
        executor.close()


def test_no_scheduler_is_one_message(monkeypatch) -> None:
    distributed = pytest.importorskip("distributed")

    def nobody(*arguments: object, **settings: object) -> None:
        raise OSError("Timed out trying to connect")

    monkeypatch.setattr(distributed, "Client", nobody)
    with pytest.raises(ValueError, match="no Dask scheduler answers at tcp://nowhere:1"):
        DaskCluster("tcp://nowhere:1")


def test_retries_with_other_settings(tmp_path) -> None:
    frames, folder, journal = [cluster(faulty.RAISES), cluster(4)], tmp_path / "labels", Journal(tmp_path / "journal")
    executor = ProcessPool(1, timeout=20)
    try:
        records = label_frames(frames, oracle(tmp_path), executor, folder, Rules(retries=2), journal)
        assert [len(r["attempts"]) for r in records] == [3, 1]
        assert records[0]["status"] == "failed"
        # one more retry, by then of an oracle that is well on retries: the failure is tried again, the label is not
        records = label_frames(frames, oracle(tmp_path, healthy=True), executor, folder, Rules(retries=3), journal)
    finally:
        executor.close()
    assert [len(r["attempts"]) for r in records] == [4, 1]
    assert records[0]["status"] == "labelled"
    assert records[0]["attempts"][3]["reason"] is None
    attempts = [(line["key"], line["attempt"]) for line in journal.read()]
    assert sorted(attempts) == sorted([(frame_key(frames[0]), k) for k in (1, 2, 3, 4)] + [(frame_key(frames[1]), 1)])


def test_equal_frames_are_one_label(tmp_path) -> None:
    executor = ProcessPool(1, timeout=20)
    try:
        records = label_frames(
            [cluster(4), cluster(4), cluster(4, seed=1)], oracle(tmp_path), executor, tmp_path / "labels", Rules(),
            Journal(tmp_path / "journal"),
        )  # fmt: skip
    finally:
        executor.close()
    assert records[0] == records[1] != records[2]
    assert len(faulty.calls(tmp_path / "calls")) == 2


def test_a_worker_is_kept_and_replaced(tmp_path) -> None:
    with Worker() as worker:
        good = Task("k", cluster(4).to_atoms(), oracle(tmp_path))
        worker.label(good, 20)
        first = worker._process.pid
        assert worker.label(good, 20)["reason"] is None
        assert worker._process.pid == first
        assert "died" in worker.label(Task("k", cluster(faulty.DIES).to_atoms(), oracle(tmp_path)), 20)["reason"]
        assert worker.label(good, 20)["reason"] is None
        assert worker._process.pid != first


def test_a_process_that_labels_ends_with_the_loop(tmp_path) -> None:
    """Killed -9 in the middle of a label that hangs, the loop leaves nobody behind."""
    script = (
        "from tests.active.test_labelling import *\n"
        "import threading\n"
        "worker = Worker()\n"
        "print(worker._started().pid, flush=True)\n"
        f"worker.label(Task('k', cluster(2).to_atoms(), oracle(Path({str(tmp_path)!r}))), 3600)\n"
    )
    loop = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    pid = int(loop.stdout.readline())
    for _ in range(100):
        if faulty.calls(tmp_path / "calls"):
            break
        time.sleep(0.1)
    assert running(pid)
    os.kill(loop.pid, signal.SIGKILL)
    loop.wait()
    loop.stdout.close()
    for _ in range(50):
        if not running(pid):
            return
        time.sleep(0.1)
    raise AssertionError("the process that labels outlived the loop by 5 s")


def running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"
