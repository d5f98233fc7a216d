"""Settings of fine-tuning: what is wrong is said at once, with the way out, and a run has a name of its own."""

from pathlib import Path

import pytest
import yaml

from msm_dist.engine.runfolder import compare_config, record_start
from msm_dist.errors import ConfigError
from msm_dist.evaluate.finetune_config import MAY_CHANGE, FinetuneConfig, FinetuneTrain, batch_layout, read_config
from msm_dist.settings import flat_items

ROOT = Path(__file__).resolve().parent.parent


def config(*words):
    return read_config("runs/base", "esc50.csv", ["train.steps=10", *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optim.layerdecay=0.5"], "did you mean optim.layer_decay"),
        (["mixup=0.5"], "mixup: unknown key; did you mean augment.mixup"),
        (["augment.mixup=1.5"], "augment.mixup = 1.5: input should be less than or equal to 1"),
        (["augment.time_drop=1"], "augment.time_drop = 1: input should be less than 1"),
        (["optim.layer_decay=0"], "optim.layer_decay = 0: "),
        (["train.epochs=3"], "train.steps = 10 and train.epochs = 3.0: give one of them"),
        (["train.steps=null"], "train.steps is missing"),
        (["optim.warmup_steps=10"], "must be below train.steps = 10"),
        (["train.global_batch=24"], "must be a multiple of train.micro_batch = 16; choose 16 or 32"),
        (["engine.zero_stage=0"], "train.precision=fp32"),
        (["data.valid=there"], "data.test"),
        (["model.pooling=max"], "model.pooling = 'max': input should be 'mean' or 'cls'"),
        (["a.yaml", "b.yaml"], "'b.yaml': after RUN and DATA come one YAML file"),
        (["nowhere.yaml"], "nowhere.yaml: no such configuration file"),
    ],
)
def test_wrong_settings_are_named_with_the_way_out(words, message):
    with pytest.raises(ConfigError) as error:
        config(*words)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("weights", "task", "words", "name"),
    [
        ("hf://me:S3cret@owner/name", "esc50.csv", [], "weights"),
        ("runs/base", "https://host/shards?key=S3cret", [], "data.task"),
        ("runs/base", "esc50.csv", ["data.audio=https://me:S3/cret@host/x", "run.name=mine"], "data.audio"),
    ],
)
def test_setting_with_a_secret_is_refused_without_showing_it(weights, task, words, name):
    with pytest.raises(ConfigError, match=f"{name}: holds a password") as error:
        read_config(weights, task, ["train.steps=1", *words])
    assert "S3" not in str(error.value)


def test_all_faults_are_reported_at_once():
    with pytest.raises(ConfigError, match="2 problems"):
        config("augment.mixup=2", "optim.betas=3")


def test_file_is_below_the_settings_on_the_command_line(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"train": {"epochs": 3}, "augment": {"mixup": 0.1}, "data": {"fold": 2}}))
    cfg = read_config("runs/base", "esc50.csv", [str(path), "augment.mixup=0.2"])
    assert (cfg.train.epochs, cfg.augment.mixup, cfg.data.fold) == (3, 0.2, "2")
    assert (cfg.weights, cfg.data.task) == ("runs/base", "esc50.csv")


@pytest.mark.parametrize(
    ("weights", "task", "words", "name"),
    [
        ("runs/base", "data/esc50.csv", ["data.fold=1"], "base-esc50-fold-1"),
        ("runs/base/export", "esc50:/data/ESC-50-master", [], "base-esc50"),
        ("runs/base", "hear/tasks/tfds_crema_d-1.0.0-full", [], "base-tfds_crema_d-1.0.0-full"),
        ("runs/base", "esc50.csv", ["run.name=mine"], "mine"),
        ("runs/base", "my clips (1).csv", [], "base-my-clips-1"),
    ],
)
def test_run_is_called_after_what_it_is_made_of(weights, task, words, name):
    assert read_config(weights, task, ["train.steps=1", *words]).run.name == name


def test_learning_rate_follows_the_batch():
    assert config("train.global_batch=64").peak_lr == pytest.approx(1e-3 / 4)
    assert config("optim.base_lr=2e-4", "train.global_batch=512").peak_lr == pytest.approx(4e-4)
    assert config("optim.lr=7e-5").peak_lr == 7e-5


def test_batch_that_ranks_do_not_divide_is_refused_with_choices():
    train = FinetuneTrain(steps=1, global_batch=24, micro_batch=4)
    assert batch_layout(train, 3).accumulation == 2
    with pytest.raises(ConfigError, match="4 processes x train.micro_batch 4 = 16; choose .* from 1, 2, 3"):
        batch_layout(train, 4)


def test_started_run_keeps_its_settings_but_for_those_that_change_no_weight(tmp_path):
    record_start(tmp_path, config(), {})
    compare_config(tmp_path, config("train.micro_batch=8", "data.num_workers=1", "engine.zero_stage=2"), MAY_CHANGE)
    for word in ("augment.mixup=0", "optim.layer_decay=0.6", "data.weighted=true", "model.pooling=cls", "data.fold=2"):
        with pytest.raises(ConfigError, match=word.partition("=")[0]):
            compare_config(tmp_path, config(word), MAY_CHANGE)


def test_setting_that_an_older_run_lacks_has_its_default(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"train": {"steps": 10}, "run": {"name": "base-esc50"}}))
    compare_config(tmp_path, config(), MAY_CHANGE)


def test_every_setting_that_may_change_is_one():
    names = flat_items(config().model_dump())
    assert all(any(name.startswith(start) for name in names) for start in MAY_CHANGE)
    assert all(field.description for field in FinetuneConfig.model_fields.values())


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "finetune").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_valid_and_run_on_one_process_or_two(path):
    cfg = read_config("runs/base", "task.csv", [str(path)])
    for world_size in (1, 2):
        assert batch_layout(cfg.train, world_size).accumulation >= 1
