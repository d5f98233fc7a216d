"""Where an encoder's chunks lie in a clip, and the samples or stored rows that the front end needs for each.

In: a clip at the front end's rate, whole or as much of it as has come so far. Out: windows for LogMel, uncentred: its
log-mel of a window equals that slice of the whole clip's centred log-mel, so that clips of any length are encoded a
few chunks at a time. A clip whose last patch it does not fill counts as longer, by silence. No chunk holds another
clip's samples or padding beyond that patch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from msm_dist.config import Features
from msm_dist.data.logmel import HEADER_BYTES, fill_crop


class Chunk(NamedTuple):
    """Frames [first, first + frames) of a clip's log-mel: whole patches."""

    first: int
    frames: int


class Clip(Protocol):
    """What can be cut in chunks."""

    num_frames: int
    """Frames to encode: a multiple of the patch width."""

    def window(self, chunk: Chunk) -> Tensor:
        """What LogMel needs for a chunk: float32 [samples], or uint8 [frames, bands] of a stored log-mel."""

    def whole(self) -> np.ndarray:
        """The clip itself, without what fills its last patch: float32 [S], or uint8 [frames, bands]."""


@dataclass(frozen=True)
class Sound:
    """A clip's samples, float32 [s], its length S, and the number in it of the first of them."""

    samples: Tensor
    length: int
    features: Features
    width: int
    """Frames of a patch."""
    first: int = 0

    @property
    def num_frames(self) -> int:
        return whole_frames(self.length, self.features, self.width)

    def window(self, chunk: Chunk) -> Tensor:
        begin = window_begin(chunk.first, self.features)
        end = begin + self.features.crop_samples(chunk.frames)
        if begin >= self.first and end <= self.first + len(self.samples):
            return self.samples[begin - self.first : end - self.first]
        # The ends are reflected, that of a clip with an unfinished patch after the silence which fills it.
        last = max(self.length, self.features.hop * (self.num_frames - 1), self.features.n_fft // 2 + 1) - 1
        places = torch.arange(begin, end, device=self.samples.device).abs()
        places = last - (last - places).abs()
        values = self.samples[(places - self.first).clamp(0, len(self.samples) - 1)]
        return torch.where(places < self.length, values, 0.0)

    def whole(self) -> np.ndarray:
        return self.samples.numpy(force=True)


@dataclass(frozen=True)
class Stored:
    """A clip's stored log-mel, uint8 [num_frames, bands]: of whole patches (see `stored_clip`)."""

    codes: Tensor
    own_frames: int

    @property
    def num_frames(self) -> int:
        return len(self.codes)

    def window(self, chunk: Chunk) -> Tensor:
        return self.codes[chunk.first : chunk.first + chunk.frames]

    def whole(self) -> np.ndarray:
        return self.codes[: self.own_frames].numpy()


def stored_clip(content: memoryview | bytes, num_samples: int, features: Features, width: int) -> Stored:
    """A member of a log-mel shard (data/logmel.py) as a clip of `num_samples` at the front end's rate."""
    num_frames = whole_frames(num_samples, features, width)
    codes = np.empty((num_frames, features.n_mels), np.uint8)
    own = features.num_frames(num_samples)
    rows = memoryview(content)[HEADER_BYTES:]
    fill_crop(codes, rows[: codes.nbytes] if own >= num_frames else rows, own, features)
    return Stored(torch.from_numpy(codes), min(own, num_frames))


def whole_frames(num_samples: int | Tensor, features: Features, width: int) -> int | Tensor:
    """Frames of a clip's patches. A frame centred on the very end holds no new samples and opens no patch."""
    return -(-num_samples // (features.hop * width)) * width


def window_begin(frame: int, features: Features) -> int:
    """The first sample of a frame's window, negative before the clip."""
    return features.hop * frame - features.n_fft // 2


def chunks_of(num_frames: int, longest: int, first: int = 0) -> Iterator[Chunk]:
    """Frames [first, num_frames) in chunks of `longest`, the last at its own length."""
    for begin in range(first, num_frames, longest):
        yield Chunk(begin, min(longest, num_frames - begin))
