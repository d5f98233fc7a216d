"""Ends an srun that waits for a node it can no longer reach.

srun hears of a task's end from the task's own node. Where the network between the nodes is cut, the ranks end by the
time-out of their collectives and Slurm's controller learns of it, yet srun would wait until the job's time limit. A
batch script starts `python -m msm_dist.guard &` before srun: once the ranks of this node have been gone for a minute
and srun is still there, it gets TERM and ends within seconds with the exit code of the ranks that it did hear of.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

POLL_SECONDS = 5.0
SCONTROL_SECONDS = 30
PATIENCE_SECONDS = 60.0
"""All ranks of a run end within seconds of each other, on all nodes."""
PR_SET_PDEATHSIG = 1


def guard(shell: int, step: str, poll: float = POLL_SECONDS, patience: float = PATIENCE_SECONDS) -> None:
    """Watch a job step and the srun that `shell` runs, until the shell ends or srun had to be ended."""
    seen, gone_since = False, None
    while os.getppid() == shell:
        time.sleep(poll)
        if has_processes_here(step):
            seen, gone_since = True, None
            continue
        srun = child(shell, "srun")
        if not seen or srun is None:
            gone_since = None
            continue
        gone_since = gone_since or time.monotonic()
        if time.monotonic() - gone_since >= patience:
            print(f"guard: no rank here for {patience:.0f} s, but srun waits for a lost node: ending it", flush=True)
            with contextlib.suppress(ProcessLookupError):
                os.kill(srun, signal.SIGTERM)
            return


def has_processes_here(step: str) -> bool:
    """Whether a process of the step (such as "12.0") is on this node; also where Slurm can't say."""
    try:
        command = ["scontrol", "listpids", step]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SCONTROL_SECONDS)
    except subprocess.SubprocessError:
        return True
    if done.returncode and "does not exist" not in done.stderr:
        return True
    return any(line.split()[:1] and line.split()[0].isdigit() for line in done.stdout.splitlines())


def child(parent: int, name: str) -> int | None:
    """The child process of that name, if there is one."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            head, _, rest = path.read_text().rpartition(")")
            if rest.split()[1] == str(parent) and head.partition("(")[2] == name:
                return int(path.parent.name)
    return None


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    try:
        guard(os.getppid(), f"{os.environ['SLURM_JOB_ID']}.0")
    except (KeyError, FileNotFoundError) as error:
        print(f"guard: not watching srun: no {error.args[0] if isinstance(error, KeyError) else 'scontrol'} here")
        sys.exit(2)
