"""Files that a shell command writes out: shards that nothing else reaches.

In: locations `pipe:COMMAND` whose command ends in the path of the file; the other files of the folder are had by the
same command with another name at its end. Out: their bytes. A command has no ranges, so a shard is streamed whole into
a file without a name, which goes with the process however that ends, and mapped into memory. Fails with DataError on a
command that can't be run, on a shard of another size than its index says, on names that a shell could take for more,
and on a command that still fails after retries.

webdataset's own opener for such URLs waits without end for a command that stalls, and leaves it behind when its reader
is killed; here a command is killed, with all it started, after the read time-out and when this process dies.
"""

import logging
import mmap
import os
import re
import select
import shlex
import signal
import subprocess
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import BinaryIO

from msm_dist.data.remote import AGAIN, MAX_SMALL_FILE, Unavailable, at_once, attempt_seconds
from msm_dist.data.storage import MAX_OPEN_FILES, UNKNOWN_SIZE, Access, Span, check_size, split
from msm_dist.errors import DataError
from msm_dist.redact import redacted

KEPT_BYTES = 8 * 2**30  # of shards; a worker's lanes lie in that much at once, or every block streams a shard again
PIECE_BYTES = 2**20
COMPLAINT_BYTES = 300
CANT_RUN = (126, 127)  # exit codes of a shell that finds no such command, or none that it may run

# The one that reads file 3 notices the end of the process at its other end, and kills the group of the command.
GUARDED = 'exec 3<&0 </dev/null; { read -r line <&3; kill -KILL 0; } >/dev/null 2>&1 & exec /bin/sh -c "$1" 3<&-'

_NAME = re.compile(r"[A-Za-z0-9._-]+")
_VARIABLE = re.compile(r"\$\{?([A-Za-z_][A-Za-z0-9_]*)")

log = logging.getLogger(__name__)


def check_command(location: str) -> None:
    """Raise DataError for a command that does not end in the path of a tar, of index.json or of their folder."""
    try:
        words = shlex.split(location.removeprefix("pipe:"))
    except ValueError:
        words = []
    last = words[-1] if words else ""
    quoted = last.endswith((".tar", ".json")) and not location.endswith((".tar", ".json"))
    if "/" not in last or quoted or any(c in last for c in "|&;>"):
        raise DataError(
            f"data.shards = {location}: its command must end in a path with a /, of a folder or of .tar files in one, "
            "as the folder's other files are had by another name there; quote the folder only ('/my disk'/a.tar), and "
            "where more must follow, write pipe:sh -c 'COMMAND \"$0\" -' FOLDER/a.tar"
        )


def command_of(location: str) -> str:
    """The command that writes a file. Raises DataError where the file's name is more than a plain one."""
    name = split(location)[1]
    if not _NAME.fullmatch(name):
        raise DataError(
            f"{location}: {name!r} would become part of a shell command; a file behind pipe: must have a name of "
            "letters, digits, '.', '_' and '-' only: name it so and index it again, or copy it to a disk"
        )
    return location.removeprefix("pipe:")


class PipeFiles:
    """The store of files that commands write. What it streams lies in the folder of temporary files."""

    def __init__(self, location: str, access: Access) -> None:
        check_command(location)
        self._access = access
        self._kept: OrderedDict[str, mmap.mmap] = OrderedDict()
        self._dropped: set[str] = set()

    def sizes(self, locations: Sequence[str]) -> list[int | None]:
        """UNKNOWN_SIZE of each: only all of its bytes would tell. Raises DataError for names that are refused."""
        return [UNKNOWN_SIZE for location in locations if command_of(location)]

    def read(self, locations: Sequence[str]) -> list[bytes]:
        """Whole, small files. Raises DataError."""
        return self._at_once(
            [(location, partial(_small_file, location, self._access.timeout)) for location in locations]
        )

    def fetch(self, spans: Sequence[Span]) -> list[memoryview]:
        """The bytes of spans, in their order: views of whole shards, streamed if need be. Raises DataError."""
        sizes = {span.location: span.size for span in spans}
        shards = {location: self._kept[location] for location in sizes if location in self._kept}
        new = [location for location in sizes if location not in shards]
        work = [(location, partial(_shard, location, sizes[location], self._access.timeout)) for location in new]
        shards |= dict(zip(new, self._at_once(work), strict=True))
        for location, content in shards.items():
            check_size(location, content.size(), sizes[location])
        self._keep(shards)
        return [memoryview(shards[span.location])[span.start : span.stop] for span in spans]

    def confirm(self, locations: Sequence[str]) -> dict[str, str]:
        """None changes: what was streamed is this process' own copy."""
        return {}

    def _at_once(self, work: Sequence[tuple[str, Callable]]) -> list:
        return at_once(work, self._access)

    def _keep(self, shards: dict[str, mmap.mmap]) -> None:
        """Keep the shards just used; drop those not used for longest."""
        if again := self._dropped.intersection(shards):
            log.warning(
                "%s: is streamed again, as the shards read since take more than %d GiB or %d files; if this is not the "
                "next epoch, data.lanes are too many for pipe: (docs/sources.md)",
                min(again),
                KEPT_BYTES // 2**30,
                MAX_OPEN_FILES,
            )
            self._dropped.clear()
        for location, content in shards.items():
            self._kept[location] = content
            self._kept.move_to_end(location)
        num_bytes = sum(content.size() for content in self._kept.values())
        while len(self._kept) > 1 and (num_bytes > KEPT_BYTES or len(self._kept) > MAX_OPEN_FILES):
            location, content = self._kept.popitem(last=False)
            num_bytes -= content.size()
            self._dropped.add(location)


def _small_file(location: str, timeout: float) -> bytes:
    content = bytearray()

    def take(piece: bytes) -> None:
        content.extend(piece)
        if len(content) > MAX_SMALL_FILE:
            raise DataError(
                f"{location}: gave more than {MAX_SMALL_FILE} bytes, too many for this file; see its command"
            )

    _run(location, take, timeout)
    return bytes(content)


def _shard(location: str, size: int, timeout: float) -> mmap.mmap:
    """One attempt at a whole shard. Raises Unavailable, DataError."""
    received = 0

    def take(piece: bytes) -> None:
        nonlocal received
        received += len(piece)
        if received > size:
            raise DataError(f"{location}: gave more bytes than the {size} that its index says; restore it; {AGAIN}")
        left = memoryview(piece)
        try:
            while left:
                left = left[file.write(left) :]
        except OSError as error:
            raise DataError(
                f"{location}: {tempfile.gettempdir()} does not take its {size} bytes ({error.strerror}); make room, or "
                f"name another folder in TMPDIR; {AGAIN}"
            ) from None

    with tempfile.TemporaryFile(buffering=0) as file:
        _run(location, take, timeout)
        check_size(location, received, size)
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _run(location: str, take: Callable[[bytes], None], timeout: float) -> None:
    """Hand on what the command of a location writes. Raises Unavailable where it fails or stalls."""
    command = ["/bin/sh", "-c", GUARDED, "sh", command_of(location)]
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, start_new_session=True
        ) as process,
    ):
        try:
            fault = _hand_on(process.stdout.fileno(), take, timeout) or _end_of(process, timeout)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        if fault is None:
            return
        fault += _without_values(_complaint(said), location)
    if process.returncode in CANT_RUN:
        raise DataError(f"{location}: its command can't be run ({fault}); mend data.shards or the machine's PATH")
    log.warning("%s: %s", location, fault)
    raise Unavailable(fault)


def _hand_on(output: int, take: Callable[[bytes], None], timeout: float) -> str | None:
    """Read to the end; returns what is wrong, if it stalls or trickles."""
    ready = select.poll()
    ready.register(output, select.POLLIN)
    begun, received = time.monotonic(), 0
    while ready.poll(1000 * timeout):
        piece = os.read(output, PIECE_BYTES)
        if not piece:
            return None
        take(piece)
        received += len(piece)
        seconds = time.monotonic() - begun
        if seconds > attempt_seconds(received, timeout):
            return f"only {received} bytes in {seconds:.2f} s"
    return f"no byte for {timeout:g} s"


def _end_of(process: subprocess.Popen, timeout: float) -> str | None:
    """Wait for a command that has written all; returns what is wrong."""
    try:
        code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        return f"its output ended, but the command did not for {timeout:g} s"
    return f"exit code {code}" if code else None


def _without_values(text: str, command: str) -> str:
    """What a command said, without the values of the variables that it names, such as a token."""
    for name in _VARIABLE.findall(command):
        if len(value := os.environ.get(name, "")) >= 4:
            text = text.replace(value, f"${name}")
    return redacted(text)


def _complaint(said: BinaryIO) -> str:
    """The end of what a command wrote to its standard error, on one line."""
    said.seek(max(0, said.seek(0, os.SEEK_END) - COMPLAINT_BYTES))
    text = said.read().decode(errors="replace")
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return f": {line}" if line else ""
