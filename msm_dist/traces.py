"""What a run folder tells those who only look: where its run stands, and who holds it.

In: folders. Out: `Traces` of each run folder. Everything is read as other people's files: regular files only, bounded
parts of them, a link's target once; what is damaged counts as missing. Nothing is written, nothing fails.
"""

import json
import math
import os
import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from msm_dist.engine.runfolder import DEAD_AFTER_SECONDS
from msm_dist.files import open_regular
from msm_dist.jobs import NUMBER

DEEPEST = 8
NOT_LOOKED_THROUGH = {"code", "checkpoints", "submission", "tensorboard"}
LARGEST_FILE = 2**20
DEEPEST_SETTING = 20
TAIL_BYTES = (2**16, 2**20)
# The same as SafeLoader, in C: ten times as quick.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Traces:
    """What a run folder holds of the run's state; None where it does not tell."""

    step: int | None
    """Of the last line of metrics.jsonl, else of the newest checkpoint."""
    total_steps: int | None
    loss: float | None
    valid_loss: float | None
    clips_per_second: float | None
    logged: float | None
    """When metrics.jsonl was last written to (this and other moments as Unix time)."""
    started: float | None
    """When the latest start recorded itself."""
    saved_step: int | None
    """Of the newest complete checkpoint."""
    diverged_step: int | None
    """Set when the latest start ended so; -1 for a report without a step."""
    is_exported: bool
    is_begun: bool
    """Whether any start got as far as to lock the folder."""
    is_locked: bool
    is_alive: bool
    """Whether the owner of the lock lives: by its process here, by its heartbeat elsewhere."""
    owner_number: str | None
    """Number of the Slurm job that the owner of the lock is."""
    numbers: tuple[str, ...]
    """Numbers of Slurm jobs that may run it: that of the lock, of the latest start, of the submission."""
    left_number: str | None
    """The one of them that only the latest start tells of: it may be an interactive job, which outlives the run."""
    local_job: str | None
    """What a submission without Slurm calls its job."""


def run_folders(folder: Path, depth: int = 0, seen: set[tuple[int, int]] | None = None) -> Iterator[Path]:
    """The run folders at and below `folder`, each once whatever the links, down to 8 folders below it.

    A run folder has a config.yaml or a submission/; where that holds sweep.json, it is a sweep's, which holds runs.
    """
    seen = set() if seen is None else seen
    try:
        status = folder.stat()
        if (status.st_dev, status.st_ino) in seen:
            return
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            is_folder = {entry.name: _is_folder(entry) for entry in entries}
    except OSError:
        return
    is_submitted = is_folder.get("submission", False) and _changed(folder / "submission" / "sweep.json") is None
    if is_folder.get("config.yaml") is False or is_submitted:
        yield folder
    elif depth < DEEPEST:
        for name in sorted(name for name, is_one in is_folder.items() if is_one):
            if name not in NOT_LOOKED_THROUGH and not name.startswith("."):
                yield from run_folders(folder / name, depth + 1, seen)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def traces(folder: Path, now: float) -> Traces:
    """Read a run folder, at the moment `now`."""
    submitted = folder / "submission"
    settings = _read_yaml(folder / "config.yaml") or _read_yaml(submitted / "config.yaml")
    # Fine-tuning has a task, and always validates.
    is_validated = _setting(settings, "data", "valid_shards") or _setting(settings, "data", "task")
    trained, validated, step = _last_lines(folder / "metrics.jsonl", is_validated)
    saved = _newest_checkpoint(folder / "checkpoints")
    heartbeat, started, fell = (_changed(folder / f"{name}.json") for name in ("lock", "environment", "diverged"))
    owner, environment = _read_json(folder / "lock.json"), _read_json(folder / "environment.json")
    submission, diverged = _read_json(submitted / "submission.json"), _read_json(folder / "diverged.json")
    by_slurm = submission if submission.get("cluster", "slurm") == "slurm" else {}
    held, begun, submitted_as = map(_job_number, (owner, environment, by_slurm))
    numbers = dict.fromkeys(filter(None, (held, begun, submitted_as)))
    is_diverged = fell is not None and (started is None or fell >= started)
    return Traces(
        step=saved if step is None else step,
        total_steps=_total_steps(settings, _read_json(folder / "plan.json")),
        loss=_number(trained.get("loss")),
        valid_loss=_number(validated.get("valid_loss")),
        clips_per_second=_number(trained.get("clips_per_second")),
        logged=_changed(folder / "metrics.jsonl"),
        started=started,
        saved_step=saved,
        diverged_step=(_whole(diverged.get("step")) or -1) if is_diverged else None,
        is_exported=any(map(_is_exported, (folder / "export", folder / "export" / "classifier"))),
        is_begun=any(_changed(folder / name) for name in ("config.yaml", "metrics.jsonl", "lock.json")),
        is_locked=heartbeat is not None,
        is_alive=heartbeat is not None and _is_alive(owner, now - heartbeat),
        owner_number=held,
        numbers=tuple(numbers),
        left_number=None if begun in (held, submitted_as) else begun,
        local_job=None if by_slurm else _text(submission.get("job")),
    )


def _is_alive(owner: Mapping[str, Any], age: float) -> bool:
    """As a second start would judge it, but by this machine's clock, as nothing is written here."""
    pid = owner.get("pid")
    if owner.get("host") != socket.gethostname() or not isinstance(pid, int):
        return age < DEAD_AFTER_SECONDS
    # The fields after the command's name, which may hold anything: state first, start time twentieth.
    fields = _read(Path(f"/proc/{pid}/stat")).rpartition(b")")[2].split()
    return len(fields) > 19 and fields[0] != b"Z" and fields[19].decode() == owner.get("started")


def _total_steps(settings: Mapping[str, Any], plan: Mapping[str, Any]) -> int | None:
    """As `open_corpus` counts them: from train.steps, or epochs of the clips that the plan was recorded with."""
    steps, epochs = (_setting(settings, "train", name) for name in ("steps", "epochs"))
    if steps is not None:
        return _whole(steps)
    factors = [epochs, plan.get("clips_per_epoch"), _setting(settings, "data", "crops_per_clip") or 1]
    numbers = [_number(value) for value in (*factors, _setting(settings, "train", "global_batch"))]
    if any(number is None or not 0 < number < 2**53 for number in numbers):
        return None
    epochs, clips, crops, batch = numbers
    return math.ceil(epochs * (clips * crops / batch))


def _is_exported(folder: Path) -> bool:
    return all(_changed(folder / name) for name in ("config.json", "model.safetensors"))


def _last_lines(path: Path, is_validated: Any) -> tuple[dict[str, Any], dict[str, Any], int | None]:
    """The last training line, the last validation line (both {} when not in the file's tail) and the last step."""
    for size in TAIL_BYTES:
        tail = _read(path, size, from_end=True)
        # A line without its end is being written, or was torn; so may the first be, by the cut.
        lines = tail.split(b"\n")[:-1]
        trained = _last_with(lines, "loss")
        validated = _last_with(lines, "valid_loss") if is_validated else {}
        if len(tail) < size or (trained and (validated or not is_validated)):
            break
    steps = [step for line in (trained, validated) if (step := _whole(line.get("step"))) is not None]
    return trained, validated, max(steps, default=None)


def _last_with(lines: list[bytes], name: str) -> dict[str, Any]:
    mark = f'"{name}"'.encode()
    for line in reversed(lines):
        if mark in line and name in (record := _record(line)):
            return record
    return {}


def _newest_checkpoint(root: Path) -> int | None:
    try:
        names = os.listdir(root)
    except OSError:
        return None
    steps = sorted(int(name[5:]) for name in names if re.fullmatch(r"step-[0-9]{8,18}", name))
    return next((step for step in reversed(steps) if _changed(root / f"step-{step:08d}" / "complete")), None)


def _read(path: Path, size: int = LARGEST_FILE, from_end: bool = False) -> bytes:
    """At most `size` bytes of a regular file, of its end if asked; nothing of anything else, a pipe for one."""
    try:
        with open_regular(path) as file:
            if from_end:
                file.seek(max(0, os.fstat(file.fileno()).st_size - size))
            return file.read(size)
    except (OSError, ValueError):
        return b""


def _read_json(path: Path) -> dict[str, Any]:
    return _record(_read(path))


def _record(text: bytes) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = _read(path)
        depth = 0
        for event in yaml.parse(text, Loader=LOADER):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST_SETTING:
                return {}  # the loader in C would overrun its stack
        settings = yaml.load(text, Loader=LOADER)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _setting(settings: Mapping[str, Any], section: str, name: str) -> Any:
    part = settings.get(section)
    return part.get(name) if isinstance(part, dict) else None


def _job_number(record: Mapping[str, Any]) -> str | None:
    text = _text(record.get("job"))
    return text if text and NUMBER.fullmatch(text) else None


def _text(value: Any) -> str | None:
    return str(value)[:40] if isinstance(value, str | int) else None


def _whole(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 2**63 else None


def _number(value: Any) -> float | None:
    return (
        float(value) if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300 else None
    )


def _changed(path: Path) -> float | None:
    """When a file was last written to; None when there is none."""
    try:
        return path.stat().st_mtime
    except OSError:
        return None
