"""One attempt at a request over HTTP.

In: http:// and https:// URLs. Out: sizes, files, byte ranges, each checked against what was asked for. Connections
are kept and belong to one process. Fails with FileNotFoundError (404, 410), with remote.Unavailable where another
attempt may do, with DataError where none will: no access, no byte ranges, a file of another size. User and password
come from ~/.netrc, a proxy from the usual variables (https_proxy, no_proxy); what a redirect leads to, which may be
signed, is in no message.
"""

import errno
import netrc
import os
import re
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3
from urllib3 import exceptions

from msm_dist.data.http_deadline import POOLS, Attempt, Deadlines
from msm_dist.data.remote import AGAIN, MAX_SMALL_FILE, SIZES_PER_CONNECTION, Unavailable, attempt_seconds
from msm_dist.data.storage import Access, Span, check_size
from msm_dist.errors import DataError

MAX_REDIRECTS = 5
CHUNK_BYTES = 256 * 2**10
PASSING_STATUS = {408, 425, 429, 500, 502, 503, 504, 507, 509, 520, 521, 522, 523, 524}
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
_CONTENT_LENGTH = re.compile(r"\d{1,18}")


class HttpTransport:
    """Requests to the server of one corpus."""

    def __init__(self, location: str, access: Access) -> None:
        self._timeout = access.timeout
        self._server = urlsplit(location)[:2]
        self._login = _login(location)
        self._pool = _pool(location, access)
        self._deadlines = Deadlines(access.timeout)

    def size(self, location: str) -> int:
        """Bytes of a file, as a HEAD request tells."""
        with self._answer("HEAD", location, {}) as (answer, _):
            _refuse_fault(location, answer.status, answer.headers)
            return _content_length(location, answer.headers)

    def read(self, location: str) -> bytes:
        """A whole, small file."""
        with self._answer("GET", location, {}) as (answer, attempt):
            _refuse_fault(location, answer.status, answer.headers)
            length = _content_length(location, answer.headers)
            if length > MAX_SMALL_FILE:
                raise DataError(f"{location}: {length} bytes; {MAX_SMALL_FILE} are the most for a file of its kind")
            return self._body(answer, length, attempt)

    def read_span(self, span: Span) -> bytes:
        """Just the bytes of a span. Raises DataError where the file has not the span's size."""
        range_ = {"Range": f"bytes={span.start}-{span.stop - 1}"}
        with self._answer("GET", span.location, range_) as (answer, attempt):
            if answer.status == 416 and (
                found := re.fullmatch(r"bytes \*/(\d{1,18})", _header(answer, "Content-Range"))
            ):
                check_size(span.location, int(found[1]), span.size)
            _refuse_fault(span.location, answer.status, answer.headers)
            if answer.status == 200:
                raise DataError(
                    f"{span.location}: its server answers a request for a range of bytes with the whole file, which "
                    "would cost a shard per clip; use a server with byte ranges (nginx, Apache, any object store), "
                    "or copy the shards to a disk"
                )
            self._check_range(span, _header(answer, "Content-Range"))
            return self._body(answer, span.stop - span.start, attempt)

    @contextmanager
    def _answer(
        self, method: str, location: str, headers: Mapping[str, str]
    ) -> Iterator[tuple[urllib3.BaseHTTPResponse, Attempt]]:
        """The answer to a request, its body unread; faults of urllib3 come out as ours."""
        answer = None
        with self._deadlines.attempt(attempt_seconds(0, self._timeout)) as attempt:
            try:
                answer = self._followed(method, location, headers)
                attempt.check()  # what was cut off reads as headers that end
                yield answer, attempt
            except FileNotFoundError:
                raise
            except (exceptions.HTTPError, OSError) as error:
                attempt.check()
                raise self._fault(location, error) from None
            finally:
                if answer is not None:
                    _leave(answer)

    def _followed(self, method: str, location: str, headers: Mapping[str, str]) -> urllib3.BaseHTTPResponse:
        """The answer where redirects end. urllib3's own following would first read their bodies, however long."""
        url = location
        for _ in range(MAX_REDIRECTS + 1):
            answer = self._request(method, url, headers)
            target = answer.get_redirect_location()
            if not target:
                return answer
            _leave(answer)
            try:
                url = urljoin(url, target)
                is_http = urlsplit(url).scheme in ("http", "https")
            except ValueError:
                is_http = False
            if not is_http:
                raise DataError(f"{location}: it redirects to what is no URL of a file")
        raise DataError(f"{location}: more than {MAX_REDIRECTS} redirects; name the place where they end")

    def _request(self, method: str, url: str, headers: Mapping[str, str]) -> urllib3.BaseHTTPResponse:
        # The password is for this server, and for no other that it may name.
        login = self._login if urlsplit(url)[:2] == self._server else {}
        return self._pool.request(
            method,
            url,
            headers={"Accept-Encoding": "identity", "User-Agent": "msm-dist", **login, **headers},
            retries=urllib3.Retry(total=None, connect=0, read=0, status=0, other=0, respect_retry_after_header=False),
            redirect=False,
            timeout=urllib3.Timeout(connect=self._timeout, read=self._timeout),
            preload_content=False,
            decode_content=False,
        )

    def _fault(self, location: str, error: Exception) -> Exception:
        cause = getattr(error, "reason", error)
        if isinstance(error, exceptions.LocationValueError):
            return DataError(f"{location}: no URL of a file, or it redirects to one that is none")
        chain = [error, cause, *_behind(cause), *getattr(cause, "args", ())]
        if certificate := next((link for link in chain if isinstance(link, ssl.SSLCertVerificationError)), None):
            return DataError(
                f"{location}: the server's certificate is not trusted ({certificate.verify_message}); SSL_CERT_FILE "
                "names the file of certificates to trust"
            )
        if any(isinstance(link, exceptions.NameResolutionError) for link in chain):
            return Unavailable("no such host is known")
        known = next((link.strerror for link in chain if isinstance(link, OSError) and link.strerror), None)
        timed_out = any(isinstance(link, exceptions.TimeoutError | TimeoutError) for link in chain)
        # A refused connection counts as one that timed out in urllib3.
        if timed_out and not (known and isinstance(cause, exceptions.NewConnectionError)):
            return Unavailable(f"no byte for {self._timeout:g} s")
        incomplete = next((link for link in chain if isinstance(link, exceptions.IncompleteRead)), None)
        if incomplete is not None:
            return Unavailable(f"the connection ended {incomplete.expected} bytes early")
        return Unavailable(known or f"the connection broke: {type(cause).__name__}")

    def _check_range(self, span: Span, found: str) -> None:
        said = _CONTENT_RANGE.fullmatch(found)
        if said is None:
            raise Unavailable(f"asked for a range, its Content-Range is {found[:80]!r}")
        start, last, size = map(int, said.groups())
        check_size(span.location, size, span.size)
        if (start, last + 1) != (span.start, span.stop):
            raise Unavailable(f"bytes {start}-{last} came, {span.start}-{span.stop - 1} were asked for")

    def _body(self, answer: urllib3.BaseHTTPResponse, length: int, attempt: Attempt) -> bytes:
        """Just `length` bytes. Raises Unavailable on another length, and past the time that they may take."""
        if (said := _header(answer, "Content-Length")) and said != str(length):
            raise Unavailable(f"{said} bytes are announced, {length} were asked for")
        attempt.seconds = attempt_seconds(length, self._timeout)
        content = bytearray()
        try:
            while chunk := answer.read1(CHUNK_BYTES, decode_content=False):
                content += chunk
                if len(content) > length:
                    break
                if attempt.is_late():
                    raise Unavailable(f"only {len(content)} of {length} bytes in {attempt.seconds:g} s")
        except (exceptions.HTTPError, OSError):
            # Whoever looked first at the time: the watcher, which cuts the read off, is to say the same.
            if content and attempt.is_over:
                raise Unavailable(f"only {len(content)} of {length} bytes in {attempt.seconds:g} s") from None
            raise
        if len(content) != length:
            raise Unavailable(f"{len(content)} bytes came, {length} were asked for")
        return bytes(content)


def _leave(answer: urllib3.BaseHTTPResponse) -> None:
    """Keep the connection of an answer, unless something is left of the body: then it can't be used again."""
    if answer.length_remaining == 0:
        answer.drain_conn()  # of nothing, which http.client needs
        answer.release_conn()
    else:
        answer.close()


def _refuse_fault(location: str, status: int, headers: Mapping[str, str]) -> None:
    """Raise what a status means, unless it is that of success."""
    if status in (404, 410):
        raise FileNotFoundError(errno.ENOENT, f"status {status}", location)
    if status in PASSING_STATUS:
        raise Unavailable(f"status {status}", _retry_after(headers))
    if status in (401, 403, 407):
        raise DataError(
            f"{location}: no access (status {status}; some servers say so of files that they don't have); name user "
            f"and password in ~/.netrc, or check the URL; {AGAIN}"
        )
    if status not in (200, 206):
        raise DataError(f"{location}: its server answers with status {status}; check the URL; {AGAIN}")
    if headers.get("Content-Encoding", "identity") not in ("identity", ""):
        raise DataError(
            f"{location}: its server compresses it ({headers['Content-Encoding'][:40]}), so offsets say nothing; "
            "switch that off for these files"
        )


def _content_length(location: str, headers: Mapping[str, str]) -> int:
    said = headers.get("Content-Length", "")
    if not _CONTENT_LENGTH.fullmatch(said):
        raise DataError(f"{location}: its server does not tell its length; serve it as a plain file")
    return int(said)


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that a server asks to wait, 0 where it does not say."""
    said = headers.get("Retry-After", "")
    if re.fullmatch(r"\d{1,9}", said):
        return float(said)
    try:
        return (parsedate_to_datetime(said) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError):
        return 0.0


def _header(answer: urllib3.BaseHTTPResponse, name: str) -> str:
    return answer.headers.get(name, "")


def _behind(error: BaseException | None) -> list[BaseException]:
    """The errors that led to one."""
    found = []
    while error is not None and len(found) < 16:
        error = error.__cause__ or error.__context__
        found.append(error)
    return found


def _pool(location: str, access: Access) -> urllib3.PoolManager:
    parts = urlsplit(location)
    settings = {"maxsize": SIZES_PER_CONNECTION * access.connections}
    proxy = getproxies().get(parts.scheme)
    if proxy is None or proxy_bypass(parts.netloc):
        pool = urllib3.PoolManager(**settings)
    else:
        try:
            user = urlsplit(proxy)
            login = f"{user.username}:{user.password or ''}" if user.username else None
            pool = urllib3.ProxyManager(proxy, proxy_headers=urllib3.make_headers(proxy_basic_auth=login), **settings)
        except (exceptions.HTTPError, ValueError):  # both quote it, with its password
            raise DataError(
                f"{location}: the proxy in {parts.scheme}_proxy is no URL of one; write http://HOST:PORT"
            ) from None
    pool.pool_classes_by_scheme = POOLS
    return pool


def _login(location: str) -> dict[str, str]:
    """The header for the user that .netrc names for the server."""
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    if not path.is_file():
        return {}
    try:
        entry = netrc.netrc(path).authenticators(urlsplit(location).hostname or "")
    except (netrc.NetrcParseError, OSError) as error:
        # The parser's own words quote the token that it stumbled over, which may be a password.
        place = f"line {error.lineno} is not understood" if isinstance(error, netrc.NetrcParseError) else error.strerror
        raise DataError(f"{path}: can't be read ({place}); mend it, or let NETRC name another file") from None
    return urllib3.make_headers(basic_auth=f"{entry[0]}:{entry[2]}") if entry else {}
