"""What a Slurm job's log says first and last: where the run stands and on what it runs.

In: a Config and a job's environment. Out: text. Without torch, for a batch script that wants to know within a second,
before it starts a rank, whether the configuration is one:

    python -m msm_dist.allocation begins CONFIG [section.key=value ...]
    python -m msm_dist.allocation ended EXIT_CODE CONFIG [section.key=value ...]

`begins` reads SLURM_JOB_ID, SLURM_RESTART_COUNT, SLURM_JOB_NODELIST, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and ends
with exit code 2 and one message for a configuration that can't run on that many ranks.
"""

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from msm_dist.config import Config, batch_layout, load_config
from msm_dist.errors import ConfigError, reporting

MEANINGS = {
    0: "finished",
    1: "a rank lost the others or failed; the first message above says why, unless a rank was killed",
    2: "not started or stopped for the reason above, which a restart does not mend",
    3: "diverged: the message above names the clips and the learning rate",
    75: "saved, to be run again",
    130: "stopped by INT and saved, unless the message above says otherwise",
    134: "a rank aborted, as after a collective that waited longer than engine.timeout_minutes",
    137: "a rank was killed (KILL): out of memory, or a node that was taken away",
    139: "a rank crashed (SEGV)",
    143: "stopped by TERM, saved if a step was done since",
}
"""Exit codes of a run and of srun, in words."""
SIGNAL_SECONDS = 300
"""How long before the time limit slurm/pretrain.sh asks for its signal, if sbatch is not told otherwise."""


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


def note_on_limit(job: str) -> str:
    """A line for a time limit at which slurm/pretrain.sh's own --signal comes with the start; else nothing."""
    try:
        said = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    limit = re.search(r"\bTimeLimit=(?:(\d+)-)?(\d+):(\d+):(\d+)", said)  # or UNLIMITED
    if limit is None:
        return ""
    days, hours, minutes, seconds = (int(part or 0) for part in limit.groups())
    length = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if length > SIGNAL_SECONDS:
        return ""
    return (
        f"\nnote       time limit {length} s: with --signal=USR1@{SIGNAL_SECONDS}, the script's own, the job is told "
        "to save as soon as it starts, again and again; ask for more --time, or for a later --signal"
    )


def conclude(cfg: Config, code: int) -> str:
    """The last line of a job's log: how it ended, and from where the same command goes on."""
    meaning = MEANINGS.get(code) or (f"ended by signal {code - 128}" if code > 128 else "failed")
    folder = cfg.run.folder
    line = f"exit code {code} ({meaning}); {folder}: {newest(folder)}"
    return line if code == 0 else f"{line}; the same command goes on from there"


def newest(folder: Path) -> str:
    """The newest checkpoint that claims to be complete, by name; nothing is opened."""
    complete = sorted(path.parent.name for path in folder.glob("checkpoints/step-*[0-9]/complete"))
    return f"newest checkpoint {complete[-1]}" if complete else "no checkpoint"


def main(arguments: Sequence[str]) -> int:
    """The exit code: 2 for a bad configuration."""

    def action() -> int:
        what, *words = arguments or [""]
        code = words.pop(0) if what == "ended" and words else "0"
        if what not in ("begins", "ended") or not words or not code.isdigit():
            raise ConfigError("usage: python -m msm_dist.allocation begins|ended CODE CONFIG.yaml [a.b=c ...]")
        cfg = load_config(words[0], words[1:])
        if what == "begins":
            print(announce(cfg, os.environ) + note_on_limit(os.environ.get("SLURM_JOB_ID", "")), flush=True)
        else:
            print(conclude(cfg, int(code)), flush=True)
        return 0

    return reporting(action)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
