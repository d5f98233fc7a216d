"""The runs of a sweep as results: what was varied, and what was reached.

In: a folder with run folders below it, and reports of `msm-dist probe`. Out: a `StudyRun` each, and rows of those that
differ in their seed alone. A setting counts as swept if two of the runs differ in it. Fails with ConfigError where
there is nothing to compare, with DataError on a damaged record.
"""

import json
import logging
import math
import re
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from msm_dist.config import Config, flat_settings, is_finetuning, load_config
from msm_dist.errors import ConfigError, DataError
from msm_dist.monitor import BASELINES, REFERENCES, read_metrics
from msm_dist.traces import run_folders, traces

log = logging.getLogger(__name__)

PROBE = "probe/"
TRAINED = "trained"


@dataclass(frozen=True)
class StudyRun:
    """What a run folder tells of its results; None and empty where it has none (yet)."""

    name: str
    """Path below the folder that was looked through."""
    cfg: Config
    settings: Mapping[str, Any]
    is_finished: bool
    state: str
    step: int
    total_steps: int | None
    valid_loss: float | None
    references: Mapping[str, float]
    scores: Mapping[str, float]
    """SCORE/TASK, as accuracy/pitch: of the latest online probe, or of reports."""
    baselines: Mapping[str, Mapping[str, float]]
    """The same by name of the baseline."""
    clips_per_second: float | None
    """Median of the log points."""
    training_seconds: float | None
    """Time in steps, of all starts; without validation, probes and checkpoints."""
    compared: frozenset[str] = frozenset()
    """The SCORE/TASK that every run with scores has: what a mean over tasks is taken of."""

    @property
    def crops(self) -> int:
        return self.step * self.cfg.train.global_batch

    @property
    def to_mel_mean(self) -> float | None:
        """The held-out loss in units of that of the corpus mean per band."""
        reference = self.references.get("reference_mel_mean")
        return self.valid_loss / reference if self.valid_loss is not None and reference else None

    @property
    def to_best_reference(self) -> float | None:
        """The held-out loss in units of the least of those that need no model."""
        reference = min(self.references.values(), default=None)
        return self.valid_loss / reference if self.valid_loss is not None and reference else None

    @property
    def score(self) -> float | None:
        """Mean over the tasks that are compared."""
        return self._mean(self.scores)

    def baseline(self, name: str) -> float | None:
        return self._mean(self.baselines.get(name, {}))

    def _mean(self, scores: Mapping[str, float]) -> float | None:
        return mean(value for task, value in scores.items() if task in self.compared)


@dataclass(frozen=True)
class Row:
    """Runs that differ in their seed alone."""

    values: tuple[str, ...]
    """Of the swept settings."""
    runs: tuple[StudyRun, ...]


@dataclass(frozen=True)
class Line:
    """Rows that differ in one setting alone."""

    label: str
    points: list[Row] = field(default_factory=list)


def read_runs(root: Path) -> list[StudyRun]:
    """All runs below `root` that have begun, by name. Raises ConfigError, DataError."""
    if not root.is_dir():
        raise ConfigError(f"{root}: no such folder; give the one that holds the run folders (run.dir, or a sweep's)")
    begun = [folder for folder in run_folders(root) if (folder / "config.yaml").is_file()]
    folders = [folder for folder in begun if not is_finetuning(folder / "config.yaml")]
    for folder in begun:
        if folder not in folders:
            log.warning("%s: a fine-tuned run, left out", _name(folder, root))
    runs = [read_run(folder, _name(folder, root)) for folder in folders]
    if len(runs) < 2:
        raise ConfigError(f"{root}: has {len(runs)} runs that have begun; a study compares at least two")
    return _alike(sorted(runs, key=lambda run: natural(run.name)))


def _alike(runs: Sequence[StudyRun]) -> list[StudyRun]:
    """The runs with the tasks that all of those with scores have."""
    tasks = [frozenset(run.scores) for run in runs if run.scores]
    compared = frozenset.intersection(*tasks) if tasks else frozenset()
    return [replace(run, compared=compared) for run in runs]


def read_run(folder: Path, name: str) -> StudyRun:
    """The settings and results of a run folder. Raises ConfigError, DataError."""
    cfg = load_config(folder / "config.yaml")
    seen = traces(folder, time.time())
    lines = read_metrics(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else []
    for line in lines:
        if not all(isinstance(value, int | float) for value in line.values()):
            raise DataError(f"{folder / 'metrics.jsonl'}: step {line['step']} holds something that is no number")
    trained = [line for line in lines if "loss" in line]
    valid: dict[str, float] = next((line for line in reversed(lines) if "valid_loss" in line), {})
    probed: dict[str, float] = next((line for line in reversed(lines) if _is_probe(line)), {})
    scores = {key.removeprefix(PROBE): value for key, value in probed.items() if key.startswith(PROBE)}
    own, baselines = split_scores(scores)
    step = max((line["step"] for line in lines), default=0)
    is_finished = seen.is_exported and step == seen.total_steps
    return StudyRun(
        name=name,
        cfg=cfg,
        settings=flat_settings(cfg.model_dump(mode="json")),
        is_finished=is_finished,
        state="finished" if is_finished else "diverged" if seen.diverged_step is not None else "unfinished",
        step=step,
        total_steps=seen.total_steps,
        valid_loss=valid.get("valid_loss"),
        references={name: valid[name] for name in REFERENCES if name in valid},
        scores=own,
        baselines=baselines,
        clips_per_second=_median(line["clips_per_second"] for line in trained if "clips_per_second" in line),
        training_seconds=_seconds_in_steps(trained),
    )


def split_scores(scores: Mapping[str, float]) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """SCORE/TASK and SCORE_BASELINE/TASK as the run's own, and by baseline."""
    own: dict[str, float] = {}
    baselines: dict[str, dict[str, float]] = {}
    for name, value in scores.items():
        score, _, task = name.partition("/")
        kind = next((kind for kind in BASELINES if score.endswith(f"_{kind}")), None)
        if kind:
            baselines.setdefault(kind, {})[f"{score.removesuffix(f'_{kind}')}/{task}"] = value
        else:
            own[name] = value
    return own, baselines


def with_reports(runs: Sequence[StudyRun], root: Path, reports: Sequence[Path]) -> tuple[list[StudyRun], str]:
    """The runs with the scores of `msm-dist probe --out` instead of the online ones, and the reports' one protocol.

    Raises ConfigError for a report of a run that is not below `root`, of shuffled labels, made with other settings than
    the first, or of a task that the run has already; DataError for a file that is no report.
    """
    found: dict[str, dict[str, float]] = {run.name: {} for run in runs}
    sources: dict[tuple[str, str], Path] = {}
    places = {(root / run.name if run.name != root.resolve().name else root).resolve(): run.name for run in runs}
    settings: dict[str, Any] = {}
    for path in reports:
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            place = Path(report["run"])
            own = {"protocol": None, **report["settings"], "normalization": report.get("normalization")}
            scores = {
                f"{task['score']}{'' if kind == TRAINED else f'_{kind}'}/{task['task']}": float(scored["mean"])
                for task in report["tasks"]
                for kind, scored in task["scored"].items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}: is no report of msm-dist probe ({type(error).__name__}: {error}); make one with "
                "`msm-dist probe RUN DATA --out REPORT.json`"
            ) from None
        name = next((places[folder] for folder in _at_and_above(place) if folder in places), None)
        if name is None:
            raise ConfigError(f"{path}: is of {place}, which is no run below {root}; leave it out")
        if own.get("shuffle_labels"):
            raise ConfigError(f"{path}: is of shuffled labels, a control and no result; leave it out")
        settings = settings or own
        if differing := [key for key in own.keys() | settings.keys() if own.get(key) != settings.get(key)]:
            key = min(differing)
            raise ConfigError(
                f"{path}: was made with {key} {own.get(key)}, but {reports[0]} with {settings.get(key)}; one table "
                "takes reports of the same settings"
            )
        for task in split_scores(scores)[0]:
            if (first := sources.setdefault((name, task), path)) is not path:
                raise ConfigError(f"{path}: has {task} of the run {name}, as has {first}; leave one of them out")
        found[name] |= scores
    split = {name: split_scores(scores) for name, scores in found.items()}
    judged = [replace(run, scores=split[run.name][0], baselines=split[run.name][1]) for run in runs]
    return _alike(judged), str(settings["protocol"])


def swept_settings(runs: Sequence[StudyRun]) -> list[str]:
    """Settings in which the runs differ, apart from their names and seeds. Raises ConfigError where there are none."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    swept = [
        name
        for name in names
        if not name.startswith("run.") and name != "seed"
        if len({text_of(run.settings.get(name)) for run in runs}) > 1
    ]
    if not swept:
        raise ConfigError(
            f"the {len(runs)} runs, {runs[0].name} to {runs[-1].name}, differ in no setting but the seed: there is "
            "nothing to tabulate; `msm-dist runs` lists them"
        )
    return swept


def rows_of(runs: Sequence[StudyRun], swept: Sequence[str]) -> list[Row]:
    """A row for each combination of settings, in the order of their values."""
    rows: dict[tuple[str, ...], list[StudyRun]] = {}
    for run in runs:
        rows.setdefault(tuple(text_of(run.settings.get(name)) for name in swept), []).append(run)
    return [Row(values, tuple(rows[values])) for values in sorted(rows, key=lambda values: [*map(natural, values)])]


def lines_of(rows: Sequence[Row], place: int) -> list[Line]:
    """Rows that differ in the setting at `place` alone, two at least; a line's label is the values of the others."""
    lines: dict[tuple[str, ...], Line] = {}
    for row in rows:
        others = (*row.values[:place], *row.values[place + 1 :])
        lines.setdefault(others, Line(", ".join(others))).points.append(row)
    return [line for line in lines.values() if len(line.points) > 1]


def _seconds_in_steps(trained: Sequence[Mapping[str, float]]) -> float | None:
    """A log point's step time holds for the steps since the one before it."""
    seconds, before = 0.0, 0
    for line in trained:
        seconds += (line["step"] - before) * line.get("step_seconds", math.nan)
        before = line["step"]
    return seconds if trained and math.isfinite(seconds) else None


def _is_probe(line: Mapping[str, Any]) -> bool:
    return any(name.startswith(PROBE) for name in line)


def _name(folder: Path, root: Path) -> str:
    return str(folder.relative_to(root)) if folder != root else folder.resolve().name


def _at_and_above(place: Path) -> tuple[Path, Path, Path]:
    """A run may be named by its folder, by its export/ or by the weights in that."""
    place = place.resolve()
    return place, place.parent, place.parent.parent


def mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _median(values: Iterable[float]) -> float | None:
    known = list(values)
    return statistics.median(known) if known else None


def natural(text: str) -> tuple[Any, ...]:
    """A key that puts 96 before 208, 8x16 before 16x8 and 0.5 before 0.75."""
    parts = re.split(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)", text)
    return tuple((0, float(part), "") if place % 2 else (1, 0.0, part) for place, part in enumerate(parts))


def text_of(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
