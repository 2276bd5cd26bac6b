import multiprocessing
import subprocess
from pathlib import Path

import pytest

from forcedrop.active import ActiveLoop, load_active_config

ROOT = Path(__file__).resolve().parents[2]


class Fork:
    """A loop in a fork of this process, which has imported everything already."""

    def __init__(self, folder: Path) -> None:
        self.process = multiprocessing.get_context("fork").Process(target=self.run, args=(folder,))
        self.process.start()
        self.pid = self.process.pid

    @staticmethod
    def run(folder: Path) -> None:
        ActiveLoop(load_active_config(folder / "loop.yaml")).run()

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("loop", timeout)
        return self.process.exitcode


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_killed_loop_ends_as_one_in_peace(tmp_path, monkeypatch, kills: int) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import kill_loop

    monkeypatch.setattr(kill_loop, "PAUSE", 0.02 if kills < 20 else kill_loop.PAUSE)
    changes = {"start": Fork, "stop": {"labels": 15}, "retraining": {"steps": 8}} if kills < 20 else {}
    found = kill_loop.compare(tmp_path, kills, seed=1, **changes)
    assert found["kills"] == kills
    assert set(found["labels"]["killed"]) == {found["labels"]["in peace"]} == {found["calls"]["in peace"]}
    assert found["same_frames"]
    assert found["same_labels"]
    assert found["valid_store"]
    assert found["labelled_twice"] == 0
    assert found["attempts_that_failed"] == 0
    assert found["calls_cut_off"] <= kills
