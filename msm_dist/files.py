"""Files that are there whole or not at all, also after a kill or a power cut; and files of strangers, read with bounds.

In: paths, and bytes to write. Out: files, their bytes. Fails with OSError, whose `strerror` says what is wrong: a pipe
or a device in a file's place may have no end, or never begin, and is not opened.
"""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

PIECE_BYTES = 2**20
KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISLNK, "a link"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def kind_of(mode: int) -> str:
    """What a path that is no regular file is, by its mode."""
    return next((name for test, name in KINDS if test(mode)), "of an unknown kind")


def check_regular(path: str | Path, follow: bool = True) -> None:
    """Raise OSError for anything but a regular file; `follow`: or a link to one."""
    _check_mode(path, os.stat(path, follow_symlinks=follow).st_mode)


def open_regular(path: str | Path, follow: bool = True) -> BinaryIO:
    """A regular file, opened for reading; `follow`: or a link to one. Raises OSError for anything else."""
    # Before it is opened, as that alone does something to some devices.
    check_regular(path, follow)
    flags = os.O_NONBLOCK if follow else os.O_NONBLOCK | os.O_NOFOLLOW
    file = open(path, "rb", opener=lambda name, mode: os.open(name, mode | flags))  # noqa: SIM115 - the caller closes it
    try:
        # It may have become another since.
        _check_mode(path, os.fstat(file.fileno()).st_mode)
    except OSError:
        file.close()
        raise
    return file


def read_small(path: str | Path, limit: int, follow: bool = True) -> bytes:
    """All of a regular file of at most `limit` bytes. Raises OSError for a larger one, and for anything else."""
    with open_regular(path, follow) as file:
        size = os.fstat(file.fileno()).st_size
        content = b""
        if size <= limit:
            # A byte more, as a file may grow, and those of /proc claim none; not `limit`, which would be taken at once.
            content = file.read(size + 1)
            while size < len(content) <= limit and (piece := file.read(PIECE_BYTES)):
                content += piece
    if (found := max(size, len(content))) > limit:
        raise OSError(errno.EFBIG, f"{found} bytes, at most {limit} are read", str(path))
    return content


def _check_mode(path: str | Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, f"is {kind_of(mode)}, not a file", str(path))


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and flush it to the disk. Raises OSError."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_atomically(path: Path, content: bytes | str) -> None:
    """Replace a file by one with this content: readers see all of the old or all of the new. Raises OSError."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write_durably(temporary, content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Flush a written file's content, or a folder's list of names, to the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
