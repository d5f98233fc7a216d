"""Files of a folder that may be anybody's, read so that nothing outside of it is: regular ones only, bounded.

In: paths in a run folder. Out: their bytes, records and lines. Links are not followed, pipes and devices not opened.
Fails with DataError, which names the file and what it is.
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from msm_dist.errors import DataError
from msm_dist.files import kind_of, open_regular, read_small
from msm_dist.plain import parse_json

MAX_FILE = 2**24
MAX_LINE = 2**22


class Line(NamedTuple):
    """A line of a .jsonl file; `record` is None where it is no object with a step."""

    number: int
    step: int
    record: dict[str, Any] | None
    is_torn: bool
    """Without its end: being written, or cut off by a kill."""


def is_there(path: Path) -> bool:
    """Whether there is anything of that name, a broken link too."""
    return os.path.lexists(path)


def plain_size(path: Path) -> int:
    """Bytes of a regular file. Raises DataError for anything else, and where there is nothing."""
    try:
        status = path.lstat()
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror})") from None
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path}: is {_kind(path, status.st_mode)}, not the file that a run writes; not looked into")
    return status.st_size


def open_plain(path: Path) -> BinaryIO:
    """A regular file, opened for reading. Raises DataError."""
    plain_size(path)
    try:
        return open_regular(path, follow=False)
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror})") from None


def check_folder(path: Path) -> None:
    """Raise DataError for anything but a folder."""
    try:
        mode = path.lstat().st_mode
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror})") from None
    if not stat.S_ISDIR(mode):
        raise DataError(f"{path}: is {_kind(path, mode)}, not the folder that a run makes; not looked into")


def names_in(folder: Path) -> list[str]:
    """What is in a folder, by name; nothing where there is none. Raises DataError."""
    if not is_there(folder):
        return []
    check_folder(folder)
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise DataError(f"{folder}: can't be read ({error.strerror})") from None


def read_plain(path: Path, limit: int = MAX_FILE) -> bytes:
    """The bytes of a small file. Raises DataError."""
    plain_size(path)
    try:
        return read_small(path, limit, follow=False)
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror})") from None


def read_record(path: Path) -> dict[str, Any]:
    """The object in a small JSON file. Raises DataError."""
    content = read_plain(path)
    try:
        value = parse_json(content)
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: holds no JSON object")
    return value


def lines_of(path: Path) -> Iterator[Line]:
    """The lines of a .jsonl file. Raises DataError for one too long to be a record."""
    with open_plain(path) as file:
        number = 0
        while content := file.readline(MAX_LINE + 1):
            number += 1
            if len(content) > MAX_LINE:
                raise DataError(f"{path}: line {number} has more than {MAX_LINE} bytes, which no record has")
            is_torn = not content.endswith(b"\n")
            try:
                record = parse_json(content)
            except ValueError:
                record = None
            step = record.get("step") if isinstance(record, dict) else None
            if type(step) is not int or not 0 <= step < 2**63:
                record, step = None, -1
            yield Line(number, step, record, is_torn)


def _kind(path: Path, mode: int) -> str:
    kind = kind_of(mode)
    if stat.S_ISLNK(mode):
        try:
            return f"{kind} to {os.readlink(path)}"
        except OSError:
            return kind
    return kind
