"""What a Slurm job's log says first and last, and whether the job is run again.

In: a Config and a job's environment. Out: text, an exit code, and Slurm's requeue. Without torch, for a batch script
that wants to know within a second, before it starts a rank, whether the configuration is one:

    python -m msm_dist.allocation begins CONFIG [section.key=value ...]
    python -m msm_dist.allocation ended EXIT_CODE CONFIG [section.key=value ...]

`begins` reads SLURM_JOB_ID, SLURM_RESTART_COUNT, SLURM_JOB_NODELIST, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and ends
with exit code 2 and one message for a configuration that can't run on that many ranks. `ended` takes what srun gave. It
ends with 0 when Slurm has taken the job back, else with the code.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path

from msm_dist.config import Config, batch_layout, load_config
from msm_dist.errors import ConfigError, reporting

MEANINGS = {
    0: "finished",
    1: "a rank lost the others or failed; the first message above says why, unless a rank was killed",
    2: "not started or stopped for the reason above, which a restart does not mend",
    3: "diverged: the message above names the clips and the learning rate",
    4: "stood still: hang/report.txt in the run folder names the ranks that held it up",
    75: "saved, asks to be run again",
    129: "stopped by HUP (a closed terminal) and saved, unless the message above says otherwise",
    130: "stopped by INT and saved, unless the message above says otherwise",
    134: "a rank aborted, as after a collective that waited longer than engine.timeout_minutes",
    137: "a rank was killed (KILL): out of memory, or a node that was taken away",
    139: "a rank crashed (SEGV)",
    143: "stopped by TERM and saved, unless it came twice or while Python started",
}
"""Exit codes of a run and of srun, in words."""
SIGNAL_SECONDS = 300
"""Seconds before the time limit at which slurm/pretrain.sh asks for its signal, if sbatch is not told otherwise."""
STOPPED, REQUEUE = 143, 75
"""Exit codes of a run that TERM has stopped, and of one that asks to be run again."""
SCONTROL_SECONDS = 60
REQUEUE_ATTEMPTS = 4
REQUEUE_PAUSE_SECONDS = 10.0


def announce(cfg: Config, environment: Mapping[str, str]) -> str:
    """The first lines of a job's log: job, nodes, ranks, master, run folder. Raises ConfigError for a bad layout."""
    ranks = int(environment["WORLD_SIZE"])
    layout = batch_layout(cfg, ranks)
    restart = int(environment.get("SLURM_RESTART_COUNT") or 0)
    task = environment.get("SLURM_ARRAY_TASK_ID")
    job = environment.get("SLURM_JOB_ID", "none")
    if task is not None:
        job = f"{job} ({environment['SLURM_ARRAY_JOB_ID']}_{task})"
    nodes = environment.get("SLURM_JOB_NODELIST", "this machine")
    return "\n".join(
        [
            f"job        {job}, {f'restart {restart}' if restart else 'first start'}",
            f"nodes      {nodes}",
            f"ranks      {ranks}, each micro-batches of {cfg.train.micro_batch}, {layout.accumulation} per step",
            f"master     {environment['MASTER_ADDR']}:{environment['MASTER_PORT']}",
            f"python     {sys.executable}",
            f"run folder {cfg.run.folder.absolute()}, {newest(cfg.run.folder)}",
        ]
    )


def note_on_limit(record: str) -> str:
    """A line for a time limit at which slurm/pretrain.sh's own --signal comes with the start; else nothing."""
    limit = re.search(r"\bTimeLimit=(?:(\d+)-)?(\d+):(\d+):(\d+)", record)  # or UNLIMITED
    if limit is None:
        return ""
    days, hours, minutes, seconds = (int(part or 0) for part in limit.groups())
    length = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if length > SIGNAL_SECONDS:
        return ""
    return (
        f"\nnote       time limit {length} s: with --signal=USR1@{SIGNAL_SECONDS}, the script's own, the job is told "
        "to save as soon as it starts; ask for more --time, or for a later --signal"
    )


def conclude(cfg: Config, code: int) -> str:
    """The last line of a job's log: how it ended, and from where the same command goes on."""
    meaning = MEANINGS.get(code) or (f"ended by signal {code - 128}" if code > 128 else "failed")
    folder = cfg.run.folder
    line = f"exit code {code} ({meaning}); {folder}: {newest(folder)}"
    return line if code in (0, 2) else f"{line}; the same command goes on from there"


def newest(folder: Path) -> str:
    """The newest checkpoint that claims to be complete, by name; nothing is opened."""
    names = sorted(path.parent.name for path in complete(folder))
    return f"newest checkpoint {names[-1]}" if names else "no checkpoint"


def complete(folder: Path) -> Iterator[Path]:
    """The marks of the checkpoints that claim to be complete."""
    return folder.glob("checkpoints/step-*[0-9]/complete")


def end(cfg: Config, code: int, environment: Mapping[str, str]) -> int:
    """Say how the ranks ended; ask Slurm to run the job again where they ask for it. The job's exit code."""
    job = job_name(environment)
    record = slurm_record(job)
    if code == STOPPED and is_preempted(record):
        # Where a site sends TERM and nothing before it, a job that ends within its grace time counts as failed.
        code = REQUEUE
    if code == REQUEUE:
        if refusal := why_not_again(cfg, record):
            print(f"job {job}: not run again: {refusal}", flush=True)
        elif requeue(job):
            print(f"job {job}: saved, {newest(cfg.run.folder)}; Slurm runs it again", flush=True)
            return 0
    print(conclude(cfg, code), flush=True)
    return code


def why_not_again(cfg: Config, record: str) -> str:
    """What speaks against a requeue that the ranks asked for; nothing: no word."""
    if is_preempted(record):
        return ""
    if is_cancelled(record):
        return "it was cancelled meanwhile"
    start, end = (re.search(rf"\b{name}=(\d{{4}}\S+)", record) for name in ("StartTime", "EndTime"))
    if start is None or end is None:
        return ""
    started, limit = (datetime.fromisoformat(time[1]).timestamp() for time in (start, end))
    written = max((path.stat().st_mtime for path in complete(cfg.run.folder)), default=0.0)
    if written < started and limit - time.time() < SIGNAL_SECONDS + 60:
        return "its time limit leaves no room for a step; ask for more --time, or for a later --signal"
    return ""


def is_preempted(record: str) -> bool:
    """Whether Slurm preempts the job just now; a requeue forgets it."""
    return re.search(r"\bPreemptTime=\d", record) is not None


def is_cancelled(record: str) -> bool:
    """Whether the job was cancelled, by its user or an administrator. At its time limit the reason is TimeLimit."""
    ending = re.search(r"\bJobState=(CANCELLED|COMPLETING) Reason=None\b", record)
    return ending is not None and not is_preempted(record)


def job_name(environment: Mapping[str, str]) -> str:
    """The job as scontrol is to be told: the bare number of an array's task can stand for the whole array."""
    if task := environment.get("SLURM_ARRAY_TASK_ID"):
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{task}"
    return environment.get("SLURM_JOB_ID", "")


def slurm_record(job: str) -> str:
    """What Slurm says of a job, in one line; nothing where it can't be asked."""
    try:
        command = ["scontrol", "show", "job", "--oneliner", job]
        return subprocess.run(command, capture_output=True, text=True, timeout=SCONTROL_SECONDS).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def requeue(job: str) -> bool:
    """Ask Slurm to run a job again, a few times where it does not answer; says why not."""
    for attempt in range(REQUEUE_ATTEMPTS):
        if attempt:
            time.sleep(REQUEUE_PAUSE_SECONDS)
        try:
            command = ["scontrol", "requeue", job]
            done = subprocess.run(command, capture_output=True, text=True, timeout=SCONTROL_SECONDS)
        except (OSError, subprocess.SubprocessError) as error:
            said = str(error)
        else:
            if done.returncode == 0:
                return True
            said = done.stderr.strip()
    print(f"job {job}: Slurm does not run it again: {said} (sbatch --no-requeue?)", flush=True)
    return False


def main(arguments: Sequence[str]) -> int:
    """The exit code: 2 for a bad configuration."""

    def action() -> int:
        what, *words = arguments or [""]
        code = words.pop(0) if what == "ended" and words else "0"
        if what not in ("begins", "ended") or not words or not code.isdigit():
            raise ConfigError("usage: python -m msm_dist.allocation begins|ended CODE CONFIG.yaml [a.b=c ...]")
        cfg = load_config(words[0], words[1:])
        if what == "ended":
            return end(cfg, int(code), os.environ)
        print(announce(cfg, os.environ) + note_on_limit(slurm_record(job_name(os.environ))), flush=True)
        return 0

    return reporting(action)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
