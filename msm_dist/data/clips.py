"""A folder of audio -> the clips that packing will write, and the files it will leave out with their reasons.

In: audio and video files of any rate, channel count and depth of folders, optionally AudioSet's tables. Out: clips in
order of file and time, with keys that are unique and safe in a webdataset tar. Only headers are read. Fails with
DataError where there is no audio, or none that the tables list.
"""

import hashlib
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, NoReturn

from msm_dist.config import Features
from msm_dist.data import audioset, containers
from msm_dist.data.audio import BadClip
from msm_dist.data.index import INDEX_NAME, REPORT_NAME
from msm_dist.data.media import SUFFIXES, check_length, probe, read_span
from msm_dist.data.workers import run_tasks
from msm_dist.errors import DataError
from msm_dist.files import write_atomically

MIN_TAIL_SECONDS = 1.0
MAX_STEM = 72  # with digest, start and suffix a member's name stays within the 100 bytes of a plain tar header
FILES_PER_TASK = 256

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""


def quiet(stage: str, done: int, total: int) -> None:
    """No progress shown."""


@dataclass(frozen=True, slots=True)
class Recording:
    """A source file: path below the source folder, samples per channel, rate in Hz, channels, bytes."""

    file: str
    samples: int
    rate: int
    channels: int
    size: int


@dataclass(frozen=True, slots=True)
class Clip:
    """A piece of a recording: samples [start, stop) at its own rate; its labels and their display names."""

    key: str
    recording: Recording
    start: int
    stop: int
    labels: tuple[str, ...]
    names: tuple[str, ...]
    ytid: str = ""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Audio that is not in the shards: its file (or key in a foreign tar), where in it, and why."""

    file: str
    start_seconds: float
    reason: str
    detail: str


class ClipList(NamedTuple):
    """Clips to write, files left out, and counts for the report."""

    clips: list[Any]
    """Clip; Row (parquet.py) where the source is Parquet."""
    left_out: list[LeftOut]
    counts: dict[str, int]


class _Scan(NamedTuple):
    source: Path
    files: Sequence[str]
    segment_seconds: float
    features: Features


def list_clips(
    source: Path,
    tables: audioset.Tables,
    names: dict[str, str],
    segment_seconds: float,
    features: Features,
    workers: int,
    progress: Progress,
) -> ClipList:
    """Every clip of `source`, long recordings cut; with tables only the files they list. Raises DataError.

    `names` are the display names of labels. Of a recording that is longer than a clip and listed, such as a whole
    video, only the listed segment is a clip: its labels hold for that alone.
    """
    files = find_audio(source)
    chosen = _choose(source, files, tables)
    recordings, unusable = _scan(_Scan(source, chosen.files, segment_seconds, features), workers, progress)
    left_out = [*chosen.left_out, *unusable]
    stems = unique_stems([recording.file for recording in recordings])
    clips = []
    for recording in recordings:
        segment = chosen.segments.get(recording.file)
        tags = segment.labels if segment else ()
        shown = tuple(names[tag] for tag in tags) if names else ()
        try:
            pieces = _pieces(recording, segment, segment_seconds)
        except BadClip as error:
            left_out.append(LeftOut(recording.file, 0.0, error.reason, error.detail))
            continue
        for start, stop in pieces:
            key = f"{stems[recording.file]}_{round(1000 * start / recording.rate)}"
            clips.append(Clip(key, recording, start, stop, tags, shown, segment.ytid if segment else ""))
    return ClipList(clips, left_out, {"files": len(files), **chosen.counts})


def find_audio(source: Path) -> list[str]:
    """Paths below `source` of all audio and video files by suffix, sorted, without hidden ones. Raises DataError."""
    if not source.is_dir():
        raise DataError(f"{source}: no such folder; name a folder of wav, flac, ogg, mp3, m4a or video files")
    known = SUFFIXES | containers.SUFFIXES
    files = find_files(source, known)
    if not files:
        if tars := find_files(source, {".tar"}):
            folder = (source / tars[0]).parent
            made = "are packed already" if (folder / INDEX_NAME).exists() else "hold the audio"
            raise DataError(
                f"{source}: its {len(tars)} tar shards {made}; index them in place, without a copy: "
                f"msm-dist data index {folder}/*.tar"
            )
        raise DataError(f"{source}: holds no audio; files must end in {', '.join(sorted(known))}")
    return files


def find_files(source: Path, suffixes: AbstractSet[str]) -> list[str]:
    """Paths below `source` of all files with these suffixes, sorted, without hidden ones. Raises DataError.

    Links to folders are followed; a folder that lies above itself by one is not entered again.
    """
    files = []
    above = {str(source): frozenset({_identity(source)})}
    for folder, subfolders, names in os.walk(source, onerror=_unlistable, followlinks=True):
        here = above.pop(folder)
        entered = []
        for name in subfolders:
            path = os.path.join(folder, name)
            if not name.startswith(".") and (identity := _identity(path)) not in here:
                entered.append(name)
                above[path] = here | {identity}
        subfolders[:] = entered
        inside = Path(folder).relative_to(source)
        visible = [name for name in names if not name.startswith(".")]
        files += [(inside / name).as_posix() for name in visible if Path(name).suffix.lower() in suffixes]
    return sorted(files)


def _identity(folder: str | Path) -> tuple[int, int]:
    try:
        found = os.stat(folder)
    except OSError as error:
        _unlistable(error)
    return found.st_dev, found.st_ino


def _unlistable(error: OSError) -> NoReturn:
    """Its files would else be missing without a word."""
    raise DataError(
        f"{error.filename}: can't be listed ({error.strerror}); mend that, or remove the folder from what is packed"
    ) from None


def cut(samples: int, rate: int, segment_seconds: float) -> list[tuple[int, int]]:
    """Pieces [start, stop) of a recording; a last piece under 1 s stays with the one before it."""
    length = round(segment_seconds * rate)
    starts = list(range(0, samples, length))
    if len(starts) > 1 and samples - starts[-1] < MIN_TAIL_SECONDS * rate:
        starts.pop()
    return list(zip(starts, [*starts[1:], samples], strict=True))


def unique_stems(files: Sequence[str]) -> dict[str, str]:
    """A name per file, without '.' and '/': they part a webdataset key from its suffix and its folder."""
    stems = {file: re.sub(r"[^A-Za-z0-9_-]", "_", os.path.splitext(file)[0]) for file in files}
    uses = Counter(stems.values())
    for file, stem in stems.items():
        if uses[stem] > 1 or len(stem) > MAX_STEM:
            digest = hashlib.sha256(os.fsencode(file)).hexdigest()
            stems[file] = f"{stem[: MAX_STEM - 17]}-{digest[:16]}"
    return stems


def write_report(out: Path, counts: dict[str, Any], left_out: Sequence[LeftOut]) -> None:
    """Write report.json: counts, and all that was left out, sorted, with the number per reason."""
    entries = sorted(left_out, key=lambda entry: (entry.file, entry.start_seconds))
    reasons = dict(sorted(Counter(entry.reason for entry in entries).items()))
    report = {**counts, "reasons": reasons, "left_out": [asdict(entry) for entry in entries]}
    write_atomically(out / REPORT_NAME, (json.dumps(report, indent=1) + "\n").encode())


class _Chosen(NamedTuple):
    files: list[str]
    segments: dict[str, audioset.Segment]
    left_out: list[LeftOut]
    counts: dict[str, int]


def _choose(source: Path, files: Sequence[str], tables: audioset.Tables) -> _Chosen:
    """The files that the tables want, and the others with their reasons."""
    found = audioset.match_files(files, tables.segments.values(), tables.evaluation)
    left_out = [LeftOut(file, 0.0, "evaluation", "the evaluation table lists it") for file in found.evaluation]
    if not tables.segments:
        held_out = set(found.evaluation)
        return _Chosen([file for file in files if file not in held_out], {}, left_out, {})
    if not found.segments:
        raise DataError(
            f"{', '.join(tables.names)}: none of their {len(tables.segments)} clips is in {source}; files are named "
            f"by YTID, such as {next(iter(tables.segments))}.wav (found: {PurePosixPath(files[0]).name})"
        )
    left_out += [LeftOut(file, 0.0, "duplicate", "another file is the same clip") for file in found.duplicates]
    left_out += [
        LeftOut(file, 0.0, "other_segment", "its name says another start than the CSV") for file in found.other_segments
    ]
    counts = {"files_not_in_csv": found.num_unlisted, "csv_clips_without_file": found.num_absent}
    return _Chosen(list(found.segments), found.segments, left_out, counts)


def _pieces(recording: Recording, segment: audioset.Segment | None, seconds: float) -> list[tuple[int, int]]:
    """The spans of a recording that become clips, in samples. Raises BadClip."""
    rate, length = recording.rate, recording.samples / recording.rate
    whole = cut(recording.samples, rate, seconds)
    if segment is None or len(whole) == 1 or _names_start(recording.file, segment):
        return whole
    if length >= segment.end_seconds - MIN_TAIL_SECONDS:
        return [(round(segment.start_seconds * rate), min(round(segment.end_seconds * rate), recording.samples))]
    if length <= 2 * (segment.end_seconds - segment.start_seconds):
        return whole
    raise BadClip(
        "no_segment", f"{length:.1f} s long, its segment is {segment.start_seconds:g} to {segment.end_seconds:g} s"
    )


def _names_start(file: str, segment: audioset.Segment) -> bool:
    """Whether a file's name says that it was cut out already."""
    return audioset.find_ytid(PurePosixPath(file).stem, {segment.ytid})[1] is not None


def _scan(scan: _Scan, workers: int, progress: Progress) -> tuple[list[Recording], list[LeftOut]]:
    total = len(scan.files)
    tasks = [scan._replace(files=scan.files[i : i + FILES_PER_TASK]) for i in range(0, total, FILES_PER_TASK)]
    # A process takes seconds to start and reads some thousand headers a second.
    enough = min(workers, total // (20 * FILES_PER_TASK))
    found: list[Recording | LeftOut] = []
    for part in run_tasks(_scan_files, tasks, enough):
        found += part
        progress("reading headers", len(found), total)
    found.sort(key=lambda entry: entry.file)
    recordings = [entry for entry in found if isinstance(entry, Recording)]
    return recordings, [entry for entry in found if isinstance(entry, LeftOut)]


def _scan_files(scan: _Scan) -> list[Recording | LeftOut]:
    found: list[Recording | LeftOut] = []
    for name in scan.files:
        path = scan.source / name
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise BadClip("unreadable", "not a regular file")
            with open(path, "rb") as file:
                found.append(_scan_file(name, file, scan))
        except BadClip as error:
            found.append(LeftOut(name, 0.0, error.reason, error.detail))
        except OSError as error:
            found.append(LeftOut(name, 0.0, "unreadable", error.strerror or str(error)))
    return found


def _scan_file(name: str, file: BinaryIO, scan: _Scan) -> Recording:
    info = probe(file)
    check_length(info.samples, info.sample_rate, scan.features)
    if info.samples >= (scan.segment_seconds + MIN_TAIL_SECONDS) * info.sample_rate:
        # A header may claim hours that are not there, and each piece of them would become a clip.
        read_span(file, info.samples - info.sample_rate, info.samples, info.sample_rate)
    return Recording(name, info.samples, info.sample_rate, info.channels, os.fstat(file.fileno()).st_size)
