"""Ten ways in which a clip is broken: inside its shard, after packing, and as a file before it."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile

from msm_dist.data.index import Index, members
from tests.audio_files import encode

RATE = 16000

AT_PACKING = {
    "truncated": "undecodable",
    "flipped": "undecodable",
    "zeros": "undecodable",
    "wrong_extension": None,
    "no_samples": "empty",
    "nan": "non_finite",
    "one_sample": "too_short",
    "8_khz_5.1": None,
    "24_bit": None,
    "text": "undecodable",
}
"""Why packing leaves a file of the kind out; None: it is packed, as there is nothing wrong with it."""

KINDS = tuple(AT_PACKING)


def broken(kind: str, flac: bytes) -> bytes:
    """What the kind makes of a clip, never longer than it was."""
    sound = soundfile.read(io.BytesIO(flac), dtype="int16")[0]
    middle = len(flac) // 2
    if kind == "truncated":
        return flac[:middle]
    if kind == "flipped":
        return flac[:middle] + bytes(255 - byte for byte in flac[middle : middle + 16]) + flac[middle + 16 :]
    if kind == "zeros":
        return bytes(len(flac))
    if kind == "wrong_extension":
        return encode(sound, "mp3")
    if kind == "no_samples":
        return encode(sound[:0], "wav")
    if kind == "nan":
        # A tenth of a second, as floats take more room.
        waveform = sound[: RATE // 10] / 32768
        waveform[::100] = np.nan
        return encode(waveform, "float.wav")
    if kind == "one_sample":
        return encode(sound[:1])
    if kind == "8_khz_5.1":
        return encode(np.stack([sound[: len(sound) // 8]] * 6, axis=1), rate=8000)
    if kind == "24_bit":
        return encode((sound[: len(sound) // 4].astype(np.int32) << 16) + 12345 * 256, "flac24")
    return (b"this is no audio\n" * (1 + len(flac) // 17))[: len(flac)]


def break_clip(index: Index, clip: int, kind: str) -> str:
    """Break a clip inside its tar, which keeps its size; returns its key."""
    for shard in index.shards:
        if clip < shard.clips:
            row = members(shard)[clip]
            with open(shard.path, "r+b") as file:
                file.seek(int(row["offset"]))
                content = broken(kind, file.read(int(row["size"])))
                assert len(content) <= row["size"], kind
                file.seek(int(row["offset"]))
                file.write(content.ljust(int(row["size"]), b"\0"))
            return row["key"].decode()
        clip -= shard.clips
    raise IndexError(clip)


def break_clips(index: Index, clips: Sequence[int]) -> set[str]:
    """Break clips, the ten kinds in turn; returns their keys."""
    return {break_clip(index, clip, KINDS[i % len(KINDS)]) for i, clip in enumerate(clips)}


def write_files(folder: Path, flac: bytes) -> None:
    """A file of every kind, named for it, and a good one."""
    folder.mkdir(parents=True)
    for kind in KINDS:
        suffix = "wav" if kind in ("no_samples", "nan", "one_sample") else "flac"
        (folder / f"{kind}.{suffix}").write_bytes(broken(kind, flac))
    (folder / "good.flac").write_bytes(flac)
