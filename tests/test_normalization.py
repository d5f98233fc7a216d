"""Statistics of a data set: a clip of any length counts whole, and blocks of a recording nearly so."""

import numpy as np
import pytest

from msm_dist.config import Features
from msm_dist.data.stats import LogMelMeter, combine
from msm_dist.evaluate.normalization import measured

RATE = 16000
FEATURES = Features()


def tone() -> np.ndarray:
    """61 s of 440 Hz: all that its ends add to the spectrum is new."""
    return (0.3 * np.sin(2 * np.pi * 440 / RATE * np.arange(61 * RATE))).astype(np.float32)


def bursts() -> np.ndarray:
    """61 s of noise whose level changes every 100 ms."""
    rng = np.random.default_rng(0)
    levels = np.minimum(np.exp(2 * rng.standard_normal(610)), 20).repeat(RATE // 10)
    return (0.02 * levels * rng.standard_normal(61 * RATE)).astype(np.float32)


@pytest.mark.parametrize("make", [tone, bursts])
def test_a_clip_of_any_length_counts_as_a_whole(make):
    waveform = make()
    meter = LogMelMeter(FEATURES)
    meter.add(waveform)
    expected = combine([meter.sums])
    assert measured([waveform], FEATURES) == pytest.approx((expected.mean, expected.std), rel=1e-12)
    assert measured([waveform[:0], waveform], FEATURES) == measured([waveform], FEATURES)


@pytest.mark.parametrize("make", [tone, bursts])
def test_blocks_of_a_recording_give_nearly_its_statistics(make):
    waveform = make()
    whole = measured([waveform], FEATURES)
    blocks = measured(np.split(waveform, range(190_218, len(waveform), 190_218)), FEATURES)
    assert np.abs(np.subtract(blocks, whole)).max() < 0.005 * whole.std
