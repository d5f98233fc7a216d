"""Starting ranks and commands as real processes, for tests."""

import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent


_held: deque[socket.socket] = deque(maxlen=100)


def free_port() -> int:
    """A port that nobody else is given while it waits for who is started with it: a start takes seconds.

    It stays bound, by a socket that doesn't listen. Another one may still bind it by name where both allow addresses to
    be used again, as torch's store and Python's servers do; the kernel gives it to none that asks for any port.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("", 0))
    _held.append(holder)
    return holder.getsockname()[1]


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:  # gone before it was opened, or between that and the read
        return False


def rank_environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What a launcher sets for a rank, one thread each."""
    return os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def start_ranks(command: Sequence[str], size: int, **options: object) -> list[subprocess.Popen[str]]:
    """`python COMMAND` once per rank."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=rank_environment(rank, size, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **options,
        )
        for rank in range(size)
    ]


def run_ranks(command: Sequence[str], size: int, timeout: float = 600) -> list[str]:
    """Run all ranks to the end; their outputs. Fails with the output of a rank that fails."""
    processes = start_ranks(command, size)
    try:
        # All at once: a rank whose full pipe nobody reads would hold up the others.
        with ThreadPoolExecutor(size) as readers:
            outputs = list(readers.map(lambda process: process.communicate(timeout=timeout)[0], processes))
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs
