"""Drawing and changing training clips: order, mixup, SpecAugment and structured patch drop, as pure functions.

In: (seed, epoch, place in the epoch), which number a draw of the run. Out: which clip it is, where it is cut, what it
is mixed with, what is masked, which patches stay. No state anywhere: a resumed run and one of another world size draw
the same. numpy's Philox4x64-10 gives the numbers (key: seed, purpose; counter: place, epoch), its distributions turn
them into draws, which therefore hold for one version of numpy.

Sources. Mixup of waveforms with the labels mixed alike, weights from a symmetric beta distribution: Tokozume et al.
2018 (between-class learning), Zhang et al. 2018, for AudioSet Gong et al. 2021 (AST: half of the clips, beta(10, 10)).
SpecAugment: Park et al. 2019, one mask along each axis, filled with the corpus mean. Structured patch drop: Koutini et
al. 2022 (PaSST), whole rows and columns of the grid, drawn per clip as in Huang et al. 2022 (Audio-MAE). Weighted
sampling: Gong et al. 2021 (PSLA): a class weighs 1000 / (its clips + 0.01), a clip the sum over its classes.

Legend: B clips, C classes, F mel bands, T frames, Fg x Tg the grid, L = Fg * Tg patches, K of them kept.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from msm_dist.data.plan import cached, permutation, raw_words
from msm_dist.evaluate.finetune_config import Augment

ORDER, CUT, MIX, MASK, DROP = range(16, 21)
"""Purposes of random numbers; smaller numbers are those of the plans (data/plan.py, data/mix.py)."""
CLASS_WEIGHT, CLASS_OFFSET = 1000.0, 0.01


class Mix(NamedTuple):
    """The second clip of a mixture, its number among the training clips, and the weight of the first."""

    other: int
    weight: float


@dataclass(frozen=True, eq=False)
class Order:
    """The endless sequence of training clips: epoch after epoch, each as many draws as there are clips."""

    num_clips: int
    seed: int
    weights: np.ndarray | None = None
    """float64 [clips]: draw with replacement by these; None: every clip once an epoch."""
    _epochs: OrderedDict[int, Any] = field(default_factory=OrderedDict, repr=False)

    def draws(self, positions: np.ndarray) -> np.ndarray:
        """int64 [n, 3] of (epoch, place in it, clip) at positions int64 [n] of the sequence."""
        epochs, places = np.divmod(positions, self.num_clips)
        clips = [
            cached(self._epochs, epoch, lambda epoch=epoch: self._epoch(epoch), 2)[place]
            for epoch, place in zip(epochs.tolist(), places.tolist(), strict=True)
        ]
        return np.stack([epochs, places, np.array(clips, np.int64)], axis=1)

    def _epoch(self, epoch: int) -> np.ndarray:
        if self.weights is None:
            return permutation(self.seed, ORDER, self.num_clips, epoch=epoch)
        ends = np.cumsum(self.weights)
        uniform = (raw_words(self.seed, ORDER, self.num_clips, epoch=epoch) >> np.uint64(11)) * 2.0**-53
        # The last sum may be rounded below the product of itself and the largest number below 1.
        return np.minimum(np.searchsorted(ends, uniform * ends[-1], side="right"), self.num_clips - 1)


def clip_weights(labels: Sequence[Sequence[int]], num_classes: int) -> np.ndarray:
    """How often clips are drawn, relative to each other: float64 [clips]. A clip without labels is never drawn."""
    counts = np.zeros(num_classes)
    for of_clip in labels:
        counts[list(of_clip)] += 1
    of_class = CLASS_WEIGHT / (counts + CLASS_OFFSET)
    return np.array([of_class[list(of_clip)].sum() for of_clip in labels])


def generator(seed: int, purpose: int, epoch: int, place: int) -> np.random.Generator:
    """The random numbers of one purpose for one draw of the run."""
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=[0, 0, place, epoch]))


def draw_start(random: np.random.Generator, num_samples: int, length: int) -> int:
    """Where a crop of `length` samples begins in a clip: uniform; 0 where the clip is not longer."""
    return int(random.integers(max(0, num_samples - length) + 1))


def draw_mix(random: np.random.Generator, augment: Augment, num_clips: int) -> Mix | None:
    """Whether and how a draw is mixed: with any training clip, itself too."""
    if random.random() >= augment.mixup:
        return None
    return Mix(int(random.integers(num_clips)), float(random.beta(augment.mixup_alpha, augment.mixup_alpha)))


def draw_masks(random: np.random.Generator, augment: Augment, bands: int, frames: int) -> list[int]:
    """SpecAugment's masks: first band, band behind the last, first frame, frame behind the last."""
    return [*_draw_mask(random, augment.frequency_mask, bands), *_draw_mask(random, augment.time_mask, frames)]


def num_kept(augment: Augment, grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of a grid Fg x Tg that patch drop leaves: at least one of each."""
    rows, columns = grid
    return max(1, rows - int(rows * augment.frequency_drop)), max(1, columns - int(columns * augment.time_drop))


def draw_kept(random: np.random.Generator, augment: Augment, grid: tuple[int, int]) -> np.ndarray:
    """The patches that stay, ascending: int64 [K], all those at the crossings of the rows and columns that stay."""
    kept_rows, kept_columns = num_kept(augment, grid)
    rows = np.sort(random.permutation(grid[0])[:kept_rows])
    columns = np.sort(random.permutation(grid[1])[:kept_columns])
    return (rows[:, None] * grid[1] + columns).reshape(-1)


def mask_spectrogram(spectrogram: Tensor, masks: Tensor) -> Tensor:
    """Normalised log-mel [B, 1, F, T] with 0, the corpus mean, in the bands and frames of masks int64 [B, 4]."""
    low, high, start, stop = masks[:, :, None].unbind(1)  # [B, 1] each
    bands = torch.arange(spectrogram.shape[2], device=spectrogram.device)
    frames = torch.arange(spectrogram.shape[3], device=spectrogram.device)
    in_bands = ((bands >= low) & (bands < high))[:, None, :, None]
    in_frames = ((frames >= start) & (frames < stop))[:, None, None, :]
    return spectrogram.masked_fill(in_bands | in_frames, 0.0)


def _draw_mask(random: np.random.Generator, widest: int, size: int) -> tuple[int, int]:
    width = int(random.integers(min(widest, size) + 1))
    start = int(random.integers(size - width + 1))
    return start, start + width
