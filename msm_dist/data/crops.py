"""Crops of a corpus: found in memory-mapped shards, cut, decoded, and filled in where a clip is bad.

In: a Source and samples (epoch, clip, crop), or the number of a block of the plan. Out: int16 crops. A clip
that can't be decoded is no failure: the plan's rule replaces it, it is counted, and logged once per process.
Fails with DataError on a shard that vanished, changed its size or can't be read, and on a long stretch of the
plan without a readable clip.
"""

import itertools
import logging
import mmap
import os
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from msm_dist.config import Features
from msm_dist.data.audio import BadClip, decode_crop, num_target_samples
from msm_dist.data.index import Index, Shard, members
from msm_dist.data.plan import Plan, crop_offset, fill_block
from msm_dist.errors import DataError

log = logging.getLogger(__name__)

MAX_OPEN_SHARDS = 128
MAX_TABLES = 4096  # of clips, 30 kB each: a worker's lanes lie in that many shards before it needs one again
OPEN_RETRIES = 3
RETRY_SECONDS = 0.1  # before the first retry; doubled each time


@dataclass(frozen=True)
class Source:
    """What is read and how it is cut. `missing`: numbers of the shards known to be absent (check_shards)."""

    plan: Plan
    index: Index
    features: Features
    crop_frames: int
    missing: frozenset[int] = frozenset()


class Crop(NamedTuple):
    """int16 [features.crop_samples(crop_frames)], its first frame in the clip, the clip's key."""

    waveform: np.ndarray
    offset: int
    key: str


class Block(NamedTuple):
    """A block as served: int64 [block, 3] samples, their crops, stand-ins for bad and for missing clips."""

    number: int
    sample_ids: np.ndarray
    crops: list[Crop]
    num_bad: int
    num_missing: int


class CropReader:
    """Reads crops of a source. One per process, made in that process."""

    def __init__(self, source: Source):
        self._source = source
        self._open = lru_cache(MAX_OPEN_SHARDS)(_open_shard)
        self._members = lru_cache(MAX_TABLES)(members)
        self._reported: set[int] = set()

    def read(self, sample_ids: np.ndarray) -> list[Crop | None]:
        """The crops of int64 [n, 3] samples; None where the clip can't be decoded or its shard is missing.

        Raises DataError if a shard vanished, changed its size or can't be read.
        """
        source, features, frames = self._source, self._source.features, self._source.crop_frames
        numbers, places = source.plan.locate(sample_ids[:, 1])
        here = [i for i, number in enumerate(numbers.tolist()) if number not in source.missing]
        shards = [source.index.shards[numbers[i]] for i in here]
        rows = [self._members(shard)[place] for shard, place in zip(shards, places[here], strict=True)]
        lengths = np.array([self._padded_length(row) for row in rows], np.int64)
        offsets = crop_offset(source.plan.seed, sample_ids[here], features.num_frames(lengths) - frames)
        crops: list[Crop | None] = [None] * len(sample_ids)
        for i, shard, row, length, offset in zip(here, shards, rows, lengths, offsets.tolist(), strict=True):
            key = row["key"].decode(errors="backslashreplace")
            start = features.hop * offset - features.n_fft // 2
            stop = start + features.crop_samples(frames)
            try:
                waveform = decode_crop(self._encoded(shard, row), start, stop, length, features.sample_rate)
                crops[i] = Crop(waveform, offset, key)
            except BadClip as fault:
                if sample_ids[i, 1] not in self._reported:
                    log.warning("%s: clip %s: %s; another one stands in for it", shard.path, key, fault)
                self._reported.add(int(sample_ids[i, 1]))
        return crops

    def block(self, number: int) -> Block:
        """Block `number` of the plan, bad clips replaced. Raises DataError as `read` and `fill_block` do."""
        crops: dict[tuple[int, ...], Crop] = {}

        def reads(sample_ids: np.ndarray) -> np.ndarray:
            found = self.read(sample_ids)
            crops.update({tuple(s): crop for s, crop in zip(sample_ids.tolist(), found, strict=True) if crop})
            return np.array([crop is not None for crop in found])

        plan, missing = self._source.plan, self._source.missing
        sample_ids, filled = fill_block(plan, number, reads)
        shards, _ = plan.locate(plan.block_samples(number)[filled, 1])
        num_missing = sum(shard in missing for shard in shards.tolist())
        served = [crops[tuple(sample)] for sample in sample_ids.tolist()]
        return Block(number, sample_ids, served, int(filled.sum()) - num_missing, num_missing)

    def _padded_length(self, row: np.void) -> int:
        """Samples at the target rate; a short clip counts as padded to one crop."""
        features = self._source.features
        samples = num_target_samples(int(row["samples"]), int(row["rate"]), features.sample_rate)
        return max(samples, features.hop * (self._source.crop_frames - 1))

    def _encoded(self, shard: Shard, row: np.void) -> memoryview:
        content = self._open(shard)
        # Touching a page beyond the end of a file that shrank would kill the process.
        _check_size(shard, content.size())
        return memoryview(content)[row["offset"] : row["offset"] + row["size"]]


def _open_shard(shard: Shard) -> mmap.mmap:
    """The shard's bytes, mapped."""
    for pause in itertools.chain((RETRY_SECONDS * 2**retry for retry in range(OPEN_RETRIES)), [None]):
        try:
            with open(shard.path, "rb") as file:
                _check_size(shard, os.fstat(file.fileno()).st_size)
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            fault = error.strerror
        if pause is not None:
            time.sleep(pause)
    raise DataError(
        f"{shard.path}: can't be read ({fault}), tried {OPEN_RETRIES + 1} times; restore it and start again: "
        "the run continues from its last checkpoint"
    )


def _check_size(shard: Shard, size: int) -> None:
    if size != shard.bytes:
        raise DataError(
            f"{shard.path}: {size} bytes, its index says {shard.bytes}; restore it and start again: the run "
            "continues from its last checkpoint"
        )
