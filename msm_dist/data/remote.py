"""Remote files: requests at once, tried again after pauses, checked.

In: a transport that makes one attempt at a request, and spans of files. Out: their bytes. A fault that may pass is
tried again, after pauses that grow and are drawn at random, so that a thousand readers don't come back together.
Fails with FileNotFoundError where there is no such file, with DataError where a further attempt is in vain or all
have failed: that ends the command; a training run continues from its last checkpoint.
"""

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Protocol, TypeVar

from msm_dist.data.storage import Access, Span
from msm_dist.errors import DataError

SIZES_PER_CONNECTION = 4  # requests for sizes carry nothing: so many more of them at once
MAX_MERGED_BYTES = 4 * 2**20
MAX_SPAN = 2**30
MAX_SMALL_FILE = 256 * 2**20
MIN_BYTES_PER_SECOND = 50_000
FIRST_PAUSE = 1 / 30  # longest pause before the first retry, of the timeout; doubled each time, up to the timeout
TOLD_AFTER = 4  # attempts in vain: a server that fails now and then is no news
LONGEST_REQUESTED_PAUSE = 2  # of what a server asks for, in timeouts
THREAD_NAME = "remote-read"
AGAIN = "start again once that is mended, by the same command (a training run continues from its last checkpoint)"

_random = random.SystemRandom()  # the run's own generators stay as they are
T = TypeVar("T")

log = logging.getLogger(__name__)


class Unavailable(Exception):
    """An attempt failed, another one may not. `pause`: seconds that the server asks to wait."""

    def __init__(self, reason: str, pause: float = 0.0):
        super().__init__(reason)
        self.pause = pause


class Transport(Protocol):
    """One attempt at each request, at home in any thread. Raises FileNotFoundError, Unavailable, DataError."""

    def size(self, location: str) -> int:
        """Bytes of a file."""

    def read(self, location: str) -> bytes:
        """A whole, small file."""

    def read_span(self, span: Span) -> bytes:
        """Just the bytes of a span. Raises DataError where the file has not the span's size."""


class RemoteFiles:
    """The store of remote files over a transport."""

    def __init__(self, transport: Transport, access: Access) -> None:
        self._transport = transport
        self._access = access

    def sizes(self, locations: Sequence[str]) -> list[int | None]:
        """Bytes of files, None where there is none. Raises DataError."""

        def size(location: str) -> int | None:
            with suppress(FileNotFoundError):
                return self._transport.size(location)

        work = [(name, partial(size, name)) for name in locations]
        return at_once(work, self._access, SIZES_PER_CONNECTION * self._access.connections)

    def read(self, locations: Sequence[str]) -> list[bytes]:
        """Whole, small files. Raises FileNotFoundError, DataError."""
        return at_once([(name, partial(self._transport.read, name)) for name in locations], self._access)

    def fetch(self, spans: Sequence[Span]) -> list[memoryview]:
        """The bytes of spans, in their order. Raises DataError."""
        requests = merged(spans)
        work = [(request.location, partial(self._read_span, request)) for request, _ in requests]
        contents: list[memoryview | None] = [None] * len(spans)
        for (request, wanted), content in zip(requests, at_once(work, self._access), strict=True):
            for number in wanted:
                span = spans[number]
                contents[number] = memoryview(content)[span.start - request.start : span.stop - request.start]
        return contents

    def confirm(self, locations: Sequence[str]) -> dict[str, str]:
        """None is known to have changed: an answer of another size was refused."""
        return {}

    def _read_span(self, span: Span) -> bytes:
        if span.start == span.stop:
            return b""
        if span.stop - span.start > MAX_SPAN:
            raise DataError(
                f"{span.location}: has a clip of {span.stop - span.start} bytes; {MAX_SPAN} are the most that are held "
                "in memory for one from a URL; copy the shards to a disk"
            )
        try:
            content = self._transport.read_span(span)
        except FileNotFoundError:
            raise DataError(f"{span.location}: is no longer there; restore it; {AGAIN}") from None
        if len(content) != span.stop - span.start:
            raise Unavailable(f"{len(content)} bytes came, {span.stop - span.start} were asked for")
        return content


def merged(spans: Sequence[Span]) -> list[tuple[Span, list[int]]]:
    """Requests that cover spans, each with the numbers of those inside it: what touches or overlaps is one request."""
    requests: list[tuple[Span, list[int]]] = []
    for number in sorted(range(len(spans)), key=spans.__getitem__):
        span = spans[number]
        if requests:
            last, wanted = requests[-1]
            stop = max(last.stop, span.stop)
            touches = last[:2] == span[:2] and span.start <= last.stop
            if touches and (stop == last.stop or stop - last.start <= MAX_MERGED_BYTES):
                requests[-1] = last._replace(stop=stop), [*wanted, number]
                continue
        requests.append((span, [number]))
    return requests


def persistently(
    location: str, attempt: Callable[[], T], access: Access, given_up: threading.Event, told: threading.Event
) -> T:
    """What an attempt gives, made again while it is Unavailable and nobody has given up. Raises DataError.

    A warning says so when it lasts, unless one was `told`.
    """
    begun = time.monotonic()
    tried = 0
    while True:
        try:
            return attempt()
        except Unavailable as fault:
            tried += 1
            reason, asked = str(fault), fault.pause
        if tried > access.retries or given_up.is_set():
            seconds = time.monotonic() - begun
            raise DataError(f"{location}: can't be read ({reason}); tried {tried} times over {seconds:.1f} s; {AGAIN}")
        if tried == TOLD_AFTER and not told.is_set():
            told.set()
            log.warning("%s: %s; trying again, %d of %d times by now", location, reason, tried, access.retries)
        given_up.wait(pause_before(tried, asked, access.timeout))


def pause_before(retry: int, asked: float, timeout: float) -> float:
    """Seconds before retry 1, 2, ...: random below a bound that doubles, on top of what the server asks for."""
    bound = min(timeout, timeout * FIRST_PAUSE * 2.0 ** min(retry - 1, 64))
    return _random.uniform(0, bound) + min(max(asked, 0.0), LONGEST_REQUESTED_PAUSE * timeout)


def attempt_seconds(num_bytes: int, timeout: float) -> float:
    """How long an attempt at so many bytes may take in all, however steadily they trickle in."""
    return 2 * timeout + num_bytes / MIN_BYTES_PER_SECOND


def at_once(work: Sequence[tuple[str, Callable[[], T]]], access: Access, num_threads: int | None = None) -> list[T]:
    """The results of (location, attempt), in their order; the first fault ends the others' retries and is raised.

    The threads end with the work, or with the process: one that is told to end does not wait for a read that stalls,
    as it would for those of an executor.
    """
    given_up, told = threading.Event(), threading.Event()
    results: list[T | None] = [None] * len(work)
    left = deque(range(len(work)))
    done: SimpleQueue[BaseException | None] = SimpleQueue()

    def take() -> None:
        while True:
            try:
                number = left.popleft()
            except IndexError:
                return
            try:
                results[number] = persistently(*work[number], access, given_up, told)
            except BaseException as fault:  # whatever it is, it is the caller's
                left.clear()
                done.put(fault)
                return
            done.put(None)

    for _ in range(min(len(work), num_threads or access.connections)):
        threading.Thread(target=take, name=THREAD_NAME, daemon=True).start()
    try:
        for _ in work:
            if (fault := done.get()) is not None:
                raise fault
        return results
    finally:
        given_up.set()
        left.clear()
