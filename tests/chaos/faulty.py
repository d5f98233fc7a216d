"""The driver's side of faulty.c: builds it, and says what it does, at once and in all processes that have it loaded.

In: rules (which calls, on which files, what happens) and a shift of the clock. Out: the environment of a program that
is to meet them. Fails with subprocess.CalledProcessError where there is no C compiler (CC, or `cc`).
"""

import ctypes
import mmap
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("faulty.c")
WRITE, SYNC, RENAME = 1, 2, 4
FAIL, DELAY, PAUSE = 1, 2, 3
NUM_RULES = 8
ANY_RANK = -1


class _Rule(ctypes.Structure):
    _fields_ = [
        ("active", ctypes.c_int32),
        ("hits", ctypes.c_int32),
        ("calls", ctypes.c_int32),
        ("action", ctypes.c_int32),
        ("error", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("passed", ctypes.c_int32),
        ("turn", ctypes.c_int32),
        ("nanoseconds", ctypes.c_int64),
        ("path", ctypes.c_char * 224),
        ("content", ctypes.c_char * 32),
    ]


class _Control(ctypes.Structure):
    _fields_ = [("clock_shift", ctypes.c_int64), ("rules", _Rule * NUM_RULES)]


@dataclass(frozen=True)
class Where:
    """Calls that a rule is for: WRITE | SYNC | RENAME, pattern of the path, content written, rank, and `passed`,
    how many of them it is not for."""

    calls: int
    path: str
    content: str = ""
    rank: int = ANY_RANK
    passed: int = 0


class Hold:
    """A rule by which processes wait."""

    def __init__(self, rule: _Rule) -> None:
        self._rule = rule

    def is_reached(self, processes: int = 1) -> bool:
        """Whether so many wait."""
        return self._rule.hits >= self._rule.passed + processes

    def let_go(self) -> None:
        """Let them go on."""
        self._rule.active = 0


class Faulty:
    """What the library does, in every process that is started with `environment`."""

    def __init__(self, folder: Path) -> None:
        """Build the library and its control file in `folder`."""
        library, control = folder / "faulty.so", folder / "faulty.control"
        compiler = os.environ.get("CC", "cc").split()
        subprocess.run([*compiler, "-Wall", "-O2", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"], check=True)
        control.write_bytes(bytes(ctypes.sizeof(_Control)))
        with control.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)
        self._control = _Control.from_buffer(self._memory)
        self.environment = {"LD_PRELOAD": str(library), "CHAOS_CONTROL": str(control)}

    def fail(self, where: Where, error: int) -> None:
        """Let those calls fail with an errno; the first write takes half of its bytes."""
        self._add(where, FAIL, error=error)

    def delay(self, where: Where, seconds: float) -> None:
        """Let those calls take longer."""
        self._add(where, DELAY, nanoseconds=int(seconds * 1e9))

    def pause(self, where: Where) -> Hold:
        """Let those calls wait until they are let go."""
        return Hold(self._add(where, PAUSE))

    def shift_clock(self, seconds: float) -> None:
        """Set the clock of the day so far off."""
        self._control.clock_shift = int(seconds * 1e9)

    def clear(self) -> None:
        """No rule, and the true clock."""
        for rule in self._control.rules:
            rule.active = 0
        self.shift_clock(0)

    def _add(self, where: Where, action: int, error: int = 0, nanoseconds: int = 0) -> _Rule:
        rule = next(rule for rule in self._control.rules if not rule.active)
        rule.turn += 1
        rule.hits, rule.calls, rule.action, rule.error = 0, where.calls, action, error
        rule.nanoseconds, rule.rank, rule.passed = nanoseconds, where.rank, where.passed
        rule.path, rule.content = where.path.encode(), where.content.encode()
        rule.active = 1  # last: from now on it holds
        return rule
