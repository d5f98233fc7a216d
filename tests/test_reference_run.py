"""The GPU's reference run, made small enough for a CPU: corpus, run, record."""

import pytest

from benchmarks import reference_run
from msm_dist.compare import compare
from msm_dist.config import load_config
from msm_dist.data.plan import check_lanes, make_plan

SMALL = [
    "model.size=tiny",
    "data.num_workers=0",
    "data.crops_per_clip=4",
    "data.block=4",
    "train.steps=6",
    "optim.warmup_steps=1",
    "train.global_batch=8",
    "train.micro_batch=8",
    "train.precision=fp32",
    "train.log_every=2",
    "train.valid_clips=4",
]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    work = tmp_path_factory.mktemp("reference")
    code = reference_run.record(work, work / "out", (64, 4), SMALL)
    return work, code


def test_record_holds_what_compare_needs_and_no_place_of_the_machine(recorded):
    work, code = recorded
    folder = work / "out" / "base_gpu_2000_steps"
    assert code == 0
    assert {path.name for path in folder.iterdir()} == {*reference_run.KEPT, "README.md"}
    assert str(work) not in "".join(path.read_text() for path in folder.iterdir())
    assert "| clips/s |" in (folder / "README.md").read_text()
    assert "loss" in compare(work / "runs" / "base_gpu_2000_steps", folder)


def test_a_record_is_not_replaced(recorded, capsys):
    work, _ = recorded
    assert reference_run.record(work, work / "out", (64, 4), SMALL) == 1
    assert "move it away" in capsys.readouterr().out


def test_configuration_is_the_papers_model_for_2000_steps():
    cfg, paper = load_config(reference_run.CONFIG), load_config(reference_run.CONFIG.with_name("base_audioset.yaml"))
    assert (cfg.model, cfg.train.steps, cfg.train.precision) == (paper.model, 2000, "bf16")
    assert (cfg.train.global_batch, cfg.data.crop_frames) == (paper.train.global_batch, 208)
    data = cfg.data
    plan = make_plan([reference_run.TRAIN_CLIPS], 0, None, data.block, data.shuffle_window, data.crops_per_clip)
    check_lanes(plan, world_size=1, num_workers=data.num_workers)
