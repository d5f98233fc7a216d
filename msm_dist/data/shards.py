"""Work on whole shards: index tars from elsewhere, measure a corpus' statistics.

In: webdataset tars of mixed codecs and rates, keys with folders, any other members. Members are found by
their offset and read there; nothing is extracted. Out: sidecars, index.json, report.json. Fails with DataError naming
the tar.
"""

import mmap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from msm_dist.config import Features
from msm_dist.data.audio import BadClip, decode, probe, to_int16
from msm_dist.data.clips import SUFFIXES, LeftOut, Progress, check_length, quiet, write_report
from msm_dist.data.contents import printable
from msm_dist.data.index import (
    INDEX_NAME,
    Index,
    Shard,
    check_shards,
    file_sha256,
    index_command,
    load_index,
    member_table,
    members,
    write_index,
    write_members,
)
from msm_dist.data.stats import LogMelMeter, combine
from msm_dist.data.tar_members import tar_members
from msm_dist.data.workers import run_tasks
from msm_dist.errors import DataError

MAX_NAME = 1024
MAX_MEMBER = 2**30


class _Scanned(NamedTuple):
    """What reading one foreign tar gave; rows as member_table takes them."""

    path: Path
    rows: list[tuple[int, int, int, int, str, bytes]]
    left_out: list[LeftOut]
    sums: np.ndarray


def index_shards(paths: Sequence[Path], features: Features, workers: int = 1, progress: Progress = quiet) -> Index:
    """Write sidecars, index.json and report.json beside tars of one folder; every clip is decoded once.

    Clips that do not decode are left out of the index. Where two tars use the same key, all keys become
    <tar>/<key>. Raises DataError on a tar that is damaged or holds no audio, and on two of the same bytes.
    """
    paths = sorted(set(paths))
    root = _common_folder(paths)
    _refuse_selection(root, paths)
    digests = _distinct_digests(paths, progress)
    scans = {}
    for scan in run_tasks(_scan_tar, [(path, features) for path in paths], workers):
        scans[scan.path] = scan
        progress("reading tars", len(scans), len(paths))
    left_out = [entry for path in paths for entry in scans[path].left_out]
    used = [scans[path] for path in paths if scans[path].rows]
    if not used:
        raise DataError(f"{root}: none of the {len(left_out)} clips in {len(paths)} tars decodes")
    uses = Counter(row[-1] for scan in used for row in scan.rows)
    if max(uses.values()) > 1:
        used = [scan._replace(rows=_prefixed(scan)) for scan in used]
    statistics = combine(scan.sums for scan in used)
    rates = {row[3] for scan in used for row in scan.rows}
    index = Index(
        location=str(root),
        kind="audio",
        sample_rate=rates.pop() if len(rates) == 1 else None,
        shards=tuple(_write_sidecar(scan, digests.get(scan.path)) for scan in used),
        seconds=float(sum(row[2] / row[3] for scan in used for row in scan.rows)),
        **statistics._asdict(),
        features=features.front_end(),
    )
    write_report(root, {"clips": index.num_clips, "seconds": index.seconds}, left_out)
    write_index(index)
    return index


def measure_shards(index: Index, features: Features, workers: int = 1, progress: Progress = quiet) -> Index:
    """Measure the log-mel of every clip with this front end and write the statistics into index.json.

    Raises DataError if a shard or clip is not what the index says.
    """
    if index.kind == "logmel":
        raise DataError(
            f"{index.location}: holds stored log-mels; their statistics were taken as they were made; for another "
            "front end pack them again from their audio"
        )
    whole = load_index(str(index.root))
    if whole.num_clips != index.num_clips:
        raise DataError(
            f"{index.root}: {len(index.shards)} of its {len(whole.shards)} shards are named, but statistics are those "
            "of all; name the folder"
        )
    check_shards(index, "size")
    sums = {}
    for name, found in run_tasks(_measure_shard, [(shard, features) for shard in index.shards], workers):
        sums[name] = found
        progress("measuring", len(sums), len(index.shards))
    statistics = combine(sums[shard.name] for shard in index.shards)
    measured = replace(index, **statistics._asdict(), features=features.front_end())
    write_index(measured)
    return measured


def _refuse_selection(root: Path, paths: Sequence[Path]) -> None:
    """Raise DataError where index.json lists tars that are there and would be dropped from it."""
    if not (root / INDEX_NAME).exists():
        return
    try:
        listed_now = [shard.path for shard in load_index(str(root)).shards]
    except DataError:
        return  # A damaged index is what this command replaces.
    dropped = {path.name for path in listed_now if path.exists()} - {path.name for path in paths}
    if dropped:
        raise DataError(
            f"{root}: its {INDEX_NAME} also lists {', '.join(sorted(dropped)[:3])} ({len(dropped)} in all); name every "
            f"tar: {index_command(root)}"
        )


def _distinct_digests(paths: Sequence[Path], progress: Progress) -> dict[Path, str]:
    """sha256 of the tars that are as long as another one. Raises DataError where two are the same."""
    sizes = {path: path.stat().st_size for path in paths}
    uses = Counter(sizes.values())
    alike = [path for path in paths if uses[sizes[path]] > 1]
    names: dict[str, Path] = {}
    for number, path in enumerate(alike, 1):
        digest = file_sha256(path)
        if (other := names.setdefault(digest, path)) != path:
            raise DataError(
                f"{other} and {path.name} are the same tar (sha256 {digest[:12]}), and their clips would be counted "
                "twice; move one of them to another folder"
            )
        progress("comparing tars of one size", number, len(alike))
    return {path: digest for digest, path in names.items()}


def _common_folder(paths: Sequence[Path]) -> Path:
    if not paths:
        raise DataError("no tar given: name the shards, such as FOLDER/*.tar")
    for path in paths:
        if path.suffix != ".tar" or not path.is_file():
            raise DataError(f"{path}: no such .tar file; name the shards, such as FOLDER/*.tar")
    if other := [path for path in paths if path.parent != paths[0].parent]:
        raise DataError(f"{other[0]}: is not in {paths[0].parent}; the shards of an index lie in one folder")
    return paths[0].parent


def _scan_tar(task: tuple[Path, Features]) -> _Scanned:
    path, features = task
    meter = LogMelMeter(features)
    rows, left_out = [], []
    with open(path, "rb") as file:
        for key, offset, size in _audio_members(path):
            file.seek(offset)
            try:
                if size > MAX_MEMBER:
                    raise BadClip("too_long", f"{size} bytes; at most {MAX_MEMBER} are read into memory")
                encoded = file.read(size)
                info = probe(encoded)
                check_length(info.samples, info.sample_rate, features)
                meter.add(to_int16(decode(encoded, features.sample_rate)))
            except BadClip as error:
                left_out.append(LeftOut(f"{path.name}/{key}", 0.0, error.reason, error.detail))
                continue
            rows.append(
                (
                    offset,
                    size,
                    info.samples,
                    info.sample_rate,
                    info.format,
                    key.encode(errors="surrogateescape"),
                )
            )
    return _Scanned(path, rows, left_out, meter.sums)


def _audio_members(path: Path) -> Iterator[tuple[str, int, int]]:
    """Key (name without suffix), offset and size of each regular audio member, in tar order."""
    total = path.stat().st_size
    seen = set()
    for member in tar_members(path):
        name = PurePosixPath(member.name)
        if not 0 <= member.size <= total - member.offset_data or len(member.name) > MAX_NAME:
            raise DataError(f"{path}: is cut off or damaged at {printable(str(name)[:80])}; copy it again")
        if name.suffix.lower() not in SUFFIXES or not member.isreg() or member.issparse():
            continue
        key = str(name.with_suffix(""))
        if key in seen:
            raise DataError(f"{path}: holds {printable(key)} twice; write the shard again with one of them")
        seen.add(key)
        yield key, member.offset_data, member.size
    if not seen:
        raise DataError(f"{path}: holds no audio members; they must end in {', '.join(sorted(SUFFIXES))}")


def _prefixed(scan: _Scanned) -> list[tuple[int, int, int, int, str, bytes]]:
    return [(*row[:-1], scan.path.stem.encode(errors="surrogateescape") + b"/" + row[-1]) for row in scan.rows]


def _write_sidecar(scan: _Scanned, sha256: str | None) -> Shard:
    path = scan.path
    digest = write_members(path.with_suffix(".members.npy"), member_table(scan.rows))
    return Shard(path.name, len(scan.rows), path.stat().st_size, sha256 or file_sha256(path), digest, str(path))


def _measure_shard(task: tuple[Shard, Features]) -> tuple[str, np.ndarray]:
    shard, features = task
    meter = LogMelMeter(features)
    for row, encoded in _clips(shard, members(shard)):
        try:
            meter.add(to_int16(decode(encoded, features.sample_rate)))
        except BadClip as error:
            key = row["key"].decode(errors="replace")
            raise DataError(f"{shard.path}: {key}: {error}; see `msm-dist data verify {shard.path.parent}`") from None
    return shard.name, meter.sums


def _clips(shard: Shard, table: np.ndarray) -> Iterator[tuple[np.void, bytes]]:
    with open(shard.path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for row in table:
            yield row, content[row["offset"] : row["offset"] + row["size"]]
