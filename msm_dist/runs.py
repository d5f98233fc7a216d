"""The table of the runs below a folder: `msm-dist runs`.

In: a folder, whose run folders `msm_dist.traces` reads, and what Slurm says of their jobs. Out: a `Run` for each, and
text. Raises ConfigError where there is no such folder.

States: `finished` (all steps done, weights exported), `running` (its owner lives, or Slurm runs its job), `queued`
(Slurm's reason beside it), `stopped` (not running, goes on from a checkpoint), `diverged`, `failed` (its job failed, or
it ended before anything was saved), `never started` (submitted, but Slurm refused or has no such job), `submitted`
(Slurm could not be asked).
"""

import json
import math
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from msm_dist import jobs
from msm_dist.errors import ConfigError
from msm_dist.jobs import Job, Jobs
from msm_dist.traces import Traces, run_folders, traces

INTERRUPTED = {75, 128 + 2, 128 + 15}
"""Exit codes of a run that was told to save and stop."""
FAILURES = {"FAILED", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "DEADLINE"}
COLORS = {"finished": "green", "running": "cyan", "queued": "yellow", "stopped": "blue"}
HEADINGS = ("run", "state", "job", "step", "loss", "valid loss", "clips/s", "last line")


@dataclass(frozen=True)
class Run:
    """A row of the table; None where nothing tells."""

    run: str
    """Path below the folder that was looked through."""
    state: str
    note: str
    """What there is to say of the state, such as Slurm's reason."""
    job: str | None
    step: int | None
    total_steps: int | None
    loss: float | None
    valid_loss: float | None
    clips_per_second: float | None
    age_seconds: float | None
    """Time since metrics.jsonl was written to."""


def show_runs(root: Path, as_json: bool = False) -> None:
    """Print all runs below `root`: a table, in colours on a terminal, or a JSON object on each line.

    What Slurm did not tell is said below the table, beside JSON on stderr. Raises ConfigError when there is no `root`.
    """
    runs, complaints = find_runs(root)
    if as_json:
        for run in runs:
            print(json.dumps({name: _finite(value) for name, value in asdict(run).items()}))
    elif runs:
        print(_table(runs, sys.stdout.isatty()))
    else:
        print(f"no runs below {_printable(str(root))}: no folder there has a config.yaml or a submission/")
    for complaint in complaints:
        print(f"note: {_printable(complaint)}; the rest is from the files", file=sys.stderr if as_json else sys.stdout)


def find_runs(root: Path) -> tuple[list[Run], list[str]]:
    """All runs below `root` by name, and what could not be learnt from Slurm. Raises ConfigError."""
    if not root.is_dir():
        raise ConfigError(f"{root}: no such folder; give the one that holds the run folders (run.dir)")
    now = time.time()
    found = {folder: traces(folder, now) for folder in run_folders(root)}
    numbers = {number for seen in found.values() for number in seen.numbers}
    queue = jobs.waiting_and_running() if numbers else Jobs()
    gone = {n for seen in found.values() if not seen.is_alive for n in seen.numbers} - queue.by_number.keys()
    past = jobs.ended(gone) if gone else Jobs()
    runs = [_run(root, folder, seen, queue, past, now) for folder, seen in found.items()]
    complaints = [told.complaint for told in (queue, past) if told.complaint]
    return sorted(runs, key=lambda run: _natural(run.run)), complaints


def _run(root: Path, folder: Path, seen: Traces, queue: Jobs, past: Jobs, now: float) -> Run:
    active = next((number for number in seen.numbers if number in queue.by_number), None)
    number = active or next(iter(seen.numbers), None)
    if seen.is_alive:
        number = seen.owner_number
        active = number if active == number else None  # a job that waits for the owner to end says nothing of it
    state, note = _state(seen, queue.by_number.get(active or ""), queue, past)
    known = queue.by_number.get(number or "") or past.by_number.get(number or "")
    return Run(
        run=_printable(str(folder.relative_to(root)) if folder != root else root.resolve().name),
        state=state,
        note=_printable(note),
        job=_printable((known.name if known else number) or seen.local_job or "") or None,
        step=seen.step,
        total_steps=seen.total_steps,
        loss=seen.loss,
        valid_loss=seen.valid_loss,
        clips_per_second=seen.clips_per_second,
        age_seconds=None if seen.logged is None else max(0.0, now - seen.logged),
    )


def _state(seen: Traces, job: Job | None, queue: Jobs, past: Jobs) -> tuple[str, str]:
    """State and note of a run, by what is surest; `job` is the one of the queue that runs it or will."""
    if job and job.state in jobs.QUEUED:
        return "queued", job.reason
    is_active = job is not None and job.state in jobs.ACTIVE
    if seen.is_alive:
        return "running", job.state.lower() if is_active and job.state != "RUNNING" else ""
    if seen.is_exported and seen.step is not None and seen.step == seen.total_steps:
        return "finished", ""
    if seen.diverged_step is not None:
        return "diverged", f"at step {seen.diverged_step}" if seen.diverged_step >= 0 else ""
    tells = [number for number in seen.numbers if number != seen.left_number or seen.is_locked]
    if is_active and any(queue.by_number.get(number) is job for number in tells):
        return "running", "" if job.state == "RUNNING" else job.state.lower()
    end = _end(seen, past)
    notes = [_in_words(end)] if end else ["killed"] if seen.is_locked else []
    if seen.is_begun:
        notes.append("nothing saved" if seen.saved_step is None else f"saved at step {seen.saved_step}")
        has_failed = end is not None and end.state in FAILURES and end.exit_code not in INTERRUPTED
        return "failed" if has_failed or seen.saved_step is None else "stopped", ", ".join(notes)
    if end:
        return "failed", ", ".join([*notes, "never started"])
    is_unknown = queue.answered if seen.numbers else seen.local_job is None  # without any number sbatch refused it
    return ("never started" if is_unknown else "submitted"), ""


def _end(seen: Traces, past: Jobs) -> Job | None:
    """How the run's job ended, unless the run was started again since."""
    for number in seen.numbers:
        job = past.by_number.get(number)
        if job and (job.ended is None or seen.started is None or job.ended >= int(seen.started)):
            return job
    return None


def _in_words(end: Job) -> str:
    return end.state.lower().replace("_", " ") + (f" with exit code {end.exit_code}" if end.exit_code else "")


def _table(runs: Sequence[Run], is_terminal: bool) -> str:
    rows = [_cells(run) for run in runs]
    if not is_terminal:
        widths = [max(map(len, column)) for column in zip(HEADINGS, *rows, strict=True)]
        lines = (
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [HEADINGS, *rows]
        )
        return "\n".join(line.rstrip() for line in lines)
    # Imported here: a quarter of the time of the whole command, for nothing in a pipe.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    for number, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if number > 2 else "left", overflow="fold")
    for run, row in zip(runs, rows, strict=True):
        color = COLORS.get(run.state, "red")
        table.add_row(*(Text(cell, style=color if number == 1 else "") for number, cell in enumerate(row)))
    console = Console()
    with console.capture() as captured:
        console.print(table)
    return captured.get().rstrip("\n")


def _cells(run: Run) -> tuple[str, ...]:
    step, total = ("?" if value is None else str(value) for value in (run.step, run.total_steps))
    return (
        run.run,
        f"{run.state} ({run.note})" if run.note else run.state,
        run.job or "-",
        f"{step}/{total}",
        "-" if run.loss is None else f"{run.loss:.4f}",
        "-" if run.valid_loss is None else f"{run.valid_loss:.4f}",
        "-" if run.clips_per_second is None else f"{run.clips_per_second:,.1f}",
        "-" if run.age_seconds is None else _duration(run.age_seconds),
    )


def _duration(seconds: float) -> str:
    """In the largest unit that it fills."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _finite(value: Any) -> Any:
    """JSON has no word for NaN and infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _natural(name: str) -> list[tuple[int, int, str]]:
    """A key that puts 96 before 208, as one would by hand."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"([0-9]{1,18})", name)]


def _printable(text: str) -> str:
    """Without what would move the cursor or change the colours of a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
