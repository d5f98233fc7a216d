"""A real Slurm cluster of two nodes on this machine, as tests see it: commands of its login host, and its accidents.

`slurm-up.sh` beside this file makes it from Debian's packages in namespaces of their own. Its name comes from where
this clone is, so that two clones can be tested at the same time.
"""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import pytest

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "tests" / "cluster" / "slurm-up.sh"
PROGRAMS = ("sbatch", "slurmctld", "slurmd", "munged", "ip", "nsenter")
GONE = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "DEADLINE"}


def lacks() -> str | None:
    """What keeps this machine from standing up a cluster, or None."""
    if os.geteuid() != 0:
        return "needs root: namespaces and daemons; as root `make test-slurm`"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    return f"no {', '.join(missing)}: `make test-slurm` installs what is missing" if missing else None


class Lab:
    """Commands of the cluster. Nodes are n1 and n2, each with two GPUs that are none."""

    def __init__(self, environment: Mapping[str, str]):
        self.environment = environment

    def script(self, *words: str, check: bool = True, **options: object) -> str:
        """Run a command of slurm-up.sh; its standard output."""
        environment = {**self.environment, **options.pop("environment", {})}
        done = subprocess.run(
            ["bash", str(SCRIPT), *words], env=environment, cwd=ROOT, text=True, capture_output=True, **options
        )
        assert not check or done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def run(self, *words: str, check: bool = True, **environment: str) -> str:
        """Run a command on the login host."""
        return self.script("exec", *words, check=check, environment=environment, timeout=300)

    def sbatch(self, *words: str, **environment: str) -> str:
        """Submit; the job's number."""
        return self.run("sbatch", "--parsable", *words, **environment).strip()

    def job(self, number: str) -> dict[str, str]:
        """What scontrol says of a job: JobState, Restarts, ExitCode, Reason, ..."""
        text = self.run("scontrol", "show", "job", "--oneliner", number)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def is_gone(self, number: str) -> bool:
        """Whether the job has ended for good."""
        return self.job(number)["JobState"] in GONE

    def restarts(self, number: str) -> int:
        """How often the job was requeued."""
        return int(self.job(number)["Restarts"])

    def signal(self, number: str, name: str) -> None:
        """Send a signal to all tasks of a job."""
        self.run("scancel", f"--signal={name}", number)

    def pids(self, node: str, pattern: str) -> list[str]:
        """Processes of a node whose command line matches, parents first."""
        return self.script("on", node, "pgrep", "-f", pattern, check=False).split()

    def kill(self, node: str, name: str, pid: str) -> None:
        """Send a signal to one process of a node."""
        self.script("on", node, "kill", f"-{name}", pid)

    def wait_healthy(self) -> None:
        """Wait until both nodes can take jobs."""
        wait(self._is_healthy, "both nodes to take jobs")

    def _is_healthy(self) -> bool:
        done = subprocess.run(["bash", str(SCRIPT), "status"], env=self.environment, cwd=ROOT, capture_output=True)
        return done.returncode == 0


def wait(ready: Callable[[], T], what: str, seconds: float = 600, tell: Callable[[], str] = str) -> T:
    """Poll until `ready` gives something true; fails with `tell` after `seconds`, more than any busy machine needs."""
    deadline = time.monotonic() + seconds
    while not (result := ready()):
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds:.0f} s for {what}\n{tell()}")
        time.sleep(0.3)
    return result


def steps_done(folder: Path) -> int:
    """The newest step in a run's metrics.jsonl."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return max((json.loads(line)["step"] for line in lines), default=0)
    except (OSError, ValueError):  # not yet there, or caught in the middle of a line
        return 0


@contextlib.contextmanager
def standing(suffix: str = "", **settings: str) -> Iterator[Lab]:
    """A cluster for the time of the block, with settings of slurm-up.sh; its logs stay in /run until the next one."""
    # Of a file of tests that runs beside another (-n): a cluster of its own.
    place = f"{ROOT}{os.environ.get('PYTEST_XDIST_WORKER', '')}"
    name = os.environ.get("SLURM_LAB_NAME") or f"msm{zlib.crc32(place.encode()) % 10**6}"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
    # The nodes' GPUs are none.
    ours = {"PATH": path, "SLURM_LAB_NAME": name + suffix, "OMP_NUM_THREADS": "1", "MSM_DIST_DEVICE": "cpu"}
    cluster = Lab(os.environ | ours | settings)
    # Another test session of this clone may have one up.
    with open(f"/run/lock/{name}{suffix}.tests", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            cluster.script("up", timeout=600)
            yield cluster
        finally:
            cluster.script("down", timeout=300)


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """A cluster for the whole test session; nothing of it is left running."""
    with standing() as cluster:
        yield cluster
