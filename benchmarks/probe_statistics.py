"""What spectra averaged over time tell about the probe tasks' classes: `python -m benchmarks.probe_statistics`.

In: nothing but the generator; the clips have another seed than those that `msm-dist data tasks` writes by default, and
no model has a part in it. Out: the test accuracy of logistic regression on four kinds of statistics of the log-mel, per
task beside chance, as a table, and benchmarks/results/probe-statistics-<device>.json.

    mean         of each band over time
    + deviation  mean and deviation of each band
    differences  deviation of each band's differences from frame to frame
    all          means and deviations of both: the log-mel baseline of `msm-dist probe`
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.measure import RESULTS, table, write_results
from msm_dist.config import Features
from msm_dist.data.probe_tasks import TASKS, VERSION, make_clip
from msm_dist.evaluate.probe_vectors import logmel_statistics
from msm_dist.features import LogMel

CLIPS_PER_CLASS = 200
SEED = 1
STRENGTH = 0.1
"""Inverse of the regularisation."""


def main(arguments: Sequence[str]) -> int:
    """The exit code: 0."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.probe_statistics", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--clips", type=int, default=CLIPS_PER_CLASS, help="per class, for training and for test each")
    parser.add_argument("--task", action="append", choices=list(TASKS), help="may be repeated; none: all")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = {name: measure(name, options.seed, options.clips) for name in options.task or TASKS}
    content = {"generator_version": VERSION, "seed": options.seed, "clips_per_class": options.clips, "found": found}
    path = write_results(options.out, "probe-statistics", content)
    print(f"{summary(found)}\nwritten: {path}")
    return 0


def measure(name: str, seed: int, clips_per_class: int) -> dict[str, Any]:
    """Chance, its deviation over so many test clips, and the accuracy of each kind of statistics."""
    front_end = LogMel(Features())
    count, num_classes = clips_per_class * len(TASKS[name].labels), len(TASKS[name].labels)
    train, test = (statistics(name, seed, split, count, front_end) for split in ("train", "test"))
    labels = np.arange(count) % num_classes
    bands = front_end.features.n_mels
    kinds = {
        "mean": slice(bands),
        "+ deviation": slice(2 * bands),
        "differences": slice(3 * bands, 4 * bands),
        "all": slice(4 * bands),
    }
    accuracy = {}
    for kind, columns in kinds.items():
        model = make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, max_iter=1000))
        accuracy[kind] = float(model.fit(train[:, columns], labels).score(test[:, columns], labels))
    chance = 1 / num_classes
    return {"chance": chance, "deviation": float(np.sqrt(chance * (1 - chance) / count)), "accuracy": accuracy}


def statistics(name: str, seed: int, split: str, count: int, front_end: LogMel) -> np.ndarray:
    """[count, 4 * bands] of a split's first clips."""
    rows = []
    for number in range(count):
        stored = np.rint(make_clip(name, seed, split, number)[0] * 32767) / 32768
        rows.append(logmel_statistics(stored.astype(np.float32), front_end).numpy())
    return np.stack(rows)


def summary(found: Mapping[str, Mapping[str, Any]]) -> str:
    """A row per task, percent."""
    kinds = list(next(iter(found.values()))["accuracy"])
    rows = [
        (name, f"{100 * one['chance']:.1f} ± {100 * one['deviation']:.1f}")
        + tuple(f"{100 * one['accuracy'][kind]:.1f}" for kind in kinds)
        for name, one in found.items()
    ]
    return table(("task", "chance", *kinds), rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
