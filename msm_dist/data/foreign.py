"""Tars made elsewhere, indexed in place, and how much of AudioSet they hold.

In: tars of one folder, optionally AudioSet's tables. Out: their index (shards.py) with what is known of the official
clips; that of an earlier index of the same tars stays. Fails with DataError.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from msm_dist.config import Features
from msm_dist.data import audioset
from msm_dist.data.clips import Progress, quiet
from msm_dist.data.index import Index, Official, load_index, members, write_index
from msm_dist.data.shards import index_shards
from msm_dist.errors import DataError


@dataclass(frozen=True)
class Indexed:
    """An index, how many of its clips the tables do not list, how many of them are evaluation segments."""

    index: Index
    num_unlisted: int = 0
    num_evaluation: int = 0


def index_in_place(
    paths: Sequence[Path], features: Features, csvs: Sequence[Path], workers: int = 1, progress: Progress = quiet
) -> Indexed:
    """Index tars. With tables, keys are matched with their YTIDs; nothing is left out for it. Raises DataError."""
    tables = audioset.read_tables(csvs, None, False)
    earlier = _earlier(paths[0].parent) if paths else None
    index = index_shards(paths, features, workers, progress)
    if not csvs:
        official = earlier.official if earlier and earlier.digest == index.digest else None
        return Indexed(_with(index, official))
    keys = (key.decode(errors="surrogateescape") for shard in index.shards for key in members(shard)["key"].tolist())
    stems = [PurePosixPath(key).name for key in keys]
    known = tables.segments.keys() | tables.evaluation
    ytids = [audioset.find_ytid(stem, known)[0] for stem in stems]
    index = _with(index, audioset.official(tables, (ytid for ytid in ytids if ytid)))
    unlisted = sum(ytid not in tables.segments for ytid in ytids)
    return Indexed(index, unlisted, sum(ytid in tables.evaluation for ytid in ytids))


def _earlier(folder: Path) -> Index | None:
    """The index that is there; none where it is missing or damaged, which is what the new one is for."""
    try:
        return load_index(str(folder))
    except DataError:
        return None


def _with(index: Index, official: Official | None) -> Index:
    if official is None:
        return index
    index = replace(index, official=official)
    write_index(index)
    return index
