"""A pool of processes for work on clips: one torch thread each, and none outlives the command.

In: a top-level function and its tasks. Out: the results as they are finished. A fault in a task is raised
here; a process that dies raises DataError.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

import torch

from msm_dist.errors import DataError

PR_SET_PDEATHSIG = 1


def run_tasks(function: Callable[[Any], Any], tasks: Iterable[Any], workers: int) -> Iterator[Any]:
    """Yield function(task) for every task, in the order of completion; `workers` 1 stays in this process."""
    tasks = list(tasks)
    if min(workers, len(tasks)) <= 1:
        yield from _run_here(function, tasks)
        return
    # Forking a process that has used torch's threads can deadlock the child.
    executor = ProcessPoolExecutor(min(workers, len(tasks)), get_context("spawn"), _start, (os.getpid(),))
    try:
        for future in as_completed([executor.submit(function, task) for task in tasks]):
            yield future.result()
    except BrokenProcessPool:
        raise DataError(
            "a worker process died, most likely for lack of memory; the same command again continues, "
            "--workers with a lower number needs less"
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)


def _run_here(function: Callable[[Any], Any], tasks: list[Any]) -> Iterator[Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for task in tasks:
            yield function(task)
    finally:
        torch.set_num_threads(threads)


def _start(parent: int) -> None:
    """One thread; end at once with Ctrl-C and with the parent, however it dies."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
