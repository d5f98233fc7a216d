"""One vector per clip of a task, by the encoder and by its two baselines, kept in a cache.

In: a task's clips and an encoder. Out: float32 [N, E] each, rows in the order of the task's clips; a clip that does
not decode has a row of NaN. The audio is decoded once for all that is not in the cache. A cache is a folder of .npy
files, named by what their vectors depend on: weights, normalisation, front end, and path, size and time of every file.
Fails with DataError where too many clips do not decode.

    trained         the encoder, the mean of its vectors over time
    random_weights  the same model with the weights of its initialisation, the same way
    logmel          mean and deviation over time of each band of the log-mel, and of its differences in time
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from msm_dist.data.audio import BadClip
from msm_dist.data.clips import Progress, quiet
from msm_dist.data.contents import printable
from msm_dist.errors import DataError
from msm_dist.evaluate.encoder import Encoder
from msm_dist.evaluate.tasks import Task, TaskClip, clip_waveform
from msm_dist.features import LogMel
from msm_dist.files import sync
from msm_dist.model.mae import MaskedSpectrogramModel

log = logging.getLogger(__name__)

TRAINED, RANDOM, LOGMEL = "trained", "random_weights", "logmel"
BASELINES = (RANDOM, LOGMEL)
RANDOM_SEED = 0
MOST_BAD = 0.02
"""Of a task's clips; one may always be bad."""
BATCH, READERS = 16, 2
BATCH_BYTES = 32 * 2**20
"""Of files that are decoded together, beyond the first: long recordings go one by one."""
SECONDS_AT_ONCE = 160
IDENTITY = ("encoder_sha256", "model", "crop_frames", "features", "normalization", "mean", "std")
"""What of Encoder.describe its vectors depend on."""
FORMAT = 1  # of what a vector means; raise it with any change of that


class Source(NamedTuple):
    """Something that makes vectors of clips."""

    name: str
    size: int
    """E."""
    identity: dict[str, Any]
    """What its vectors depend on, beside the clips."""
    embed: Callable[[Sequence[np.ndarray]], Tensor]
    """Waveforms, float32 [S] each at the encoder's rate -> float32 [B, E]."""


def sources(encoder: Encoder) -> list[Source]:
    """The encoder and its baselines."""
    return [_encoded(TRAINED, encoder), _encoded(RANDOM, random_twin(encoder)), _logmel(encoder)]


def random_twin(encoder: Encoder) -> Encoder:
    """The same encoder with seeded random weights in place of trained ones."""
    info = encoder.info
    model = MaskedSpectrogramModel(info.model, info.features.n_mels, info.crop_frames, seed=RANDOM_SEED)
    statistics = encoder.statistics if encoder.normalization == "dataset" else None
    return Encoder(model, info, encoder.device, encoder.normalization, statistics, encoder.chunk_batch)


def logmel_statistics(waveform: np.ndarray, front_end: LogMel) -> Tensor:
    """A clip as float32 [4 * F]: mean and deviation of each band over time, then of its differences frame to frame."""
    logmel = front_end(torch.from_numpy(waveform)[None], centred=True)[0, 0]
    steps = logmel.diff(dim=1) if logmel.shape[1] > 1 else torch.zeros_like(logmel)
    return torch.cat([part for x in (logmel, steps) for part in (x.mean(1), x.std(1, correction=0))])


def clip_vectors(
    task: Task, makers: Sequence[Source], sample_rate: int, cache: Path | None, progress: Progress = quiet
) -> dict[str, Tensor]:
    """{name of a source: float32 [N, E]}, from the cache where they are there. Raises DataError."""
    clips = _clips_digest(task.clips)
    paths = {maker.name: cache and cache / f"{maker.name}-{_key(maker, clips, sample_rate)}.npy" for maker in makers}
    found = {maker.name: _cached(paths[maker.name], (len(task.clips), maker.size)) for maker in makers}
    missing = [maker for maker in makers if found[maker.name] is None]
    if missing:
        made = _make(task, missing, sample_rate, cache, progress)
        for maker in missing:
            found[maker.name] = _keep(made[maker.name], paths[maker.name])
    return {name: torch.from_numpy(vectors) for name, vectors in found.items()}


def readable_waveforms(clips: Sequence[TaskClip], sample_rate: int) -> Iterator[np.ndarray]:
    """The audio of those clips that decode."""
    return (waveform for batch in _batches(clips, sample_rate) for waveform in batch if waveform is not None)


def _encoded(name: str, encoder: Encoder) -> Source:
    longest = SECONDS_AT_ONCE * encoder.features.sample_rate

    def embed(waveforms: Sequence[np.ndarray]) -> Tensor:
        if encoder.statistics is None:  # of the batch: it must stay one
            return _means(encoder, waveforms)
        most = max(1, longest // max(map(len, waveforms)))
        return torch.cat([_means(encoder, waveforms[i : i + most]) for i in range(0, len(waveforms), most)])

    about = encoder.describe()
    return Source(name, encoder.embedding_size, {key: about[key] for key in IDENTITY}, embed)


def _means(encoder: Encoder, waveforms: Sequence[np.ndarray]) -> Tensor:
    vectors = encoder.encode_clips([encoder.sound(waveform) for waveform in waveforms])
    return torch.stack([frames.mean(dim=0) for frames in vectors]).cpu()


def _logmel(encoder: Encoder) -> Source:
    front_end = LogMel(encoder.features)

    def embed(waveforms: Sequence[np.ndarray]) -> Tensor:
        return torch.stack([logmel_statistics(waveform, front_end) for waveform in waveforms])

    return Source(LOGMEL, 4 * encoder.features.n_mels, {"features": encoder.features.front_end()}, embed)


def _make(
    task: Task, makers: Sequence[Source], sample_rate: int, cache: Path | None, progress: Progress
) -> dict[str, np.ndarray]:
    """Vectors of all clips, in memory, or in files beside those of the cache. Raises DataError."""
    made = {maker.name: _empty(maker, len(task.clips), cache) for maker in makers}
    try:
        done, bad = 0, []
        for batch in _batches(task.clips, sample_rate):
            places = [done + i for i, waveform in enumerate(batch) if waveform is not None]
            bad += [task.clips[done + i] for i, waveform in enumerate(batch) if waveform is None]
            waveforms = [waveform for waveform in batch if waveform is not None]
            for maker in makers if waveforms else ():
                made[maker.name][places] = maker.embed(waveforms).numpy()
            done += len(batch)
            progress(f"{task.name}: embedding", done, len(task.clips))
        if len(bad) > max(1, MOST_BAD * len(task.clips)):
            named = ", ".join(printable(clip.key) for clip in bad[:4])
            raise DataError(
                f"{task.name}: {len(bad)} of {len(task.clips)} clips can't be read as audio, such as {named}; more "
                f"than {MOST_BAD:.0%} are no task: fetch them again, or take them out"
            )
    except BaseException:
        for vectors in made.values():
            _drop(vectors)
        raise
    return made


def _batches(clips: Sequence[TaskClip], sample_rate: int) -> Iterator[list[np.ndarray | None]]:
    """The audio of clips, some at a time, None for one that does not decode; the next are read meanwhile."""

    def read(clip: TaskClip) -> np.ndarray | None:
        try:
            return clip_waveform(clip, sample_rate)
        except (DataError, BadClip) as error:
            log.warning("%s: left out", error)
            return None

    with ThreadPoolExecutor(READERS) as pool:
        ahead: list[Future] = []
        for some in _groups(clips):
            reading = [pool.submit(read, clip) for clip in some]
            if ahead:
                yield [future.result() for future in ahead]
            ahead = reading
        if ahead:
            yield [future.result() for future in ahead]


def _groups(clips: Sequence[TaskClip]) -> Iterator[list[TaskClip]]:
    """Clips in their order, BATCH at a time or fewer of BATCH_BYTES."""
    group: list[TaskClip] = []
    held = 0
    for clip in clips:
        size = clip.member[1] if clip.member else clip.path.stat().st_size
        if group and (len(group) == BATCH or held + size > BATCH_BYTES):
            yield group
            group, held = [], 0
        group.append(clip)
        held += size
    if group:
        yield group


def _empty(maker: Source, count: int, cache: Path | None) -> np.ndarray:
    """Rows of NaN [count, E]: in memory, or a file in the cache."""
    if cache is None:
        return np.full((count, maker.size), np.nan, np.float32)
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f"{maker.name}.{os.getpid()}.tmp"
    vectors = np.lib.format.open_memmap(path, "w+", np.float32, (count, maker.size))
    vectors[:] = np.nan
    return vectors


def _keep(vectors: np.ndarray, path: Path | None) -> np.ndarray:
    """Give a finished file its name."""
    if path is None:
        return vectors
    vectors.flush()
    sync(vectors.filename)
    os.replace(vectors.filename, path)
    return np.load(path, mmap_mode="c", allow_pickle=False)


def _drop(vectors: np.ndarray) -> None:
    if isinstance(vectors, np.memmap):
        Path(vectors.filename).unlink(missing_ok=True)


def _cached(path: Path | None, shape: tuple[int, int]) -> np.ndarray | None:
    if path is None or not path.is_file():
        return None
    try:
        vectors = np.load(path, mmap_mode="c", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        log.warning("%s: is no longer readable (%s); made again", path, error)
        return None
    return vectors if vectors.shape == shape and vectors.dtype == np.float32 else None


def _key(maker: Source, clips: str, sample_rate: int) -> str:
    about = {"format": FORMAT, "source": maker.identity, "clips": clips, "sample_rate": sample_rate}
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]


def _clips_digest(clips: Sequence[TaskClip]) -> str:
    """Of the audio, by path, size and time of the files; labels and splits are no part of it."""
    digest = hashlib.sha256()
    stats: dict[Path, tuple[str, int, int]] = {}
    for clip in clips:
        if clip.path not in stats:
            stat = clip.path.stat()
            stats[clip.path] = str(clip.path.resolve()), stat.st_size, stat.st_mtime_ns
        digest.update(repr((stats[clip.path], clip.member)).encode(errors="surrogateescape"))
    return digest.hexdigest()
