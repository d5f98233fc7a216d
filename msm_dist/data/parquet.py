"""Parquet copies of AudioSet, with the audio's bytes in the table, as the clips that packing will write.

In: a folder of .parquet files with a column `audio` (struct of bytes and path, or bytes), an identifier (one of
ID_COLUMNS, else the name in audio.path), and perhaps labels. Out: rows, found by reading the small columns alone; later
the audio of the rows of a shard, a batch of a row group at a time. The extra [parquet] brings pyarrow. Fails with
DataError; files that are no Parquet are left out.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from msm_dist.data.audioset import Segment, Tables, find_ytid
from msm_dist.data.clips import ClipList, LeftOut, Progress, find_files, unique_stems
from msm_dist.errors import DataError

if TYPE_CHECKING:
    from pyarrow import DataType
    from pyarrow.parquet import ParquetFile

SUFFIX = ".parquet"
AUDIO_COLUMN = "audio"
ID_COLUMNS = ("video_id", "ytid", "youtube_id", "id", "key", "__key__", "file_name", "filename")
LABEL_COLUMN, NAME_COLUMN = "labels", "human_labels"
BATCH_ROWS = 32
BUFFER_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Row:
    """A row with a recording: its file below the source, row group, place in that, and what it is.

    `key` begins the keys of its clips; `name` is how reports call it.
    """

    key: str
    name: str
    file: str
    group: int
    place: int
    labels: tuple[str, ...]
    names: tuple[str, ...]
    ytid: str = ""


def list_rows(
    source: Path, files: Sequence[str], tables: Tables, names: dict[str, str], progress: Progress
) -> ClipList:
    """The rows of Parquet files that the tables want, in the order of the files. Raises DataError."""
    check_installed(source, files)
    found, left_out, seen = [], [], {}
    num_rows = num_unlisted = 0
    for done, file in enumerate(files, 1):
        try:
            content = list(_small_columns(source / file))
        except (OSError, ValueError) as error:
            left_out.append(LeftOut(file, 0.0, "unreadable", _first_line(error)))
            content = []
        for group, place, ident, labels, shown in content:
            num_rows += 1
            ident = f"{PurePosixPath(file).with_suffix('')}-{group}-{place}" if ident is None else ident
            row = Row(ident, f"{file}/{ident}", file, group, place, labels, shown)
            outcome = _choose(row, tables, seen)
            if isinstance(outcome, Row):
                found.append(outcome)
            elif outcome is None:
                num_unlisted += 1
            else:
                left_out.append(outcome)
        progress("reading tables", done, len(files))
    if tables.segments and num_unlisted and not found:
        raise DataError(
            f"{', '.join(tables.names)}: none of their {len(tables.segments)} clips is in {source}, whose "
            f"{num_rows} rows are identified as, for one, {content[0][2] if content else None}"
        )
    # What is no YTID, such as a number that begins anew in each file, says nothing of which recording it is.
    uses = Counter(row.key for row in found)
    wholes = [row.key if uses[row.key] == 1 else f"{row.file}/{row.group}/{row.place}/{row.key}" for row in found]
    stems = unique_stems(wholes)
    rows = [_named(row, stems[whole], names) for row, whole in zip(found, wholes, strict=True)]
    counts = {"files": num_rows, "parquet_files": len(files)}
    if tables.segments:
        listed = len({row.ytid for row in rows})
        counts |= {"files_not_in_csv": num_unlisted, "csv_clips_without_file": len(tables.segments) - listed}
    return ClipList(rows, left_out, counts)


def read_rows(source: Path, rows: Sequence[Row]) -> Iterator[tuple[Row, bytes | LeftOut]]:
    """Each row with its audio, or why there is none, by row group; a batch is held in memory."""
    wanted: dict[tuple[str, int], dict[int, Row]] = defaultdict(dict)
    for row in rows:
        wanted[row.file, row.group][row.place] = row
    for (file, group), places in wanted.items():
        waiting = dict(places)
        try:
            for place, audio in enumerate(_audio(source / file, group)):
                if place in waiting:
                    row = waiting.pop(place)
                    yield row, audio or LeftOut(row.name, 0.0, "empty", "no bytes in its row")
                    if not waiting:
                        break
            fault = "its row is gone"
        except (OSError, ValueError) as error:
            fault = _first_line(error)
        for row in waiting.values():
            yield row, LeftOut(row.name, 0.0, "unreadable", fault)


def find_parquet(source: Path) -> list[str]:
    """The Parquet files below a folder."""
    return find_files(source, {SUFFIX})


def check_installed(source: Path, files: Sequence[str]) -> None:
    """Raise DataError where pyarrow is missing."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise DataError(
            f"{source}: its {len(files)} Parquet files, such as {files[0]}, need pyarrow ({error}): "
            "pip install 'msm-dist[parquet]'"
        ) from None


def _choose(row: Row, tables: Tables, seen: dict[str, str]) -> Row | LeftOut | None:
    """The row if it is wanted, with its YTID and labels; why not; None where the tables do not list it."""
    stem = PurePosixPath(row.key).stem if "." in row.key else row.key
    ytid = find_ytid(row.key, tables.evaluation)[0] or find_ytid(stem, tables.evaluation)[0]
    if ytid:
        return LeftOut(row.name, 0.0, "evaluation", "the evaluation table lists it")
    segment: Segment | None = None
    if tables.segments:
        ytid = find_ytid(row.key, tables.segments)[0] or find_ytid(stem, tables.segments)[0]
        if ytid is None:
            return None
        segment = tables.segments[ytid]
    if segment is None:
        return row
    if ytid in seen:
        return LeftOut(row.name, 0.0, "duplicate", f"the same clip as {seen[ytid]}")
    seen[ytid] = row.name
    return Row(row.key, row.name, row.file, row.group, row.place, segment.labels, row.names, segment.ytid)


def _named(row: Row, stem: str, names: dict[str, str]) -> Row:
    """With its final key, and the class list's display names where there is one."""
    shown = tuple(names[label] for label in row.labels) if names else row.names
    return Row(stem, row.name, row.file, row.group, row.place, row.labels, shown, row.ytid)


def _small_columns(path: Path) -> Iterator[tuple[int, int, str | None, tuple[str, ...], tuple[str, ...]]]:
    """Row group, place, identifier if there is one, labels, display names of every row. Raises ValueError."""
    with _opened(path) as file:
        columns = set(file.schema_arrow.names)
        if AUDIO_COLUMN not in columns:
            raise ValueError(f"has no column {AUDIO_COLUMN!r}; its columns are {', '.join(sorted(columns))[:200]}")
        _check_audio(file.schema_arrow.field(AUDIO_COLUMN).type)
        ident = next((name for name in ID_COLUMNS if name in columns), f"{AUDIO_COLUMN}.path")
        wanted = [ident, *(name for name in (LABEL_COLUMN, NAME_COLUMN) if name in columns)]
        for group in range(file.num_row_groups):
            place = 0
            for batch in file.iter_batches(1024, row_groups=[group], columns=wanted, use_threads=False):
                for row in batch.to_pylist():
                    name = (row.get(AUDIO_COLUMN) or {}).get("path") if ident not in row else row[ident]
                    name = None if name is None or name == "" else _text(name)
                    yield group, place, name, _strings(row.get(LABEL_COLUMN)), _strings(row.get(NAME_COLUMN))
                    place += 1


def _check_audio(kind: "DataType") -> None:
    """Raise ValueError where a column of this type holds no audio."""
    from pyarrow import types

    content = kind.value_type if types.is_dictionary(kind) else kind
    if types.is_struct(kind):
        index = kind.get_field_index("bytes")
        content = kind.field(index).type if index >= 0 else kind
    if not (types.is_binary(content) or types.is_large_binary(content) or types.is_fixed_size_binary(content)):
        raise ValueError(
            f"its column {AUDIO_COLUMN!r} is {str(kind)[:80]}; must be bytes, or a struct whose field bytes holds them"
        )


def _text(value: Any) -> str:
    return value.decode(errors="surrogateescape") if isinstance(value, bytes) else str(value)


def _audio(path: Path, group: int) -> Iterator[bytes | None]:
    """The audio of a row group, row by row."""
    with _opened(path) as file:
        for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=[AUDIO_COLUMN], use_threads=False):
            for value in batch.column(0):
                audio = value.as_py()
                yield audio.get("bytes") if isinstance(audio, dict) else audio


def _opened(path: Path) -> "ParquetFile":
    from pyarrow.parquet import ParquetFile

    return ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False)


@lru_cache(2**16)
def _interned(values: tuple[Any, ...]) -> tuple[str, ...]:
    """Two million rows share few sets of labels."""
    return tuple(value for value in values if isinstance(value, str))


def _strings(value: Any) -> tuple[str, ...]:
    """A column's strings; class numbers without their names say nothing."""
    values = value if isinstance(value, list) else str(value or "").split(",") if isinstance(value, str) else []
    return _interned(tuple(v.strip() if isinstance(v, str) else None for v in values if v))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
