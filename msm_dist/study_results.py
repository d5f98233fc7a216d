"""Tables and a plot of a study: `msm-dist study gather`.

In: a folder with run folders below it, and reports of `msm-dist probe`. Out: OUT/results.md, OUT/results.csv (a line
per run) and OUT/results.png (a panel per swept setting), all of them or none. Rows of several seeds are their mean and
deviation; unfinished runs are told apart. Fails as `msm_dist.study` does, and with ConfigError without matplotlib.
"""

import csv
import io
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from msm_dist.errors import ConfigError
from msm_dist.files import write_atomically
from msm_dist.monitor import BASELINES, REFERENCES
from msm_dist.study import (
    Line,
    Row,
    StudyRun,
    lines_of,
    mean,
    natural,
    read_runs,
    rows_of,
    swept_settings,
    text_of,
    with_reports,
)

TARGET_SETTINGS = (
    *("data.crop_frames", "model.patch_size", "model.mask_ratio", "model.normalize_targets", "features."),
    *("data.shards", "data.mix", "data.valid_shards", "train.valid_clips"),
)
"""Settings that change what the loss is a mean of (a corpus brings its mean and deviation, and may be the one that is
judged): over them it can't be compared."""
NOTHING = "-"
NOT_COMPARABLE = (
    "Held-out losses of these runs are **not comparable with each other**: {settings} decides which clips are judged, "
    "which of their patches are hidden, or what a patch is, so that each loss is a mean over other targets. Beside a "
    "loss stand its ratios to what needs no model, on the same patches of the same clips: to the corpus mean per mel "
    "band (1: no better than a constant) and to the best of the {count} references. They too depend on how much is "
    "hidden, and where. What an encoder is worth is its downstream score."
)
ONLINE = "the online probe, at the last step that it saw (its random weights: those of the run's seed)"
REPORTS = "`msm-dist probe`, protocol {protocol} (its random weights: those of seed 0)"
COMPARABLE = "Held-out losses are means over the same targets, and comparable."
Value = float | int | str | None


class Measure(NamedTuple):
    """What a panel shows of runs."""

    label: str
    of: Callable[[StudyRun], float | None]
    has_baselines: bool


class Panel(NamedTuple):
    """A setting with the lines of rows that differ in it alone; without a place in the swept ones, all rows."""

    name: str
    lines: list[Line]
    place: int | None

    def label(self, row: Row) -> str:
        return ", ".join(row.values) if self.place is None else row.values[self.place]


MEASURES = (
    Measure("downstream score", lambda run: run.score, True),
    Measure("held-out loss / best reference", lambda run: run.to_best_reference, False),
)


def gather(root: Path, reports: Sequence[Path], out: Path) -> None:
    """Write the results of all runs below `root` into `out` and print the table. Raises ConfigError, DataError."""
    figure = _figure_class()
    runs = read_runs(root)
    judge = ONLINE
    if reports:
        runs, protocol = with_reports(runs, root, reports)
        judge = REPORTS.format(protocol=protocol)
    swept = swept_settings(runs)
    rows = rows_of(runs, swept)
    text = markdown(root, rows, swept, judge)
    files = {
        "results.md": text.encode(),
        "results.csv": table_csv(runs, swept).encode(),
        "results.png": plot(figure, rows, swept),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomically(out / name, content)
    print(text)
    print(f"written: {', '.join(str(out / name) for name in files)}")


def markdown(root: Path, rows: Sequence[Row], swept: Sequence[str], judge: str) -> str:
    """The tables, and what may be read from them; `judge` says where scores are from."""
    runs = [run for row in rows for run in row.runs]
    unfinished = sum(not run.is_finished for run in runs)
    count = len(rows[0].runs[0].references) or len(REFERENCES)
    changing = [name for name in swept if name.startswith(TARGET_SETTINGS)]
    lines = [
        f"{len(runs)} runs below {root.name}"
        + (f", **{unfinished} of them unfinished** (their rows say so)." if unfinished else ", all finished."),
        "",
        *_table(*_results(rows, swept)),
        "",
        NOT_COMPARABLE.format(settings=" or ".join(_short(changing)), count=count) if changing else COMPARABLE,
        "Several seeds: mean ± deviation of single runs. Speed is the median of the log points; minutes are the time "
        "in steps, without validation and probes.",
    ]
    if tasks := list(dict.fromkeys(task for run in runs for task in run.scores)):
        lines += [
            "",
            f"Downstream scores by {judge}; above stands {_mean_of(len(runs[0].compared), len(tasks))}. Random "
            "weights: the same model, untrained. Log-mel: statistics of the log-mel, without any model.",
            "",
            *_table(*_by_task(rows, swept, tasks)),
        ]
    return "\n".join(lines) + "\n"


def _mean_of(compared: int, tasks: int) -> str:
    if not compared:
        return "no mean of them, as no task is one that all these runs have"
    return f"their mean over {compared} tasks" + (f", of {tasks} those that all have" if compared < tasks else "")


def table_csv(runs: Sequence[StudyRun], swept: Sequence[str]) -> str:
    """A line per run with all there is, numbers unrounded."""
    records = [_record(run, swept) for run in runs]
    columns = list(dict.fromkeys(name for record in records for name in record))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def plot(figure: Callable[..., Any], rows: Sequence[Row], swept: Sequence[str]) -> bytes:
    """PNG: score, and loss in units of the best reference, over the values of each swept setting."""
    panels = [Panel(name, lines, place) for place, name in enumerate(swept) if (lines := lines_of(rows, place))]
    if not panels:  # no two rows differ in one setting alone
        panels = [Panel("run", [Line("", list(rows))], None)]
    runs = [run for row in rows for run in row.runs]
    measures = [measure for measure in MEASURES if any(measure.of(run) is not None for run in runs)] or MEASURES[1:]
    drawn = figure(figsize=(4 * len(panels), 3.2 * len(measures)), layout="constrained")
    axes = drawn.subplots(len(measures), len(panels), squeeze=False, sharey="row")
    for panel, column in zip(panels, axes.T, strict=True):
        for measure, axis in zip(measures, column, strict=True):
            _draw(axis, panel, measure)
    for measure, row in zip(measures, axes, strict=True):
        row[0].set_ylabel(measure.label)
        for axis in row:
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize="small")
    drawn.suptitle("filled: finished runs, hollow: unfinished ones; lines join means over seeds", fontsize="small")
    image = io.BytesIO()
    drawn.savefig(image, format="png", dpi=120, metadata={"Software": None})
    return image.getvalue()


def _draw(axis: Any, panel: Panel, measure: Measure) -> None:
    """A measure over the values of a setting, a dot per run."""
    ticks = sorted({panel.label(row) for line in panel.lines for row in line.points}, key=natural)
    for line in panel.lines:
        places = [ticks.index(panel.label(row)) for row in line.points]
        means = [mean(measure.of(run) for run in row.runs) for row in line.points]
        known = [pair for pair in sorted(zip(places, means, strict=True)) if pair[1] is not None]
        color = axis.plot(*zip(*known, strict=True), label=line.label or "encoder")[0].get_color() if known else None
        for place, row in zip(places, line.points, strict=True):
            for run in row.runs:
                if (value := measure.of(run)) is not None:
                    axis.plot(place, value, "o", color=color, markerfacecolor=color if run.is_finished else "none")
        for kind, style in (("random_weights", "x"), ("logmel", "_")) if measure.has_baselines else ():
            levels = [mean(run.baseline(kind) for run in row.runs) for row in line.points]
            known = [pair for pair in zip(places, levels, strict=True) if pair[1] is not None]
            if known:
                label = BASELINES[kind] if line is panel.lines[0] else None
                axis.plot(*zip(*known, strict=True), style, color="gray", markersize=9, label=label)
    axis.set_xticks(range(len(ticks)), ticks)
    axis.set_xlabel(panel.name)
    axis.grid(alpha=0.3)


def _results(rows: Sequence[Row], swept: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the first table."""
    columns: list[tuple[str, Callable[[StudyRun], float | None], str]] = [
        ("held-out loss", lambda run: run.valid_loss, ".4f"),
        ("/ corpus mean", lambda run: run.to_mel_mean, ".3f"),
        ("/ best reference", lambda run: run.to_best_reference, ".3f"),
        ("score", lambda run: run.score, ".3f"),
        ("random weights", lambda run: run.baseline("random_weights"), ".3f"),
        ("log-mel", lambda run: run.baseline("logmel"), ".3f"),
        ("clips/s", lambda run: run.clips_per_second, ",.1f"),
        ("minutes", lambda run: None if run.training_seconds is None else run.training_seconds / 60, ".1f"),
    ]
    headings = [*_short(swept), "runs", "patches (visible)", "steps", "crops", *(name for name, _, _ in columns)]
    cells = []
    for row in rows:
        cfg = row.runs[0].cfg
        line = [*row.values, _runs_cell(row.runs), f"{cfg.num_patches} ({cfg.num_keep})"]
        line += [_span([run.step for run in row.runs]), _span([run.crops for run in row.runs])]
        cells.append([*line, *(_spread([of(run) for run in row.runs], form) for _, of, form in columns)])
    return headings, cells


def _by_task(rows: Sequence[Row], swept: Sequence[str], tasks: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the second table: each row's own scores and those of its random weights, then log-mel."""
    cells = []
    for row in rows:
        for label, scores in (
            ("trained", [run.scores for run in row.runs]),
            ("random weights", [run.baselines.get("random_weights", {}) for run in row.runs]),
        ):
            found = [_spread([of_run.get(task) for of_run in scores], ".3f") for task in tasks]
            if set(found) != {NOTHING}:
                cells.append([*row.values, label, *found])
    every = [run.baselines["logmel"] for row in rows for run in row.runs if "logmel" in run.baselines]
    if every:
        found = [_spread([of_run.get(task) for of_run in every], ".3f") for task in tasks]
        cells.append([*[""] * len(swept), "log-mel", *found])
    return [*_short(swept), "", *(task.replace("/", " ") for task in tasks)], cells


def _record(run: StudyRun, swept: Sequence[str]) -> dict[str, Value]:
    cfg = run.cfg
    clip_hours = cfg.data.crop_frames * cfg.features.hop / cfg.features.sample_rate / 3600
    record: dict[str, Value] = {"run": run.name, "state": run.state}
    record |= {name: text_of(run.settings.get(name)) for name in swept}
    record |= {
        "seed": cfg.seed,
        "step": run.step,
        "total_steps": run.total_steps,
        "crops": run.crops,
        "audio_hours": run.crops * clip_hours,
        "num_patches": cfg.num_patches,
        "num_keep": cfg.num_keep,
        "visible_patches_seen": run.crops * cfg.num_keep,
        "valid_loss": run.valid_loss,
        **run.references,
        "loss_to_mel_mean": run.to_mel_mean,
        "loss_to_best_reference": run.to_best_reference,
        "score": run.score,
    }
    record |= {f"score_{kind}": run.baseline(kind) for kind in BASELINES if kind in run.baselines}
    record |= run.scores
    for kind, scores in run.baselines.items():
        record |= {f"{name} {kind}": value for name, value in scores.items()}
    return record | {"clips_per_second": run.clips_per_second, "training_seconds": run.training_seconds}


def _figure_class() -> Callable[..., Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("a study's plot needs matplotlib; install it with  pip install 'msm-dist[eval]'") from None
    return Figure


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for cells in (headings, ["---"] * len(headings), *rows):
        yield f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _runs_cell(runs: Sequence[StudyRun]) -> str:
    missing = [f"{run.state} at {run.step} of {run.total_steps or '?'}" for run in runs if not run.is_finished]
    return str(len(runs)) + (f" ({'; '.join(missing)})" if missing else "")


def _spread(values: Sequence[float | None], form: str) -> str:
    """The mean, and of several the deviation of one of them."""
    known = [value for value in values if value is not None]
    if not known:
        return NOTHING
    middle = f"{statistics.fmean(known):{form}}"
    return middle if len(known) == 1 else f"{middle} ± {statistics.stdev(known):{form}}"


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _short(names: Sequence[str]) -> list[str]:
    """The last part of each name, where that tells them apart."""
    last = [name.rpartition(".")[2] for name in names]
    return [tail if last.count(tail) == 1 else name for name, tail in zip(names, last, strict=True)]
