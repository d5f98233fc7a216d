"""The pool of processes: results, faults, threads."""

import os

import pytest
import torch

from msm_dist.data.workers import run_tasks
from msm_dist.errors import DataError


def describe(task: int) -> tuple[int, int, int]:
    if task < 0:
        raise DataError(f"task {task}")
    return task, os.getpid(), torch.get_num_threads()


def die(task: int) -> int:
    os._exit(9)


def test_tasks_run_once_each_with_one_thread_in_other_processes():
    results = list(run_tasks(describe, range(5), workers=2))
    assert sorted(task for task, _, _ in results) == list(range(5))
    assert {threads for _, _, threads in results} == {1}
    assert os.getpid() not in {pid for _, pid, _ in results}


def test_one_worker_is_this_process_with_its_threads_given_back():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert list(run_tasks(describe, [7], workers=8)) == [(7, os.getpid(), 1)]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert list(run_tasks(describe, [], workers=2)) == []


def test_fault_of_a_task_is_raised_here():
    with pytest.raises(DataError, match="task -3"):
        list(run_tasks(describe, [1, -3, 2], workers=2))


def test_death_of_a_worker_is_an_error_with_a_remedy():
    with pytest.raises(DataError, match="--workers"):
        list(run_tasks(die, range(4), workers=2))
