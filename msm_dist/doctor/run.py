"""`msm-dist doctor RUN`: whether a run can go on, from where, by which command, and what is wrong with its folder.

In: a run folder, of pre-training or of fine-tuning, which may be anybody's. Out: findings. Nothing in it is changed, no
code in it runs, no link in it is followed; of what config.yaml names, corpora are opened by their index, but no shell
command is run for them.
"""

import math
import platform
import re
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from msm_dist.config import Config, parse_config
from msm_dist.data.clips import Progress
from msm_dist.doctor import checkpoints
from msm_dist.doctor.checkpoints import Seen, State, look_at, next_start, place_fault
from msm_dist.doctor.corpus import corpus_findings
from msm_dist.doctor.export import export_findings
from msm_dist.doctor.files import is_there, read_plain, read_record
from msm_dist.doctor.findings import Finding, word
from msm_dist.doctor.records import diverged_findings, hang_findings, metrics_findings, skipped_findings, trace_findings
from msm_dist.doctor.resumption import command_to_continue
from msm_dist.engine.meta import PretrainingMeta, RunMeta
from msm_dist.engine.runfolder import DEAD_AFTER_SECONDS
from msm_dist.errors import ConfigError, DataError, MsmError
from msm_dist.evaluate.finetune_config import FinetuneConfig
from msm_dist.plain import parse_yaml, shown
from msm_dist.settings import validated

PACKAGE = re.compile(r"[a-z0-9][a-z0-9-]{0,40}")


@dataclass
class Look:
    """What has been found out about a run so far."""

    folder: Path
    cfg: Config | FinetuneConfig | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    is_alive: bool = False
    seen: list[Seen] = field(default_factory=list)
    start: Seen | None = None
    """The checkpoint that the next start takes; None: from step 0."""
    total_steps: int | None = None
    is_exported: bool = False
    is_stuck: bool = False
    """Whether a start ends at the checkpoints."""
    has_failed: bool = False

    @property
    def step(self) -> int:
        return self.start.step if self.start else 0

    @property
    def is_finished(self) -> bool:
        return self.is_exported and self.total_steps is not None and self.step >= self.total_steps


def examine_run(folder: Path, quick: bool, progress: Progress) -> Iterator[Finding]:
    """The findings of a run folder, in the order in which a start would meet them."""
    look = Look(folder)
    for check in (_settings, _lock):
        yield from _noted(look, check(look))
    failed_before, look.has_failed = look.has_failed, False
    yield from _noted(look, _checkpoints(look, quick, progress))
    look.is_stuck, look.has_failed = look.has_failed, look.has_failed or failed_before
    look.total_steps = _total_steps(look)
    exported = list(export_findings(folder, look.start, look.total_steps, quick))
    look.is_exported = any(finding.status == "ok" for finding in exported)
    for check in (_environment, _records, lambda look: _corpus(look, quick), lambda look: iter(exported), _room):
        yield from _noted(look, check(look))
    yield _outcome(look)


def _noted(look: Look, findings: Iterator[Finding]) -> Iterator[Finding]:
    for finding in findings:
        look.has_failed |= finding.status == "fail"
        yield finding


def _settings(look: Look) -> Iterator[Finding]:
    path = look.folder / "config.yaml"
    try:
        if not is_there(path):
            raise DataError(f"{path}: is not there, and without it nothing tells what run this is")
        look.cfg = read_settings(path)
    except MsmError as error:
        remedy = "put it back from a copy, or from submission/config.yaml; in another version's, change what is named"
        yield Finding("settings", "fail", str(error), remedy)
        return
    kind = "fine-tuning" if isinstance(look.cfg, FinetuneConfig) else "pre-training"
    if look.cfg.run.name != look.folder.resolve().name:
        detail = f"config.yaml is that of run.name={look.cfg.run.name}, the folder is called {look.folder.name}"
        command = f"mv {word(look.folder)} {word(look.folder.parent / look.cfg.run.name)}"
        yield Finding("settings", "fail", detail, command)
    else:
        yield Finding("settings", "ok", f"{kind}, valid for this version")


def read_settings(path: Path) -> Config | FinetuneConfig:
    """A recorded configuration, which extends no other file. Raises DataError, ConfigError."""
    try:
        values = parse_yaml(read_plain(path).decode("utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not valid YAML ({error})") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path}: must hold settings as `section:` with `key: value` below it")
    data = values.get("data")
    if isinstance(data, dict) and "task" in data:
        return validated(FinetuneConfig, values, str(path), lambda cfg: ())
    return parse_config(values, str(path))


def _lock(look: Look) -> Iterator[Finding]:
    path = look.folder / "lock.json"
    if not is_there(path):
        yield Finding("lock", "ok", "none: no process is writing here")
        return
    try:
        owner = read_record(path)
        age = time.time() - path.lstat().st_mtime
    except (DataError, OSError) as error:
        yield Finding("lock", "fail", f"not a lock of ours ({error})", f"rm {word(path)}, if no run writes here")
        return
    told = f"process {shown(owner.get('pid'), 20)} on {shown(owner.get('host'), 80)}"
    told += f", job {shown(owner['job'], 40)}" if owner.get("job") else ""
    if owner.get("host") == socket.gethostname():
        look.is_alive = _lives(owner)
        detail = f"{told}, this machine: {'it lives' if look.is_alive else 'it has ended'}"
    else:
        look.is_alive = age < DEAD_AFTER_SECONDS
        detail = f"{told}: its last heartbeat was {max(0, age):.0f} s ago"
    if look.is_alive:
        yield Finding("lock", "ok", f"being written by {detail}")
    else:
        yield Finding("lock", "ok", f"left by {detail}; the next start takes it over")


def _lives(owner: dict[str, Any]) -> bool:
    """Whether a process of this machine is the one that wrote the lock: it has the same start time."""
    pid = owner.get("pid")
    if type(pid) is not int or not 0 < pid < 2**31:
        return False
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return False
    return len(fields) > 19 and fields[0] != "Z" and fields[19] == owner.get("started")


def _checkpoints(look: Look, quick: bool, progress: Progress) -> Iterator[Finding]:
    root = look.folder / "checkpoints"
    try:
        look.seen = look_at(root, quick, progress, PretrainingMeta if isinstance(look.cfg, Config) else RunMeta)
    except DataError as error:
        remedy = f"the folder itself in place of {root}; runs on another disk: run.dir=FOLDER"
        yield Finding("checkpoints", "fail", str(error), remedy)
        return
    yield from checkpoints.findings(look.seen, look.is_alive)
    decisive = next_start(look.seen)
    look.start = decisive if decisive and decisive.state is State.GOOD else None
    if look.start and look.start.saved and look.cfg:
        fault = place_fault(look.start.saved, _blocks_per_step(look.cfg))
        if fault:
            aside = look.start.folder.with_name(f"{look.start.folder.name}.other")
            remedy = f"mv {word(look.start.folder)} {word(aside)}, to go on from the one before"
            yield Finding(look.start.folder.name, "fail", f"a start ends here: {fault}", remedy)
    if not look.seen:
        yield Finding("checkpoints", "ok", "none yet: a start begins at step 0")


def _blocks_per_step(cfg: Config | FinetuneConfig) -> int:
    if isinstance(cfg, FinetuneConfig):
        return cfg.train.global_batch
    return cfg.train.global_batch // cfg.data.block


def _environment(look: Look) -> Iterator[Finding]:
    """What would keep the steps to come from being those of an undisturbed run, to the last bit."""
    path = look.folder / "environment.json"
    if not is_there(path):
        yield Finding("environment", "note", "no environment.json: what the run ran on can't be found out")
        return
    try:
        look.environment = read_record(path)
    except DataError as error:
        remedy = f"rm {word(path)}: the next start writes it"
        yield Finding("environment", "warn", str(error), remedy)
        return
    if look.is_finished:
        return
    differences = [
        f"{name} {shown(then, 60)} then, {shown(now, 60)} here"
        for name, then, now in _differences(look.environment)
        if then != now
    ]
    world = look.environment.get("world_size")
    if differences:
        detail = f"{'; '.join(differences)}: the run goes on, but not bit-equal to one on what it began with"
        remedy = "for equal bits, continue it there, or install those versions"
        yield Finding("environment", "warn", detail, remedy)
    else:
        detail = f"versions and device are those of the latest start; it had world size {shown(world, 20)}"
        yield Finding("environment", "ok", detail)


def _differences(then: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    yield "python", then.get("python"), platform.python_version()
    versions = then.get("versions")
    # Those that the run wrote down, which may be another version's choice.
    for name in [name for name in versions if PACKAGE.fullmatch(name)] if isinstance(versions, dict) else []:
        try:
            now = metadata.version(name)
        except metadata.PackageNotFoundError:
            now = None
        yield name, versions[name], now
    yield "cuda", then.get("cuda"), torch.version.cuda
    here = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    yield "device", then.get("device"), here


def _records(look: Look) -> Iterator[Finding]:
    cfg, folder = look.cfg, look.folder
    log_every = cfg.train.log_every if cfg else 1
    yield from metrics_findings(folder / "metrics.jsonl", look.step, log_every, look.is_alive, not look.is_stuck)
    if cfg:
        yield from trace_findings(folder / "trace", look.step, cfg.train.global_batch)
        yield from skipped_findings(folder / "skipped.jsonl", cfg.optim.max_skipped_updates)
    yield from diverged_findings(folder, "skipped.jsonl")
    yield from hang_findings(folder)


def _corpus(look: Look, quick: bool) -> Iterator[Finding]:
    if isinstance(look.cfg, FinetuneConfig):
        detail = f"{look.cfg.data.task}: a start compares its clips with those the run began with"
        yield Finding("corpus", "note", detail)
    elif look.cfg:
        is_needed = not look.is_finished and not look.is_alive
        yield from corpus_findings(look.folder, look.cfg, look.environment, is_needed, quick)


def _total_steps(look: Look) -> int | None:
    """The length of the run, as a start counts it from the plan that was recorded."""
    cfg = look.cfg
    if cfg is None or cfg.train.steps is not None:
        return cfg and cfg.train.steps
    try:
        clips = read_record(look.folder / "plan.json").get("clips_per_epoch")
    except DataError:
        return None
    if type(clips) is not int or not 0 < clips < 2**53:
        return None
    crops = 1 if isinstance(cfg, FinetuneConfig) else cfg.data.crops_per_clip
    return max(1, math.ceil(cfg.train.epochs * (clips * crops / cfg.train.global_batch)))


def _room(look: Look) -> Iterator[Finding]:
    """Room for one more checkpoint: the old ones are deleted after a new one is whole."""
    if look.is_finished:
        return
    free = shutil.disk_usage(look.folder).free
    sizes = [one.size for one in look.seen if one.saved]
    if not sizes:
        yield Finding("disk", "note", f"{free / 1e9:,.1f} GB free; how large a checkpoint is can't be found out yet")
        return
    size = sizes[-1]
    detail = f"{free / 1e6:,.0f} MB free, a checkpoint takes {size / 1e6:,.1f}"
    if free < size:
        yield Finding(
            "disk", "fail", f"{detail}: the next one can't be written", "free some space, or checkpoint.keep=1"
        )
    elif free < 2 * size:
        yield Finding("disk", "warn", f"{detail}: room for one", "free some space, or checkpoint.keep=1")
    else:
        yield Finding("disk", "ok", detail)


def _outcome(look: Look) -> Finding:
    """Where the run stands, and the command that continues it."""
    total = "?" if look.total_steps is None else str(look.total_steps)
    if look.is_alive:
        return Finding("next", "ok", f"the run is going on; saved at step {look.step} of {total}")
    if look.cfg is None:
        return Finding("next", "fail", "without its settings the run can't go on", "see settings, above")
    if look.total_steps is not None and look.step > look.total_steps:
        detail = f"the run is {total} steps long, its checkpoint is at step {look.step}"
        return Finding("next", "fail", detail, f"train.steps={look.step} or more, with the command that continues it")
    if look.is_finished:
        return Finding("next", "ok", f"finished: all {total} steps, exported")
    command = command_to_continue(look.folder, look.cfg, look.environment)
    if look.is_stuck:
        return Finding("next", "fail", "where a start goes on can't be told before the checkpoints are mended", command)
    lost = max((one.step for one in look.seen if one.state is State.TORN), default=0) - look.step
    told = f"a start goes on from step {look.step} of {total}"
    told += f"; {lost} steps that were saved are computed anew" if lost > 0 else ""
    if look.has_failed:
        told = f"{told}, once what is marked fail is mended"
    return Finding("next", "ok", told, command)
