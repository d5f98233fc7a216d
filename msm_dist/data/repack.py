"""Audio shards -> shards of stored log-mel: the same shards, clips and order, so that a run sees the same samples.

In: a folder with the index.json of audio shards. Out: a tar of `<key>.logmel.npy` and the clip's json member for each
of them, sidecars, index.json and report.json; the statistics are those of the stored values. The same bytes whatever
the number of workers. A killed call is continued by the same one: finished shards stay. Fails with DataError on a
shard that is not what its index says, and on a clip in it that does not decode: left out, it would move all clips
behind it to other places of the order.
"""

import io
import json
import mmap
import os
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from msm_dist.config import Features
from msm_dist.data.audio import BadClip, decode, num_target_samples, to_int16
from msm_dist.data.claim import begun, claimed, finished
from msm_dist.data.clips import Progress, quiet, write_report
from msm_dist.data.contents import printable
from msm_dist.data.index import (
    UNFINISHED_NAME,
    Index,
    Shard,
    check_shards,
    file_sha256,
    load_index,
    member_table,
    members,
    shard_fault,
    write_index,
    write_members,
)
from msm_dist.data.logmel import SUFFIX, clip_codes, code_sums, encode_logmel
from msm_dist.data.stats import combine
from msm_dist.data.tar_members import tar_members
from msm_dist.data.workers import run_tasks
from msm_dist.errors import DataError
from msm_dist.features import LogMel
from msm_dist.files import sync, write_atomically

FORMAT_VERSION = 1
MAX_JSON_BYTES = 2**24


class _Task(NamedTuple):
    """One shard to write."""

    shard: Shard
    out: Path
    features: Features


def repack(source: Path, out: Path, features: Features, workers: int = 1, progress: Progress = quiet) -> Index:
    """Write the log-mels of the audio shards in `source` into `out` and return their index.

    The same call after a kill continues; on a finished folder it only checks the sizes of the shards. Raises
    ConfigError if `out` holds something else, DataError if a shard or clip is not what the index says.
    """
    index = load_index(str(source))
    if index.kind != "audio":
        raise DataError(f"{source}: its clips are stored log-mels already; name the folder of the audio shards")
    identity = {"version": FORMAT_VERSION, "made_from": index.digest, "features": features.front_end()}
    try:
        with claimed(out, identity):
            return finished(out, "pack") or _write_all(index, out, features, workers, progress)
    except OSError as error:
        raise DataError(
            f"{error.filename or out}: {error.strerror or error}; mend that, and the same command continues"
        ) from None


def _write_all(index: Index, out: Path, features: Features, workers: int, progress: Progress) -> Index:
    """Write the shards that have no record yet, then index and report."""
    check_shards(index, "size")
    unfinished = begun(out)
    tasks = [_Task(shard, out, features) for shard in index.shards]
    todo = [task for task in tasks if not _is_written(task)]
    done = index.num_clips - sum(task.shard.clips for task in todo)
    progress("making log-mels", done, index.num_clips)
    for clips in run_tasks(_write_shard, todo, workers):
        done += clips
        progress("making log-mels", done, index.num_clips)
    records = [_record(task) for task in tasks]
    made = replace(
        index,
        location=str(out),
        kind="logmel",
        shards=tuple(Shard(**record["shard"], location=str(out / record["shard"]["name"])) for record in records),
        **combine(np.array(record["sums"]) for record in records)._asdict(),
        features=features.front_end(),
        made_from=index.digest,
    )
    write_report(out, {"clips": made.num_clips, "seconds": made.seconds}, [])
    write_index(made)
    shutil.rmtree(unfinished)
    return made


def _write_shard(task: _Task) -> int:
    """Write tar, sidecar and, last, the record of one shard; returns its clips."""
    shard, out = task.shard, task.out
    # A clip that was damaged without a fault in its decoding would give the log-mel of something else.
    if fault := shard_fault(shard, "digest"):
        raise DataError(f"{fault}; restore it: see `msm-dist data verify {shard.path.parent}`")
    temporary = out / UNFINISHED_NAME / f"{shard.name}.tmp"
    with open(temporary, "wb") as file:
        rows, sums = _write_tar(task, file)
        file.flush()
        os.fsync(file.fileno())
    path = out / shard.name
    made = {"name": shard.name, "clips": len(rows), "bytes": temporary.stat().st_size}
    made |= {"sha256": file_sha256(temporary)}
    made |= {"members_sha256": write_members(path.with_suffix(".members.npy"), member_table(rows))}
    temporary.replace(path)
    sync(out)
    write_atomically(_record_path(task), json.dumps({"shard": made, "sums": sums.tolist()}).encode())
    return len(rows)


def _write_tar(task: _Task, file: io.BufferedWriter) -> tuple[list[tuple[int, int, int, int, str, bytes]], np.ndarray]:
    """The sidecar's rows, and what stats.combine adds up."""
    shard, front_end = task.shard, LogMel(task.features)
    rows, sums = [], np.zeros(1 + 2 * task.features.n_mels)
    names, descriptions = _members(shard)
    with (
        open(shard.path, "rb") as source,
        mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ) as content,
        tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for row in members(shard):
            samples = _decoded(shard, row, content[row["offset"] : row["offset"] + row["size"]], task.features)
            codes = clip_codes(samples, front_end)
            sums += code_sums(codes[: task.features.num_frames(len(samples))], front_end)
            if (name := names.get(int(row["offset"]))) is None:
                raise DataError(
                    f"{shard.path}: {printable(row['key'])} is not where its sidecar says; see `msm-dist data verify`"
                )
            member = encode_logmel(codes)
            offset = _add(tar, name + SUFFIX, member)
            if place := descriptions.get(name):
                _add(tar, f"{name}.json", content[place[0] : sum(place)])
            key = bytes(row["key"])
            rows.append((offset, len(member), int(row["samples"]), int(row["rate"]), "logmel", key))
    return rows, sums


def _decoded(shard: Shard, row: np.void, encoded: bytes, features: Features) -> np.ndarray:
    """A whole clip, int16 [S]. Raises DataError."""
    try:
        samples = to_int16(decode(encoded, features.sample_rate))
    except BadClip as error:
        fault: BadClip | str | None = error
    else:
        expected = num_target_samples(int(row["samples"]), int(row["rate"]), features.sample_rate)
        fault = None if len(samples) == expected else f"{len(samples)} samples, its sidecar says {expected}"
    if fault:
        key = row["key"].decode(errors="replace")
        raise DataError(
            f"{shard.path}: {key}: {fault}; without it every clip behind it would change its place: see "
            f"`msm-dist data verify --decode {shard.path.parent}`, then index or pack the audio again"
        )
    return samples


def _members(shard: Shard) -> tuple[dict[int, str], dict[str, tuple[int, int]]]:
    """Names without suffix by where the member's bytes begin; place and size of the json members by such name."""
    names, descriptions = {}, {}
    for member in tar_members(shard.path):
        path = PurePosixPath(member.name)
        if not path.name:
            continue
        names[member.offset_data] = str(path.with_suffix(""))
        if path.suffix == ".json" and member.isreg() and 0 <= member.size <= MAX_JSON_BYTES:
            descriptions[str(path.with_suffix(""))] = member.offset_data, member.size
    return names, descriptions


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> int:
    """Append a member without date or owner; returns where its bytes begin."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
    return tar.offset - -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _record_path(task: _Task) -> Path:
    return task.out / UNFINISHED_NAME / f"{task.shard.name}.json"


def _record(task: _Task) -> dict[str, Any]:
    return json.loads(_record_path(task).read_text())


def _is_written(task: _Task) -> bool:
    """Whether the shard is finished and its tar still there."""
    if not _record_path(task).exists():
        return False
    tar = task.out / task.shard.name
    return tar.exists() and tar.stat().st_size == _record(task)["shard"]["bytes"]
