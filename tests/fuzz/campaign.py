"""Runs damaged inputs in forked workers that may die, and judges what comes of each.

Right is a result that could be one, or one clear error that names the file. All else is a fault: the end of the process, a hang,
memory, code of the file that ran, a number that is not finite, an error nobody foresaw.
"""

from __future__ import annotations

import os
import pickle
import resource
import select
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from forcedrop.active.config import load_active_config
from forcedrop.active.state import State
from forcedrop.calculator import DropoutCalculator
from forcedrop.devices import pick_device
from forcedrop.door import door
from forcedrop.md.restart import Restart
from forcedrop.model import load_model
from forcedrop.report import describe_frames, describe_model
from forcedrop.structures import BadFrames, check_frames, read_checked
from forcedrop.training.config import load_config
from tests.fuzz.inputs import DAMAGE, EVIL, damaged, labelled, seeds, strange_atoms

SECONDS, MEMORY, MESSAGE = 10, 2 * 2**30, 5000
"""No input may take longer, or more memory beside the size of its file [bytes], or answer with a longer message."""
CATEGORIES = (*DAMAGE, "calculator")


class Hang(BaseException):
    """An input took too long; no ``Exception``, so that nothing takes it for an error of a file."""


@dataclass
class Outcome:
    """What became of a campaign.

    Attributes:
        counts: inputs by verdict.
        faults: (category, index, verdict, detail) of those that are not right.
        slowest: [s].
    """

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[tuple[str, int, str, str]] = field(default_factory=list)
    slowest: float = 0.0


def use(category: str, path: Path, calculator: DropoutCalculator | None) -> None:
    """Do with a file what the package does with it.

    Raises:
        AssertionError: if a result cannot be right.
    """
    if category in ("train", "active"):
        config: Any = load_config(path) if category == "train" else load_active_config(path)
        pick_device(config.device)
    elif category in ("model", "fields"):
        model = load_model(path)
        with door(path, "describe"):  # as `forcedrop info` does
            describe_model(model)
        atoms = labelled(False)
        atoms.calc = DropoutCalculator(model, n_samples=8, device="cpu")
        assert np.isfinite(atoms.get_potential_energy()), "energy is not finite"
        assert np.isfinite(atoms.calc.results["forces_uncertainty" if model.calibration else "forces_std"]).all(), "σ"
        if category == "model" and calculator is not None:
            right = labelled(False)
            right.calc = calculator
            assert abs(right.get_potential_energy() - atoms.get_potential_energy()) < 1e-4, (
                "another energy, without a word"
            )
    elif category == "restart":
        found = Restart.load(path)
        assert np.isfinite(found.momenta).all(), "momenta"
    elif category == "state":
        result = State(path.parent.parent.parent).result(1, path.stem)
        if result is not None:
            assert result["picked"] is not NotImplemented
    else:
        frames, _ = read_checked([path], skip_bad=True)
        assert not check_frames(frames), "a bad frame passed"
        for frame in frames:
            assert frame.energy is None or np.isfinite(frame.energy), "energy"
        describe_frames(frames)


def judge(category: str, index: int, path: Path, calculator: DropoutCalculator | None) -> tuple[str, str]:
    """Return the verdict about one input, and a detail."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if category == "calculator":
                _calculate(index, calculator)
            else:
                use(category, path, calculator)
    except Hang:
        return "hang", "".join(traceback.format_exc().splitlines()[-3:])
    except AssertionError as error:
        return "wrong", str(error)
    except (ValueError, OSError) as error:
        if len(str(error)) > MESSAGE:
            return "long message", f"{len(str(error))} characters"
        if "of these atoms are not finite" in str(error):  # of huge weights: the calculator knows of no file
            return "error", ""
        if category != "calculator" and path.name not in str(error) and not isinstance(error, BadFrames):
            return ("device" if "device" in str(error) else "no file name"), f"{type(error).__name__}: {error}"
        return "error", ""
    except MemoryError as error:
        return ("error" if str(error) else "traceback"), "MemoryError"
    except Exception as error:
        return (
            "traceback",
            f"{type(error).__name__}: {str(error)[:200]} {traceback.extract_tb(error.__traceback__)[-1]}",
        )
    return "result", ""


def _calculate(index: int, calculator: DropoutCalculator | None) -> None:
    atoms = strange_atoms(index)
    atoms.calc = calculator
    energy, forces = atoms.get_potential_energy(), atoms.get_forces()
    assert np.isfinite([energy, *forces.ravel()]).all(), "not finite"
    assert np.isfinite(atoms.calc.results["forces_std"]).all(), "σ is not finite"


GOOD = ("result", "error", "device")


def run(category: str, indices: Iterable[int], folder: Path, keep: Path | None = None) -> Outcome:
    """Run inputs of one category; workers that die are replaced.

    Args:
        category: one of :data:`CATEGORIES`.
        indices: which inputs.
        folder: for files.
        keep: a folder that files which led to a fault are copied to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    valid = seeds(folder)
    model = folder / "right.pt"
    model.write_bytes(valid["model"][0][1])
    calculator = DropoutCalculator(model, n_samples=8, device="cpu")
    (folder / f"{EVIL}.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\nclass Evil:\n    pass\n")
    outcome, todo = Outcome(), list(indices)
    while todo:
        done = _fork(category, todo, folder, valid, calculator, outcome)
        todo = todo[done:]
    if keep is not None:
        for _, index, *_ in outcome.faults:
            if category != "calculator":
                name, data = damaged(category, index, valid)
                (keep / f"{category}-{index}-{name}").write_bytes(data)
    return outcome


def _fork(
    category: str, todo: list[int], folder: Path, valid: Any, calculator: DropoutCalculator, outcome: Outcome
) -> int:
    """Work on inputs in a fork until all are done or it dies; return how many are behind us."""
    back, out = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(back)
        try:
            _child(category, todo, folder, valid, calculator, out)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(out)
    done, data, last = 0, b"", time.monotonic()
    while True:
        ready, _, _ = select.select([back], [], [], 1.0)
        if ready:
            block = os.read(back, 65536)
            if not block:
                break
            data += block
            while len(data) >= 4 and len(data) >= 4 + (size := int.from_bytes(data[:4], "little")):
                verdict, detail, seconds = pickle.loads(data[4 : 4 + size])
                data = data[4 + size :]
                _note(outcome, category, todo[done], verdict, detail)
                outcome.slowest = max(outcome.slowest, seconds)
                done, last = done + 1, time.monotonic()
        elif time.monotonic() - last > SECONDS + 3:
            os.kill(child, signal.SIGKILL)
            break
    os.close(back)
    _, status = os.waitpid(child, 0)
    if done < len(todo):
        _note(outcome, category, todo[done], "killed", f"status {status}")
        done += 1
    return done


def _note(outcome: Outcome, category: str, index: int, verdict: str, detail: str) -> None:
    outcome.counts[verdict] += 1
    if verdict not in GOOD:
        outcome.faults.append((category, index, verdict, detail))


def _child(category: str, todo: list[int], folder: Path, valid: Any, calculator: DropoutCalculator, out: int) -> None:
    def alarm(*_: Any) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, alarm)
    sys.path.insert(0, str(folder))
    os.chdir(folder)
    place = folder / "rounds" / "001" if category == "state" else folder / "in"
    place.mkdir(parents=True, exist_ok=True)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * MEMORY, used + 2 * MEMORY))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for index in todo:
        path = place / "none"
        if category != "calculator":
            name, data = damaged(category, index, valid)
            path = place / name
            path.write_bytes(data)
        start = time.monotonic()
        signal.alarm(SECONDS)
        try:
            verdict, detail = judge(category, index, path, calculator)
            signal.alarm(0)
        except Hang:
            verdict, detail = "hang", ""
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if most - before > MEMORY + (path.stat().st_size if path.exists() else 0):
            verdict, detail, before = "memory", f"{(most - before) / 2**30:.1f} GiB", most
        if (folder / "ran").exists() or EVIL in sys.modules:
            verdict, detail = "code ran", path.name
            (folder / "ran").unlink(missing_ok=True)
            sys.modules.pop(EVIL, None)
        message = pickle.dumps((verdict, detail, time.monotonic() - start))
        os.write(out, len(message).to_bytes(4, "little") + message)
