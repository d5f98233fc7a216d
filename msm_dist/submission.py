"""`msm-dist submit`: keep a run's or a sweep's code and settings, and hand it to Slurm or run it here.

In: a `Request`, the command line. Out: files in the run folder and one job, or a job array with a run folder each:

    <run folder>/submission/config.yaml      the resolved settings that the job reads
    <run folder>/submission/submission.json  job, cluster, time, code, command
    <run folder>/submission/                 submitit's files and the job's log; of a sweep in the folder of the sweep
    <run folder>/code/<digest>/              the snapshot that the job imports from; likewise

Nothing is written before everything was found right. Raises ConfigError.
"""

import contextlib
import functools
import io
import json
import os
import shlex
import signal
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from msm_dist.admission import RECORD, Plan, Request, allocation, check_all, variants
from msm_dist.config import dump_config
from msm_dist.engine.console import outliving_readers
from msm_dist.errors import ConfigError
from msm_dist.files import write_atomically
from msm_dist.launch import (
    AGAIN,
    REQUEUE_EXIT_CODE,
    Allocation,
    PretrainJob,
    check_environment,
    exit_code_path,
    local_executor,
    slurm_executor,
    slurm_text,
    spread_over,
)
from msm_dist.site import Site, load_site
from msm_dist.snapshot import digest, git_commit, read_packages, take_snapshot

SHORT_MINUTES = 10
"""Limits up to this make submitit count every preemption as a time-out."""
POLL_SECONDS = 0.2
OUR_VARIABLES = ("TIMELIMIT", "SIGNAL", "REQUEUE", "NO_REQUEUE", "OPEN_MODE", "OUTPUT", "ERROR", "ARRAY_INX", "EXPORT")
OUR_VARIABLES += ("WAIT",)
"""Of sbatch's SBATCH_ variables those that would always undo what a script of ours asks for."""
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def submit(request: Request) -> int:
    """Check, keep and start; the exit code, for local and debug that of the run. Raises ConfigError, OSError."""
    site = load_site(request.profile)
    home, configs = variants(request)
    wants = allocation(request, site, configs)
    if not request.dry_run:
        check_environment(request.cluster)
    plans = check_all(configs, wants.world_size)
    for note in notes(request, wants, site, plans):
        print(f"note: {note}", file=sys.stderr)
    for plan in plans:
        if plan.is_finished:
            print(f"{plan.cfg.run.folder} is finished; more train.steps continue it, run.name=NAME starts another")
    todo = [plan for plan in plans if not plan.is_finished]
    if not todo:
        return 0
    if request.dry_run:
        print(on_paper(request, wants, site, home, todo))
        return 0
    code = None if request.cluster == "debug" else take_snapshot(home / "code")
    keep(request, home, plans, todo)
    if request.cluster == "slurm":
        jobs = send(request, wants, site, home, code, todo)
        print(farewell(home, todo, jobs), flush=True)
        return 0
    worst = 0
    for plan in todo:
        if request.cluster == "debug":
            ended = run_in_process(plan)
        else:
            ended = run_on_this_machine(request, wants, site, home, code, plan)
        if ended > 128:
            return ended  # stopped by a signal: so are the runs that would follow
        worst = worst or ended
    return worst


def notes(request: Request, wants: Allocation, site: Site, plans: Sequence[Plan]) -> Iterator[str]:
    """What is not wrong but should be known."""
    for plan in plans:
        for note in plan.notes:
            yield f"{plan.cfg.run.name}: {note}"
    gpus = f"{wants.gpus_per_node} GPUs a node" if wants.gpus_per_node else "no GPUs (--gpus-per-node asks for some)"
    yield f"{wants.nodes} nodes x {wants.tasks_per_node} tasks x {wants.cpus_per_task} CPUs, {gpus}"
    if request.cluster == "slurm" and wants.minutes <= SHORT_MINUTES:
        yield (
            f"--time {request.time}: up to {SHORT_MINUTES} minutes submitit counts every preemption as one of the "
            f"{request.max_timeouts} time-outs of --max-timeouts"
        )
    elif request.cluster == "slurm" and site.signal_seconds >= max(600, wants.minutes * 60 // 5):
        yield (
            f"signal_seconds: {site.signal_seconds}: submitit counts time-outs in the last fifth of the limit, at "
            "least 10 minutes, only; the signal comes before, so --max-timeouts will not end the job"
        )


def keep(request: Request, home: Path, plans: Sequence[Plan], todo: Sequence[Plan]) -> None:
    """Write the settings that the jobs read, with the files that they name."""
    for plan in todo:
        folder = plan.submission
        folder.mkdir(parents=True, exist_ok=True)
        cfg = plan.cfg
        if cfg.engine.deepspeed:
            own = folder / "deepspeed.json"
            write_atomically(own, Path(cfg.engine.deepspeed).read_bytes())
            cfg = cfg.model_copy(update={"engine": cfg.engine.model_copy(update={"deepspeed": str(own)})})
        write_atomically(folder / "config.yaml", dump_config(cfg))
    if request.sweep:
        (home / "submission").mkdir(exist_ok=True)
        content = {"sweep": request.sweep, "command": sys.argv, "runs": [plan.cfg.run.name for plan in plans]}
        write_atomically(home / "submission" / "sweep.json", json.dumps(content, indent=1))


def on_paper(request: Request, wants: Allocation, site: Site, home: Path, todo: Sequence[Plan]) -> str:
    """What a submission would do."""
    if request.cluster != "slurm":
        names = ", ".join(str(plan.cfg.run.folder) for plan in todo)
        return f"would run {names} on this machine, {wants.tasks_per_node} processes each; --cluster slurm has a script"
    code = home / "code" / digest(read_packages())
    executor = slurm_executor(home / "submission", home.name, wants, site, code, request.max_timeouts)
    return slurm_text(executor, len(todo), request.max_parallel)


def send(
    request: Request, wants: Allocation, site: Site, home: Path, code: Path, todo: Sequence[Plan]
) -> list[submitit.Job]:
    """Submit to Slurm: a job, or an array of jobs. Raises ConfigError with what sbatch says."""
    executor = slurm_executor(home / "submission", home.name, wants, site, code, request.max_timeouts)
    spread_over(executor, len(todo), request.max_parallel)
    before = set(executor.folder.glob("*.pkl"))
    quietly = contextlib.redirect_stderr(io.StringIO())  # submitit's copy of what sbatch says
    with hidden(of_other_jobs(executor.parameters)), quietly:
        try:
            jobs = executor.submit_array([job_of(plan, code) for plan in todo])
        except (FailedJobError, FailedSubmissionError) as error:
            new = set(executor.folder.glob("*.pkl")) - before
            for left in [*new, *executor.folder.glob(".submission_file_*.sh")]:
                if not left.name.endswith("_submitted.pkl") and not left.is_symlink():
                    left.unlink(missing_ok=True)
            forget(todo)
            said = str(error).strip().removeprefix("sbatch: error: ")
            raise ConfigError(f"sbatch refused the job: {said}; --dry-run shows what it was given") from None
    record(request, code, todo, [job.job_id for job in jobs])
    return jobs


def forget(plans: Sequence[Plan]) -> None:
    """Remove what `keep` wrote for runs that were never submitted."""
    for plan in plans:
        if not (plan.submission / RECORD).exists():
            for name in ("config.yaml", "deepspeed.json"):
                (plan.submission / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # of a single run it holds more, such as other logs
                plan.submission.rmdir()
                plan.cfg.run.folder.rmdir()


def run_on_this_machine(request: Request, wants: Allocation, site: Site, home: Path, code: Path, plan: Plan) -> int:
    """Run a job with submitit's local controller, showing its log, to its end; the run's exit code."""
    executor = local_executor(home / "submission", wants, site, request.max_timeouts)
    path = os.pathsep.join(filter(None, [str(code), os.environ.get("PYTHONPATH")]))
    # A Ctrl-C is for the ranks, which save; the controller would kill them a second after one of its own.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with submitit.helpers.environment_variables(PYTHONPATH=path, PYTHONSAFEPATH="1"):
            job = executor.submit(job_of(plan, code))
        paths = [job.task(rank).paths for rank in range(wants.world_size)]
        with stopping(int(job.job_id)):
            record(request, code, [plan], [job.job_id])
            print(f"{plan.cfg.run.folder}: process {job.job_id} here, log {job.paths.stdout}", flush=True)
            follow(job, [path.stdout for path in paths])
    finally:
        signal.signal(signal.SIGINT, before)
    codes = [int(file.read_text()) if (file := exit_code_path(path)).exists() else 1 for path in paths]
    # A rank that lost its peers says 1; the one that they lost knows better.
    code = next((code for code in codes if code > 1), max(codes))
    if code == REQUEUE_EXIT_CODE:
        print(f"msm-dist: saved, but not started again; {AGAIN}", file=sys.stderr)
    return code


def run_in_process(plan: Plan) -> int:
    """Run in this process, one rank, with submitit's debug executor; the exit code."""
    executor = submitit.DebugExecutor(plan.submission)
    try:
        with hidden(LAUNCHER_VARIABLES):
            executor.submit(job_of(plan)).results()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0


def job_of(plan: Plan, code: Path | None = None) -> PretrainJob:
    """What the ranks of a plan's job execute, from the snapshot `code`."""
    return PretrainJob(str(plan.submission / "config.yaml"), None if code is None else str(code))


def record(request: Request, code: Path, plans: Sequence[Plan], jobs: Sequence[str]) -> None:
    """Write down the submission of each run, for a later one of the same run to know of it."""
    common = {
        "cluster": request.cluster,
        "host": socket.gethostname(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "code": code.name,
        "git": git_commit(),
        "folder": os.getcwd(),
        "command": sys.argv,
    }
    for plan, job in zip(plans, jobs, strict=True):
        write_atomically(plan.submission / RECORD, json.dumps({"job": job, **common}, indent=1))


def of_other_jobs(parameters: Mapping[str, Any]) -> list[str]:
    """Variables that sbatch and srun would take over: of the job that this process may itself be part of, and those of
    options that submitit's `parameters` set in the script, over which they would win."""
    inside = "SLURM_JOB_ID" in os.environ
    given = {**parameters, **parameters.get("additional_parameters", {})}
    options = {f"SBATCH_{name.upper().replace('-', '_')}" for name, value in given.items() if value is not None}
    ours = {f"SBATCH_{name}" for name in OUR_VARIABLES} | options
    ours |= {"SBATCH_MEM_PER_NODE", "SBATCH_MEM_PER_CPU", "SBATCH_MEM_PER_GPU"} if "SBATCH_MEM" in options else set()
    return [
        name
        for name in os.environ
        if name in ours or (inside and name.startswith(("SLURM_", "SLURMD_")) and name != "SLURM_CONF")
    ]


@contextlib.contextmanager
def hidden(names: Iterable[str]) -> Iterator[None]:
    """Take variables out of the environment for the time of the block."""
    taken = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(taken)


@contextlib.contextmanager
def stopping(controller: int) -> Iterator[None]:
    """Pass TERM, a Ctrl-C once more, and the end of who reads this process's output, on to the ranks, which save and
    end; this process sees their end."""

    def stop() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(controller, signal.SIGTERM)

    def pass_on(number: int, frame: object) -> None:
        print("stopping: the ranks save first", file=sys.stderr, flush=True)
        stop()

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        # Once for both streams: at a second TERM the ranks would end without a save.
        with outliving_readers(functools.cache(stop)):
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def follow(job: submitit.LocalJob, logs: Sequence[Path]) -> None:
    """Show what is added to the logs until the job has ended."""
    shown = dict.fromkeys(logs, 0)
    ended = False
    while True:
        for path in logs:
            if path.exists():
                with path.open("rb") as file:
                    file.seek(shown[path])
                    text = file.read()
                shown[path] += len(text)
                sys.stdout.write(text.decode(errors="replace"))
        sys.stdout.flush()
        if ended:
            return
        ended = job.done()
        time.sleep(POLL_SECONDS)


def farewell(home: Path, todo: Sequence[Plan], jobs: Sequence[submitit.Job]) -> str:
    """The table of the jobs, and how to watch them."""
    rows = [("run", "job", "log")]
    rows += [
        (str(plan.cfg.run.folder), job.job_id, os.path.relpath(job.paths.stdout))
        for plan, job in zip(todo, jobs, strict=True)
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    table = ["  ".join([row[0].ljust(widths[0]), row[1].ljust(widths[1]), row[2]]) for row in rows]
    number = jobs[0].job_id.partition("_")[0]
    folder = os.path.relpath(home)
    return "\n".join(
        [
            *table,
            "",
            f"squeue --jobs={number}",
            f"tail -F {shlex.quote(rows[1][2])}",
            f"tensorboard --logdir {shlex.quote(folder)}",
            f"msm-dist runs {shlex.quote(folder if len(todo) > 1 else os.path.dirname(folder) or '.')}",
        ]
    )
