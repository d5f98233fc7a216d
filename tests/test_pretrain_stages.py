"""Whole runs at other ZeRO stages than 1: continued from each other's checkpoints, diverging, exporting."""

import signal

import pytest
from safetensors.torch import load_file

from tests.test_pretrain import Runs, finish

pytestmark = pytest.mark.distributed

SHORT = ("train.steps=9", "checkpoint.every=2", "train.valid_every=9")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    runs = Runs(tmp_path_factory.mktemp("stages"))
    codes, output = runs.run("stage1", *SHORT)
    assert codes == [0, 0], output
    return runs


def test_run_killed_at_one_stage_and_continued_at_others_trains_the_same(runs):
    codes, output = runs.run("mixed", *SHORT, "engine.zero_stage=3", "engine.offload=parameters", KILL="step:5")
    assert codes[0] == -signal.SIGKILL, output
    codes, output = runs.run("mixed", *SHORT, "engine.zero_stage=2", KILL="step:8")
    assert codes[0] == -signal.SIGKILL, output
    assert "continued from" in output
    codes, output = runs.run("mixed", *SHORT, "engine.zero_stage=0")
    assert codes == [0, 0], output
    assert "continued from" in output
    assert runs.trace("mixed") == runs.trace("stage1")
    for ours, theirs in zip(runs.metrics("mixed"), runs.metrics("stage1"), strict=True):
        numbers = ours.keys() & {"loss", "grad_norm", "valid_loss"}
        assert numbers == theirs.keys() & {"loss", "grad_norm", "valid_loss"}
        assert all(ours[name] == pytest.approx(theirs[name], rel=1e-4) for name in numbers)


def test_own_deepspeed_file_is_named_by_what_it_does_and_by_what_deepspeed_refuses(runs, tmp_path):
    path = tmp_path / "own.json"
    path.write_text('{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}')
    codes, output = runs.run("own", *SHORT, f"engine.deepspeed={path}", ranks=1)
    assert codes == [0], output
    assert "ZeRO 2, optimiser in host memory" in output
    path.write_text('{"zero_optimization": {"stage": 1}, "amp": {"enabled": true}}')
    codes, output = runs.run("own2", *SHORT, f"engine.deepspeed={path}", ranks=1)
    assert codes == [2], output
    assert "own.json: " in output
    assert "Traceback" not in output


def test_exports_of_stages_1_and_3_at_the_same_step_are_equal(runs):
    before = runs.weights("stage1")
    (runs.folder / "stage1" / "export" / "model.safetensors").unlink()
    codes, output = runs.run("stage1", *SHORT, "engine.zero_stage=3")  # the finished run exports again
    assert codes == [0, 0], output
    assert runs.weights("stage1") == before


def test_runs_of_stages_1_and_3_end_at_the_same_weights(runs):
    codes, output = runs.run("stage3", *SHORT, "engine.zero_stage=3", "model.activation_checkpointing=true")
    assert codes == [0, 0], output
    one, three = (load_file(runs.folder / name / "export" / "model.safetensors") for name in ("stage1", "stage3"))
    assert one.keys() == three.keys()
    assert max(((one[name] - three[name]).norm() / one[name].norm()).item() for name in one) < 1e-5


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (2, "bf16"), (3, "bf16")])
def test_loss_that_is_not_finite_on_one_rank_stops_all_at_any_stage(runs, stage, precision):
    name = f"diverged{stage}"
    settings = (f"engine.zero_stage={stage}", f"train.precision={precision}")
    codes, output = finish(runs.start(name, *SHORT, *settings, KILL="nan:5", KILL_RANK="1"), end_peers=False)
    assert codes == [3, 3], output
    assert output.count("step 5, lr") == 1
    assert "Traceback" not in output
    assert "step-00000002" in runs.checkpoints(name)


def test_fp16_without_a_gpu_is_refused_before_anything_is_written(runs):
    codes, output = runs.run("half", *SHORT, "train.precision=fp16", ranks=1)
    assert codes == [2]
    assert "train.precision = fp16: needs a GPU" in output
    assert "Traceback" not in output
    assert not (runs.folder / "half" / "config.yaml").exists()
