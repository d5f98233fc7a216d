"""Statistics of a corpus' log-mel: two scalars for normalisation and the mean of every band.

In: whole clips as int16 at the front end's rate. Out: sums that add up over clips and shards, and from them
mean, standard deviation and band means over every log-mel value, without padding. All sums are float64 and
taken in a fixed order: the same corpus gives the same bits whatever the number of workers.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch

from msm_dist.config import Features
from msm_dist.errors import DataError
from msm_dist.features import LogMel

CHUNK_FRAMES = 6_000


class Statistics(NamedTuple):
    """Mean and standard deviation over all values; the mean per band, un-normalised."""

    mean: float
    std: float
    mel_mean: tuple[float, ...]


class LogMelMeter:
    """Adds up log-mels. `sums` is float64 [1 + 2 * n_mels]: frames, then values and squares per band."""

    def __init__(self, features: Features):
        self.features = features
        self.log_mel = LogMel(features)
        self.sums = np.zeros(1 + 2 * features.n_mels)

    def add(self, waveform: np.ndarray) -> None:
        """Add a whole clip, int16 [S] at features.sample_rate; hours of it take the memory of a minute."""
        hop, n_fft = self.features.hop, self.features.n_fft
        num_frames = self.features.num_frames(len(waveform))
        padded = np.pad(waveform, (n_fft // 2, n_fft - n_fft // 2), mode="reflect")
        for first in range(0, num_frames, CHUNK_FRAMES):
            last = min(first + CHUNK_FRAMES, num_frames) - 1
            samples = torch.from_numpy(padded[hop * first : hop * last + n_fft])
            log_mel = self.log_mel(samples[None])[0, 0].double().numpy()
            values, squares = log_mel.sum(axis=1), (log_mel * log_mel).sum(axis=1)
            self.sums += np.concatenate([[log_mel.shape[1]], values, squares])


def combine(sums: Iterable[np.ndarray]) -> Statistics:
    """The statistics behind `sums`, added in the order given. Raises DataError where all is silence."""
    total = sum(sums)
    frames, values, squares = total[0], *np.split(total[1:], 2)
    mean = values.mean() / frames
    std = float(np.sqrt(max(0.0, squares.mean() / frames - mean * mean)))
    if std < 1e-3:
        raise DataError(f"the log-mel of the corpus is {mean:.3f} everywhere: every clip is silent; check the audio")
    return Statistics(float(mean), std, tuple((values / frames).tolist()))
