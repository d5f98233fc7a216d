"""An srun that waits for a node out of reach is ended, and no other."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

WATCH = "import os; from msm_dist.guard import guard; guard(os.getppid(), '7.0', poll=0.05, patience={patience})"
SCONTROL = """#!/bin/sh
[ "$1 $2" = "listpids 7.0" ] || exit 9
echo asked >> {asked}
echo "PID      JOBID    STEPID   LOCALID GLOBALID"
if [ -e {ranks} ]; then echo "42       7        0        0       0"; else echo "{gone}" >&2; exit 1; fi
"""


GONE = "StepId=7.0 does not exist on node n1."
SECONDS = 300


class Job(NamedTuple):
    """A node with a scontrol that lists a rank while the file `ranks` exists, and notes each time that it is asked."""

    folder: Path

    @property
    def ranks(self) -> Path:
        return self.folder / "ranks"

    def start(self, patience: float) -> subprocess.Popen[str]:
        """A batch script: the guard beside an srun that goes on until `end`; prints srun's exit code."""
        os.mkfifo(self.folder / "goes-on")
        program = WATCH.format(patience=patience)
        script = f'"{sys.executable}" -c "{program}" & srun goes-on; echo "srun ended with $?"'
        return subprocess.Popen(
            ["bash", "-c", script],
            env={"PATH": f"{self.folder}:/usr/bin:/bin", "SLURM_JOB_ID": "7"},
            cwd=self.folder,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def looks(self, script: subprocess.Popen[str], times: int) -> None:
        """Wait until the guard has looked for ranks so many times more, 0.05 s apart or longer; srun goes on."""
        deadline, before = time.monotonic() + SECONDS, self._looks()
        while self._looks() < before + times:
            assert script.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)

    def end(self, script: subprocess.Popen[str]) -> str:
        """Let srun end; what was printed."""
        (self.folder / "goes-on").open("wb").close()
        return script.communicate(timeout=SECONDS)[0]

    def _looks(self) -> int:
        asked = self.folder / "asked"
        return len(asked.read_text().split()) if asked.exists() else 0


@pytest.fixture
def job(tmp_path: Path) -> Job:
    job = Job(tmp_path)
    (tmp_path / "scontrol").write_text(SCONTROL.format(ranks=job.ranks, asked=tmp_path / "asked", gone=GONE))
    (tmp_path / "scontrol").chmod(0o755)
    shutil.copy(shutil.which("cat"), tmp_path / "srun")
    return job


def test_srun_without_ranks_is_ended(job: Job) -> None:
    job.ranks.touch()
    script = job.start(patience=0.3)
    job.looks(script, 20)
    assert script.poll() is None, "srun is left alone while ranks run"
    job.ranks.unlink()
    said = script.communicate(timeout=SECONDS)[0]
    assert "srun ended with 143" in said and "a lost node" in said


def test_srun_that_has_started_no_rank_yet_is_left_alone(job: Job) -> None:
    script = job.start(patience=0.1)
    job.looks(script, 10)
    assert job.end(script) == "srun ended with 0\n"


def test_ranks_that_just_ended_are_no_reason(job: Job) -> None:
    job.ranks.touch()
    script = job.start(patience=10 * SECONDS)
    job.looks(script, 5)
    job.ranks.unlink()
    job.looks(script, 10)
    assert job.end(script) == "srun ended with 0\n"


def test_slurm_that_can_not_say_is_no_reason(job: Job) -> None:
    job.ranks.touch()
    scontrol = job.folder / "scontrol"
    scontrol.write_text(scontrol.read_text().replace(GONE, "fatal: Unable to process configuration file"))
    script = job.start(patience=0.1)
    job.looks(script, 5)
    job.ranks.unlink()
    job.looks(script, 10)
    assert job.end(script) == "srun ended with 0\n"


def test_guard_outside_a_job_says_so(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "msm_dist.guard"], env={}, text=True, capture_output=True)
    assert done.returncode == 2 and "no SLURM_JOB_ID" in done.stdout
