"""What a fine-tuning run starts from: weights whose identity is all that they are, and none of another table."""

from dataclasses import replace

import pytest

from msm_dist.errors import CheckpointError
from msm_dist.evaluate.classifier import Head
from msm_dist.evaluate.classifier import save as save_classifier
from msm_dist.evaluate.finetune_config import read_config
from msm_dist.evaluate.finetune_start import new_classifier, read_start
from msm_dist.model.weights import save
from tests.labelled import INFO, KINDS, new_model, write_weights


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


def test_classifier_with_a_stretched_table_is_no_start(tmp_path):
    cfg = config(write_weights(tmp_path / "base"))
    head = Head(KINDS, False, "mean", "interpolated", 32000, INFO.crop_frames)
    tuned = new_classifier(cfg, read_start(cfg), head)
    folder = save_classifier(tmp_path / "run" / "export", tuned.state_dict(), {}, INFO, head)
    for path in (tmp_path / "run", folder):
        with pytest.raises(CheckpointError, match="only .*Tagger"):
            read_start(config(path))
