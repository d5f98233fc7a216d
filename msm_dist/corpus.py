"""What a run trains on: shards of one or several corpora, order, front end with its statistics, length.

In: a Config and its batch layout. Out: a `Corpus`. Raises DataError when shards are missing or damaged,
ConfigError when they don't fit the configuration. Of several corpora (data.mix) one is made: its index lists the
shards of all, its plan mixes theirs, its statistics are those of the mixture that is served.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations, groupby
from typing import Any

from msm_dist.config import BatchLayout, Config, Data, Features
from msm_dist.data.index import ACCESS, Index, Official, check_shards, load_index
from msm_dist.data.mix import MixedPlan, make_mix
from msm_dist.data.plan import Plan, check_lanes, make_plan
from msm_dist.data.storage import Access, Stamp, access_of, is_remote, split, stamps
from msm_dist.errors import ConfigError, DataError


@dataclass(frozen=True)
class Corpus:
    """What a run trains on: the shards, their order, the front end with its statistics, and the length."""

    index: Index
    """Of all sources."""
    plan: Plan | MixedPlan
    features: Features
    missing: frozenset[int]
    total_steps: int
    warmup_steps: float
    sources: tuple[Index, ...]
    """Of each of them; the one index without data.mix."""
    stamped: Mapping[str, Stamp] = field(default_factory=dict)
    """What the shards of this machine were at the start: they are to stay so (see `stamp`)."""


def open_corpus(cfg: Config, layout: BatchLayout) -> Corpus:
    """Find the shards, check them against their index and lay out the order. Raises DataError, ConfigError."""
    sources, missing = _open_sources(cfg.data)
    plan = _lay_out(cfg, sources)
    check_lanes(plan, layout.world_size, cfg.data.num_workers)
    index = sources[0] if isinstance(plan, Plan) else _joined(sources, plan)
    steps_per_epoch = plan.clips_per_epoch * cfg.data.crops_per_clip / cfg.train.global_batch
    total_steps = cfg.train.steps or math.ceil(cfg.train.epochs * steps_per_epoch)
    warmup = cfg.optim.warmup_steps
    warmup = (cfg.optim.warmup_epochs or 0) * steps_per_epoch if warmup is None else warmup
    if warmup >= total_steps:
        raise ConfigError(
            f"optim.warmup_steps, warmup_epochs: {warmup:.0f} steps of warm-up in a run of {total_steps} steps; "
            "warm up for less"
        )
    for source in sources:
        front_end_settings(cfg.features, source)
    features = front_end_settings(cfg.features, index)
    return Corpus(index, plan, features, frozenset(missing), total_steps, warmup, sources)


def stamp(corpus: Corpus) -> Corpus:
    """The same, held to what its shards are now, as this machine sees them; before anything else is made of them."""
    return replace(corpus, stamped=stamps(shard.location for shard in corpus.index.shards))


def check_digests(
    index: Index, rank: int, world_size: int, access: Access = ACCESS, begins: Callable[[], object] = lambda: None
) -> None:
    """Compare this rank's share of the shards with their digests; reads all of them. Raises DataError.

    `begins` is called before each.
    """
    mine = sorted(index.shards[rank::world_size], key=lambda shard: split(shard.location)[0])
    for folder, shards in groupby(mine, key=lambda shard: split(shard.location)[0]):
        here = replace(index, location=folder, shards=tuple(shards))
        check_shards(here, "digest", allow_missing=True, access=access, begins=begins)


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
    identity = {
        "index_digest": corpus.index.digest,
        "num_clips": corpus.plan.num_clips,
        "lanes": corpus.plan.lanes,
        "clips_per_epoch": corpus.plan.clips_per_epoch,
    }
    if isinstance(corpus.plan, MixedPlan):
        identity["mix_digests"] = [source.digest for source in corpus.sources]
        identity["mix_places"] = list(corpus.plan.places)
    # Last, as the first difference is named: the statistics follow from all of the above.
    return identity | {"mean": corpus.features.mean, "std": corpus.features.std}


def corpus_identity(corpus: Corpus) -> list[dict[str, Any]]:
    """What is trained on, for those who get the weights: plain JSON values for each source.

    Its folder's name (never the path), kind, shards, clips, seconds, digest, share of what is served, shards that were
    missing at this start, the digest of the audio behind stored log-mels, and how much of a published collection it is.
    """
    shares = corpus.plan.shares if isinstance(corpus.plan, MixedPlan) else (1.0,)
    identities, first = [], 0
    for source, share in zip(corpus.sources, shares, strict=True):
        numbers = range(first, first + len(source.shards))
        first = numbers.stop
        identities.append(
            {
                "name": _name_of(source.location),
                "kind": source.kind,
                "shards": len(source.shards),
                "clips": source.num_clips,
                "seconds": source.seconds,
                "digest": source.digest,
                "share": share,
                "missing_shards": len(corpus.missing.intersection(numbers)),
                "made_from": source.made_from,
                "official": source.official and asdict(source.official),
            }
        )
    return identities


def overlaps(sources: Sequence[Index]) -> Iterator[str]:
    """Signs that sources of a mix hold the same clips in other shards, a sentence each."""
    for one, other in combinations(sources, 2):
        names = {shard.name for shard in one.shards} & {shard.name for shard in other.shards}
        official = [source.official and source.official.manifest for source in (one, other)]
        if one.location == other.location:
            continue  # other shards of one folder, as no shard is in two sources
        if official[0] and official[0] == official[1]:
            sign = f"are the same clips of {', '.join(one.official.tables)}"
        elif names:
            sign = f"both have {len(names)} shards of the same names, such as {min(names)}"
        else:
            continue
        yield f"{one.location} and {other.location} {sign}; clips that are in both are counted and served by both"


def _name_of(location: str) -> str:
    """The name of a folder, also where it is given as "."."""
    return split(location if is_remote(location) else os.path.abspath(location))[1]


def _open_sources(data: Data) -> tuple[tuple[Index, ...], set[int]]:
    """The indexes of data.shards or data.mix, and the missing shards, numbered through all of them."""
    access = access_of(data)
    sources, missing = [], set()
    for shards in data.mix or [data.shards]:
        source = load_index(shards, access)
        absent = check_shards(source, "size", data.allow_missing_shards, access)
        if len(absent) == len(source.shards):
            raise DataError(
                f"{source.location}: all {len(absent)} shards are missing; data.allow_missing_shards needs one"
            )
        first = sum(len(other.shards) for other in sources)
        missing |= {first + number for number in absent}
        sources.append(source)
    _check_alike(sources)
    return tuple(sources), missing


def _check_alike(sources: Sequence[Index]) -> None:
    """Raise ConfigError where sources can't be mixed."""
    for number, source in enumerate(sources):
        if source.kind != sources[0].kind:
            raise ConfigError(
                f"data.mix: {source.location} holds {source.kind} clips, {sources[0].location} {sources[0].kind} "
                "clips; pack all sources as the same kind"
            )
        if same := [other for other in sources[:number] if other.digest == source.digest]:
            raise ConfigError(
                f"data.mix: {same[0].location} and {source.location} are the same corpus; name it once, with the sum "
                "of their weights"
            )
        for other in sources[:number]:
            if same := {shard.sha256 for shard in source.shards} & {shard.sha256 for shard in other.shards}:
                name = next(shard.name for shard in source.shards if shard.sha256 in same)
                raise ConfigError(
                    f"data.mix: {len(same)} shards of {source.location}, such as {name}, are in {other.location} too, "
                    "and their clips would be counted twice; name the other shards alone by a brace pattern, or one "
                    "source with all of them"
                )


def _lay_out(cfg: Config, sources: Sequence[Index]) -> Plan | MixedPlan:
    data = cfg.data
    clips = [[shard.clips for shard in source.shards] for source in sources]
    order = cfg.seed, data.lanes, data.block, data.shuffle_window, data.crops_per_clip
    if data.mix is None:
        return make_plan(clips[0], *order)
    return make_mix(dict(zip(data.mix, clips, strict=True)), list(data.mix.values()), *order)


def _joined(sources: Sequence[Index], plan: MixedPlan) -> Index:
    """One index of all sources."""
    rates = {source.sample_rate for source in sources}
    mean, std, mel_mean = _mixed_statistics(sources, plan.shares)
    return Index(
        location=" + ".join(source.location for source in sources),
        kind=sources[0].kind,
        sample_rate=rates.pop() if len(rates) == 1 else None,
        shards=tuple(shard for source in sources for shard in source.shards),
        seconds=sum(source.seconds for source in sources),
        mean=mean,
        std=std,
        mel_mean=mel_mean,
        features=sources[0].features,
        official=_all_official([source.official for source in sources if source.official]),
        made_from=_digest([source.made_from for source in sources]),
    )


def _mixed_statistics(
    sources: Sequence[Index], shares: Sequence[float]
) -> tuple[float | None, float | None, tuple[float, ...] | None]:
    """mean, std and mel_mean of what is served, None unless all sources have theirs: of the moments by share."""
    if any(source.mean is None or source.std is None or source.mel_mean is None for source in sources):
        return None, None, None
    weighted = list(zip(shares, sources, strict=True))
    mean = sum(share * source.mean for share, source in weighted)
    # The second moment, taken about the common mean: a difference of large squares would lose digits.
    variance = sum(share * (source.std**2 + (source.mean - mean) ** 2) for share, source in weighted)
    bands = zip(*(source.mel_mean for source in sources), strict=True)
    mel_mean = tuple(sum(share * value for share, value in zip(shares, band, strict=True)) for band in bands)
    return mean, math.sqrt(variance), mel_mean


def _all_official(parts: Sequence[Official]) -> Official | None:
    """What all sources have of published collections, None where none has any."""
    if not parts:
        return None
    return Official(
        tables=tuple(table for part in parts for table in part.tables),
        clips=sum(part.clips for part in parts),
        found=sum(part.found for part in parts),
        manifest=_digest([part.manifest for part in parts]),
    )


def _digest(digests: Sequence[str | None]) -> str | None:
    """One digest of several in order, None where one is lacking."""
    if None in digests:
        return None
    return hashlib.sha256("".join(f"{digest}\n" for digest in digests).encode()).hexdigest()
