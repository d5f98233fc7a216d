"""What a fine-tuning run starts from: weights whose identity is all that they are, and none of another table."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from msm_dist.engine.runfolder import record_start
from msm_dist.errors import CheckpointError, ConfigError
from msm_dist.evaluate.classifier import Head
from msm_dist.evaluate.classifier import save as save_classifier
from msm_dist.evaluate.finetune_config import FinetuneData, read_config
from msm_dist.evaluate.finetune_data import open_task
from msm_dist.evaluate.finetune_report import announcement
from msm_dist.evaluate.finetune_start import compare_identity, new_classifier, read_start
from msm_dist.model.weights import save
from tests.labelled import INFO, KINDS, RATE, new_model, write_sounds, write_weights


def config(weights):
    return read_config(str(weights), "task.csv", ["train.steps=1"])


@pytest.mark.parametrize(
    "other",
    [
        replace(INFO, features=INFO.features.model_copy(update={"mean": -7.0})),
        replace(INFO, features=INFO.features.model_copy(update={"fmax": 7000.0})),
        replace(INFO, crop_frames=112),
        replace(INFO, model=INFO.model.model_copy(update={"num_heads": 4})),
    ],
    ids=["statistics", "front end", "crop", "heads"],
)
def test_same_tensors_beside_other_settings_are_other_weights(tmp_path, other):
    start = read_start(config(write_weights(tmp_path / "one")))
    save(tmp_path / "two", new_model().state_dict(), other)
    changed = read_start(config(tmp_path / "two"))
    assert changed.digest == start.digest
    assert changed.identity != start.identity


def test_weights_are_the_same_wherever_they_lie_and_however_they_are_trained(tmp_path):
    start = read_start(config(write_weights(tmp_path / "one")))
    model = INFO.model.model_copy(update={"backend": "reference", "activation_checkpointing": True})
    save(tmp_path / "two", new_model().state_dict(), replace(INFO, model=model, origin={}))
    assert read_start(config(tmp_path / "two")).identity == start.identity
    save(tmp_path / "three", new_model(seed=2).state_dict(), INFO)
    assert read_start(config(tmp_path / "three")).identity != start.identity


@pytest.mark.parametrize(
    ("task", "says"),
    [
        ("glide.csv", r"task_digest = 1, .* gives 2.*\nIts task was order.csv, now it is glide.csv\.$"),
        ("order.csv", "NAME$"),
    ],
)
def test_name_of_a_run_on_another_task_is_refused_with_both_tasks(tmp_path, task, says):
    words = ["train.steps=1", f"run.dir={tmp_path}", "run.name=made"]
    cfg = read_config("weights", "order.csv", words)
    compare_identity(cfg, {"task_digest": "1"})
    (tmp_path / "made").mkdir()
    record_start(tmp_path / "made", cfg, {"task_digest": "1"})
    compare_identity(read_config("weights", task, words), {"task_digest": "1"})
    with pytest.raises(ConfigError, match=says):
        compare_identity(read_config("weights", task, words), {"task_digest": "2"})


def test_test_classes_without_a_training_clip_are_announced(tmp_path):
    path = write_sounds(tmp_path)
    cfg, world = config(write_weights(tmp_path / "base")), SimpleNamespace(size=1, device=torch.device("cpu"))
    for given, says in ((("hum", "hum"), False), (("hum,train", "hiss,train"), True)):
        path.write_text(path.read_text().replace(*given))
        labelled = open_task(FinetuneData(task=str(path), seconds=0.5), RATE)
        told = announcement(cfg, world, labelled, read_start(cfg), "engine", None, 1)
        assert ("note       1 of 3 test classes have no training clip" in told) == says


def test_classifier_with_a_stretched_table_is_no_start(tmp_path):
    cfg = config(write_weights(tmp_path / "base"))
    head = Head(KINDS, False, "mean", "interpolated", 32000, INFO.crop_frames)
    tuned = new_classifier(cfg, read_start(cfg), head)
    folder = save_classifier(tmp_path / "run" / "export", tuned.state_dict(), {}, INFO, head)
    for path in (tmp_path / "run", folder):
        with pytest.raises(CheckpointError, match="only .*Tagger"):
            read_start(config(path))
