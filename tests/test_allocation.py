"""The first and last lines of a job's log."""

import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from msm_dist import allocation
from msm_dist.allocation import SIGNAL_SECONDS, announce, conclude, main, note_on_limit
from msm_dist.config import load_config
from msm_dist.errors import ConfigError

QUICKSTART = "configs/quickstart.yaml"
JOB = {
    "SLURM_JOB_ID": "41",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "12041",
}


def settings(folder: Path, *more: str) -> list[str]:
    return [QUICKSTART, f"run.dir={folder}", "run.name=mine", *more]


def checkpoint(folder: Path, step: int, complete: bool = True) -> None:
    path = folder / "mine" / "checkpoints" / f"step-{step:08d}"
    path.mkdir(parents=True)
    if complete:
        (path / "complete").touch()


def test_announcement_names_job_nodes_ranks_master_and_folder(tmp_path: Path) -> None:
    words = settings(tmp_path)
    text = announce(load_config(words[0], words[1:]), JOB)
    for line in ("job        41, first start", "nodes      n[1-2]", "ranks      2,", "master     n1:12041"):
        assert line in text
    assert f"run folder {tmp_path / 'mine'}, no checkpoint" in text


def test_restarted_array_task_says_so(tmp_path: Path) -> None:
    words = settings(tmp_path)
    job = JOB | {"SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "0", "SLURM_RESTART_COUNT": "3"}
    assert "job        41 (40_0), restart 3" in announce(load_config(words[0], words[1:]), job)


def test_layout_that_does_not_fit_the_ranks_is_refused(tmp_path: Path) -> None:
    words = settings(tmp_path)
    with pytest.raises(ConfigError, match="multiple of 5 processes"):
        announce(load_config(words[0], words[1:]), JOB | {"WORLD_SIZE": "5"})


def test_only_complete_checkpoints_are_named(tmp_path: Path) -> None:
    checkpoint(tmp_path, 20)
    checkpoint(tmp_path, 100)
    checkpoint(tmp_path, 120, complete=False)
    (tmp_path / "mine/checkpoints/step-00000140.partial").mkdir()
    (tmp_path / "mine/checkpoints/step-00000140.partial/complete").touch()
    words = settings(tmp_path)
    line = conclude(load_config(words[0], words[1:]), 137)
    assert "killed" in line and "newest checkpoint step-00000100; the same command goes on" in line


@pytest.mark.parametrize(
    ("code", "said"), [(0, "finished"), (135, "ended by signal 7"), (9, "failed"), (3, "diverged"), (2, "not started")]
)
def test_exit_codes_are_put_in_words(tmp_path: Path, code: int, said: str) -> None:
    words = settings(tmp_path)
    line = conclude(load_config(words[0], words[1:]), code)
    assert f"exit code {code} ({said}" in line
    assert ("goes on" in line) == (code not in (0, 2))


@pytest.mark.parametrize(
    "words", [[], ["begins"], ["ended", "x", QUICKSTART], ["ended", QUICKSTART], ["middle", QUICKSTART]]
)
def test_wrong_words_are_told_the_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert "usage: python -m msm_dist.allocation" in capsys.readouterr().err


def test_a_batch_script_is_answered_without_torch(tmp_path: Path) -> None:
    words = ["begins", *settings(tmp_path)]
    program = f"import sys; from msm_dist.allocation import main; code = main({words!r}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], env=JOB, text=True, capture_output=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("limit", "noted"), [("00:05:00", True), ("00:05:01", False), ("1-00:00:00", False), ("UNLIMITED", False)]
)
def test_limit_that_the_signal_takes_whole_is_noted(limit: str, noted: bool) -> None:
    record = f"JobId=41 RunTime=00:00:00 TimeLimit={limit} TimeMin=N/A"
    assert ("ask for more --time" in note_on_limit(record)) == noted


def test_signal_of_the_script_is_the_one_that_the_note_means() -> None:
    assert f"--signal=USR1@{SIGNAL_SECONDS}\n" in Path("slurm/pretrain.sh").read_text()


class Slurm:
    """A scontrol that answers from a file and notes what it is asked; `failures` requeues fail before one works."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder = folder
        script = folder / "scontrol"
        script.write_text(
            f'#!/bin/sh\necho "$@" >> {folder}/asked\n[ "$1" = show ] && exec cat {folder}/record\n'
            f'n=$(cat {folder}/failures); [ "$n" = 0 ] && exit 0\necho $((n - 1)) > {folder}/failures\n'
            "echo 'Unable to contact slurm controller' >&2; exit 1\n"
        )
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
        monkeypatch.setattr(allocation, "REQUEUE_PAUSE_SECONDS", 0.0)

    def end(self, code: int, record: str, failures: int = 0, **environment: str) -> tuple[int, list[str]]:
        """The exit code, and the requeues that were asked for."""
        (self.folder / "record").write_text(f"JobId=41 JobName=x {record} Partition=low\n")
        (self.folder / "failures").write_text(str(failures))
        (self.folder / "asked").write_text("")
        words = settings(self.folder)
        result = allocation.end(load_config(words[0], words[1:]), code, JOB | environment)
        asked = (self.folder / "asked").read_text().splitlines()
        return result, [line for line in asked if line.startswith("requeue")]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    return Slurm(tmp_path, monkeypatch)


RUNNING = "JobState=RUNNING Reason=None PreemptTime=None"
PREEMPTED = "JobState=RUNNING Reason=None PreemptTime=2026-11-23T01:44:30"
CANCELLED = "JobState=COMPLETING Reason=None PreemptTime=None"
OUT_OF_TIME = "JobState=COMPLETING Reason=TimeLimit PreemptTime=None"


@pytest.mark.parametrize(
    ("code", "record", "expected"),
    [
        (75, RUNNING, 0),
        (75, OUT_OF_TIME, 0),
        (75, PREEMPTED, 0),
        (75, CANCELLED, 75),
        (143, PREEMPTED, 0),
        (143, RUNNING, 143),
        (143, CANCELLED, 143),
        (2, PREEMPTED, 2),
        (137, RUNNING, 137),
        (0, PREEMPTED, 0),
    ],
)
def test_job_is_run_again_when_asked_and_not_when_cancelled(
    slurm: Slurm, code: int, record: str, expected: int
) -> None:
    assert slurm.end(code, record) == (expected, ["requeue 41"] if code and not expected else [])


def test_cancelled_job_says_why_it_is_not_run_again(slurm: Slurm, capsys: pytest.CaptureFixture[str]) -> None:
    slurm.end(75, CANCELLED)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "job 41: not run again: it was cancelled meanwhile"
    assert said[1].startswith("exit code 75 (saved") and said[1].endswith("the same command goes on from there")


def test_task_of_an_array_is_named_as_such(slurm: Slurm) -> None:
    task = {"SLURM_ARRAY_JOB_ID": "41", "SLURM_ARRAY_TASK_ID": "2"}
    assert slurm.end(75, RUNNING, **task) == (0, ["requeue 41_2"])


def test_requeue_is_asked_for_again_when_slurm_does_not_answer(
    slurm: Slurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert slurm.end(75, RUNNING, failures=2)[0] == 0
    code, asked = slurm.end(75, RUNNING, failures=100)
    assert code == 75 and 1 < len(asked) < 10
    assert "Slurm does not run it again: Unable to contact slurm controller" in capsys.readouterr().out


def test_job_without_time_for_a_step_is_not_run_for_ever(slurm: Slurm) -> None:
    now = datetime.now()
    times = [(now + timedelta(seconds=seconds)).isoformat(timespec="seconds") for seconds in (-20, 280, 3000)]
    short, long = (f"{RUNNING} StartTime={times[0]} EndTime={end}" for end in times[1:])
    assert slurm.end(75, short) == (75, [])
    assert slurm.end(75, long)[0] == 0, "signalled by hand"
    checkpoint(slurm.folder, 7)
    assert slurm.end(75, short)[0] == 0, "it has saved something new"
