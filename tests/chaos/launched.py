"""Processes that the run starts itself: those below a launcher, and the loader workers of a rank, as /proc shows them.

In: a command, or a pid. Out: a `Launcher` that is used like a Popen, and pids; what has ended meanwhile is left out.
"""

import os
import signal
import subprocess
from pathlib import Path

from tests.processes import HERE, is_alive


class Launcher:
    """A command that starts the ranks itself, to be used like a Popen."""

    def __init__(self, command: list[str], log: Path, environment: dict[str, str]) -> None:
        self._log = log
        with log.open("w") as file:
            self._process = subprocess.Popen(
                command,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=HERE.parent,
            )
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    def poll(self) -> int | None:
        return self._process.poll()

    def kill(self) -> None:
        """It, and all that it has started."""
        for pid in [*descendants(self.pid), self.pid]:
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)

    def communicate(self) -> tuple[str, None]:
        self._process.wait()
        return self._log.read_text(), None


def workers_of(rank: int) -> list[int]:
    """Loader workers of a rank: what it has forked."""
    return [pid for pid in children(rank) if command_of(pid) == command_of(rank)]


def descendants(pid: int) -> list[int]:
    return [found for child in children(pid) for found in (child, *descendants(child))]


def children(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        if int(fields[1]) == pid:
            found.append(int(path.parent.name))
    return found


def command_of(pid: int) -> str:
    """Its command line, empty once it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
