"""`msm-dist submit` without a cluster: what sbatch would get, what is refused, and jobs of submitit's own executors."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from submitit.core.utils import JobPaths

from msm_dist import admission, launch, submission
from msm_dist.admission import Plan, Request, allocation, job_state, parse_minutes, refuse_running, variants
from msm_dist.cli import spread_sweep
from msm_dist.config import Config, load_config, parse_config
from msm_dist.errors import ConfigError
from msm_dist.launch import slurm_executor, slurm_text, visible_gpus
from msm_dist.site import Container, Site
from msm_dist.submission import hidden, keep, notes, of_other_jobs, send
from tests.chaos.faulty import WRITE, Faulty, Where
from tests.processes import HERE
from tests.test_pretrain import Runs, wait_for

MINUTES = {
    "90": 90,
    "0:30": 1,
    "10:01": 11,
    "12:00:00": 720,
    "2-12": 60 * 60,
    "1-02:03": 24 * 60 + 123,
    "1-02:03:04": 24 * 60 + 124,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("submitted"))


def submit(runs: Runs, name: str, *words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(runs, name, *words), env=environment_of(environment), **OPTIONS, timeout=600)


def command(runs: Runs, name: str, *words: str) -> list[str]:
    return [sys.executable, str(HERE.parent / "slurm" / "submit.py"), *runs.command(name), *words]


OPTIONS = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "cwd": HERE.parent}


def environment_of(own: dict[str, str]) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"} | own


@pytest.mark.parametrize(("text", "minutes"), MINUTES.items())
def test_times_are_read_as_slurm_reads_them(text, minutes):
    assert parse_minutes(text) == minutes


@pytest.mark.parametrize("text", ["", "0", "0:00", "1-2-3", "1:2:3:4", "-5", "2 h", "1-", "unlimited", "1:2:3.5"])
def test_other_times_are_refused_with_the_forms_there_are(text):
    with pytest.raises(ConfigError, match="days-hours:minutes:seconds, such as 90, 12:00:00 or 2-12"):
        parse_minutes(text)


@pytest.mark.parametrize(
    ("words", "spread"),
    [
        ("submit c a=1 --nodes 2", "submit c a=1 --nodes 2"),
        ("submit c --sweep a=1,2 b=3 --dry-run", "submit c --sweep a=1,2 --sweep b=3 --dry-run"),
        ("submit --sweep a=1 b=2 --nodes 2 c --sweep d=1", "submit --sweep a=1 --sweep b=2 --nodes 2 c --sweep d=1"),
        ("submit c --sweep=a=1 b=2", "submit c --sweep=a=1 b=2"),
    ],
)
def test_sweep_takes_all_words_up_to_the_next_option(words, spread):
    assert spread_sweep(words.split()) == spread.split()


@pytest.mark.parametrize("words", ["submit c --sweep", "submit c --sweep --dry-run"])
def test_sweep_of_nothing_is_refused(words):
    with pytest.raises(ConfigError, match="--sweep: names nothing to vary"):
        spread_sweep(words.split())


WANTS = launch.Allocation(2, 4, 4, 6, 90, "gpu")


def script(folder: Path, site: Site, count: int = 1, max_parallel: int | None = None) -> list[str]:
    executor = slurm_executor(folder / "submission", "name", WANTS, site, folder / "code", max_timeouts=30)
    return slurm_text(executor, count, max_parallel).splitlines()


def test_script_asks_for_a_task_per_gpu_a_requeue_and_a_signal_in_time(tmp_path):
    lines = script(tmp_path, Site())
    assert {
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=4",
        "#SBATCH --gpus-per-node=4",
        "#SBATCH --cpus-per-task=6",
        "#SBATCH --partition=gpu",
        "#SBATCH --time=90",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        "#SBATCH --signal=USR2@300",
        f"#SBATCH --output={tmp_path}/submission/%j_0_log.out",
        "export PYTHONSAFEPATH=1",
        f"export PYTHONPATH={tmp_path}/code${{PYTHONPATH:+:$PYTHONPATH}}",
    } <= set(lines)
    srun = next(line for line in lines if line.startswith("srun "))
    assert " --kill-on-bad-exit=1 --cpus-per-task=6 " in srun
    assert f" env --block-signal=USR1,USR2 {sys.executable} -u -m submitit" in srun
    assert not [line for line in lines if "--error" in line or "wckey" in line]
    assert not (tmp_path / "submission").exists()


def test_script_follows_the_profile(tmp_path):
    site = Site(
        account="me",
        qos="long",
        gres="gpu:a100:{gpus}",
        setup=("module load cuda",),
        environment={"NOTE": "it's"},
        signal_seconds=600,
        srun=("--mpi=none",),
        sbatch={"reservation": "night", "exclusive": True},
        python="/opt/python",
    )
    lines = script(tmp_path, site)
    assert {"#SBATCH --account=me", "#SBATCH --qos=long", "#SBATCH --gres=gpu:a100:4"} <= set(lines)
    assert {"#SBATCH --reservation=night", "#SBATCH --exclusive", "#SBATCH --signal=USR2@600"} <= set(lines)
    assert not [line for line in lines if "gpus-per-node" in line]
    assert lines.index("module load cuda") < lines.index("export NOTE='it'\"'\"'s'")
    assert "--mpi=none env --block-signal=USR1,USR2 /opt/python -u" in "\n".join(lines)


@pytest.mark.parametrize(
    ("code", "said", "ends", "asked"),
    [
        (143, "JobId=12 PreemptTime=2026-05-02T14:00:00", 0, ["show job 12_3", "requeue 12_3"]),
        (143, "JobId=12 PreemptTime=None", 143, ["show job 12_3"]),
        (0, "JobId=12 PreemptTime=2026-05-02T14:00:00", 0, []),
        (3, "JobId=12 PreemptTime=2026-05-02T14:00:00", 3, []),
    ],
)
def test_script_requeues_what_was_preempted_by_term_alone(tmp_path, code, said, ends, asked):
    calls = tmp_path / "calls"
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$*" >> {calls}\necho "{said}"\n')
    (tmp_path / "scontrol").chmod(0o755)
    lines = script(tmp_path, Site())
    after = "\n".join(lines[lines.index("# teardown") :])
    job = {"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}
    words = ["bash", "-c", f"(exit {code})\n{after}"]
    assert subprocess.run(words, env=os.environ | job | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}).returncode == ends
    assert (calls.read_text().splitlines() if calls.exists() else []) == asked
    assert lines.index("trap : TERM USR1 USR2") < lines.index("# command")


def test_job_whose_snapshot_is_gone_runs_no_other_code(tmp_path):
    with pytest.raises(ConfigError, match="the code that this job was submitted with is gone or hidden"):
        launch.PretrainJob("c.yaml", str(tmp_path / "code"))._run()


def test_site_without_gres_asks_for_no_gpus(tmp_path):
    assert not [line for line in script(tmp_path, Site(gres="none")) if "gpu" in line and "partition" not in line]


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
def test_container_sees_the_snapshot_and_the_folder_of_submission(tmp_path, runtime):
    site = Site(container=Container(runtime=runtime, image="a b.sif", mounts=("/data", "/x:/y")))
    lines = script(tmp_path, site)
    here = os.getcwd()
    assert f"export PYTHONPATH={tmp_path}/code" in lines
    srun = next(line for line in lines if line.startswith("srun "))
    if runtime == "pyxis":
        assert f"--container-mounts={here}:{here},{tmp_path}:{tmp_path},/data:/data,/x:/y" in srun
        assert "'--container-image=a b.sif'" in srun
        assert "env --block-signal=USR1,USR2 python3 -u -m" in srun
    else:
        assert f"apptainer exec --nv --pwd {here} --bind {here}:{here} --bind {tmp_path}:{tmp_path}" in srun
        assert "'a b.sif' python3 -u -m" in srun


def test_sweep_is_an_array_with_a_log_each(tmp_path):
    lines = script(tmp_path, Site(), count=6, max_parallel=4)
    assert "#SBATCH --array=0-5%4" in lines
    assert f"#SBATCH --output={tmp_path}/submission/%A_%a_0_log.out" in lines
    assert f" --output={tmp_path}/submission/%A_%a_0_log.out --open-mode=append" in "\n".join(lines)


def test_folder_with_spaces_and_quotes_survives_the_shell(tmp_path):
    folder = tmp_path / "it's a run"
    words = "\n".join(script(folder, Site())).partition("export PYTHONPATH=")[2].splitlines()[0]
    done = subprocess.run(["bash", "-c", f"unset PYTHONPATH; echo {words}"], capture_output=True, text=True)
    assert done.stdout == f"{folder}/code\n"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"gpus_per_node": 4, "tasks_per_node": 2}, "there is one task per GPU; leave out --tasks-per-node"),
        ({"time": "5"}, "the job would be told to save as soon as it starts, 300 s before its limit"),
        ({"max_parallel": 2}, "--max-parallel 2: is for --sweep"),
        ({"cluster": "local", "nodes": 2}, "it has this machine only; leave --nodes out"),
        ({"cluster": "debug", "tasks_per_node": 2}, "it runs one rank, in this process"),
        ({"cluster": "local", "profile": Path("x.yaml")}, "--profile x.yaml: is for a Slurm cluster"),
        ({"cluster": "debug", "partition": "gpu"}, "--partition gpu: is for a Slurm cluster"),
        ({"cluster": "local", "max_parallel": 2}, "--max-parallel 2: is for a Slurm cluster"),
    ],
)
def test_wishes_that_contradict_each_other_are_refused(given, says):
    with pytest.raises(ConfigError) as caught:
        allocation(Request("c.yaml", **given), Site(), [Config.model_validate({})])
    assert says in str(caught.value)


def test_short_local_run_is_told_of_no_profile():
    with pytest.raises(ConfigError, match=r"before its limit; ask for more$"):
        allocation(Request("c.yaml", cluster="local", time="5"), Site(), [Config.model_validate({})])


def test_command_line_wins_over_the_profile_and_the_profile_over_the_run():
    cfg = with_workers(5)
    site = Site(partition="theirs", cpus_per_task=9)
    assert allocation(Request("c"), Site(), [cfg]).cpus_per_task == 7
    assert allocation(Request("c"), site, [cfg]).cpus_per_task == 9
    assert allocation(Request("c", cpus_per_task=3), site, [cfg]).cpus_per_task == 3
    assert allocation(Request("c"), site, [cfg]).partition == "theirs"
    assert allocation(Request("c", partition="mine"), site, [cfg]).partition == "mine"


def with_workers(count: int) -> Config:
    return Config.model_validate({"data": {"num_workers": count}})


def test_sweep_gets_the_cpus_that_its_largest_run_wants():
    assert allocation(Request("c"), Site(), [with_workers(count) for count in (1, 5, 2)]).cpus_per_task == 7


def test_job_that_this_process_is_part_of_is_hidden_from_sbatch(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "7")
    monkeypatch.setenv("SLURM_CONF", "/etc/other.conf")
    assert of_other_jobs({}) == []  # of the user, not of a job
    monkeypatch.setenv("SLURM_JOB_ID", "3")
    with hidden(of_other_jobs({})):
        assert [name for name in os.environ if name.startswith("SLURM_")] == ["SLURM_CONF"]
    assert os.environ["SLURM_CPUS_PER_TASK"] == "7"


def test_variables_of_sbatch_that_would_win_over_the_script_are_hidden(tmp_path, monkeypatch):
    for name in ("TIMELIMIT", "EXPORT", "NO_REQUEUE", "PARTITION", "MEM_PER_CPU", "ACCOUNT", "JOB_NAME", "RESERVATION"):
        monkeypatch.setenv(f"SBATCH_{name}", "5")
    site = Site(mem="4G", sbatch={"reservation": "night"})
    executor = slurm_executor(tmp_path / "s", "name", WANTS, site, tmp_path / "code", max_timeouts=30)
    with hidden(of_other_jobs(executor.parameters)):
        assert [name for name in os.environ if name.startswith("SBATCH_")] == ["SBATCH_ACCOUNT"]


def test_local_ranks_get_the_gpus_that_are_visible(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus(2) == ()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 7,1")
    assert visible_gpus(2) == [4, 7, 1]
    assert visible_gpus(0) == ()
    for text in ("4", "", "GPU-1f0c,GPU-2a"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
        with pytest.raises(ConfigError, match="must name that many GPUs by their numbers, such as 0,1"):
            allocation(Request("c", cluster="local", gpus_per_node=2), Site(), [with_workers(1)])


@pytest.mark.parametrize(("time", "seconds", "is_noted"), [("30", 600, True), ("30", 599, False), ("100", 600, False)])
def test_signal_that_submitit_does_not_count_is_noted(time, seconds, is_noted):
    site = Site(signal_seconds=seconds)
    request = Request("c", time=time)
    said = "\n".join(notes(request, allocation(request, site, [with_workers(1)]), site, []))
    assert ("--max-timeouts will not end the job" in said) is is_noted


def test_ctrl_c_while_a_local_run_is_recorded_stops_it_recorded(tmp_path, monkeypatch):
    process = subprocess.Popen(["sleep", "100"])
    paths = JobPaths(tmp_path, str(process.pid), 0)
    job = SimpleNamespace(
        job_id=str(process.pid),
        paths=paths,
        task=lambda rank: SimpleNamespace(paths=paths),
        done=lambda: process.poll() is not None,
    )
    monkeypatch.setattr(submission, "local_executor", lambda *_: SimpleNamespace(submit=lambda _: job))
    record = submission.record

    def interrupted(*words):
        os.kill(os.getpid(), signal.SIGINT)
        record(*words)

    monkeypatch.setattr(submission, "record", interrupted)
    plan = Plan(Config.model_validate({"run": {"dir": str(tmp_path), "name": "a"}}), False, ())
    plan.submission.mkdir(parents=True)
    wants = launch.Allocation(1, 1, 0, 1, 90, None)
    request = Request("c", cluster="local")
    assert submission.run_on_this_machine(request, wants, Site(), tmp_path, tmp_path / "code", plan) == 1
    assert process.returncode == -signal.SIGTERM
    assert json.loads((plan.submission / admission.RECORD).read_text())["job"] == str(process.pid)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_settings_that_are_kept_for_a_job_are_those_that_it_reads_also_with_a_deepspeed_file(tmp_path):
    own = tmp_path / "own.json"
    own.write_text('{"zero_optimization": {"stage": 2}}')
    values = {"run": {"dir": str(tmp_path), "name": "a"}, "train": {"steps": 3}, "engine": {"deepspeed": str(own)}}
    plan = Plan(parse_config(values, "test"), False, ())
    keep(Request("c"), tmp_path, [plan], [plan])
    read = load_config(plan.submission / "config.yaml")
    assert Path(read.engine.deepspeed).read_text() == own.read_text()
    engine = plan.cfg.engine.model_copy(update={"deepspeed": read.engine.deepspeed})
    assert read == plan.cfg.model_copy(update={"engine": engine})


def test_refused_submission_leaves_what_was_there(tmp_path, monkeypatch):
    for name in ("sbatch", "srun"):
        (tmp_path / name).write_text("#!/bin/sh\necho sbatch: error: invalid account >&2\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    home = tmp_path / "study"
    plans = [Plan(Config.model_validate({"run": {"dir": str(home), "name": name}}), False, ()) for name in ("a", "b")]
    request = Request("c", sweep=("seed=1,2",))
    (home / "submission").mkdir(parents=True)
    (home / "submission" / "other.pkl").touch()
    (home / "b" / "submission").mkdir(parents=True)
    (home / "b" / "submission" / admission.RECORD).touch()
    keep(request, home, plans, plans)
    with pytest.raises(ConfigError, match="sbatch refused the job: .*invalid account"):
        send(request, WANTS, Site(), home, tmp_path / "code", plans)
    left = {str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()}
    mine = {"b/submission/config.yaml", f"b/submission/{admission.RECORD}"}
    assert left == {"submission/other.pkl", "submission/sweep.json", *mine}
    assert not (home / "a").exists()


@pytest.mark.parametrize(
    ("answer", "state"),
    [
        ("echo '12_3|14|RUNNING|None'", "running"),
        ("echo '12_3|14|COMPLETING|None'", "completing"),
        ('test -z "$SQUEUE_STATES$SQUEUE_FORMAT" && echo "12_3|12|PENDING|Priority"', "pending"),
        ("true", None),
        ("echo slurm_load_jobs error: Invalid job id specified >&2; exit 1", None),
    ],
)
def test_state_of_an_earlier_job_is_what_squeue_says(tmp_path, monkeypatch, answer, state):
    monkeypatch.setenv("SQUEUE_STATES", "RUNNING")
    monkeypatch.setenv("SQUEUE_FORMAT", "%j")
    squeue(tmp_path, monkeypatch, answer)
    assert job_state("12_3") == state


def test_slurm_that_does_not_answer_is_no_ended_job(tmp_path, monkeypatch):
    squeue(tmp_path, monkeypatch, "echo Unable to contact slurm controller >&2; exit 1")
    with pytest.raises(
        ConfigError, match="job 12 of this run may go on: .* slurm controller; try again when Slurm answers"
    ):
        job_state("12")


def squeue(folder: Path, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    (folder / "squeue").write_text(f"#!/bin/sh\n{answer}\n")
    (folder / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_run_whose_job_has_not_ended_is_refused(tmp_path, monkeypatch):
    (tmp_path / "submission").mkdir()
    record = tmp_path / "submission" / admission.RECORD
    record.write_text(json.dumps({"job": "7", "cluster": "slurm", "host": "login"}))
    monkeypatch.setattr(admission, "job_state", lambda job: "pending")
    with pytest.raises(ConfigError, match="job 7 of this run is pending; wait for its end, or end it with `scancel 7`"):
        refuse_running(tmp_path)
    monkeypatch.setattr(admission, "job_state", lambda job: None)
    refuse_running(tmp_path)
    record.write_text("[]")
    with pytest.raises(ConfigError, match="can't be read as the record of a submission"):
        refuse_running(tmp_path)


def test_every_fault_of_every_run_of_a_sweep_is_told_at_once(runs):
    words = ("data.crop_frames=100,96", "model.patch_size=16x16,17x16")
    with pytest.raises(ConfigError) as caught:
        variants(Request(str(runs.config), tuple(runs.command("sweep")[1:]), sweep=words))
    said = str(caught.value)
    assert said.count("data.crop_frames = 100: must be a multiple") == 2
    assert said.count("model.patch_size = 17x16: its height must divide") == 2


def test_one_fault_of_all_runs_of_a_sweep_is_told_once(runs):
    with pytest.raises(ConfigError) as caught:
        variants(Request(str(runs.config), (*runs.command("sweep")[1:], "data.crop_framez=96"), sweep=("seed=1,2,3",)))
    assert str(caught.value).count("data.crop_framez: unknown key") == 1


def test_one_fault_of_several_runs_of_a_sweep_names_the_first_and_counts_the_others(runs):
    with pytest.raises(ConfigError, match=r"(?s)^sizes-a_seed-1 and 1 more: .*model.sizes: unknown key"):
        variants(Request(str(runs.config), tuple(runs.command("sweep")[1:]), sweep=("model.sizes=a", "seed=1,2")))


def test_runs_of_a_sweep_live_below_its_folder(runs):
    request = Request(str(runs.config), tuple(runs.command("sweep")[1:]), sweep=("seed=1,2",))
    home, configs = variants(request)
    assert home == runs.folder / "sweep"
    assert [cfg.run.folder for cfg in configs] == [home / "seed-1", home / "seed-2"]
    assert [cfg.seed for cfg in configs] == [1, 2]


@pytest.mark.parametrize("name", ["exp #3", "2024", "[x]", "it's é"])
def test_folder_of_a_sweep_may_have_any_name(tmp_path, monkeypatch, runs, name):
    monkeypatch.chdir(tmp_path)
    words = (*runs.command("sweep")[1:], f"run.dir={json.dumps(name)}")
    home, configs = variants(Request(str(runs.config), words, sweep=("seed=1,2",)))
    assert home == tmp_path / name / "sweep"
    assert [cfg.run.folder.absolute() for cfg in configs] == [home / "seed-1", home / "seed-2"]


def test_folder_that_would_split_the_path_of_modules_is_refused(runs):
    with pytest.raises(ConfigError, match="PYTHONPATH can't name the code in a folder with :"):
        variants(Request(str(runs.config), (*runs.command("colon")[1:], "run.dir='/tmp/a:b'")))


def test_dry_run_prints_the_script_and_writes_nothing(runs):
    before = sorted(runs.folder.rglob("*"))
    done = submit(runs, "dry", "--nodes", "2", "--gpus-per-node", "2", "--partition", "gpu", "--time", "9", "--dry-run")
    assert done.returncode == 0, done.stdout
    assert "#SBATCH --partition=gpu" in done.stdout
    assert "up to 10 minutes submitit counts every preemption" in done.stdout
    assert sorted(runs.folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--nodes", "3", "--dry-run"], "must be a multiple of 3 processes"),
        (["data.num_workers=3", "--dry-run"], "data.num_workers"),
        (["--time", "soon", "--dry-run"], "--time soon: must be a time"),
        (["--profile", "nowhere.yaml", "--dry-run"], "nowhere.yaml: no such cluster profile"),
        (["--sweep", "seed=1,x", "--dry-run"], "seed = 'x'"),
        (["--cluster", "local", "data.valid_shards=nowhere"], "data.valid_shards = nowhere"),
    ],
)
def test_wrong_submission_is_one_message_and_exit_code_2(runs, words, says):
    done = submit(runs, "wrong", *words)
    assert done.returncode == 2, done.stdout
    assert says in done.stdout
    assert "Traceback" not in done.stdout


def test_python_without_the_package_is_told_what_to_do(tmp_path):
    words = [sys.executable, "-S", str(HERE.parent / "slurm" / "submit.py"), "c.yaml"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 2
    assert "has no msm_dist: submit with the project's own" in done.stderr
    assert "Traceback" not in done.stderr


def test_corpus_that_is_elsewhere_is_a_note(runs):
    done = submit(runs, "elsewhere", "data.shards=nowhere", "--dry-run")
    assert done.returncode == 0, done.stdout
    assert (
        "note: elsewhere: the corpus could not be checked on this machine: nowhere: no index.json there" in done.stdout
    )


def test_debug_runs_in_this_process_and_a_finished_run_says_so(runs):
    done = submit(runs, "debug", "--cluster", "debug", "train.steps=4", RANK="0", WORLD_SIZE="4")
    assert done.returncode == 0, done.stdout
    assert "step 4/4" in done.stdout
    done = submit(runs, "debug", "--cluster", "debug", "train.steps=4")
    assert done.returncode == 0, done.stdout
    assert "is finished" in done.stdout
    done = submit(runs, "debug", "--cluster", "debug", "train.steps=4", "seed=3")
    assert done.returncode == 2, done.stdout
    assert "seed: 0 in" in done.stdout


LONG = ["train.steps=40", "train.valid_every=40", "checkpoint.every=1000"]


# None of these ends before it is ended.
ENDLESS = ["train.steps=100000", "train.valid_every=100000", "checkpoint.every=100000"]


@pytest.mark.distributed
def test_local_job_that_was_preempted_goes_on_at_the_step_and_ends_as_one_that_was_not(runs, tmp_path):
    codes, output = runs.run("undisturbed", *LONG)
    assert codes == [0, 0], output
    faulty = Faulty(tmp_path)
    hold = faulty.pause(Where(WRITE, f"{runs.folder}/preempted/metrics.jsonl", '{"step": 4, "loss"'))
    job = start(runs, "preempted", *LONG, MASTER_PORT="1", **faulty.environment)
    wait_for(hold.is_reached, [job])
    os.kill(rank_pids(runs, "preempted")[1], signal.SIGUSR2)
    hold.let_go()
    output = job.communicate(timeout=600)[0]
    assert job.returncode == 0, output
    saved = [line.split()[5] for line in output.splitlines() if line.startswith("stopped and saved at step")]
    assert len(saved) == 1
    assert f"continued from {runs.folder}/preempted/checkpoints/step-{int(saved[0]):08d}" in output
    assert output.count(f"code       {runs.folder}/preempted/code/") == 2
    assert "master     127.0.0.1:" in output and "127.0.0.1:1\n" not in output, "a port of its own"
    assert runs.losses("preempted") == runs.losses("undisturbed")
    assert runs.trace("preempted") == runs.trace("undisturbed")
    assert runs.weights("preempted") == runs.weights("undisturbed")


@pytest.mark.distributed
def test_local_job_that_is_stopped_saves_and_the_same_command_continues(runs):
    job = start(runs, "stopped", *ENDLESS)
    reach(runs, "stopped", job, 3)
    again = submit(runs, "stopped", *ENDLESS, "--cluster", "local", "--tasks-per-node", "2")
    assert again.returncode == 2, again.stdout
    assert "on this machine runs it; wait for its end" in again.stdout
    job.send_signal(signal.SIGTERM)
    output = job.communicate(timeout=600)[0]
    assert job.returncode == 128 + signal.SIGTERM, output
    assert "Traceback" not in output
    end = int(re.search(r"stopped and saved at step (\d+)", output)[1]) + 5
    again = submit(runs, "stopped", *ENDLESS, f"train.steps={end}", f"train.valid_every={end}", "--cluster", "local")
    assert again.returncode == 0, again.stdout
    assert "continued from" in again.stdout


@pytest.mark.distributed
def test_local_job_whose_output_nobody_reads_any_more_saves_and_stops(runs):
    job = start(runs, "unread", *ENDLESS)
    reach(runs, "unread", job, 3)
    job.stdout.close()
    assert job.wait(timeout=600) == 128 + signal.SIGTERM
    logs = "".join(path.read_text() for path in (runs.folder / "unread" / "submission").glob("*_log.out"))
    assert "stopped and saved at step" in logs
    assert "Traceback" not in logs


@pytest.mark.distributed
def test_lost_rank_of_a_local_job_ends_it_with_a_failure(runs):
    job = start(runs, "lost", *ENDLESS)
    reach(runs, "lost", job, 3)
    os.kill(rank_pids(runs, "lost")[1], signal.SIGKILL)
    output = job.communicate(timeout=600)[0]
    assert job.returncode == 1, output
    assert "another process of the run ended" in output


def start(runs: Runs, name: str, *words: str, **environment: str) -> subprocess.Popen:
    words = (*words, "--cluster", "local", "--tasks-per-node", "2")
    return subprocess.Popen(command(runs, name, *words), env=environment_of(environment), **OPTIONS)


def reach(runs: Runs, name: str, job: subprocess.Popen, steps: int) -> None:
    metrics = runs.folder / name / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= steps, [job])


def rank_pids(runs: Runs, name: str) -> list[int]:
    """The ranks of a local job, in their order."""
    controller = json.loads((runs.folder / name / "submission" / admission.RECORD).read_text())["job"]
    return [int(pid) for pid in Path(f"/proc/{controller}/task/{controller}/children").read_text().split()]
