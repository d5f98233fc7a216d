"""The corpora of benchmarks/data.py: the same clips in every form that is compared.

In: a folder and how many clips. Out: FLAC, WAV, Vorbis, Opus and MP3 shards with index.json, log-mel shards made from
the FLAC ones, and a .npy file of float32 [80, 1001] per clip. A clip is 10 s at 16 kHz: sounds of the embedded corpus
(msm_dist/data/synthetic.py: voices, strings, noises, rhythms in noise 12 to 42 dB below), one after the other.
"""

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
import torch

from msm_dist.config import Features
from msm_dist.data.audio import decode
from msm_dist.data.index import load_index, members
from msm_dist.data.repack import repack
from msm_dist.data.shards import index_shards
from msm_dist.data.synthetic import OTHER_RATE_EVERY, RATE, make_clip
from msm_dist.features import LogMel

SAMPLES = 10 * RATE
CODECS = {
    "flac": ("FLAC", "PCM_16"),
    "wav": ("WAV", "PCM_16"),
    "vorbis": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", None),
}
SUFFIXES = {"vorbis": "ogg", "opus": "opus"}
OGG_PIECE = 16_000  # samples that libsndfile encodes at once: its stack overflows on much longer ones
NUM_SHARDS = 4


def make_corpora(root: Path, num_clips: int) -> None:
    """Write all of them; `num_clips` is a multiple of the number of shards."""
    clips = [make_sound(number) for number in range(num_clips)]
    for codec in CODECS:
        _write_shards(root / codec, clips, codec)
        index_shards(sorted((root / codec).glob("*.tar")), Features())
    repack(root / "flac", root / "logmel", Features())
    _write_files(root / "npy", root / "flac")


def make_sound(number: int) -> np.ndarray:
    """Clip `number`: int16 [SAMPLES]."""
    parts, length = [], 0
    while length < SAMPLES:
        # Clips of which the number is OTHER_RATE_EVERY - 1 more than a multiple have another rate.
        parts.append(
            make_clip(np.random.default_rng([number, len(parts)]), OTHER_RATE_EVERY * (number + len(parts)))[0]
        )
        length += len(parts[-1])
    return np.rint(np.concatenate(parts)[:SAMPLES] * 32767).astype(np.int16)


def encode_sound(samples: np.ndarray, codec: str) -> bytes:
    """The bytes of a file of int16 [S]."""
    container, subtype = CODECS[codec]
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", RATE, 1, subtype, format=container) as sound:
        for start in range(0, len(samples), OGG_PIECE):
            sound.write(samples[start : start + OGG_PIECE])
    return file.getvalue()


def files_of(folder: Path) -> list[Path]:
    """Its files with data."""
    return sorted(path for path in folder.iterdir() if path.suffix in (".tar", ".npy"))


def forget(folder: Path) -> None:
    """Ask the kernel to drop a folder's files from the page cache; nothing may have them mapped."""
    for path in files_of(folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def whole_clips(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Key and float32 [S] of each clip of audio shards, decoded from its beginning."""
    for shard in load_index(str(folder)).shards:
        content = shard.path.read_bytes()
        for row in members(shard):
            yield row["key"].decode(), decode(content[row["offset"] : row["offset"] + row["size"]], RATE)


def _write_shards(folder: Path, clips: list[np.ndarray], codec: str) -> None:
    folder.mkdir(parents=True)
    each = len(clips) // NUM_SHARDS
    for shard in range(NUM_SHARDS):
        with tarfile.open(folder / f"clips-{shard:06d}.tar", "w") as tar:
            for number in range(shard * each, (shard + 1) * each):
                content = encode_sound(clips[number], codec)
                member = tarfile.TarInfo(f"clip{number:06d}.{SUFFIXES.get(codec, codec)}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def _write_files(folder: Path, shards: Path) -> None:
    """A log-mel per file, as codebases of masked autoencoders for audio keep them."""
    folder.mkdir(parents=True)
    front_end = LogMel(Features())
    for key, waveform in whole_clips(shards):
        np.save(folder / f"{key}.npy", front_end(torch.from_numpy(waveform[None]), centred=True)[0, 0].numpy())
