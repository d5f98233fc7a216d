"""One tar shard of a pack: clips -> <out>/<name>.tar, its sidecar and its record.

In: a `ShardTask`. Out: the files; the record, <out>/.pack/<name>.json, is written last and marks the shard
as finished. The tar gets its final name when all of it is on disk. The same task gives the same bytes. Fails
with OSError; a clip that does not decode is left out and named in the record.
"""

import io
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import soundfile

from msm_dist.config import Features
from msm_dist.data import logmel
from msm_dist.data.audio import AudioInfo, BadClip
from msm_dist.data.clips import MIN_TAIL_SECONDS, Clip, LeftOut, cut
from msm_dist.data.index import UNFINISHED_NAME, file_sha256, member_table, write_members
from msm_dist.data.media import check_length, probe, read_span, whole_if_small
from msm_dist.data.parquet import Row, read_rows
from msm_dist.data.stats import LogMelMeter
from msm_dist.files import write_atomically


@dataclass(frozen=True)
class ShardTask:
    """One shard to write, of FLAC or of log-mels."""

    name: str
    clips: Sequence[Clip] | Sequence[Row]
    source: Path
    out: Path
    features: Features
    kind: Literal["audio", "logmel"] = "audio"
    segment_seconds: float = 10.0
    """Longer recordings in rows of a table are cut; those in files are cut already."""


class Piece(NamedTuple):
    """A clip ready to be stored: key, int16 [S] at the target rate, its json member, its identifier in AudioSet."""

    key: str
    samples: np.ndarray
    description: dict[str, Any]
    ytid: str


def write_shard(task: ShardTask) -> int:
    """Write tar, sidecar and record of one shard; returns how many clips were tried."""
    temporary = task.out / UNFINISHED_NAME / f"{task.name}.tmp"
    with open(temporary, "wb") as file:
        contents = _write_tar(file, task)
        file.flush()
        os.fsync(file.fileno())
    path = task.out / task.name
    shard = {"name": task.name, "clips": len(contents["rows"]), "bytes": temporary.stat().st_size}
    shard |= {"sha256": file_sha256(temporary), "members_sha256": ""}
    if rows := contents.pop("rows"):
        shard["members_sha256"] = write_members(path.with_suffix(".members.npy"), member_table(rows))
        temporary.replace(path)
    else:
        temporary.unlink()
    record = {"shard": shard, "samples": sum(row[2] for row in rows), **contents}
    write_atomically(_record_path(task), json.dumps(record).encode())
    return len(task.clips)


def read_record(task: ShardTask) -> dict[str, Any]:
    """A finished shard: its index entry ("shard"), samples, sums of the log-mel, what was left out, ytids, scaled."""
    return json.loads(_record_path(task).read_text())


def is_written(task: ShardTask) -> bool:
    """Whether the shard is finished and its tar still there."""
    if not _record_path(task).exists():
        return False
    shard, tar = read_record(task)["shard"], task.out / task.name
    return shard["clips"] == 0 or (tar.exists() and tar.stat().st_size == shard["bytes"])


def _record_path(task: ShardTask) -> Path:
    return task.out / UNFINISHED_NAME / f"{task.name}.json"


def _write_tar(file: BinaryIO, task: ShardTask) -> dict[str, Any]:
    """Write the members; returns the sidecar's rows and what the record says of them."""
    rows, left_out, ytids = [], [], set()
    meter = LogMelMeter(task.features)
    suffix, encode = (logmel.SUFFIX, _logmel) if task.kind == "logmel" else (".flac", _flac)
    rate, scaled = task.features.sample_rate, 0
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for piece in _pieces(task):
            if isinstance(piece, LeftOut):
                left_out.append(asdict(piece))
                continue
            content = encode(piece.samples, meter)
            offset = _add(tar, piece.key + suffix, content)
            _add(tar, f"{piece.key}.json", json.dumps(piece.description).encode())
            codec = "flac" if task.kind == "audio" else task.kind
            rows.append((offset, len(content), len(piece.samples), rate, codec, piece.key.encode()))
            scaled += "gain" in piece.description
            ytids.update([piece.ytid] if piece.ytid else [])
    return {"rows": rows, "sums": meter.sums.tolist(), "left_out": left_out, "ytids": sorted(ytids), "scaled": scaled}


def _pieces(task: ShardTask) -> Iterator[Piece | LeftOut]:
    """The task's clips in its order, decoded."""
    if isinstance(task.clips[0], Clip):
        for clip in task.clips:
            yield _file_piece(task, clip)
        return
    order = {row: number for number, row in enumerate(task.clips)}
    encoded = dict(read_rows(task.source, task.clips))
    for row in sorted(encoded, key=order.__getitem__):
        content = encoded.pop(row)
        yield from [content] if isinstance(content, LeftOut) else _row_pieces(task, row, content)


def _file_piece(task: ShardTask, clip: Clip) -> Piece | LeftOut:
    recording, rate = clip.recording, task.features.sample_rate
    try:
        with open(task.source / recording.file, "rb") as file:
            samples, gain = read_span(whole_if_small(file), clip.start, clip.stop, rate)
    except BadClip as error:
        return LeftOut(recording.file, clip.start / recording.rate, error.reason, error.detail)
    about = AudioInfo(recording.samples, recording.rate, recording.channels, "")
    description = _description(clip, recording.file, about, (clip.start, clip.stop), gain)
    return Piece(clip.key, samples, description, clip.ytid)


def _row_pieces(task: ShardTask, row: Row, content: bytes) -> Iterator[Piece | LeftOut]:
    try:
        about = probe(content)
        check_length(about.samples, about.sample_rate, task.features)
        if about.samples >= (task.segment_seconds + MIN_TAIL_SECONDS) * about.sample_rate:
            # As with files: what a header claims and is not there would become a clip per segment.
            read_span(content, about.samples - about.sample_rate, about.samples, task.features.sample_rate)
    except BadClip as error:
        yield LeftOut(row.name, 0.0, error.reason, error.detail)
        return
    for start, stop in cut(about.samples, about.sample_rate, task.segment_seconds):
        try:
            samples, gain = read_span(content, start, stop, task.features.sample_rate)
        except BadClip as error:
            yield LeftOut(row.name, start / about.sample_rate, error.reason, error.detail)
            return
        description = _description(row, row.name, about, (start, stop), gain)
        yield Piece(f"{row.key}_{round(1000 * start / about.sample_rate)}", samples, description, row.ytid)


def _flac(samples: np.ndarray, meter: LogMelMeter) -> bytes:
    encoded = io.BytesIO()
    soundfile.write(encoded, samples, meter.features.sample_rate, format="FLAC", subtype="PCM_16")
    meter.add(samples)
    return encoded.getvalue()


def _logmel(samples: np.ndarray, meter: LogMelMeter) -> bytes:
    """A stored log-mel; its statistics are those of the values as stored, without its tail."""
    codes = logmel.clip_codes(samples, meter.log_mel)
    meter.sums += logmel.code_sums(codes[: meter.features.num_frames(len(samples))], meter.log_mel)
    return logmel.encode_logmel(codes)


def _description(
    labelled: Clip | Row, file: str, about: AudioInfo, span: tuple[int, int], gain: float
) -> dict[str, Any]:
    """The json member: labels, where the clip comes from, and its gain if it was scaled to fit int16."""
    start, stop = span
    origin = {"file": file, "start_seconds": start / about.sample_rate}
    origin |= {"seconds": (stop - start) / about.sample_rate}
    origin |= {"sample_rate": about.sample_rate, "channels": about.channels}
    description = {"labels": labelled.labels, "names": labelled.names, "origin": origin}
    return description if gain == 1 else description | {"gain": gain}


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> int:
    """Append a member without date or owner; returns where its data begin."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    offset = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(member, io.BytesIO(content))
    return offset
