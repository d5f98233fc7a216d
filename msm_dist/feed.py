"""A rank's batches for the training loop, read one step ahead, and the trace of what was trained on.

In: a corpus, a batch layout, a world, the step to start from. Out: the micro-batches of step after step. A rank
that can't read on tells the `Interruption` in time for all ranks to stop together; the DataError is kept for later.
One whose read is late asks whether any rank is to stop; if so it gives the read up, as it will not need the data.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from msm_dist.config import BatchLayout, Data
from msm_dist.corpus import Corpus
from msm_dist.data.stream import Batch, make_loader, trace_records
from msm_dist.engine.preempt import NO_DATA, Interruption
from msm_dist.engine.world import World
from msm_dist.errors import DataError
from msm_dist.model.mae import Output
from msm_dist.monitor import truncate_jsonl

Trace = Callable[[int, Batch, Output], None]
"""(step, micro-batch, what the model made of it)"""


class GivenUp(Exception):
    """A late read was given up, as the run stops before its data is needed."""


class Feed:
    """A rank's batches, read one step ahead: a rank that will be without data says so in time for all to stop."""

    def __init__(self, batches: Iterator[Any], accumulation: int, num_steps: int, interruption: Interruption) -> None:
        """Read `accumulation` micro-batches, of whatever kind, for each of `num_steps` steps."""
        self._batches = batches
        self._accumulation = accumulation
        self._unread_steps = num_steps
        self._interruption = interruption
        self._fault: DataError | None = None
        self._ahead = self._read()

    def next_step(self) -> list[Any]:
        """The next step's micro-batches; reads those of the step after it."""
        batches, self._ahead = self._ahead, self._read()
        return batches

    def raise_fault(self) -> None:
        """Raise what kept this rank from reading on, if anything did."""
        if self._fault:
            raise self._fault

    def _read(self) -> list[Any]:
        # What is read now would be trained on after the step that ends with the agreement to stop.
        if self._fault or not self._unread_steps or self._interruption.heard:
            return []
        self._unread_steps -= 1
        try:
            return [next(self._batches) for _ in range(self._accumulation)]
        except GivenUp:
            return []
        except DataError as error:
            self._fault = error
            self._interruption.hear(NO_DATA)
            # The others may wait for a read of their own that hangs for the same cause.
            self._interruption.tell(NO_DATA)
            return []


@contextlib.contextmanager
def feeding(
    data: Data, corpus: Corpus, layout: BatchLayout, world: World, interruption: Interruption, start_step: int
) -> Iterator[Feed]:
    """The feed from `start_step` on; its workers end with the block. A collective. Raises DataError."""

    def give_up_when_stopping() -> None:
        if interruption.heard_anywhere():
            raise GivenUp

    loader = make_loader(
        corpus.plan,
        corpus.index,
        corpus.features,
        data,
        layout,
        world.rank,
        start_step=start_step,
        missing=corpus.missing,
        while_late=give_up_when_stopping,
        stamped=corpus.stamped,
    )
    with contextlib.closing(loader):
        feed = Feed(loader, layout.accumulation, corpus.total_steps - start_step, interruption)
        # Without data for its first step a rank can't wait for an agreement that comes a step late.
        world.together(feed.raise_fault, DataError)
        # Nor without its first step's data because of a signal: so the loop's first call finds what was heard by now.
        interruption.agreed()
        yield feed


@contextlib.contextmanager
def tracing(folder: Path | None, world: World, start_step: int) -> Iterator[Trace]:
    """A function that writes a record per sample into `folder`, after what is there of the steps before; or nothing."""
    if folder is None:
        yield lambda step, batch, output: None
        return

    def start() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("rank-*.jsonl"):
            truncate_jsonl(path, start_step)

    world.on_main(start)

    def write(step: int, batch: Batch, output: Output) -> None:
        for line in trace_records(batch, step, output.masking.ids_keep.cpu().numpy()):
            file.write(json.dumps(line) + "\n")
        file.flush()

    with (folder / f"rank-{world.rank:05d}.jsonl").open("a", encoding="utf-8") as file:
        yield write
