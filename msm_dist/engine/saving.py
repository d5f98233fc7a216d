"""Checkpoints written beside training: a step waits for the copy of the state to host memory, not for the disk.

In: the engine at a step. Out, some time later: a checkpoint (engine/checkpoint.py), and old ones deleted. One thread
per rank writes, one checkpoint at a time; these threads agree over a process group of their own. What keeps one of
them from writing is raised as CheckpointError on all ranks together: at the next `check`, `begin` or `finish`.

DeepSpeed 0.19.8's own engines for this (checkpoint.writer: fast and decoupled; datastates) do not fit: they pickle with
torch.save the partitions of one ZeRO stage and world size, and hold the next update back until the file is written.
"""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import deepspeed
import torch

from msm_dist.config import Checkpoint
from msm_dist.engine import checkpoint
from msm_dist.engine.world import World

WORTH_A_WORD_SECONDS = 1.0

log = logging.getLogger(__name__)


class Saver:
    """Saves a run's checkpoints, at most one at a time."""

    def __init__(self, root: Path, settings: Checkpoint, world: World, timeout_minutes: float) -> None:
        """Checkpoints go to `root`; a collective."""
        self._root = root
        self._settings = settings
        self._world = world
        self._writers = world.beside(timeout_minutes)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._host: dict[str, torch.Tensor] = {}
        self._num_waits = 0
        self._seconds = {"checkpoint_stall_seconds": 0.0, "checkpoint_wait_seconds": 0.0}

    def begin(
        self, engine: deepspeed.DeepSpeedEngine, step: int, extra: dict[str, Any], sync_record: Callable[[], None]
    ) -> None:
        """Copy the engine's state after `step` updates and start to write it; a collective.

        A write under way is waited for first. `sync_record` runs on rank 0, beside training too, before the checkpoint
        counts; `extra` (plain JSON values) comes back in its meta. Raises CheckpointError, that of the write before.
        """
        if self._world.device.type == "cuda":
            # What the device has still to do of the step is no part of the stall.
            torch.cuda.synchronize(self._world.device)
        start = time.perf_counter()
        self._wait_for_the_one_before(step)
        folder = self._root / checkpoint.checkpoint_name(step)
        if not self._world.agree_any(self._world.is_main and checkpoint.is_complete(folder)):
            counters = checkpoint.copy_state(engine, self._host, self._world)
            meta = {"step": step} | counters | extra
            self._writing = self._thread.submit(self._write, folder, meta, sync_record)
        self._seconds["checkpoint_stall_seconds"] += time.perf_counter() - start

    def check(self) -> None:
        """Raise what kept the last checkpoint from being written, on all ranks; a collective that does not wait."""
        done = self._writing is not None and self._writing.done()
        if self._world.agree_any(done and self._writing.exception() is not None):
            self.finish()

    def finish(self) -> None:
        """Wait until the checkpoint being written is complete. Raises CheckpointError on all ranks."""
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def close(self) -> None:
        """Let a write under way end, whatever ended the run; nothing may be begun after it."""
        self._thread.shutdown()
        if self._writing and (error := self._writing.exception()):
            log.warning("the checkpoint being written was not completed: %s", error)

    def lap(self) -> dict[str, float]:
        """Seconds that steps were held up since the last lap, by name; nothing where none were.

        checkpoint_stall_seconds is all of it, checkpoint_wait_seconds the part spent waiting for the checkpoint before.
        """
        seconds, self._seconds = self._seconds, dict.fromkeys(self._seconds, 0.0)
        return {name: value for name, value in seconds.items() if value}

    def _wait_for_the_one_before(self, step: int) -> None:
        start, waits = time.perf_counter(), self._writing is not None and not self._writing.done()
        self.finish()
        if not waits:
            return
        waited = time.perf_counter() - start
        self._num_waits += 1
        self._seconds["checkpoint_wait_seconds"] += waited
        if self._world.is_main and waited >= WORTH_A_WORD_SECONDS:
            log.warning(
                "step %d: waited %.1f s for the checkpoint before to be written (such waits so far: %d); more steps "
                "between checkpoints (checkpoint.every) or a faster disk avoid it",
                step,
                waited,
                self._num_waits,
            )

    def _write(self, folder: Path, meta: dict[str, Any], sync_record: Callable[[], None]) -> None:
        self._writers.on_main(sync_record)
        checkpoint.write(folder, self._host, meta, self._writers)
        keep, keep_every = self._settings.keep, self._settings.keep_every
        self._writers.on_main(lambda: checkpoint.rotate(self._root, keep, keep_every))
