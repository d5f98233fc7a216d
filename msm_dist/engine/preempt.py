"""From a signal on any rank to a stop that all ranks make together, after a save.

USR1 and USR2 ask for a requeue (exit code 75); TERM, INT, the HUP of a closed terminal (unless nohup has it ignored)
and the end of the launcher stop without one.
The same stop again, a second later, exits at once; one after the other does not, as a Ctrl-C is followed by the
launcher's TERM.
A signal only sets a flag: ranks agree on it at a step boundary, one step late, so that no rank ever waits for the
others' hosts. Python runs no handler while its main thread is in a collective, as it is when another rank's data is
late. So a thread is told of each signal too; it ends the process at the second TERM, and tells the store of the process
group, where a rank asks that waits for data (`Interruption.heard_anywhere`).
"""

import contextlib
import ctypes
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

NONE, STOP, REQUEUE, NO_DATA = 0, 1, 2, 3
REQUEUE_EXIT_CODE = 75
REQUEUE_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Not TERM: a launcher that ends sends that too, and it would count as the second.
PARENT_DIED = signal.SIGRTMIN
PR_SET_PDEATHSIG = 1
LAUNCHER_POLL_SECONDS = 0.5
HEARD = "msm_dist/heard"  # in the store of the process group, by reason: the signal
ENDING_SECONDS = 2.0
SECOND_SECONDS = 1.0
"""A stop within this of the first is the same one: at a time limit Slurm sends TERM twice, a millisecond apart."""


class Interruption:
    """The reason to stop, as this rank heard it and as all ranks agreed."""

    def __init__(self, control: dist.ProcessGroup) -> None:
        self.stopping = False
        # By reason: a handler may come in between any two instructions, and must not be overruled by them.
        self._signals: dict[int, int] = {}
        self._control = control
        # A connection of its own: nobody else's wait holds it.
        self._store = _get_default_store().clone()
        self._agreed = torch.zeros(1, dtype=torch.int64)
        self._work: dist.Work | None = None

    @property
    def heard(self) -> int:
        """The reason that weighs most: missing data more than a requeue, that more than a stop."""
        return max(self._signals, default=NONE)

    def hear(self, reason: int, number: int = 0) -> None:
        """Remember a reason."""
        self._signals.setdefault(reason, number)

    def tell(self, reason: int, number: int = 0) -> None:
        """Let ranks know whose read is late, whatever the main threads of the others wait for."""
        # With the host of the store the run has ended.
        with contextlib.suppress(RuntimeError):
            self._store.set(f"{HEARD}/{reason}", str(number))

    def heard_anywhere(self) -> bool:
        """Whether this or another rank has heard a reason, which is then this rank's too. Waits for the store only."""
        for reason in (STOP, REQUEUE, NO_DATA):
            if reason > self.heard and self._store.check([key := f"{HEARD}/{reason}"]):
                self.hear(reason, int(self._store.get(key)))
        return self.heard != NONE

    def agreed(self) -> int:
        """What any rank had heard at the previous call; to be called by all ranks, before the first step and in each.

        A rank that has heard a reason before its call needs data for one step more, none before the first.
        """
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
        return REQUEUE_EXIT_CODE if reason == REQUEUE else 128 + self._signals.get(STOP, signal.SIGTERM)


@contextlib.contextmanager
def listening(interruption: Interruption) -> Iterator[None]:
    """Turn signals, and the end of the launcher, into `interruption` for the time of the block.

    USR1 and USR2 that were blocked when this process started, and have waited, are heard at once.
    """

    def on_signal(number: int, frame: object) -> None:
        interruption.hear(_reason(number), number)

    numbers = [*REQUEUE_SIGNALS, *STOP_SIGNALS, PARENT_DIED]
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        numbers.remove(signal.SIGHUP)
    with _told_beside(interruption):
        before = {number: signal.signal(number, on_signal) for number in numbers}
        mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, REQUEUE_SIGNALS)
        try:
            yield
        except BaseException:
            interruption.stopping = True
            raise
        finally:
            # First, so that what was to wait at the start does not end this process now.
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            for number, handler in before.items():
                # Ranks that stop or fail together don't exit at once: srun and the launcher send TERM to the last ones,
                # whose exit code must be that of the first.
                ignored = interruption.stopping and number != signal.SIGINT
                # Nor is a requeue asked of a run that has ended a reason to die with another code than it ended with.
                ignored = ignored or (number in REQUEUE_SIGNALS and handler == signal.SIG_DFL)
                signal.signal(number, signal.SIG_IGN if ignored else handler)


@contextlib.contextmanager
def _told_beside(interruption: Interruption) -> Iterator[None]:
    """A thread that hears of every signal at once, also while the main thread is in a call that takes for ever."""
    sender, receiver = socket.socketpair()
    sender.setblocking(False)
    thread = threading.Thread(target=_hear_beside, args=(receiver, interruption), daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        # Closing it would not do: a forked process may hold it too.
        sender.shutdown(socket.SHUT_RDWR)
        thread.join(ENDING_SECONDS)
        sender.close()
        receiver.close()


def _hear_beside(receiver: socket.socket, interruption: Interruption) -> None:
    """Until the other end is shut: a byte is the number of a signal."""
    received: dict[int, float] = {}
    told = NONE
    while numbers := receiver.recv(1):
        number = numbers[0]
        if number not in (*REQUEUE_SIGNALS, *STOP_SIGNALS, PARENT_DIED):
            continue  # every signal that Python handles comes here, such as a CONT that others listen to
        since = time.monotonic() - received.get(number, time.monotonic())
        if number in STOP_SIGNALS and since >= SECOND_SECONDS:
            os._exit(128 + number)
        if (reason := _reason(number)) > told:
            interruption.tell(reason, number)
            told = reason
        # From here on: one that came while others were told, which can take seconds, was not waited for.
        received.setdefault(number, time.monotonic())


def _reason(number: int) -> int:
    return REQUEUE if number in REQUEUE_SIGNALS else STOP


def watch_launcher() -> None:
    """Send this process PARENT_DIED when the launcher, or the command that started it, ends or has ended.

    That ends a process which does not listen yet.
    """
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, PARENT_DIED, 0, 0, 0)
    if not _is_deepspeed_launcher(parent):
        return
    # `deepspeed` runs the launcher as a child, which outlives it; the ranks would train on as orphans.
    command = _parent_of(parent)
    if command == 1 and not _mentions(1, b"deepspeed"):
        os.kill(os.getpid(), PARENT_DIED)  # it ended while this process started
    elif command > 0:
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
    return _mentions(pid, b"deepspeed.launcher.launch")


def _mentions(pid: int, word: bytes) -> bool:
    """Whether a process's command line has this in it."""
    try:
        return word in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
