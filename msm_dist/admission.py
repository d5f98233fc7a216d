"""What stands against a submission, found before anything is written: settings, layout, corpus, an earlier job.

In: a `Request`, the command line of `msm-dist submit`. Out: the runs' configurations, what a job asks for and a `Plan`
per run. Raises ConfigError with every conflict of all runs.
"""

import json
import math
import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msm_dist.allocation import newest
from msm_dist.config import Config, batch_layout, load_config
from msm_dist.corpus import open_corpus, plan_identity
from msm_dist.engine.runfolder import compare_config, compare_plan
from msm_dist.errors import ConfigError, DataError, MsmError
from msm_dist.jobs import waiting_and_running
from msm_dist.launch import Allocation, visible_gpus
from msm_dist.site import Site
from msm_dist.sweep import expand

RECORD = "submission.json"
"""What is known of the latest submission of a run, in its folder submission/."""


@dataclass(frozen=True)
class Request:
    """The command line."""

    config: str
    overrides: tuple[str, ...] = ()
    nodes: int = 1
    gpus_per_node: int = 0
    tasks_per_node: int | None = None
    cpus_per_task: int | None = None
    partition: str | None = None
    time: str = "24:00:00"
    cluster: str = "slurm"
    profile: Path | None = None
    dry_run: bool = False
    max_timeouts: int = 30
    sweep: tuple[str, ...] = ()
    max_parallel: int | None = None


@dataclass(frozen=True)
class Plan:
    """A run to be submitted."""

    cfg: Config
    is_finished: bool
    notes: tuple[str, ...]

    @property
    def submission(self) -> Path:
        """Where its settings for the job and the record of it go."""
        return self.cfg.run.folder.absolute() / "submission"


def variants(request: Request) -> tuple[Path, list[Config]]:
    """The absolute folder of code and log, and the runs' configurations. Raises ConfigError with every fault."""
    cfg = load_config(request.config, request.overrides)
    home = cfg.run.folder.absolute()
    if "%" in str(home):
        raise ConfigError(
            f"{home}: Slurm reads % in a path as a pattern of its own; choose another run.dir or run.name"
        )
    if os.pathsep in str(home):
        raise ConfigError(
            f"{home}: PYTHONPATH can't name the code in a folder with {os.pathsep}; choose another run.dir"
        )
    if not request.sweep:
        if (home / "submission" / "sweep.json").exists():
            raise ConfigError(f"{home} is the folder of a sweep; choose another run.name= for a single run")
        return home, [cfg]
    if (home / "config.yaml").exists():
        raise ConfigError(f"{home} is the folder of a run; choose another run.name= for the sweep")
    folder = json.dumps(str(cfg.run.folder), ensure_ascii=False)  # YAML too; unquoted, "exp #3" would be "exp"
    configs, faults = [], {}
    for variant in expand(request.sweep):
        own = (*request.overrides, *variant.overrides, f"run.dir={folder}", f"run.name={variant.name!r}")
        try:
            configs.append(load_config(request.config, own))
        except ConfigError as error:
            faults[variant.name] = str(error)
    if faults:
        raise ConfigError(_grouped(faults))
    return home, configs


def _grouped(faults: Mapping[str, str]) -> str:
    """What is wrong with the runs of these names, the same of many said once."""
    names: dict[str, list[str]] = {}
    for name, fault in faults.items():
        names.setdefault(fault, []).append(name)
    return "\n".join(
        f"{of_it[0]}{f' and {len(of_it) - 1} more' if len(of_it) > 1 else ''}: {fault}"
        for fault, of_it in names.items()
    )


def allocation(request: Request, site: Site, configs: Sequence[Config]) -> Allocation:
    """What a job asks for, from the command line, the profile and the runs. Raises ConfigError."""
    gpus, tasks = request.gpus_per_node, request.tasks_per_node
    if gpus and tasks not in (None, gpus):
        raise ConfigError(
            f"--tasks-per-node {tasks} beside --gpus-per-node {gpus}: there is one task per GPU; leave out "
            "--tasks-per-node, which is for nodes without GPUs"
        )
    wants = Allocation(
        request.nodes,
        gpus or tasks or 1,
        gpus,
        request.cpus_per_task or site.cpus_per_task or max(cfg.data.num_workers for cfg in configs) + 2,
        parse_minutes(request.time),
        request.partition or site.partition,
    )
    if request.cluster != "slurm":
        _refuse_without_slurm(request, wants)
    if request.max_parallel and not request.sweep:
        raise ConfigError(f"--max-parallel {request.max_parallel}: is for --sweep; a single run is one job")
    if request.cluster != "debug" and wants.minutes * 60 <= site.signal_seconds:
        lower = ", or lower signal_seconds: in the --profile" if request.cluster == "slurm" else ""
        raise ConfigError(
            f"--time {request.time}: the job would be told to save as soon as it starts, {site.signal_seconds} s "
            f"before its limit; ask for more{lower}"
        )
    return wants


def parse_minutes(text: str) -> int:
    """Slurm's forms of a time as whole minutes, rounded up: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S. Raises ConfigError."""
    matched = re.fullmatch(r"(?:(?P<days>\d{1,4})-)?(?P<parts>\d{1,7}(?::\d{1,2}){0,2})", text)
    parts = [int(part) for part in matched["parts"].split(":")] if matched else []
    if matched and matched["days"] is not None:
        seconds = _seconds(int(matched["days"]), *parts)
    elif len(parts) == 3:
        seconds = _seconds(0, *parts)
    else:
        seconds = _seconds(0, 0, *parts)
    if not seconds:
        raise ConfigError(
            f"--time {text}: must be a time above zero as minutes, minutes:seconds, hours:minutes:seconds, days-hours, "
            "days-hours:minutes or days-hours:minutes:seconds, such as 90, 12:00:00 or 2-12"
        )
    return math.ceil(seconds / 60)


def _seconds(days: int = 0, hours: int = 0, minutes: int = 0, seconds: int = 0) -> int:
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _refuse_without_slurm(request: Request, wants: Allocation) -> None:
    """Raise ConfigError for what --cluster local and debug can't do."""
    of_slurm = {
        "--profile": request.profile,
        "--partition": request.partition,
        "--max-parallel": request.max_parallel,
    }
    for option, value in of_slurm.items():
        if value is not None:
            raise ConfigError(
                f"{option} {value}: is for a Slurm cluster; leave it out with --cluster {request.cluster}"
            )
    if request.cluster == "local" and wants.nodes > 1:
        raise ConfigError(f"--cluster local with --nodes {wants.nodes}: it has this machine only; leave --nodes out")
    if request.cluster == "local":
        visible_gpus(wants.gpus_per_node)
    if request.cluster == "debug" and wants.world_size > 1:
        raise ConfigError(
            f"--cluster debug with {wants.nodes} nodes x {wants.tasks_per_node} tasks: it runs one rank, in this "
            "process; --cluster local runs several here"
        )


def check_all(configs: Sequence[Config], world_size: int) -> list[Plan]:
    """Every run's plan. Raises ConfigError with all that stands against any of them."""
    plans, faults = [], {}
    for cfg in configs:
        try:
            plans.append(check(cfg, world_size))
        except MsmError as error:
            faults[cfg.run.name] = str(error)
    if faults:
        raise ConfigError(_grouped(faults) if len(configs) > 1 else "\n".join(faults.values()))
    return plans


def check(cfg: Config, world_size: int) -> Plan:
    """What the run itself would refuse at its start, and a job of it that has not ended. Raises ConfigError."""
    layout = batch_layout(cfg, world_size)
    folder = cfg.run.folder
    compare_config(folder, cfg)
    refuse_running(folder)
    if cfg.engine.deepspeed:
        from msm_dist.engine.zero import deepspeed_config  # here, as DeepSpeed takes seconds to import

        deepspeed_config(cfg, layout)
    try:
        corpus = open_corpus(cfg, layout)
    except DataError as error:
        # Shards may be on the nodes only.
        return Plan(cfg, False, (f"the corpus could not be checked on this machine: {error}",))
    compare_plan(folder, plan_identity(corpus))
    step = newest(folder).rpartition("step-")[2]
    is_finished = step.isdigit() and int(step) >= corpus.total_steps and (folder / "export").is_dir()
    return Plan(cfg, is_finished, ())


def refuse_running(folder: Path) -> None:
    """Raise ConfigError when the job of an earlier submission of this run has not ended."""
    path = folder / "submission" / RECORD
    try:
        record: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8")))
        job, cluster, host = (str(record[name]) for name in ("job", "cluster", "host"))
    except FileNotFoundError:
        return
    except (OSError, ValueError, TypeError, KeyError):
        raise ConfigError(f"{path}: can't be read as the record of a submission; remove it if no job runs") from None
    if cluster == "slurm":
        if state := job_state(job):
            raise ConfigError(
                f"{folder}: job {job} of this run is {state}; wait for its end, or end it with `scancel {job}` (it "
                "saves first), or start another run with run.name=NAME"
            )
    elif host == socket.gethostname() and _is_controller(job):
        raise ConfigError(
            f"{folder}: process {job} on this machine runs it; wait for its end, or end it with `kill {job}` (it saves "
            "first), or start another run with run.name=NAME"
        )


def job_state(job: str) -> str | None:
    """What squeue says of a job, in lower case; None when it has ended. Raises ConfigError when it can't be asked."""
    told = waiting_and_running(job)  # of no Slurm here nothing: the run folder's lock is what still guards the run
    if told.complaint and "Invalid job id" not in told.complaint:
        raise ConfigError(f"job {job} of this run may go on: {told.complaint}; try again when Slurm answers")
    return ", ".join(sorted({found.state.lower() for found in told.by_number.values()})) or None


def _is_controller(pid: str) -> bool:
    try:
        return b"submitit.local" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
