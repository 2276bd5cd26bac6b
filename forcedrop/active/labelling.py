"""Labels from an oracle, many at a time, each in a process of its own so that what goes wrong with one is its own affair.

A label that raises, hangs, takes its process down or makes no sense is recorded with the reason, tried again as configured, and
then left. Results are written as they arrive, each to a file of its own, atomically: whatever was computed is not computed again.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from tqdm import tqdm

from forcedrop.active.oracles import Oracle, Task, refusal
from forcedrop.active.state import Journal, frame_key, read_json, write_json
from forcedrop.active.worker import READY
from forcedrop.files import DISK, WriteError
from forcedrop.structures import Frame

START_SECONDS = 120.0
"""For a process to start and import ASE."""


class Worker:
    """A process that computes one label at a time and can be killed; started when it is needed.

    Args:
        threads: that the oracle may use (``OMP_NUM_THREADS``).
    """

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def label(self, task: Task, timeout: float) -> dict[str, Any]:
        """Return what the process answers, or the reason why it does not; one that fails is killed.

        Args:
            task: what to compute.
            timeout: [s].

        Returns:
            ``found`` (see ``oracles.compute``) or None, ``reason`` or None, ``seconds``.
        """
        start = time.monotonic()
        try:
            process = self._started()
            pickle.dump(task, process.stdin)  # type: ignore[arg-type]
            process.stdin.flush()  # type: ignore[union-attr]
            answer: dict[str, Any] = self._read(process, timeout)
            return answer
        except TimeoutError:
            reason = f"no result after {timeout:g} s"
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            reason = self._last_words()
        self.close()
        return {"found": None, "reason": reason, "seconds": time.monotonic() - start}

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            count = str(self.threads)
            paths = os.pathsep.join(path for path in sys.path if path)
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "forcedrop.active.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count},
                start_new_session=True,  # Ctrl-C is for the loop
            )
            if self._read(self._process, START_SECONDS) != READY:
                raise pickle.UnpicklingError
        return self._process

    @staticmethod
    def _read(process: subprocess.Popen[bytes], timeout: float) -> Any:
        ready, _, _ = select.select([process.stdout], [], [], timeout)  # type: ignore[type-var]
        if not ready:
            raise TimeoutError
        return pickle.load(process.stdout)  # type: ignore[arg-type]

    def _last_words(self) -> str:
        """Say how the process ended, and what it wrote last."""
        code = self._process.wait(5) if self._process is not None else None
        self._errors.seek(0)
        words = self._errors.read().decode(errors="replace").strip()[-300:]
        how = f"by signal {-code}" if code is not None and code < 0 else f"with status {code}"
        return f"the process died {how}" + (f": {words}" if words else "")

    def close(self) -> None:
        """Kill the process, if there is one, and its children."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # and what the oracle has started
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                with suppress(BrokenPipeError):  # what could not be sent is of no use now
                    stream.close()  # type: ignore[union-attr]
            self._process = None
        if self._errors is not None:
            self._errors.close()
            self._errors = None


def label_isolated(task: Task, timeout: float, threads: int = 1) -> dict[str, Any]:
    """Compute one label in a process that ends with it; what a cluster's workers call."""
    with Worker(threads) as worker:
        return worker.label(task, timeout)


class Executor(Protocol):
    """Where labels are computed."""

    @property
    def slots(self) -> int:
        """How many at once."""
        ...

    def submit(self, task: Task) -> Future[dict[str, Any]]:
        """Start one; the future holds what :meth:`Worker.label` returns, or raises if the place itself failed."""
        ...

    def close(self) -> None:
        """Stop everything that runs."""
        ...


class ProcessPool:
    """Processes on this machine.

    Args:
        workers: how many.
        timeout: of a label [s].
        threads: of each.
    """

    def __init__(self, workers: int = 1, timeout: float = 3600.0, threads: int = 1) -> None:
        self.slots, self.timeout = workers, timeout
        self._workers = [Worker(threads) for _ in range(workers)]
        self._idle = list(self._workers)
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="label")

    def submit(self, task: Task) -> Future[dict[str, Any]]:
        """Start one."""
        return self._threads.submit(self._run, task)

    def _run(self, task: Task) -> dict[str, Any]:
        with self._lock:
            worker = self._idle.pop()
        try:
            return worker.label(task, self.timeout)
        finally:
            with self._lock:
                self._idle.append(worker)

    def close(self) -> None:
        """Kill the processes."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.close()


class DaskCluster:
    """A Dask cluster, or one made here for the purpose; the same code for both.

    A label runs in a process of its own beside the cluster's worker, which outlives it.

    Args:
        address: of the scheduler, such as ``tcp://10.0.0.1:8786``; ``local`` makes a cluster on this machine.
        workers: of a local one.
        timeout: of a label [s].
        threads: of each.

    Raises:
        ValueError: if Dask is not installed or the scheduler does not answer.
    """

    def __init__(self, address: str = "local", workers: int = 1, timeout: float = 3600.0, threads: int = 1) -> None:
        try:
            from distributed import Client, LocalCluster
        except ImportError as error:
            raise ValueError("labels on a cluster need Dask: pip install 'forcedrop[cluster]'") from error
        self.timeout, self.threads = timeout, threads
        self._cluster: Any = None
        if address == "local":
            self._cluster = LocalCluster(
                n_workers=workers, threads_per_worker=1, processes=True, dashboard_address=":0"
            )
        try:
            self._client: Any = Client(self._cluster or address, timeout=30)
        except (OSError, TimeoutError) as error:
            raise ValueError(f"no Dask scheduler answers at {address}: {error}") from error
        self._executor = self._client.get_executor(pure=False)

    @property
    def slots(self) -> int:
        """The threads of the workers that are there now; a cluster may grow."""
        return max(1, sum(self._client.nthreads().values()))

    def submit(self, task: Task) -> Future[dict[str, Any]]:
        """Start one."""
        future: Future[dict[str, Any]] = self._executor.submit(label_isolated, task, self.timeout, self.threads)
        return future

    def close(self) -> None:
        """Leave the cluster; one made here ends."""
        self._executor.shutdown(wait=False)
        self._client.close()
        if self._cluster is not None:
            self._cluster.close()


@dataclass(frozen=True)
class Rules:
    """When a label is believed, and how often it is tried.

    Attributes:
        retries: further attempts after one that failed.
        largest_force: [eV/Å] above which a label is refused.
        stress: whether periodic structures get a stress, where the oracle has it.
    """

    retries: int = 1
    largest_force: float = 100.0
    stress: bool = True


def label_frames(
    frames: Sequence[Frame], oracle: Oracle, executor: Executor, folder: Path, rules: Rules, journal: Journal
) -> list[dict[str, Any]]:
    """Compute what is not in ``folder`` yet and return the record of every frame, in order.

    The folder receives ``KEY.json`` of each frame: ``status`` (``labelled`` or ``failed``), ``energy``, ``forces``, ``stress``,
    ``seconds``, and ``attempts``, each with its ``reason`` if it failed. Frames of the same key are one.

    Args:
        frames: structures; labels that they have are not looked at.
        oracle: what labels them.
        executor: where.
        folder: for the records; made if missing.
        rules: what to believe and how often to try.
        journal: notes every attempt that starts.

    Raises:
        WriteError: if a disk is full or lost, the one where the oracle computes included.
    """
    by_key = {frame_key(frame): frame for frame in frames}
    records = {key: read_json(folder / f"{key}.json") or {"key": key, "attempts": []} for key in by_key}
    waiting = deque(key for key, record in records.items() if not _over(record, rules))
    running: dict[Future[dict[str, Any]], str] = {}
    with tqdm(total=len(by_key), initial=len(by_key) - len(waiting), desc="label", unit="label") as bar:
        while waiting or running:
            while waiting and len(running) < executor.slots:
                key = waiting.popleft()
                frame, attempt = by_key[key], len(records[key]["attempts"]) + 1
                stress = rules.stress and bool(frame.pbc.all())
                journal.note(event="label", key=key, attempt=attempt)
                running[executor.submit(Task(key, bare(frame).to_atoms(), oracle, stress, attempt))] = key
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                key = running.pop(future)
                answer = _answer(future)
                if (
                    answer.get("errno") in DISK
                ):  # it is not the label's fault: it has all its attempts when there is room
                    raise WriteError(answer["errno"], os.strerror(answer["errno"]), f"what {oracle.name} writes")
                records[key] = _recorded(records[key], answer, len(by_key[key]), rules)
                write_json(folder / f"{key}.json", records[key])
                if _over(records[key], rules):
                    bar.update()
                else:
                    waiting.append(key)
                failed = sum(r.get("status") == "failed" and _over(r, rules) for r in records.values())
                bar.set_postfix_str(f"failed {failed}" if failed else "")
    return [records[frame_key(frame)] for frame in frames]


def _over(record: Mapping[str, Any], rules: Rules) -> bool:
    return record.get("status") == "labelled" or len(record["attempts"]) > rules.retries


def _answer(future: Future[dict[str, Any]]) -> dict[str, Any]:
    try:
        return future.result()
    except Exception as error:  # of the place, such as a cluster's worker that is gone
        return {"found": None, "reason": f"{type(error).__name__}: {str(error)[:400]}", "seconds": 0.0}


def _recorded(record: Mapping[str, Any], answer: dict[str, Any], n_atoms: int, rules: Rules) -> dict[str, Any]:
    """Return the record with one attempt more."""
    found, reason = answer["found"], answer["reason"]
    if reason is None:
        reason = refusal(found, n_atoms, rules.largest_force)
    attempts = [*record["attempts"], {"reason": reason, "seconds": round(answer["seconds"], 4)}]
    if reason is not None:
        return {**record, "status": "failed", "attempts": attempts}
    values = {name: None if x is None else np.asarray(x).tolist() for name, x in found.items()}
    return {**record, "status": "labelled", "attempts": attempts, "seconds": answer["seconds"], **values}


def bare(frame: Frame) -> Frame:
    """Return the structure alone."""
    return Frame(z=frame.z, pos=frame.pos, cell=frame.cell, pbc=frame.pbc)


def labelled(frame: Frame, record: Mapping[str, Any]) -> Frame:
    """Return the frame with the labels of its record.

    Raises:
        ValueError: if the record is not that of a label.
    """
    if record.get("status") != "labelled":
        raise ValueError(f"{record['key']} has no label: {record['attempts']}")
    stress = record["stress"]
    return Frame(
        **{
            **vars(frame),
            "energy": float(record["energy"]),
            "forces": np.asarray(record["forces"], float),
            "stress": None if stress is None else np.asarray(stress, float),
        }
    )
