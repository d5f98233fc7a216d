"""`msm-dist doctor RUN` on a fine-tuning run: its settings and export, and the command that continues it."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from msm_dist.data.clips import quiet
from msm_dist.doctor import run as doctor_run
from msm_dist.doctor.findings import Finding
from tests.processes import HERE
from tests.test_finetune import Runs, finish
from tests.test_hostile_checkpoints import FINETUNED
from tests.test_resume import alter

pytestmark = pytest.mark.distributed

STEPS = 6


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    runs = Runs(tmp_path_factory.mktemp("runs"))
    settings = (f"train.steps={STEPS}", "checkpoint.every=3", "optim.warmup_steps=2")
    codes, output = finish(runs.start("tuned", *settings), timeout=500)
    assert codes == [0], output
    return runs


@pytest.fixture
def tuned(runs, tmp_path) -> Path:
    return Path(shutil.copytree(runs.folder / "tuned", tmp_path / "runs" / "tuned"))


def examine(folder: Path) -> dict[str, Finding]:
    return {finding.name: finding for finding in doctor_run.examine_run(folder, False, quiet)}


def test_a_finished_one_is_ok_as_far_as_can_be_found_out(tuned):
    found = examine(tuned)
    assert {name for name, finding in found.items() if finding.status != "ok"} == {"corpus"}
    assert found["corpus"].status == "note" and "a start compares its clips" in found["corpus"].detail
    assert found["settings"].detail.startswith("fine-tuning")
    assert found["export"].detail.endswith(f"each as in step-{STEPS:08d}")
    assert found["next"].detail == f"finished: all {STEPS} steps, exported"
    head = tuned / "export" / "head.safetensors"
    whole = head.read_bytes()
    head.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    finding = examine(tuned)["export"]
    assert finding.status == "fail" and "head." in finding.detail and finding.remedy.startswith("start the run again")
    head.write_bytes(whole[:-1])
    assert "not a readable head" in examine(tuned)["export"].detail


def test_metadata_that_no_fine_tuning_saves_fails_by_field(tuned):
    folder = tuned / "checkpoints" / f"step-{STEPS:08d}"
    meta = json.loads((folder / "meta.json").read_text())
    assert meta.keys() == {"format", "step", "files", "optimizer_step", "loss_scale"} | FINETUNED.keys()
    alter(folder, {"skipped_updates": 7})
    finding = examine(tuned)[folder.name]
    assert (
        finding.status == "fail" and f"a start ends here: {folder / 'meta.json'}: skipped_updates = 7" in finding.detail
    )


def test_one_that_was_killed_continues_by_the_printed_command(tuned):
    shutil.rmtree(tuned / "export")
    shutil.rmtree(tuned / "checkpoints" / f"step-{STEPS:08d}")
    words = shlex.split(examine(tuned)["next"].remedy)
    assert words[:2] == ["msm-dist", "finetune"]
    command = [sys.executable, "-m", "msm_dist", *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr
    assert examine(tuned)["next"].detail.startswith("finished")
