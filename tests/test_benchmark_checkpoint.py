"""The benchmark of checkpoints: its arithmetic, and a rehearsal with a small model."""

import json
import subprocess
import sys

import pytest

from benchmarks.checkpoint import summary_table
from tests.processes import HERE

FOUND = {
    "size": "base",
    "world": 1,
    "threads": 2,
    "micro_batch": 8,
    "state_bytes": 3 * 2**20,
    "first_beside": 0.75,
    "seconds": {
        "quiet": [1.0, 1.0, 9.0],
        "at_once": [8.0, 8.0],
        "beside": [0.5, 0.5],
        "during": [1.5, 1.5, 2.0, 2.0],
        "write": [3.0, 4.0],
    },
}


def rows(text):
    """Label and number of every line but the first."""
    return {label.strip(): value for label, value in (line.rsplit(maxsplit=1) for line in text.splitlines()[1:])}


def test_cost_beside_training_is_the_stall_and_what_the_steps_of_the_write_take_longer():
    shown = rows(summary_table(FOUND))
    assert shown["stall at once / stall beside training"] == "16.000"
    assert shown["step during the write / step otherwise"] == "1.750"
    assert shown["cost, stall and slower steps, s"] == "2.000"  # 0.5, and 3 s over 2 turns
    assert shown["cost at once / cost beside training"] == "4.000"


def test_write_shorter_than_a_step_says_nothing_of_the_steps_beside_it():
    shown = rows(summary_table(FOUND | {"seconds": FOUND["seconds"] | {"during": []}}))
    assert shown["step during the write / step otherwise"] == "-"
    assert shown["cost, stall and slower steps, s"] == "0.500"


@pytest.mark.distributed
def test_rehearsal_leaves_a_result_and_no_checkpoint(tmp_path):
    work, out = tmp_path / "work", tmp_path / "out"
    command = ["-m", "benchmarks.checkpoint", "--size", "tiny", "--turns", "1", "--work", str(work), "--out", str(out)]
    child = subprocess.run([sys.executable, *command], cwd=HERE.parent, capture_output=True, text=True, timeout=600)
    assert child.returncode == 0, child.stdout + child.stderr
    (path,) = out.iterdir()
    found = json.loads(path.read_text())
    assert found["subject"] == "checkpoint"
    assert len(found["seconds"]["at_once"]) == len(found["seconds"]["beside"]) == 1
    assert list(work.iterdir()) == []
