"""`msm-dist submit` on a real cluster: what submitit requeues goes on at the step and ends as if nothing had been."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from msm_dist.snapshot import PACKAGES, take_snapshot
from tests.cluster.lab import Lab, standing, wait
from tests.test_slurm_pretrain import SAVES_LATE, ClusterRuns, continued_from, saved_steps

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(3600)]

RANK = "^[^ ]*python[^ ]* -u -m submitit.core._submit"
SUBMIT = (sys.executable, "-m", "msm_dist", "submit")
SHORT = ("train.steps=2", "train.valid_every=2", "optim.warmup_steps=0")


class SubmittedRuns(ClusterRuns):
    """Runs of the quickstart's configuration, submitted through submitit."""

    rank = RANK

    def submit(self, name: str, *words: str, **environment: str) -> str:
        """A job of two nodes with one task each, unless `words` say otherwise; its number."""
        return self.submit_all(name, *words, **environment)[0]

    def submit_all(self, name: str, *words: str, **environment: str) -> list[str]:
        """The numbers of a submission's jobs, as its table has them."""
        options = ("--nodes=2", "--tasks-per-node=1", "--cpus-per-task=2", "--time=30")
        given = {word.partition("=")[0] for word in words}
        options = [option for option in options if option.partition("=")[0] not in given]
        said = self.lab.run(*SUBMIT, *self.command(name), *options, *words, **environment)
        rows = [line.split() for line in said.partition("\n\n")[0].splitlines()]
        assert rows[0] == ["run", "job", "log"], said
        return [row[1] for row in rows[1:]]

    def log(self, job: str) -> str:
        # Clusters number their jobs alike; the newest log is the one that a test looks at.
        paths = sorted(self.folder.glob(f"*/submission/{job}_0_log.out"), key=lambda path: path.stat().st_mtime)
        return paths[-1].read_text() if paths else "no log yet"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, lab: Lab) -> SubmittedRuns:
    runs = SubmittedRuns(tmp_path_factory.mktemp("submitted"), lab)
    runs.finish(runs.submit("undisturbed"))
    return runs


def test_signal_to_one_rank_and_during_the_start_requeues_all(runs: SubmittedRuns) -> None:
    job = runs.submit_paced("one_rank")
    runs.reach("one_rank", job, 15)
    runs.lab.kill("n2", "USR2", runs.lab.pids("n2", RANK)[0])
    runs.requeued(job, 1)
    runs.start_again(job)
    runs.lab.signal(job, "USR2")
    runs.requeued(job, 2)
    runs.finish(job)
    log = runs.log(job)
    assert len(saved_steps(log)) == 2 and continued_from(log) == saved_steps(log), log
    assert re.search(rf"job +{job}, restart 2", log)
    assert "this job is preempted" in log and "this job is timed-out" not in log
    assert "Traceback" not in log
    runs.is_as_undisturbed("one_rank")


def test_cancelled_job_saves_and_stays_cancelled_and_a_second_one_is_refused_meanwhile(runs: SubmittedRuns) -> None:
    job = runs.submit_paced("cancelled")
    runs.reach("cancelled", job, 15)
    second = subprocess.run(
        ["bash", "tests/cluster/slurm-up.sh", "exec", *SUBMIT, *runs.command("cancelled"), "--nodes=2"],
        env=runs.lab.environment,
        capture_output=True,
        text=True,
    )
    assert second.returncode == 2
    assert f"job {job} of this run is running; wait for its end, or end it with `scancel {job}`" in second.stderr
    runs.lab.run("scancel", job)
    ended = runs.end(job)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")
    wait(lambda: saved_steps(runs.log(job)), "the save", tell=lambda: runs.tell(job))
    wait(lambda: not runs.lab.run("squeue", "--noheader", "--jobs", job), "the end of its ranks")
    early = runs.submit("cancelled")
    # Before the run listens: there is nothing to save yet.
    runs.wait(lambda: "code       " in runs.log(early), early, "the first line of its log")
    runs.lab.signal(early, "TERM")
    ended = runs.end(early)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "143:0"), runs.log(early)
    assert "continued from" not in runs.log(early)
    again = runs.submit("cancelled")
    runs.finish(again)
    assert continued_from(runs.log(again)) == saved_steps(runs.log(job)) != []
    runs.is_as_undisturbed("cancelled")


def test_job_that_is_cancelled_while_it_saves_stays_cancelled(runs: SubmittedRuns) -> None:
    job = runs.submit_paced("twice", also=SAVES_LATE)
    runs.reach("twice", job, 15)
    runs.lab.signal(job, "USR2")
    runs.lab.run("scancel", job)
    ended = runs.end(job)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")


def test_time_outs_are_counted_down_to_an_end_that_is_saved(runs: SubmittedRuns) -> None:
    job = runs.submit("limited", "train.steps=100000", "--time=7", "--max-timeouts=1")
    runs.give_time(job)  # to submitit it has 7 minutes, which makes every signal a time-out
    runs.reach("limited", job, 10)
    # The job is told 300 s before its limit: that is now, so Slurm looks at its clock for it.
    runs.lab.run("scontrol", "update", f"jobid={job}", "EndTime=now+301seconds")
    runs.requeued(job, 1)
    runs.give_time(job)
    runs.wait(lambda: continued_from(runs.log(job)), job, "the second start")
    runs.lab.signal(job, "USR2")
    assert runs.end(job)["JobState"] == "FAILED"
    log = runs.log(job)
    assert log.count("this job is timed-out") == 2
    assert continued_from(log) == saved_steps(log)[:1]
    assert "msm-dist: saved, but not started again: timed-out too many times; submit the same command again" in log
    assert "Traceback" not in log


def test_preemption_by_term_alone_requeues(runs: SubmittedRuns) -> None:
    # Without preempt_send_user_signal the job's USR2 never comes: TERM is all that says it is preempted.
    with standing("s", SLURM_LAB_EXTRA="SlurmctldParameters=idle_on_node_suspend") as site:
        there = runs.on(site)
        job = there.submit_paced("by_term", "--partition=low")
        there.reach("by_term", job, 15)
        site.sbatch("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
        there.requeued(job, 1)
        there.finish(job)
    assert continued_from(runs.log(job)) == saved_steps(runs.log(job)) != [], runs.log(job)
    runs.is_as_undisturbed("by_term")


def test_queued_job_runs_the_code_it_was_submitted_with(runs: SubmittedRuns, tmp_path: Path) -> None:
    sources = take_snapshot(tmp_path / "sources")
    profile = tmp_path / "held.yaml"
    profile.write_text("sbatch: {hold: true}\n")
    own = {"PYTHONPATH": str(sources), "PYTHONSAFEPATH": "1"}
    # The limit would have the job told to save as it starts, again and again; without PATH there would be no srun.
    own |= {"SBATCH_TIMELIMIT": "5", "SBATCH_EXPORT": "NONE"}
    job = runs.submit("held", *SHORT, "--profile", str(profile), **own)
    assert runs.lab.job(job)["TimeLimit"] == "00:30:00"
    for package in PACKAGES:
        shutil.rmtree(sources / package)
        (sources / package).mkdir()
        (sources / package / "__init__.py").write_text("raise SystemExit('edited')\n")
    runs.lab.run("scontrol", "release", job)
    runs.finish(job)
    assert f"code       {runs.folder}/held/code/" in runs.log(job)
    assert "edited" not in runs.log(job)


def test_sweep_is_a_job_array_with_a_task_per_gpu_and_a_run_folder_each(runs: SubmittedRuns) -> None:
    words = ("--gpus-per-node=2", "--tasks-per-node=2", "--nodes=1", "--max-parallel=1", "--sweep", "seed=1,2")
    jobs = runs.submit_all("sweep", *SHORT, *words)
    first = jobs[0].partition("_")[0]
    assert jobs == [f"{first}_0", f"{first}_1"]
    for job, name in zip(jobs, ("seed-1", "seed-2"), strict=True):
        wait(lambda job=job: not runs.lab.run("squeue", "--noheader", "--jobs", job), f"the end of {job}")
        log = runs.log(job)
        assert "2 x CPU" in log, "a task for each of a node's GPUs"
        assert "exit code 0 (finished)" in log, log
        assert (runs.folder / "sweep" / name / "export" / "model.safetensors").exists()
    assert len(list((runs.folder / "sweep" / "code").iterdir())) == 1
    assert (runs.folder / "sweep" / "submission" / "sweep.json").exists()
