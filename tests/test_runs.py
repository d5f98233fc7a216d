"""`msm-dist runs`: what it makes of run folders, of damaged ones, and of what Slurm says or does not say."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from msm_dist import jobs, traces
from msm_dist.config import Config, batch_layout, dump_config, load_config
from msm_dist.corpus import open_corpus, plan_identity
from msm_dist.engine.runfolder import DEAD_AFTER_SECONDS, locked
from msm_dist.errors import ConfigError
from msm_dist.runs import Run, find_runs, show_runs
from tests.corpus import write_corpus

SQUEUE, SACCT = "squeue", "sacct"


class Folder:
    """A run folder made by hand, one file at a time."""

    def __init__(self, path: Path, steps: int = 100):
        self.path = path
        path.mkdir(parents=True)
        self.cfg = Config.model_validate({"train": {"steps": steps}, "data": {"valid_shards": "valid"}})

    def write(self, name: str, content: str | bytes | dict[str, Any] = "", age: float = 0.0) -> "Folder":
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = json.dumps(content) if isinstance(content, dict) else content
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        moment = time.time() - age
        os.utime(path, (moment, moment))
        return self

    def start(self, age: float = 1000.0) -> "Folder":
        return self.write("config.yaml", dump_config(self.cfg), age).write("environment.json", {}, age)

    def log(self, *lines: dict[str, Any], age: float = 0.0) -> "Folder":
        return self.write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines), age)

    def save(self, step: int) -> "Folder":
        return self.write(f"checkpoints/step-{step:08d}/complete")

    def export(self) -> "Folder":
        return self.write("export/config.json").write("export/model.safetensors")

    def lock(self, age: float = 0.0, host: str = "elsewhere", **owner: Any) -> "Folder":
        return self.write("lock.json", {"host": host, "pid": 1, "started": "0", "job": None} | owner, age)

    def submit(self, job: str, cluster: str = "slurm") -> "Folder":
        self.write("submission/config.yaml", dump_config(self.cfg))
        return self.write("submission/submission.json", {"job": job, "cluster": cluster})


@pytest.fixture(autouse=True)
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of PATH: no Slurm, unless a test puts one there."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def program(folder: Path, name: str, script: str) -> Path:
    """A stand-in for a Slurm command; returns the file to which each call adds its words."""
    calls = folder.parent / f"{name}.calls"
    (folder / name).write_text(f'#!/bin/bash\necho "$*" >> {calls}\n{script}\n')
    (folder / name).chmod(0o755)
    return calls


def only_run(root: Path) -> Run:
    (run,), _ = find_runs(root)
    return run


def state(root: Path) -> tuple[str, str]:
    run = only_run(root)
    return run.state, run.note


def test_a_finished_run_shows_its_last_numbers(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "runs" / "a").start().save(100).export()
    folder.log(
        {"step": 80, "valid_loss": 0.9},
        {"step": 90, "loss": 0.5, "clips_per_second": 10.0},
        {"step": 100, "loss": 0.25, "clips_per_second": 20.0},
        {"step": 100, "valid_loss": 0.75},
        age=60.0,
    )
    run = only_run(tmp_path / "runs")
    assert (run.run, run.state, run.step, run.total_steps) == ("a", "finished", 100, 100)
    assert (run.loss, run.valid_loss, run.clips_per_second) == (0.25, 0.75, 20.0)
    assert 60.0 - 1.0 <= run.age_seconds < 660.0


def test_a_run_asked_for_more_steps_is_no_longer_finished(tmp_path: Path) -> None:
    Folder(tmp_path / "runs" / "a", steps=200).start().save(100).export().log({"step": 100, "loss": 0.25})
    assert state(tmp_path / "runs") == ("stopped", "saved at step 100")


def test_an_owner_lives_by_its_heartbeat(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "runs" / "a").start().save(10).lock(age=DEAD_AFTER_SECONDS - 60)
    assert state(tmp_path / "runs") == ("running", "")
    folder.lock(age=DEAD_AFTER_SECONDS + 60)
    assert state(tmp_path / "runs") == ("stopped", "killed, saved at step 10")


def test_an_owner_on_this_machine_lives_by_its_process(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "runs" / "a").start().save(10)
    with locked(folder.path):
        assert state(tmp_path / "runs") == ("running", "")
    assert state(tmp_path / "runs") == ("stopped", "saved at step 10")
    # The number is that of a process, but of another that began at another time.
    folder.lock(host=socket.gethostname(), pid=os.getpid())
    assert state(tmp_path / "runs") == ("stopped", "killed, saved at step 10")


def test_a_run_with_nothing_to_continue_from_has_failed(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "runs" / "a").start().log({"step": 3, "loss": 0.5})
    folder.write("checkpoints/step-00000010/meta.json").write("checkpoints/step-00000020.partial/complete")
    assert state(tmp_path / "runs") == ("failed", "nothing saved")


def test_a_run_has_diverged_until_it_is_started_again(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "runs" / "a").start(age=50).save(10).write("diverged.json", {"step": 17}, age=20)
    assert state(tmp_path / "runs") == ("diverged", "at step 17")
    folder.start(age=10)
    assert state(tmp_path / "runs") == ("stopped", "saved at step 10")


@pytest.mark.parametrize("epochs", [3, 0.1, 2.03])
def test_steps_of_a_run_in_epochs_are_those_the_run_counts(tmp_path: Path, epochs: float) -> None:
    shards = write_corpus(tmp_path / "train", seed=0)
    words = [f"data.shards={shards}", f"train.epochs={epochs}", "train.global_batch=12", "train.micro_batch=4"]
    words += ["data.block=4", "data.num_workers=1", "data.crops_per_clip=2", "data.shuffle_window=16"]
    empty = tmp_path / "empty.yaml"
    empty.write_text("")
    cfg = load_config(empty, words)
    corpus = open_corpus(cfg, batch_layout(cfg, 1))
    folder = Folder(tmp_path / "runs" / "a").start()
    folder.write("config.yaml", dump_config(cfg))
    assert only_run(tmp_path / "runs").total_steps is None
    folder.write("plan.json", plan_identity(corpus))
    assert only_run(tmp_path / "runs").total_steps == corpus.total_steps


def test_what_squeue_says_of_a_job(tmp_path: Path, programs: Path) -> None:
    runs = tmp_path / "runs"
    Folder(runs / "array").submit("7_2")
    Folder(runs / "held").submit("9")
    Folder(runs / "interactive").start().save(10).lock(job=None).submit("9")
    Folder(runs / "local").submit("9", cluster="local")
    Folder(runs / "lost").submit("11")
    Folder(runs / "requeued").start().save(10).lock(job="12")
    Folder(runs / "started").start().lock(age=1e4, job="10")
    Folder(runs / "saved").start().save(10).write("environment.json", {"job": "14"})
    Folder(runs / "suspended").start().lock(age=1e4, job="13")
    rows = ["7_2|7|PENDING|JobArrayTaskLimit", "7_3|7|PENDING|Priority", "9|9|PENDING|JobHeldUser"]
    rows += ["7_1|10|RUNNING|None", "12|12|PENDING|BeginTime", "13|13|SUSPENDED|None", "14|14|PENDING|BeginTime"]
    calls = program(programs, SQUEUE, "\n".join(f"echo '{row}'" for row in rows))
    found, complaints = find_runs(runs)
    assert {run.run: (run.state, run.note, run.job) for run in found} == {
        "array": ("queued", "JobArrayTaskLimit", "7_2"),
        "held": ("queued", "JobHeldUser", "9"),
        "interactive": ("running", "", None),
        "local": ("submitted", "", "9"),
        "lost": ("never started", "", "11"),
        "requeued": ("queued", "BeginTime", "12"),
        "saved": ("queued", "BeginTime", "14"),
        "started": ("running", "", "7_1"),
        "suspended": ("running", "suspended", "13"),
    }
    assert not complaints
    assert len(calls.read_text().splitlines()) == 1


def test_a_run_that_ended_within_a_job_that_lives_on(tmp_path: Path, programs: Path) -> None:
    runs = tmp_path / "runs"
    Folder(runs / "diverged").start(age=50).save(10).write("diverged.json", {"step": 17}, age=20).submit("5")
    Folder(runs / "finished").start().save(100).export().log({"step": 100, "loss": 0.25}).submit("5")
    Folder(runs / "left").start().save(10).write("environment.json", {"job": "5"})
    Folder(runs / "starting").start().save(10).write("environment.json", {"job": "5"}).submit("5")
    Folder(runs / "task").start().save(10).write("environment.json", {"job": "8"}).submit("7_1")
    program(programs, SQUEUE, "echo '5|5|RUNNING|None'; echo '7_1|8|RUNNING|None'")
    assert {run.run: (run.state, run.note) for run in find_runs(runs)[0]} == {
        "diverged": ("diverged", "at step 17"),
        "finished": ("finished", ""),
        "left": ("stopped", "saved at step 10"),
        "starting": ("running", ""),
        "task": ("running", ""),
    }


def test_settings_without_a_submission_never_started(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "runs" / "a")
    folder.write("submission/config.yaml", dump_config(folder.cfg))
    assert state(tmp_path / "runs") == ("never started", "")


def test_a_number_that_all_waiting_tasks_share_is_no_one_of_them(tmp_path: Path, programs: Path) -> None:
    Folder(tmp_path / "runs" / "a").start().save(10).lock(age=1e4, job="7")
    program(programs, SQUEUE, "echo '7_2|7|PENDING|Priority'; echo '7_3|7|PENDING|Priority'")
    assert state(tmp_path / "runs") == ("stopped", "killed, saved at step 10")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("5|5|FAILED|2:0", ("failed", "failed with exit code 2, saved at step 10")),
        ("4_1|5|OUT_OF_MEMORY|0:125", ("failed", "out of memory, saved at step 10")),
        ("5|5|FAILED|75:0", ("stopped", "failed with exit code 75, saved at step 10")),
        ("5|5|FAILED|143:0", ("stopped", "failed with exit code 143, saved at step 10")),
        ("5|5|CANCELLED by 1000|0:15", ("stopped", "cancelled, saved at step 10")),
        ("5|5|TIMEOUT|0:0", ("stopped", "timeout, saved at step 10")),
    ],
)
def test_what_sacct_says_of_a_job_that_has_ended(
    tmp_path: Path, programs: Path, row: str, expected: tuple[str, str]
) -> None:
    folder = Folder(tmp_path / "runs" / "a").start().save(10).submit("5")
    Folder(tmp_path / "runs" / "b").submit("5")
    program(programs, SQUEUE, "exit 0")
    calls = program(programs, SACCT, f"echo '{row}|{time.strftime('%Y-%m-%dT%H:%M:%S')}'")
    (begun, unbegun), complaints = find_runs(tmp_path / "runs")
    assert (begun.state, begun.note) == expected
    assert unbegun.state == "failed" and unbegun.note.endswith("never started")
    assert not complaints
    assert len(calls.read_text().splitlines()) == 1
    # Started anew, by hand: how the job ended is the past.
    folder.start(age=-1000)
    (begun, _), _ = find_runs(tmp_path / "runs")
    assert (begun.state, begun.note) == ("stopped", "saved at step 10")


def test_a_silent_slurm_is_said_below_the_table(
    tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Folder(tmp_path / "runs" / "a").submit("5")
    assert state(tmp_path / "runs") == ("submitted", "")  # nobody to ask, and nobody to complain of
    assert find_runs(tmp_path / "runs")[1] == []
    program(programs, SQUEUE, "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    program(programs, SACCT, "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    show_runs(tmp_path / "runs")
    shown = capsys.readouterr().out.splitlines()
    assert shown[1].split() == ["a", "submitted", "5", "?/100", "-", "-", "-", "-"]
    assert "squeue failed with exit code 1: slurm_load_jobs error: Unable to contact slurm controller" in shown[2]
    assert "sacct failed with exit code 1: Slurm accounting storage is disabled" in shown[3]
    show_runs(tmp_path / "runs", as_json=True)
    shown = capsys.readouterr()
    assert json.loads(shown.out)["state"] == "submitted" and "squeue failed" in shown.err
    monkeypatch.setattr(jobs, "PATIENCE_SECONDS", 0.2)
    program(programs, SQUEUE, "while :; do :; done")
    assert find_runs(tmp_path / "runs")[1][0].startswith("squeue did not answer within")


def test_a_users_defaults_for_squeue_hide_no_jobs(
    tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Folder(tmp_path / "runs" / "a").submit("5")
    program(programs, SQUEUE, '[ -n "${SQUEUE_STATES:-}" ] || echo "5|5|PENDING|Priority"')
    monkeypatch.setenv("SQUEUE_STATES", "RUNNING")
    assert state(tmp_path / "runs") == ("queued", "Priority")


def test_runs_are_found_below_groups_and_sweeps_but_not_in_snapshots(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    Folder(runs / "study" / "crop_frames-208").start()
    Folder(runs / "study" / "crop_frames-96").submit("5_1")
    Folder(runs / "study" / "submission").write("sweep.json", {})
    Folder(runs / "study" / "code" / "digest" / "configs").write("config.yaml")
    Folder(runs / "group" / "plain").start().write("checkpoints/a/config.yaml").write("below/config.yaml")
    Folder(runs / ".hidden").start()
    assert [run.run for run in find_runs(runs)[0]] == ["group/plain", "study/crop_frames-96", "study/crop_frames-208"]
    assert [run.run for run in find_runs(runs / "study")[0]] == ["crop_frames-96", "crop_frames-208"]
    assert [run.run for run in find_runs(runs / "group" / "plain")[0]] == ["plain"]


def test_links_that_go_round_end(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    Folder(runs / "a" / "run").start()
    Folder(tmp_path / "scratch" / "far").start()
    (runs / "a" / "up").symlink_to(runs)
    (runs / "linked").symlink_to(tmp_path / "scratch")
    (runs / "self").symlink_to("self")
    assert [run.run for run in find_runs(runs)[0]] == ["a/run", "linked/far"]


DAMAGED = [b"", b"{", b"[]", b"\xff\xfe\x00", b"3", b"[" * 200_000, b'{"step": ' + b"9" * 5000 + b"}", b"- " * 200_000]


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_damaged_files_count_as_missing(tmp_path: Path, content: bytes) -> None:
    folder = Folder(tmp_path / "runs" / "a")
    for name in ("config.yaml", "environment.json", "plan.json", "lock.json", "metrics.jsonl", "diverged.json"):
        folder.write(name, content, age=1e4)
    folder.write("submission/submission.json", content).write("submission/config.yaml", content)
    run = only_run(tmp_path / "runs")
    assert (run.state, run.step, run.total_steps, run.loss) == ("diverged", None, None, None)


def test_values_of_the_wrong_kind_count_as_missing(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "runs" / "a").start().lock(age=1e4, job=["5"], pid="x", host=3)
    folder.write("config.yaml", yaml.safe_dump({"train": {"steps": "many"}, "data": ["valid_shards"]}))
    folder.write("submission/submission.json", {"job": "5; rm -rf /", "cluster": 3})
    folder.log({"step": "7", "loss": "low", "clips_per_second": [1]}, {"step": True, "loss": True})
    run = only_run(tmp_path / "runs")
    assert (run.state, run.step, run.total_steps, run.loss, run.clips_per_second) == ("failed", None, None, None, None)


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "runs" / "a").start()
    folder.write("metrics.jsonl", '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}')
    assert (only_run(tmp_path / "runs").step, only_run(tmp_path / "runs").loss) == (1, 0.5)


def test_only_the_end_of_a_long_record_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(tmp_path / "runs" / "a").start().log({"step": 10, "valid_loss": 0.5})
    lines = b"".join(b'{"step": %d, "loss": 0.25}\n' % step for step in range(11, 20_000))
    with (folder.path / "metrics.jsonl").open("ab") as file:
        file.truncate(100 * 2**20)
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + lines)
    taken: list[int] = []
    read = traces._read

    def counted(path: Path, *words: Any, **named: Any) -> bytes:
        content = read(path, *words, **named)
        taken.append(len(content))
        return content

    monkeypatch.setattr(traces, "_read", counted)
    run = only_run(tmp_path / "runs")
    assert (run.step, run.loss, run.valid_loss) == (19_999, 0.25, None)
    assert sum(taken) < 2 * 2**20


def test_a_validation_some_way_back_is_found(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "runs" / "a").start()
    lines = [{"step": step, "loss": 0.25, "lr": 1e-3} for step in range(11, 5000)]
    folder.log({"step": 10, "valid_loss": 0.5}, *lines)
    assert (folder.path / "metrics.jsonl").stat().st_size > traces.TAIL_BYTES[0]
    run = only_run(tmp_path / "runs")
    assert (run.step, run.valid_loss) == (4999, 0.5)


def test_pipes_and_folders_in_the_place_of_files_are_not_waited_for(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "runs" / "a").start()
    for name in ("metrics.jsonl", "plan.json", "lock.json"):
        os.mkfifo(folder.path / name)
    (folder.path / "diverged.json").mkdir()
    assert only_run(tmp_path / "runs").step is None


def test_names_can_not_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Folder(tmp_path / "runs" / "a\x1b[2J\n[red]b").start()
    Folder(tmp_path / "runs" / os.fsdecode(b"\xff")).start()
    show_runs(tmp_path / "runs")
    shown = capsys.readouterr().out
    assert "a?[2J?[red]b  failed" in shown and "\x1b" not in shown
    assert len(shown.splitlines()) == 3


def test_json_has_no_nan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Folder(tmp_path / "runs" / "a").start().log({"step": 1, "loss": float("nan")})
    show_runs(tmp_path / "runs", as_json=True)
    row = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert (row["run"], row["step"], row["loss"]) == ("a", 1, None)


def test_a_table_on_a_terminal_has_colours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Folder(tmp_path / "runs" / "[bold]a").start()
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    show_runs(tmp_path / "runs")
    shown = capsys.readouterr().out
    assert "\x1b[" in shown and "[bold]a" in shown


def test_no_folder_and_no_runs_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        find_runs(tmp_path / "nowhere")
    (tmp_path / "runs").mkdir()
    show_runs(tmp_path / "runs")
    assert "no runs below" in capsys.readouterr().out


def test_the_command_imports_no_torch(tmp_path: Path) -> None:
    Folder(tmp_path / "runs" / "a").start().log({"step": 1, "loss": 0.5})
    source = (
        "import sys\n"
        f"sys.argv = ['msm-dist', 'runs', {str(tmp_path / 'runs')!r}]\n"
        "from msm_dist.cli import main\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "heavy = {'torch', 'deepspeed', 'numpy', 'tensorboard', 'submitit'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    child = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert "1/100" in child.stdout
