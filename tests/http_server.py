"""A real HTTP/1.1 server on loopback with byte ranges, which fails by a schedule.

`serving(folder)` yields a Server: its url, the log of the requests it had, and `faults`, a function from a request to
what goes wrong with its answer (one of FAULTS) or None. Run as `python -m tests.http_server FOLDER PORT` it serves
until its standard input ends.
"""

import contextlib
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

FAULTS = (
    "500",
    "502",
    "503",
    "429",
    "chatty",  # 503 with a body of chunks
    "busy",  # 503 with Retry-After: 1
    "stall",  # no answer
    "stall-body",  # half of the body, then nothing
    "trickle",  # a byte of the body now and then
    "reset",
    "truncate",  # half of the body, then the end of the connection
    "short",  # half of the body, announced as the whole of the answer
    "long",  # a byte too many
    "range",  # the bytes from one later on, and says so
    "unsaid",  # 206 without Content-Range
    "whole",  # 200 with the whole file
    "total",  # another total size
    "gone",
    "forbidden",
    "login",  # 401
    "teapot",  # 418
    "encoded",  # says gzip
    "redirect",  # to the same file, under another name
    "loop",  # redirects without end
    "slow-headers",  # a byte of a header now and then
    "continue",  # interim answers without end
    "slow-chunk",  # a byte of a chunk's header now and then
    "redirect-body",  # a redirect with a body without end
)
ENDLESS = {
    "slow-headers": (b"HTTP/1.1 200 OK\r\nX: ", b"a"),
    "continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "slow-chunk": (b"HTTP/1.1 206 Partial Content\r\nTransfer-Encoding: chunked\r\n%s\r\n1;", b"a"),
    "redirect-body": (b"HTTP/1.1 302 Found\r\nLocation: /again%s\r\nContent-Length: 1000000000000\r\n\r\n", b"a"),
}
STATUSES = {"gone": 404, "forbidden": 403, "login": 401, "teapot": 418, "busy": 503}
TRICKLE_SECONDS = 0.05


class Request(NamedTuple):
    """What was asked for: bytes [start, stop) of a file by name, -1 for all of it; the number of the request."""

    number: int
    method: str
    name: str
    start: int
    stop: int
    headers: dict[str, str]
    port: int
    """Of the client: a connection has one."""


@dataclass
class Server:
    """A running server."""

    url: str
    log: list[Request] = field(default_factory=list)
    faults: Callable[[Request], str | None] = lambda request: None
    over: threading.Event = field(default_factory=threading.Event)

    def ranges(self) -> list[tuple[str, int, int]]:
        """The byte ranges asked for, by file."""
        return [(request.name, request.start, request.stop) for request in self.log if request.start >= 0]


@contextlib.contextmanager
def serving(folder: Path, port: int = 0) -> Iterator[Server]:
    """Serve a folder until the block ends; requests that stall end then too."""
    server = Server("")
    listener = _Listener(("127.0.0.1", port), partial(_Handler, folder, server))
    server.url = f"http://127.0.0.1:{listener.server_address[1]}"
    thread = threading.Thread(target=listener.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        listener.shutdown()
        listener.close_connections()
        listener.server_close()


def by_turns(*faults: str | None) -> Callable[[Request], str | None]:
    """A schedule: the requests of each range or file fail in these ways one after the other, then no more."""
    lock, turns = threading.Lock(), {}

    def fault(request: Request) -> str | None:
        place = (request.method, request.name.removeprefix("again/"), request.start)
        with lock:
            turns[place] = turns.get(place, -1) + 1
            return faults[turns[place]] if turns[place] < len(faults) else None

    return fault


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *arguments):
        self.connections: set[socket.socket] = set()
        super().__init__(*arguments)

    def process_request(self, request, client_address):
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        self.connections.discard(request)
        super().shutdown_request(request)

    def close_connections(self):
        """As when a server dies: no connection stays."""
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request, client_address):
        """A client that has gone is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def __init__(self, folder: Path, server: Server, *arguments):
        self.folder, self.state = folder, server
        super().__init__(*arguments)

    def do_GET(self):
        name = unquote(urlsplit(self.path).path).lstrip("/")
        start, stop = _range(self.headers.get("Range"))
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(len(self.state.log), self.command, name, start, stop, headers, self.client_address[1])
        self.state.log.append(request)
        fault = self.state.faults(request)
        path = self.folder / name.removeprefix("again/")
        if fault in ENDLESS and not name.startswith("again/"):
            said = f"Content-Range: bytes {start}-{stop - 1}/{path.stat().st_size}\r\n"
            inside = {"slow-chunk": said, "redirect-body": self.path}.get(fault)
            before, again = ENDLESS[fault]
            self._without_end(before % inside.encode() if inside else before, again)
        elif fault in ("reset", "stall"):
            self._drop(stall=fault == "stall")
        elif fault == "chatty":
            self.send_response(503)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"5\r\nsorry\r\n0\r\n\r\n" if self.command == "GET" else b"")
        elif fault and (fault.isdigit() or fault in STATUSES):
            self._status(STATUSES.get(fault) or int(fault), {"Retry-After": "1"} if fault == "busy" else {})
        elif fault == "loop" or (fault == "redirect" and not name.startswith("again/")):
            target = self.path if fault == "loop" else f"/again{self.path}?signature=SECRET"
            self._status(302, {"Location": target})
        elif not path.is_file():
            self._status(404)
        elif stop > path.stat().st_size:
            self._status(416, {"Content-Range": f"bytes */{path.stat().st_size}"})
        else:
            self._send(path.read_bytes(), start, stop, fault)

    do_HEAD = do_GET

    def _send(self, content: bytes, start: int, stop: int, fault: str | None) -> None:
        size = len(content) + (fault == "total")
        headers = {"Accept-Ranges": "bytes"} | ({"Content-Encoding": "gzip"} if fault == "encoded" else {})
        if start < 0 or fault == "whole":
            status, body = 200, content
        else:
            shift = fault == "range"
            status, body = 206, content[start + shift : stop + shift]
            if fault != "unsaid":
                headers["Content-Range"] = f"bytes {start + shift}-{stop + shift - 1}/{size}"
        length = size if start < 0 and self.command == "HEAD" else len(body)
        if self.command == "HEAD":
            pass
        elif fault == "long":
            body, length = body + b"!", length + 1
        elif fault == "short":
            body, length = body[: len(body) // 2], len(body) // 2
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command == "HEAD":
            pass
        elif fault in ("truncate", "stall-body"):
            self.wfile.write(body[: len(body) // 2])
            self._drop(stall=fault == "stall-body")
        elif fault == "trickle":
            for number in range(len(body)):
                self.wfile.write(body[number : number + 1])
                self.wfile.flush()
                if self.state.over.wait(TRICKLE_SECONDS):
                    break
        else:
            self.wfile.write(body)

    def _without_end(self, before: bytes, again: bytes) -> None:
        self.wfile.write(before)
        self.wfile.flush()
        while not self.state.over.wait(TRICKLE_SECONDS):
            self.wfile.write(again)
            self.wfile.flush()

    def _status(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _drop(self, stall: bool) -> None:
        self.wfile.flush()
        self.close_connection = True
        if stall:
            self.state.over.wait(120)
        else:
            # Closing with data unread, or with this option, sends a reset.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def log_message(self, *arguments):
        """Nothing: the log is kept in the Server."""


def _range(said: str | None) -> tuple[int, int]:
    if said is None:
        return -1, -1
    first, _, last = said.removeprefix("bytes=").partition("-")
    return int(first), int(last) + 1


if __name__ == "__main__":
    with serving(Path(sys.argv[1]), int(sys.argv[2])):
        sys.stdin.read()
