"""A profile of some steps: torch's profiler on rank 0, its trace as a file, and where the time went on one screen.

In: the steps to record (train.profile), the run folder, and the parts of a step as the training loop names them. Out:
`<run>/profile/steps-A-B.pt.trace.json.gz`, a Chrome trace for Perfetto or TensorBoard's profiler plugin, and beside
it `.txt` and `.json` with shares that add up to the time of the steps. Numbers of a run don't change by it. A file
that can't be written raises CheckpointError on all ranks.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from msm_dist.engine.world import World
from msm_dist.errors import CheckpointError
from msm_dist.profile_summary import PART, STEP, read_trace, report, summarize

Part = Literal["data", "log-mel", "forward", "backward", "update", "outside"]
StepDone = Callable[[int], None]


def part(name: Part) -> record_function:
    """Name the part of the loop inside the block for a profiler; costs some microseconds where none listens."""
    return record_function(PART + name)


@contextlib.contextmanager
def profiling(
    steps: tuple[int, int] | None, folder: Path, world: World, start_step: int, total_steps: int
) -> Iterator[StepDone]:
    """A function to be called by all ranks after every step; it records the steps from `steps[0]` to `steps[1]` - 1.

    What of them lies before `start_step` or past the end of the run is left out, and said so.
    """
    if steps is None:
        yield lambda step: None
        return
    start, stop = max(steps[0], start_step + 1), min(steps[1], total_steps + 1)
    if world.is_main and (start, stop) != steps:
        what = f"only steps {start} to {stop - 1} are" if start < stop else "nothing is"
        print(
            f"train.profile = {steps[0]}:{steps[1]}: {what} recorded, as this start runs from step {start_step + 1} to "
            f"{total_steps}",
            flush=True,
        )
    recorder = Recorder(start, stop, folder, world)
    recorder.step_done(start_step)
    try:
        yield recorder.step_done
    except BaseException:
        recorder.abandon()
        raise
    recorder.finish()


class Recorder:
    """Starts and stops the profiler of rank 0 between steps."""

    def __init__(self, start: int, stop: int, folder: Path, world: World) -> None:
        self._start, self._stop = start, stop
        self._folder = folder
        self._world = world
        self._profiler: profile | None = None
        self._step_range: record_function | None = None
        self._done = start - 1

    def step_done(self, step: int) -> None:
        """Between two steps: close what was `step`, open the next one if it is to be recorded."""
        if not self._start - 1 <= step < self._stop:
            return
        self._done = step
        if self._world.is_main:
            # What is still under way on the device belongs to the step that asked for it.
            if self._world.device.type == "cuda" and step in (self._start - 1, self._stop - 1):
                torch.cuda.synchronize(self._world.device)
            self._close_range()
            if self._start <= step + 1 < self._stop:
                self._profiler = self._profiler or self._started()
                self._step_range = record_function(f"{STEP}{step + 1}")
                self._step_range.__enter__()
        if step == self._stop - 1:
            self.finish()

    def finish(self) -> None:
        """Write and print what was recorded, if anything, once; a collective."""
        if self._start <= self._done:
            self._world.on_main(self._write)
        self.abandon()
        self._start = self._stop

    def abandon(self) -> None:
        """Stop recording without a word. A step that was broken off leaves no range behind."""
        if self._profiler is not None:
            self._profiler.stop()
        self._profiler = self._step_range = None

    def _started(self) -> profile:
        device = [ProfilerActivity.CUDA] if self._world.device.type == "cuda" else []
        profiler = profile(activities=[ProfilerActivity.CPU, *device])
        profiler.start()
        return profiler

    def _close_range(self) -> None:
        if self._step_range is not None:
            self._step_range.__exit__(None, None, None)
            self._step_range = None

    def _write(self) -> None:
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        name = f"steps-{self._start}-{self._done}"
        path = self._folder / f"{name}.pt.trace.json.gz"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(path))
            summary = summarize(read_trace(path), range(self._start, self._done + 1))
            text = report(summary)
            (self._folder / f"{name}.json").write_text(json.dumps(asdict(summary), indent=1), encoding="utf-8")
            (self._folder / f"{name}.txt").write_text(text, encoding="utf-8")
        except OSError as error:
            raise CheckpointError(
                f"{path}: can't be written ({error.strerror or error}); make room or give write access, or go on "
                "without train.profile"
            ) from None
        print(f"{text}trace      {path}", flush=True)
