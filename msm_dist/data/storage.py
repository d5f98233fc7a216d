"""Bytes of a corpus' files, wherever they lie.

In: locations, each a local path or a URL, and ranges of bytes in them. Out: those bytes. A store belongs to one
process and is made in it: loader workers are forked, and neither connections nor locks may be shared. Fails with
FileNotFoundError where there is no such file, with DataError on a file of another size than the index says, on one
that still can't be read after retries, and on a command that is not permitted. `confirm` tells files that others have
changed since they were first seen, so that nothing is made of their bytes.

    LocalFiles            paths: memory-mapped
    remote.RemoteFiles    URLs: parallel requests, retried; made by http_transport (http, https) or fsspec_transport
    pipe_store.PipeFiles  shell commands, where they are permitted: whole shards in temporary files
"""

import errno
import mmap
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol
from urllib.parse import quote, unquote, urlsplit

from msm_dist.config import Data
from msm_dist.errors import DataError
from msm_dist.files import open_regular, read_small
from msm_dist.redact import has_password

MAX_OPEN_FILES = 128
MAX_SMALL_FILE = 256 * 2**20  # as of remote ones
PAUSES = (0.1, 0.2, 0.4)  # seconds before each retry
UNKNOWN_SIZE = -1


class Access(NamedTuple):
    """How remote files are read: seconds without a byte that end an attempt, further attempts, parallel requests.

    `allow_pipe`: whether locations may be shell commands.
    """

    timeout: float = 30.0
    retries: int = 10
    connections: int = 8
    allow_pipe: bool = False


def access_of(data: Data) -> Access:
    """What a configuration says of it."""
    return Access(data.read_timeout_seconds, data.read_retries, data.connections, data.allow_pipe)


class Span(NamedTuple):
    """Bytes [start, stop) of the file at `location`, which has `size` bytes in all."""

    location: str
    size: int
    start: int
    stop: int


class Stamp(NamedTuple):
    """What tells that a file was written to: the time of its last change, and its size."""

    mtime_ns: int
    size: int


class Store(Protocol):
    """What the stores of this module can do."""

    def sizes(self, locations: Sequence[str]) -> list[int | None]:
        """Bytes of files, None where there is none, UNKNOWN_SIZE where only reading would tell: `fetch` checks it."""

    def read(self, locations: Sequence[str]) -> list[bytes]:
        """Whole, small files. Raises FileNotFoundError."""

    def fetch(self, spans: Sequence[Span]) -> list[memoryview]:
        """The bytes of spans, in their order."""

    def confirm(self, locations: Sequence[str]) -> dict[str, str]:
        """Which of the files that were fetched are no longer those they were, and what happened to them.

        To be asked once their bytes are used: they may be views of the file. It costs no request: what is behind a URL
        has the size checked of every answer.
        """


def stamps(locations: Iterable[str]) -> dict[str, Stamp]:
    """Of the files of this machine that are there: what LocalFiles is to confirm against."""
    found = {}
    for location in locations:
        if not is_remote(location):
            with suppress(OSError):
                status = os.stat(location)
                found[location] = Stamp(status.st_mtime_ns, status.st_size)
    return found


def is_remote(location: str) -> bool:
    """Whether a location is a URL."""
    return "://" in location or location.startswith("pipe:")


def join(location: str, name: str) -> str:
    """A file in a folder."""
    if not is_remote(location):
        return str(Path(location) / name)
    return f"{location.rstrip('/')}/{quote(name) if _is_http(location) else name}"


def split(location: str) -> tuple[str, str]:
    """The folder of a file, and its name."""
    if not is_remote(location):
        return str(Path(location).parent), Path(location).name
    folder, _, name = location.rpartition("/")
    return folder, unquote(name) if _is_http(location) else name


def check_location(location: str) -> None:
    """Raise DataError for a URL without a server or bucket, and for one that carries a password or a query.

    Those would be shown, and kept in the run folder.
    """
    if not is_remote(location) or location.startswith("pipe:"):
        return
    scheme, _, place = location.partition("://")
    if not place or (place.startswith("/") and scheme != "file"):
        raise DataError(f"{location}: names no server or bucket; write {scheme}://NAME/FOLDER")
    try:
        parts = urlsplit(location)
    except ValueError as error:
        raise DataError(f"{scheme}://...: its URL can't be read ({error}); see how it is written") from None
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    if has_password(location):
        shown = f"{scheme}://{location.rpartition('@')[2].partition('?')[0]}"  # with / ? or # in it, no parts tell it
    if "@" in parts.netloc or has_password(location):
        raise DataError(
            f"{shown}: its URL holds a user name; leave it out and name user and password in ~/.netrc "
            "(or the file that NETRC names), or use the environment variables of the store's own library"
        )
    if parts.query or parts.fragment:
        raise DataError(
            f"{shown}: its URL has a query or fragment behind the path, which would not hold for the "
            "other files of the corpus; give the bare URL, and access by ~/.netrc or by s3://, gs:// or abfs:// with "
            "credentials in the environment"
        )


def open_store(location: str, access: Access, stamped: Mapping[str, Stamp] | None = None) -> Store:
    """The store for files at or below `location`. Raises DataError for a kind of URL that there is none for.

    `stamped`: what files of this machine were when the run began.
    """
    if not is_remote(location):
        return LocalFiles(stamped)
    check_location(location)
    if location.startswith("pipe:"):
        if not access.allow_pipe:
            raise DataError(
                f"{location}: would run a shell command with your rights; for a run, data.allow_pipe=true permits it "
                "(`msm-dist data` never does). Paths and http, s3 and gs URLs need no command"
            )
        from msm_dist.data.pipe_store import PipeFiles

        return PipeFiles(location, access)
    from msm_dist.data.remote import RemoteFiles

    if _is_http(location):
        try:
            from msm_dist.data.http_transport import HttpTransport
        except ModuleNotFoundError as error:
            raise DataError(
                f"{location}: needs the package {error.name}, which is not installed; pip install 'msm-dist[train]'"
            ) from None
        return RemoteFiles(HttpTransport(location, access), access)
    from msm_dist.data.fsspec_transport import FsspecTransport

    return RemoteFiles(FsspecTransport(location, access), access)


class LocalFiles:
    """Files of this machine, mapped into memory."""

    def __init__(self, stamped: Mapping[str, Stamp] | None = None) -> None:
        """`stamped`: what files were earlier; another one is what it was when it was first mapped."""
        self._stamped = {} if stamped is None else stamped
        self._seen: dict[str, tuple[int, Stamp]] = {}  # inode and stamp
        self._mapped = lru_cache(MAX_OPEN_FILES)(self._map)

    def sizes(self, locations: Sequence[str]) -> list[int | None]:
        """Bytes of files, None where there is none."""
        return [path.stat().st_size if path.is_file() else None for path in map(Path, locations)]

    def read(self, locations: Sequence[str]) -> list[bytes]:
        """Whole, small files. Raises FileNotFoundError, OSError: also for what is large, or no file."""
        return [read_small(location, MAX_SMALL_FILE) for location in locations]

    def fetch(self, spans: Sequence[Span]) -> list[memoryview]:
        """The bytes of spans, in their order: views of the files. Raises DataError."""
        return [self._view(span) for span in spans]

    def confirm(self, locations: Sequence[str]) -> dict[str, str]:
        """Which of the files were overwritten, replaced, truncated or deleted since they were first seen.

        By inode, time of change and size: one stat each. Raises DataError where that is not to be had.
        """
        return {location: change for location in locations if (change := self._change(location))}

    def _change(self, location: str) -> str | None:
        inode, stamp = self._seen.get(location) or (None, self._stamped.get(location))
        if stamp is None:
            return None
        status = _status(location)
        if status is None:
            return "was deleted"
        if status.st_size != stamp.size:
            return f"has {status.st_size} bytes, its index says {stamp.size}"
        if inode is not None and status.st_ino != inode:
            return "was replaced by another file"
        return None if status.st_mtime_ns == stamp.mtime_ns else "was written to"

    def _view(self, span: Span) -> memoryview:
        content = self._mapped(span.location, span.size)
        # Touching a page beyond the end of a file that shrank would kill the process.
        check_size(span.location, content.size(), span.size)
        return memoryview(content)[span.start : span.stop]

    def _map(self, location: str, size: int) -> mmap.mmap:
        content, status = _map(location, size)
        # It may have been mapped before, and put away for another one.
        stamp = self._seen[location][1] if location in self._seen else self._stamped.get(location)
        self._seen[location] = (status.st_ino, stamp or Stamp(status.st_mtime_ns, status.st_size))
        return content


def check_size(location: str, found: int, expected: int) -> None:
    """Raise DataError where a file has not the bytes that its index says."""
    if found != expected:
        raise DataError(
            f"{location}: {found} bytes, its index says {expected}; restore it and start again: the run "
            "continues from its last checkpoint"
        )


def _is_http(location: str) -> bool:
    return location.startswith(("http://", "https://"))


def _status(location: str) -> os.stat_result | None:
    """What the file system says of a file, None where it is gone. Raises DataError."""
    for pause in (*PAUSES, None):
        try:
            return os.stat(location)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == errno.ESTALE:
                return None
            fault = error.strerror
        if pause is not None:
            time.sleep(pause)
    raise DataError(
        f"{location}: can't be looked at ({fault}), tried {len(PAUSES) + 1} times; mend that and start again: the run "
        "continues from its last checkpoint"
    )


def _map(location: str, size: int) -> tuple[mmap.mmap, os.stat_result]:
    for pause in (*PAUSES, None):
        try:
            with open_regular(location) as file:
                status = os.fstat(file.fileno())
                check_size(location, status.st_size, size)
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), status
        except OSError as error:
            fault = error.strerror
        if pause is not None:
            time.sleep(pause)
    raise DataError(
        f"{location}: can't be read ({fault}), tried {len(PAUSES) + 1} times; restore it and start again: "
        "the run continues from its last checkpoint"
    )
