"""From a signal on any rank to a stop that all ranks make together, after a save.

USR1 and USR2 ask for a requeue (exit code 75); TERM and INT, and the end of the launcher, stop without one.
The same TERM or INT again exits at once; one after the other does not, as a Ctrl-C is followed by the launcher's TERM.
A handler only sets a flag: ranks agree on it at a step boundary, one step late, so that no rank ever waits for the
others' hosts.
"""

import contextlib
import ctypes
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

NONE, STOP, REQUEUE, NO_DATA = 0, 1, 2, 3
REQUEUE_EXIT_CODE = 75
REQUEUE_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Not TERM: a launcher that ends sends that too, and it would count as the second.
PARENT_DIED = signal.SIGRTMIN
PR_SET_PDEATHSIG = 1
LAUNCHER_POLL_SECONDS = 0.5


class Interruption:
    """The reason to stop, as this rank heard it and as all ranks agreed."""

    def __init__(self, control: dist.ProcessGroup) -> None:
        self.heard = NONE
        self.signal = 0
        self.stopping = False
        self._control = control
        self._agreed = torch.zeros(1, dtype=torch.int64)
        self._work: dist.Work | None = None

    def hear(self, reason: int, number: int = 0) -> None:
        """Remember a reason; a requeue weighs more than a stop, missing data more than both."""
        if reason > self.heard:
            self.heard, self.signal = reason, number

    def agreed(self) -> int:
        """What any rank had heard at the previous call; to be called by all ranks, once per step."""
        reason = NONE
        if self._work is not None:
            self._work.wait()
            reason = int(self._agreed)
            self.stopping = self.stopping or reason != NONE
        self._agreed = torch.tensor([self.heard])
        self._work = dist.all_reduce(self._agreed, dist.ReduceOp.MAX, group=self._control, async_op=True)
        return reason

    def exit_code(self, reason: int) -> int:
        """75 asks for a requeue; else as a shell reports the signal."""
        return REQUEUE_EXIT_CODE if reason == REQUEUE else 128 + (self.signal or signal.SIGTERM)


@contextlib.contextmanager
def listening(interruption: Interruption, has_launcher: bool) -> Iterator[None]:
    """Turn signals, and the end of the launcher, into `interruption` for the time of the block."""

    received: set[int] = set()

    def on_signal(number: int, frame: object) -> None:
        if number in STOP_SIGNALS and number in received:
            os._exit(128 + number)
        received.add(number)
        interruption.hear(REQUEUE if number in REQUEUE_SIGNALS else STOP, number)

    numbers = (*REQUEUE_SIGNALS, *STOP_SIGNALS, PARENT_DIED)
    before = {number: signal.signal(number, on_signal) for number in numbers}
    if has_launcher:
        watch_launcher()
    try:
        yield
    finally:
        for number, handler in before.items():
            # Ranks that stop together don't exit at once: srun and the launcher send TERM to the last ones, whose exit
            # code must be that of the first.
            ignored = interruption.stopping and number != signal.SIGINT
            signal.signal(number, signal.SIG_IGN if ignored else handler)


def watch_launcher() -> None:
    """Send this process PARENT_DIED when the launcher, or the command that started it, ends."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, PARENT_DIED, 0, 0, 0)
    command = _parent_of(parent)
    if command > 1 and _is_deepspeed_launcher(parent):
        # `deepspeed` runs the launcher as a child, which outlives it; the ranks would train on as orphans.
        threading.Thread(target=_watch, args=(parent, command), daemon=True).start()


def _watch(parent: int, command: int) -> None:
    while _parent_of(parent) == command:
        time.sleep(LAUNCHER_POLL_SECONDS)
    os.kill(os.getpid(), PARENT_DIED)


def _parent_of(pid: int) -> int:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[1])


def _is_deepspeed_launcher(pid: int) -> bool:
    try:
        return b"deepspeed.launcher.launch" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
