"""One tar shard of a pack: clips -> <out>/<name>.tar, its sidecar and its record.

In: a `ShardTask`. Out: the files; the record, <out>/.pack/<name>.json, is written last and marks the shard
as finished. The tar gets its final name when all of it is on disk. The same task gives the same bytes. Fails
with OSError; a clip that does not decode is left out and named in the record.
"""

import io
import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from msm_dist.config import Features
from msm_dist.data.audio import BadClip, decode_span, to_int16
from msm_dist.data.clips import Clip, LeftOut
from msm_dist.data.index import UNFINISHED_NAME, file_sha256, member_table, write_members
from msm_dist.data.stats import LogMelMeter
from msm_dist.files import write_atomically


@dataclass(frozen=True)
class ShardTask:
    """One shard to write."""

    name: str
    clips: Sequence[Clip]
    source: Path
    out: Path
    features: Features


def write_shard(task: ShardTask) -> int:
    """Write tar, sidecar and record of one shard; returns how many clips were tried."""
    meter = LogMelMeter(task.features)
    rows, left_out = [], []
    temporary = task.out / UNFINISHED_NAME / f"{task.name}.tmp"
    with open(temporary, "wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for clip in task.clips:
                try:
                    samples = _samples(task, clip)
                except BadClip as error:
                    start = clip.start / clip.recording.rate
                    left_out.append(LeftOut(clip.recording.file, start, error.reason, error.detail))
                    continue
                encoded = _flac(samples, task.features.sample_rate)
                offset = _add(tar, f"{clip.key}.flac", encoded)
                _add(tar, f"{clip.key}.json", _description(clip))
                rows.append((offset, len(encoded), len(samples), task.features.sample_rate, "flac", clip.key.encode()))
                meter.add(samples)
        file.flush()
        os.fsync(file.fileno())
    path = task.out / task.name
    shard = {"name": task.name, "clips": len(rows), "bytes": temporary.stat().st_size}
    shard |= {"sha256": file_sha256(temporary), "members_sha256": ""}
    if rows:
        shard["members_sha256"] = write_members(path.with_suffix(".members.npy"), member_table(rows))
        temporary.replace(path)
    else:
        temporary.unlink()
    record = {"shard": shard, "samples": sum(row[2] for row in rows), "sums": meter.sums.tolist()}
    record["left_out"] = [asdict(entry) for entry in left_out]
    write_atomically(_record_path(task), json.dumps(record).encode())
    return len(task.clips)


def read_record(task: ShardTask) -> dict[str, Any]:
    """A finished shard: its index entry ("shard"), samples, sums of the log-mel, what was left out."""
    return json.loads(_record_path(task).read_text())


def is_written(task: ShardTask) -> bool:
    """Whether the shard is finished and its tar still there."""
    if not _record_path(task).exists():
        return False
    shard, tar = read_record(task)["shard"], task.out / task.name
    return shard["clips"] == 0 or (tar.exists() and tar.stat().st_size == shard["bytes"])


def _record_path(task: ShardTask) -> Path:
    return task.out / UNFINISHED_NAME / f"{task.name}.json"


def _samples(task: ShardTask, clip: Clip) -> np.ndarray:
    with open(task.source / clip.recording.file, "rb") as file:
        return to_int16(decode_span(file, clip.start, clip.stop, task.features.sample_rate))


def _flac(samples: np.ndarray, sample_rate: int) -> bytes:
    encoded = io.BytesIO()
    soundfile.write(encoded, samples, sample_rate, format="FLAC", subtype="PCM_16")
    return encoded.getvalue()


def _description(clip: Clip) -> bytes:
    """The json member: labels, and where the clip comes from."""
    recording = clip.recording
    origin = {"file": recording.file, "start_seconds": clip.start / recording.rate}
    origin |= {"seconds": (clip.stop - clip.start) / recording.rate}
    origin |= {"sample_rate": recording.rate, "channels": recording.channels}
    return json.dumps({"labels": clip.labels, "names": clip.names, "origin": origin}).encode()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> int:
    """Append a member without date or owner; returns where its data begin."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    offset = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(member, io.BytesIO(content))
    return offset
