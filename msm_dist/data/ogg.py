"""Damage in Ogg files, which decoders pass over in silence: a page that fails its checksum is left out of the sound.

In: the bytes of a file. Out: where the first damaged page is. RFC 3533, section 6, describes pages and their checksum:
CRC-32 of polynomial 0x04c11db7, most significant bit first, from 0, over the page with the checksum's field as zeros.
Bytes behind the last page of all streams (padding, a tag) are none of theirs, if they hold no further page.
"""

import zlib

PAGE_START = b"OggS"
HEADER_BYTES = 27
FLAGS, SERIAL, CHECKSUM = 5, slice(14, 18), slice(22, 26)
ENDS_STREAM = 4

_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def is_ogg(content: bytes | bytearray | memoryview) -> bool:
    """Whether bytes begin as an Ogg file does."""
    return bytes(content[:4]) == PAGE_START


def damaged_page(content: bytes | bytearray | memoryview) -> int | None:
    """Offset of the first page that is not whole, None if all are."""
    start, unended = 0, set()
    while start < len(content):
        header = bytes(content[start : start + HEADER_BYTES])
        if len(header) < HEADER_BYTES or not is_ogg(header):
            behind = start > 0 and not unended and PAGE_START not in bytes(content[start:])
            return None if behind else start
        body = start + HEADER_BYTES + header[-1]
        stop = body + sum(content[start + HEADER_BYTES : body])
        page = bytearray(content[start:stop])
        page[CHECKSUM] = bytes(4)
        if checksum(page) != int.from_bytes(header[CHECKSUM], "little"):
            return start
        unended.add(header[SERIAL])
        if header[FLAGS] & ENDS_STREAM:
            unended.remove(header[SERIAL])
        start = stop
    return None


def checksum(page: bytes | bytearray) -> int:
    """The checksum of a page whose own field is zeros."""
    # zlib's CRC takes the least significant bit first, and inverts its register before and after.
    mirrored = zlib.crc32(page.translate(_MIRRORED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{mirrored:032b}"[::-1], 2)
