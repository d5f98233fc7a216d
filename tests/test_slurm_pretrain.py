"""`sbatch slurm/pretrain.sh` on a real cluster: requeues, power cuts and kills leave the run as if nothing had been.

Each test is a run of the quickstart's model on two nodes that meets one accident and is then compared, bit for bit,
with a run that met none.
"""

import copy
import os
import re
import shutil
import time
from pathlib import Path

import pytest

from tests.cluster.lab import Lab, standing, steps_done, wait
from tests.test_pretrain import Runs

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(3600)]

STEPS = 60
SETTINGS = [
    "train.global_batch=16",
    "train.micro_batch=8",
    f"train.steps={STEPS}",
    "train.log_every=1",
    "train.valid_every=30",
    "train.valid_clips=16",
    "train.pictures_every=0",
    "train.trace=true",
    "checkpoint.every=10",
    "data.shuffle_window=16",
]
RANK = "^[^ ]*python[^ ]* -u -m msm_dist.pretrain"
"""Not `env --block-signal=... python -u ...`, which it is before: what matches holds its signals back."""
PACED = """
import os, sys, time

is_rank = {"msm_dist.pretrain", "submitit.core._submit"} & set(sys.orig_argv)
if is_rank and "SLURM_RESTART_COUNT" not in os.environ:
    from msm_dist.monitor import Monitor

    train = Monitor.train

    def train_in_time(self, step, values):
        train(self, step, values)
        time.sleep((0 if step < 10 else 0.5 if step < 30 else 3) if self.writes else 0)

    Monitor.train = train_in_time
"""
"""What Python runs first: a job's first start takes half a second a step from step 10 on, however fast the machine is.

From step 30 on, where accidents are over, it takes three, for a test that is late: an accident at step 15 comes 100 s
before the run's end.
"""
SAVES_LATE = """
if is_rank and "SLURM_RESTART_COUNT" not in os.environ:
    from msm_dist.engine.saving import Saver

    finish = Saver.finish
    Saver.finish = lambda self: [time.sleep(10), finish(self)]
"""
"""Likewise: the save at the end of that start takes ten seconds."""
STICKS = """
import os, signal, time

def stick(*_):
    while True:
        time.sleep(1000)

os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGWINCH, stick))
"""
"""Likewise: a loader worker that gets WINCH never reads on, as from a dead file server."""


HELD_UP = """#!/bin/sh
here={folder}/$(basename "$0")-${{SLURM_RESTART_COUNT:-0}}
case $here in
*/scontrol-0 | */srun-1)
  if [ ! -e "$here" ]; then
    touch "$here"
    until [ -e "$here.go" ]; do sleep 0.1; done
    sleep 3
  fi ;;
esac
exec {program} "$@"
"""
"""A program of Slurm that waits to be let go on, and 3 s more for a signal on its way: in one start of a job each."""


class ClusterRuns(Runs):
    """Runs of the quickstart's configuration, submitted as jobs."""

    rank = RANK

    def __init__(self, folder: Path, lab: Lab):
        super().__init__(folder)
        self.lab = lab
        self.config = Path("configs/quickstart.yaml")
        self.logs = "%j.log"

    def on(self, lab: Lab) -> "ClusterRuns":
        """The same folder on another cluster."""
        there = copy.copy(self)
        there.lab, there.logs = lab, "other-%j.log"
        return there

    def command(self, name: str, *settings: str) -> list[str]:
        common = [f"run.dir={self.folder}", f"run.name={name}", f"data.shards={self.train}"]
        return [str(self.config), *common, f"data.valid_shards={self.valid}", *SETTINGS, *settings]

    def submit(self, name: str, *settings: str, sbatch: tuple[str, ...] = (), **environment: str) -> str:
        """A job of two nodes with one task each, unless `sbatch` says otherwise; its number."""
        log = f"--output={self.folder}/{self.logs}"
        options = ("--nodes=2", "--cpus-per-task=2", "--time=30", log, *sbatch)
        return self.lab.sbatch(*options, "slurm/pretrain.sh", *self.command(name, *settings), **environment)

    def submit_paced(self, name: str, *settings: str, also: str = "", **options) -> str:
        """A job whose first start leaves time for an accident (PACED)."""
        hooks = self.folder / f"{name}-hooks"
        hooks.mkdir()
        (hooks / "sitecustomize.py").write_text(PACED + also)
        path = os.pathsep.join(filter(None, [str(hooks), os.environ.get("PYTHONPATH")]))
        return self.submit(name, *settings, PYTHONPATH=path, **options)

    def log(self, job: str) -> str:
        path = self.folder / self.logs.replace("%j", job)
        return path.read_text() if path.exists() else "no log yet"

    def tell(self, job: str) -> str:
        return f"{self.lab.job(job)}\n{self.log(job)}"

    def reach(self, name: str, job: str, step: int) -> None:
        """Wait until a run has done a step."""
        self.wait(lambda: steps_done(self.folder / name) >= step, job, f"step {step} of {name}")

    def requeued(self, job: str, times: int) -> None:
        """Wait until a job was requeued so many times."""
        self.wait(lambda: self.lab.restarts(job) >= times, job, f"requeue {times}")

    def start_again(self, job: str) -> None:
        """Wait for the ranks of a further start, as soon as they are there: long before Python has its handlers."""

        def are_there() -> bool:
            is_running = self.lab.job(job)["JobState"] == "RUNNING"
            return is_running and all(self.lab.pids(node, self.rank) for node in ("n1", "n2"))

        self.wait(are_there, job, "the ranks of the next start")

    def give_time(self, job: str) -> None:
        """Set the time limit anew: one that EndTime has moved is that of the next start too."""
        self.lab.run("scontrol", "update", f"jobid={job}", "TimeLimit=30")

    def end(self, job: str) -> dict[str, str]:
        """What Slurm says of a job when it has ended for good."""
        self.wait(lambda: self.lab.is_gone(job), job, "the end of the job")
        return self.lab.job(job)

    def wait(self, ready, job: str, what: str) -> None:
        """Wait for what a job that goes on may still do."""
        wait(lambda: ready() or self.lab.is_gone(job), what, tell=lambda: self.tell(job))
        if not ready():
            pytest.fail(f"job {job} ended before {what}\n{self.tell(job)}")

    def finish(self, job: str) -> None:
        assert self.end(job)["JobState"] == "COMPLETED", self.tell(job)

    def is_as_undisturbed(self, name: str) -> None:
        assert self.losses(name) == self.losses("undisturbed")
        assert self.trace(name) == self.trace("undisturbed")
        assert self.weights(name) == self.weights("undisturbed")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, lab: Lab) -> ClusterRuns:
    runs = ClusterRuns(tmp_path_factory.mktemp("cluster"), lab)
    runs.finish(runs.submit("undisturbed"))
    assert len(runs.losses("undisturbed")) >= STEPS
    return runs


def saved_steps(log: str) -> list[int]:
    return [int(step) for step in re.findall(r"stopped and saved at step (\d+)", log)]


def continued_from(log: str) -> list[int]:
    return [int(step) for step in re.findall(r"continued from \S+step-(\d+)", log)]


def test_log_begins_with_what_was_resolved(runs: ClusterRuns) -> None:
    few = ("train.steps=2", "optim.warmup_steps=0", "train.micro_batch=4")
    job = runs.submit("resolved", *few, sbatch=("--gpus-per-node=2",))
    runs.finish(job)
    log = runs.log(job)
    assert re.search(rf"job +{job}, first start", log)
    assert re.search(r"nodes +n\[1-2\]", log)
    assert re.search(r"ranks +4,", log)
    assert re.search(r"master +n1:\d+", log)
    assert f"run folder {runs.folder / 'resolved'}, no checkpoint" in log
    assert "2 nodes x 2 tasks x 1 CPUs, 2 GPUs a node" in log
    assert "4 x CPU" in log, "the run itself has as many ranks"


def test_bad_configuration_ends_before_any_rank_starts(runs: ClusterRuns) -> None:
    job = runs.submit("bad", "train.stepz=3")
    assert runs.end(job)["ExitCode"] == "2:0"
    log = runs.log(job)
    assert "train.stepz" in log and "train.steps" in log
    assert "Traceback" not in log and "srun" not in log


def test_error_of_all_ranks_keeps_its_exit_code(runs: ClusterRuns) -> None:
    # The first rank to end makes srun send TERM to the others.
    job = runs.submit("missing", "data.valid_shards=nowhere")
    assert runs.end(job)["ExitCode"] == "2:0"
    log = runs.log(job)
    assert "nowhere" in log and "Traceback" not in log
    assert log.splitlines()[-1].startswith("exit code 2 (not started")


def test_time_limit_without_a_signal_before_it_is_saved(runs: ClusterRuns) -> None:
    job = runs.submit("at_limit", "train.steps=100000", "checkpoint.every=100000", sbatch=("--signal=URG@1",))
    runs.reach("at_limit", job, 5)
    runs.lab.run("scontrol", "update", f"jobid={job}", "EndTime=now+1seconds")
    assert runs.end(job)["JobState"] == "TIMEOUT"
    wait(lambda: saved_steps(runs.log(job)), "the save", tell=lambda: runs.tell(job))


def test_signal_to_the_batch_script_alone_is_passed_on(runs: ClusterRuns, tmp_path: Path) -> None:
    path = runs.lab.environment["PATH"]
    for name in ("scontrol", "srun"):
        (tmp_path / name).write_text(HELD_UP.format(folder=tmp_path, program=shutil.which(name, path=path)))
        (tmp_path / name).chmod(0o755)
    job = runs.submit("batch", "train.steps=100000", PATH=f"{tmp_path}:{path}")
    # Before srun, and while srun has started no rank yet.
    for times, name in enumerate(("scontrol-0", "srun-1"), 1):
        runs.wait((tmp_path / name).exists, job, name)
        runs.lab.run("scancel", "--batch", "--signal=USR1", job)
        (tmp_path / f"{name}.go").touch()
        runs.requeued(job, times)
    (saved,) = saved_steps(runs.log(job))  # the second start has trained until it was told again
    runs.reach("batch", job, saved + 5)
    runs.lab.run("scancel", "--batch", "--signal=USR1", job)
    runs.requeued(job, 3)
    assert saved_steps(runs.log(job))[-1] >= saved + 5
    runs.lab.run("scancel", job)
    runs.end(job)


def test_job_that_is_cancelled_while_it_saves_stays_cancelled(runs: ClusterRuns) -> None:
    job = runs.submit_paced("twice", also=SAVES_LATE)
    runs.reach("twice", job, 15)
    runs.lab.signal(job, "USR1")
    runs.lab.run("scancel", job)
    ended = runs.end(job)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")


def test_signal_to_one_rank_requeues_all(runs: ClusterRuns) -> None:
    job = runs.submit_paced("one_rank")
    runs.reach("one_rank", job, 15)
    runs.lab.kill("n2", "USR1", runs.lab.pids("n2", RANK)[0])
    runs.requeued(job, 1)
    runs.finish(job)
    log = runs.log(job)
    assert continued_from(log) == saved_steps(log) != [], log
    assert re.search(rf"job +{job}, restart 1", log)
    runs.is_as_undisturbed("one_rank")


def test_signals_in_a_row_and_during_the_start(runs: ClusterRuns) -> None:
    job = runs.submit_paced("in_a_row")
    runs.reach("in_a_row", job, 10)
    for name in ("USR1", "USR2", "USR1", "TERM"):
        runs.lab.signal(job, name)
    runs.requeued(job, 1)
    runs.start_again(job)
    runs.lab.signal(job, "USR1")
    runs.requeued(job, 2)
    runs.finish(job)
    log = runs.log(job)
    assert len(saved_steps(log)) == 2 and continued_from(log) == saved_steps(log), log
    runs.is_as_undisturbed("in_a_row")


def test_time_limit_requeues(runs: ClusterRuns) -> None:
    job = runs.submit("time_limit", "train.steps=100000", sbatch=("--signal=USR1@40",))
    runs.reach("time_limit", job, 10)
    runs.lab.run("scontrol", "update", f"jobid={job}", "EndTime=now+75seconds")
    runs.requeued(job, 1)
    runs.give_time(job)
    runs.wait(lambda: continued_from(runs.log(job)), job, "the second start")
    log = runs.log(job)
    assert continued_from(log) == saved_steps(log) != [], log
    runs.lab.run("scancel", job)
    runs.end(job)


def test_preemption_by_a_higher_partition_requeues(runs: ClusterRuns) -> None:
    job = runs.submit_paced("preempted", sbatch=("--partition=low",))
    runs.reach("preempted", job, 15)
    other = runs.lab.sbatch("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
    runs.requeued(job, 1)
    assert runs.end(other)["JobState"] == "COMPLETED"
    runs.finish(job)
    log = runs.log(job)
    assert continued_from(log) == saved_steps(log) != [], log
    runs.is_as_undisturbed("preempted")


def test_preemption_by_term_alone_requeues(runs: ClusterRuns) -> None:
    # Without preempt_send_user_signal the job's USR1 never comes: TERM is all that says it is preempted.
    with standing("t", SLURM_LAB_EXTRA="SlurmctldParameters=idle_on_node_suspend") as site:
        there = runs.on(site)
        job = there.submit_paced("by_term", sbatch=("--partition=low",))
        there.reach("by_term", job, 15)
        site.sbatch("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
        there.requeued(job, 1)
        there.finish(job)
        log = there.log(job)
    assert continued_from(log) == saved_steps(log) != [], log
    runs.is_as_undisturbed("by_term")


def test_cancelled_job_saves_and_stays_cancelled(runs: ClusterRuns) -> None:
    job = runs.submit_paced("cancelled")
    runs.reach("cancelled", job, 15)
    runs.lab.run("scancel", job)
    ended = runs.end(job)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")
    wait(lambda: saved_steps(runs.log(job)), "the save", tell=lambda: runs.tell(job))
    runs.finish(again := runs.submit("cancelled"))
    assert continued_from(runs.log(again)) == saved_steps(runs.log(job)) != []
    runs.is_as_undisturbed("cancelled")


def test_node_without_power_requeues(runs: ClusterRuns) -> None:
    job = runs.submit_paced("power")
    try:
        runs.reach("power", job, 25)
        runs.lab.script("node-kill", "n2")
        runs.requeued(job, 1)
    finally:
        runs.lab.script("node-start", "n2")
        runs.lab.wait_healthy()
    runs.finish(job)
    assert continued_from(runs.log(job)) in ([10], [20], [30]), runs.log(job)
    runs.is_as_undisturbed("power")


def test_killed_rank_ends_the_job_with_a_clear_last_line(runs: ClusterRuns) -> None:
    job = runs.submit_paced("killed")
    runs.reach("killed", job, 25)
    runs.lab.kill("n2", "KILL", runs.lab.pids("n2", RANK)[0])
    ended = runs.end(job)
    assert ended["JobState"] == "FAILED"
    last = runs.log(job).splitlines()[-1]
    assert re.search(r"exit code 137 .*killed.*newest checkpoint step-0*[123]0; the same command goes on", last), last
    runs.finish(runs.submit("killed"))
    runs.is_as_undisturbed("killed")


def test_network_cut_between_nodes_ends_the_job(runs: ClusterRuns) -> None:
    # Slurm still reaches both nodes: only those that see no progress can end this.
    # No part of a start may take three quarters of the time-out either.
    job = runs.submit_paced("cut", "engine.timeout_minutes=1")
    try:
        runs.reach("cut", job, 15)
        runs.lab.script("link-cut")
        ended = runs.end(job)
    finally:
        runs.lab.script("link-join")
    assert ended["JobState"] == "FAILED"
    log = runs.log(job)
    assert re.search(r"no progress for \d+ s \(0.75 of engine.timeout_minutes\). Held up by rank 1 \(", log), log
    assert "Traceback" not in log
    last = log.splitlines()[-1]
    assert re.search(r"exit code 4 .*newest checkpoint step-0*[123]0; the same command goes on", last), log
    runs.finish(runs.submit("cut"))
    runs.is_as_undisturbed("cut")


def test_signal_while_a_worker_is_stuck(runs: ClusterRuns) -> None:
    job = runs.submit_paced("stuck", also=STICKS)
    runs.reach("stuck", job, 15)
    rank, worker, *_ = runs.lab.pids("n2", RANK)
    assert worker != rank
    runs.lab.kill("n2", "WINCH", worker)
    wait(lambda: not is_advancing(runs.folder / "stuck"), "the run to be stuck")
    runs.lab.signal(job, "USR1")
    runs.requeued(job, 1)
    runs.finish(job)
    log = runs.log(job)
    assert continued_from(log) == saved_steps(log) != [], log
    runs.is_as_undisturbed("stuck")


def is_advancing(folder: Path) -> bool:
    before = steps_done(folder)
    time.sleep(10)
    return steps_done(folder) > before
