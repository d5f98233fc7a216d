"""Small real corpora for tests: FLAC clips in tars with their sidecars and index."""

import hashlib
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile

from msm_dist.data.index import Index, Shard, member_table, write_index, write_members


def noise_clips(num_clips: int, rate: int = 16000, shortest: int = 1000, longest: int = 8000) -> list[np.ndarray]:
    """Clips of int16 noise, each of its own length."""
    random = np.random.default_rng(0)
    lengths = random.integers(shortest, longest, num_clips) * rate // 16000
    return [random.integers(-8000, 8000, length).astype(np.int16) for length in lengths]


def write_corpus(root: Path, clips: Sequence[np.ndarray], clips_per_shard: int, rate: int = 16000) -> Index:
    """Write clip i as clip-<i>.flac, `clips_per_shard` to a tar, with sidecars and index.json."""
    root.mkdir(parents=True, exist_ok=True)
    shards = [
        _write_shard(root / f"noise-{first // clips_per_shard:06d}.tar", clips, first, clips_per_shard, rate)
        for first in range(0, len(clips), clips_per_shard)
    ]
    index = Index(str(root), "audio", rate, tuple(shards), sum(map(len, clips)) / rate)
    write_index(index)
    return index


def _write_shard(path: Path, clips: Sequence[np.ndarray], first: int, count: int, rate: int) -> Shard:
    clips = clips[first : first + count]
    with tarfile.open(path, "w") as tar:
        for number, clip in enumerate(clips, first):
            file = io.BytesIO()
            soundfile.write(file, clip, rate, format="FLAC", subtype="PCM_16")
            info = tarfile.TarInfo(f"clip-{number:04d}.flac")
            info.size = len(file.getbuffer())
            file.seek(0)
            tar.addfile(info, file)
    with tarfile.open(path) as tar:
        rows = [
            (
                entry.offset_data,
                entry.size,
                len(clip),
                rate,
                "flac",
                entry.name.removesuffix(".flac").encode(),
            )
            for entry, clip in zip(tar, clips, strict=True)
        ]
    content = path.read_bytes()
    members_sha256 = write_members(path.with_suffix(".members.npy"), member_table(rows))
    return Shard(path.name, len(rows), len(content), hashlib.sha256(content).hexdigest(), members_sha256, str(path))


def damage_clip(index: Index, clip: int) -> None:
    """Overwrite a clip inside its tar, which keeps its size."""
    for shard in index.shards:
        if clip < shard.clips:
            row = np.load(shard.members_path, allow_pickle=False)[clip]
            with open(shard.path, "r+b") as file:
                file.seek(int(row["offset"]))
                file.write(bytes(int(row["size"])))
            return
        clip -= shard.clips
