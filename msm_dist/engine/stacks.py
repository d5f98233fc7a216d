"""Where a process is: the Python stacks of its threads, and of its loader workers, as text in a file.

In: nothing, or a signal. Out: text appended to a file that was opened before anything went wrong. Workers write theirs
when they get STACKS_SIGNAL: they are forked after `telling_stacks` has begun and inherit the handler and its file. A
process that holds Python's lock for ever can't run Python; a thread in C writes for it (`last_resort`).
"""

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

STACKS_SIGNAL = signal.SIGRTMIN + 1
WORKERS_SECONDS = 2.0
QUIET_SECONDS = 0.1
COLLECTIVES = ("torch/distributed/distributed_c10d.py", "deepspeed/comm/", "msm_dist/engine/world.py")
STATES = {
    "D": "in the kernel, most likely in a read or write",
    "R": "running",
    "S": "waiting",
    "T": "stopped by a signal",
    "Z": "ended",
    "t": "stopped by a debugger",
}


@contextlib.contextmanager
def telling_stacks() -> Iterator[int]:
    """Let this process, and those forked from it inside the block, answer STACKS_SIGNAL; the file of the answers."""
    answers = os.memfd_create("stacks")
    faulthandler.register(STACKS_SIGNAL, file=answers, all_threads=True)
    try:
        yield answers
    finally:
        faulthandler.unregister(STACKS_SIGNAL)
        os.close(answers)


def write_stacks(file: int, head: str, answers: int) -> None:
    """Append this process's stacks, and those of its workers that can tell them, to an open file."""
    os.write(file, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {head}\n".encode())
    faulthandler.dump_traceback(file)
    workers = [child.pid for child in multiprocessing.active_children()]
    for worker in workers:
        before = os.fstat(answers).st_size
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, STACKS_SIGNAL)
        deadline = time.monotonic() + WORKERS_SECONDS / max(1, len(workers))
        size = last = before
        # It writes line by line, and nothing tells the last one but that no other follows.
        while (size == before or size != last) and time.monotonic() < deadline:
            time.sleep(QUIET_SECONDS)
            last, size = size, os.fstat(answers).st_size
        os.write(file, f"\nworker {worker}, {state_of(worker)}\n".encode())
        os.write(file, os.pread(answers, size - before, before) or b"  told nothing\n")
    os.write(file, b"\n")


def last_resort(seconds: float, file: int, exits: bool) -> None:
    """In so many seconds write the stacks to `file`, and end this process, whatever it does; until called again."""
    faulthandler.dump_traceback_later(seconds, exit=exits, file=file)


def no_last_resort() -> None:
    """Take the last `last_resort` back."""
    faulthandler.cancel_dump_traceback_later()


def waits_for_others() -> bool:
    """Whether the main thread is in a collective, as far as Python's frames tell."""
    frame = sys._current_frames().get(threading.main_thread().ident)
    while frame is not None:
        code = frame.f_code
        if any(part in code.co_filename for part in COLLECTIVES) or code.co_qualname == "Interruption.agreed":
            return True
        frame = frame.f_back
    return False


def state_of(pid: int) -> str:
    """What the kernel says of a process of this machine."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "ended"
    return STATES.get(letter, f"in state {letter}")
