"""Crops of a corpus: found in its shards, cut, decoded, and filled in where a clip is bad.

In: a Source and samples (epoch, clip, crop), or numbers of blocks of the plan. Out: crops of int16 audio, or of
stored uint8 log-mel. A clip that can't be decoded is no failure: the plan's rule replaces it, it is counted, and
logged once per process. Fails with DataError on a shard that vanished, changed its size or can't be read, on one that
others have written to since the run began (`changed` names it; no crop of it is handed out), and on a long stretch of
the plan without a readable clip.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from msm_dist.config import Features
from msm_dist.data.audio import BadClip, Packed, decode_crops, num_target_samples
from msm_dist.data.index import Index, Shard, tables
from msm_dist.data.logmel import check_rows, crop_spans, fill_crop
from msm_dist.data.plan import Plan, crop_offset, fill_block
from msm_dist.data.storage import Access, Span, Stamp
from msm_dist.data.stores import FolderStores
from msm_dist.errors import ChangedShard, DataError

log = logging.getLogger(__name__)

MAX_TABLE_BYTES = 2**28  # of clips' tables, 63 B a clip: a worker's lanes lie in many shards before it needs one again
FETCH_BYTES = 32 * 2**20  # of clips at once, where they are no views of mapped files
MAX_SAMPLES = 2**40  # of a clip, by its sidecar


@dataclass(frozen=True)
class Source:
    """What is read and how it is cut.

    `missing`: numbers of the shards known to be absent (check_shards). `stamped`: what shards were when the run began;
    without, a shard is to stay as it is when it is first read.
    """

    plan: Plan
    index: Index
    features: Features
    crop_frames: int
    missing: frozenset[int] = frozenset()
    access: Access = Access()
    stamped: Mapping[str, Stamp] = field(default_factory=dict)


class Crop(NamedTuple):
    """Its values, its first frame in the clip, the clip's key.

    Values are int16 [features.crop_samples(crop_frames)] of audio, or uint8 [crop_frames, n_mels] of stored log-mel.
    """

    values: np.ndarray
    offset: int
    key: str


class Blocks(NamedTuple):
    """Blocks of the plan as served, joined: B crops in all."""

    numbers: np.ndarray
    """int64 [B]: each crop's block."""
    sample_ids: np.ndarray
    """int64 [B, 3]: epoch, clip, crop, stand-ins in place of what can't be served."""
    values: np.ndarray
    """int16 [B, S] or uint8 [B, T, F], as a Crop's."""
    offsets: np.ndarray
    """int64 [B]: first frame of each crop in its clip."""
    keys: list[str]
    num_bad: int
    """Stand-ins for clips that can't be decoded."""
    num_missing: int
    """Stand-ins for clips of missing shards."""


class _Table(NamedTuple):
    """A shard's clips: rows of its sidecar, and their lengths in samples at the target rate."""

    shard: Shard
    rows: np.ndarray
    lengths: np.ndarray

    @property
    def num_bytes(self) -> int:
        """Memory of the arrays."""
        return self.rows.nbytes + self.lengths.nbytes


class _Read(NamedTuple):
    """What reading n samples gave, beside their values: offsets int64 [n], keys, which are good bool [n]."""

    offsets: np.ndarray
    keys: list[str]
    good: np.ndarray


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
        self._store = FolderStores(source.access, source.stamped)
        self._known: dict[int, _Table] = {}
        self._known_bytes = 0
        self._missing = np.array(sorted(source.missing), np.int64)
        self._like = no_crop(source.index.kind, source.features, source.crop_frames)
        self._reported: set[int] = set()
        self._used: set[int] = set()

    def read(self, sample_ids: np.ndarray) -> list[Crop | None]:
        """The crops of int64 [n, 3] samples; None where the clip can't be decoded or its shard is missing.

        Raises DataError if a shard vanished, changed its size or can't be read.
        """
        values = self._room(len(sample_ids))
        with self._confirmed():
            found = self._read(sample_ids, values)
        crops = zip(values, found.offsets.tolist(), found.keys, found.good.tolist(), strict=True)
        return [Crop(*crop) if good else None for *crop, good in crops]

    def blocks(self, numbers: Sequence[int], values: np.ndarray | None = None) -> Blocks:
        """Blocks of the plan, bad clips replaced; their crops are written into `values`, if given.

        Raises DataError as `read` and `fill_block` do.
        """
        sample_ids = np.concatenate([self._source.plan.block_samples(number) for number in numbers])
        values = self._room(len(sample_ids)) if values is None else values
        with self._confirmed():
            return self._blocks(numbers, sample_ids, values)

    def _blocks(self, numbers: Sequence[int], sample_ids: np.ndarray, values: np.ndarray) -> Blocks:
        plan, size = self._source.plan, self._source.plan.block
        found = self._read(sample_ids, values)
        num_bad = num_missing = 0
        for i in np.flatnonzero(~found.good.reshape(-1, size).all(axis=1)).tolist():
            at = slice(i * size, (i + 1) * size)
            part = _Read(found.offsets[at], found.keys[at], found.good[at])
            filled = self._fill(numbers[i], sample_ids[at], values[at], part)
            found.keys[at] = part.keys
            shards, _ = plan.locate(plan.block_samples(numbers[i])[filled, 1])
            absent = int(np.isin(shards, self._missing).sum())
            num_missing += absent
            num_bad += len(shards) - absent
        return Blocks(np.repeat(numbers, size), sample_ids, values, found.offsets, found.keys, num_bad, num_missing)

    @contextmanager
    def _confirmed(self) -> Iterator[None]:
        """Raise DataError after the block where a shard it read was changed, also where that made it fail."""
        self._used.clear()
        try:
            yield
        except DataError:
            self._confirm()
            raise
        self._confirm()

    def _confirm(self) -> None:
        shards = [self._source.index.shards[number] for number in self._used]
        changes = self._store.confirm([shard.location for shard in shards])
        if changed := [shard for shard in shards if shard.location in changes]:
            told = [f"{shard.location} {changes[shard.location]} (sha256 {shard.sha256})" for shard in changed]
            error = DataError(
                f"{'; '.join(told)} since the run began; nothing of it is trained on. Restore it as it was, with that "
                "sha256, and start again: the run continues from its last checkpoint"
            )
            error.changed = tuple(ChangedShard(shard.name, shard.location, shard.sha256) for shard in changed)
            raise error

    def _fill(self, number: int, sample_ids: np.ndarray, values: np.ndarray, found: _Read) -> np.ndarray:
        """Replace in place what can't be served of a block that was read; returns which slots: bool [block]."""
        known = dict(zip(map(tuple, sample_ids.tolist()), zip(values.copy(), *found, strict=True), strict=True))

        def reads(asked: np.ndarray) -> np.ndarray:
            new = np.array([sample for sample in asked.tolist() if tuple(sample) not in known], np.int64).reshape(-1, 3)
            crops = self._room(len(new))
            known.update(zip(map(tuple, new.tolist()), zip(crops, *self._read(new, crops), strict=True), strict=True))
            return np.array([known[tuple(sample)][-1] for sample in asked.tolist()])

        sample_ids[:], filled = fill_block(self._source.plan, number, reads)
        for i, sample in enumerate(sample_ids.tolist()):
            values[i], found.offsets[i], found.keys[i], _ = known[tuple(sample)]
        return filled

    def _room(self, num_crops: int) -> np.ndarray:
        return np.empty((num_crops, *self._like.shape), self._like.dtype)

    def _tables(self, numbers: Sequence[int]) -> dict[int, _Table]:
        """The clips of shards; what is not known of them is read at once. Raises DataError."""
        new = [number for number in numbers if number not in self._known]
        shards = [self._source.index.shards[number] for number in new]
        for number, shard, rows in zip(new, shards, tables(shards, self._store), strict=True):
            self._known[number] = self._table(shard, rows)
            self._known_bytes += self._known[number].num_bytes
        found = {number: self._known[number] for number in numbers}
        while self._known_bytes > MAX_TABLE_BYTES and self._known:
            self._known_bytes -= self._known.pop(next(iter(self._known))).num_bytes
        return found

    def _table(self, shard: Shard, rows: np.ndarray) -> _Table:
        features = self._source.features
        if (rows["samples"] > MAX_SAMPLES).any():
            raise DataError(f"{shard.members_location}: a clip of {rows['samples'].max()} samples; pack it again")
        lengths = num_target_samples(rows["samples"], rows["rate"], features.sample_rate)
        if self._source.index.kind == "logmel":
            check_rows(rows, features.num_frames(lengths), features)
        return _Table(shard, rows, lengths)

    def _read(self, sample_ids: np.ndarray, values: np.ndarray) -> _Read:
        """Write the crops of int64 [n, 3] samples into `values`."""
        source, frames = self._source, self._source.crop_frames
        numbers, places = source.plan.locate(sample_ids[:, 1])
        good = ~np.isin(numbers, self._missing)
        here = np.flatnonzero(good)
        places = places.tolist()
        shards = np.unique(numbers[here]).tolist()
        self._used.update(shards)
        known = self._tables(shards)
        clips = [(known[number], places[i]) for i, number in zip(here.tolist(), numbers[here].tolist(), strict=True)]
        lengths = np.array([table.lengths[place] for table, place in clips], np.int64)
        padded = np.maximum(lengths, source.features.hop * (frames - 1))
        offsets, keys = np.zeros(len(sample_ids), np.int64), [""] * len(sample_ids)
        offsets[here] = crop_offset(source.plan.seed, sample_ids[here], source.features.num_frames(padded) - frames)
        for i, (table, place) in zip(here.tolist(), clips, strict=True):
            keys[i] = table.rows["key"][place].decode(errors="backslashreplace")
        if source.index.kind == "logmel":
            self._cut_logmels(clips, lengths, offsets[here], here.tolist(), values)
        else:
            self._decode(clips, padded, sample_ids, offsets, here.tolist(), values, good)
        return _Read(offsets, keys, good)

    def _cut_logmels(
        self,
        clips: Sequence[tuple[_Table, int]],
        lengths: np.ndarray,
        offsets: np.ndarray,
        rows: Sequence[int],
        values: np.ndarray,
    ) -> None:
        """Crops of stored log-mels into rows of `values`."""
        features, frames = self._source.features, self._source.crop_frames
        members_of = [table.rows[place] for table, place in clips]
        begins = np.array([row["offset"] for row in members_of], np.int64)
        sizes = np.array([row["size"] for row in members_of], np.int64)
        num_frames = features.num_frames(lengths)
        starts, stops = crop_spans(begins, sizes, num_frames, offsets, frames, features.n_mels)
        contents = self._fetched([table.shard for table, _ in clips], starts.tolist(), stops.tolist())
        for i, content, length in zip(rows, contents, num_frames.tolist(), strict=True):
            fill_crop(values[i], content, length, features)

    def _decode(
        self,
        clips: Sequence[tuple[_Table, int]],
        padded: np.ndarray,
        sample_ids: np.ndarray,
        offsets: np.ndarray,
        rows: Sequence[int],
        values: np.ndarray,
        good: np.ndarray,
    ) -> None:
        """Crops of audio into rows of `values`; those of one clip that follow each other are decoded together."""
        features, num_samples = self._source.features, self._like.shape[0]
        new = np.ones(len(rows), bool)
        new[1:] = (np.diff(sample_ids[rows, :2], axis=0) != 0).any(axis=1)
        firsts = np.flatnonzero(new).tolist()
        here = [(clips[first][0], clips[first][0].rows[clips[first][1]]) for first in firsts]
        begins = [int(row["offset"]) for _, row in here]
        stops = [int(row["offset"] + row["size"]) for _, row in here]
        contents = self._fetched([table.shard for table, _ in here], begins, stops)
        for (table, row), content, first, end in zip(here, contents, firsts, [*firsts, len(rows)][1:], strict=True):
            slots = list(rows[first:end])
            starts = (features.hop * offsets[slots] - features.n_fft // 2).tolist()
            length = int(padded[first])
            try:
                crops = decode_crops(content, starts, num_samples, length, features.sample_rate, packed_as(row))
                for slot, crop in zip(slots, crops, strict=True):
                    values[slot] = crop
            except BadClip as fault:
                good[slots] = False
                self._report(int(sample_ids[slots[0], 1]), table.shard, row, fault)

    def _report(self, clip: int, shard: Shard, row: np.void, fault: BadClip) -> None:
        if clip not in self._reported:
            key = row["key"].decode(errors="backslashreplace")
            log.warning("%s: clip %s: %s; another one stands in for it", shard.location, key, fault)
        self._reported.add(clip)

    def _fetched(self, shards: Sequence[Shard], starts: Sequence[int], stops: Sequence[int]) -> Iterator[memoryview]:
        """The bytes [start, stop) of shards in their order, so many at a time that they don't fill the memory."""
        spans: list[Span] = []
        num_bytes = 0
        for shard, start, stop in zip(shards, starts, stops, strict=True):
            if spans and num_bytes + stop - start > FETCH_BYTES:
                yield from self._store.fetch(spans)
                spans, num_bytes = [], 0
            spans.append(Span(shard.location, shard.bytes, start, stop))
            num_bytes += stop - start
        if spans:
            yield from self._store.fetch(spans)
