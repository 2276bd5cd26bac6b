"""Processes of the loop: jobs side by side (trainings of a committee, trajectories), and that none outlives who started it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import TypeVar

Job = TypeVar("Job")
WATCH_SECONDS = 0.2


def at_once(do: Callable[[Job], None], jobs: Sequence[Job], workers: int) -> None:
    """Do all jobs, ``workers`` of them at a time, each in a process with one thread; one after another in this one for 1.

    Each job sees to it that what it wrote counts when it is over. After an error of one none is begun; it is raised when those
    that run are over.
    """
    if workers > 1 and len(jobs) > 1:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(workers, len(jobs)), context, _begin, (os.getpid(),)) as pool:
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


def _begin(parent: int) -> None:
    """Prepare a process of the pool."""
    import torch  # not above: the processes that label start in a moment

    torch.set_num_threads(1)
    leave_with(parent)


def leave_with(parent: int) -> None:
    """Make this process end with the one that started it, in the middle of whatever it does; from now on, beside it.

    One that leads a group of processes takes the group with it, such as the program that an oracle has called.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_SECONDS)
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
