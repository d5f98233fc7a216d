"""AudioSet's tables: which clip has which labels, and which audio file is which clip.

In: segments CSVs (`YTID, start_seconds, end_seconds, "label,label"` after '#' comments), the class list
(`index,mid,display_name`), names of audio files. Out: clip records by name of file; how much of the tables is there.
Fails with DataError that names the line.
"""

import csv
import hashlib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from msm_dist.data.index import Index, Official
from msm_dist.errors import DataError

SEGMENT_COLUMNS = 'YTID, start_seconds, end_seconds, "label,label"'
CLASS_COLUMNS = ["index", "mid", "display_name"]
EVALUATION_NAME = "eval_segments.csv"
OFFICIAL_NAMES = {"balanced_train_segments.csv", "unbalanced_train_segments.csv", EVALUATION_NAME}
USUAL_MEAN, USUAL_STD = -7.1, 4.2
MEAN_TOLERANCE, STD_TOLERANCE = 1.0, 0.5
"""Of the log-mel of AudioSet with the recipe's front end: farther off, something was done to the audio."""
START_TOLERANCE_SECONDS = 1.0
"""Between the start in a file's name and the table's: names round."""


@dataclass(frozen=True)
class Segment:
    """A row of a segments CSV: the clip's identifier, its place in the original video in s, its labels."""

    ytid: str
    start_seconds: float
    end_seconds: float
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Tables:
    """What is wanted: the clips of all tables by YTID, and the YTIDs of the evaluation that are to be left out.

    `names` are those of the files; `tells_evaluation` says whether evaluation clips could be told from others.
    """

    segments: dict[str, Segment]
    evaluation: frozenset[str]
    names: tuple[str, ...]
    tells_evaluation: bool


@dataclass(frozen=True)
class Matches:
    """Files that are clips of the table, files of a clip that another file has already, the rest of both.

    `other_segments` are files of a listed video whose name says another start; `evaluation` those to be left out.
    """

    segments: dict[str, Segment]
    duplicates: tuple[str, ...]
    other_segments: tuple[str, ...]
    evaluation: tuple[str, ...]
    num_unlisted: int
    num_absent: int


def read_tables(csvs: Sequence[Path], eval_csv: Path | None, keep_evaluation: bool) -> Tables:
    """All rows of `csvs`, and which clips are evaluation: listed by `eval_csv` or the one beside the others.

    An evaluation table among `csvs` asks for its clips, and so does `keep_evaluation`. Raises DataError.
    """
    segments: dict[str, Segment] = {}
    for path in csvs:
        for segment in read_segments(path):
            if segments.setdefault(segment.ytid, segment) != segment:
                raise DataError(f"{path}: {segment.ytid} has another time or other labels than in a table before it")
    beside = [path.parent / EVALUATION_NAME for path in csvs if (path.parent / EVALUATION_NAME).is_file()]
    table = eval_csv or next(iter(beside), None)
    asked_for = keep_evaluation or any(path.name == EVALUATION_NAME or path == eval_csv for path in csvs)
    evaluation = frozenset(s.ytid for s in read_segments(table)) if table and not asked_for else frozenset()
    tells = asked_for or bool(table) or bool(csvs)
    return Tables(segments, evaluation, tuple(path.name for path in csvs), tells)


def official(tables: Tables, ytids: Iterable[str]) -> Official | None:
    """How much of the tables' clips are among `ytids`; None without a table."""
    if not tables.segments:
        return None
    found = sorted(tables.segments.keys() & set(ytids))
    manifest = hashlib.sha256("".join(f"{ytid}\n" for ytid in found).encode()).hexdigest()
    return Official(tables.names, len(tables.segments), len(found), manifest)


def unusual(index: Index, recipe: dict[str, object]) -> str | None:
    """A sentence where statistics are far from AudioSet's although its own tables were packed; `recipe`: front end."""
    tables = index.official.tables if index.official else ()
    if index.mean is None or index.features != recipe or not OFFICIAL_NAMES & set(tables):
        return None
    if abs(index.mean - USUAL_MEAN) <= MEAN_TOLERANCE and abs(index.std - USUAL_STD) <= STD_TOLERANCE:
        return None
    return (
        f"the log-mel has mean {index.mean:.2f} and std {index.std:.2f}, AudioSet's are about {USUAL_MEAN} and "
        f"{USUAL_STD} (farther than {MEAN_TOLERANCE:g} and {STD_TOLERANCE:g}): was its level or bandwidth changed, or "
        "is only a part of it there?"
    )


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


def match_files(
    files: Iterable[str], segments: Iterable[Segment], evaluation: AbstractSet[str] = frozenset()
) -> Matches:
    """Find each file's row by its name: the YTID, also after a Y and before _start or _start_end, in s or ms."""
    by_ytid = {segment.ytid: segment for segment in segments}
    matched: dict[str, Segment] = {}
    duplicates, other_segments, held_out, num_unlisted = [], [], [], 0
    taken = set()
    known = by_ytid.keys() | evaluation
    for file in sorted(files):
        ytid, start = find_ytid(PurePosixPath(file).stem, known)
        if ytid is None:
            num_unlisted += 1
        elif ytid in evaluation:
            held_out.append(file)
        elif start is not None and not is_start(start, by_ytid[ytid]):
            other_segments.append(file)
        elif ytid in taken:
            duplicates.append(file)
        else:
            taken.add(ytid)
            matched[file] = by_ytid[ytid]
    left_out = (tuple(duplicates), tuple(other_segments), tuple(held_out))
    return Matches(matched, *left_out, num_unlisted, len(by_ytid) - len(matched))


def find_ytid(stem: str, known: AbstractSet[str] | dict[str, Segment]) -> tuple[str | None, float | None]:
    """The known YTID that `stem` may mean, and the start it names, as written; the most literal reading first.

    A YTID may itself begin with Y or end in digits.
    """
    for pattern in (r"()", r"_([0-9.]+)", r"_([0-9.]+)_[0-9.]+"):
        if found := re.fullmatch(rf"(.+?){pattern}", stem):
            start = _number(found[2])
            for name in (found[1], found[1].removeprefix("Y")):
                if name in known:
                    return name, start
    return None, None


def look_official(files: Iterable[str]) -> bool:
    """Whether most files are named as AudioSet's are: a YTID of 11 letters and digits, perhaps a start and an end."""
    stems = [PurePosixPath(file).stem for file in files]
    named = sum(bool(re.fullmatch(r"Y?[A-Za-z0-9_-]{11}(_[0-9.]+){0,2}", stem)) for stem in stems)
    numbered = len(stems) > 1 and len(os.path.commonprefix(stems)) > 1
    return 2 * named > len(stems) and not numbered


def is_start(start: float, segment: Segment) -> bool:
    """Whether a start, in s or ms, is the segment's."""
    return any(abs(value - segment.start_seconds) <= START_TOLERANCE_SECONDS for value in (start, start / 1000))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _segment(row: list[str]) -> Segment | None:
    if len(row) != 4 or not row[0]:
        return None
    try:
        start, end = float(row[1]), float(row[2])
    except ValueError:
        return None
    # Two million rows share 527 labels.
    labels = tuple(sys.intern(label.strip()) for label in row[3].split(",") if label.strip())
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
