"""Embeddings on disk: an .npz file that is written clip by clip and is there whole or not at all.

In: keys, and the vectors of one clip after another, which go to a temporary file at once, so that memory holds none;
the folder is made for the first of them. Out: a file that numpy.load reads without unpickling anything. While it is
being put together it takes twice its room. Fails with OSError.

    keys            str [N]            which clip a row is
    embeddings      float32 [N, E]     one vector per clip: the mean over its time steps
    num_steps       int64 [N]          time steps of each clip
    metadata        str                JSON: what they were made with

and where every time step is kept, in place of embeddings and num_steps:

    frames          float32 [M, E]     the time steps of all clips, one clip after another
    offsets         int64 [N + 1]      clip i has the rows offsets[i] to offsets[i + 1]
    timestamps_ms   float64 [M]        the centre of each time step in its clip

With all layers E becomes 1 + depth, E.
"""

import io
import json
import os
import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from msm_dist.files import sync

KEYS_AT_ONCE = 2**14


class EmbeddingFile:
    """A file that is being written; `finish` gives it its name. Used in a `with`, which removes what is unfinished."""

    def __init__(self, path: Path, shape: tuple[int, ...], per_frame: bool):
        """`shape` is that of one vector."""
        self._path = path
        self._shape = shape
        self._per_frame = per_frame
        self._rows = path.with_name(f"{path.name}.{os.getpid()}.rows.tmp")
        self._whole = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        self._file: BinaryIO | None = None
        self.keys: list[str] = []
        self.num_steps: list[int] = []

    def __enter__(self) -> "EmbeddingFile":
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()
        self._rows.unlink(missing_ok=True)
        self._whole.unlink(missing_ok=True)

    def add(self, key: str, pieces: Iterable[np.ndarray]) -> None:
        """The vectors of a clip, float32 [T, *shape], in pieces; a clip whose pieces fail is as if never added."""
        begin, steps, total = self._file.tell() if self._file else 0, 0, np.zeros(self._shape)
        try:
            for piece in pieces:
                steps += len(piece)
                if self._per_frame:
                    self._write(piece)
                else:
                    total += piece.sum(axis=0, dtype=np.float64)
        except BaseException:
            if self._file is not None:
                self._file.seek(begin)
                self._file.truncate()
            raise
        if not self._per_frame:
            self._write(total / steps)
        self.keys.append(key)
        self.num_steps.append(steps)

    def finish(self, metadata: dict[str, Any], centres_ms: np.ndarray) -> None:
        """Write the file, of one clip or more. `centres_ms` float64: of as many steps as the longest clip has."""
        steps = np.array(self.num_steps, np.int64)
        rows = int(steps.sum()) if self._per_frame else len(steps)
        with zipfile.ZipFile(self._whole, "w", zipfile.ZIP_STORED) as archive:
            self._write_keys(archive)
            _write(archive, "metadata", np.array(json.dumps(metadata)))
            if self._per_frame:
                _write(archive, "offsets", np.concatenate([[0], steps.cumsum()]).astype(np.int64))
                stamps = (centres_ms[:count].astype("<f8").tobytes() for count in self.num_steps)
                _write_parts(archive, "timestamps_ms", "<f8", (rows,), stamps)
            else:
                _write(archive, "num_steps", steps)
            self._file.seek(0)
            name = "frames" if self._per_frame else "embeddings"
            with _member(archive, name, "<f4", (rows, *self._shape)) as member:
                shutil.copyfileobj(self._file, member, 2**20)
        sync(self._whole)
        self._whole.replace(self._path)

    def _write(self, vectors: np.ndarray) -> None:
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._rows.open("w+b")
        self._file.write(np.ascontiguousarray(vectors, "<f4").data)

    def _write_keys(self, archive: zipfile.ZipFile) -> None:
        # Most of a key of fixed width is zeros, which compress to nothing.
        dtype = np.dtype(f"<U{max(map(len, self.keys), default=1)}")
        groups = (self.keys[i : i + KEYS_AT_ONCE] for i in range(0, len(self.keys), KEYS_AT_ONCE))
        parts = (np.array(group, dtype).tobytes() for group in groups)
        _write_parts(archive, "keys", dtype.str, (len(self.keys),), parts, zipfile.ZIP_DEFLATED)


def _write(archive: zipfile.ZipFile, name: str, values: np.ndarray) -> None:
    _write_parts(archive, name, values.dtype.str, values.shape, [values.tobytes()])


def _write_parts(
    archive: zipfile.ZipFile,
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    parts: Iterable[bytes],
    compression: int = zipfile.ZIP_STORED,
) -> None:
    with _member(archive, name, dtype, shape, compression) as member:
        for part in parts:
            member.write(part)


def _member(
    archive: zipfile.ZipFile, name: str, dtype: str, shape: tuple[int, ...], compression: int = zipfile.ZIP_STORED
) -> io.BufferedIOBase:
    """A member for an array's bytes, its header written."""
    # The same vectors give the same bytes whenever they are made.
    entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
    entry.compress_type = compression
    member = archive.open(entry, "w", force_zip64=True)
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(member, header)
    return member
