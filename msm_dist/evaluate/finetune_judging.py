"""Before and beside training: can all clips be read, which scores do they allow, is the run to stop meanwhile?

In: labelled clips, logits and targets. Out: loss and scores by name; a DataError that names every clip that can't be
read, before a step is done. Reading clips takes minutes where they are many: all ranks leave it together, by
`Stopping`, when one of them is asked to stop.

Legend: N clips, C classes.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import IterableDataset

from msm_dist.data import media
from msm_dist.data.audio import BadClip
from msm_dist.data.index import listed
from msm_dist.data.stream import Loader, start_loader
from msm_dist.engine.hang import Progress
from msm_dist.engine.preempt import Interruption
from msm_dist.engine.world import World
from msm_dist.errors import DataError
from msm_dist.evaluate import classifier
from msm_dist.evaluate.finetune_data import LabelledBatch, LabelledTask, target_of, this_worker
from msm_dist.evaluate.recordings import unreadable
from msm_dist.evaluate.scores import SCORES, check_scores
from msm_dist.evaluate.tasks import TaskClip, clip_waveform
from msm_dist.feed import GivenUp
from msm_dist.files import open_regular

CHECKED_AT_ONCE = 32


class Stopping(Exception):
    """All ranks stop between two steps, for a reason of engine.preempt."""

    def __init__(self, reason: int):
        super().__init__(reason)
        self.reason = reason


class Scores(NamedTuple):
    """Names of the scores that can be computed on the validation and on the test clips, and why others can't."""

    valid: tuple[str, ...]
    test: tuple[str, ...]
    notes: tuple[str, ...]


def giving_up(interruption: Interruption) -> Callable[[], None]:
    """What a loader is to call while it waits: it gives the read up when the run stops before the data is needed."""

    def give_up_when_stopping() -> None:
        if interruption.heard_anywhere():
            raise GivenUp

    return give_up_when_stopping


def stop_if_asked(interruption: Interruption) -> None:
    """Raise Stopping on all ranks if any of them has heard a reason by now. A collective."""
    # An agreement comes with the call after it.
    interruption.agreed()
    if reason := interruption.agreed():
        raise Stopping(reason)


def next_batch(loader: Loader, world: World, interruption: Interruption) -> LabelledBatch:
    """The next batch on every rank. A collective. Raises Stopping, DataError."""

    def read() -> LabelledBatch | None:
        try:
            return next(loader)
        except GivenUp:
            return None

    batch = world.together(read, DataError)
    stop_if_asked(interruption)
    assert batch is not None, "a read is given up for a reason alone"
    return batch


def check_clips(
    labelled: LabelledTask,
    judged: Sequence[TaskClip],
    num_workers: int,
    world: World,
    interruption: Interruption,
    progress: Progress,
) -> None:
    """Decode the clips to be judged on, read the headers of the others' files. A collective.

    Clips of shards had their headers read when the shards were indexed. Raises DataError with all that can't be read,
    Stopping.
    """
    files = [clip for clip in labelled.clips(labelled.parts.train) if clip.member is None]
    count = len(judged) + len(files)
    if world.is_main:
        print(f"check      whether {count} clips can be read", flush=True)
    mine = slice(world.rank, None, world.size)
    checks = _Checks(judged[mine], files[mine], labelled.sample_rate)

    def faults() -> list[str]:
        found: list[str] = []
        with (
            contextlib.suppress(GivenUp),
            contextlib.closing(start_loader(checks, num_workers, giving_up(interruption))) as loader,
        ):
            for some in loader:
                progress.at(0, "clips")
                found += some
                if interruption.heard:
                    break
        return found

    of_ranks = world.gather(world.together(faults, DataError))
    stop_if_asked(interruption)
    if found := [fault for of_rank in of_ranks for fault in of_rank]:
        error = DataError(
            f"{labelled.task.name}: {len(found)} of {count} clips can't be read, and scores must not depend on what is "
            f"damaged; replace them, or leave them out of the task:\n{listed(found)}"
        )
        error.on_all_ranks = True
        raise error


def allowed_scores(labelled: LabelledTask, valid: Sequence[TaskClip], test: Sequence[TaskClip]) -> Scores:
    """Which of the task's scores can be computed on these clips. Raises DataError where the first can't on `test`."""
    names, notes = labelled.task.scores, []
    check_scores(names, labelled.task.name)
    allowed: list[tuple[str, ...]] = []
    for part, clips in (("validation", valid), ("test", test)):
        targets = np.stack([target_of(clip, len(labelled.task.labels)) for clip in clips]) if clips else None
        faults = {name: fault for name in names if targets is not None and (fault := _fault(name, targets))}
        if clips is test and names[0] in faults:
            raise DataError(f"{labelled.task.name}, test clips: {names[0]} can't be computed: {faults[names[0]]}")
        notes += [f"note       {part}: without {name}: {fault}" for name, fault in faults.items()]
        allowed.append(tuple(name for name in names if name not in faults))
    return Scores(*allowed, tuple(notes))


def scores_of(logits: np.ndarray, targets: np.ndarray, multilabel: bool, names: Sequence[str]) -> dict[str, float]:
    """Loss and scores by name of logits [N, C] against targets [N, C]."""
    tensors = torch.from_numpy(logits).double(), torch.from_numpy(targets).double()
    loss = classifier.loss_of(*tensors, multilabel).item()
    scores = classifier.probabilities(tensors[0], multilabel).numpy()
    return {"loss": loss} | {name: SCORES[name](scores, targets) for name in names}


def finite(values: dict[str, float]) -> dict[str, float]:
    """The loss, and the scores that are finite: a perfect d_prime is not."""
    return {name: value for name, value in values.items() if name == "loss" or math.isfinite(value)}


class _Checks(IterableDataset):
    """What is wrong with clips, a list for every few of them: `whole` are decoded, of `files` the header is read."""

    def __init__(self, whole: Sequence[TaskClip], files: Sequence[TaskClip], sample_rate: int):
        self._clips, self._num_whole, self._sample_rate = [*whole, *files], len(whole), sample_rate

    def __iter__(self) -> Iterator[list[str]]:
        worker, num_workers = this_worker()
        for first in range(worker * CHECKED_AT_ONCE, len(self._clips), num_workers * CHECKED_AT_ONCE):
            places = range(first, min(first + CHECKED_AT_ONCE, len(self._clips)))
            yield [fault for fault in map(self._fault, places) if fault]

    def _fault(self, place: int) -> str:
        clip = self._clips[place]
        try:
            if place < self._num_whole:
                clip_waveform(clip, self._sample_rate)
            else:
                _read_header(clip)
        except DataError as error:
            return str(error)
        return ""


def _read_header(clip: TaskClip) -> None:
    try:
        with open_regular(clip.path) as file:
            media.probe(file)
    except (BadClip, OSError) as error:
        raise unreadable(clip.path, error) from None


def _fault(name: str, targets: np.ndarray) -> str:
    """Why a score has no meaning on targets [N, C]; nothing where it has one."""
    try:
        SCORES[name](np.zeros_like(targets), targets)
    except DataError as error:
        return str(error)
    return ""
