"""Random damage, and the watch over what it makes us do: how the files test_hostile_* draw and judge their examples.

The examples are the same at every run. More of them, drawn anew: HYPOTHESIS_PROFILE=fuzz pytest tests/test_hostile_*
"""

import json
import os
import resource
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.font_manager  # noqa: F401 - makes its own folders before writes are watched
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from msm_dist.errors import MsmError
from tests.hostile import MIB

MANY = os.environ.get("HYPOTHESIS_PROFILE") == "fuzz"
MEMORY = 1024 * MIB
"""What the whole process may take beside what it has."""


def fuzzing(examples: int) -> settings:
    return settings(
        max_examples=examples * (50 if MANY else 1),
        derandomize=not MANY,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


# ---- what is watched

RUNS_CODE = {"os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn", "pickle.find_class"}
WRITES = {"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate"}
CONNECTS = {"socket.connect", "socket.bind", "urllib.Request"}
watched: dict[str, Any] = {"folder": None, "seen": []}


def hook(event: str, args: tuple) -> None:
    """Note what an input must not make us do; Python tells its audit hooks of each."""
    folder = watched["folder"]
    if folder is None:
        return
    if event in RUNS_CODE | CONNECTS:
        watched["seen"].append((event, args[:2]))
        return
    is_write = event in WRITES or (event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"))
    if is_write and isinstance(args[0], str | bytes | os.PathLike) and not is_below(os.fsdecode(args[0]), folder):
        watched["seen"].append((event, args[:2]))


def is_below(path: str, folder: str) -> bool:
    return os.path.realpath(path).startswith((folder + os.sep, "/dev/", "/proc/")) or os.path.realpath(path) == folder


sys.addaudithook(hook)


@contextmanager
def watching(folder: Path) -> Iterator[None]:
    limit = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, limit[1]))
    watched.update(folder=os.path.realpath(folder), seen=[])
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        watched["folder"] = None
        resource.setrlimit(resource.RLIMIT_AS, limit)
    assert not watched["seen"]


def survives(folder: Path, *actions: Callable[[], Any]) -> bool:
    """Whether all actions go through; a named error that a terminal can show is as good, anything else is not."""
    whole = True
    with watching(folder):
        for action in actions:
            try:
                action()
            except MsmError as error:
                whole = False
                text = str(error)
                assert text and "\x1b" not in text and "\0" not in text, text
                assert len(text) < 100_000
    return whole


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


# ---- how it is damaged

NUMBERS = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**63, 2**64 - 1]
CHANGES = st.one_of(
    st.tuples(st.just("bit"), st.floats(0, 1), st.integers(0, 7)),
    st.tuples(st.just("byte"), st.floats(0, 1), st.sampled_from(NUMBERS)),
    st.tuples(st.just("word"), st.floats(0, 1), st.sampled_from(NUMBERS)),
    st.tuples(st.just("big word"), st.floats(0, 1), st.sampled_from(NUMBERS)),
    st.tuples(st.just("cut"), st.floats(0, 1), st.integers(1, 64)),
    st.tuples(st.just("insert"), st.floats(0, 1), st.binary(min_size=1, max_size=40)),
    st.tuples(st.just("repeat"), st.floats(0, 1), st.integers(1, 600)),
    st.tuples(st.just("end"), st.floats(0, 1), st.just(0)),
)


def changed(content: bytes, changes: list[tuple[str, float, Any]], reach: int | None = None) -> bytes:
    """Content with damage, at places in its first `reach` bytes."""
    content = bytearray(content)
    for kind, where, value in changes:
        place = int(where * min(len(content), reach or len(content)))
        if kind == "bit" and place < len(content):
            content[place] ^= 1 << value
        elif kind == "byte":
            content[place : place + 1] = bytes([value & 0xFF])
        elif kind in ("word", "big word"):
            width = 8 if value > 2**32 else 4
            content[place : place + width] = value.to_bytes(8, "little" if kind == "word" else "big")[:width]
        elif kind == "cut":
            del content[place : place + value]
        elif kind == "insert":
            content[place:place] = value
        elif kind == "repeat":
            content[place:place] = content[place : place + value]
        elif kind == "end":
            del content[place:]
    return bytes(content)


DAMAGE = st.lists(CHANGES, min_size=1, max_size=4)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, -1, 2**31, 2**40, 2**53, 2**63, 10**30, 10**400, float("nan"), float("inf"), -0.0, 1e308]),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(
        ["", "..", "../x", "/etc/passwd", "a\0b", "\x1b[2J", "x" * 5000, "1e999", "0x" + "f" * 5000, "\ud800"]
    ),
)
VALUES = st.recursive(
    LEAVES, lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=6), part, max_size=3)
)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Where in nested values something stands."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, child in children for place in places(child, (*path, key)))]


@st.composite
def altered(draw, value: Any) -> Any:
    """Nested values with one to three of them replaced, left out or added."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(value)))
        new = draw(VALUES)
        if not path:
            if draw(st.integers(0, 19)) == 0:
                return new
            continue
        part = value
        for key in path[:-1]:
            part = part[key]
        action = draw(st.sampled_from(["replace", "replace", "replace", "drop", "rename"]))
        if action == "replace" or isinstance(part, list):
            part[path[-1]] = new
        elif action == "drop":
            del part[path[-1]]
        else:
            part[draw(st.text(max_size=8))] = part.pop(path[-1])
    return value


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()
