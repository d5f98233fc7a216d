"""The end of a run that no longer gets on: every rank's stacks on record, and the ranks that hold it up by name.

In: where each rank's main thread is (`Progress`), told at every part of a step. Out: nothing, as long as that goes on.
Where a rank stands still for SHARE of `engine.timeout_minutes`, `<run>/hang/rank-00001.txt` and so on, one message on
stderr and in `<run>/hang/report.txt`, and exit code 4 on all ranks: a rank that stands still can't be unwound.

Two threads per rank, which no wait of the main thread holds up and which never touch the device: one keeps the time and
ends the process, the other talks to the store of the process group, and may be held up there, as the store lives in
rank 0. The share leaves room to do all of that before torch's own time-out ends the collective the other ranks are in.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch.distributed import Store
from torch.distributed.distributed_c10d import _get_default_store

from msm_dist.engine.stacks import last_resort, no_last_resort, state_of, telling_stacks, waits_for_others, write_stacks
from msm_dist.engine.world import World
from msm_dist.errors import CheckpointError

EXIT_CODE = 4
SHARE = 0.75
"""Of engine.timeout_minutes, without progress."""
POLLS, ANSWERS = 40, 8
"""Looks in that time, and the part of it that ranks have to answer."""
POLL_SECONDS, ANSWER_SECONDS = 10.0, 60.0
ENDING_SECONDS = 2.0
KEY = "msm_dist/hang"
RANKS_NAMED = 8


class Progress:
    """Where the main thread is: the step, how many of its parts have begun, and the name of the last one."""

    def __init__(self, step: int = 0) -> None:
        self.step, self.count, self.place = step, 0, "start"

    def at(self, step: int, place: str) -> None:
        """Say that a part of a step begins, the same on all ranks; takes no lock and no time."""
        self.count = self.count + 1 if step == self.step else 1
        self.step, self.place = step, place


@dataclass(frozen=True)
class Position:
    """Where a rank was last heard of."""

    step: int
    count: int
    place: str
    host: str
    pid: int
    waits: bool = False
    """Whether it waits for other ranks."""
    answers: bool = False
    """Whether it said so when it was asked."""


class Idleness:
    """Seconds without progress, as its own calls see them: a process that was stopped and goes on is not idle."""

    def __init__(self, poll: float) -> None:
        self._longest = 2 * poll
        self._seen: tuple[int, int] | None = None
        self._last = self.seconds = 0.0

    def tick(self, step: int, count: int, now: float) -> float:
        """The seconds by now, for a main thread that has begun so many parts of that step."""
        seen = (step, count)
        self.seconds = self.seconds + min(now - self._last, self._longest) if seen == self._seen else 0.0
        self._seen, self._last = seen, now
        return self.seconds


def culprits(positions: Mapping[int, Position]) -> list[int]:
    """The ranks that hold up the others: those that don't answer; else those behind; of them those that don't wait."""
    silent = [rank for rank, position in positions.items() if not position.answers]
    if silent:
        return silent
    least = min((position.step, position.count) for position in positions.values())
    behind = [rank for rank, position in positions.items() if (position.step, position.count) == least]
    return [rank for rank in behind if not positions[rank].waits] or behind


def report(positions: Mapping[int, Position], seconds: float, place: str) -> str:
    """One message for all ranks' positions; `place`: where their stacks are."""
    named = culprits(positions)
    told = "; ".join(_describe(rank, positions[rank]) for rank in named[:RANKS_NAMED])
    more = f" and {len(named) - RANKS_NAMED} more" if len(named) > RANKS_NAMED else ""
    rest = [rank for rank in positions if rank not in named]
    others = ""
    if rest:
        first = positions[rest[0]]
        others = f" Of the other {len(rest)}, rank {rest[0]} is at step {first.step} ({first.place})."
    return (
        f"msm-dist: no progress for {seconds:.0f} s ({SHARE:g} of engine.timeout_minutes). Held up by {told}{more}."
        f"{others} Stacks of every rank that could write them are {place}. The run ends; its newest checkpoint is "
        "untouched, and the same command continues from it"
    )


@contextlib.contextmanager
def watching(progress: Progress, world: World, timeout_minutes: float) -> Iterator["Watch"]:
    """End this process, and those of all other ranks, when inside the block one of them stands still; a collective."""
    with telling_stacks() as answers:
        watch = Watch(progress, world, answers, SHARE * 60 * timeout_minutes)
        try:
            yield watch
        finally:
            watch.stop()


class Watch:
    """One rank's two threads. What they have to tell goes to stderr, and to a folder once there is one."""

    def __init__(self, progress: Progress, world: World, answers: int, limit: float) -> None:
        self._progress, self._world, self._answers, self._limit = progress, world, answers, limit
        self._file, self._path = 2, None
        self._poll, self._patience = min(POLL_SECONDS, limit / POLLS), min(ANSWER_SECONDS, limit / ANSWERS)
        self._idleness = Idleness(self._poll)
        self._stuck, self._written, self._conferred = threading.Event(), threading.Event(), threading.Event()
        self._wake = threading.Event()
        """Set for the end of the threads, and where the run is stuck."""
        self._host = socket.gethostname()
        # A connection of its own: nobody else's wait holds it.
        self._store: Store = _get_default_store().clone()
        # Before the first part of a step: of a rank that stops a moment later, something is known.
        self._store.set(f"{KEY}/at/{world.rank}", self._position())
        self._clock = threading.Thread(target=self._keep_time, name="hang clock", daemon=True)
        self._talk = threading.Thread(target=self._keep_in_touch, name="hang talk", daemon=True)
        self._clock.start()
        self._talk.start()

    def record_in(self, folder: Path) -> None:
        """From now on stacks and report are to be files in `folder`; a collective.

        Raises CheckpointError where a rank can't write there.
        """
        path = folder / f"rank-{self._world.rank:05d}.txt"
        self._file = self._world.together(lambda: _open(path), CheckpointError)
        self._path = path

    def stop(self) -> None:
        """End the threads; where the run is being ended already, wait for that."""
        self._wake.set()
        self._clock.join()
        no_last_resort()
        self._talk.join(ENDING_SECONDS)
        if self._path is None:
            return
        os.close(self._file)
        # Nothing to tell: no trace is left.
        with contextlib.suppress(OSError):
            if self._path.stat().st_size == 0:
                self._path.unlink()
                self._path.parent.rmdir()

    def _keep_time(self) -> None:
        while not self._stuck.is_set():
            # One process that is stopped and goes on has nobody who gave it up: it is not ended for that.
            last_resort(self._limit + 2 * self._patience, self._file, exits=self._world.size > 1)
            if self._idleness.tick(self._progress.step, self._progress.count, time.monotonic()) >= self._limit:
                self._stuck.set()
            elif self._wake.wait(self._poll) and not self._stuck.is_set():
                return
        self._wake.set()
        head = f"rank {self._world.rank} ({self._host}, process {os.getpid()}) {self._where()}"
        # A file system that hangs is a cause too, and must not hold this up.
        _within(self._patience, lambda: write_stacks(self._file, head, self._answers))
        self._written.set()
        if not self._conferred.wait(2 * self._patience):
            self._say(
                f"msm-dist: no progress for {self._limit:.0f} s. Held up by rank 0, it seems: the store of the process "
                f"group, which is there, does not answer rank {self._world.rank} {self._where()}. Stacks are "
                f"{self._place}. The run ends; the same command continues from the newest checkpoint"
            )
        os._exit(EXIT_CODE)

    def _keep_in_touch(self) -> None:
        try:
            while not self._wake.wait(self._poll):
                self._store.set(f"{KEY}/at/{self._world.rank}", self._position())
                if self._store.check([f"{KEY}/stuck"]):
                    self._stuck.set()
                    self._wake.set()
            if self._stuck.is_set():
                self._confer()
                self._conferred.set()
        except RuntimeError:
            # Rank 0, where the store is, has ended; where the run is stuck it does that when all is said.
            if self._stuck.is_set():
                self._conferred.set()

    def _confer(self) -> None:
        """Tell all ranks that the run ends, hear where they are, and say it once for all."""
        world, store = self._world, self._store
        store.set(f"{KEY}/stuck", "")
        # The message says where stacks are: they come first, unless a file system hangs.
        self._written.wait(self._patience / 2)
        store.set(f"{KEY}/at/{world.rank}", self._position(answers=True, waits=waits_for_others()))
        deadline = time.monotonic() + self._patience

        def said() -> bool:
            return store.check([f"{KEY}/said"])

        # Rank 0 speaks, or one of the others where it does not.
        if world.is_main:
            self._until(deadline, lambda: all(position.answers for position in self._positions().values()))
        elif self._until(deadline + self._patience / 2, said) or store.add(f"{KEY}/speakers", 1) > 1:
            self._until(deadline + self._patience, said)
            store.add(f"{KEY}/heard", 1)
            return
        positions = self._positions()
        self._say(report(positions, self._idleness.seconds, self._place))
        store.set(f"{KEY}/said", "")
        # The store ends with rank 0, and others may be in a call of it.
        hearing = sum(position.answers for position in positions.values()) - 1
        self._until(deadline + self._patience / 2, lambda: store.add(f"{KEY}/heard", 0) >= hearing)
        time.sleep(self._poll)

    def _until(self, deadline: float, condition: Callable[[], bool]) -> bool:
        while not (met := condition()) and time.monotonic() < deadline:
            time.sleep(self._poll / 4)
        return met

    def _positions(self) -> dict[int, Position]:
        """Every rank's last position."""
        keys = [f"{KEY}/at/{rank}" for rank in range(self._world.size)]
        unheard = Position(0, 0, "start", "", 0)
        return {
            rank: Position(**json.loads(self._store.get(key))) if self._store.check([key]) else unheard
            for rank, key in enumerate(keys)
        }

    def _position(self, answers: bool = False, waits: bool = False) -> str:
        here = self._progress
        position = Position(here.step, here.count, here.place, self._host, os.getpid(), waits, answers)
        return json.dumps(vars(position))

    @property
    def _place(self) -> str:
        """Of the stacks."""
        return f"in {self._path.parent}" if self._path else "above, on stderr"

    def _where(self) -> str:
        return f"at step {self._progress.step} ({self._progress.place})"

    def _say(self, message: str) -> None:
        # Not by sys.stderr, whose lock the main thread may hold.
        os.write(2, f"{message}\n".encode())
        if self._path is not None:
            with contextlib.suppress(OSError):
                (self._path.parent / "report.txt").write_text(f"{message}\n", encoding="utf-8")


def _describe(rank: int, position: Position) -> str:
    if not position.pid:
        return f"rank {rank}, which was never heard of"
    who, where = f"rank {rank} ({position.host}, process {position.pid})", f"at step {position.step} ({position.place})"
    if position.answers:
        return f"{who} {where}"
    cause = "stopped, or in a call that holds Python's lock, or its machine is gone"
    if position.host == socket.gethostname():
        cause = f"{state_of(position.pid)}, or in a call that holds Python's lock"
    return f"{who}, which does not answer ({cause}), last heard of {where}"


def _open(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        raise CheckpointError(f"{path}: can't be written ({error.strerror}); give write access") from None


def _within(seconds: float, action: Callable[[], None]) -> None:
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(seconds)
