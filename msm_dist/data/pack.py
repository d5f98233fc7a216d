"""A folder of audio -> webdataset tar shards, sidecars, index.json and a report of what was left out.

In: a source folder of files (clips.py) or of Parquet tables (parquet.py), and `PackSettings`. Out: mono clips at the
front end's rate, as FLAC or as stored log-mels, in a seeded order, the same bytes whatever the number of workers. A
killed pack is continued by the same call: finished shards stay (see shard_writer.py). <out>/pack.json says what the
folder is made from. Fails with DataError (nothing usable, full disk) and ConfigError (impossible settings, the folder
of another pack).
"""

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from msm_dist.config import Features
from msm_dist.data import audioset, containers, parquet
from msm_dist.data.audioset import Tables
from msm_dist.data.claim import begun, claimed, finished
from msm_dist.data.clips import (
    MIN_TAIL_SECONDS,
    Clip,
    ClipList,
    LeftOut,
    Progress,
    find_files,
    list_clips,
    quiet,
    write_report,
)
from msm_dist.data.index import (
    Index,
    Shard,
    listed,
    write_index,
)
from msm_dist.data.media import SUFFIXES
from msm_dist.data.shard_writer import ShardTask, is_written, read_record, write_shard
from msm_dist.data.stats import combine
from msm_dist.data.workers import run_tasks
from msm_dist.errors import ConfigError, DataError

FORMAT_VERSION = 2

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackSettings:
    """What decides the bytes of a pack, beside the audio itself."""

    csv: tuple[Path, ...] = ()
    """AudioSet segments: only the files they list are packed, with their labels."""
    labels: Path | None = None
    """AudioSet class list: checks the labels and adds display names."""
    name: str | None = None
    """Prefix of the shards; none: the name of the source folder."""
    shard_clips: int = 512
    """Most clips in a shard."""
    segment_seconds: float = 10.0
    """Longer recordings are cut into pieces of this length."""
    seed: int = 0
    """Of the order of the clips."""
    features: Features = field(default_factory=Features)
    """The rate of the clips, and the front end of the statistics and of log-mels."""
    kind: Literal["audio", "logmel"] = "audio"
    """What is stored: FLAC, or log-mels."""
    eval_csv: Path | None = None
    """AudioSet's evaluation segments, to be left out; none: eval_segments.csv beside a `csv`."""
    keep_evaluation: bool = False
    """Pack evaluation segments too."""


def pack(source: Path, out: Path, settings: PackSettings, workers: int = 1, progress: Progress = quiet) -> Index:
    """Pack `source` into `out` and return its index.

    The same call after a kill continues; on a finished folder it only checks the sizes of the shards.
    Raises ConfigError and DataError; the report of what was left out is <out>/report.json.
    """
    _check(settings)
    tables = audioset.read_tables(settings.csv, settings.eval_csv, settings.keep_evaluation)
    try:
        found = _list(source, settings, tables, workers, progress)
        if not found.clips:
            raise DataError(f"{source}: none of its {found.counts['files']} files can be used:\n{_shown(found)}")
        tasks = _shard_tasks(found.clips, source, out, settings)
        with claimed(out, _identity(found, tasks[0].name, settings)):
            return finished(out, "pack") or _write_all(tasks, found, tables, workers, progress)
    except OSError as error:
        raise DataError(
            f"{error.filename or out}: {error.strerror or error}; mend that, and the same command continues"
        ) from None


def _check(settings: PackSettings) -> None:
    faults = []
    if settings.shard_clips < 1:
        faults.append(f"--shard-clips = {settings.shard_clips}: must be 1 or more; 512 is usual")
    if not MIN_TAIL_SECONDS <= settings.segment_seconds <= 3600:
        faults.append(f"--segment-seconds = {settings.segment_seconds:g}: must be 1 to 3600; 10 is usual")
    if settings.seed < 0:
        faults.append(f"--seed = {settings.seed}: must be 0 or more")
    if settings.name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,80}", settings.name):
        faults.append(f"--name = {settings.name}: must be letters, digits, '_' and '-'")
    if settings.labels and not settings.csv:
        faults.append(f"--labels = {settings.labels}: names the classes of a --csv, which is missing; give both")
    if settings.keep_evaluation and settings.eval_csv:
        faults.append(f"--eval-csv = {settings.eval_csv} leaves its clips out, --keep-evaluation packs them; give one")
    if faults:
        raise ConfigError("\n".join(faults))


def _list(source: Path, settings: PackSettings, tables: Tables, workers: int, progress: Progress) -> ClipList:
    """The clips of a folder of files or of Parquet tables."""
    names: dict[str, str] = {}
    if settings.labels:
        names = audioset.read_class_names(settings.labels)
        audioset.check_labels(tables.segments.values(), names, settings.labels)
    if source.is_dir() and (files := parquet.find_parquet(source)):
        if audio := find_files(source, SUFFIXES | containers.SUFFIXES):
            raise DataError(
                f"{source}: holds Parquet tables ({files[0]}) and audio files ({audio[0]}); pack each from a folder of "
                "its own"
            )
        return parquet.list_rows(source, files, tables, names, progress)
    found = list_clips(source, tables, names, settings.segment_seconds, settings.features, workers, progress)
    lost = [entry for entry in found.left_out if entry.reason == containers.MISSING]
    if lost and found.clips:  # else an error names them
        log.warning("%d files are left out, such as %s: %s", len(lost), lost[0].file, lost[0].detail)
    return found


def _shown(found: ClipList) -> str:
    """What is left out, one file for all that share a reason."""
    files: dict[tuple[str, str], list[str]] = {}
    for entry in found.left_out:
        files.setdefault((entry.reason, entry.detail), []).append(entry.file)
    return listed(
        [
            f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {reason} ({detail})"
            for (reason, detail), names in files.items()
        ]
    )


def _shard_tasks(clips: Sequence[Any], source: Path, out: Path, settings: PackSettings) -> list[ShardTask]:
    """Clips in a seeded order, so that folders sorted by class do not give shards sorted by class."""
    name = settings.name or re.sub(r"[^A-Za-z0-9_-]", "_", source.resolve().name).lstrip("_-") or "audio"
    return [
        ShardTask(
            f"{name}-{number:06d}.tar",
            [clips[i] for i in group],
            source,
            out,
            settings.features,
            settings.kind,
            settings.segment_seconds,
        )
        for number, group in enumerate(_groups(clips, settings))
    ]


def _groups(clips: Sequence[Any], settings: PackSettings) -> list[np.ndarray]:
    """The numbers of each shard's clips.

    Files are permuted as a whole. Of tables the row groups are, and then the rows within a shard: a row group can only
    be read as a whole, and so each is read once, or twice where it falls into two shards.
    """
    random = np.random.default_rng(settings.seed)
    num_shards = -(-len(clips) // settings.shard_clips)
    if isinstance(clips[0], Clip):
        return np.array_split(random.permutation(len(clips)), num_shards)
    places = [(row.file, row.group) for row in clips]
    starts = [i for i, place in enumerate(places) if i == 0 or place != places[i - 1]]
    row_groups = np.split(np.arange(len(clips)), starts[1:])
    order = np.concatenate([row_groups[i] for i in random.permutation(len(row_groups))])
    return [random.permutation(group) for group in np.array_split(order, num_shards)]


def _identity(found: ClipList, first_shard: str, settings: PackSettings) -> dict[str, Any]:
    """What must be equal for a pack to be continued."""
    inputs = hashlib.sha256()
    for entry in [*found.clips, *found.left_out]:
        inputs.update(os.fsencode(repr(entry)))
    return {
        "version": FORMAT_VERSION,
        "first_shard": first_shard,
        "kind": settings.kind,
        "shard_clips": settings.shard_clips,
        "segment_seconds": settings.segment_seconds,
        "seed": settings.seed,
        "features": settings.features.front_end(),
        "inputs": inputs.hexdigest(),
    }


def _write_all(tasks: Sequence[ShardTask], found: ClipList, tables: Tables, workers: int, progress: Progress) -> Index:
    """Write the shards that have no record yet, then index and report."""
    out, features = tasks[0].out, tasks[0].features
    unfinished = begun(out)
    todo = [task for task in tasks if not is_written(task)]
    total = len(found.clips)
    done = total - sum(len(task.clips) for task in todo)
    progress("packing", done, total)
    for clips in run_tasks(write_shard, todo, workers):
        done += clips
        progress("packing", done, total)
    records = [read_record(task) for task in tasks]
    left_out = found.left_out + [LeftOut(**entry) for record in records for entry in record["left_out"]]
    records = [record for record in records if record["shard"]["clips"]]
    if not records:
        raise DataError(f"{tasks[0].source}: none of its clips decodes:\n{_shown(found._replace(left_out=left_out))}")
    statistics = combine(np.array(record["sums"]) for record in records)
    index = Index(
        location=str(out),
        kind=tasks[0].kind,
        sample_rate=features.sample_rate,
        shards=tuple(Shard(**record["shard"], location=str(out / record["shard"]["name"])) for record in records),
        seconds=sum(record["samples"] for record in records) / features.sample_rate,
        **statistics._asdict(),
        features=features.front_end(),
        official=audioset.official(tables, (ytid for record in records for ytid in record["ytids"])),
    )
    write_report(out, _counts(found, index, tables, records), left_out)
    write_index(index)
    shutil.rmtree(unfinished)
    return index


def _counts(found: ClipList, index: Index, tables: Tables, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of the report."""
    counts: dict[str, Any] = {**found.counts, "clips": index.num_clips, "seconds": index.seconds}
    counts["scaled_to_full_scale"] = sum(record["scaled"] for record in records)
    counts["evaluation_told_apart"] = _tells_evaluation(found, tables)
    return counts | {"official": index.official and asdict(index.official)}


def _tells_evaluation(found: ClipList, tables: Tables) -> bool | None:
    """Whether AudioSet's evaluation could be left out; None where most names are no YTIDs."""
    if tables.tells_evaluation:
        return True
    names = [clip.recording.file if isinstance(clip, Clip) else clip.name for clip in found.clips]
    return False if audioset.look_official(names) else None
