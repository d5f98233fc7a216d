"""An srun that waits for a node out of reach is ended, and no other."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

WATCH = "import os; from msm_dist.guard import guard; guard(os.getppid(), '7.0', poll=0.05, patience={patience})"
SCONTROL = """#!/bin/sh
[ "$1 $2" = "listpids 7.0" ] || exit 9
echo "PID      JOBID    STEPID   LOCALID GLOBALID"
echo >> {ranks}.looks
if [ -e {ranks} ]; then echo "42       7        0        0       0"; else echo "{gone}" >&2; exit 1; fi
"""


GONE = "StepId=7.0 does not exist on node n1."


@pytest.fixture
def job(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A node with a scontrol that lists a rank while the file `ranks` exists, and a long-lived `srun`."""
    (tmp_path / "scontrol").write_text(SCONTROL.format(ranks=tmp_path / "ranks", gone=GONE))
    (tmp_path / "scontrol").chmod(0o755)
    shutil.copy(shutil.which("sleep"), tmp_path / "srun")
    return tmp_path, {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}


def start(job: tuple[Path, dict[str, str]], patience: float, seconds: float) -> subprocess.Popen[str]:
    """A batch script: the guard beside an srun of so many seconds; prints srun's exit code."""
    folder, environment = job
    program = WATCH.format(patience=patience)
    script = f'"{sys.executable}" -c "{program}" & srun {seconds}; echo "srun ended with $?"'
    return subprocess.Popen(
        ["bash", "-c", script], env=environment, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def test_srun_without_ranks_is_ended(job: tuple[Path, dict[str, str]]) -> None:
    ranks = job[0] / "ranks"
    ranks.touch()
    script = start(job, patience=0.3, seconds=600)
    looks = ranks.with_suffix(".looks")
    while not looks.exists() or len(looks.read_text()) < 20:
        assert script.poll() is None, "srun is left alone while ranks run"
        time.sleep(0.05)
    ranks.unlink()
    said = script.communicate(timeout=300)[0]
    assert "srun ended with 143" in said and "a lost node" in said


def test_srun_that_has_started_no_rank_yet_is_left_alone(job: tuple[Path, dict[str, str]]) -> None:
    said = start(job, patience=0.1, seconds=1.5).communicate(timeout=300)[0]
    assert said == "srun ended with 0\n"


def test_ranks_that_just_ended_are_no_reason(job: tuple[Path, dict[str, str]]) -> None:
    (job[0] / "ranks").touch()
    script = start(job, patience=60, seconds=2.5)
    time.sleep(1)
    (job[0] / "ranks").unlink()
    assert script.communicate(timeout=300)[0] == "srun ended with 0\n"


def test_slurm_that_can_not_say_is_no_reason(job: tuple[Path, dict[str, str]]) -> None:
    (job[0] / "ranks").touch()
    scontrol = job[0] / "scontrol"
    scontrol.write_text(scontrol.read_text().replace(GONE, "fatal: Unable to process configuration file"))
    script = start(job, patience=0.1, seconds=2.5)
    time.sleep(1)
    (job[0] / "ranks").unlink()
    assert script.communicate(timeout=300)[0] == "srun ended with 0\n"


def test_guard_outside_a_job_says_so(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "msm_dist.guard"], env={}, text=True, capture_output=True)
    assert done.returncode == 2 and "no SLURM_JOB_ID" in done.stdout
