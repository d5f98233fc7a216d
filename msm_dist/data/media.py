"""A source file of any kind, for packing and embedding: what its header says, and spans of it.

In: an open binary file or bytes. The content decides whether libsndfile (audio.py) or FFmpeg (containers.py) reads it,
never its name. Out: AudioInfo; mono samples as int16 with the gain that keeps them within full scale, or as they are in
float32. Fails with BadClip.
"""

import io
import os
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from msm_dist.config import Features
from msm_dist.data import audio, containers
from msm_dist.data.audio import AudioInfo, BadClip, fit_int16, num_target_samples

SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3"})
READ_AT_ONCE = 2**25
"""Bytes of a file that is taken into memory as a whole: only so are all pages of an ogg file checked."""

Encoded = bytes | BinaryIO


def probe(encoded: Encoded) -> AudioInfo:
    """Read the header. Raises BadClip."""
    return _reader(encoded).probe(encoded)


def read_span(encoded: Encoded, start: int, stop: int, sample_rate: int) -> tuple[np.ndarray, float]:
    """Samples [start, stop), at the file's own rate, as int16 [S] at `sample_rate`; and their gain. Raises BadClip."""
    return fit_int16(decode_span(encoded, start, stop, sample_rate))


def decode_span(encoded: Encoded, start: int, stop: int, sample_rate: int) -> np.ndarray:
    """Samples [start, stop), at the file's own rate, as float32 [S] at `sample_rate`, unscaled. Raises BadClip."""
    return _reader(encoded).decode_span(encoded, start, stop, sample_rate)


def decode_blocks(encoded: Encoded) -> Iterator[np.ndarray]:
    """The whole in blocks, float32 mono [S] each, unscaled, at its own rate: memory holds one. Raises BadClip."""
    yield from _reader(encoded).decode_blocks(encoded)


def whole_if_small(file: BinaryIO) -> Encoded:
    """The bytes of a file, or itself where it is long."""
    return file.read() if os.fstat(file.fileno()).st_size <= READ_AT_ONCE else file


def check_length(samples: int, rate: int, features: Features) -> None:
    """Raise BadClip if a clip is shorter than one analysis window."""
    if num_target_samples(samples, rate, features.sample_rate) < features.n_fft:
        raise BadClip("too_short", f"{samples} samples at {rate} Hz, less than one window of {features.n_fft}")


def _reader(encoded: Encoded):
    """The module that reads this content."""
    file = io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded
    file.seek(0)
    head = file.read(12)
    file.seek(0)
    return containers if containers.is_container(head) else audio
