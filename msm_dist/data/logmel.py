"""Stored log-mels: a clip's member in a shard of kind "logmel".

In: quantised log-mels, or a member's place. Out: the member's bytes, the place of a crop in them, the crop. The
member `<key>.logmel.npy` is an ordinary .npy file of uint8 [T, F], time-major: a crop is one run of bytes. Fails with
DataError on a member that is not as long as its clip.
"""

import io

import numpy as np
import torch

from msm_dist.config import Features
from msm_dist.data.audio import num_target_samples
from msm_dist.errors import DataError
from msm_dist.features import LogMel, quantize

SUFFIX = ".logmel.npy"
HEADER_BYTES = 128  # of a .npy file of this kind


def encode_logmel(codes: np.ndarray) -> bytes:
    """The member of uint8 [T, F]."""
    file = io.BytesIO()
    np.lib.format.write_array(file, np.ascontiguousarray(codes), version=(1, 0), allow_pickle=False)
    return file.getvalue()


def encode_clip(samples: np.ndarray, front_end: LogMel) -> bytes:
    """The member of a whole clip, int16 [S] at the front end's rate: its centred log-mel, quantised."""
    return encode_logmel(quantize(front_end(torch.from_numpy(samples[None]), centred=True))[0, 0].numpy())


def logmel_span(row: np.void, features: Features, offset: int, frames: int) -> tuple[int, int]:
    """Where in the tar the frames [offset, offset + frames) of a clip lie, as far as it has them. Raises DataError."""
    samples = num_target_samples(int(row["samples"]), int(row["rate"]), features.sample_rate)
    num_frames = features.num_frames(samples)
    if int(row["size"]) != HEADER_BYTES + num_frames * features.n_mels:
        raise DataError(
            f"{row['key'].decode(errors='replace')}: its stored log-mel has {row['size']} bytes, {num_frames} frames "
            f"of {features.n_mels} bands need {HEADER_BYTES + num_frames * features.n_mels}; pack the log-mels again"
        )
    begin = int(row["offset"]) + HEADER_BYTES
    return begin + offset * features.n_mels, begin + min(offset + frames, num_frames) * features.n_mels


def cut_logmel(content: memoryview, features: Features, frames: int) -> np.ndarray:
    """The crop uint8 [frames, F] of the bytes at its span; frames that a short clip lacks are silence (0)."""
    crop = np.zeros((frames, features.n_mels), np.uint8)
    crop.reshape(-1)[: len(content)] = np.frombuffer(content, np.uint8)
    return crop
