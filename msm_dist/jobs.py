"""What Slurm says of jobs, for those who only look: one call of squeue for all, one of sacct for those that have ended.

In: job numbers, `12`, or `12_3` of an array. Out: a `Jobs`, which tells an answer without a job from no answer. Nothing
fails: a site without Slurm gives no answer, and what went wrong elsewhere is `Jobs.complaint`.
"""

import os
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

PATIENCE_SECONDS = 20.0
NUMBER = re.compile(r"\d+(_\d+)?")
QUEUED = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
ACTIVE = {"RUNNING", "CONFIGURING", "RESIZING", "SIGNALING", "STAGE_OUT", "SUSPENDED", "STOPPED"}


@dataclass(frozen=True)
class Job:
    """A job's state as Slurm writes it, such as PENDING, why it waits, its exit code, and when it ended (Unix time)."""

    name: str
    """Its number as squeue shows it: 12_3 also for a task of an array that has a number of its own."""
    state: str
    reason: str = ""
    exit_code: int = 0
    ended: float | None = None


@dataclass(frozen=True)
class Jobs:
    """Jobs by number. `answered` is False where nobody could be asked, or gave no answer, for which see `complaint`."""

    by_number: Mapping[str, Job] = field(default_factory=dict)
    answered: bool = False
    complaint: str = ""


def waiting_and_running(number: str | None = None) -> Jobs:
    """The jobs of squeue, of all users: a run folder may be shared. Of one job, if a number is given."""
    which = [] if number is None else [f"--jobs={number}"]
    lines = _ask("squeue", "--array", "--all", "--noheader", "--format=%i|%A|%T|%r", *which)
    if isinstance(lines, Jobs):
        return lines
    rows = [row for row in (line.split("|", 3) for line in lines) if len(row) == 4]
    # Tasks of an array that have not started yet all have the array's own number as their job's.
    of_number = Counter(number for _, number, _, _ in rows)
    jobs: dict[str, Job] = {}
    for shown, number, state, reason in rows:
        job = Job(shown, state, "" if reason == "None" else reason)
        jobs[shown] = job
        if of_number[number] == 1:
            jobs[number] = job
    return Jobs(jobs, answered=True)


def ended(numbers: Iterable[str]) -> Jobs:
    """What the accounting knows of the jobs of these numbers, which are all known to be valid."""
    lines = _ask(
        "sacct",
        *("--allocations", "--noheader", "--parsable2", "--format=JobID,JobIDRaw,State,ExitCode,End"),
        f"--jobs={','.join(sorted(numbers))}",
    )
    if isinstance(lines, Jobs):
        return lines
    jobs: dict[str, Job] = {}
    for row in (line.split("|") for line in lines):
        if len(row) == 5:
            # "CANCELLED by 1000", "143:0"
            state, code = row[2].partition(" ")[0], row[3].partition(":")[0]
            job = Job(row[0], state, exit_code=int(code) if code.isdigit() else 0, ended=_moment(row[4]))
            jobs[row[0]] = jobs[row[1]] = job
    return Jobs(jobs, answered=True)


def _ask(program: str, *words: str) -> list[str] | Jobs:
    """The lines of a Slurm command, or the answer of one that gave none."""
    if shutil.which(program) is None:
        return Jobs()
    # A user's own defaults, such as SQUEUE_STATES, would hide jobs.
    own = {name: value for name, value in os.environ.items() if not name.startswith(("SQUEUE_", "SACCT_"))}
    try:
        done = subprocess.run(
            [program, *words],
            env=own | {"LC_ALL": "C", "SLURM_TIME_FORMAT": "standard"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=PATIENCE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return Jobs(complaint=f"{program} did not answer within {PATIENCE_SECONDS:.0f} s")
    except OSError as error:
        return Jobs(complaint=f"{program} can't be run ({error.strerror})")
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["without a word"])[-1]
        return Jobs(complaint=f"{program} failed with exit code {done.returncode}: {said[:200]}")
    return done.stdout.splitlines()


def _moment(text: str) -> float | None:
    """Unix time of 2026-05-02T14:00:00, by this machine's clock; none for Unknown."""
    try:
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    except (ValueError, OverflowError):
        return None
