"""Labelled clips as batches: read, cut, mixed and masked in loader processes, each a function of its place in the run.

In: a task, which of its clips, a length. Out: for training the endless sequence of `augment.Order`, spread over ranks;
for judging every clip once, in the order of the task. Fails with DataError, naming the file, on a clip that can't be
read: what is learnt from and judged on must not depend on what is damaged.

Legend: B clips, S samples, C classes, F mel bands, T frames, K patches kept.
"""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from msm_dist.config import BatchLayout
from msm_dist.data.audio import to_int16
from msm_dist.errors import ConfigError, DataError, MsmError
from msm_dist.evaluate import augment as drawing
from msm_dist.evaluate.classifier import fit_length
from msm_dist.evaluate.finetune_config import Augment, FinetuneData
from msm_dist.evaluate.tasks import (
    Fold,
    Parts,
    Task,
    TaskClip,
    check_classes,
    clip_waveform,
    read_shards,
    read_task,
)

LENGTH_CLIPS = 32
LONGEST_SECONDS = 10.0


@dataclass(frozen=True)
class LabelledTask:
    """A task with the rotation that a run learns from and is judged on, and the length of its clips."""

    task: Task
    parts: Parts
    num_samples: int
    sample_rate: int

    @property
    def digest(self) -> str:
        """The identity of labels, clips and splits; not of what the audio files hold."""
        content = hashlib.sha256(repr((self.task.labels, self.task.multilabel)).encode())
        for clip in self.task.clips:
            content.update(repr((clip.key, clip.labels, clip.split)).encode())
        for part in (self.parts.train, self.parts.valid, self.parts.test):
            content.update(part.astype("<i8").tobytes())
        return content.hexdigest()

    def clips(self, part: np.ndarray) -> list[TaskClip]:
        """The clips of one of `parts`."""
        return [self.task.clips[number] for number in part.tolist()]


@dataclass(frozen=True)
class LabelledBatch:
    """A micro-batch of B clips."""

    waveforms: Tensor
    """int16 [B, S]."""
    targets: Tensor
    """float32 [B, C]: 1 for a clip's labels, shares for a mixture's."""
    places: Tensor
    """int64 [B]: position in the run's sequence of draws, or number of the clip among those judged."""
    masks: Tensor
    """int64 [B, 4]: SpecAugment's first band, band behind the last, first frame, frame behind the last."""
    ids_keep: Tensor | None
    """int64 [B, K]: patches that the encoder sees; None: all."""
    keys: tuple[str, ...] = ()
    """Names of training clips, of both parts of a mixture."""

    def pin_memory(self) -> "LabelledBatch":
        """The same where a GPU can fetch it while it computes; called by DataLoader."""
        values = [getattr(self, part.name) for part in fields(self)]
        return LabelledBatch(*(value.pin_memory() if torch.is_tensor(value) else value for value in values))

    def __reduce__(self) -> tuple[Any, ...]:
        # Each tensor that leaves a worker takes a file and a connection, which is worth it for the waveforms only.
        parts = [getattr(self, part.name) for part in fields(self)]
        return _batch, (parts[0], *(part.numpy() if torch.is_tensor(part) else part for part in parts[1:]))

    def to(self, device: torch.device) -> "LabelledBatch":
        """The same with its tensors on a device."""
        values = [getattr(self, part.name) for part in fields(self)]
        return LabelledBatch(
            *(value.to(device, non_blocking=True) if torch.is_tensor(value) else value for value in values)
        )


def _batch(waveforms: Tensor, *small: Any) -> LabelledBatch:
    return LabelledBatch(
        waveforms, *(torch.from_numpy(part) if isinstance(part, np.ndarray) else part for part in small)
    )


@dataclass(frozen=True)
class Cut:
    """How clips become arrays: rate, length in samples, number of classes, the spectrogram's and the grid's shape."""

    sample_rate: int
    num_samples: int
    num_classes: int
    spectrogram: tuple[int, int]
    """F, T."""
    grid: tuple[int, int]
    """Patches along frequency and time."""


def open_task(data: FinetuneData, sample_rate: int) -> LabelledTask:
    """Read a task and choose what a run needs of it. Raises ConfigError, DataError."""
    if data.test is not None:
        task = read_shards(data.task, data.test, data.valid)
    else:
        task = read_task(data.task, Path(data.audio) if data.audio else None, sample_rate)
    parts = _parts(task, _fold(task, data.fold))
    _check_labels(task, parts)
    if data.seconds is not None:
        num_samples = round(data.seconds * sample_rate)
    else:
        num_samples = _usual_length([task.clips[number] for number in parts.train[:LENGTH_CLIPS].tolist()], sample_rate)
    return LabelledTask(task, parts, max(1, num_samples), sample_rate)


class TrainingClips(IterableDataset):
    """One rank's micro-batches from a step on, without end, or the MsmError in place of one that can't be read."""

    def __init__(
        self,
        clips: Sequence[TaskClip],
        order: drawing.Order,
        cut: Cut,
        augment: Augment,
        layout: BatchLayout,
        rank: int,
        start_step: int,
    ):
        self._clips, self._order, self._cut, self._augment = clips, order, cut, augment
        self._layout, self._rank, self._start_step = layout, rank, start_step

    def __iter__(self) -> Iterator[LabelledBatch | MsmError]:
        worker, num_workers = this_worker()
        for number in itertools.count(self._start_step * self._layout.accumulation + worker, num_workers):
            try:
                yield self._batch(positions_of(number, self._rank, self._layout))
            except MsmError as error:
                yield error

    def _batch(self, positions: np.ndarray) -> LabelledBatch:
        draws = self._order.draws(positions).tolist()
        mixed = [self._mixed(*draw) for draw in draws]
        seed, bands, frames = self._order.seed, *self._cut.spectrogram
        masks = [
            drawing.draw_masks(drawing.generator(seed, drawing.MASK, epoch, place), self._augment, bands, frames)
            for epoch, place, _ in draws
        ]
        grid = self._cut.grid
        ids_keep = None
        if drawing.num_kept(self._augment, grid) != grid:
            randoms = (drawing.generator(seed, drawing.DROP, epoch, place) for epoch, place, _ in draws)
            kept = [drawing.draw_kept(random, self._augment, grid) for random in randoms]
            ids_keep = torch.from_numpy(np.stack(kept))
        return LabelledBatch(
            torch.from_numpy(np.stack([to_int16(waveform) for waveform, *_ in mixed])),
            torch.from_numpy(np.stack([target for _, target, _ in mixed])),
            torch.from_numpy(positions),
            torch.tensor(masks),
            ids_keep,
            tuple(key for *_, key in mixed),
        )

    def _mixed(self, epoch: int, place: int, number: int) -> tuple[np.ndarray, np.ndarray, str]:
        """Waveform float32 [S] and target [C] of a draw, and what it is called."""
        cuts = drawing.generator(self._order.seed, drawing.CUT, epoch, place)
        (waveform, target), key = self._crop(cuts, number), self._clips[number].key
        random = drawing.generator(self._order.seed, drawing.MIX, epoch, place)
        if mix := drawing.draw_mix(random, self._augment, len(self._clips)):
            other, others_target = self._crop(cuts, mix.other)
            share = np.float32(mix.weight)
            waveform = share * waveform + (1 - share) * other
            target = share * target + (1 - share) * others_target
            key = f"{key} + {self._clips[mix.other].key}"
        return waveform, target, key

    def _crop(self, random: np.random.Generator, number: int) -> tuple[np.ndarray, np.ndarray]:
        clip, length = self._clips[number], self._cut.num_samples
        waveform = clip_waveform(clip, self._cut.sample_rate)
        start = drawing.draw_start(random, len(waveform), length)
        return fit_length(waveform, length, start), target_of(clip, self._cut.num_classes)


class JudgedClips(IterableDataset):
    """One rank's share of clips to be judged on, over and over: `num_batches(...)` micro-batches a time.

    Rank r takes every world_size-th run of `size` clips; what is missing at the end is made up of the last clip.
    """

    def __init__(self, clips: Sequence[TaskClip], cut: Cut, size: int, rank: int, world_size: int):
        self._clips, self._cut, self._size, self._rank, self._world_size = clips, cut, size, rank, world_size

    def __iter__(self) -> Iterator[LabelledBatch | MsmError]:
        worker, num_workers = this_worker()
        count = num_batches(len(self._clips), self._size, self._world_size)
        for number in itertools.count(worker, num_workers):
            first = (number % count * self._world_size + self._rank) * self._size
            try:
                yield self._batch(np.arange(first, first + self._size))
            except MsmError as error:
                yield error

    def _batch(self, places: np.ndarray) -> LabelledBatch:
        clips = [self._clips[place] for place in np.minimum(places, len(self._clips) - 1).tolist()]
        waveforms = [fit_length(clip_waveform(clip, self._cut.sample_rate), self._cut.num_samples) for clip in clips]
        return LabelledBatch(
            torch.from_numpy(np.stack([to_int16(waveform) for waveform in waveforms])),
            torch.from_numpy(np.stack([target_of(clip, self._cut.num_classes) for clip in clips])),
            torch.from_numpy(places),
            torch.zeros(len(clips), 4, dtype=torch.int64),
            None,
        )


def positions_of(number: int, rank: int, layout: BatchLayout) -> np.ndarray:
    """Where in the sequence of draws a rank's micro-batch `number` of the run lies: int64 [micro_batch].

    A step takes the same draws whatever the world size.
    """
    step, turn = divmod(number, layout.accumulation)
    first = ((step * layout.accumulation + turn) * layout.world_size + rank) * layout.micro_batch
    return np.arange(first, first + layout.micro_batch)


def num_batches(num_clips: int, size: int, world_size: int) -> int:
    """Micro-batches in which each rank judges its share: as many on all of them."""
    return -(-num_clips // (size * world_size))


def spread(numbers: np.ndarray, count: int) -> np.ndarray:
    """So many of the numbers [n], evenly from beginning to end; all where there are no more."""
    return numbers[np.arange(min(count, len(numbers))) * len(numbers) // min(count, len(numbers))]


def target_of(clip: TaskClip, num_classes: int) -> np.ndarray:
    """float32 [C] of zeros and ones."""
    target = np.zeros(num_classes, np.float32)
    target[list(clip.labels)] = 1
    return target


def this_worker() -> tuple[int, int]:
    """Number of this loader process, and of how many."""
    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 1)


def _usual_length(clips: Sequence[TaskClip], sample_rate: int) -> int:
    """Samples of the longest clip, LONGEST_SECONDS at most; what can't be read is named elsewhere, all at once."""
    most = round(LONGEST_SECONDS * sample_rate)
    lengths = []
    for clip in clips:
        with suppress(DataError):
            lengths.append(len(clip_waveform(clip, sample_rate)))
    return min(max(lengths, default=most), most)


def _fold(task: Task, name: str | None) -> Fold:
    names = [fold.test for fold in task.folds]
    if name is None and len(names) > 1:
        raise ConfigError(
            f"data.fold is missing: {task.name} has {len(names)} folds, and a run is judged on one of them; choose "
            f"from {', '.join(names)}"
        )
    if name is not None and name not in names:
        raise ConfigError(f"data.fold = {name}: {task.name} is judged on {', '.join(names)}; choose one of them")
    return task.folds[0 if name is None else names.index(name)]


def _parts(task: Task, fold: Fold) -> Parts:
    """The clips of a rotation. Nothing is chosen by validation clips, so that none are taken from the others.

    Where folds are rotated, all but the one that is judged are trained on, as the makers of such collections mean it.
    """
    splits = np.array([clip.split for clip in task.clips])
    train, valid = set(fold.train), {fold.valid} - {None}
    if len(task.folds) > 1:
        train, valid = set(splits.tolist()) - {fold.test}, set()
    parts = Parts(*(np.flatnonzero(np.isin(splits, sorted(names))) for names in (train, valid, {fold.test})))
    for name, part in (("training", parts.train), ("test", parts.test)):
        if not len(part):
            raise DataError(
                f"{task.name}: has no {name} clips ({len(task.clips)} in all, splits {', '.join(sorted(set(splits)))})"
            )
    return parts


def _check_labels(task: Task, parts: Parts) -> None:
    """Raise DataError where there is nothing to learn."""
    check_classes(task)
    if not any(task.clips[number].labels for number in parts.train.tolist()):
        raise DataError(
            f"{task.name}: none of its {len(parts.train)} training clips has a label; there is nothing to learn"
        )
