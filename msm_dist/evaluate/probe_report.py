"""What a probe found, as values, as a Markdown table, and as JSON.

Scores are shares (0 to 1) in values and JSON, percent in the table.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from msm_dist.data.contents import printable
from msm_dist.evaluate.scores import Interval

COLUMNS = ("trained", "random_weights", "logmel")
HEADINGS = ("trained", "random weights", "log-mel")


@dataclass(frozen=True)
class Scored:
    """One source's deciding score: its mean over seeds, their deviation (None of one), the middle 95 % of resamples."""

    size: int
    mean: float
    deviation: float | None
    interval: Interval
    by_seed: tuple[float, ...]
    """The mean over rotations each."""
    by_fold: tuple[float, ...]
    """The mean over seeds each."""
    all_scores: dict[str, float]
    """Every score of the task, the mean over seeds and rotations."""
    fits: tuple[dict[str, Any], ...]
    """Per rotation and seed what was chosen (learning rate, epoch, validation score) and what the test clips gave."""


@dataclass(frozen=True)
class Compared:
    """The trained encoder's score minus a baseline's, and the middle 95 % of it over resampled clips."""

    difference: float
    interval: Interval

    @property
    def is_above(self) -> bool:
        """Whether the whole interval is above zero."""
        return self.interval.low > 0


@dataclass(frozen=True)
class Outcome:
    """A task's result. Sizes are those of the first rotation, `num_test` of all together."""

    task: str
    score: str
    num_classes: int
    multilabel: bool
    num_folds: int
    num_train: int
    num_valid: int
    num_test: int
    judged_classes: int
    """Classes that test clips have: the others are no part of mAP."""
    left_out: tuple[str, ...]
    """Clips that can't be read as audio."""
    official: str | None
    """How much of a published evaluation was there: n of N."""
    scored: dict[str, Scored]
    compared: dict[str, Compared]
    saturated: bool
    """A baseline exceeds 95 %: the task tells little about an encoder."""
    statistics: tuple[float, float] | None = None
    """Mean and deviation that the spectrogram was normalised with; None: those of each batch."""
    not_finite: tuple[str, ...] = ()
    """Clips left out that were read, but that a source has no finite vector of."""
    train_labels: tuple[int, int] | None = None
    """Fewest and most training clips of a class, of those that have any, over rotations and seeds."""
    untrained_classes: tuple[int, int] = (0, 0)
    """How many classes of test clips no training clip has, and of how many; of the rotation with the most."""

    @property
    def beats_baselines(self) -> bool:
        """Whether every paired interval is above zero."""
        return bool(self.compared) and all(compared.is_above for compared in self.compared.values())


def table(outcomes: Sequence[Outcome], about: dict[str, Any]) -> str:
    """A Markdown table with a row per task, aligned for a terminal, and a line on how it was made."""
    header = ["task", "score", *HEADINGS, *(f"- {heading}" for heading in HEADINGS[1:]), "notes"]
    asked = about["settings"]["labels_per_class"]
    rows = [header, *(_row(outcome, asked) for outcome in outcomes)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    rows.insert(1, ["-" * width for width in widths])
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([*lines, "", _how(about, any(_has_fewer(outcome, asked) for outcome in outcomes))])


def as_json(about: dict[str, Any], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """All of it in plain values; what is infinite or no number is null."""
    tasks = [asdict(outcome) | {"beats_baselines": outcome.beats_baselines} for outcome in outcomes]
    return _plain(about | {"tasks": tasks})


def _how(about: dict[str, Any], has_fewer: bool) -> str:
    settings = about["settings"]
    parts = [
        f"percent; protocol {settings['protocol']}, {settings['seeds']} seeds (± their deviation), [95 % over "
        f"resampled test clips]; encoder {about['encoder_sha256'][:12]}, normalization {about['normalization']}"
    ]
    if settings["labels_per_class"]:
        most = "at most " if has_fewer else ""
        parts.append(f"{most}{settings['labels_per_class']} labels per class")
    if settings["shuffle_labels"]:
        parts.append("TRAINED ON SHUFFLED LABELS")
    return "; ".join(parts)


def _has_fewer(outcome: Outcome, asked: int | None) -> bool:
    """Whether some class has fewer training clips than were asked for."""
    return asked is not None and outcome.train_labels is not None and outcome.train_labels[0] < asked


def _row(outcome: Outcome, asked: int | None) -> list[str]:
    return [
        printable(outcome.task).replace("|", "/"),
        outcome.score,
        *(_score(outcome.scored.get(name)) for name in COLUMNS),
        *(_difference(outcome.compared.get(name)) for name in COLUMNS[1:]),
        "; ".join(_notes(outcome, asked)),
    ]


def _score(scored: Scored | None) -> str:
    if scored is None:
        return ""
    deviation = "" if scored.deviation is None else f" ± {100 * scored.deviation:.1f}"
    return f"{100 * scored.mean:.1f}{deviation} {_interval(scored.interval)}"


def _difference(compared: Compared | None) -> str:
    return "" if compared is None else f"{100 * compared.difference:+.1f} {_interval(compared.interval, '+')}"


def _interval(interval: Interval, sign: str = "") -> str:
    return f"[{100 * interval.low:{sign}.1f}, {100 * interval.high:{sign}.1f}]"


def _notes(outcome: Outcome, asked: int | None) -> list[str]:
    sizes = f"{outcome.num_train}+{outcome.num_valid}/{outcome.num_test} clips"
    notes = [sizes + (f", {outcome.num_folds} folds" if outcome.num_folds > 1 else "")]
    if outcome.official:
        notes.append(outcome.official)
    if outcome.score == "mAP" and outcome.judged_classes < outcome.num_classes:
        notes.append(f"mAP of {outcome.judged_classes} of {outcome.num_classes} classes, the others have no test clip")
    if _has_fewer(outcome, asked):
        fewest, most = outcome.train_labels[0], min(outcome.train_labels[1], asked)
        notes.append(f"{fewest if fewest == most else f'{fewest} to {most}'} of {asked} labels per class")
    if outcome.untrained_classes[0]:
        lacking, tested = outcome.untrained_classes
        notes.append(f"{lacking} of {tested} test classes have no training clip")
    if outcome.left_out:
        notes.append(f"{len(outcome.left_out)} unreadable left out")
    if outcome.not_finite:
        notes.append(f"{len(outcome.not_finite)} without a finite vector left out")
    if outcome.saturated:
        notes.append("saturated")
    return notes


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
