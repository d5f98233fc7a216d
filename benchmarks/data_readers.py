"""What benchmarks/data.py compares: our loader, webdataset as its documentation teaches, and a .npy file per clip.

Each is a context that yields an endless iterator over batches of crops and the process ids of its workers. Ours hands
over int16 audio or uint8 log-mel, of which the device makes the log-mel; the other two hand over float32 log-mel.
"""

import io
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
import torch
import webdataset
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchaudio.transforms import MelSpectrogram

from msm_dist.config import Config, Features, batch_layout
from msm_dist.data.crops import CropReader, Source
from msm_dist.data.index import load_index
from msm_dist.data.plan import make_plan
from msm_dist.data.stream import make_loader

FRAMES = 208
BLOCK = 8
SHUFFLED = 64  # clips that webdataset shuffles within
FEATURES = Features()


class Running(NamedTuple):
    """A loader at work: its batches [B, ...], its workers."""

    batches: Iterator[torch.Tensor]
    worker_pids: list[int]


def source_of(location: str | Path, crops_per_clip: int = 1) -> Source:
    """Our corpus at a path or URL."""
    index = load_index(str(location))
    plan = make_plan([shard.clips for shard in index.shards], 0, None, BLOCK, 1024, crops_per_clip)
    return Source(plan, index, FEATURES, FRAMES)


def reader_of(location: str | Path, crops_per_clip: int = 1) -> CropReader:
    """Our reader, without processes."""
    return CropReader(source_of(location, crops_per_clip))


@contextmanager
def ours(location: str | Path, num_workers: int, batch: int, crops_per_clip: int = 1) -> Iterator[Running]:
    """The loader of a training run."""
    source = source_of(location, crops_per_clip)
    data = {"num_workers": num_workers, "block": BLOCK, "crops_per_clip": crops_per_clip, "shards": str(location)}
    cfg = Config.model_validate(
        {"data": data, "train": {"global_batch": batch, "micro_batch": batch, "steps": 10}, "optim": {"lr": 1e-3}}
    )
    layout = batch_layout(cfg, 1)
    loader = make_loader(source.plan, source.index, FEATURES, cfg.data, layout, 0)
    try:
        yield Running((item.crops for item in loader), loader.worker_pids)
    finally:
        loader.close()


@contextmanager
def with_webdataset(folder: Path, num_workers: int, batch: int) -> Iterator[Running]:
    """Shards streamed, whole clips decoded by soundfile, a random crop, its log-mel by torchaudio, batched."""
    mel = MelSpectrogram(16000, n_fft=400, hop_length=160, n_mels=80, f_min=50, norm="slaney", mel_scale="slaney")

    def cut(sample: dict[str, Any]) -> torch.Tensor:
        waveform = next(value for value in sample.values() if isinstance(value, np.ndarray))
        start = np.random.randint(0, len(waveform) - FEATURES.hop * (FRAMES - 1))
        crop = torch.from_numpy(waveform[start : start + FEATURES.hop * (FRAMES - 1)])
        return (mel(crop) + torch.finfo(torch.float32).eps).log()[None]

    dataset = (
        webdataset.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=False, resampled=True)
        .shuffle(SHUFFLED)
        .decode(_soundfile)
        .map(cut)
        .batched(batch, collation_fn=torch.stack)
    )
    with _running(DataLoader(dataset, batch_size=None, num_workers=num_workers)) as running:
        yield running


@contextmanager
def with_files(folder: Path, num_workers: int, batch: int) -> Iterator[Running]:
    """A float32 [80, 1001] per file, np.load and a random crop, collated by DataLoader."""
    dataset = _Files(sorted(folder.glob("*.npy")))
    sampler = RandomSampler(dataset, replacement=True, num_samples=10**9)
    with _running(DataLoader(dataset, batch, sampler=sampler, num_workers=num_workers)) as running:
        yield running


class _Files(Dataset):
    def __init__(self, paths: list[Path]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> torch.Tensor:
        logmel = np.load(self.paths[number])
        start = np.random.randint(0, logmel.shape[1] - FRAMES + 1)
        return torch.from_numpy(logmel[None, :, start : start + FRAMES])


def _soundfile(key: str, content: bytes) -> np.ndarray | None:
    """A decoder in webdataset's sense."""
    if not key.endswith((".flac", ".wav", ".ogg", ".opus", ".mp3")):
        return None
    return soundfile.read(io.BytesIO(content), dtype="float32")[0]


@contextmanager
def _running(loader: DataLoader) -> Iterator[Running]:
    before = set(multiprocessing.active_children())
    batches = iter(loader)
    workers = [child for child in multiprocessing.active_children() if child not in before]
    try:
        yield Running(batches, [worker.pid for worker in workers])
    finally:
        del batches  # which ends the workers
