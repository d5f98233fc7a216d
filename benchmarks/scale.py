"""What the order of a run costs on a corpus of any size: `python -m benchmarks.scale`, on a CPU.

Simulates an index of `--clips` clips in `--shards` shards (on disk: index.json, a sidecar per shard, tars without
content), shared by `--ranks` ranks with `--workers` loader workers each, and measures in fresh processes: loading and
checking the index, making the plan, resuming at several positions up to the samples of a first micro-batch and the
tables of its clips, and the memory of that. Then every worker's blocks of one epoch are drawn, for all ranks and for
one: each clip must come exactly once but those that sit out, else the exit code is 1 and nothing is written. Says how
uneven shards and lanes are, and what drawing from a mix of two such corpora costs. Writes
benchmarks/results/scale-<device>.json.
"""

import argparse
import hashlib
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np

from benchmarks.measure import RESULTS, Target, table, targets_table, write_results
from msm_dist.data.index import (
    Index,
    Shard,
    check_shards,
    load_index,
    member_table,
    members,
    write_index,
    write_members,
)
from msm_dist.data.mix import make_mix
from msm_dist.data.plan import Order, Plan, check_lanes, default_lanes, make_plan, micro_batch_blocks, most_lanes
from msm_dist.errors import ConfigError

CLIPS, SHARDS, RANKS, WORKERS = 2_000_000, 2_000, 1024, 8
BLOCK, BLOCKS_PER_MICRO_BATCH, WINDOW = 8, 8, 1024
RATE, CLIP_SECONDS, BYTES_PER_SECOND = 16000, 10.0, 21_000  # 16 kHz FLAC
MIB = 2**20
PLAN_MIB, RESUME_SECONDS = 200, 5.0


@dataclass(frozen=True)
class Job:
    """What is simulated."""

    folder: str
    ranks: int
    workers: int
    lanes: int


def main(arguments: Sequence[str]) -> int:
    """The exit code: 1 where a clip is served twice or never."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__.partition("\n")[0])
    parser.add_argument("--clips", type=int, default=CLIPS)
    parser.add_argument("--shards", type=int, default=SHARDS)
    parser.add_argument("--ranks", type=int, default=RANKS)
    parser.add_argument("--workers", type=int, default=WORKERS, help="of a rank")
    parser.add_argument("--work", type=Path, help="folder for the simulated corpus; it is deleted")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        begun = time.monotonic()
        num_bytes = simulate(Path(folder), options.clips, options.shards)
        print(
            f"simulated {options.clips} clips in {options.shards} shards in {time.monotonic() - begun:.1f} s",
            flush=True,
        )
        found = measure(folder, options, num_bytes)
    if found is None:
        return 1
    path = write_results(options.out, "scale", found)
    print(f"{report(found)}\nwritten: {path}")
    return 0


def measure(folder: str, options: argparse.Namespace, num_bytes: dict[str, int]) -> dict[str, Any] | None:
    """All figures; none where the coverage is wrong."""
    default, lanes = default_lanes(options.clips), choose_lanes(options.clips, options.ranks, options.workers)
    many, one = Job(folder, options.ranks, options.workers, lanes), Job(folder, 1, options.workers, lanes)
    found = {
        **{name: getattr(options, name) for name in ("clips", "shards", "ranks", "workers")},
        "default_lanes": default,
        "lanes": lanes,
        "refusal": refusal(options),
        "block": BLOCK,
        "blocks_per_micro_batch": BLOCKS_PER_MICRO_BATCH,
        "shuffle_window": WINDOW,
        "files": num_bytes,
    }
    for name, job in (("all ranks", many), ("one rank", one)):
        found[name] = apart(start_and_resume, job)
        coverage = apart(cover, job)
        if coverage["served_twice"] or coverage["epoch_clips"] != coverage["expected_clips"]:
            print(f"benchmarks.scale: WRONG: {name}: {coverage}: nothing is written")
            return None
        found[name] |= coverage | apart(mixed, job)
    found |= apart(unevenness, many)
    found["targets"] = [target.record() for target in targets(found)]
    return found


def simulate(root: Path, num_clips: int, num_shards: int) -> dict[str, int]:
    """Write index.json, sidecars and tars of holes; clips of several lengths, as of FLAC. Bytes of the files."""
    random = np.random.default_rng(0)
    # Shards by bytes, as a packer cuts them: their clips differ with the clips' sizes.
    cuts = np.linspace(0, num_clips, num_shards + 1).astype(int)
    cuts[1:-1] += random.integers(-num_clips // num_shards // 20, num_clips // num_shards // 20 + 1, num_shards - 1)
    shards, seconds, sidecars = [], 0.0, 0
    for number, (first, stop) in enumerate(zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True)):
        lengths = np.where(
            random.random(stop - first) < 0.9, CLIP_SECONDS, random.uniform(1, CLIP_SECONDS, stop - first)
        )
        sizes = (lengths * BYTES_PER_SECOND * random.lognormal(0, 0.25, stop - first)).astype(np.int64)
        offsets = np.cumsum(sizes + 1024) - sizes
        samples = (lengths * RATE).astype(np.int64)
        rows = zip(offsets.tolist(), sizes.tolist(), samples.tolist(), strict=True)
        path = root / f"simulated-{number:06d}.tar"
        keyed = [(*row, RATE, "flac", b"Y%011d_%06d" % (first + i, 30_000)) for i, row in enumerate(rows)]
        digest = write_members(path.with_suffix(".members.npy"), member_table(keyed))
        size = int(offsets[-1] + sizes[-1] + 10240)
        with open(path, "wb") as file:
            file.truncate(size)
        name_digest = hashlib.sha256(path.name.encode()).hexdigest()
        shards.append(Shard(path.name, stop - first, size, name_digest, digest, str(path)))
        seconds += float(lengths.sum())
        sidecars += path.with_suffix(".members.npy").stat().st_size
    write_index(Index(str(root), "audio", RATE, tuple(shards), seconds))
    index_bytes = (root / "index.json").stat().st_size
    return {"shards": sum(shard.bytes for shard in shards), "sidecars": sidecars, "index": index_bytes}


def choose_lanes(num_clips: int, ranks: int, workers: int) -> int:
    """The default lanes where they spread over all workers, else the most that do. Raises ConfigError."""
    unit, most, default = ranks * max(1, workers), most_lanes(num_clips), default_lanes(num_clips)
    if default % unit == 0:
        return default
    if most < unit:
        raise ConfigError(f"--clips {num_clips}: too few for {unit} workers; at least {64 * unit}")
    return most // unit * unit


def refusal(options: argparse.Namespace) -> str | None:
    """What a run with the default lanes is told, if it is refused."""
    plan = make_plan([options.clips], 0, None, BLOCK, WINDOW, 1)
    try:
        check_lanes(plan, options.ranks, options.workers)
    except ConfigError as error:
        return str(error)
    return None


def start_and_resume(job: Job) -> dict[str, Any]:
    """Seconds and MiB of a rank's start, and seconds from a cursor to the first micro-batch's samples and tables."""
    before = resident_mib()
    seconds = {}
    index = timed("load_index", seconds, lambda: load_index(job.folder))
    with_index = resident_mib()
    timed("check_shards", seconds, lambda: check_shards(index, "size"))
    plan = timed("make_plan", seconds, lambda: plan_of(index, job.lanes))
    check_lanes(plan, job.ranks, job.workers)
    epoch_steps = plan.clips_per_epoch // (BLOCK * BLOCKS_PER_MICRO_BATCH * job.ranks)
    resumes = []
    for position in (0, 1, epoch_steps // 2, epoch_steps * 100 + 7, epoch_steps * 10_000):
        begun = time.perf_counter()
        index = load_index(job.folder)
        check_shards(index, "size")
        fresh = plan_of(index, job.lanes)
        blocks = micro_batch_blocks(position, job.ranks // 2, job.ranks, BLOCKS_PER_MICRO_BATCH)
        samples = np.concatenate([fresh.block_samples(n) for n in blocks.tolist()])
        shards, places = fresh.locate(samples[:, 1])
        tables = {number: members(index.shards[number]) for number in np.unique(shards).tolist()}
        rows = [tables[number][place] for number, place in zip(shards.tolist(), places.tolist(), strict=True)]
        resumes.append(
            {
                "micro_batch": position,
                "epoch": int(samples[:, 0].max()),
                "seconds": time.perf_counter() - begun,
                "tables": len(tables),
                "first_bytes": int(sum(row["size"] for row in rows)),
            }
        )
    seconds["draw_a_block"] = median(draw_times(plan, job))
    return {
        "seconds": seconds,
        "index_mib": with_index - before,
        "plan_mib": resident_mib() - with_index,
        "resumes": resumes,
    }


def mixed(job: Job) -> dict[str, Any]:
    """The corpus mixed 9 : 1 with one of a tenth of its size: seconds per block, from a far cursor, MiB."""
    clips = [shard.clips for shard in load_index(job.folder).shards]
    before = resident_mib()
    sources = {"simulated": clips, "own": clips[: max(1, len(clips) // 10)]}
    plan = make_mix(sources, [9, 1], 0, job.lanes, BLOCK, WINDOW, 1)
    begun = time.perf_counter()
    far = plan.block_samples(10_000 * plan.clips_per_epoch // BLOCK)
    resumed = time.perf_counter() - begun
    return {
        "mix_draw_a_block": median(draw_times(plan, job)),
        "mix_resume_seconds": resumed,
        "mix_epoch": int(far[:, 0].max()),
        "mix_mib": resident_mib() - before,
    }


def draw_times(plan: Order, job: Job) -> list[float]:
    """Seconds per block of worker 0 of rank 0, by micro-batch."""
    times = []
    for turn in range(500):
        blocks = micro_batch_blocks(turn * job.workers, 0, job.ranks, BLOCKS_PER_MICRO_BATCH).tolist()
        begun = time.perf_counter()
        for n in blocks:
            plan.block_samples(n)
        times.append((time.perf_counter() - begun) / len(blocks))
    return times


def cover(job: Job) -> dict[str, Any]:
    """Draw the first epoch of every rank and worker, each as it would; count how often each clip comes."""
    index = load_index(job.folder)
    counts = np.ones(index.num_clips, np.uint8)
    counts[:] = 0  # so that its memory is there
    before = resident_mib()
    plan = plan_of(index, job.lanes)
    places = -(-plan.lane_clips // BLOCK)
    num_blocks = places * plan.lanes
    micro_batches = -(-num_blocks // (job.ranks * BLOCKS_PER_MICRO_BATCH))
    begun, drawn, most = time.perf_counter(), 0, 0.0
    for rank in range(job.ranks):
        for worker in range(job.workers):
            for i in range(worker, micro_batches, job.workers):
                for n in micro_batch_blocks(i, rank, job.ranks, BLOCKS_PER_MICRO_BATCH).tolist():
                    if n < num_blocks:
                        samples = plan.block_samples(n)
                        counts[samples[samples[:, 0] == 0, 1]] += 1
                        drawn += 1
        most = max(most, resident_mib() - before)
    return {
        "caches_mib": most,
        "cover_seconds": time.perf_counter() - begun,
        "blocks": drawn,
        "epoch_clips": int((counts > 0).sum()),
        "expected_clips": plan.clips_per_epoch,
        "sit_out": int((counts == 0).sum()),
        "served_twice": int((counts > 1).sum()),
    }


def unevenness(job: Job) -> dict[str, Any]:
    """Clips and bytes of shards; bytes and seconds of lanes over the first epoch, and of ranks."""
    index = load_index(job.folder)
    plan = plan_of(index, job.lanes)
    tables = [members(shard) for shard in index.shards]
    sizes = np.concatenate([rows["size"] for rows in tables])
    seconds = np.concatenate([rows["samples"] / rows["rate"] for rows in tables])
    lane_sizes, lane_seconds = np.zeros(plan.lanes, np.int64), np.zeros(plan.lanes)
    lane_shards = np.zeros(plan.lanes, np.int64)
    for lane in range(plan.lanes):
        blocks = [plan.block_samples(place * plan.lanes + lane) for place in range(-(-plan.lane_clips // BLOCK))]
        rows = np.concatenate(blocks)
        clips = rows[rows[:, 0] == 0, 1]
        lane_sizes[lane], lane_seconds[lane] = sizes[clips].sum(), seconds[clips].sum()
        lane_shards[lane] = len(np.unique(plan.locate(clips)[0]))
    by_rank = lane_sizes.reshape(-1, job.ranks).sum(0)
    return {
        "shard_clips": spread([shard.clips for shard in index.shards]),
        "shard_bytes": spread([shard.bytes for shard in index.shards]),
        "lane_bytes": spread(lane_sizes),
        "lane_seconds": spread(lane_seconds),
        "lane_shards": spread(lane_shards),
        "rank_bytes": spread(by_rank),
    }


def plan_of(index: Index, lanes: int) -> Plan:
    """The plan that is measured."""
    return make_plan([shard.clips for shard in index.shards], 0, lanes, BLOCK, WINDOW, 1)


def spread(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Least, median, most, mean, and the standard deviation over the mean."""
    values = np.asarray(values, float)
    return {
        "least": float(values.min()),
        "median": float(np.median(values)),
        "most": float(values.max()),
        "mean": float(mean(values)),
        "deviation": float(values.std() / values.mean()),
    }


def targets(found: dict[str, Any]) -> list[Target]:
    """What is promised of a start and a resume."""
    both = [found[name] for name in ("all ranks", "one rank")]
    memory = max(each["index_mib"] + max(each["plan_mib"], each["caches_mib"]) for each in both)
    slowest = max(resume["seconds"] for each in both for resume in each["resumes"])
    return [
        Target("index and plan, MiB", PLAN_MIB, memory, at_most=True),
        Target("resume to the first samples and tables, s", RESUME_SECONDS, slowest, at_most=True),
        Target("clips served twice in an epoch", 0, sum(each["served_twice"] for each in both), at_most=True),
    ]


def report(found: dict[str, Any]) -> str:
    """The tables."""
    both = [found[name] for name in ("all ranks", "one rank")]
    rows = [
        *(
            (f"{name}, s", *(each["seconds"][name] for each in both))
            for name in ("load_index", "check_shards", "make_plan")
        ),
        ("a block drawn, us", *(1e6 * each["seconds"]["draw_a_block"] for each in both)),
        ("a block of a mix drawn, us", *(1e6 * each["mix_draw_a_block"] for each in both)),
        ("slowest resume, s", *(max(resume["seconds"] for resume in each["resumes"]) for each in both)),
        ("index, MiB", *(each["index_mib"] for each in both)),
        ("plan and resumes, MiB", *(each["plan_mib"] for each in both)),
        ("plan after an epoch, MiB", *(each["caches_mib"] for each in both)),
        ("plan of a mix, MiB", *(each["mix_mib"] for each in both)),
        ("blocks of an epoch", *(each["blocks"] for each in both)),
        ("clips served once", *(each["epoch_clips"] for each in both)),
        ("clips that sit out", *(each["sit_out"] for each in both)),
        ("served twice", *(each["served_twice"] for each in both)),
        ("an epoch drawn, s", *(each["cover_seconds"] for each in both)),
    ]
    uneven = [
        (name, *(found[name][column] for column in ("least", "median", "most", "deviation")))
        for name in ("shard_clips", "shard_bytes", "lane_bytes", "lane_seconds", "lane_shards", "rank_bytes")
    ]
    files = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in found["files"].items())
    return "\n".join(
        [
            f"{found['clips']} clips, {found['shards']} shards, {found['workers']} workers a rank, "
            f"lanes {found['lanes']} (default {found['default_lanes']}); {files}",
            *([f"default lanes: {found['refusal']}"] if found["refusal"] else []),
            table(("", f"{found['ranks']} ranks", "1 rank"), rows),
            table(("", "least", "median", "most", "deviation"), uneven),
            targets_table([Target(**{k: v for k, v in t.items() if k != "verdict"}) for t in found["targets"]]),
        ]
    )


def apart(function: Callable[[Job], dict[str, Any]], job: Job) -> dict[str, Any]:
    """What a function gives in a fresh process, so that memory is its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(sender, function, job))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        child.join()


def _send(sender: Any, function: Callable[[Job], dict[str, Any]], job: Job) -> None:
    sender.send(function(job))


def timed(name: str, seconds: dict[str, float], function: Callable[[], Any]) -> Any:
    """What a function gives; its seconds are noted."""
    begun = time.perf_counter()
    result = function()
    seconds[name] = time.perf_counter() - begun
    return result


def resident_mib() -> float:
    """Memory of this process that is its own: resident, not of files."""
    for line in Path(f"/proc/{os.getpid()}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no RssAnon in /proc/self/status")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
