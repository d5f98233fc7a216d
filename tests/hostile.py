"""Runs a command of ours on hostile input in a process of its own, whose memory is bounded and measured.

In: a function of msm_dist or of a test module, its arguments, the memory that it may take beside what the process has
already. Out: an `Outcome`. A server that has the modules loaded is forked for each call, as their import takes seconds.
"""

import multiprocessing
import os
import resource
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from msm_dist.config import Features, batch_layout, parse_config
from msm_dist.corpus import open_corpus
from msm_dist.data.audio import AudioInfo, decode, probe, to_int16
from msm_dist.data.index import load_index, members
from msm_dist.data.inspect import find_clip, inspect_clip
from msm_dist.data.shards import index_shards
from msm_dist.data.tar_members import tar_members
from msm_dist.errors import MsmError
from msm_dist.evaluate.encoder import Encoder

MIB = 2**20
FEW = 64 * MIB
"""What reading a small file may take, with the libraries that it loads on the way."""
PRELOADED = ["tests.hostile", "numpy", "soundfile", "torch", "safetensors.torch", "msm_dist.model.weights"]
PRELOADED += ["msm_dist.data.shards", "msm_dist.data.inspect", "msm_dist.data.verify", "msm_dist.evaluate.encoder"]
SECONDS = 500
"""What loops for ever is killed after so long."""


class Outcome(NamedTuple):
    """How a call ended: `kind` is done, refused (an MsmError), or crashed; `peak` are the bytes that it took."""

    kind: str
    text: str
    peak: int


class Bounded:
    """Calls functions in children, forked from a server."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)

    def __call__(self, function: Callable, *args: Any, extra: int, limit: int | None = None) -> Outcome:
        """Call it with at most `extra` bytes more. `limit`: of address space, where that is wanted to be larger."""
        receiving, sending = self._context.Pipe(duplex=False)
        child = self._context.Process(target=_child, args=(sending, limit or extra, function, args))
        child.start()
        sending.close()
        try:
            ended = receiving.poll(SECONDS)
            outcome = Outcome(*receiving.recv()) if ended else Outcome("crashed", f"no end within {SECONDS} s", 0)
        except EOFError:
            child.join()
            outcome = Outcome("crashed", f"died with exit code {child.exitcode}", 0)
        finally:
            child.kill()
            child.join()
        if outcome.peak > extra:
            took = f"took {outcome.peak / MIB:.0f} MiB more; {extra / MIB:.0f} allowed, {outcome.text}"
            return Outcome("crashed", took, outcome.peak)
        return outcome

    def refused(self, function: Callable, *args: Any, extra: int, limit: int | None = None) -> str:
        """The message of the MsmError that a call must end in."""
        outcome = self(function, *args, extra=extra, limit=limit)
        assert outcome.kind == "refused", outcome.text
        return outcome.text

    def done(self, function: Callable, *args: Any, extra: int, limit: int | None = None) -> str:
        """What a call returned, which must not fail."""
        outcome = self(function, *args, extra=extra, limit=limit)
        assert outcome.kind == "done", outcome.text
        return outcome.text


def index_tar(path: Path) -> None:
    """As `msm-dist data index` does."""
    index_shards([path], Features())


def probe_file(path: Path) -> AudioInfo:
    """As packing and training look at a header."""
    return probe(path.read_bytes())


def decode_file(path: Path) -> int:
    """As `msm-dist data index` decodes a clip."""
    return len(to_int16(decode(path.read_bytes(), 16000)))


def walk_tar(path: Path) -> int:
    """The number of members of a tar."""
    return sum(1 for _ in tar_members(path))


def inspect_first(location: str) -> list[str]:
    """As `msm-dist data inspect FOLDER KEY` does, for the first clip."""
    index = load_index(location)
    key = members(index.shards[0])[0]["key"].decode()
    return inspect_clip(index, find_clip(index, key), Path(location) / "shown", overwrite=True)


def open_run(location: str) -> int:
    """As `msm-dist pretrain` opens its corpus; the number of clips."""
    values = {
        "data": {"shards": location, "num_workers": 0},
        "train": {"steps": 10, "global_batch": 16, "micro_batch": 8},
    }
    cfg = parse_config(values | {"features": {"mean": -7.0, "std": 4.0}}, "test")
    return open_corpus(cfg, batch_layout(cfg, 1)).plan.num_clips


def load_encoder(folder: Path) -> int:
    """As `msm-dist embed` loads weights."""
    return Encoder.load(folder).embedding_size


@contextmanager
def one_thread() -> Iterator[None]:
    """For children: an arena of memory and a thread of OpenMP more would count as the call's."""
    names = ("OMP_NUM_THREADS", "MALLOC_ARENA_MAX")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def _child(sending: Connection, extra: int, function: Callable, args: tuple) -> None:
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - the process ends with it
    limit = _status("VmSize") + extra + 16 * MIB  # beside the heap some address space for stacks and mapped files
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the peak so far
    before = _status("VmRSS")
    try:
        kind, text = "done", repr(function(*args))[:10_000]
    except MsmError as error:
        kind, text = "refused", str(error)
    except BaseException:
        kind, text = "crashed", traceback.format_exc()[-10_000:]
    sending.send((kind, text, max(0, _status("VmHWM") - before)))


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{name}:"))
