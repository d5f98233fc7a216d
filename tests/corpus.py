"""A small corpus of real FLAC shards, for tests of training."""

import io
import tarfile
from pathlib import Path

import numpy as np
import soundfile

from msm_dist.config import Features
from msm_dist.data.shards import index_shards

SAMPLE_RATE = 16000


def sounds(count: int, seed: int) -> list[np.ndarray]:
    """Chirps in noise, 0.4 to 2 s."""
    rng = np.random.default_rng(seed)
    clips = []
    for _ in range(count):
        time = np.arange(rng.integers(6400, 32000)) / SAMPLE_RATE
        chirp = np.sin(2 * np.pi * rng.uniform(100, 4000) * time * (1 + rng.uniform(-0.2, 0.2) * time))
        clips.append(rng.uniform(0.05, 0.5) * chirp + 0.02 * rng.standard_normal(time.size))
    return clips


def write_corpus(folder: Path, count: int = 192, num_shards: int = 3, seed: int = 0) -> Path:
    """`count` clips in `num_shards` tars with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    clips = sounds(count, seed)
    for shard in range(num_shards):
        with tarfile.open(folder / f"clips-{shard:06d}.tar", "w") as tar:
            for number in range(shard, count, num_shards):
                encoded = io.BytesIO()
                soundfile.write(encoded, clips[number], SAMPLE_RATE, format="FLAC", subtype="PCM_16")
                member = tarfile.TarInfo(f"clip{number:04d}.flac")
                member.size = len(encoded.getvalue())
                tar.addfile(member, io.BytesIO(encoded.getvalue()))
    index_shards(sorted(folder.glob("*.tar")), Features())
    return folder
