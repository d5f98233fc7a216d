"""Stored log-mels: a clip's member in a shard of kind "logmel".

In: whole clips, or a member's place. Out: the member's bytes, the place of a crop in them, the crop. The member
`<key>.logmel.npy` is an ordinary .npy file of uint8 [T + tail, F], time-major: a crop is one run of bytes. Row t < T is
frame t of the clip's centred log-mel. The few rows behind them are the frames around the clip's end as they are where
silence follows it instead of its reflection: what a crop that is longer than the clip holds there. Fails with
DataError on a member that is not as long as its clip.
"""

import io
import re

import numpy as np
import torch

from msm_dist.config import Features
from msm_dist.errors import DataError
from msm_dist.features import CODE_LOW, LogMel, quantize

SUFFIX = ".logmel.npy"
HEADER_BYTES = 128  # of a .npy file of this kind
CHUNK_FRAMES = 6_000
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00v\x00\{'descr': '\|u1', 'fortran_order': False, "
    rb"'shape': \((?P<rows>[0-9]{1,15}), (?P<bands>[0-9]{1,9})\), \} *\n"
)


def encode_logmel(codes: np.ndarray) -> bytes:
    """The member of uint8 [T + tail, F]."""
    file = io.BytesIO()
    np.lib.format.write_array(file, np.ascontiguousarray(codes), version=(1, 0), allow_pickle=False)
    return file.getvalue()


def encode_clip(samples: np.ndarray, front_end: LogMel) -> bytes:
    """The member of a whole clip, int16 [S] at the front end's rate."""
    return encode_logmel(clip_codes(samples, front_end))


def clip_codes(samples: np.ndarray, front_end: LogMel) -> np.ndarray:
    """The rows of a whole clip's member, uint8 [T + tail, F]; hours of audio take the memory of a minute."""
    features = front_end.features
    hop, margin, num_frames = features.hop, features.n_fft // 2, features.num_frames(len(samples))
    after = tail_reach(features)
    before = min(num_frames, after)
    padded = np.pad(samples, (0, max(0, margin + 1 - len(samples))))
    padded = np.pad(padded, (margin, features.n_fft - margin), mode="reflect")
    codes = np.empty((num_frames + before + after, features.n_mels), np.uint8)
    for first in range(0, num_frames, CHUNK_FRAMES):
        last = min(first + CHUNK_FRAMES, num_frames) - 1
        codes[first : last + 1] = _codes(padded[hop * first : hop * last + features.n_fft], front_end)
    ending = padded[hop * (num_frames - before) : margin + len(samples)]
    missing = features.crop_samples(before + after) - len(ending)
    codes[num_frames:] = _codes(np.pad(ending, (0, missing)), front_end)
    return codes


def stored_codes(member: bytes | memoryview) -> np.ndarray:
    """The rows of a member, uint8 [T + tail, F]: a view of it. Raises ValueError.

    Only the header that `encode_logmel` writes is read: those of other arrays may ask for pickled objects, or for more
    memory than there are bytes behind them.
    """
    header = _HEADER.match(member[:HEADER_BYTES])
    if header is None or header.end() != HEADER_BYTES:
        raise ValueError("the header of its .npy file is damaged, or not that of uint8 [frames, bands]")
    rows, bands = int(header["rows"]), int(header["bands"])
    if rows * bands != len(member) - HEADER_BYTES or not bands:
        raise ValueError(f"holds uint8 [{rows}, {bands}] in {len(member)} bytes, {HEADER_BYTES} of them a header")
    return np.frombuffer(member, np.uint8, offset=HEADER_BYTES).reshape(rows, bands)


def tail_reach(features: Features) -> int:
    """Frames on either side of a clip's end that hear it: those of the tail."""
    return -(-(features.n_fft // 2) // features.hop)


def code_sums(codes: np.ndarray, front_end: LogMel) -> np.ndarray:
    """What stats.combine adds up, of stored values uint8 [T, F] (without the tail): float64 [1 + 2 F]."""
    counts = codes.astype(np.int64)
    ones, squares, step = counts.sum(0), (counts * counts).sum(0), front_end.code_step
    values = len(codes) * CODE_LOW + step * ones
    powers = len(codes) * CODE_LOW**2 + 2 * CODE_LOW * step * ones + step * step * squares
    return np.concatenate([[len(codes)], values, powers])


def check_rows(table: np.ndarray, num_frames: np.ndarray, features: Features) -> None:
    """Raise DataError where a member of a shard (rows of its sidecar) has not the bytes of its clip's frames."""
    reach = tail_reach(features)
    sizes = HEADER_BYTES + (num_frames + np.minimum(num_frames, reach) + reach) * features.n_mels
    wrong = np.flatnonzero(table["size"] != sizes)
    if len(wrong):
        row = table[wrong[0]]
        raise DataError(
            f"{row['key'].decode(errors='replace')}: its stored log-mel has {row['size']} bytes, "
            f"{num_frames[wrong[0]]} frames of {features.n_mels} bands need {sizes[wrong[0]]}; pack the log-mels again"
        )


def crop_spans(
    begins: np.ndarray, sizes: np.ndarray, num_frames: np.ndarray, offsets: np.ndarray, frames: int, n_mels: int
) -> tuple[np.ndarray, np.ndarray]:
    """Where in their tars the frames [offset, offset + frames) of clips lie, int64 [n] each: begin and end.

    `begins`, `sizes` int64 [n] are the members'. Of a clip shorter than the crop it is all rows.
    """
    first = begins + HEADER_BYTES + offsets * n_mels
    return first, np.where(num_frames < frames, begins + sizes, first + frames * n_mels)


def fill_crop(crop: np.ndarray, content: memoryview, num_frames: int, features: Features) -> None:
    """Write the bytes at a crop's span into uint8 [frames, F]; behind a short clip and its tail is silence (0)."""
    rows = np.frombuffer(content, np.uint8).reshape(-1, features.n_mels)
    if num_frames >= len(crop):
        crop[:] = rows
        return
    reach = tail_reach(features)
    own = num_frames - min(num_frames, reach)
    ending = rows[num_frames:][: len(crop) - own]
    crop[:own], crop[own : own + len(ending)], crop[own + len(ending) :] = rows[:own], ending, 0


def _codes(samples: np.ndarray, front_end: LogMel) -> np.ndarray:
    return quantize(front_end(torch.from_numpy(samples[None])), front_end.code_step)[0, 0].numpy()
