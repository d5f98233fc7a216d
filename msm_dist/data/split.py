"""A labelled subset of packed shards: the clips that a segments CSV lists, with its labels, in shards of their own.

In: a folder of shards of either kind, a segments CSV (balanced, evaluation or your own) and the class list. Out: a
folder of the same kind; members are copied byte for byte, in the corpus' order, and labels go into the clips' json:

    {"labels": ["/m/09x0r"], "names": ["Speech"], "origin": {...}, "segment": {"ytid": ..., "start_seconds": ...}}

A clip is found by the YTID in the name of the file it was packed from (json: origin.file), else in its key. Killed,
the same call starts again and gives the same bytes; index.json comes last. Fails with DataError where no clip is found.
"""

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from msm_dist.config import Features
from msm_dist.data import audioset
from msm_dist.data.audio import BadClip, decode, num_target_samples, to_int16
from msm_dist.data.claim import begun, claimed, finished
from msm_dist.data.clips import LeftOut, Progress, quiet, write_report
from msm_dist.data.contents import Stored, front_end_of, printable, stored_clips
from msm_dist.data.index import (
    UNFINISHED_NAME,
    Index,
    Official,
    Shard,
    check_shards,
    file_sha256,
    load_index,
    member_table,
    write_index,
    write_members,
)
from msm_dist.data.logmel import HEADER_BYTES, code_sums
from msm_dist.data.stats import LogMelMeter, combine
from msm_dist.data.storage import is_remote
from msm_dist.data.workers import run_tasks
from msm_dist.errors import ConfigError, DataError
from msm_dist.files import sync

FORMAT_VERSION = 1


@dataclass(frozen=True)
class SplitSettings:
    """What decides the bytes of a subset, beside the corpus."""

    csv: Path
    """Segments CSV: the clips and their labels."""
    labels: Path | None = None
    """Class list: checks the labels and adds display names."""
    name: str | None = None
    """Prefix of the shards; none: the name of the CSV."""
    shard_clips: int = 512
    """Most clips in a shard."""


class Chosen(NamedTuple):
    """A clip of the subset: where it lies, what it is called, its segment and the json that goes with it."""

    shard: str
    offset: int
    size: int
    samples: int
    rate: int
    format: str
    key: bytes
    suffix: str
    ytid: str
    start_seconds: float
    description: dict[str, Any]


class _Task(NamedTuple):
    """One shard to write; `features` is None where nothing is to be measured."""

    name: str
    clips: Sequence[Chosen]
    out: Path
    kind: str
    features: Features | None


class _Written(NamedTuple):
    name: str
    shard: Shard | None
    seconds: float
    sums: np.ndarray | None
    ytids: tuple[str, ...]
    left_out: tuple[LeftOut, ...]


def split(source: str, out: Path, settings: SplitSettings, workers: int = 1, progress: Progress = quiet) -> Index:
    """Write the clips of `source` that settings.csv lists into `out`; what is missing is in <out>/report.json.

    Raises DataError, and ConfigError where `out` holds something else.
    """
    if is_remote(source):
        raise DataError(f"{source}: is split where its shards lie on this machine; copy them here")
    if settings.shard_clips < 1:
        raise ConfigError(f"--shard-clips = {settings.shard_clips}: must be 1 or more; 512 is usual")
    index = load_index(source)
    _segments.cache_clear()
    _names.cache_clear()
    segments = _segments(settings.csv)
    names = _names(settings.labels)
    if names:
        audioset.check_labels(segments.values(), names, settings.labels)
    inputs = hashlib.sha256(repr([[asdict(segment) for segment in segments.values()], names]).encode())
    identity = {
        "version": FORMAT_VERSION,
        "split_from": index.digest,
        "kind": index.kind,
        "name": _prefix(settings),
        "shard_clips": settings.shard_clips,
        "inputs": inputs.hexdigest(),
    }
    try:
        with claimed(out, identity):
            return finished(out, "split") or _write_all(index, out, settings, workers, progress)
    except OSError as error:
        raise DataError(f"{error.filename or out}: {error.strerror or error}; mend that and start again") from None


def _prefix(settings: SplitSettings) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", settings.name or settings.csv.stem).lstrip("_-") or "subset"


def _write_all(index: Index, out: Path, settings: SplitSettings, workers: int, progress: Progress) -> Index:
    check_shards(index, "size")
    unfinished = begun(out)
    chosen, left_out = _choose(index, settings, workers, progress)
    features = front_end_of(index)
    groups = np.array_split(np.arange(len(chosen)), -(-len(chosen) // settings.shard_clips))
    tasks = [
        _Task(f"{_prefix(settings)}-{number:06d}.tar", [chosen[i] for i in group], out, index.kind, features)
        for number, group in enumerate(groups)
    ]
    written, done = {}, 0
    for task in run_tasks(_write_shard, tasks, workers):
        written[task.name] = task
        done += len(task.ytids) + len(task.left_out)
        progress("copying clips", done, len(chosen))
    parts = [written[task.name] for task in tasks if written[task.name].shard]
    left_out += [entry for task in tasks for entry in written[task.name].left_out]
    if not parts:
        raise DataError(f"{index.location}: none of the {len(chosen)} clips that {settings.csv} lists decodes")
    made = replace(
        index,
        location=str(out),
        shards=tuple(part.shard for part in parts),
        seconds=sum(part.seconds for part in parts),
        official=_official(settings.csv, [ytid for part in parts for ytid in part.ytids]),
        **(combine(part.sums for part in parts)._asdict() if features else {}),
    )
    _report(made, index, settings, {ytid for part in parts for ytid in part.ytids}, left_out)
    unfinished.rmdir()
    write_index(made)
    return made


def _choose(
    index: Index, settings: SplitSettings, workers: int, progress: Progress
) -> tuple[list[Chosen], list[LeftOut]]:
    """The listed clips in the order of the corpus, one for each segment: of several the earliest in its file."""
    tasks = [(shard, settings.csv, settings.labels) for shard in index.shards]
    found: dict[str, list[Chosen]] = {}
    for number, (name, clips) in enumerate(run_tasks(_listed_clips, tasks, workers), 1):
        found[name] = clips
        progress("looking for clips", number, len(tasks))
    clips = [clip for shard in index.shards for clip in found[shard.name]]
    first: dict[str, Chosen] = {}
    for clip in clips:
        known = first.setdefault(clip.ytid, clip)
        if (clip.start_seconds, clip.key) < (known.start_seconds, known.key):
            first[clip.ytid] = clip
    if not first:
        segments = _segments(settings.csv)
        raise DataError(
            f"{index.location}: holds none of the {len(segments)} clips of {settings.csv}; clips are found by the YTID "
            f"in their key or origin, such as {next(iter(segments))}"
        )
    rest = [clip for clip in clips if first[clip.ytid] is not clip]
    left_out = [
        LeftOut(_shown(clip), clip.start_seconds, "duplicate", f"another clip is {clip.ytid} too") for clip in rest
    ]
    return [clip for clip in clips if first[clip.ytid] is clip], left_out


def _listed_clips(task: tuple[Shard, Path, Path | None]) -> tuple[str, list[Chosen]]:
    shard, csv, labels = task
    segments, names, chosen = _segments(csv), _names(labels), []
    for clip in stored_clips(shard):
        ytid = _ytid(clip, segments)
        if ytid is None:
            continue
        segment = segments[ytid]
        description = clip.description | {
            "labels": segment.labels,
            "names": [names[label] for label in segment.labels] if names else [],
            "segment": {"ytid": ytid, "start_seconds": segment.start_seconds, "end_seconds": segment.end_seconds},
        }
        row = clip.row
        place = str(shard.path), int(row["offset"]), int(row["size"]), int(row["samples"]), int(row["rate"])
        about = row["format"].decode(), bytes(row["key"]), clip.suffix, ytid
        chosen.append(Chosen(*place, *about, clip.start_seconds, description))
    return shard.name, chosen


def _ytid(clip: Stored, segments: dict[str, audioset.Segment]) -> str | None:
    """The listed YTID of a clip: of the file it was packed from, else of its key. A name may tell another start."""
    file = clip.origin.get("file")
    if isinstance(file, str):
        ytid, start = audioset.find_ytid(PurePosixPath(file).stem, segments)
        if ytid is not None:
            return ytid if start is None or audioset.is_start(start, segments[ytid]) else None
    ytid, start = audioset.find_ytid(PurePosixPath(clip.key).name, segments)
    # Behind the name of a file a packed clip's key has its start in the file, no start in the video.
    if ytid is None or isinstance(file, str) or start is None or audioset.is_start(start, segments[ytid]):
        return ytid
    return None


def _write_shard(task: _Task) -> _Written:
    temporary = task.out / UNFINISHED_NAME / f"{task.name}.tmp"
    meter = LogMelMeter(task.features) if task.features else None
    rows, ytids, left_out, seconds = [], [], [], 0.0
    with open(temporary, "wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for clip in task.clips:
                with open(clip.shard, "rb") as source:
                    source.seek(clip.offset)
                    content = source.read(clip.size)
                try:
                    _measure(task.kind, clip, content, meter)
                except BadClip as error:
                    left_out.append(LeftOut(_shown(clip), clip.start_seconds, error.reason, error.detail))
                    continue
                name = clip.key.decode(errors="surrogateescape")
                offset = _add(tar, name + clip.suffix, content)
                _add(tar, f"{name}.json", json.dumps(clip.description).encode())
                rows.append((offset, clip.size, clip.samples, clip.rate, clip.format, clip.key))
                ytids.append(clip.ytid)
                seconds += clip.samples / clip.rate
        file.flush()
        os.fsync(file.fileno())
    sums = meter.sums if meter else None
    shard = _finish(temporary, task, rows) if rows else None
    return _Written(task.name, shard, seconds, sums, tuple(ytids), tuple(left_out))


def _measure(kind: str, clip: Chosen, content: bytes, meter: LogMelMeter | None) -> None:
    """Add a clip to the statistics. Raises BadClip where it is audio that does not decode."""
    rate = meter.features.sample_rate if meter else clip.rate
    expected = num_target_samples(clip.samples, clip.rate, rate)
    if kind == "audio":
        samples = to_int16(decode(content, rate))
        if len(samples) != expected:
            raise BadClip("changed", f"{len(samples)} samples at {rate} Hz; packed was {expected}")
        if meter:
            meter.add(samples)
    elif meter:
        codes = np.frombuffer(content, np.uint8, offset=HEADER_BYTES).reshape(-1, meter.features.n_mels)
        meter.sums += code_sums(codes[: meter.features.num_frames(expected)], meter.log_mel)


def _finish(temporary: Path, task: _Task, rows: Iterable[tuple[int, int, int, int, str, bytes]]) -> Shard:
    path, rows = task.out / task.name, list(rows)
    digest = write_members(path.with_suffix(".members.npy"), member_table(rows))
    shard = Shard(task.name, len(rows), temporary.stat().st_size, file_sha256(temporary), digest, str(path))
    temporary.replace(path)
    sync(task.out)
    return shard


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> int:
    """Append a member without date or owner; returns where its bytes begin."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
    return tar.offset - -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _official(csv: Path, ytids: Iterable[str]) -> Official | None:
    return audioset.official(audioset.Tables(_segments(csv), frozenset(), (csv.name,), True), ytids)


def _report(made: Index, index: Index, settings: SplitSettings, found: set[str], left_out: Sequence[LeftOut]) -> None:
    missing = [ytid for ytid in _segments(settings.csv) if ytid not in found]
    counts = {
        "split_from": index.digest,
        "clips": made.num_clips,
        "seconds": made.seconds,
        "csv_clips": len(found) + len(missing),
        "csv_clips_without_clip": len(missing),
        "missing": missing,
    }
    write_report(made.root, counts, left_out)


def _shown(clip: Chosen) -> str:
    return f"{Path(clip.shard).name}/{printable(clip.key)}"


@lru_cache(1)
def _segments(csv: Path) -> dict[str, audioset.Segment]:
    """The rows of the CSV; a process reads it once."""
    return {segment.ytid: segment for segment in audioset.read_segments(csv)}


@lru_cache(1)
def _names(labels: Path | None) -> dict[str, str]:
    return audioset.read_class_names(labels) if labels else {}
