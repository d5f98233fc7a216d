"""How benchmarks/data.py takes its numbers: stages of a reader, rates and memory of a loader, bytes that are read."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks.data_readers import BLOCK, FRAMES, Running, reader_of
from benchmarks.measure import ROOT
from msm_dist.data import crops as crops_module
from msm_dist.data.crops import CropReader
from msm_dist.data.index import load_index, members
from msm_dist.data.view import View

CROP_SECONDS = FRAMES / 100
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


class Size(NamedTuple):
    """How much is measured: clips, seconds per turn, turns, crops per batch."""

    clips: int
    seconds: float
    turns: int
    batch: int


class Rate(NamedTuple):
    """What one loader reached; MB per worker (proportional and unique set size) where it has some."""

    wall: float
    cpu: float
    first_batch_seconds: float
    pss: float | None = None
    uss: float | None = None


def stage_times(reader: CropReader, size: Size) -> dict[str, float]:
    """Microseconds of processor time per crop of plan, read (finding the bytes), decode (or copy), the rest.

    And crops/s, of a processor that does nothing else.
    """
    spent = dict.fromkeys(("plan", "read", "decode or copy"), 0.0)

    def timed(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            result = function(*args, **kwargs)
            spent[stage] += time.process_time() - start
            return result

        return call

    each = size.batch // BLOCK
    reader.blocks(range(each))
    plain = repeated(lambda turn: reader.blocks(range(turn * each, (turn + 1) * each)), size.seconds)
    store, plan = reader._store, reader._source.plan
    with contextlib.ExitStack() as patches:
        for stage, owner, name in (
            ("read", store, "fetch"),
            ("decode or copy", crops_module, "decode_crops"),
            ("decode or copy", crops_module, "fill_crop"),
        ):
            patches.enter_context(replaced(owner, name, timed(stage, getattr(owner, name))))
        numbers = timed("plan", type(plan).block_samples)
        patches.enter_context(replaced(type(plan), "block_samples", lambda *args: numbers(*args)))
        total = repeated(lambda turn: reader.blocks(range(turn * each, (turn + 1) * each)), size.seconds)
    turns, seconds = total
    num_crops = turns * each * BLOCK
    parts = {stage: 1e6 * value / num_crops for stage, value in spent.items()}
    rest = 1e6 * seconds / num_crops - sum(parts.values())
    return {**parts, "find, collate": rest, "crops/s": plain[0] * each * BLOCK / plain[1]}


def bytes_read(folder: Path) -> tuple[float, float]:
    """What the decoder reads for a crop: over the crop's share of the clip's bytes, and over all of them."""
    index = load_index(str(folder))
    reader, read, num_crops = reader_of(folder), 0, 0

    def counting(view: View, buffer: Any) -> int:
        nonlocal read
        count = readinto(view, buffer)
        read += count
        return count

    readinto = View.readinto
    with replaced(View, "readinto", counting):
        for number in range(8):
            num_crops += len(reader.blocks([number]).keys)
    encoded = sum(int(members(shard)["size"].sum()) for shard in index.shards) / index.num_clips
    share = CROP_SECONDS / 10
    return read / num_crops / (encoded * share), read / num_crops / encoded


def loader_rate(start: Callable[[], Any], seconds: float, num_crops: int | None = None) -> Rate:
    """Crops per second of a loader after its first batches, or with `num_crops` of so many from the first on."""
    begun = time.perf_counter()
    with start() as running:
        first = next(running.batches)
        first_seconds = time.perf_counter() - begun
        if num_crops is None:
            for _ in range(4 * max(1, len(running.worker_pids))):
                next(running.batches)
            count, before = 0, (time.perf_counter(), processor_seconds(running))
            while time.perf_counter() - before[0] < seconds:
                count += len(next(running.batches))
        else:
            count, before = len(first), (begun, 0.0)
            while count < num_crops:
                count += len(next(running.batches))
        wall = time.perf_counter() - before[0]
        cpu = processor_seconds(running) - before[1]
        memory = [memory_of(pid) for pid in running.worker_pids]
    pss, uss = (tuple(map(median, zip(*memory, strict=True)))) if memory else (None, None)
    return Rate(count / wall, count / cpu if num_crops is None else float("nan"), first_seconds, pss, uss)


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The URL of a folder."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "tests.http_server", str(folder), str(port)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as server:
        try:
            wait_for(port, server)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.kill()


def wait_for(port: int, server: subprocess.Popen) -> None:
    """Until the server listens."""
    deadline = time.monotonic() + 20
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def repeated(function: Callable[[int], Any], seconds: float) -> tuple[int, float]:
    """How often a function ran in `seconds`, and in how many seconds of processor time."""
    end, start, turns = time.perf_counter() + seconds, time.process_time(), 0
    while time.perf_counter() < end:
        function(turns)
        turns += 1
    return turns, time.process_time() - start


@contextmanager
def quiet_decoders() -> Iterator[None]:
    """Inside, nothing arrives on stderr: libmpg123 complains of each MP3 that it does not begin at its start."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, an attribute has another value."""
    original = owner.__dict__[name] if isinstance(owner, type) else getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def processor_seconds(running: Running) -> float:
    """Of this process and the workers, so far."""
    total = time.process_time()
    for pid in running.worker_pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / CLOCK_TICKS
    return total


def memory_of(pid: int) -> tuple[float, float]:
    """PSS and USS of a process in MB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return kib["Pss"] / 1e3, (kib["Private_Clean"] + kib["Private_Dirty"]) / 1e3
