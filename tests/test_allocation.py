"""The first and last lines of a job's log."""

import subprocess
import sys
from pathlib import Path

import pytest

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
    ("code", "said"), [(0, "finished"), (135, "ended by signal 7"), (9, "failed"), (3, "diverged")]
)
def test_exit_codes_are_put_in_words(tmp_path: Path, code: int, said: str) -> None:
    words = settings(tmp_path)
    line = conclude(load_config(words[0], words[1:]), code)
    assert f"exit code {code} ({said}" in line
    assert ("goes on" in line) == (code != 0)


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
def test_limit_that_the_signal_takes_whole_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, noted: bool
) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\n[ "$3" = 41 ] && echo "   RunTime=00:00:00 TimeLimit={limit} TimeMin=N/A"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert ("ask for more --time" in note_on_limit("41")) == noted


def test_signal_of_the_script_is_the_one_that_the_note_means() -> None:
    assert f"--signal=USR1@{SIGNAL_SECONDS}\n" in Path("slurm/pretrain.sh").read_text()
