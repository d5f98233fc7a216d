"""A small labelled task of real audio files, and the weights of a tiny model: for tests of what learns from labels."""

from pathlib import Path

import numpy as np
import soundfile

from msm_dist.config import Features, Model
from msm_dist.model.mae import MaskedSpectrogramModel
from msm_dist.model.weights import WeightsInfo, save

RATE = 16000
KINDS = ("hiss", "hum", "noise")
TINY = Model(embed_dim=32, depth=2, num_heads=2, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
ORIGIN = {"run": "tiny", "init_from": {"sha256": "0" * 64, "origin": {"published_file": "base.pth", "notes": ["one"]}}}
INFO = WeightsInfo(TINY, Features(mean=-6.5, std=3.5), 96, ORIGIN)


def new_model(info: WeightsInfo = INFO, seed: int = 1) -> MaskedSpectrogramModel:
    return MaskedSpectrogramModel(info.model, info.features.n_mels, info.crop_frames, seed)


def write_weights(folder: Path) -> Path:
    """A tiny encoder, as a run would export it."""
    return save(folder, new_model().state_dict(), INFO)


def sound(kind: str, rng: np.random.Generator) -> np.ndarray:
    """0.4 to 1 s of a kind of sound, at a level of its own."""
    time = np.arange(rng.integers(6400, 16000)) / RATE
    wave = rng.uniform(-1, 1, len(time))
    if kind == "hiss":
        wave = np.diff(wave, n=4, prepend=np.zeros(4)) / 8
    elif kind == "hum":
        wave = sum(np.sin(2 * np.pi * rng.uniform(80, 120) * n * time) for n in range(1, 9)) / 8
    return rng.uniform(0.1, 0.5) * wave + 0.001 * rng.standard_normal(len(time))


def write_sounds(folder: Path, train: int = 36, valid: int = 12, test: int = 24) -> Path:
    """Files of the three kinds, unevenly many to train on; the CSV of the task."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    rows = ["file,label,split"]
    for split, count in (("train", train), ("valid", valid), ("test", test)):
        for number in range(count):
            kind = KINDS[number % 3 if split != "train" or number % 4 else 0]
            soundfile.write(folder / f"{split}{number}.wav", sound(kind, rng), RATE)
            rows.append(f"{split}{number}.wav,{kind},{split}")
    (folder / "sounds.csv").write_text("\n".join(rows) + "\n")
    return folder / "sounds.csv"
