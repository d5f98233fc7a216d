"""Whole fine-tuning runs as users start them: bf16, a fold with another table of positions, shards with many labels."""

import json
import os
import subprocess
import sys

import pytest
import torch

from msm_dist.data.index import Official
from msm_dist.errors import CheckpointError
from msm_dist.evaluate.classifier import Tagger
from msm_dist.evaluate.encoder import Encoder
from tests.labelled import INFO, KINDS, RATE, write_sounds, write_weights
from tests.processes import HERE
from tests.test_tasks import write_shard

pytestmark = pytest.mark.distributed

SETTINGS = [
    *("train.steps=4", "train.global_batch=8", "train.micro_batch=4", "train.log_every=1", "train.valid_every=2"),
    *("data.num_workers=1", "optim.lr=1e-2", "run.name=made"),
]


def run(folder, *words):
    """What `msm-dist finetune` prints, its results, the lines of its metrics."""
    done = subprocess.run(
        [sys.executable, "-m", "msm_dist", "finetune", *words, *SETTINGS, f"run.dir={folder}"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "MSM_DIST_DEVICE": "cpu"},
        cwd=HERE.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (folder / "made" / "metrics.jsonl").read_text().splitlines()]
    return done.stdout, json.loads((folder / "made" / "results.json").read_text()), lines


def test_one_of_five_folds_with_a_stretched_table(tmp_path):
    path = write_sounds(tmp_path / "sounds", train=30, valid=0, test=0)
    rows = [line.rpartition(",")[0] for line in path.read_text().splitlines()[1:]]
    path.write_text("\n".join(["file,label,fold", *(f"{row},{n % 5 + 1}" for n, row in enumerate(rows))]) + "\n")
    weights = write_weights(tmp_path / "weights")
    words = ["data.fold=2", "data.seconds=1.28", "model.positions=interpolated"]
    said, results, lines = run(tmp_path, str(weights), str(path), *words)
    assert "bf16" in said
    assert "24 to train on, none to validate on, 6 to be judged on, 1.28 s each" in said
    assert results["splits"] == {"train": ["1", "3", "4", "5"], "valid": [], "test": ["2"]}
    assert (results["fold"], results["train_clips"], results["valid_clips"], results["test_clips"]) == ("2", 24, 0, 6)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert not [line for line in lines if "valid_loss" in line]
    assert Tagger.load(tmp_path / "made").predict(0.1 * torch.randn(2, RATE), RATE).shape == (2, len(KINDS))
    with pytest.raises(CheckpointError, match="interpolated"):
        Encoder.load(tmp_path / "made")


def test_shards_with_several_labels_a_clip_and_a_part_of_the_official_test_clips(tmp_path):
    official = Official(("eval_segments.csv",), 20371, 6, "0" * 64)
    train = write_shard(tmp_path / "train", [["dog"], ["cat", "dog"], None, ["bird"], ["dog"], ["dog", "bird"]])
    test = write_shard(tmp_path / "eval", [["dog"], ["bird"], ["cat"], ["cat", "dog"], [], ["bird"]], official)
    weights = write_weights(tmp_path / "weights")
    words = [f"data.test={test}", "data.weighted=true", "augment.time_drop=0.25"]
    said, results, lines = run(tmp_path, str(weights), str(train), *words)
    assert "3 classes, multi-label, judged by mAP" in said
    assert results["official"] == "5 of 20,371 clips of eval_segments.csv"
    assert "(5 of 20,371 clips of eval_segments.csv)" in said
    assert (results["train_clips"], results["classes_judged"]) == (5, 3)
    assert {name for name in results if name.startswith("test_")} == {
        *("test_clips", "test_loss", "test_mAP", "test_aucroc")
    }
    assert 0 <= results["test_mAP"] <= 1
    # A head without an opinion is wrong by one bit a label.
    assert lines[0]["loss"] == pytest.approx(0.693, abs=0.01)
    tuned = Encoder.load(tmp_path / "made")
    assert tuned.info.origin["finetuned_from"] == INFO.origin
    assert tuned.info.origin["task"] == "eval"
