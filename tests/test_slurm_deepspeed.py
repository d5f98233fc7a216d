"""The deepspeed launcher on several hosts, as docs/operations.md gives the commands: through srun, and without ssh."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.cluster.lab import ROOT, SCRIPT, Lab, steps_done, wait
from tests.test_pretrain import Runs
from tests.test_slurm_pretrain import PACED

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(3600)]

PAGE = ROOT / "docs" / "operations.md"
RANK = "python[^ ]* -u -m msm_dist.pretrain"
STEPS = 40
SETTINGS = [f"train.steps={STEPS}", "train.valid_every=100", "checkpoint.every=100"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("doors"))


def block(first: str) -> str:
    """The indented block of the page that begins with this."""
    found = re.search(rf"^    {re.escape(first)}.*\n(?:(?:    .*)?\n)*", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert found, f"{PAGE.name} has no block that begins with {first}"
    return "\n".join(line.removeprefix("    ") for line in found[0].rstrip().splitlines()) + "\n"


def nothing_left(lab: Lab) -> bool:
    return not any(lab.pids(node, RANK) for node in ("n1", "n2"))


def test_script_for_srun_is_requeued_and_goes_on(lab: Lab, runs: Runs, tmp_path: Path) -> None:
    script, log = tmp_path / "pretrain-deepspeed.sh", tmp_path / "log"
    script.write_text(block("#!/usr/bin/env bash"))
    (tmp_path / "sitecustomize.py").write_text(PACED)
    command = runs.command("srun", *SETTINGS)
    options = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2", f"--chdir={tmp_path}", f"--output={log}")
    job = lab.sbatch(*options, str(script), *command, PYTHONPATH=f"{tmp_path}:{ROOT}")

    def tell() -> str:
        return f"{lab.job(job)}\n{log.read_text() if log.exists() else 'no log'}"

    def is_past(step: int) -> bool:
        return steps_done(runs.folder / "srun") >= step or lab.is_gone(job)

    wait(lambda: is_past(3), "step 3", tell=tell)
    lab.signal(job, "USR1")
    wait(lambda: lab.restarts(job) == 1 or lab.is_gone(job), "the requeue", tell=tell)
    wait(lambda: lab.is_gone(job), "the end", tell=tell)
    assert lab.job(job)["JobState"] == "COMPLETED", tell()
    saved, continued = (re.search(rf"{words}(\d+)", log.read_text()) for words in ("saved at step ", r"from \S+step-"))
    assert saved and continued and int(saved[1]) == int(continued[1]), tell()
    assert [line["step"] for line in runs.metrics("srun") if "loss" in line] == list(range(1, STEPS + 1))
    assert "2 x CPU" in log.read_text()
    wait(lambda: nothing_left(lab), "no process to be left", 60, tell)


def test_without_ssh_a_signal_to_one_rank_ends_both_hosts_saved(lab: Lab, runs: Runs, tmp_path: Path) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("n1 slots=1\nn2 slots=1\n")
    page = block("deepspeed --hostfile HOSTFILE --no_ssh")
    words = shlex.split(page.replace("\\\n", " "))
    config = runs.command("no_ssh", *SETTINGS, "train.steps=100000")
    launchers, logs = [], [tmp_path / "0", tmp_path / "1"]
    for rank, log in enumerate(logs):
        values = {"HOSTFILE": [str(hostfile)], "RANK": [str(rank)], "HOST": ["n1"], "CONFIG": config}
        command = [out for word in words for out in values.get(word, [word])]
        with log.open("w") as output:
            launchers.append(
                subprocess.Popen(
                    ["bash", str(SCRIPT), "on", f"n{rank + 1}", *command],
                    env=os.environ | lab.environment,
                    cwd=ROOT,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )

    def tell() -> str:
        return "\n".join(log.read_text() for log in logs)

    try:
        wait(lambda: steps_done(runs.folder / "no_ssh") >= 3, "step 3", tell=tell)
        lab.kill("n2", "USR1", lab.pids("n2", RANK)[0])
        assert [launcher.wait(600) for launcher in launchers] == [75, 75], tell()
    finally:
        for launcher in launchers:
            launcher.kill()
        for node in ("n1", "n2"):
            for pid in lab.pids(node, RANK):
                lab.kill(node, "KILL", pid)
    step = int(re.search(r"saved at step (\d+)", tell())[1])
    assert runs.checkpoints("no_ssh") == [f"step-{step:08d}"]
