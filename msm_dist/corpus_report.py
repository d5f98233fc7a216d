"""What a corpus and its order come to, in lines for people: sizes, skew, lanes, memory, processes that fit.

In: a configuration, its batch layout, its open `Corpus`. Out: (name, text) rows.
"""

from collections.abc import Sequence
from statistics import median

from msm_dist.config import BatchLayout, Config
from msm_dist.corpus import Corpus, overlaps
from msm_dist.data.mix import MixedPlan
from msm_dist.data.plan import Plan, valid_worlds

SHOWN = 12
MOST_WORKERS = 64


def corpus_rows(cfg: Config, layout: BatchLayout, corpus: Corpus) -> list[tuple[str, str]]:
    """Clips, hours, shards and their skew, lanes, what sits out, a streaming reader's memory, processes that fit."""
    index, plan = corpus.index, corpus.plan
    total = sum(shard.bytes for shard in index.shards)
    steps = plan.clips_per_epoch * cfg.data.crops_per_clip / cfg.train.global_batch
    mixed = isinstance(plan, MixedPlan)
    rows = [
        (
            "corpus",
            f"{plan.num_clips} clips in {len(index.shards)} shards of {index.kind}, {index.seconds / 3600:.1f} h, "
            f"{total / 1e9:.2f} GB",
        )
    ]
    plans: Sequence[Plan] = plan.plans if mixed else [plan]
    if mixed:
        for source, own, share in zip(corpus.sources, plans, plan.shares, strict=True):
            epoch = own.clips_per_epoch * cfg.data.crops_per_clip / cfg.train.global_batch / share
            served = f"{source.num_clips} clips, each served once in {epoch:.2f} steps"
            rows.append(("", f"{share:.1%} from {source.location}: {served}"))
        rows += [("note", note) for note in overlaps(corpus.sources)]
    rows += [
        ("shards", f"clips {spread([shard.clips for shard in index.shards])} (least, median, most)"),
        ("", f"MB    {spread([shard.bytes / 1e6 for shard in index.shards])}"),
        (
            "lanes",
            f"{plan.lanes} of {' + '.join(str(own.lane_clips) for own in plans)} clips; "
            f"{' + '.join(str(own.num_clips - own.clips_per_epoch) for own in plans)} clips sit out an epoch, others "
            "the next",
        ),
        ("epoch", f"{plan.clips_per_epoch} clips = {steps:.2f} steps"),
        ("length", f"{corpus.total_steps} steps, {corpus.warmup_steps:.0f} of warm-up"),
        ("read ahead", _window_memory(plans, total, layout.world_size)),
    ]
    if corpus.missing:
        rows.append(("missing", f"{len(corpus.missing)} of {len(index.shards)} shards; their slots are filled"))
    return rows + _fitting(cfg, layout, corpus)


def spread(values: Sequence[float]) -> str:
    """Least, median and most."""
    return " / ".join(f"{value:.6g}" for value in (min(values), median(values), max(values)))


def _window_memory(plans: Sequence[Plan], total_bytes: int, world_size: int) -> str:
    """What shuffling in windows would cost a reader that can't seek."""
    clip = total_bytes / sum(plan.num_clips for plan in plans)
    held = sum(plan.lanes * min(plan.shuffle_window, plan.lane_clips) for plan in plans) * clip
    return (
        f"{held / 1e9:.2f} GB, {held / world_size / 1e9:.2f} GB a process, for a reader that can't seek: a window of "
        "every lane; local files and byte ranges need none"
    )


def _fitting(cfg: Config, layout: BatchLayout, corpus: Corpus) -> list[tuple[str, str]]:
    """Numbers of processes and of loader workers that this order allows."""
    workers, lanes = max(1, cfg.data.num_workers), corpus.plan.lanes
    batch = cfg.train.global_batch // cfg.train.micro_batch
    worlds = [world for world in valid_worlds(lanes, workers) if batch % world == 0]
    counts = [count for count in range(1, MOST_WORKERS + 1) if lanes % (layout.world_size * count) == 0]
    return [
        ("processes", f"with {workers} loader workers and this batch: {_some(worlds)}"),
        ("workers", f"with {layout.world_size} processes: {_some(counts)}"),
    ]


def _some(values: Sequence[int]) -> str:
    return ", ".join(map(str, values[:SHOWN])) + (f", ... {values[-1]}" if len(values) > SHOWN else "")
