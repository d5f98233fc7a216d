"""Bytes as a binary file that are not copied: of a clip in a mapped shard only what is read is touched.

io.BytesIO copies all of a buffer that is not `bytes`: five times the crop, for ten seconds of audio.
"""

import io


class View:
    """What libsndfile's virtual files need of a file, over a buffer."""

    def __init__(self, content: bytes | bytearray | memoryview) -> None:
        self._content = memoryview(content)
        self._place = 0

    def readinto(self, buffer: memoryview) -> int:
        """Fill `buffer` from the current place; returns how many bytes there were."""
        piece = self._content[self._place : self._place + len(buffer)]
        buffer[: len(piece)] = piece
        self._place += len(piece)
        return len(piece)

    def read(self, size: int = -1) -> bytes:
        """The next `size` bytes, or all that are left."""
        piece = self._content[self._place : self._place + size if size >= 0 else None]
        self._place += len(piece)
        return bytes(piece)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to `offset` from the start, the current place or the end."""
        base = (0, self._place, len(self._content))[whence]
        if base + offset < 0:
            raise OSError(f"seek to byte {base + offset}")
        self._place = base + offset
        return self._place

    def tell(self) -> int:
        """The current place."""
        return self._place
