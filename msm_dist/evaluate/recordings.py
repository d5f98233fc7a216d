"""Audio files as waveforms, read as training reads them.

In: the path of a file: wav, flac, ogg, opus or mp3, and with the extra [video] m4a, mp4, webm, mkv, mka, mov or aac;
the content decides, never the name. Out: mono float32 in -1..1, whole or in blocks. Fails with DataError, which names
the file and what is wrong with it.
"""

import operator
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from msm_dist.data import media
from msm_dist.data.audio import FULL_SCALE, MAX_RATE, MIN_RATE, BadClip, resample_blocks
from msm_dist.errors import DataError
from msm_dist.files import open_regular


def read_audio(path: str | Path, sample_rate: int | None = None) -> tuple[np.ndarray, int]:
    """A whole recording, float32 [S] in -1..1, and its rate in Hz: its own, or `sample_rate`.

    Resampled as in training. Channels are averaged. What is louder than full scale is scaled down as a whole, as in
    packing. Raises DataError.
    """
    sample_rate = None if sample_rate is None else checked_rate(sample_rate)
    try:
        with open_regular(path) as file:
            return read_encoded(media.whole_if_small(file), sample_rate)
    except (BadClip, OSError) as error:
        raise unreadable(path, error) from None


def read_blocks(path: str | Path, sample_rate: int) -> Iterator[np.ndarray]:
    """A recording of any length as blocks at `sample_rate`, float32 [S] each; joined, they are `read_audio`'s samples.

    Memory holds a minute or so. The file is decoded twice, at first for its peak: a damaged one gives no block at all.
    Of a video the blocks are cut out one by one and may meet a millisecond off. Raises DataError.
    """
    sample_rate = checked_rate(sample_rate)
    try:
        with open_regular(path) as file:
            yield from encoded_blocks(media.whole_if_small(file), sample_rate)
    except (BadClip, OSError) as error:
        raise unreadable(path, error) from None


def read_encoded(encoded: media.Encoded, sample_rate: int | None = None) -> tuple[np.ndarray, int]:
    """`read_audio` of a file's bytes, or of an open one. Raises BadClip."""
    info = media.probe(encoded)
    rate = sample_rate or info.sample_rate
    waveform = media.decode_span(encoded, 0, info.samples, rate)
    gain = _gain(_peak(waveform))
    return (waveform if gain == 1 else waveform * gain), rate


def encoded_blocks(encoded: media.Encoded, sample_rate: int) -> Iterator[np.ndarray]:
    """`read_blocks` of a file's bytes, or of an open one. Raises BadClip."""
    rate = media.probe(encoded).sample_rate

    def blocks() -> Iterator[np.ndarray]:
        return resample_blocks(media.decode_blocks(encoded), rate, sample_rate)

    gain = _gain(max(map(_peak, blocks()), default=0.0))
    for block in blocks():
        yield block if gain == 1 else block * gain


def checked_rate(sample_rate: Any) -> int:
    """A sample rate in Hz, of whatever type it is a whole number. Raises DataError."""
    rate = int(sample_rate) if isinstance(sample_rate, float | np.floating) and sample_rate % 1 == 0 else sample_rate
    try:
        rate = operator.index(rate)
    except TypeError:
        rate = 0
    if not MIN_RATE <= rate <= MAX_RATE:
        kind = type(sample_rate).__name__
        raise DataError(f"sample_rate = {sample_rate} ({kind}): must be a whole number of Hz, {MIN_RATE} to {MAX_RATE}")
    return rate


def unreadable(path: str | Path, error: BadClip | OSError) -> DataError:
    """The message of a file that can't be read."""
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return DataError(f"{path}: can't be read as audio: {reason}; replace it or leave it out")


def _peak(waveform: np.ndarray) -> float:
    """How far samples reach towards full scale; more than 1 is beyond it."""
    return float(max(waveform.max(initial=0.0) / FULL_SCALE, -waveform.min(initial=0.0)))


def _gain(peak: float) -> np.float32:
    return np.float32(1 if peak <= 1 else 1 / peak)
