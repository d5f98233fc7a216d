"""A folder of audio -> the clips that packing will write, and the files it will leave out with their reasons.

In: wav, flac, ogg and mp3 files of any rate, channel count and depth of folders, optionally an AudioSet CSV.
Out: clips in order of file and time, with keys that are unique and safe in a webdataset tar. Only headers are
read. Fails with DataError where there is no audio, or none that the CSV lists.
"""

import hashlib
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from msm_dist.config import Features
from msm_dist.data import audioset
from msm_dist.data.audio import BadClip, decode_span, num_target_samples, probe
from msm_dist.data.index import REPORT_NAME
from msm_dist.data.workers import run_tasks
from msm_dist.errors import DataError
from msm_dist.files import write_atomically

SUFFIXES = {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3"}
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


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Audio that is not in the shards: its file (or key in a foreign tar), where in it, and why."""

    file: str
    start_seconds: float
    reason: str
    detail: str


class ClipList(NamedTuple):
    """Clips to write, files left out, and counts for the report."""

    clips: list[Clip]
    left_out: list[LeftOut]
    counts: dict[str, int]


class _Scan(NamedTuple):
    source: Path
    files: Sequence[str]
    segment_seconds: float
    features: Features


def list_clips(
    source: Path,
    csv: Path | None,
    labels: Path | None,
    segment_seconds: float,
    features: Features,
    workers: int,
    progress: Progress,
) -> ClipList:
    """Every clip of `source`, long recordings cut; with a CSV only the files it lists. Raises DataError."""
    files = find_audio(source)
    counts = {"files": len(files)}
    left_out: list[LeftOut] = []
    segments: dict[str, audioset.Segment] = {}
    names: dict[str, str] = {}
    if csv:
        matches = _match(source, files, csv)
        segments, files = matches.segments, list(matches.segments)
        left_out += [LeftOut(f, 0.0, "duplicate", "another file is the same clip") for f in matches.duplicates]
        counts |= {"files_not_in_csv": matches.num_unlisted, "csv_clips_without_file": matches.num_absent}
        if labels:
            names = audioset.read_class_names(labels)
            audioset.check_labels(segments.values(), names, labels)
    recordings, unusable = _scan(_Scan(source, files, segment_seconds, features), workers, progress)
    left_out += unusable
    stems = unique_stems([recording.file for recording in recordings])
    clips = []
    for recording in recordings:
        tags = segments[recording.file].labels if segments else ()
        shown = tuple(names[tag] for tag in tags) if names else ()
        for start, stop in cut(recording.samples, recording.rate, segment_seconds):
            key = f"{stems[recording.file]}_{round(1000 * start / recording.rate)}"
            clips.append(Clip(key, recording, start, stop, tags, shown))
    return ClipList(clips, left_out, counts)


def find_audio(source: Path) -> list[str]:
    """Paths below `source` of all audio files by suffix, sorted, without hidden ones. Raises DataError."""
    if not source.is_dir():
        raise DataError(f"{source}: no such folder; name a folder of wav, flac, ogg or mp3 files")
    files = []
    for folder, subfolders, names in os.walk(source):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        inside = Path(folder).relative_to(source)
        visible = [name for name in names if not name.startswith(".")]
        files += [(inside / name).as_posix() for name in visible if Path(name).suffix.lower() in SUFFIXES]
    if not files:
        raise DataError(f"{source}: holds no audio; files must end in {', '.join(sorted(SUFFIXES))}")
    return sorted(files)


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


def check_length(samples: int, rate: int, features: Features) -> None:
    """Raise BadClip if a clip is shorter than one analysis window."""
    if num_target_samples(samples, rate, features.sample_rate) < features.n_fft:
        raise BadClip("too_short", f"{samples} samples at {rate} Hz, less than one window of {features.n_fft}")


def write_report(out: Path, counts: dict[str, Any], left_out: Sequence[LeftOut]) -> None:
    """Write report.json: counts, and all that was left out, sorted, with the number per reason."""
    entries = sorted(left_out, key=lambda entry: (entry.file, entry.start_seconds))
    reasons = dict(sorted(Counter(entry.reason for entry in entries).items()))
    report = {**counts, "reasons": reasons, "left_out": [asdict(entry) for entry in entries]}
    write_atomically(out / REPORT_NAME, (json.dumps(report, indent=1) + "\n").encode())


def _match(source: Path, files: Sequence[str], csv: Path) -> audioset.Matches:
    rows = audioset.read_segments(csv)
    matches = audioset.match_files(files, rows)
    if not matches.segments:
        raise DataError(
            f"{csv}: none of its {len(rows)} clips is in {source}; files are named by YTID, such as "
            f"{rows[0].ytid}.wav (found: {PurePosixPath(files[0]).name})"
        )
    return matches


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
        decode_span(file, info.samples - info.sample_rate, info.samples, info.sample_rate)
    return Recording(name, info.samples, info.sample_rate, info.channels, os.fstat(file.fileno()).st_size)
