"""A pool of processes for work on clips: one torch thread each, and none outlives the command.

In: a top-level function and its tasks. Out: the results as they are finished. A fault in a task is raised
here; a process that dies raises DataError.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import Any

import torch

from msm_dist.errors import DataError


def run_tasks(function: Callable[[Any], Any], tasks: Iterable[Any], workers: int) -> Iterator[Any]:
    """Yield function(task) for every task, in the order of completion; `workers` 1 stays in this process."""
    tasks = list(tasks)
    if min(workers, len(tasks)) <= 1:
        yield from _run_here(function, tasks)
        return
    # Forking a process that has used torch's threads can deadlock the child; the server has only imported it.
    context = get_context("forkserver")
    context.set_forkserver_preload(["msm_dist.data.stats"])
    executor = ProcessPoolExecutor(min(workers, len(tasks)), context, _start)
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


def _start() -> None:
    """One torch thread; end at once with Ctrl-C, and with the command, however that dies."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent_process().join()
    os._exit(1)
