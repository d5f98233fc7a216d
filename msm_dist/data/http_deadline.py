"""Requests over HTTP that end when their time is up, whatever the server does.

In: how long an attempt may take. Out: connection pools of urllib3 whose sockets are shut down then, so that whatever
waits for bytes ends. Time-outs of a socket begin anew with every byte: headers that trickle, interim answers
(100 Continue) without end or chunks of one byte would hold a read for ever. Fails with remote.Unavailable.
"""

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from msm_dist.data.remote import Unavailable

CHECKS_PER_TIMEOUT = 4

_here = threading.local()  # .attempt: the one of this thread


class Attempt:
    """An attempt at a request: the sockets that it uses, and when it ends."""

    def __init__(self, seconds: float) -> None:
        self.begun = time.monotonic()
        self.seconds = seconds
        self.is_over = False
        self._handles: list[socket.socket] = []
        self._lock = threading.Lock()

    def is_late(self) -> bool:
        """Whether its time is up."""
        return time.monotonic() > self.begun + self.seconds

    def check(self) -> None:
        """Raise Unavailable where the attempt was ended: nothing that was read then is to be believed."""
        if self.is_over:
            raise Unavailable(f"no whole answer in {self.seconds:g} s")

    def follow(self, connection: socket.socket) -> None:
        """Shut this socket down too, when the time is up."""
        # A descriptor of our own stays this connection's, whoever closes or wraps the other (TLS takes it away).
        handle = socket.socket(fileno=os.dup(connection.fileno()))
        with self._lock:
            self._handles.append(handle)
            if self.is_over:
                _shut_down(handle)

    def end(self) -> None:
        """Let whatever waits for bytes of its sockets wait no longer."""
        with self._lock:
            self.is_over = True
            for handle in self._handles:
                _shut_down(handle)

    def let_go(self) -> None:
        """Leave the sockets to who has them."""
        with self._lock:
            for handle in self._handles:
                handle.close()
            self._handles.clear()


class Deadlines:
    """Ends late attempts, from a thread that is there while there are attempts."""

    def __init__(self, timeout: float) -> None:
        self._pause = timeout / CHECKS_PER_TIMEOUT
        self._attempts: set[Attempt] = set()
        self._lock = threading.Lock()
        self._is_watching = False

    @contextmanager
    def attempt(self, seconds: float) -> Iterator[Attempt]:
        """An attempt by this thread, which ends after so many seconds."""
        attempt = Attempt(seconds)
        with self._lock:
            self._attempts.add(attempt)
            if not self._is_watching:
                threading.Thread(target=self._watch, name="http-deadlines", daemon=True).start()
                self._is_watching = True
        _here.attempt = attempt
        try:
            yield attempt
        finally:
            _here.attempt = None
            with self._lock:
                self._attempts.discard(attempt)
            attempt.let_go()

    def _watch(self) -> None:
        while True:
            time.sleep(self._pause)
            with self._lock:
                if not self._attempts:
                    self._is_watching = False
                    return
                late = [attempt for attempt in self._attempts if attempt.is_late()]
            for attempt in late:
                attempt.end()


def _shut_down(connection: socket.socket) -> None:
    with suppress(OSError):  # one that is not connected, or no longer
        connection.shutdown(socket.SHUT_RDWR)


def _follow(connection: socket.socket | None) -> None:
    attempt = getattr(_here, "attempt", None)
    if attempt is not None and connection is not None:
        attempt.follow(connection)


class _Http(HTTPConnection):
    def _new_conn(self):
        connection = super()._new_conn()
        _follow(connection)
        return connection

    def request(self, *arguments, **options):
        _follow(self.sock)  # of a request before this one
        return super().request(*arguments, **options)


class _Https(HTTPSConnection):
    def _new_conn(self):
        connection = super()._new_conn()
        _follow(connection)
        return connection

    def request(self, *arguments, **options):
        _follow(self.sock)
        return super().request(*arguments, **options)


class _HttpPool(HTTPConnectionPool):
    ConnectionCls = _Http


class _HttpsPool(HTTPSConnectionPool):
    ConnectionCls = _Https


POOLS = {"http": _HttpPool, "https": _HttpsPool}
"""What a urllib3.PoolManager makes its pools of, by scheme."""
