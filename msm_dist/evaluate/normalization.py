"""Mean and deviation of the log-mel of some clips: what else than a checkpoint's an encoder's input can be scaled by.

In: clips as samples at the front end's rate, or as rows of stored log-mels. Out: `Statistics`, over the frames that are
the clips' own, as training's are (data/stats.py). Fails with DataError where there is no clip, or silence alone.
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple

import numpy as np

from msm_dist.config import Features
from msm_dist.data.logmel import code_sums
from msm_dist.data.stats import LogMelMeter
from msm_dist.errors import DataError

Normalization = Literal["checkpoint", "dataset", "batch"]
"""Whose mean and deviation the input of an encoder is scaled by."""
LEAST_STD = 1e-3


class Statistics(NamedTuple):
    """Of all log-mel values together; `std` is at least LEAST_STD."""

    mean: float
    std: float

    def checked(self) -> "Statistics":
        """Itself, unless it is that of silence: DataError."""
        if self.std <= LEAST_STD:
            raise DataError(
                f"the log-mel of the data set is {self.mean:.3f} everywhere: all is silent; check the audio"
            )
        return self


def measured(clips: Iterable[np.ndarray], features: Features) -> Statistics:
    """The statistics of clips: floating [S] in -1..1 at the front end's rate, or uint8 [frames, bands] as stored.

    Clips may be blocks of a longer recording. Each then counts as a clip, with ends reflected and frames from its own
    first sample on: with blocks of 12 s both numbers move by less than 0.5 % of the deviation. Raises DataError where
    there is none.
    """
    meter = LogMelMeter(features)
    for clip in clips:
        if clip.dtype == np.uint8:
            meter.sums += code_sums(clip, meter.log_mel)
        elif len(clip):
            meter.add(clip)
    frames, values, squares = meter.sums[0], *np.split(meter.sums[1:], 2)
    if not frames:
        raise DataError("there is no clip to measure mean and deviation of: give at least one")
    mean = values.mean() / frames
    std = float(np.sqrt(max(0.0, squares.mean() / frames - mean * mean)))
    return Statistics(float(mean), max(LEAST_STD, std))
