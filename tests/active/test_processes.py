import time
from pathlib import Path

import pytest

from forcedrop.active.processes import at_once


def job(given: tuple[Path, float, bool]) -> None:
    path, seconds, fails = given
    path.touch()
    time.sleep(seconds)
    if fails:
        raise ValueError(path.name)


@pytest.mark.parametrize("workers", [1, 2])
def test_all_are_done(tmp_path, workers) -> None:
    at_once(job, [(tmp_path / str(k), 0.0, False) for k in range(3)], workers)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2"]


def test_after_an_error_none_is_begun(tmp_path) -> None:
    jobs = [(tmp_path / "0", 0.0, True), (tmp_path / "1", 1.0, False), (tmp_path / "2", 0.0, False)]
    with pytest.raises(ValueError, match="0"):
        at_once(job, jobs, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]
