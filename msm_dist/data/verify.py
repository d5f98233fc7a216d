"""Compare a corpus with its index: every byte by its digest, every clip by the header in front of it.

In: an index, here or behind a URL. Out: the faults found, each naming its file. A shard is read once at the speed of
sha256; that each clip decodes is a second, slower pass, if asked for. Behind a URL the shards' sizes and digests and
the tables of clips are compared, not the headers in the tars.
"""

import mmap
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from msm_dist.data.audio import BadClip, decode, num_target_samples
from msm_dist.data.clips import Progress, quiet
from msm_dist.data.contents import front_end_of, printable, split_name
from msm_dist.data.index import ACCESS, Index, Shard, check_shards, members, shard_fault
from msm_dist.data.logmel import check_rows, stored_codes
from msm_dist.data.storage import Access, Span, is_remote, open_store
from msm_dist.data.tar_members import tar_members
from msm_dist.data.workers import run_tasks
from msm_dist.errors import DataError

BYTES_PER_PROCESS = 2**32  # a process takes seconds to start, and one reads gigabytes in them

Task = tuple[Index, bool, Access]
"""An index of one shard, whether to decode its clips, how remote files are read."""


def verify_shards(
    index: Index, decode_clips: bool, workers: int = 1, progress: Progress = quiet, access: Access = ACCESS
) -> list[str]:
    """Compare every shard with the index: size, sha256, sidecar, the members' headers and, if asked, that clips decode.

    Returns the faults, each naming its file, in the order of the index; with `decode_clips` the clips of a shard of
    another digest too, unless its size is another. Raises DataError where clips behind a URL are to be decoded, and
    where their server can't be read, which is no fault of the shards.
    """
    if decode_clips and is_remote(index.location):
        raise DataError(f"{index.location}: --decode is for shards on this machine; copy them, or verify without it")
    if is_remote(index.location):
        _check_access(index, access)
    faults = {}
    tasks = [(replace(index, shards=(shard,)), decode_clips, access) for shard in index.shards]
    for name, found in run_tasks(_verify_shard, tasks, num_processes(index, decode_clips, workers)):
        faults[name] = found
        progress("verifying", len(faults), len(index.shards))
    return [fault for shard in index.shards for fault in faults[shard.name]]


def num_processes(index: Index, decode_clips: bool, workers: int) -> int:
    """How many of `workers` are worth their start."""
    worth = len(index.shards) if decode_clips else 1 + sum(shard.bytes for shard in index.shards) // BYTES_PER_PROCESS
    return min(workers, len(index.shards), worth)


def _verify_shard(task: Task) -> tuple[str, list[str]]:
    index, decode_clips, access = task
    shard, faults = index.shards[0], []
    try:
        if is_remote(shard.location):
            check_shards(index, "digest", access=access)
            members(shard, open_store(shard.location, access))
            return shard.name, []
        if fault := shard_fault(shard, "digest"):
            faults.append(fault)
            # Which clips the damage is in, only reading them tells; of another size, nothing is where it was.
            if not decode_clips or shard.path.stat().st_size != shard.bytes:
                return shard.name, faults
        table = members(shard)
    except FileNotFoundError:
        return shard.name, [f"{shard.location}: missing"]
    except DataError as error:
        return shard.name, [*faults, str(error)]
    return shard.name, [*faults, *_length_faults(index, shard, table), *_clip_faults(index, shard, table, decode_clips)]


def _check_access(index: Index, access: Access) -> None:
    """Read a byte of the first whole shard. Raises DataError: what fails here would fail for every one."""
    store = open_store(index.location, access)
    for shard in index.shards:
        if store.sizes([shard.location]) == [shard.bytes]:
            store.fetch([Span(shard.location, shard.bytes, 0, 1)])
            return


def _clip_faults(index: Index, shard: Shard, table: np.ndarray, decode_clips: bool) -> Iterator[str]:
    with open(shard.path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        strange = [row for row in table if not _is_named(row, _header_at(content, int(row["offset"])))]
        # A long or foreign name stands in an extension header, which only a walk through the tar finds.
        walked = _members_of(shard.path) if strange else {}
        misplaced = {int(row["offset"]) for row in strange if not _is_named(row, walked.get(int(row["offset"])))}
        for row in table:
            name = f"{shard.location}: {printable(row['key'])}"
            if int(row["offset"]) in misplaced:
                yield f"{name}: its sidecar says that it begins at byte {row['offset']}, which its tar does not"
                continue
            if index.kind == "audio" and not decode_clips:
                continue
            member = content[row["offset"] : row["offset"] + row["size"]]
            if fault := _audio_fault(row, member) if index.kind == "audio" else _logmel_fault(row, member):
                yield f"{name}: {fault}"


def _header_at(content: mmap.mmap, offset: int) -> tarfile.TarInfo | None:
    try:
        return tarfile.TarInfo.frombuf(content[offset - tarfile.BLOCKSIZE : offset], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None


def _members_of(path: Path) -> dict[int, tarfile.TarInfo]:
    """The members of a tar by the offset of their data, as far as it can be read."""
    found = {}
    with suppress(DataError):
        for member in tar_members(path):
            found[member.offset_data] = member
    return found


def _is_named(row: np.void, header: tarfile.TarInfo | None) -> bool:
    """Whether a tar's header is that of the clip in a sidecar's row, whose key may have the tar's name before it."""
    if header is None or not header.isreg() or header.size != row["size"]:
        return False
    key, found = row["key"], split_name(header.name)[0].encode(errors="surrogateescape")
    return key == found or key.endswith(b"/" + found)


def _audio_fault(row: np.void, member: bytes) -> str | None:
    try:
        samples = len(decode(member, int(row["rate"])))
    except BadClip as error:
        return str(error)
    return None if samples == row["samples"] else f"{samples} samples, its sidecar says {row['samples']}"


def _logmel_fault(row: np.void, member: bytes) -> str | None:
    try:
        stored_codes(member)
    except ValueError as error:
        return str(error)
    return None


def _length_faults(index: Index, shard: Shard, table: np.ndarray) -> Iterator[str]:
    """Whether stored log-mels are as long as their clips, by the front end that the index names."""
    try:
        features = front_end_of(index) if index.kind == "logmel" else None
        if features:
            samples = num_target_samples(table["samples"], table["rate"].astype(np.int64), features.sample_rate)
            check_rows(table, features.num_frames(samples), features)
    except DataError as error:
        yield f"{shard.location}: {error}"
