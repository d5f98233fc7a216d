"""Audio files as waveforms, read as training reads them.

In: the path of a file: wav, flac, ogg, opus or mp3, and with the extra [video] m4a, mp4, webm, mkv, mka, mov or aac;
the content decides, never the name. Out: mono float32 in -1..1. Fails with DataError, which names the file and what
is wrong with it.
"""

from pathlib import Path

import numpy as np

from msm_dist.data import media
from msm_dist.data.audio import FULL_SCALE, BadClip
from msm_dist.errors import DataError


def read_audio(path: str | Path, sample_rate: int | None = None) -> tuple[np.ndarray, int]:
    """A whole recording, float32 [S] in -1..1, and its rate in Hz: its own, or `sample_rate`.

    Resampled as in training. Channels are averaged. What is louder than full scale is scaled down as a whole, as in
    packing. Raises DataError.
    """
    try:
        with open(path, "rb") as file:
            encoded = media.whole_if_small(file)
            info = media.probe(encoded)
            rate = sample_rate or info.sample_rate
            waveform = media.decode_span(encoded, 0, info.samples, rate)
    except (BadClip, OSError) as error:
        raise unreadable(path, error) from None
    return within_full_scale(waveform), rate


def within_full_scale(waveform: np.ndarray) -> np.ndarray:
    """Float32 [S], scaled down as a whole where it exceeds -1..1, by the gain of `audio.fit_int16`."""
    peak = max(waveform.max(initial=0.0) / FULL_SCALE, -waveform.min(initial=0.0))
    return waveform if peak <= 1 else waveform * np.float32(1 / peak)


def unreadable(path: str | Path, error: BadClip | OSError) -> DataError:
    """The message of a file that can't be read."""
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return DataError(f"{path}: can't be read as audio: {reason}; replace it or leave it out")
