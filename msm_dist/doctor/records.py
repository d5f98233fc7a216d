"""What a run has recorded, as `msm-dist doctor` sees it: metrics.jsonl, the trace, and reports of what went wrong.

In: a run folder and the step that the next start takes. Out: findings. A start drops the lines past its checkpoint and
computes them anew, so that those are no fault; a line in the middle that is no record is one, as a start refuses it.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msm_dist.doctor.files import is_there, lines_of, names_in, read_plain, read_record
from msm_dist.doctor.findings import Finding, counted, some, word
from msm_dist.errors import DataError
from msm_dist.plain import shown

CLIPS_SHOWN = 4
REPORT_SHOWN = 600


@dataclass(frozen=True)
class Lines:
    """What a .jsonl file holds."""

    path: Path
    num_lines: int
    last_step: int
    """-1 without any."""
    last_trained: int
    """Step of the last line with a loss or a learning rate."""
    per_step: Counter[int]
    fault: int | None
    """Number of the first line that a start would refuse."""
    falls_at: int | None
    """Number of the first line of an earlier step than the one before it."""
    is_torn: bool


def read_lines(path: Path) -> Lines:
    """Read a .jsonl file through. Raises DataError."""
    count, last, trained = 0, -1, -1
    per_step: Counter[int] = Counter()
    fault = falls_at = None
    is_torn = False
    for line in lines_of(path):
        if line.is_torn:
            # What has no end is left out by every reader, whatever it holds.
            is_torn = True
            break
        count = line.number
        if line.record is None:
            fault = fault or line.number
            continue
        per_step[line.step] += 1
        if line.step < last:
            falls_at = falls_at or line.number
        last = max(last, line.step)
        if "lr" in line.record:
            trained = max(trained, line.step)
    return Lines(path, count, last, trained, per_step, fault, falls_at, is_torn)


def metrics_findings(path: Path, saved_step: int, log_every: int, is_alive: bool, goes_on: bool) -> Iterator[Finding]:
    """metrics.jsonl against the checkpoint at `saved_step` (0: none), from which the next start goes on if it does."""
    if not is_there(path):
        if saved_step:
            detail = f"there is no metrics.jsonl beside a checkpoint of step {saved_step}: the lines so far are lost"
            yield Finding("metrics", "warn", detail, "put a copy back before the next start; training does not need it")
        else:
            yield Finding("metrics", "ok", "nothing logged yet")
        return
    try:
        lines = read_lines(path)
    except DataError as error:
        yield Finding("metrics", "fail", str(error), f"{_aside(path)}: the run goes on without the lines so far")
        return
    yield from _shared_findings("metrics", lines)
    if lines.fault:
        return
    past = sum(count for step, count in lines.per_step.items() if step > saved_step)
    # The latest start's setting: an earlier one may have logged more seldom.
    missing_from = (lines.last_trained // log_every + 1) * log_every if lines.last_trained >= 0 else log_every
    if missing_from <= saved_step:
        detail = f"{lines.num_lines} lines to step {max(0, lines.last_step)}, the checkpoint is of step {saved_step}: "
        remedy = "put a copy back before the next start; training does not need it"
        yield Finding("metrics", "warn", f"{detail}those from step {missing_from} on are lost", remedy)
        return
    told = f"{counted(lines.num_lines, 'line')} to step {max(0, lines.last_step)}"
    if lines.is_torn:
        told += ", one being written" if is_alive else ", the last torn by a kill"
    if past and goes_on and not is_alive:
        told += f"; {past} past step {saved_step}, which the next start drops and computes anew"
    yield Finding("metrics", "ok", told)


def trace_findings(folder: Path, saved_step: int, global_batch: int) -> Iterator[Finding]:
    """The trace, a file for each rank: every sample of every traced step once, as far as it counts."""
    if not is_there(folder):
        return
    per_step: Counter[int] = Counter()
    whole = True
    try:
        for name in names_in(folder):
            if not (name.startswith("rank-") and name.endswith(".jsonl")):
                continue
            lines = read_lines(folder / name)
            yield from _shared_findings("trace", lines)
            whole &= lines.fault is None
            per_step += lines.per_step
    except DataError as error:
        yield Finding("trace", "fail", str(error), f"{_aside(folder)}, or train.trace=false")
        return
    counted = {step: count for step, count in per_step.items() if 0 < step <= saved_step}
    if not whole:
        return
    if not counted:
        yield Finding("trace", "ok", "no step up to the checkpoint is traced")
        return
    first = min(counted)
    wrong = [step for step in range(first, saved_step + 1) if counted.get(step, 0) != global_batch]
    if wrong:
        detail = (
            f"step {wrong[0]} has {counted.get(wrong[0], 0)} of {global_batch} samples"
            f"{f', and {len(wrong) - 1} other steps not theirs' if len(wrong) > 1 else ''}"
        )
        remedy = "nothing, for the training; as evidence it holds for the other steps only"
        yield Finding("trace", "warn", detail, remedy)
    else:
        yield Finding("trace", "ok", f"steps {first} to {saved_step}: {global_batch} samples each")


def _shared_findings(name: str, lines: Lines) -> Iterator[Finding]:
    if lines.fault:
        detail = f"{lines.path}: line {lines.fault} is no record with a step: a start refuses it"
        remedy = f"sed -i '{lines.fault}d' {word(lines.path)}, or {_aside(lines.path)}"
        yield Finding(name, "fail", detail, remedy)
    elif lines.falls_at:
        detail = f"{lines.path}: line {lines.falls_at} is of an earlier step than the line before: two runs wrote it?"
        yield Finding(name, "warn", detail, "never copy a lock.json or delete one of a run that is being written")


def skipped_findings(path: Path, allowed: int) -> Iterator[Finding]:
    """skipped.jsonl: updates that were left out."""
    if not is_there(path):
        return
    try:
        lines = read_lines(path)
    except DataError as error:
        yield Finding("skipped", "fail", str(error), _aside(path))
        return
    yield from _shared_findings("skipped", lines)
    if not lines.fault:
        steps = some(map(str, sorted(lines.per_step)), CLIPS_SHOWN)
        detail = f"{lines.num_lines} of at most {allowed} updates left out as they went wrong, at steps {steps}"
        yield Finding("skipped", "warn" if lines.num_lines else "ok", detail, f"look at the clips in {path}")


def diverged_findings(folder: Path, skipped_name: str) -> Iterator[Finding]:
    """diverged.json, where the latest start ended so."""
    path, started = folder / "diverged.json", folder / "environment.json"
    if not is_there(path):
        return
    try:
        report = read_record(path)
    except DataError as error:
        yield Finding("diverged", "warn", str(error), f"rm {word(path)}")
        return
    told = _reported(report)
    if _is_before(path, started):
        yield Finding("diverged", "ok", f"an earlier start did, the run was started again since ({told})")
        return
    remedy = (
        f"look at its clips (all in {path}), lower optim.lr with run.name=NEW, set optim.clip_norm, or allow some such "
        f"updates: optim.max_skipped_updates=10 with the same command ({skipped_name} lists them then)"
    )
    yield Finding("diverged", "fail", f"the latest start ended so: {told}", remedy)


def _reported(report: dict[str, Any]) -> str:
    said = [f"{name} {shown(report[name], 80)}" for name in ("step", "lr", "loss", "grad_norm") if name in report]
    if isinstance(reason := report.get("reason"), str):
        said.append(reason[:200])
    if isinstance(clips := report.get("clips"), list):
        said.append(f"clips {some([shown(clip, 80).strip(chr(39)) for clip in clips], CLIPS_SHOWN)}")
    return ", ".join(said) or "nothing of ours in it"


def hang_findings(folder: Path) -> Iterator[Finding]:
    """hang/report.txt, where a start ended as a rank stood still."""
    path, started = folder / "hang" / "report.txt", folder / "environment.json"
    try:
        if "report.txt" not in names_in(path.parent):
            return
        told = " ".join(read_plain(path).decode(errors="replace").split())[:REPORT_SHOWN]
    except DataError as error:
        yield Finding("hang", "warn", str(error), f"rm -r {word(path.parent)}")
        return
    if _is_before(path, started):
        yield Finding("hang", "ok", f"an earlier start did, the run was started again since ({path})")
        return
    remedy = f"start it again; if it hangs there once more, {path.parent}/rank-*.txt say where each rank stood"
    yield Finding("hang", "warn", f"the latest start ended so: {told}", remedy)


def _aside(path: Path) -> str:
    """The command that renames what is damaged."""
    return f"mv {word(path)} {word(f'{path}.old')}"


def _is_before(report: Path, started: Path) -> bool:
    """Whether a report is of a start before the latest one."""
    return is_there(started) and report.lstat().st_mtime < started.lstat().st_mtime
