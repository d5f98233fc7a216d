"""AudioSet's tables: which clip has which labels, and which audio file is which clip.

In: a segments CSV (`YTID, start_seconds, end_seconds, "label,label"` after '#' comments), the class list
(`index,mid,display_name`), names of audio files. Out: clip records by name of file. Fails with DataError that
names the line.
"""

import csv
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from msm_dist.errors import DataError

SEGMENT_COLUMNS = 'YTID, start_seconds, end_seconds, "label,label"'
CLASS_COLUMNS = ["index", "mid", "display_name"]


@dataclass(frozen=True)
class Segment:
    """A row of a segments CSV: the clip's identifier, its place in the original video in s, its labels."""

    ytid: str
    start_seconds: float
    end_seconds: float
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Matches:
    """Files that are clips of the table, files of a clip that another file has already, the rest of both."""

    segments: dict[str, Segment]
    duplicates: tuple[str, ...]
    num_unlisted: int
    num_absent: int


def read_segments(path: Path) -> list[Segment]:
    """The rows of a segments CSV in its order. Raises DataError."""
    segments = []
    lines: dict[str, int] = {}
    for line, row in _rows(path):
        if row[0].startswith("#"):
            continue
        segment = _segment(row)
        if segment is None:
            raise DataError(f"{path}, line {line}: {', '.join(row)[:80]!r} is not {SEGMENT_COLUMNS}")
        if segment.ytid in lines:
            raise DataError(f"{path}, line {line}: {segment.ytid} is on line {lines[segment.ytid]} already; drop one")
        lines[segment.ytid] = line
        segments.append(segment)
    if not segments:
        raise DataError(f"{path}: has no clips; a row is {SEGMENT_COLUMNS}")
    return segments


def read_class_names(path: Path) -> dict[str, str]:
    """{label: display name} from a class list. Raises DataError."""
    rows = _rows(path)
    header = next(rows, (1, []))[1]
    if header != CLASS_COLUMNS:
        raise DataError(f"{path}: its first line is {','.join(header)[:80]!r}, must be {','.join(CLASS_COLUMNS)}")
    names = {}
    for line, row in rows:
        if len(row) != len(CLASS_COLUMNS):
            raise DataError(f"{path}, line {line}: has {len(row)} columns, must have {','.join(CLASS_COLUMNS)}")
        names[row[1]] = row[2]
    return names


def check_labels(segments: Iterable[Segment], names: dict[str, str], source: Path) -> None:
    """Raise DataError if a clip has a label that is not in the class list `source`."""
    for segment in segments:
        if unknown := [label for label in segment.labels if label not in names]:
            raise DataError(f"{segment.ytid} has the label {unknown[0]!r}, which {source} lacks; is it the right list?")


def match_files(files: Iterable[str], segments: Iterable[Segment]) -> Matches:
    """Find each file's row by its name: the YTID, also after a Y and before _start or _start_end."""
    by_ytid = {segment.ytid: segment for segment in segments}
    matched: dict[str, Segment] = {}
    duplicates, num_unlisted = [], 0
    taken = set()
    for file in sorted(files):
        ytid = next((name for name in _identifiers(PurePosixPath(file).stem) if name in by_ytid), None)
        if ytid is None:
            num_unlisted += 1
        elif ytid in taken:
            duplicates.append(file)
        else:
            taken.add(ytid)
            matched[file] = by_ytid[ytid]
    return Matches(matched, tuple(duplicates), num_unlisted, len(by_ytid) - len(matched))


def _identifiers(stem: str) -> Iterator[str]:
    """What `stem` may mean, the most literal first: a YTID may itself begin with Y or end in digits."""
    for pattern in ("", r"_[0-9.]+$", r"_[0-9.]+_[0-9.]+$"):
        name = re.sub(pattern, "", stem) if pattern else stem
        yield name
        yield name.removeprefix("Y")


def _segment(row: list[str]) -> Segment | None:
    if len(row) != 4 or not row[0]:
        return None
    try:
        start, end = float(row[1]), float(row[2])
    except ValueError:
        return None
    labels = tuple(label.strip() for label in row[3].split(",") if label.strip())
    return Segment(row[0], start, end, labels) if 0 <= start < end else None


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of every row that is not empty."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, skipinitialspace=True, strict=True)
            for row in reader:
                if row:
                    yield reader.line_num, row
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror})") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: is not a CSV file ({error})") from None
