"""`msm-dist doctor SHARDS`: whether a corpus is whole, and what a run would make of it.

In: a folder with index.json, a brace pattern, a tar of such a folder, or their URL. Out: findings, each with the
command that mends it. Digests and headers are compared by data/verify.py, unless it is to be quick. Nothing is changed.
"""

import os
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from msm_dist.config import Config, Features
from msm_dist.data.audioset import unusual
from msm_dist.data.clips import Progress
from msm_dist.data.index import (
    INDEX_NAME,
    MEMBERS_SUFFIX,
    UNFINISHED_NAME,
    Index,
    index_command,
    is_tar,
    load_index,
    tables,
)
from msm_dist.data.plan import check_lanes, make_plan, valid_worlds
from msm_dist.data.storage import UNKNOWN_SIZE, Access, is_remote, open_store, split
from msm_dist.data.verify import verify_shards
from msm_dist.doctor.findings import SHOWN, Finding, counted, some, word
from msm_dist.doctor.host import is_shared, mounted_at
from msm_dist.errors import ConfigError, DataError

ACCESS = Access(timeout=10.0, retries=1)
WORLDS_SHOWN = 12
LOUDEST_MEAN, WIDEST_STD, NARROWEST_STD = 10.0, 10.0, 0.1
ROUNDING = 1e-3


def examine_shards(where: str, quick: bool, workers: int, progress: Progress) -> Iterator[Finding]:
    """The findings of a corpus, in the order in which a run would meet them."""
    try:
        index = load_index(where, ACCESS)
    except DataError as error:
        yield Finding("index", "fail", str(error), _remedy_of_index(where))
        return
    size = sum(shard.bytes for shard in index.shards) / 1e6
    told = f"{index.location}: {counted(index.num_clips, 'clip')}, {index.seconds / 3600:,.2f} h, "
    told += f"{counted(len(index.shards), 'shard')}, {size:,.1f} MB"
    yield Finding("index", "ok", f"{told}, valid")
    yield from _files(index)
    yield from _contents(index, quick, workers, progress)
    yield from _statistics(index)
    yield from _rate(index)
    yield from _order(index)
    if not is_remote(index.location):
        yield from _beside(index)
        yield from _file_system(index)
    else:
        detail = "behind a URL: files that are not in the index, and rights, can't be found out"
        yield Finding("folder", "note", detail)


def _remedy_of_index(where: str) -> str:
    if is_remote(where):
        return ""
    path = Path(where)
    folder = path if path.is_dir() else path.parent
    if any(folder.glob("*.tar")) and not (folder / UNFINISHED_NAME).is_dir():
        return index_command(folder)
    return ""


def _files(index: Index) -> Iterator[Finding]:
    """The shards that the index lists: there, of their size, readable."""
    try:
        sizes = open_store(index.location, ACCESS).sizes([shard.location for shard in index.shards])
    except DataError as error:
        yield Finding("shards", "fail", str(error), "try again when the server answers")
        return
    pairs = list(zip(index.shards, sizes, strict=True))
    missing = [shard.name for shard, size in pairs if size is None]
    of_another = [(shard, size) for shard, size in pairs if size not in (None, UNKNOWN_SIZE, shard.bytes)]
    wrong = [f"{shard.name} ({size} bytes, not {shard.bytes})" for shard, size in of_another]
    remedy = _remedy_of_shards(index, [shard.name for shard, _ in of_another])
    if missing:
        yield Finding("shards", "fail", f"{len(missing)} of {len(pairs)} missing: {some(missing)}", remedy)
    if wrong:
        yield Finding("shards", "fail", f"{len(wrong)} of {len(pairs)} of another size: {some(wrong)}", remedy)
    if not missing and not wrong:
        yield Finding("shards", "ok", f"{len(pairs)} there, of the sizes in {INDEX_NAME}")


def _remedy_of_shards(index: Index, bad: list[str]) -> str:
    """What to do where shards are missing, and those in `bad` are there in another size."""
    again = "copy them again, or pack them again"
    if is_remote(index.location):
        return again
    without = f"{again}; a run without them: data.allow_missing_shards=true"
    if index.kind == "logmel":
        return without
    orphans = _orphans(index)
    # A tar that is cut off can't be indexed: it may not be there when all that are there are.
    command, away = index_command(index.location), index.root / "bad"
    if bad:
        paths = [str(index.root / name) for name in bad[:SHOWN]]
        command = f"mkdir -p {word(away)} && mv {shlex.join(paths)} {word(away)} && {command}"
    told = f"{without}\nan index without them: {command}"
    if len(bad) > SHOWN:
        told += f", once the other {len(bad) - SHOWN} are moved away too"
    if orphans:
        told += f"\nwhich takes in what the index does not list, unless you move it away: {some(map(word, orphans))}"
    return told


def _orphans(index: Index) -> list[str]:
    """The tars in a folder that its index does not list."""
    # A pattern takes some of the shards; what is beside them may still be in the index.
    known = {shard.name for shard in load_index(index.location, ACCESS).shards}
    names = sorted(path.name for path in index.root.iterdir())
    return [name for name in names if name.endswith(".tar") and name not in known and is_tar(str(index.root / name))]


def _contents(index: Index, quick: bool, workers: int, progress: Progress) -> Iterator[Finding]:
    """Tables of clips and, unless it is to be quick, every byte."""
    whole = _whole(index)
    if not whole.shards:
        return
    if quick:
        faults = []
        for number, shard in enumerate(whole.shards):
            try:
                tables([shard], open_store(shard.location, ACCESS))
            except DataError as error:
                faults.append(str(error))
            progress("reading tables of clips", number + 1, len(whole.shards))
        if faults:
            yield Finding("tables", "fail", some_lines(faults), _remedy_of_tables(index))
        else:
            yield Finding("tables", "ok", f"{len(whole.shards)} as indexed; digests of the shards were not compared")
        return
    try:
        faults = verify_shards(whole, decode_clips=False, workers=workers, progress=progress, access=ACCESS)
    except DataError as error:
        faults = [str(error)]
    if faults:
        remedy = "copy these shards again, or pack them again"
        if not is_remote(index.location):
            remedy += f"; which clips are hit: msm-dist data verify {word(index.location)} --decode"
        if all(MEMBERS_SUFFIX in fault for fault in faults):
            remedy = _remedy_of_tables(index)
        yield Finding("digests", "fail", some_lines(faults), remedy)
    else:
        yield Finding("digests", "ok", "every byte is as indexed, every clip where its table says")


def _remedy_of_tables(index: Index) -> str:
    if is_remote(index.location) or index.kind == "logmel":
        return f"copy them and {INDEX_NAME} again, from where they were packed"
    return index_command(index.location)


def _whole(index: Index) -> Index:
    """The index of the shards that are there in their size; of the others that is said already."""
    try:
        sizes = open_store(index.location, ACCESS).sizes([shard.location for shard in index.shards])
    except DataError:
        return replace(index, shards=())
    pairs = zip(index.shards, sizes, strict=True)
    return replace(index, shards=tuple(shard for shard, size in pairs if size in (UNKNOWN_SIZE, shard.bytes)))


def some_lines(faults: list[str], limit: int = 10) -> str:
    """The first of many faults, a line each."""
    more = [f"and {len(faults) - limit} more"] if len(faults) > limit else []
    return "\n".join([*faults[:limit], *more])


def _statistics(index: Index) -> Iterator[Finding]:
    """mean and std of the log-mel: there, possible, and near AudioSet's where it is AudioSet."""
    where = word(index.location)
    measure = f"msm-dist data stats {where}"
    if index.mean is None or index.std is None or index.mel_mean is None:
        yield Finding(
            "statistics", "fail", "not measured: a run refuses, unless features.mean and std are given", measure
        )
        return
    told = f"log-mel mean {index.mean:.4f}, std {index.std:.4f}"
    bands = np.array(index.mel_mean)
    apart = abs(bands.mean() - index.mean)
    if apart > ROUNDING * max(1.0, abs(index.mean)):
        yield Finding(
            "statistics", "fail", f"{told}, but the mean of its bands is {bands.mean():.4f}: edited?", measure
        )
    elif bands.std() > index.std * (1 + ROUNDING):
        detail = f"{told}, but its bands alone vary by {bands.std():.4f}: edited?"
        yield Finding("statistics", "fail", detail, measure)
    elif not np.log(np.finfo(np.float32).eps) <= index.mean <= LOUDEST_MEAN or index.std > WIDEST_STD:
        yield Finding("statistics", "fail", f"{told}: no audio has these", measure)
    elif index.std < NARROWEST_STD:
        detail = f"{told}: hardly anything changes in these clips"
        yield Finding("statistics", "warn", detail, f"look at some: msm-dist data inspect {where}")
    elif sentence := unusual(index, Features().front_end()):
        yield Finding("statistics", "warn", sentence, f"listen to some clips: msm-dist data inspect {where} KEY")
    else:
        yield Finding("statistics", "ok", told)


def _rate(index: Index) -> Iterator[Finding]:
    """Sample rate and front end, against the default features."""
    ours, theirs = Features().front_end(), index.features
    if theirs is not None and theirs != ours:
        words = shlex.join(f"features.{name}={value}" for name, value in theirs.items() if ours.get(name) != value)
        what = "stored log-mels" if index.kind == "logmel" else "statistics"
        remedy = f"give the run {words}"
        if index.kind != "logmel":
            remedy += f", or msm-dist data stats {word(index.location)}"
        yield Finding("front end", "warn", f"the {what} were made with {words}, which is not the default", remedy)
    rate, wanted = index.sample_rate, Features().sample_rate
    if index.kind == "logmel":
        yield Finding("sample rate", "ok", "stored log-mels need no resampling")
    elif rate is None:
        yield Finding("sample rate", "ok", f"mixed; clips of another than {wanted} Hz are resampled when they are read")
    elif rate < wanted:
        detail = f"{rate} Hz, below the default features' {wanted}: the mel bands above {rate / 2:.0f} Hz hold nothing"
        remedy = f"features.sample_rate={rate} features.fmax={rate / 2:.0f}, and msm-dist data stats with that --config"
        yield Finding("sample rate", "warn", detail, remedy)
    elif rate > wanted:
        yield Finding("sample rate", "ok", f"{rate} Hz; clips are resampled to {wanted} when they are read")
    else:
        yield Finding("sample rate", "ok", f"{rate} Hz, the default features'")


def _order(index: Index) -> Iterator[Finding]:
    """Lanes and epoch under the default configuration."""
    data, train = Config().data, Config().train
    clips = [shard.clips for shard in index.shards]
    try:
        plan = make_plan(clips, 0, data.lanes, data.block, data.shuffle_window, data.crops_per_clip)
    except (ConfigError, DataError) as error:
        setting = shlex.quote(f"data.shards={index.location}")
        yield Finding("order", "warn", str(error), f"pack more clips, or see msm-dist plan CONFIG {setting}")
        return
    steps = plan.clips_per_epoch * data.crops_per_clip / train.global_batch
    told = f"{plan.lanes} lanes of {plan.lane_clips:,} clips, "
    told += f"{plan.clips_per_epoch:,} of {plan.num_clips:,} clips an epoch, {steps:,.2f} steps of {train.global_batch}"
    try:
        check_lanes(plan, 1, data.num_workers)
    except ConfigError as error:
        yield Finding(
            "order", "warn", f"{told}; {error}", "data.num_workers and the number of processes as named there"
        )
        return
    worlds = some(map(str, valid_worlds(plan.lanes, data.num_workers)), WORLDS_SHOWN)
    yield Finding("order", "ok", f"{told}; with {data.num_workers} workers each, processes may be {worlds}")


def _beside(index: Index) -> Iterator[Finding]:
    """Files in the folder that the index does not list, and those that can't be read."""
    root = index.root
    # A pattern takes some of the shards; what is beside them may still be in the index.
    known = load_index(index.location, ACCESS).shards
    sidecars = {split(shard.members_location)[1] for shard in known}
    names = sorted(path.name for path in root.iterdir())
    orphans = _orphans(index)
    strays = [name for name in names if name.endswith(MEMBERS_SUFFIX) and name not in sidecars]
    if orphans:
        detail = f"not in {INDEX_NAME}, so that no run reads them: {some(orphans)}"
        yield Finding("orphans", "warn", detail, f"{index_command(root)}, or remove them")
    if strays:
        detail = f"tables of clips that belong to no shard of the index: {some(strays)}"
        yield Finding("orphans", "warn", detail, "remove them, if their tars are gone for good")
    if (root / UNFINISHED_NAME).is_dir():
        detail = f"{UNFINISHED_NAME}: a packing into this folder was begun and not finished"
        yield Finding("orphans", "warn", detail, "the same msm-dist data pack command again finishes it")
    if not orphans and not strays and not (root / UNFINISHED_NAME).is_dir():
        yield Finding("orphans", "ok", f"none: every tar is in {INDEX_NAME}")
    files = [root / INDEX_NAME, *(path for shard in index.shards for path in (shard.path, shard.members_path))]
    closed = [path.name for path in files if path.exists() and not os.access(path, os.R_OK)]
    if closed:
        detail = f"you can't read {some(closed)}"
        yield Finding("rights", "fail", detail, f"chmod -R u+rX {word(root)}, as their owner")
    else:
        yield Finding("rights", "ok", "you may read every file")


def _file_system(index: Index) -> Iterator[Finding]:
    kind, mount = mounted_at(index.root)
    if not kind:
        yield Finding("file system", "note", "can't be found out")
    elif is_shared(kind):
        detail = f"{kind} at {mount}, over the network: every crop is a read of its own place"
        copied = f"rsync -a {word(index.root)}/ LOCAL_FOLDER"
        remedy = f"if a run's data wait is above 5 %: {copied}, and data.shards=LOCAL_FOLDER"
        yield Finding("file system", "warn", detail, remedy)
    else:
        yield Finding("file system", "ok", f"{kind} at {mount}")
