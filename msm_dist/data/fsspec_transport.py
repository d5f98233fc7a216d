"""One attempt at a request to an object store, through the file system of fsspec that knows it.

In: URLs such as s3://bucket/folder/name, whose packages are extras (s3fs, gcsfs). Out: sizes, objects, byte ranges.
The file system is made in the process that uses it and shared with nothing, as its connections and its event loop
don't survive a fork. Credentials, endpoints and the like are those that the store's own library finds in the
environment. Fails with FileNotFoundError, with remote.Unavailable where another attempt may do, with DataError where
none will: no access, no such package, an object of another size.
"""

import asyncio
import errno
import os
import re
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from msm_dist.data.remote import AGAIN, MAX_SMALL_FILE, SIZES_PER_CONNECTION, Unavailable, attempt_seconds
from msm_dist.data.storage import Access, Span, check_size
from msm_dist.errors import DataError
from msm_dist.redact import redacted

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
SHOWN_CHARACTERS = 200

T = TypeVar("T")


class FsspecTransport:
    """Requests to the object store of one corpus."""

    def __init__(self, location: str, access: Access) -> None:
        self._timeout = access.timeout
        self._files = _file_system(location, access)
        self._checked: set[tuple[str, int]] = set()
        self._connecting = threading.Lock()
        self._is_connected = False

    def size(self, location: str) -> int:
        """Bytes of an object."""
        info = self._ask(location, lambda path: self._files._info(path), 0)
        if info.get("type") != "file" or info.get("size") is None:
            raise FileNotFoundError(errno.ENOENT, "no such object", location)
        return int(info["size"])

    def read(self, location: str) -> bytes:
        """A whole, small object."""
        size = self.size(location)
        if size > MAX_SMALL_FILE:
            raise DataError(f"{location}: {size} bytes; {MAX_SMALL_FILE} are the most for a file of its kind")
        return self._bytes(location, 0, size)

    def read_span(self, span: Span) -> bytes:
        """Just the bytes of a span. Raises DataError where the object has not the span's size.

        Its size is asked for once, before its first bytes: a range does not tell it.
        """
        if (span.location, span.size) not in self._checked:
            check_size(span.location, self.size(span.location), span.size)
            self._checked.add((span.location, span.size))
        try:
            return self._bytes(span.location, span.start, span.stop)
        except Unavailable:
            self._checked.discard((span.location, span.size))
            raise

    def _bytes(self, location: str, start: int, stop: int) -> bytes:
        if start == stop:
            return b""
        content = self._ask(location, lambda path: self._files._cat_file(path, start=start, end=stop), stop - start)
        if len(content) != stop - start:
            raise Unavailable(f"{len(content)} bytes came, {stop - start} were asked for")
        return content

    def _ask(self, location: str, request: Callable[[str], Coroutine[Any, Any, T]], num_bytes: int) -> T:
        """What a request answers, within the time that it may take."""
        if self._is_connected:
            return self._answer(location, request, num_bytes)
        with self._connecting:  # once: two requests at the same time would both connect
            answer = self._answer(location, request, num_bytes)
            self._is_connected = True
            return answer

    def _answer(self, location: str, request: Callable[[str], Coroutine[Any, Any, T]], num_bytes: int) -> T:
        seconds = attempt_seconds(num_bytes, self._timeout)
        coroutine = asyncio.wait_for(request(self._files._strip_protocol(location)), seconds)
        try:
            return asyncio.run_coroutine_threadsafe(coroutine, self._files.loop).result()
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, "no such object", location) from None
        except TimeoutError:
            raise Unavailable(f"no answer within {seconds:g} s") from None
        except Exception as error:  # every store's library has errors of its own
            name = type(error).__name__
            if isinstance(error, PermissionError) or "Credentials" in name or "ParamValidation" in name:
                raise DataError(
                    f"{location}: no access ({_shown(error)}); give credentials as the store's own library takes them "
                    f"(docs/sources.md), or check the URL; {AGAIN}"
                ) from None
            raise Unavailable(_shown(error)) from None


def _file_system(location: str, access: Access):
    """A file system of fsspec of its own. Raises DataError."""
    scheme = location.partition("://")[0]
    if "::" in location:
        raise DataError(f"data.shards = {location}: chained URLs (::) are not read; name the files themselves")
    # Else gcsfs asks by gRPC what kind of bucket it is, at each request if in vain; gRPC does not survive a fork.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        import fsspec
        from fsspec.asyn import AsyncFileSystem

        kind = fsspec.get_filesystem_class(scheme)
    except (ImportError, ValueError) as error:
        remedy = f"pip install 'msm-dist[{EXTRAS[scheme]}]'" if scheme in EXTRAS else f"it says: {error}"
        raise DataError(f"data.shards = {location}: no package for {scheme}:// is installed; {remedy}") from None
    if not issubclass(kind, AsyncFileSystem):
        raise DataError(
            f"data.shards = {location}: {scheme}:// can't be read at several places at once, nor given up when it "
            "stalls; use a path, http(s)://, s3:// or gs://"
        )
    options: dict[str, Any] = {}
    if scheme in ("s3", "s3a"):
        connections = SIZES_PER_CONNECTION * access.connections
        timeouts = {"connect_timeout": access.timeout, "read_timeout": access.timeout}
        options["config_kwargs"] = {**timeouts, "retries": {"max_attempts": 0}, "max_pool_connections": connections}
    try:
        files = kind(skip_instance_cache=True, use_listings_cache=False, **options)
        files._strip_protocol(location)
    except Exception as error:  # every store's library has errors of its own
        raise DataError(
            f"{location}: {scheme}:// can't be opened ({_shown(error)}); use a path, http(s)://, s3:// or gs://, or "
            "set the environment variables that the store's own library asks for"
        ) from None
    # Attempts are counted and paused for in one place.
    if hasattr(files, "retries"):
        files.retries = 1
    return files


def _shown(error: Exception) -> str:
    """An error in short, without what may be a signature in a URL."""
    lines = str(error).splitlines() or [""]
    return redacted(re.sub(r"\?\S+", "?...", f"{type(error).__name__}: {lines[0]}"))[:SHOWN_CHARACTERS]
