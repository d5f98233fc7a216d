"""What is to be embedded: audio files, folders of them, and indexed shards, as clips one by one.

In: paths and URLs in the user's order. Out: an `Entry` for each clip, in that order (a folder's files sorted, a shard's
clips as its tar has them), which is decoded only when it is asked for; a long recording comes in blocks. Audio is
decoded as training decodes it. Fails with DataError on an input that is not there or no audio, and on shards that are
not what their index says.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from msm_dist.config import Features
from msm_dist.data import media
from msm_dist.data.audio import BadClip, num_target_samples
from msm_dist.data.clips import find_audio
from msm_dist.data.contents import front_end_of
from msm_dist.data.index import ACCESS, INDEX_NAME, Index, Shard, check_shards, is_tar, load_index, tables
from msm_dist.data.logmel import check_rows
from msm_dist.data.storage import Span, is_remote, open_store, split
from msm_dist.errors import DataError
from msm_dist.evaluate.chunks import Stored, stored_clip
from msm_dist.evaluate.recordings import encoded_blocks, read_encoded
from msm_dist.files import open_regular

LONG_SECONDS = 60
"""A longer recording is never held whole."""
FETCH_BYTES, FETCH_CLIPS = 2**25, 64  # of a shard at once


class Long(NamedTuple):
    """A recording in blocks at the front end's rate, float32 [S] each; it can be read again."""

    blocks: Callable[[], Iterator[np.ndarray]]


class Entry(NamedTuple):
    """A clip: its key, and how to load it: float32 [S] at the front end's rate, a Long, or a Stored log-mel.

    `load`, and the blocks of a Long, raise BadClip where the clip can't be used.
    """

    key: str
    load: Callable[[], np.ndarray | Long | Stored]


class Source(NamedTuple):
    """Files by path, or shards, and the inputs that name them: one, or the tars of a folder."""

    inputs: tuple[str, ...]
    content: list[str] | Index

    @property
    def num_clips(self) -> int:
        return self.content.num_clips if isinstance(self.content, Index) else len(self.content)


def find_inputs(inputs: Sequence[str], features: Features) -> list[Source]:
    """What the inputs name; no audio is read yet. Raises DataError."""
    # The tars of a folder belong together, and are one source where the first of them stands.
    groups: dict[object, list[str]] = {}
    for number, text in enumerate(inputs):
        groups.setdefault(split(text)[0] if _is_one_tar(text) else number, []).append(text)
    return [Source(tuple(group), _content(group, features)) for group in groups.values()]


def entries(sources: Sequence[Source], features: Features, width: int) -> Iterator[Entry]:
    """The clips of all sources; `width` is the frames of a patch. Raises DataError on a shard that can't be read."""
    for source in sources:
        if isinstance(source.content, Index):
            for shard in source.content.shards:
                yield from _of_shard(source.content, shard, features, width)
        else:
            for path in source.content:
                yield Entry(path, partial(_load_file, path, features.sample_rate))


def _content(group: Sequence[str], features: Features) -> list[str] | Index:
    """What an input names, or several tars."""
    text, path = group[0], Path(group[0])
    if _is_one_tar(text) or _is_shards(text):
        return _checked(load_index(group, ACCESS), features)
    if path.is_dir():
        return [str(path / file) for file in find_audio(path)]
    if path.is_file():
        return [text]
    raise DataError(f"{text}: no such file or folder; name audio files, folders of them, or indexed shards")


def _is_one_tar(text: str) -> bool:
    return is_tar(text) and "{" not in text and not text.startswith("pipe:")


def _is_shards(text: str) -> bool:
    path = Path(text)
    if path.name == INDEX_NAME or (path / INDEX_NAME).is_file():
        return True
    # A brace makes a pattern, unless there is what is called so.
    return is_remote(text) or ("{" in text and not path.exists())


def _checked(index: Index, features: Features) -> Index:
    """An index whose shards are there, and whose log-mels, if it has any, are made with the encoder's front end."""
    if index.kind == "logmel" and (stored := front_end_of(index)) is not None:
        for name, value in features.front_end().items():
            if getattr(stored, name) != value:
                raise DataError(
                    f"{index.location}: its log-mels were made with {name} = {getattr(stored, name)}, the encoder's "
                    f"front end has {value}; embed the audio that they were made from"
                )
    check_shards(index, "size")
    return index


def _load_file(path: str, sample_rate: int) -> np.ndarray | Long:
    with _opened(path) as encoded:
        info = media.probe(encoded)
        if info.samples <= LONG_SECONDS * info.sample_rate:
            return read_encoded(encoded, sample_rate)[0]
    return Long(partial(_blocks_of_file, path, sample_rate))


def _blocks_of_file(path: str, sample_rate: int) -> Iterator[np.ndarray]:
    with _opened(path) as encoded:
        yield from encoded_blocks(encoded, sample_rate)


@contextmanager
def _opened(path: str) -> Iterator[media.Encoded]:
    try:
        with open_regular(path) as file:
            yield media.whole_if_small(file)
    except OSError as error:
        raise BadClip("unreadable", error.strerror or str(error)) from None


def _of_shard(index: Index, shard: Shard, features: Features, width: int) -> Iterator[Entry]:
    """A shard's clips, fetched some at a time."""
    store = open_store(shard.location, ACCESS)
    rows = tables([shard], store)[0]
    lengths = num_target_samples(rows["samples"], rows["rate"], features.sample_rate)
    if index.kind == "logmel":
        check_rows(rows, features.num_frames(lengths), features)
    for places in _fetched_together(rows["size"]):
        begins = rows["offset"][places].tolist()
        stops = (rows["offset"] + rows["size"])[places].tolist()
        spans = [Span(shard.location, shard.bytes, *span) for span in zip(begins, stops, strict=True)]
        contents = store.fetch(spans)
        for place, content in zip(range(len(rows))[places], contents, strict=True):
            key = rows["key"][place].decode(errors="surrogateescape")
            if index.kind == "logmel":
                yield Entry(key, partial(stored_clip, content, int(lengths[place]), features, width))
            else:
                yield Entry(key, partial(_load_member, content, rows[place], features.sample_rate))


def _fetched_together(sizes: np.ndarray) -> Iterator[slice]:
    """Clips in runs of at most FETCH_CLIPS and, beyond the first, FETCH_BYTES."""
    first = held = 0
    for place, size in enumerate(sizes.tolist()):
        if place > first and (held + size > FETCH_BYTES or place - first == FETCH_CLIPS):
            yield slice(first, place)
            first, held = place, 0
        held += size
    yield slice(first, len(sizes))


def _load_member(content: memoryview, row: np.void, sample_rate: int) -> np.ndarray | Long:
    encoded = bytes(content)
    info = media.probe(encoded)
    if (info.samples, info.sample_rate) != (int(row["samples"]), int(row["rate"])):
        raise BadClip("changed", f"{info.samples} samples at {info.sample_rate} Hz, the index says {row['samples']}")
    if info.samples <= LONG_SECONDS * info.sample_rate:
        return read_encoded(encoded, sample_rate)[0]
    return Long(partial(encoded_blocks, encoded, sample_rate))
