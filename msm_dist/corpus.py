"""What a run trains on: shards, order, front end with its statistics, length.

In: a Config and its batch layout. Out: a `Corpus`. Raises DataError when shards are missing or damaged,
ConfigError when they don't fit the configuration.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from msm_dist.config import BatchLayout, Config, Features
from msm_dist.data.index import Index, check_shards, load_index
from msm_dist.data.plan import Plan, check_lanes, make_plan
from msm_dist.data.storage import access_of
from msm_dist.errors import ConfigError, DataError


@dataclass(frozen=True)
class Corpus:
    """What a run trains on: the shards, their order, the front end with its statistics, and the length."""

    index: Index
    plan: Plan
    features: Features
    missing: frozenset[int]
    total_steps: int
    warmup_steps: float


def open_corpus(cfg: Config, layout: BatchLayout) -> Corpus:
    """Find the shards, check them against their index and lay out the order. Raises DataError, ConfigError."""
    access = access_of(cfg.data)
    index = load_index(cfg.data.shards, access)
    missing = check_shards(index, "size", cfg.data.allow_missing_shards, access)
    if len(missing) == len(index.shards):
        raise DataError(f"{index.location}: all {len(missing)} shards are missing; data.allow_missing_shards needs one")
    plan = make_plan(
        [shard.clips for shard in index.shards],
        cfg.seed,
        cfg.data.lanes,
        cfg.data.block,
        cfg.data.shuffle_window,
        cfg.data.crops_per_clip,
    )
    check_lanes(plan, layout.world_size, cfg.data.num_workers)
    steps_per_epoch = plan.clips_per_epoch * cfg.data.crops_per_clip / cfg.train.global_batch
    total_steps = cfg.train.steps or math.ceil(cfg.train.epochs * steps_per_epoch)
    warmup = cfg.optim.warmup_steps
    warmup = (cfg.optim.warmup_epochs or 0) * steps_per_epoch if warmup is None else warmup
    if warmup >= total_steps:
        raise ConfigError(
            f"optim.warmup_steps, warmup_epochs: {warmup:.0f} steps of warm-up in a run of {total_steps} steps; "
            "warm up for less"
        )
    return Corpus(index, plan, front_end_settings(cfg.features, index), frozenset(missing), total_steps, warmup)


def check_digests(index: Index, rank: int, world_size: int) -> None:
    """Compare this rank's share of the shards with their digests; reads all of them. Raises DataError."""
    check_shards(replace(index, shards=index.shards[rank::world_size]), "digest", allow_missing=True)


def front_end_settings(features: Features, index: Index) -> Features:
    """The front end with its statistics: the configuration's, else the index's. Raises ConfigError."""
    if index.features is not None and index.features != features.front_end():
        differing = [name for name, value in features.front_end().items() if index.features.get(name) != value]
        name = differing[0] if differing else "features"
        raise ConfigError(
            f"features.{name} = {features.front_end().get(name)}: the statistics of {index.location} were made with "
            f"{index.features.get(name)}; use that, or pack the corpus for these features"
        )
    if features.mean is not None:
        return features
    if index.mean is None or index.std is None:
        raise ConfigError(
            f"features.mean, features.std: neither given nor in {index.location}/index.json; run `msm-dist data stats "
            f"{index.location}`"
        )
    return features.model_copy(update={"mean": index.mean, "std": index.std})


def plan_identity(corpus: Corpus) -> dict[str, Any]:
    """What the order and the input of a run are functions of, beside its configuration: kept in the run folder."""
    return {
        "index_digest": corpus.index.digest,
        "num_clips": corpus.plan.num_clips,
        "lanes": corpus.plan.lanes,
        "clips_per_epoch": corpus.plan.clips_per_epoch,
        "mean": corpus.features.mean,
        "std": corpus.features.std,
    }
