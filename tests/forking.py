"""Ranks started as forks of one process that has imported everything: a start costs a second instead of five.

`python forking.py` reads a request per line, {"script", "arguments", "environment", "blocked", "output"}, answers with
the pid of the process it has started, and writes that one's return code to <output>.code when it has ended.
"""

import contextlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path


class Forked:
    """A rank, to be used like a Popen."""

    def __init__(self, pid: int, output: Path):
        self.pid = pid
        self.returncode: int | None = None
        self._output = output

    def poll(self) -> int | None:
        code = Path(f"{self._output}.code")
        if self.returncode is None and code.exists():
            self.returncode = int(code.read_text())
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            # The forker has taken its end before it writes the code down.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self) -> tuple[str, None]:
        deadline = time.monotonic() + 600
        while self.poll() is None:
            assert time.monotonic() < deadline, f"process {self.pid} does not end"
            time.sleep(0.01)
        return self._output.read_text(), None


class Forker:
    """The process that forks. To be closed; the ranks end with it."""

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None):
        """`environment` is its own beyond that of this process: what holds from its start on, such as LD_PRELOAD."""
        self._folder = folder
        self._count = 0
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {})
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, command: list[str], environment: dict[str, str], blocked: bool) -> Forked:
        """`python COMMAND`, with USR1 and USR2 blocked as by `env --block-signal`."""
        self._count += 1
        output = self._folder / f"output-{self._count}"
        request = {
            "command": command,
            "environment": environment,
            "blocked": [signal.SIGUSR1, signal.SIGUSR2] if blocked else [],
            "output": str(output),
        }
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return Forked(int(self._process.stdout.readline()), output)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports have to say
    import msm_dist.pretrain  # noqa: F401

    outputs: dict[int, str] = {}
    while True:
        if select.select([0], [], [], 0.02)[0]:
            line = read_line()
            if not line:
                break
            request = json.loads(line)
            pid = os.fork()
            if not pid:
                become(request)
            outputs[pid] = request["output"]
            print(pid, file=answers, flush=True)
        for pid in list(outputs):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                path = Path(f"{outputs.pop(pid)}.code")
                path.with_suffix(".new").write_text(str(os.waitstatus_to_exitcode(status)))
                path.with_suffix(".new").rename(path)
    for pid in outputs:
        os.kill(pid, signal.SIGKILL)


def read_line() -> bytes:
    """Without a buffer, as select looks at the descriptor."""
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(0, 1)):
        line += byte
    return line


def become(request: dict) -> None:
    """Be that process, to its end."""
    signal.pthread_sigmask(signal.SIG_BLOCK, request["blocked"])
    os.environ.clear()
    os.environ.update(request["environment"])
    descriptor = os.open(request["output"], os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = request["command"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.exit()


if __name__ == "__main__":
    serve()
