"""The commands as a user meets them: real processes, one message and exit code 2 for what is wrong."""

import subprocess
import sys

import pytest

from tests.corpus import write_corpus
from tests.processes import HERE


def msm_dist(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "msm_dist", *arguments], capture_output=True, text=True, cwd=HERE.parent, timeout=600
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["pretrain", "configs/quickstart.yaml", "train.stepz=3"], "did you mean train.steps?"),
        (
            ["pretrain", "configs/quickstart.yaml", "data.shards=nowhere"],
            "msm-dist data pack YOUR_AUDIO_FOLDER nowhere",
        ),
        (["plan", "configs/quickstrat.yaml"], "no such configuration file; configs has base_80x208_p16x4.yaml"),
        (["plan", "configs/quickstart.yaml", "--world", "3"], "must be a multiple of 3 processes"),
        (["data", "pack", "nowhere", "{tmp}/out"], "nowhere"),
        (["data", "pack", "{tmp}", "{tmp}/out"], "{tmp}"),
        (["data", "verify", "{tmp}"], "{tmp}"),
        (["compare", "{tmp}", "docs/reference/quickstart"], "{tmp}"),
    ],
)
def test_wrong_use_is_one_message_and_exit_code_2(tmp_path, arguments, says):
    done = msm_dist(*[argument.format(tmp=tmp_path) for argument in arguments])
    assert done.returncode == 2, done.stdout + done.stderr
    assert says.format(tmp=tmp_path) in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_argument_shows_the_usage():
    done = msm_dist("plan")
    assert done.returncode == 2
    assert "Missing argument 'config'" in done.stderr
    assert "Traceback" not in done.stderr


def test_plan_shows_layout_parameters_rate_and_length(tmp_path):
    shards = write_corpus(tmp_path / "shards", count=64, num_shards=1)
    done = msm_dist("plan", "configs/base_audioset.yaml", f"data.shards={shards}", "data.num_workers=1", "--world", "2")
    assert done.returncode == 0, done.stderr
    for expected in (
        "512 crops = 2 processes x micro-batch 64 x 4 accumulated",
        "92.74 M",
        "92.81 M with the fixed position tables",
        "65 of 16x16",
        "16 visible",
        "0.0006",
        "64 clips in 1 shards",
        "0.12 steps",
    ):
        assert expected in done.stdout
