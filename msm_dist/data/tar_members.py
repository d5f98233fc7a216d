"""The members of a tar that may be anybody's, by its headers; nothing is extracted, no link is followed.

In: a tar on this machine. Out: its members in their order, one at a time. Python's tarfile parses the headers, but
reads a long name or a table of extensions whole, as large as its header says, follows a negative size backwards for
ever, and keeps every header it has seen: here such a tar is damaged, and one header is held. Fails with DataError.
"""

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from msm_dist.errors import DataError

MAX_EXTENSION = 2**20
"""Bytes of a name, or of a table of extensions, in a header: the largest of real tars have some hundred."""
# What tarfile raises for headers that make no sense; it descends into one extension after another.
DAMAGED = (tarfile.TarError, ValueError, ArithmeticError, LookupError, TypeError, RecursionError)


def tar_members(path: Path) -> Iterator[tarfile.TarInfo]:
    """The members of an uncompressed tar, to the end of its file. Raises DataError where it is damaged, OSError."""
    with path.open("rb") as file:
        try:
            with tarfile.open(fileobj=_Forward(file), mode="r:") as tar:
                for member in tar:
                    tar.members = []  # else all are kept
                    yield member
                # tarfile takes a damaged header in the middle for the end of the tar.
                end = tar.offset
        except DAMAGED as error:
            reason = "too many headers before one member" if isinstance(error, RecursionError) else error
            raise DataError(f"{path}: is not a complete, uncompressed tar ({reason}); copy it again") from None
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise DataError(f"{path}: is cut off or damaged at byte {end}; copy it again")


class _Forward:
    """A file that is read from its beginning to its end, little at a time."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._reached = 0

    def read(self, size: int) -> bytes:
        """The next `size` bytes. Raises ReadError where a header asks for more than any does."""
        if not 0 <= size <= MAX_EXTENSION:
            raise tarfile.ReadError(f"a header claims {size} bytes of names")
        content = self._file.read(size)
        self._reached = self._file.tell()
        return content

    def seek(self, place: int) -> None:
        """Go on at `place`, which tarfile looks at one byte before. Raises ReadError where that leads back."""
        if place < self._reached - 1:
            raise tarfile.ReadError(f"the header before byte {self._reached} claims less than nothing")
        self._file.seek(place)

    def tell(self) -> int:
        """Where the next read begins."""
        return self._file.tell()
