"""A folder of audio -> webdataset tar shards, sidecars, index.json and a report of what was left out.

In: a source folder (see clips.py) and `PackSettings`. Out: mono FLAC clips at the front end's rate in a
seeded order, the same bytes whatever the number of workers. A killed pack is continued by the same call:
finished shards stay (see shard_writer.py). <out>/pack.json says what the folder is made from. Fails with
DataError (nothing usable, full disk) and ConfigError (impossible settings, the folder of another pack).
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from msm_dist.config import Features
from msm_dist.data.clips import (
    MIN_TAIL_SECONDS,
    Clip,
    ClipList,
    LeftOut,
    Progress,
    list_clips,
    quiet,
    write_report,
)
from msm_dist.data.index import (
    INDEX_NAME,
    UNFINISHED_NAME,
    Index,
    Shard,
    check_shards,
    listed,
    load_index,
    write_index,
)
from msm_dist.data.shard_writer import ShardTask, is_written, read_record, write_shard
from msm_dist.data.stats import combine
from msm_dist.data.workers import run_tasks
from msm_dist.errors import ConfigError, DataError

SETTINGS_NAME = "pack.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class PackSettings:
    """What decides the bytes of a pack, beside the audio itself."""

    csv: Path | None = None
    """AudioSet segments: only the files it lists are packed, with its labels."""
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
    """The rate of the clips, and the front end of the statistics."""


def pack(source: Path, out: Path, settings: PackSettings, workers: int = 1, progress: Progress = quiet) -> Index:
    """Pack `source` into `out` and return its index.

    The same call after a kill continues; on a finished folder it only checks the sizes of the shards.
    Raises ConfigError and DataError; the report of what was left out is <out>/report.json.
    """
    _check(settings)
    try:
        found = list_clips(
            source,
            settings.csv,
            settings.labels,
            settings.segment_seconds,
            settings.features,
            workers,
            progress,
        )
        if not found.clips:
            raise DataError(f"{source}: none of its {found.counts['files']} files can be used:\n{_shown(found)}")
        tasks = _shard_tasks(found.clips, source, out, settings)
        with _claimed(out, _identity(found, tasks[0].name, settings)):
            return _finished(out) or _write_all(tasks, found, workers, progress)
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
    if faults:
        raise ConfigError("\n".join(faults))


def _shown(found: ClipList) -> str:
    return listed([f"{entry.file}: {entry.reason} ({entry.detail})" for entry in found.left_out])


def _shard_tasks(clips: Sequence[Clip], source: Path, out: Path, settings: PackSettings) -> list[ShardTask]:
    """Clips in a seeded order, so that folders sorted by class do not give shards sorted by class."""
    name = settings.name or re.sub(r"[^A-Za-z0-9_-]", "_", source.resolve().name).lstrip("_-") or "audio"
    order = np.random.default_rng(settings.seed).permutation(len(clips))
    groups = np.array_split(order, -(-len(clips) // settings.shard_clips))
    return [
        ShardTask(f"{name}-{number:06d}.tar", [clips[i] for i in group], source, out, settings.features)
        for number, group in enumerate(groups)
    ]


def _identity(found: ClipList, first_shard: str, settings: PackSettings) -> dict[str, Any]:
    """What must be equal for a pack to be continued."""
    inputs = hashlib.sha256()
    for entry in [*found.clips, *found.left_out]:
        inputs.update(os.fsencode(repr(entry)))
    return {
        "version": FORMAT_VERSION,
        "first_shard": first_shard,
        "shard_clips": settings.shard_clips,
        "segment_seconds": settings.segment_seconds,
        "seed": settings.seed,
        "features": settings.features.front_end(),
        "inputs": inputs.hexdigest(),
    }


@contextmanager
def _claimed(out: Path, identity: dict[str, Any]) -> Iterator[None]:
    """Hold the output folder for this pack alone. Raises ConfigError if it belongs to another one."""
    path = out / SETTINGS_NAME
    if not path.exists() and ((out / INDEX_NAME).exists() or any(out.glob("*.tar"))):
        raise ConfigError(f"{out}: holds shards that were not packed by this command; choose another output folder")
    out.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        _lock(file, out)
        file.seek(0)
        if content := file.read():
            _compare(content, identity, out)
        else:
            file.write(json.dumps(identity, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        yield


def _lock(file: TextIO, out: Path) -> None:
    """The lock ends with the process. File systems that know no locks go without."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"{out}: another pack is writing here; wait for it, or choose another folder") from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise


def _compare(content: str, identity: dict[str, Any], out: Path) -> None:
    try:
        earlier = json.loads(content)
        different = {name: earlier.get(name) for name in identity if earlier.get(name) != identity[name]}
    except (ValueError, AttributeError):
        raise ConfigError(f"{out / SETTINGS_NAME}: is damaged; remove {out} or choose another output folder") from None
    if different:
        faults = [f"{name} was {was}, is {identity[name]}" for name, was in different.items() if name != "inputs"]
        faults += ["audio files or labels differ"] if "inputs" in different else []
        raise ConfigError(
            f"{out}: was packed from other inputs or settings ({'; '.join(faults)}); choose another output "
            "folder, or remove this one"
        )


def _finished(out: Path) -> Index | None:
    """The index, where the pack is finished. Raises DataError if shards were damaged since."""
    if (out / UNFINISHED_NAME).exists() or not (out / INDEX_NAME).exists():
        return None
    index = load_index(str(out))
    try:
        check_shards(index, "size")
    except DataError as error:
        raise DataError(f"{error}\nto pack again, remove {out} first") from None
    return index


def _write_all(tasks: Sequence[ShardTask], found: ClipList, workers: int, progress: Progress) -> Index:
    """Write the shards that have no record yet, then index and report."""
    out, features = tasks[0].out, tasks[0].features
    unfinished = out / UNFINISHED_NAME
    unfinished.mkdir(exist_ok=True)
    for leftover in [*out.glob("*.tmp"), *unfinished.glob("*.tmp")]:
        leftover.unlink()
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
        kind="audio",
        sample_rate=features.sample_rate,
        shards=tuple(Shard(**record["shard"], location=str(out / record["shard"]["name"])) for record in records),
        seconds=sum(record["samples"] for record in records) / features.sample_rate,
        **statistics._asdict(),
        features=features.front_end(),
    )
    counts = {**found.counts, "clips": index.num_clips, "seconds": index.seconds}
    write_report(out, counts, left_out)
    write_index(index)
    shutil.rmtree(unfinished)
    return index
