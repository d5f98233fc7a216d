"""A run compared with a reference: what must agree, what is only shown."""

import json
import shlex

import pytest

from msm_dist.compare import Mismatch, compare
from msm_dist.config import dump_config, load_config, parse_config
from msm_dist.errors import ConfigError, DataError
from msm_dist.evaluate.finetune_config import read_config

ENVIRONMENT = {"started": "today", "device": "CPU (x86_64)", "world_size": 2, "versions": {"torch": "2.13.0"}}
VALID = {"valid_loss": 0.5, "reference_mel_mean": 1.0}


def losses(steps=100, every=10, factor=1.0):
    return {step: factor / (1 + step / 50) for step in range(every, steps + 1, every)}


def write_run(folder, logged=None, valid=VALID, rate=100.0, environment=None, **settings):
    values = {
        "run": {"name": folder.name},
        "data": settings.pop("data", {"shards": str(folder)}),
        "train": {"steps": 100, "log_every": 10, **settings.pop("train", {})},
        **settings,
    }
    logged = losses() if logged is None else logged
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(parse_config(values, "test")))
    lines = [{"step": step, "loss": loss, "clips_per_second": rate} for step, loss in logged.items()]
    if valid:
        lines.append({"step": max(logged, default=0), **valid})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT | (environment or {})))
    return folder


@pytest.fixture
def reference(tmp_path):
    return write_run(tmp_path / "reference")


def fault_of(run, reference):
    """What disagrees: the part of the message below the table."""
    with pytest.raises(Mismatch) as raised:
        compare(run, reference)
    assert raised.value.exit_code == 2
    table, _, faults = str(raised.value).partition("What disagrees:\n")
    assert "clips/s" in table or "no step" in faults
    return faults


def test_the_same_numbers_are_reported_as_bit_equal(tmp_path, reference):
    table = compare(write_run(tmp_path / "run"), reference)
    assert "bit-equal at all 10 logged steps" in table
    assert "the same run, within 5%" in table


def test_losses_within_the_tolerance_agree_and_show_where_they_part(tmp_path, reference):
    train = losses(factor=1.04)
    train[10] = losses()[10]
    table = compare(write_run(tmp_path / "run", train, {"valid_loss": 0.52}), reference)
    assert "differ from step 20 on" in table
    assert "4.000%" in table


def test_a_lasting_difference_of_the_training_loss_is_a_mismatch(tmp_path, reference):
    faults = fault_of(write_run(tmp_path / "run", losses(factor=1.06)), reference)
    assert "training loss, smoothed" in faults
    assert "at step 10" in faults
    assert "valid_loss" not in faults


def test_noise_of_single_steps_is_smoothed_away(tmp_path, reference):
    train = losses()
    train[80] *= 1.2
    assert "the same run" in compare(write_run(tmp_path / "run", train), reference)


def test_a_loss_that_is_not_a_number_is_a_mismatch(tmp_path, reference):
    train = losses() | {90: float("nan")}
    assert "training loss" in fault_of(write_run(tmp_path / "run", train), reference)


def test_another_valid_loss_is_a_mismatch(tmp_path, reference):
    run = write_run(tmp_path / "run", valid={"valid_loss": 0.53, "reference_mel_mean": 1.0})
    faults = fault_of(run, reference)
    assert "valid_loss: 0.530000 at step 100, the reference has 0.500000" in faults
    assert "training loss" not in faults


def test_a_run_without_validation_is_a_mismatch(tmp_path, reference):
    assert "valid_loss: the run has none at step 100" in fault_of(write_run(tmp_path / "run", valid={}), reference)


def test_a_tolerance_can_be_given(tmp_path, reference):
    run = write_run(tmp_path / "run", losses(factor=1.04))
    with pytest.raises(Mismatch):
        compare(run, reference, tolerance=0.01)


def test_an_unfinished_run_is_a_mismatch_that_says_how_to_go_on(tmp_path, reference):
    faults = fault_of(write_run(tmp_path / "run", losses(steps=60)), reference)
    assert "ends at step 60, the reference at 100; the same command again" in faults


def test_a_longer_run_is_a_mismatch(tmp_path, reference):
    assert "ends at step 140" in fault_of(write_run(tmp_path / "run", losses(steps=140)), reference)


def test_runs_without_a_common_step_are_a_mismatch(tmp_path, reference):
    assert "train.log_every=10" in fault_of(write_run(tmp_path / "run", {15: 1.0, 95: 1.0}), reference)


def test_other_settings_are_a_mismatch_with_both_values(tmp_path, reference):
    faults = fault_of(write_run(tmp_path / "run", seed=7), reference)
    assert "seed = 7: the reference has 0; run with seed=0" in faults
    assert "run.name" not in faults
    assert "data.shards" not in faults


def words_of(faults, name):
    """The overrides that a fault says to run with."""
    (fault,) = [line for line in faults.splitlines() if line.strip().startswith(f"{name} = ")]
    return shlex.split(fault.split("; run with ")[1].split(", or compare")[0])


def test_what_to_run_with_can_be_typed_and_gives_the_references_settings(tmp_path, reference):
    mix = {"mix": {str(tmp_path / "a b"): 3, "https://host/c": 0.1}, "shards": None}
    mixed = write_run(
        tmp_path / "mixed", data=mix, optim={"betas": [0.8, 0.9], "clip_norm": 1e-5}, model={"size": "tiny"}
    )
    names = ("data.mix", "optim.betas", "optim.clip_norm", "model.size")
    for run, other in ((mixed, reference), (reference, mixed)):
        faults = fault_of(run, other)
        wanted = load_config(other / "config.yaml")
        words = [word for name in names for word in words_of(faults, name)]
        if wanted.data.mix is None:
            words.append(f"data.shards={wanted.data.shards}")
        got = load_config(run / "config.yaml", words)
        assert (got.data.mix, got.data.shards) == (wanted.data.mix, wanted.data.shards)
        assert (got.optim, got.model) == (wanted.optim, wanted.model)


def test_weights_of_a_mix_agree_by_their_ratio(tmp_path):
    def run_of(name, *weights):
        mix = {"mix": {f"folder {i}": weight for i, weight in enumerate(weights)}, "shards": None}
        return write_run(tmp_path / name, data=mix)

    reference = run_of("reference", 3, 1)
    assert "the same run" in compare(run_of("same", 0.75, 0.25), reference)
    for number, weights in enumerate([(1, 1), (3, 1, 1), (1e9, 1)]):
        assert "data.mix = " in fault_of(run_of(f"other-{number}", *weights), reference)


def test_settings_of_execution_are_shown_but_not_judged(tmp_path, reference):
    table = compare(write_run(tmp_path / "run", train={"micro_batch": 32}), reference)
    assert "setting train.micro_batch" in table


def test_speed_and_environment_are_shown_but_not_judged(tmp_path, reference):
    run = write_run(tmp_path / "run", rate=250.0, environment={"world_size": 1, "started": "now"})
    table = compare(run, reference)
    assert "x 2.50" in table
    assert "environment world_size" in table
    assert "started" not in table
    assert "versions.torch" not in table


@pytest.mark.parametrize(
    ("name", "kind"),
    [("config.yaml", ConfigError), ("metrics.jsonl", DataError), ("environment.json", DataError)],
)
def test_a_missing_file_is_named(tmp_path, reference, name, kind):
    run = write_run(tmp_path / "run")
    (run / name).unlink()
    with pytest.raises(kind, match=name):
        compare(run, reference)


def test_a_run_without_a_logged_step_is_named(tmp_path, reference):
    run = write_run(tmp_path / "run", logged={}, valid={})
    with pytest.raises(DataError, match="run/metrics.jsonl: no training loss"):
        compare(run, reference)


def test_finetuned_run_is_named_with_the_place_of_its_results(tmp_path, reference):
    run = write_run(tmp_path / "run")
    (run / "config.yaml").write_text(dump_config(read_config("weights", "birds.csv", ["train.steps=3"])))
    for pair in ((run, reference), (reference, run)):
        with pytest.raises(ConfigError, match="run: a fine-tuned run; .* in .*run/results.json"):
            compare(*pair)
