"""`msm-dist embed`: the embeddings of files, folders and shards in one .npz file.

In: what to embed and with which encoder. Out: the file (embedding_file.py says what it holds), and a report. Clips are
decoded by threads while others are encoded, a few at a time, long recordings in blocks: memory does not grow with the
input. A clip that can't be used is left out, counted and named in report and metadata. Fails with DataError on inputs
that are not there and where no clip could be used, with ConfigError on a wrong option and on an output that exists;
nothing is written then.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from msm_dist.data.audio import BadClip
from msm_dist.data.clips import Progress, quiet
from msm_dist.data.contents import printable
from msm_dist.data.index import listed
from msm_dist.errors import ConfigError, DataError
from msm_dist.evaluate.checks import Layer
from msm_dist.evaluate.chunks import Clip, Stored
from msm_dist.evaluate.embedding_file import EmbeddingFile
from msm_dist.evaluate.encoder import Encoder
from msm_dist.evaluate.inputs import LONG_SECONDS, Entry, Long, Source, entries, find_inputs
from msm_dist.evaluate.normalization import Normalization, measured

READERS = 4
SECONDS_AT_ONCE = 240
"""Of clips that are encoded together."""

Loaded = np.ndarray | Long | Stored


@dataclass(frozen=True)
class Embed:
    """What is embedded, and how."""

    inputs: tuple[str, ...]
    model: str
    """A run folder, a folder with weights, or hf://owner/name."""
    out: Path
    frames: bool = False
    """Keep every time step; else the mean of each clip."""
    layer: str | None = None
    """The number of a layer, or "all"."""
    normalization: Normalization = "checkpoint"
    """Whose mean and deviation; dataset: those of all inputs together, which are then read twice."""
    device: str = "auto"
    batch_size: int = 16
    """Most clips that are encoded together; of long ones, as many as SECONDS_AT_ONCE takes."""
    overwrite: bool = False


class LeftOut(NamedTuple):
    """A clip that could not be used."""

    key: str
    reason: str


def embed(request: Embed, progress: Progress = quiet) -> str:
    """Write the embeddings and return a report of it. Raises DataError, ConfigError, CheckpointError, OSError."""
    _check(request)
    dataset = request.normalization == "dataset"
    normalization: Normalization = "checkpoint" if dataset else request.normalization
    encoder = Encoder.load(request.model, _device(request.device), normalization)
    layer = _layer(request.layer, encoder.depth)
    sources = find_inputs(request.inputs, encoder.features)
    total = sum(source.num_clips for source in sources)
    width = encoder.info.model.patch[1]
    if dataset:
        found = entries(sources, encoder.features, width)
        encoder = encoder.with_statistics(measured(_measurable(found, total, progress), encoder.features).checked())
    shape = (1 + encoder.depth, encoder.embedding_size) if layer == "all" else (encoder.embedding_size,)
    left_out: list[LeftOut] = []
    with EmbeddingFile(request.out, shape, request.frames) as file:
        clips = _loaded(entries(sources, encoder.features, width), left_out)
        for key, pieces in _vectors(encoder, clips, layer, request.batch_size):
            try:
                file.add(key, pieces)
            except BadClip as fault:
                left_out.append(LeftOut(key, str(fault)))
            progress("embedding", len(file.keys) + len(left_out), total)
        if not file.keys:
            raise DataError(f"none of {total} clips could be embedded:\n{_listed(left_out)}")
        centres = encoder.centres_ms(max(file.num_steps)).numpy()
        file.finish(_metadata(request, encoder, layer, sources, file, left_out), centres)
        return _report(request, encoder, file, left_out)


def _check(request: Embed) -> None:
    if request.out.suffix != ".npz":
        raise ConfigError(f"--out {request.out}: must end in .npz")
    if request.out.exists() and not request.overwrite:
        raise ConfigError(f"--out {request.out}: is there already; name another file, or give --overwrite")
    if not request.inputs:
        raise ConfigError("nothing to embed: name audio files, folders of them, or indexed shards")


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def _layer(text: str | None, depth: int) -> Layer:
    if text is None or text == "all":
        return text
    if not text.isdecimal() or int(text) > depth:
        raise ConfigError(f"--layer {text}: this encoder has layers 0 to {depth}; or all")
    return int(text)


def _loaded(found: Iterable[Entry], left_out: list[LeftOut]) -> Iterator[tuple[str, Loaded]]:
    """The clips that can be used, in their order, some read ahead; the others are added to `left_out`."""
    with ThreadPoolExecutor(READERS) as pool:
        ahead: deque[tuple[str, Future[Loaded]]] = deque()
        try:
            for entry in found:
                ahead.append((entry.key, pool.submit(entry.load)))
                if len(ahead) > 4 * READERS:
                    yield from _result(*ahead.popleft(), left_out)
            while ahead:
                yield from _result(*ahead.popleft(), left_out)
        finally:
            for _, future in ahead:
                future.cancel()


def _result(key: str, future: Future[Loaded], left_out: list[LeftOut]) -> Iterator[tuple[str, Loaded]]:
    try:
        yield key, future.result()
    except BadClip as fault:
        left_out.append(LeftOut(key, str(fault)))


def _measurable(found: Iterable[Entry], total: int, progress: Progress) -> Iterator[np.ndarray]:
    """What the statistics of a data set are measured on: clips and blocks, but those that can't be used."""
    for done, (_, clip) in enumerate(_loaded(found, []), 1):
        progress("measuring", done, total)
        if isinstance(clip, Long):
            # A recording that turns out to be damaged gives no block: its peak is looked for first.
            try:
                yield from clip.blocks()
            except BadClip:
                continue
        else:
            yield clip.whole() if isinstance(clip, Stored) else clip


def _vectors(
    encoder: Encoder, clips: Iterable[tuple[str, Loaded]], layer: Layer, batch_size: int
) -> Iterator[tuple[str, Iterable[np.ndarray]]]:
    """Each clip's vectors [T, ...] in pieces, in order; short clips are encoded together."""
    batch: list[tuple[str, Clip]] = []
    held = 0.0
    for key, clip in clips:
        seconds = _seconds(encoder, clip)
        if batch and (seconds is None or len(batch) == batch_size or held + seconds > SECONDS_AT_ONCE):
            yield from _encoded(encoder, batch, layer)
            batch, held = [], 0.0
        if seconds is None:
            yield key, _long(encoder, clip, layer)
        else:
            batch.append((key, clip if isinstance(clip, Stored) else encoder.sound(clip)))
            held += seconds
    if batch:
        yield from _encoded(encoder, batch, layer)


def _seconds(encoder: Encoder, clip: Loaded) -> float | None:
    """How long a clip is; None of a recording that is not encoded at once."""
    rate, hop = encoder.features.sample_rate, encoder.features.hop
    if isinstance(clip, Long) or isinstance(clip, Stored) and clip.num_frames * hop > LONG_SECONDS * rate:
        return None
    return (clip.num_frames * hop if isinstance(clip, Stored) else len(clip)) / rate


def _encoded(
    encoder: Encoder, batch: Sequence[tuple[str, Clip]], layer: Layer
) -> Iterator[tuple[str, Iterable[np.ndarray]]]:
    found = encoder.encode_clips([clip for _, clip in batch], layer)
    for (key, _), vectors in zip(batch, found, strict=True):
        yield key, [vectors.cpu().numpy()]


def _long(encoder: Encoder, clip: Long | Stored, layer: Layer) -> Iterator[np.ndarray]:
    """The vectors of a recording that is not encoded at once; where batches are normalised, it is one by itself."""
    if encoder.statistics is None:
        own = clip.blocks() if isinstance(clip, Long) else [clip.whole()]
        encoder = encoder.with_statistics(measured(own, encoder.features), "batch")
    if isinstance(clip, Long):
        pieces = encoder.stream(clip.blocks(), encoder.features.sample_rate, layer)
    else:
        length = encoder.info.crop_frames * encoder.chunk_batch
        parts = (clip.codes[first : first + length] for first in range(0, clip.num_frames, length))
        pieces = (encoder.encode_clips([Stored(part, len(part))], layer)[0] for part in parts)
    for piece in pieces:
        yield piece.cpu().numpy()


def _metadata(
    request: Embed,
    encoder: Encoder,
    layer: Layer,
    sources: Sequence[Source],
    file: EmbeddingFile,
    left_out: Sequence[LeftOut],
) -> dict[str, Any]:
    return {
        "weights": request.model,
        "layer": layer,
        **encoder.describe(),
        "batch_size": request.batch_size,
        "batch_seconds": SECONDS_AT_ONCE,
        "time_step_ms": float(encoder.centres_ms(2).diff()),
        "time_steps": sum(file.num_steps),
        "sources": [{"inputs": source.inputs, "clips": source.num_clips} for source in sources],
        "clips": len(file.keys),
        "left_out": [entry._asdict() for entry in left_out],
    }


def _report(request: Embed, encoder: Encoder, file: EmbeddingFile, left_out: Sequence[LeftOut]) -> str:
    mean, std = encoder.statistics or (None, None)
    batch = f"of each batch of up to {request.batch_size} clips or {SECONDS_AT_ONCE} s"
    statistics = batch if mean is None else f"mean {mean:.4f}, std {std:.4f}"
    seconds = sum(file.num_steps) * float(encoder.centres_ms(2).diff()) / 1000
    length = f"{seconds:.1f} s" if seconds < 3600 else f"{seconds / 3600:.2f} h"
    what = f"{sum(file.num_steps)} time steps" if request.frames else "one vector each"
    lines = [
        f"{request.out}: {len(file.keys)} clips, {length}, {what}, E = {encoder.embedding_size}",
        f"weights        {request.model}, encoder {encoder.digest()[:16]}, on {encoder.device}",
        f"normalization  {encoder.normalization}, {statistics}",
    ]
    if left_out:
        lines.append(f"left out       {len(left_out)} of {len(file.keys) + len(left_out)} clips:\n{_listed(left_out)}")
    return "\n".join(lines)


def _listed(left_out: Sequence[LeftOut]) -> str:
    return listed([printable(f"{entry.key}: {entry.reason}") for entry in left_out])
