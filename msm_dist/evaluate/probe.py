"""How much a classifier can read off an encoder's vectors: `msm-dist probe RUN DATA...`.

In: weights, tasks (tasks.py) and a protocol (protocols.py). Out: per task the score over seeds and its interval by
resampled clips, beside it those of two baselines on the same clips (probe_vectors.py) and the paired differences from
them; as a table and as JSON. A result is a function of weights, clips and settings. Fails with DataError on a task
that can't be used, with CheckpointError on weights, with ConfigError on settings.

Legend: N clips, E numbers of a vector, C classes, R resamples.
"""

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from msm_dist.data.audioset import EVALUATION_NAME
from msm_dist.data.clips import Progress, quiet
from msm_dist.errors import ConfigError, DataError
from msm_dist.evaluate.encoder import Encoder, Normalization
from msm_dist.evaluate.probe_report import Compared, Outcome, Scored, as_json, table
from msm_dist.evaluate.probe_vectors import (
    BASELINES,
    LOGMEL,
    MOST_BAD,
    TRAINED,
    clip_vectors,
    readable_waveforms,
    sources,
)
from msm_dist.evaluate.protocols import LINEAR_RATES, NARROW_RATES, HearPoint, Problem, Protocol, fit
from msm_dist.evaluate.recipes import check_recipe
from msm_dist.evaluate.scores import SCORES, check_scores, interval, resample_weights, resampled
from msm_dist.evaluate.tasks import Parts, Task, check_classes, parts_of, read_shards, read_task, untrained_classes
from msm_dist.files import write_atomically
from msm_dist.model.weights import weights_folder

log = logging.getLogger(__name__)

CACHE_NAME = "probe"
SATURATED = 0.95
SHUFFLING = 0x5AFF1E
ROWS_AT_ONCE = 4096

Judged = Callable[[dict[str, Any], Sequence[Outcome]], None]


def nobody(about: dict[str, Any], outcomes: Sequence[Outcome]) -> None:
    """Tell no one."""


@dataclass(frozen=True)
class Settings:
    """What is done with a task's vectors. Raises ConfigError."""

    protocol: Protocol = "linear"
    seeds: int = 3
    """The classifier is fitted from seeds 0, 1 ...; they also draw the clips where these are drawn."""
    labels_per_class: int | None = None
    """Training clips of each class; None: all."""
    shuffle_labels: bool = False
    """The negative control: training and validation labels are dealt out anew, so scores must be chance."""

    def __post_init__(self) -> None:
        if self.protocol not in get_args(Protocol):
            raise ConfigError(f"protocol = {self.protocol!r}: must be one of {', '.join(get_args(Protocol))}")
        for name, value in (("seeds", self.seeds), ("labels_per_class", self.labels_per_class)):
            if value is not None and not (type(value) is int and value > 0):
                raise ConfigError(f"{name} = {value!r}: must be a whole number from 1 on")


def probe(
    run: str,
    data: Sequence[str],
    settings: Settings,
    *,
    test: str | None = None,
    valid: str | None = None,
    audio: Path | None = None,
    device: str = "cpu",
    normalization: Normalization = "checkpoint",
    cache: Path | None = None,
    progress: Progress = quiet,
    judged: Judged = nobody,
) -> tuple[dict[str, Any], list[Outcome]]:
    """Probe the encoder of `run` on every task of `data`: what all outcomes share, and an Outcome each.

    All tasks are read before anything is computed. `test`, `valid`: shards that go with the one of `data`. `cache`:
    where vectors are kept; without it beside the run, for weights from a hub nowhere. `judged` is told both after each
    task.
    """
    encoder = Encoder.load(
        run, device=device, **({} if normalization == "dataset" else {"normalization": normalization})
    )
    tasks = _tasks(data, test, valid, audio, encoder.features.sample_rate)
    for task in tasks:
        check_classes(task)
        check_scores(task.scores, task.name)
    cache = cache or _cache_of(run)
    about = encoder.describe() | {"run": run, "normalization": normalization, "device": str(encoder.device)}
    about |= {"settings": asdict(settings), "baselines": list(BASELINES)}
    if normalization == "dataset":  # each task's own, in its outcome
        del about["mean"], about["std"]
    outcomes: list[Outcome] = []
    for task in tasks:
        own = _for_task(encoder, task) if normalization == "dataset" else encoder
        vectors = clip_vectors(task, sources(own), own.features.sample_rate, cache, progress)
        outcome = probe_task(task, vectors, settings, encoder.device, progress)
        outcomes.append(replace(outcome, statistics=own.statistics and tuple(own.statistics)))
        about["to_come"] = [later.name for later in tasks[len(outcomes) :]]
        judged(about, outcomes)
    return about, outcomes


def probe_task(
    task: Task,
    vectors: dict[str, Tensor],
    settings: Settings,
    device: str | torch.device = "cpu",
    progress: Progress = quiet,
) -> Outcome:
    """Judge vectors by their source's name, float32 [N, E] each; clips whose vectors are not finite are left out.

    Raises DataError where too many of a source's are not, or a part has no others.
    """
    check_classes(task)
    unreadable, not_finite = _left_out(task, vectors)
    targets = task.targets()
    holds_out = settings.protocol != "knn"  # it chooses nothing
    parts = {
        (fold, seed): _without(
            task, parts_of(task, task.folds[fold], seed, settings.labels_per_class, holds_out), unreadable | not_finite
        )
        for fold in range(len(task.folds))
        for seed in range(settings.seeds)
    }
    counts = np.stack([targets[part.train].sum(0) for part in parts.values()]).astype(int)
    judges = [_Judge(task, targets, parts[fold, 0].test, fold) for fold in range(len(task.folds))]
    scored, draws = {}, {}
    for number, (name, rows) in enumerate(vectors.items()):
        progress(f"{task.name}: fitting", number, len(vectors))
        rates = NARROW_RATES if name == LOGMEL else LINEAR_RATES
        given = _Given(task, rates, rows, targets, parts, judges, device)
        scored[name], draws[name] = _judge_source(given, settings)
    progress(f"{task.name}: fitting", len(vectors), len(vectors))
    first = parts[0, 0]
    return Outcome(
        task=task.name,
        score=task.scores[0],
        num_classes=len(task.labels),
        multilabel=task.multilabel,
        num_folds=len(task.folds),
        num_train=len(first.train),
        num_valid=len(first.valid),
        num_test=sum(judge.num_clips for judge in judges),
        judged_classes=min(judge.num_classes for judge in judges),
        left_out=tuple(task.clips[place].key for place in np.flatnonzero(unreadable)),
        not_finite=tuple(task.clips[place].key for place in np.flatnonzero(not_finite)),
        official=_official(task, judges[0].num_clips),
        scored=scored,
        compared={name: _compare(draws, scored, name) for name in vectors if name in BASELINES and TRAINED in vectors},
        saturated=any(scored[name].mean > SATURATED for name in BASELINES if name in scored),
        train_labels=(int(counts[counts > 0].min(initial=len(targets))), int(counts.max())),
        untrained_classes=max(untrained_classes(task, part) for part in parts.values()),
    )


class _Judge:
    """The test clips of a rotation, with their resamples: the same for every source, so that differences are paired."""

    def __init__(self, task: Task, targets: np.ndarray, places: np.ndarray, fold: int):
        self.names = task.scores
        self.targets = targets[places]
        self.num_clips = len(places)
        self.num_classes = int((self.targets.sum(0) > 0).sum())
        # Rotations have other clips: drawn alike, their luck would add up.
        self.weights = resample_weights(len(places), len(task.labels), seed=fold)

    def values(self, scores: np.ndarray) -> dict[str, float]:
        return {name: SCORES[name](scores, self.targets) for name in self.names}

    def draws(self, scores: np.ndarray) -> np.ndarray:
        return resampled(self.names[0], scores, self.targets, self.weights)


@dataclass(frozen=True)
class _Given:
    task: Task
    rates: tuple[float, ...]
    rows: Tensor
    targets: np.ndarray
    parts: dict[tuple[int, int], Parts]
    """By rotation and seed."""
    judges: Sequence[_Judge]
    device: str | torch.device


def _judge_source(given: _Given, settings: Settings) -> tuple[Scored, np.ndarray]:
    """Scores of one source, and of its resamples [R] (the mean over rotations and seeds)."""
    task = given.task
    values, chosen = np.zeros((settings.seeds, len(given.judges), len(task.scores))), []
    draws: list[np.ndarray] = []
    point: HearPoint | None = None
    for fold, judge in enumerate(given.judges):
        for seed in range(settings.seeds):
            part = given.parts[fold, seed]
            labels = _shuffled(given.targets, part, seed) if settings.shuffle_labels else given.targets
            problem = Problem(given.rows, labels, part, task.multilabel, task.scores[0], given.device)
            fitted = fit(settings.protocol, problem, seed, given.rates, point)
            if settings.protocol == "hear":
                point = point or HearPoint(*(fitted.chosen[name] for name in HearPoint._fields))
            found = judge.values(fitted.scores)
            values[seed, fold] = [found[name] for name in task.scores]
            draws.append(judge.draws(fitted.scores))
            chosen.append({"fold": task.folds[fold].test, "seed": seed} | fitted.chosen | found)
    fewest = min(map(len, draws))
    pooled = np.mean([draw[:fewest] for draw in draws], axis=0)
    by_seed = values.mean(1)
    scored = Scored(
        size=given.rows.shape[1],
        mean=float(by_seed[:, 0].mean()),
        deviation=float(by_seed[:, 0].std(ddof=1)) if settings.seeds > 1 else None,
        interval=interval(pooled),
        by_seed=tuple(by_seed[:, 0].tolist()),
        by_fold=tuple(values[:, :, 0].mean(0).tolist()),
        all_scores=dict(zip(task.scores, by_seed.mean(0).tolist(), strict=True)),
        fits=tuple(chosen),
    )
    return scored, pooled


def _compare(draws: dict[str, np.ndarray], scored: dict[str, Scored], baseline: str) -> Compared:
    """How far the trained encoder is above a baseline, clips resampled in pairs."""
    difference = scored[TRAINED].mean - scored[baseline].mean
    return Compared(difference, interval(draws[TRAINED] - draws[baseline]))


def _left_out(task: Task, vectors: Mapping[str, Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Which clips could not be read, and which were but have a vector that is not finite: bool [N] each.

    A clip that could not be read has a row of NaN from every source.
    """
    unreadable, bad = np.ones(len(task.clips), bool), {}
    for name, rows in vectors.items():
        blocks = [(~part.isfinite().all(1), part.isnan().all(1)) for part in rows.split(ROWS_AT_ONCE)]
        bad[name], empty = (torch.cat(columns).numpy() for columns in zip(*blocks, strict=True))
        unreadable &= empty
    for name, rows in bad.items():
        count = int((rows & ~unreadable).sum())
        if count > max(1, MOST_BAD * len(task.clips)):
            raise DataError(
                f"{task.name}: {count} of {len(task.clips)} vectors of {name} are not finite, more than "
                f"{MOST_BAD:.0%}; such weights can't be judged (has the run diverged?)"
            )
    return unreadable, np.any(list(bad.values()), axis=0) & ~unreadable


def _without(task: Task, parts: Parts, left_out: np.ndarray) -> Parts:
    kept = {name: places[~left_out[places]] for name, places in vars(parts).items()}
    for name, places in kept.items():
        if not len(places) and len(getattr(parts, name)):
            raise DataError(
                f"{task.name}: all {len(getattr(parts, name))} {name} clips of a rotation are left out, as unreadable "
                "or without a finite vector; mend them, or give more"
            )
    return Parts(**kept)


def _shuffled(targets: np.ndarray, parts: Parts, seed: int) -> np.ndarray:
    """Targets with those of the training and validation clips dealt out anew; the test clips keep theirs."""
    places = np.concatenate([parts.train, parts.valid])
    shuffled = targets.copy()
    shuffled[places] = targets[np.random.default_rng([seed, SHUFFLING]).permutation(places)]
    return shuffled


def _official(task: Task, num_clips: int) -> str | None:
    if task.official is None:
        return None
    kind = "eval" if task.official.tables == (EVALUATION_NAME,) else "official"
    return f"{min(num_clips, task.official.found):,} of {task.official.clips:,} {kind} clips"


def _tasks(
    data: Sequence[str], test: str | None, valid: str | None, audio: Path | None, sample_rate: int
) -> list[Task]:
    if test is None:
        if valid is not None:
            raise ConfigError(f"--valid {valid}: goes with --test, for shards; other data name their own splits")
        places = [Path(one).resolve() for one in data]
        if twice := [one for number, one in enumerate(data) if places[number] in places[:number]]:
            raise ConfigError(f"{twice[0]}: is named twice; leave one out")
        return [read_task(one, audio, sample_rate) for one in data]
    if len(data) != 1:
        raise ConfigError(f"--test {test}: goes with one folder of training shards, but {len(data)} were given")
    return [read_shards(data[0], test, valid)]


def _cache_of(run: str) -> Path | None:
    """The folder of vectors beside weights on this machine, where one can be written."""
    folder = weights_folder(run)
    if not folder.is_dir():
        return None
    folder = folder.parent if folder.name == "export" else folder
    if not os.access(folder, os.W_OK):
        log.warning("%s: can't be written, so vectors are not kept; name a folder with --cache", folder)
        return None
    return folder / CACHE_NAME


def _for_task(encoder: Encoder, task: Task) -> Encoder:
    """The encoder with the statistics of the clips that some rotation trains on."""
    trained_on = {split for fold in task.folds for split in fold.train}
    rate = encoder.features.sample_rate
    clips = [clip for clip in task.clips if clip.split in trained_on]
    return encoder.for_dataset(readable_waveforms(clips, rate), rate)


def report(
    run: str,
    data: Sequence[str],
    settings: Settings,
    out: Path | None,
    recipe: str | None = None,
    overwrite: bool = False,
    **options: Any,
) -> str:
    """What the command prints, the table; all of it goes to `out`. `options` and errors are those of `probe`.

    `out` is written anew after each task; one that is there is refused, unless `overwrite`. Where a
    task fails, the table of those before it is printed.
    """
    if recipe is not None:
        check_recipe(recipe)
    if out is not None:
        if out.is_dir():
            raise ConfigError(f"--out {out}: is a folder; name a file, such as {out / 'report.json'}")
        if out.exists() and not overwrite:
            raise ConfigError(f"--out {out}: is there already; name another file, or give --overwrite")
        out.parent.mkdir(parents=True, exist_ok=True)
    if options.get("device") == "auto":
        options["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    given = [f"{recipe}:{folder}" for folder in data] if recipe else list(data)
    so_far = ""

    def keep(about: dict[str, Any], outcomes: Sequence[Outcome]) -> None:
        nonlocal so_far
        if out is not None:
            write_atomically(out, json.dumps(as_json(about, outcomes), indent=1, allow_nan=False) + "\n")
        so_far = table(outcomes, about)

    try:
        probe(run, given, settings, judged=keep, **options)
    except BaseException:
        if so_far:
            print(so_far, flush=True)
        raise
    return so_far if out is None else f"{so_far}\n\n{out}"
