"""Damage in Ogg files, which decoders pass over in silence: a page that fails its checksum is left out of the sound.

In: the bytes of a file. Out: where the first damaged page is. RFC 3533, section 6, describes pages and their checksum:
CRC-32 of polynomial 0x04c11db7, most significant bit first, from 0, over the page with the checksum's field as zeros.
"""

import zlib

PAGE_START = b"OggS"
HEADER_BYTES = 27
CHECKSUM = slice(22, 26)

_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def is_ogg(content: bytes | bytearray | memoryview) -> bool:
    """Whether bytes begin as an Ogg file does."""
    return bytes(content[:4]) == PAGE_START


def damaged_page(content: bytes | bytearray | memoryview) -> int | None:
    """Offset of the first page that is not whole, None if all are."""
    start = 0
    while start < len(content):
        header = bytes(content[start : start + HEADER_BYTES])
        if len(header) < HEADER_BYTES or not is_ogg(header):
            return start
        body = start + HEADER_BYTES + header[-1]
        stop = body + sum(content[start + HEADER_BYTES : body])
        page = bytearray(content[start:stop])
        page[CHECKSUM] = bytes(4)
        if len(page) < stop - start or checksum(page) != int.from_bytes(header[CHECKSUM], "little"):
            return start
        start = stop
    return None


def checksum(page: bytes | bytearray) -> int:
    """The checksum of a page whose own field is zeros."""
    # zlib's CRC takes the least significant bit first, and inverts its register before and after.
    mirrored = zlib.crc32(page.translate(_MIRRORED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{mirrored:032b}"[::-1], 2)
