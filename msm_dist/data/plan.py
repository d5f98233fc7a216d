"""The order of a run: which sample stands where, as a pure function of a few numbers.

In: clips per shard, seed, lanes, block, shuffle_window, crops_per_clip. Out: for a global block number its
samples (epoch, clip, crop), for a rank its micro-batches, for a sample its crop offset, for a bad clip its
stand-in. World size, worker count and micro-batch only say who serves which block. Fails with ConfigError on
sizes that don't fit the corpus, with DataError on a corpus that is empty or unreadable over a long stretch.

Legend. An epoch shuffles the shards, joins them to a ring of N positions, starts at a drawn position (so that
the N % lanes clips that sit out change even if there is one shard) and cuts `lanes` contiguous ranges. A lane
permutes inside windows of `shuffle_window` clips and runs on into the next epoch. Its crops are cut into
blocks; global block n is place n // lanes of lane n % lanes. A run's cursor is the number of blocks consumed:
step s takes blocks [s * G, (s + 1) * G), G = global_batch / block.

Random numbers come from counters, never from state. Permutations sort raw words of numpy's Philox4x64-10
(key: seed, purpose; counter words from 1: window, lane, epoch). Draws of single samples use Philox4x32-10 as
the masks do (key: seed low, seed high; counter: group, crop + (tag << 24), clip, epoch).
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol

import numpy as np

from msm_dist.errors import ConfigError, DataError

MIN_LANE_CLIPS = 64
SHORT_LANE_CLIPS = 8
FILL_REACH = 1000  # places searched in either direction for the stand-in of a bad clip
CROP_BITS = 24  # of a Philox counter word; the tag stands above
CROP_OFFSET_TAG = 2  # 1 belongs to the masks

CACHED_POSITIONS = 2**20  # of permutations, 8 MB

_SHARDS, _START, _WINDOW = 1, 2, 3  # purposes of permutations; 4 and 5 are those of data/mix.py
_CACHED_EPOCHS = 4
_UINT32 = np.uint64(0xFFFFFFFF)

Reads = Callable[[np.ndarray], np.ndarray]


class Order(Protocol):
    """What a reader needs of a plan: this module's, or one of several sources (data/mix.py)."""

    seed: int
    lanes: int
    block: int
    crops_per_clip: int

    @property
    def num_clips(self) -> int:
        """Clips of the corpus."""

    @property
    def most_lanes(self) -> int:
        """The largest data.lanes that the corpus allows."""

    def block_samples(self, n: int) -> np.ndarray:
        """Samples of global block n: int64 [block, 3] of (epoch, clip, crop)."""

    def locate(self, clips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard number and position inside the shard of each clip."""


@dataclass(frozen=True, eq=False)
class Plan:
    """The order of one corpus; build it with `make_plan`. Clip numbers count in index order from 0."""

    shard_ends: np.ndarray
    """int64 [shards]: clips up to and including each shard, in index order."""
    seed: int
    lanes: int
    block: int
    shuffle_window: int
    crops_per_clip: int
    _epochs: OrderedDict[Hashable, Any] = field(default_factory=OrderedDict, repr=False)
    _windows: OrderedDict[Hashable, Any] = field(default_factory=OrderedDict, repr=False)

    @property
    def num_clips(self) -> int:
        """Clips of the corpus."""
        return int(self.shard_ends[-1])

    @property
    def lane_clips(self) -> int:
        """Clips of one lane in one epoch."""
        return self.num_clips // self.lanes

    @property
    def clips_per_epoch(self) -> int:
        """Clips served in one epoch: all but the num_clips % lanes that sit out."""
        return self.lanes * self.lane_clips

    @property
    def most_lanes(self) -> int:
        """The largest data.lanes that the corpus allows."""
        return most_lanes(self.num_clips)

    def block_samples(self, n: int) -> np.ndarray:
        """Samples of global block n: int64 [block, 3] of (epoch, clip, crop)."""
        place, lane = divmod(n, self.lanes)
        num_clips = self.block // self.crops_per_clip
        served = np.arange(place * num_clips, (place + 1) * num_clips)
        epochs, ranks = np.divmod(served, self.lane_clips)
        windows = ranks // self.shuffle_window
        clips = np.empty_like(served)
        for epoch, window in dict.fromkeys(zip(epochs.tolist(), windows.tolist(), strict=True)):
            here = (epochs == epoch) & (windows == window)
            first = window * self.shuffle_window
            order = self._window_order(epoch, lane, window)
            positions = lane * self.lane_clips + first + order[ranks[here] - first]
            clips[here] = self._clips_at(epoch, positions)
        samples = np.empty((num_clips, self.crops_per_clip, 3), np.int64)
        samples[:, :, 0] = epochs[:, None]
        samples[:, :, 1] = clips[:, None]
        samples[:, :, 2] = np.arange(self.crops_per_clip)
        return samples.reshape(self.block, 3)

    def locate(self, clips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard number and position inside the shard of each clip, both int64 shaped like `clips`."""
        return locate_clips(self.shard_ends, clips)

    def _clips_at(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        order, ends, start = cached(self._epochs, epoch, lambda: self._shuffle_shards(epoch), _CACHED_EPOCHS)
        positions = (positions + start) % self.num_clips
        turns = np.searchsorted(ends, positions, side="right")
        return self.shard_ends[order[turns]] - (ends[turns] - positions)

    def _shuffle_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
        """The epoch's order of shards, the clips up to the end of each, and where the ring starts."""
        order = permutation(self.seed, _SHARDS, len(self.shard_ends), epoch=epoch)
        ends = np.cumsum(np.diff(self.shard_ends, prepend=0)[order])
        return order, ends, int(raw_words(self.seed, _START, 1, epoch=epoch)[0]) % self.num_clips

    def _window_order(self, epoch: int, lane: int, window: int) -> np.ndarray:
        size = min(self.shuffle_window, self.lane_clips - window * self.shuffle_window)
        # Lanes go on side by side: two windows of each are all that is used again, however small they are.
        return cached(
            self._windows,
            (epoch, lane, window),
            lambda: permutation(self.seed, _WINDOW, size, epoch=epoch, lane=lane, window=window),
            max(1, min(2 * self.lanes, CACHED_POSITIONS // min(self.shuffle_window, self.lane_clips))),
        )


def make_plan(
    shard_clips: Sequence[int],
    seed: int,
    lanes: int | None,
    block: int,
    shuffle_window: int,
    crops_per_clip: int,
) -> Plan:
    """The plan of a corpus with `shard_clips` clips in each shard; lanes None: as many as the corpus allows.

    Raises DataError on an empty corpus, ConfigError on too many lanes for it, or too large a block.
    """
    ends = np.cumsum(np.asarray(shard_clips, np.int64))
    num_clips = int(ends[-1]) if len(ends) else 0
    if num_clips == 0:
        raise DataError("data.shards: the index lists 0 clips; pack audio with `msm-dist data pack SRC OUT`")
    most, default = most_lanes(num_clips), default_lanes(num_clips)
    if lanes is not None and lanes > most:
        raise ConfigError(
            f"data.lanes = {lanes}: the corpus has {num_clips} clips and a lane given here needs "
            f"{MIN_LANE_CLIPS} of them; choose at most {most}, or leave it out to get {default}"
        )
    check_block(block)
    return Plan(ends, seed, lanes or default, block, shuffle_window, crops_per_clip)


def check_block(block: int) -> None:
    """Raise ConfigError on a block so large that stand-ins' numbers would not fit."""
    largest = 2**CROP_BITS // (2 * FILL_REACH + 2)
    if block > largest:
        raise ConfigError(f"data.block = {block}: must not exceed {largest}; choose a smaller one, 8 is usual")


def most_lanes(num_clips: int) -> int:
    """The largest data.lanes that so many clips allow."""
    return max(1, num_clips // MIN_LANE_CLIPS)


def default_lanes(num_clips: int, smallest: int | None = None) -> int:
    """Lanes that a corpus gets: the largest of 240, 480, 960, ... that leaves each 64 clips.

    Below 15,360 clips the choice is 1, 2, 4, ... 128. Up to 8 lanes may be as short as 8 clips, and two as short
    as one, so that a few processes can share a small corpus. Where several sources mix, each lane also gets 8 clips
    of the `smallest`, but for such short lanes.
    """
    most = max(_short_lanes(num_clips), num_clips // MIN_LANE_CLIPS)
    if smallest is not None:
        most = min(most, max(_short_lanes(smallest), smallest // SHORT_LANE_CLIPS))
    unit = 240 if most >= 240 else 1
    return unit << (most // unit).bit_length() - 1


def check_lanes(plan: Order, world_size: int, num_workers: int) -> None:
    """Raise ConfigError, with the valid choices, unless lanes spread evenly over all loader workers."""
    workers = max(1, num_workers)
    if plan.lanes % (world_size * workers) == 0:
        return
    remedies = []
    if plan.lanes % world_size == 0:
        fits = [k for k in range(1, 65) if plan.lanes % (world_size * k) == 0]
        remedies.append(f"data.num_workers from {_some(_nearest(fits, workers))}")
    if fits := valid_worlds(plan.lanes, workers):
        remedies.append(f"a number of processes from {_some(_nearest(fits, world_size))}")
    unit, most = world_size * workers, plan.most_lanes
    if unit <= most:
        remedies.append(f"for a new run, data.lanes from the multiples of {unit} up to {most // unit * unit}")
    raise ConfigError(
        f"data.lanes = {plan.lanes}: must be a multiple of {world_size} processes x {workers} loader workers "
        f"= {unit}; choose {', or '.join(remedies) or 'fewer processes and loader workers'}"
    )


def valid_worlds(lanes: int, num_workers: int) -> list[int]:
    """Numbers of processes, ascending, over which lanes spread evenly with so many loader workers each."""
    if lanes % max(1, num_workers):
        return []
    share = lanes // max(1, num_workers)
    small = [world for world in range(1, math.isqrt(share) + 1) if share % world == 0]
    return sorted({*small, *(share // world for world in small)})


def micro_batch_blocks(i: int, rank: int, world_size: int, blocks_per_micro_batch: int) -> np.ndarray:
    """Global numbers of the blocks in a rank's i-th micro-batch of the run, ascending: int64 [blocks].

    Rank r of W takes blocks r, r + W, ...; its K workers hand over whole micro-batches in turn. As W divides
    lanes, a lane belongs to one rank for the whole run. It belongs to one worker if moreover
    W * K * blocks_per_micro_batch divides lanes, and else passes between the workers of its rank.
    """
    turns = np.arange(i * blocks_per_micro_batch, (i + 1) * blocks_per_micro_batch)
    return rank + world_size * turns


def crop_offset(seed: int, sample_ids: np.ndarray, max_offset: np.ndarray) -> np.ndarray:
    """First frame of each sample's crop, uniform on 0..max_offset inclusive: int64 [n].

    `sample_ids` is int64 [n, 3] of (epoch, clip, crop), `max_offset` int64 [n], below 2**32.
    """
    epoch, clip, crop = np.asarray(sample_ids, np.uint64).T
    counter = (np.zeros_like(clip), crop + np.uint64(CROP_OFFSET_TAG << CROP_BITS), clip & _UINT32, epoch)
    word = philox4x32(seed, counter)[0]
    choices = np.asarray(max_offset).astype(np.uint64) + np.uint64(1)
    return ((word * choices) >> np.uint64(32)).astype(np.int64)


def fill_block(plan: Order, n: int, reads: Reads) -> tuple[np.ndarray, np.ndarray]:
    """Samples of block n with bad clips replaced: int64 [block, 3], and which slots are fills: bool [block].

    `reads` says which of int64 [m, 3] samples can be read: bool [m]. A clip is bad if any crop of it in the
    block is. Its slots take the nearest earlier good clip of the block, else the nearest later one, else the
    last readable clip of the lane's nearest earlier block, else the first of its nearest later block. Fill k
    of a block takes crop crops_per_clip + z * block + k of its stand-in, z = 0 in the block itself, 2 d for d
    places back and 2 d - 1 for d places on: no two fills of a run are the same sample. A candidate whose
    crop can't be read is passed over. Raises DataError if 1,000 places both ways hold none.
    """
    samples = plan.block_samples(n)
    clips = [tuple(row) for row in samples[:: plan.crops_per_clip, :2].tolist()]
    good = reads(samples).reshape(len(clips), plan.crops_per_clip).all(axis=1)
    bad = np.repeat(~good, plan.crops_per_clip)
    elsewhere, last = _lane_candidates(plan, n), []
    for k, slot in enumerate(np.flatnonzero(bad).tolist()):
        at = slot // plan.crops_per_clip
        nearest = (*range(at - 1, -1, -1), *range(at + 1, len(clips)))
        inside = [(*clips[i], 0) for i in nearest if good[i]]
        # Outside, a search goes on where the last one ended: what came before could not be read.
        for epoch, clip, z in chain(inside, last, elsewhere):
            samples[slot] = epoch, clip, plan.crops_per_clip + z * plan.block + k
            if reads(samples[slot : slot + 1])[0]:
                last = [(epoch, clip, z)] if z else last
                break
    return samples, bad


def _lane_candidates(plan: Order, n: int) -> Iterator[tuple[int, int, int]]:
    """Epoch, clip and distance code z of the stand-ins around block n of its lane, nearest first."""
    for back in range(1, min(n // plan.lanes, FILL_REACH) + 1):
        for epoch, clip, _ in plan.block_samples(n - back * plan.lanes)[:: -plan.crops_per_clip].tolist():
            yield epoch, clip, 2 * back
    for ahead in range(1, FILL_REACH + 1):
        for epoch, clip, _ in plan.block_samples(n + ahead * plan.lanes)[:: plan.crops_per_clip].tolist():
            yield epoch, clip, 2 * ahead - 1
    raise DataError(
        f"data.shards: no readable clip within {FILL_REACH} places of block {n} in its lane; restore the "
        "missing shards, or find the damaged ones with `msm-dist data verify`"
    )


def permutation(seed: int, purpose: int, n: int, **counter: int) -> np.ndarray:
    """A random order of range(n), int64 [n], keyed by epoch, lane and window too; the same in every numpy."""
    return np.argsort(raw_words(seed, purpose, n, **counter), kind="stable")


def raw_words(seed: int, purpose: int, n: int, epoch: int = 0, lane: int = 0, window: int = 0) -> np.ndarray:
    """Random words uint64 [n] of a key and a counter."""
    # numpy counts up word 0 of the counter as it generates.
    return np.random.Philox(key=[seed, purpose], counter=[0, window, lane, epoch]).random_raw(n)


def cached(cache: OrderedDict[Hashable, Any], key: Hashable, make: Callable[[], Any], limit: int) -> Any:
    """The value of `key`, made if need be; the cache keeps the `limit` newest."""
    if key not in cache:
        cache[key] = make()
        if len(cache) > limit:
            cache.popitem(last=False)
    return cache[key]


def locate_clips(shard_ends: np.ndarray, clips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shard number and position inside the shard of each clip, both int64 shaped like `clips`."""
    shards = np.searchsorted(shard_ends, clips, side="right")
    return shards, clips - np.where(shards > 0, shard_ends[shards - 1], 0)


def philox4x32(seed: int, counter: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Philox4x32-10 (Salmon et al. 2011) of four counter words, each uint64 [n] below 2**32: four uint64 [n].

    Equals Triton's tl.philox(seed, c0, c1, c2, c3).
    """
    c0, c1, c2, c3 = counter
    key0, key1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        low, high = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        shift = np.uint64(32)
        c0, c1 = (high >> shift) ^ c1 ^ np.uint64(key0), high & _UINT32
        c2, c3 = (low >> shift) ^ c3 ^ np.uint64(key1), low & _UINT32
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def _short_lanes(num_clips: int) -> int:
    return min(8, max(num_clips // SHORT_LANE_CLIPS, 2), num_clips)


def _nearest(values: Sequence[int], wanted: int, limit: int = 12) -> list[int]:
    """The `limit` values nearest to the wanted one, ascending."""
    return sorted(sorted(values, key=lambda value: abs(value - wanted))[:limit])


def _some(values: Sequence[int], limit: int = 12) -> str:
    return ", ".join(map(str, values[:limit])) + (", ..." if len(values) > limit else "")
