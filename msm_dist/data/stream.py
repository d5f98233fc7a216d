"""The stream: follows the plan in worker processes and hands one rank its batches, in the plan's order.

In: plan, index, front end, the batch layout, a rank and the first step. Out: an endless iterator of `Batch`
whose order depends on no timing. Fails with DataError (see crops.py, and a worker that died), raised in the
training process whichever process met it.

    training process   Loader <- DataLoader <- workers 0, 1, ... K-1 in turn
    worker             numbers of blocks -> crops read, decoded, filled in -> Batch    (webdataset stages)
"""

import atexit
import ctypes
import hashlib
import itertools
import logging
import multiprocessing.util
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from multiprocessing import connection
from types import TracebackType
from typing import Any

import numpy as np
import torch
import webdataset
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from msm_dist.config import BatchLayout, Data, Features
from msm_dist.data.crops import CropReader, Source, no_crop
from msm_dist.data.index import Index
from msm_dist.data.plan import Plan, check_lanes, micro_batch_blocks
from msm_dist.data.storage import Stamp, access_of
from msm_dist.errors import DataError, MsmError

PREFETCHED_BATCHES = 3  # per worker
WORKER_IGNORES = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PR_SET_PDEATHSIG = 1
KILL_SECONDS = 5.0
LATE_SECONDS = 1.0
ORPHAN_SECONDS = 5.0
"""In which a worker is ended whose training process was: between that one's files and its children a machine that swaps
can be seconds."""
LATE = "DataLoader timed out"  # how DataLoader's RuntimeError begins; the batch can be asked for again

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """A micro-batch of B crops: whole blocks, in ascending order of their numbers."""

    crops: torch.Tensor
    """int16 [B, features.crop_samples(crop_frames)] of audio, full scale is 2**15; or uint8 [B, crop_frames, n_mels] of
    stored log-mel (features.quantize)."""
    sample_ids: torch.Tensor
    """int64 [B, 3]: epoch, clip, crop."""
    blocks: torch.Tensor
    """int64 [B]: global number of each crop's block."""
    offsets: torch.Tensor
    """int64 [B]: first frame of each crop in its clip."""
    keys: list[str]
    """Key of each crop's clip in its shard."""
    num_bad: int
    """Crops that stand in for clips that can't be decoded."""
    num_missing: int
    """Crops that stand in for clips of missing shards."""

    def pin_memory(self) -> "Batch":
        """The same with its tensors where a GPU can fetch them while it computes; called by DataLoader."""
        return replace(self, crops=self.crops.pin_memory(), sample_ids=self.sample_ids.pin_memory())

    def __reduce__(self) -> tuple[Any, ...]:
        # Each tensor that leaves a worker takes a file and a connection, which is worth it for the crops only.
        parts = [getattr(self, part.name) for part in fields(self)]
        return _batch, (parts[0], *(part.numpy() if torch.is_tensor(part) else part for part in parts[1:]))


def _batch(crops: torch.Tensor, *small: Any) -> Batch:
    return Batch(crops, *(torch.from_numpy(part) if isinstance(part, np.ndarray) else part for part in small))


class Loader:
    """Endless iterator over one rank's batches. To be closed: its workers ignore SIGTERM.

    While a worker lets it wait, it calls `while_late` every LATE_SECONDS, which may raise to give up that batch.
    """

    def __init__(
        self,
        batches: Iterator[Batch | MsmError],
        workers: list[multiprocessing.Process],
        helpers: list[threading.Thread],
        while_late: Callable[[], None],
    ):
        self._batches = batches
        self._workers = workers
        self._helpers = helpers
        self._while_late = while_late
        # Else multiprocessing would wait at exit for workers that never end.
        atexit.register(self.close)

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.pid for worker in self._workers]

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        """The next batch. Raises the MsmError that a worker met, DataError if a worker died."""
        while (item := self._received()) is None:
            self._while_late()
        if isinstance(item, MsmError):
            raise item
        return item

    def _received(self) -> Batch | MsmError | None:
        """The next item; None where it is late."""
        try:
            return next(self._batches)
        except (RuntimeError, OSError, EOFError) as error:
            late = str(error).startswith(LATE) and all(helper.is_alive() for helper in self._helpers)
            # What DataLoader raises for a dead worker depends on where it was.
            ended = connection.wait([worker.sentinel for worker in self._workers], timeout=0 if late else 1)
            # One that met a fault ends after it, with exit code 0; its fault comes in its turn, after what is late.
            if died := [worker for worker in self._workers if worker.sentinel in ended and _exit_code(worker)]:
                raise DataError(_epitaph(died[0])) from error
            if not late:
                raise
            return None

    def close(self) -> None:
        """Kill the workers at once, wherever they are: nothing they do needs finishing."""
        atexit.unregister(self.close)
        for worker in self._workers:
            worker.kill()
        deadline = time.monotonic() + KILL_SECONDS
        for worker in self._workers:
            worker.join(max(0.0, deadline - time.monotonic()))
        if left := [worker for worker in self._workers if worker.is_alive()]:
            # A read that hangs in the kernel outlives even SIGKILL. Neither does multiprocessing wait for it at exit,
            # nor DataLoader, for 10 s each, when its iterator goes.
            log.warning("loader workers %s hang in a read that nothing ends; they are left", [w.pid for w in left])
            multiprocessing.process._children.difference_update(left)
            atexit.register(lambda kept: None, self._batches)


def make_loader(
    plan: Plan,
    index: Index,
    features: Features,
    data: Data,
    layout: BatchLayout,
    rank: int,
    start_step: int = 0,
    missing: Collection[int] = (),
    while_late: Callable[[], None] = lambda: None,
    stamped: Mapping[str, Stamp] | None = None,
) -> Loader:
    """The micro-batches of `rank` from `start_step` on, in order, without end: layout.accumulation per step.

    data.num_workers processes read them ahead, or none (0): then nothing is late, as the read is the caller's own wait.
    `missing`: shards known to be absent; `stamped`: what shards were when the run began. Raises ConfigError if the
    plan's lanes don't spread evenly over ranks and workers.
    """
    check_lanes(plan, layout.world_size, data.num_workers)
    source = Source(plan, index, features, data.crop_frames, frozenset(missing), access_of(data), stamped or {})
    pipeline = webdataset.DataPipeline(
        partial(_micro_batches, layout, rank, start_step), partial(_read, source), _faults_as_items
    )
    return start_loader(pipeline, data.num_workers, while_late)


def start_loader(batches: IterableDataset, num_workers: int, while_late: Callable[[], None] = lambda: None) -> Loader:
    """Read `batches`, an MsmError among which stands for a fault, in so many processes, or in this one (0).

    Each process yields every num_workers-th batch, from its own number on.
    """
    if num_workers == 0:
        return Loader(iter(batches), [], [], while_late)
    loader = DataLoader(
        batches,
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=PREFETCHED_BATCHES,
        timeout=LATE_SECONDS,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=partial(_start_worker, os.getpid()),
        generator=torch.Generator(),  # for the seeds of the workers, which use none: the global one stays
    )
    # Where workers put the sockets over which they hand over batches: they are killed, and would leave a folder each.
    multiprocessing.util.get_temp_dir()
    processes, threads = set(multiprocessing.active_children()), set(threading.enumerate())
    with _undisturbed_start():
        received = iter(loader)
    workers = [child for child in multiprocessing.active_children() if child not in processes]
    # Those that feed the workers and, where there is a GPU, one that pins memory.
    helpers = [thread for thread in threading.enumerate() if thread not in threads]
    return Loader(received, workers, helpers, while_late)


def trace_records(batch: Batch, step: int, ids_keep: np.ndarray | None = None) -> list[dict[str, Any]]:
    """What was trained on, a record per crop: where it stood, which it was, hashes of its samples and mask.

    `slot` counts inside the block, `audio` is the BLAKE2b (8 bytes) of the crop's values, `mask` that of its row
    of `ids_keep` (int64 [B, K] ascending), if given.
    """
    first = torch.searchsorted(batch.blocks, batch.blocks)
    columns = {
        "block": batch.blocks.tolist(),
        "slot": (torch.arange(len(first)) - first).tolist(),
        "key": batch.keys,
        **dict(zip(("epoch", "clip", "crop"), batch.sample_ids.T.tolist(), strict=True)),
        "offset": batch.offsets.tolist(),
        "audio": [_hash(row) for row in batch.crops.numpy()],
    }
    if ids_keep is not None:
        columns["mask"] = [_hash(row) for row in ids_keep]
    rows = zip(*columns.values(), strict=True)
    return [{"step": step, **dict(zip(columns, row, strict=True))} for row in rows]


def _micro_batches(layout: BatchLayout, rank: int, start_step: int) -> Iterator[np.ndarray]:
    """First stage: the numbers of the blocks in each of this worker's micro-batches."""
    info = get_worker_info()
    worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
    for i in itertools.count(start_step * layout.accumulation + worker, num_workers):
        yield micro_batch_blocks(i, rank, layout.world_size, layout.blocks_per_micro_batch)


def _read(source: Source, micro_batches: Iterable[np.ndarray]) -> Iterator[Batch]:
    """Second stage: their crops, read and filled in."""
    reader = CropReader(source)
    like = torch.from_numpy(no_crop(source.index.kind, source.features, source.crop_frames))
    for numbers in micro_batches:
        crops = like.new_empty(len(numbers) * source.plan.block, *like.shape)
        if get_worker_info():
            crops.share_memory_()  # as DataLoader else does, by a copy
        blocks = reader.blocks(numbers.tolist(), crops.numpy())
        yield Batch(
            crops=crops,
            sample_ids=torch.from_numpy(blocks.sample_ids),
            blocks=torch.from_numpy(blocks.numbers),
            offsets=torch.from_numpy(blocks.offsets),
            keys=blocks.keys,
            num_bad=blocks.num_bad,
            num_missing=blocks.num_missing,
        )


def _faults_as_items(batches: Iterable[Batch]) -> Iterator[Batch | MsmError]:
    """Last stage: a fault for the user travels as an item; raised, it would arrive inside a traceback."""
    try:
        yield from batches
    except MsmError as fault:
        yield fault


@contextmanager
def _undisturbed_start() -> Iterator[None]:
    """Workers are born deaf to the signals meant for the training process; no SIGCHLD handler stays.

    DataLoader's would raise wherever the training process is when a worker dies; `Loader` looks itself.
    """
    previous = signal.getsignal(signal.SIGCHLD)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, WORKER_IGNORES)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, previous)


def _start_worker(parent: int, worker: int) -> None:
    """A worker dies with the training process, however that dies."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    sys.excepthook = _tell_unless_ending
    torch.set_num_threads(1)


def _tell_unless_ending(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Of a thread that hands over shared memory: a killed training process closes its end before the kernel ends us."""
    if issubclass(kind, (ConnectionError, EOFError)):
        time.sleep(ORPHAN_SECONDS)
    sys.__excepthook__(kind, error, trace)


def _exit_code(worker: multiprocessing.Process) -> int:
    # Its end of the sentinel closes a moment before its exit code is known.
    worker.join()
    return worker.exitcode


def _epitaph(worker: multiprocessing.Process) -> str:
    code = worker.exitcode
    cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return (
        f"a loader worker died ({cause}). After SIGKILL lower data.num_workers, it was most likely out of "
        "memory; after SIGBUS look at the disk of the shards and the size of /dev/shm. Start again: the "
        "run continues from its last checkpoint"
    )


def _hash(row: np.ndarray) -> str:
    return hashlib.blake2b(row.tobytes(), digest_size=8).hexdigest()
