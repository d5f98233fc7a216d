"""Crops of a corpus: found in its shards, cut, decoded, and filled in where a clip is bad.

In: a Source and samples (epoch, clip, crop), or the number of a block of the plan. Out: crops of int16 audio, or of
stored uint8 log-mel. A clip
that can't be decoded is no failure: the plan's rule replaces it, it is counted, and logged once per process.
Fails with DataError on a shard that vanished, changed its size or can't be read, and on a long stretch of the
plan without a readable clip.
"""

import logging
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from msm_dist.config import Features
from msm_dist.data.audio import BadClip, Packed, decode_crop, num_target_samples
from msm_dist.data.index import Index, Shard, members
from msm_dist.data.logmel import cut_logmel, logmel_span
from msm_dist.data.plan import Plan, crop_offset, fill_block
from msm_dist.data.storage import Access, Span, open_store

log = logging.getLogger(__name__)

MAX_TABLES = 4096  # of clips, 30 kB each: a worker's lanes lie in that many shards before it needs one again


@dataclass(frozen=True)
class Source:
    """What is read and how it is cut. `missing`: numbers of the shards known to be absent (check_shards)."""

    plan: Plan
    index: Index
    features: Features
    crop_frames: int
    missing: frozenset[int] = frozenset()
    access: Access = Access()


class Crop(NamedTuple):
    """Its values, its first frame in the clip, the clip's key.

    Values are int16 [features.crop_samples(crop_frames)] of audio, or uint8 [crop_frames, n_mels] of stored log-mel.
    """

    values: np.ndarray
    offset: int
    key: str


class Block(NamedTuple):
    """A block as served: int64 [block, 3] samples, their crops, stand-ins for bad and for missing clips."""

    number: int
    sample_ids: np.ndarray
    crops: list[Crop]
    num_bad: int
    num_missing: int


def no_crop(kind: str, features: Features, frames: int) -> np.ndarray:
    """The values of a crop of silence."""
    if kind == "logmel":
        return np.zeros((frames, features.n_mels), np.uint8)
    return np.zeros(features.crop_samples(frames), np.int16)


def packed_as(row: np.void) -> Packed:
    """What a row of a sidecar says of its clip's audio."""
    return Packed(int(row["samples"]), int(row["rate"]), row["format"].decode(errors="replace"))


class CropReader:
    """Reads crops of a source. One per process, made in that process."""

    def __init__(self, source: Source):
        self._source = source
        self._store = open_store(source.index.location, source.access)
        self._members = lru_cache(MAX_TABLES)(lambda shard: members(shard, self._store))
        self._reported: set[int] = set()

    def read(self, sample_ids: np.ndarray) -> list[Crop | None]:
        """The crops of int64 [n, 3] samples; None where the clip can't be decoded or its shard is missing.

        Raises DataError if a shard vanished, changed its size or can't be read.
        """
        source, frames = self._source, self._source.crop_frames
        numbers, places = source.plan.locate(sample_ids[:, 1])
        here = [i for i, number in enumerate(numbers.tolist()) if number not in source.missing]
        shards = [source.index.shards[numbers[i]] for i in here]
        rows = [self._members(shard)[place] for shard, place in zip(shards, places[here], strict=True)]
        lengths = np.array([self._padded_length(row) for row in rows], np.int64)
        max_offsets = source.features.num_frames(lengths) - frames
        offsets = crop_offset(source.plan.seed, sample_ids[here], max_offsets).tolist()
        spans = [self._span(*place) for place in zip(shards, rows, offsets, strict=True)]
        crops: list[Crop | None] = [None] * len(sample_ids)
        found = zip(here, shards, rows, lengths.tolist(), offsets, self._store.fetch(spans), strict=True)
        for i, shard, row, length, offset, content in found:
            key = row["key"].decode(errors="backslashreplace")
            try:
                crops[i] = Crop(self._cut(content, row, length, offset), offset, key)
            except BadClip as fault:
                if sample_ids[i, 1] not in self._reported:
                    log.warning("%s: clip %s: %s; another one stands in for it", shard.location, key, fault)
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

    def _span(self, shard: Shard, row: np.void, offset: int) -> Span:
        """The bytes of the shard that hold a crop."""
        start, stop = int(row["offset"]), int(row["offset"] + row["size"])
        if self._source.index.kind == "logmel":
            start, stop = logmel_span(row, self._source.features, offset, self._source.crop_frames)
        return Span(shard.location, shard.bytes, start, stop)

    def _cut(self, content: memoryview, row: np.void, length: int, offset: int) -> np.ndarray:
        """A crop's values. Raises BadClip."""
        features, frames = self._source.features, self._source.crop_frames
        if self._source.index.kind == "logmel":
            return cut_logmel(content, features, frames)
        start = features.hop * offset - features.n_fft // 2
        stop, packed = start + features.crop_samples(frames), packed_as(row)
        return decode_crop(content, start, stop, length, features.sample_rate, packed)
