"""Whether the readers of benchmarks/data.py hand over what they should, before any is timed.

In: the folder of the corpora. Out: what is wrong, a line each. The truth is each clip decoded from its beginning.
"""

from pathlib import Path

import numpy as np
import torch

from benchmarks.data_corpora import CODECS, whole_clips
from benchmarks.data_readers import FEATURES, FRAMES, ours, reader_of, with_files, with_webdataset
from msm_dist.data.audio import to_int16
from msm_dist.features import LogMel

EXACT = ("flac", "wav")
LOSSY_DB = 40.0
"""How far a crop of a lossy codec is above its difference to the whole clip's: decoding may begin in the middle."""
NUM_CLIPS = 8
STEP = 0.0455  # nat: half a step of the stored log-mels, and rounding


def check_all(root: Path) -> list[str]:
    """What is wrong."""
    truth = dict(whole_clips(root / "flac"))
    wrong = [fault for codec in CODECS for fault in _check_codec(root / codec, codec)]
    wrong += _check_logmels(root / "logmel", truth)
    logmels = {key: _logmel(waveform) for key, waveform in truth.items()}
    wrong += _check_files(root / "npy", logmels)
    for name, loader, shape in (
        ("ours", ours(root / "flac", 1, 16), (16, FEATURES.crop_samples(FRAMES))),
        ("webdataset", with_webdataset(root / "flac", 1, 16), (16, 1, FEATURES.n_mels, FRAMES)),
        (".npy", with_files(root / "npy", 1, 16), (16, 1, FEATURES.n_mels, FRAMES)),
    ):
        with loader as running:
            batch = next(running.batches)
        if batch.shape != shape:
            wrong.append(f"{name}: a batch is {list(batch.shape)}, must be {list(shape)}")
        elif name == "webdataset":
            wrong += _check_mels(batch, logmels)
    return wrong


def _check_codec(folder: Path, codec: str) -> list[str]:
    whole = dict(whole_clips(folder))
    wrong = []
    for crop in _crops(folder):
        start = FEATURES.hop * crop.offset - FEATURES.n_fft // 2
        padded = np.pad(to_int16(whole[crop.key]), FEATURES.n_fft // 2, mode="reflect")
        expected = padded[start + FEATURES.n_fft // 2 :][: len(crop.values)]
        if codec in EXACT:
            if not np.array_equal(crop.values, expected):
                wrong.append(f"{codec}: a crop of {crop.key} is not the slice of the clip")
            continue
        noise = np.square(crop.values.astype(float) - expected).mean()
        if noise * 10 ** (LOSSY_DB / 10) > np.square(expected.astype(float)).mean():
            wrong.append(f"{codec}: a crop of {crop.key} is far from the slice of the clip")
    return wrong


def _check_logmels(folder: Path, truth: dict[str, np.ndarray]) -> list[str]:
    front_end = LogMel(FEATURES)
    wrong = []
    for crop in _crops(folder):
        expected = _logmel(truth[crop.key])[:, crop.offset : crop.offset + FRAMES]
        stored = front_end(torch.from_numpy(crop.values[None]))[0, 0]
        if not (stored - expected).abs().max() <= STEP:
            wrong.append(f"logmel: a crop of {crop.key} is not the slice of the clip's log-mel")
    return wrong


def _check_files(folder: Path, logmels: dict[str, torch.Tensor]) -> list[str]:
    differ = [key for key, value in logmels.items() if not np.array_equal(np.load(folder / f"{key}.npy"), value)]
    return [f".npy: {len(differ)} files are not their clip's log-mel, such as {differ[0]}"] if differ else []


def _check_mels(batch: torch.Tensor, logmels: dict[str, torch.Tensor]) -> list[str]:
    """webdataset's crops stand at any sample: their level must be one of the corpus'."""
    levels = [value.mean().item() for value in logmels.values()]
    spread = max(levels) - min(levels)
    mean = batch.mean().item()
    if batch.isfinite().all() and min(levels) - spread <= mean <= max(levels) + spread:
        return []
    return [f"webdataset: the mean log-mel of a batch is {mean:.2f}, clips have {min(levels):.2f} to {max(levels):.2f}"]


def _crops(folder: Path) -> list:
    reader = reader_of(folder)
    blocks = [reader.blocks([number]) for number in range(NUM_CLIPS // 8)]
    sample_ids = np.concatenate([block.sample_ids for block in blocks])
    return [crop for crop in reader.read(sample_ids) if crop is not None]


def _logmel(waveform: np.ndarray) -> torch.Tensor:
    return LogMel(FEATURES)(torch.from_numpy(waveform[None]), centred=True)[0, 0]
