"""Jobs of the loop that run side by side in processes: trainings of a committee, trajectories."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import TypeVar

import torch

Job = TypeVar("Job")


def at_once(do: Callable[[Job], None], jobs: Sequence[Job], workers: int) -> None:
    """Do all jobs, ``workers`` of them at a time, each in a process with one thread; one after another in this one for 1.

    Each job sees to it that what it wrote counts when it is over. After an error of one none is begun; it is raised when those
    that run are over.
    """
    if workers > 1 and len(jobs) > 1:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(workers, len(jobs)), context, _leave_with, (os.getpid(),)) as pool:
            left = list(jobs)
            running: set[Future[None]] = set()
            while left or running:  # none is handed over before its turn: what waits in the pool cannot be called back
                while left and len(running) < workers:
                    running.add(pool.submit(do, left.pop(0)))
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
    else:
        for job in jobs:
            do(job)


def _leave_with(parent: int) -> None:
    """Make a process of the pool end with the loop."""
    torch.set_num_threads(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
