"""The order of a run over several corpora, mixed by weight: as pure a function of a few numbers as the plan of one.

In: clips per shard of each source, their weights, and what `make_plan` takes. Out: a `MixedPlan`, which readers use
like a `Plan`. Fails with ConfigError on weights and lanes that don't fit the sources, with DataError on an empty one.

Legend. Every source has a plan of its own, with a seed of its own and as many lanes as the mix. A lane's places are
cut into cycles of CYCLE places. In each of them source s has the same number of places, its share of CYCLE by largest
remainder, and they lie evenly spread: the j-th stands near (j + u) / places of the cycle, u drawn for (seed, lane,
cycle), so that any stretch of a lane has its share. The k-th place of source s in lane l is that source's own block
k of its lane l. So a source runs through its epochs at its own pace; a sample's epoch is its source's, and clip and
shard numbers of a source begin where those of the one before end.
"""

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from msm_dist.data.plan import (
    Plan,
    cached,
    check_block,
    default_lanes,
    locate_clips,
    most_lanes,
    raw_words,
)
from msm_dist.errors import ConfigError, DataError

CYCLE = 1000  # so that weights of three decimals are met exactly
CACHED_CYCLES = 8192  # 4 kB each, one for every lane of a worker

_SOURCE, _CYCLE = 4, 5  # purposes of random words, beside those of plan.py


class Turns(NamedTuple):
    """A cycle of a lane: uint16 [CYCLE] source of each place, and how many places of it came before in the cycle."""

    sources: np.ndarray
    earlier: np.ndarray


@dataclass(frozen=True, eq=False)
class MixedPlan:
    """The order of several corpora; build it with `make_mix`. Clip and shard numbers count on from source to source."""

    plans: tuple[Plan, ...]
    """Of each source."""
    places: tuple[int, ...]
    """Places of each source in a cycle."""
    seed: int
    lanes: int
    block: int
    crops_per_clip: int
    shard_ends: np.ndarray
    """int64 [shards]: clips up to and including each shard of all sources."""
    first_clips: tuple[int, ...]
    """Number of each source's first clip."""
    _cycles: OrderedDict[Hashable, Any] = field(default_factory=OrderedDict, repr=False)

    @property
    def num_clips(self) -> int:
        """Clips of all sources."""
        return int(self.shard_ends[-1])

    @property
    def clips_per_epoch(self) -> int:
        """What counts as an epoch of the run: as many clips as one epoch of every source serves."""
        return sum(plan.clips_per_epoch for plan in self.plans)

    @property
    def most_lanes(self) -> int:
        """The largest data.lanes that the sources allow."""
        return _most_lanes([plan.num_clips for plan in self.plans])

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of each source in the crops of the run."""
        return tuple(places / CYCLE for places in self.places)

    def source_block(self, n: int) -> tuple[int, int]:
        """Which source global block n is of, and the number of the block in that source's own plan."""
        place, lane = divmod(n, self.lanes)
        cycle, at = divmod(place, CYCLE)
        turns = cached(
            self._cycles,
            (lane, cycle),
            lambda: draw_turns(self.seed, self.places, lane, cycle),
            CACHED_CYCLES,
        )
        source = int(turns.sources[at])
        return source, (cycle * self.places[source] + int(turns.earlier[at])) * self.lanes + lane

    def block_samples(self, n: int) -> np.ndarray:
        """Samples of global block n: int64 [block, 3] of (epoch of the source, clip, crop)."""
        source, number = self.source_block(n)
        samples = self.plans[source].block_samples(number)
        samples[:, 1] += self.first_clips[source]
        return samples

    def locate(self, clips: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard number and position inside the shard of each clip, both int64 shaped like `clips`."""
        return locate_clips(self.shard_ends, clips)


def make_mix(
    shard_clips: Mapping[str, Sequence[int]],
    weights: Sequence[float],
    seed: int,
    lanes: int | None,
    block: int,
    shuffle_window: int,
    crops_per_clip: int,
) -> MixedPlan:
    """The plan of sources by name with `shard_clips` clips in each of their shards; lanes None: as many as they allow.

    Raises DataError on an empty source, ConfigError on too many lanes, a weight too small, or too large a block.
    """
    names, sizes = list(shard_clips), [int(sum(clips)) for clips in shard_clips.values()]
    for name, size in zip(names, sizes, strict=True):
        if size == 0:
            raise DataError(f"data.mix: the index of {name} lists 0 clips; pack audio with `msm-dist data pack`")
    places = count_places(names, weights)
    check_block(block)
    default = default_lanes(sum(sizes), min(sizes))
    if lanes is not None and lanes > _most_lanes(sizes):
        smallest = names[sizes.index(min(sizes))]
        raise ConfigError(
            f"data.lanes = {lanes}: a lane given here needs 64 of the {sum(sizes)} clips of all sources, and one of "
            f"each ({smallest} has {min(sizes)}); choose at most {_most_lanes(sizes)}, or leave it out to get {default}"
        )
    plans = tuple(
        # make_plan allows fewer lanes than a mix does.
        Plan(np.cumsum(clips), source_seed(seed, number), lanes or default, block, shuffle_window, crops_per_clip)
        for number, clips in enumerate(np.asarray(clips, np.int64) for clips in shard_clips.values())
    )
    first_clips = (0, *accumulate(sizes))[:-1]
    ends = np.concatenate([plan.shard_ends + first for plan, first in zip(plans, first_clips, strict=True)])
    return MixedPlan(plans, places, seed, lanes or default, block, crops_per_clip, ends, first_clips)


def count_places(names: Sequence[str], weights: Sequence[float]) -> tuple[int, ...]:
    """Places of each source in a cycle: its share of CYCLE, rounded by largest remainder, ties to the first.

    Raises ConfigError on a weight that is not above 0, and on one that gets no place.
    """
    for name, weight in zip(names, weights, strict=True):
        if not 0 < weight < float("inf"):
            raise ConfigError(f"data.mix: {name} has the weight {weight}; it must be a number above 0")
    # The largest is divided out first: a sum of huge weights would be infinite.
    scaled = [weight / max(weights) for weight in weights]
    exact = [CYCLE * weight / sum(scaled) for weight in scaled]
    places = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda source: places[source] - exact[source])
    for source in by_remainder[: CYCLE - sum(places)]:
        places[source] += 1
    for name, weight, count in zip(names, weights, places, strict=True):
        if count == 0:
            raise ConfigError(
                f"data.mix: {name} has the weight {weight} of {sum(weights):g}, which rounds to no block in {CYCLE}; "
                "give it a larger one, or leave it out"
            )
    return tuple(places)


def draw_turns(seed: int, places: Sequence[int], lane: int, cycle: int) -> Turns:
    """The order of the sources in a lane's cycle."""
    sources = np.repeat(np.arange(len(places), dtype=np.uint16), places)
    earlier = np.concatenate([np.arange(count, dtype=np.uint16) for count in places])
    # The upper 53 bits as an exact float in [0, 1).
    drawn = (raw_words(seed, _CYCLE, CYCLE, lane=lane, window=cycle) >> np.uint64(11)) * 2.0**-53
    order = np.argsort((earlier + drawn) / np.asarray(places)[sources], kind="stable")
    return Turns(sources[order], earlier[order])


def source_seed(seed: int, number: int) -> int:
    """The seed of a source's own plan, below 2**63: two sources of the same sizes are not shuffled alike."""
    return int(raw_words(seed, _SOURCE, 1, lane=number)[0] >> np.uint64(1))


def _most_lanes(sizes: Sequence[int]) -> int:
    return min(most_lanes(sum(sizes)), min(sizes))
