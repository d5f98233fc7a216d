"""The length of an MP3 that does not tell it: its frames are counted by their headers.

In: the bytes of a file, or an open binary file. Out: the same with a first frame that says how many follow, where the
file has none: libmpg123 else guesses the length from the first frame's size and leaves out what is behind it. Only
layer III is counted; anything else comes back as it is.
"""

import io
import struct
from typing import BinaryIO

Content = bytes | bytearray | memoryview

MPEG_1 = 3  # the version's two bits in a header
RATES = {MPEG_1: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}
KBITS_1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
KBITS_2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
SAME = bytes((0xFF, 0xFE, 0x0C, 0x00))  # the bits of a header that all frames share: version, layer, rate
SEARCHED = 2**16
READ_BYTES = 2**20
HAS_COUNT = 1  # the flag of a Xing header


class Prefixed:
    """A binary file from a place on, with other bytes before it; for libsndfile's virtual files."""

    def __init__(self, head: bytes, file: BinaryIO, first: int) -> None:
        self._head, self._file, self._first = head, file, first
        self._place = 0
        self._size = len(head) + file.seek(0, io.SEEK_END) - first

    def read(self, size: int = -1) -> bytes:
        """The next `size` bytes, or all that are left."""
        left = max(0, self._size - self._place)
        size = left if size < 0 else min(size, left)
        piece = self._head[self._place : self._place + size]
        if len(piece) < size:
            self._file.seek(self._first + self._place + len(piece) - len(self._head))
            piece += self._file.read(size - len(piece))
        self._place += len(piece)
        return piece

    def readinto(self, buffer: memoryview) -> int:
        """Fill `buffer` from the current place; returns how many bytes there were."""
        piece = self.read(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to `offset` from the start, the current place or the end."""
        self._place = max(0, (0, self._place, self._size)[whence] + offset)
        return self._place

    def tell(self) -> int:
        """The current place."""
        return self._place


def with_length(encoded: Content | BinaryIO) -> Content | BinaryIO | Prefixed:
    """An MP3 without a count of its frames as one that has it; all else as it is."""
    content = isinstance(encoded, Content)
    file = io.BytesIO(encoded[:SEARCHED]) if content else encoded
    file.seek(0)
    first = _audio_start(file.read(10))
    if first is None:
        return encoded
    if content and first:
        file = io.BytesIO(encoded[first : first + SEARCHED])
    file.seek(0 if content else first)
    head = file.read(SEARCHED)
    skipped = _first_frame(head)
    if skipped is None:
        return encoded
    header, size = head[skipped : skipped + 4], frame_size(head[skipped : skipped + 4])
    frame, first = head[skipped : skipped + size], first + skipped
    place = max(frame.find(b"Xing"), frame.find(b"Info"))
    if 0 <= place <= size - 12:
        if struct.unpack_from(">I", frame, place + 4)[0] & HAS_COUNT:
            return encoded
        first += size
    elif b"VBRI" in frame:
        first += size
    whole = io.BytesIO(encoded) if content else encoded
    start = count_header(header, _num_frames(whole, first, header))
    return start + bytes(encoded[first:]) if content else Prefixed(start, encoded, first)


def frame_size(header: bytes) -> int:
    """Bytes of the layer III frame with this header; 0 where it is none, or of free format."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE6 != 0xE2 or header[1] >> 3 & 3 == 1:
        return 0
    version, kbits, rate = header[1] >> 3 & 3, header[2] >> 4, header[2] >> 2 & 3
    if kbits in (0, 15) or rate == 3:
        return 0
    table, factor = (KBITS_1, 144_000) if version == MPEG_1 else (KBITS_2, 72_000)
    return factor * table[kbits] // RATES[version][rate] + (header[2] >> 1 & 1)


def count_header(header: bytes, num_frames: int) -> bytes:
    """A silent frame of the same kind that says how many follow."""
    version, mono = header[1] >> 3 & 3, header[3] >> 6 == 3
    side = (17 if mono else 32) if version == MPEG_1 else (9 if mono else 17)
    for kbits in range(1, 15):
        start = bytes((0xFF, header[1] | 1, kbits << 4 | header[2] & 0x0C, header[3]))
        if frame_size(start) >= 4 + side + 12:
            break
    return (start + bytes(side) + b"Xing" + struct.pack(">II", HAS_COUNT, num_frames)).ljust(frame_size(start), b"\0")


def _audio_start(head: bytes) -> int | None:
    """Where the sound can begin, behind an ID3 tag; None where the file is no MP3."""
    if head[:3] == b"ID3" and len(head) == 10:
        return 10 + sum((value & 0x7F) << 7 * (3 - i) for i, value in enumerate(head[6:10]))
    return 0 if frame_size(head[:4]) else None


def _first_frame(head: bytes) -> int | None:
    """The place of the first header that another one of its kind follows."""
    place = head.find(b"\xff")
    while place >= 0:
        if size := frame_size(head[place : place + 4]):
            following = head[place + size : place + size + 4]
            if not following or (frame_size(following) and _alike(following, head[place : place + 4])):
                return place
        place = head.find(b"\xff", place + 1)
    return None


def _num_frames(file: BinaryIO, place: int, like: bytes) -> int:
    """Whole frames from a place on; where none begins, the next that does is looked for."""
    count, base, buffer = 0, place, b""
    while True:
        if place + 4 - base > len(buffer):
            file.seek(place)
            base, buffer = place, file.read(READ_BYTES)
            if len(buffer) < 4:
                return count
        header = buffer[place - base : place - base + 4]
        size = frame_size(header) if _alike(header, like) else 0
        if not size:
            found = buffer.find(b"\xff", place - base + 1)
            place = base + (found if found >= 0 else len(buffer))
        elif place + size > base + len(buffer) and len(buffer) < READ_BYTES:
            return count
        else:
            count += 1
            place += size


def _alike(header: bytes, like: bytes) -> bool:
    return all(a & bits == b & bits for a, b, bits in zip(header, like, SAME, strict=True))
