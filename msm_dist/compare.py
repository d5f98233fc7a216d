"""Does a run do what a reference run did? The check behind `msm-dist compare RUN REFERENCE`.

In: two folders with config.yaml, metrics.jsonl and environment.json (a run folder is one). Out: a table. What
decides: the same settings but for places and execution, the same number of steps, and losses within a
tolerance. Speed and environment are shown, not judged. Fails with Mismatch, which holds the table and every
disagreement, and with the errors of unreadable files.
"""

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from msm_dist.config import flat_settings, is_finetuning, load_config
from msm_dist.data.mix import count_places
from msm_dist.errors import ConfigError, DataError, MsmError
from msm_dist.monitor import read_metrics
from msm_dist.plain import parse_json
from msm_dist.settings import flat_items

TOLERANCE = 0.05
SMOOTHED_POINTS = 5
STEPS_SHOWN = 8
PLACES = ("run.", "data.shards", "data.valid_shards")
EXECUTION = (
    "data.num_workers",
    "data.read_timeout_seconds",
    "data.read_retries",
    "data.connections",
    "data.allow_pipe",
    "data.verify",
    "model.backend",
    "train.micro_batch",
    "train.log_every",
    "train.pictures_every",
    "train.trace",
    "checkpoint.",
    "engine.",
    "probe.",
)


class Mismatch(MsmError):
    """A run is not the reference: the message holds the table and what disagrees."""


@dataclass(frozen=True)
class Record:
    """What a folder tells of a run."""

    folder: Path
    settings: dict[str, Any]
    mix: dict[str, float] | None
    """data.mix, of which settings have the weights alone."""
    environment: dict[str, Any]
    train: dict[int, dict[str, float]]
    """Metric lines by step, and below those of validation."""
    valid: dict[int, dict[str, float]]

    @property
    def last_step(self) -> int:
        return max(self.train)


def compare(run: Path, reference: Path, tolerance: float = TOLERANCE) -> str:
    """The table of a run that agrees with the reference.

    Judged are the training loss, a trailing mean over 5 logged points, at every step that both logged, and
    the last valid_loss: relative differences up to `tolerance`. Raises Mismatch, DataError, ConfigError.
    """
    ours, theirs = read_record(run), read_record(reference)
    steps = sorted(ours.train.keys() & theirs.train.keys())
    faults = [*_setting_faults(ours, theirs), *_length_faults(ours, theirs, steps)]
    lines = [_row("", str(run), str(reference), "difference")]
    lines.append(_row("last step", ours.last_step, theirs.last_step))
    if steps:
        lines += _loss_rows(ours, theirs, steps)
        faults += _loss_faults(ours, theirs, steps, tolerance)
        lines += _speed_rows(ours, theirs, steps)
    lines += _difference_rows("environment", ours.environment, theirs.environment)
    lines += _difference_rows("setting", *(_only(record.settings, EXECUTION) for record in (ours, theirs)))
    table = "\n".join(lines)
    if faults:
        listed = "\n".join(f"  {fault}" for fault in faults)
        raise Mismatch(f"{run} is not the run of {reference}:\n{table}\nWhat disagrees:\n{listed}")
    return f"{table}\nthe same run, within {tolerance:.0%}"


def read_record(folder: Path) -> Record:
    """Read a run folder's config.yaml, metrics.jsonl, environment.json. Raises ConfigError, DataError."""
    if is_finetuning(folder / "config.yaml"):
        raise ConfigError(
            f"{folder}: a fine-tuned run; compare takes runs of pre-training. What this one reached is in "
            f"{folder / 'results.json'}"
        )
    cfg = load_config(folder / "config.yaml")
    settings = flat_settings(cfg.model_dump(mode="json"))
    lines = read_metrics(folder / "metrics.jsonl")
    train = {line["step"]: line for line in lines if "loss" in line}
    if not train:
        raise DataError(f"{folder / 'metrics.jsonl'}: no training loss in it; let the run log a step first")
    valid = {line["step"]: line for line in lines if "valid_loss" in line}
    for line in (*train.values(), *valid.values()):
        if not all(isinstance(value, int | float) for value in line.values()):
            raise DataError(
                f"{folder / 'metrics.jsonl'}: step {line['step']} holds something that is no number; restore it"
            )
    path = folder / "environment.json"
    try:
        environment = flat_items(parse_json(path.read_bytes()))
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: can't be read ({error}); a run writes it when it starts") from None
    environment.pop("started", None)
    environment.pop("job", None)
    return Record(folder, settings, cfg.data.mix, environment, train, valid)


def _setting_faults(ours: Record, theirs: Record) -> Iterator[str]:
    for name, mine, other in _differences(ours.settings, theirs.settings):
        if name == "data.mix" and mine and other and _same_places(mine, other):
            continue
        if not name.startswith(PLACES + EXECUTION):
            yield (
                f"{name} = {mine!r}: the reference has {other!r}; run with {_as_override(name, theirs)}, or compare "
                "with a run of these settings"
            )


def _same_places(mine: Sequence[float], other: Sequence[float]) -> bool:
    """Whether the weights of two mixes come to the same order."""
    try:
        return len(mine) == len(other) and count_places(mine, mine) == count_places(other, other)
    except ConfigError:
        return False


def _as_override(name: str, record: Record) -> str:
    """What to type for a setting of a record."""
    value = record.mix if name == "data.mix" else record.settings.get(name)
    text = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True, width=math.inf)
    word = shlex.quote(f"{name}={text.removesuffix(chr(10)).removesuffix('...').strip()}")
    return f"data.shards=null {word}" if name == "data.mix" and value else word


def _length_faults(ours: Record, theirs: Record, steps: Sequence[int]) -> Iterator[str]:
    if ours.last_step < theirs.last_step:
        yield (
            f"the run ends at step {ours.last_step}, the reference at {theirs.last_step}; the same command "
            "again finishes it"
        )
    elif ours.last_step > theirs.last_step:
        yield (
            f"the run ends at step {ours.last_step}, the reference at {theirs.last_step}; compare with a "
            "longer reference"
        )
    if not steps:
        yield (
            "no step was logged by both; log as often as the reference did: "
            f"train.log_every={theirs.settings['train.log_every']}"
        )


def _loss_faults(ours: Record, theirs: Record, steps: Sequence[int], tolerance: float) -> Iterator[str]:
    mine, other = (_smoothed(record, steps) for record in (ours, theirs))
    apart = [step for step in steps if not _relative(mine[step], other[step]) <= tolerance]
    if apart:
        yield (
            f"training loss, smoothed: {mine[apart[0]]:.6f} at step {apart[0]}, the reference has "
            f"{other[apart[0]]:.6f}; at most {tolerance:.0%} apart (exceeded at {len(apart)} of {len(steps)} "
            "steps). Look for a change of data, model or optimiser since"
        )
    if not theirs.valid:
        return
    last = max(theirs.valid)
    if last not in ours.valid:
        yield (
            f"valid_loss: the run has none at step {last}, the reference has; give data.valid_shards and "
            "the reference's train.valid_every"
        )
        return
    mine, other = ours.valid[last]["valid_loss"], theirs.valid[last]["valid_loss"]
    if not _relative(mine, other) <= tolerance:
        yield (
            f"valid_loss: {mine:.6f} at step {last}, the reference has {other:.6f}; at most {tolerance:.0%} "
            "apart. See first whether the reference_ rows agree: they show the validation data alone"
        )


def _loss_rows(ours: Record, theirs: Record, steps: Sequence[int]) -> Iterator[str]:
    stride = -(-len(steps) // STEPS_SHOWN)
    for step in sorted({*steps[::stride], steps[-1]}):
        yield _loss_row(f"loss, step {step}", ours.train[step]["loss"], theirs.train[step]["loss"])
    mine, other = (_smoothed(record, steps)[steps[-1]] for record in (ours, theirs))
    yield _loss_row("loss, smoothed, last", mine, other)
    for step in sorted(ours.valid.keys() & theirs.valid.keys())[-1:]:
        for name in [name for name in ours.valid[step] if name in theirs.valid[step] and name != "step"]:
            yield _loss_row(f"{name}, step {step}", ours.valid[step][name], theirs.valid[step][name])
    apart = [step for step in steps if ours.train[step]["loss"] != theirs.train[step]["loss"]]
    verdict = f"differ from step {apart[0]} on" if apart else f"bit-equal at all {len(steps)} logged steps"
    yield _row("training losses", verdict)


def _speed_rows(ours: Record, theirs: Record, steps: Sequence[int]) -> Iterator[str]:
    rates = [
        [record.train[step]["clips_per_second"] for step in steps if "clips_per_second" in record.train[step]]
        for record in (ours, theirs)
    ]
    if all(rates):
        mine, other = map(median, rates)
        yield _row("clips/s, median", f"{mine:.1f}", f"{other:.1f}", f"x {mine / other:.2f}")


def _difference_rows(label: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[str]:
    for name, mine, other in _differences(ours, theirs):
        yield _row(f"{label} {name}", mine, other)


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    names = dict.fromkeys([*ours, *theirs])
    return [(name, ours.get(name), theirs.get(name)) for name in names if ours.get(name) != theirs.get(name)]


def _smoothed(record: Record, steps: Sequence[int]) -> dict[int, float]:
    """Trailing mean of the loss over the last few of `steps`."""
    losses = [record.train[step]["loss"] for step in steps]
    windows = [losses[max(0, end - SMOOTHED_POINTS) : end] for end in range(1, len(losses) + 1)]
    return {step: sum(window) / len(window) for step, window in zip(steps, windows, strict=True)}


def _only(settings: Mapping[str, Any], prefixes: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name.startswith(prefixes)}


def _relative(mine: float, other: float) -> float:
    if mine == other:
        return 0.0
    return abs(mine - other) / abs(other) if other else math.inf


def _loss_row(label: str, mine: float, other: float) -> str:
    return _row(label, f"{mine:.6f}", f"{other:.6f}", f"{_relative(mine, other):.3%}")


def _row(label: str, *cells: object) -> str:
    return "  ".join([f"{label:<36}", *(f"{cell!s:<24}" for cell in cells)]).rstrip()
