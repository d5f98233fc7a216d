"""A model from outside: the program of docs/extend.md as it stands there, and what a run holds such a model to."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from msm_dist import extension, pretrain
from msm_dist.config import dump_config, load_config, parse_config
from msm_dist.data.stream import _hash
from msm_dist.errors import ConfigError
from msm_dist.evaluate.encoder import Encoder
from msm_dist.model.mae import MaskedSpectrogramModel
from msm_dist.model.patches import PatchGrid, patchify, unpatchify
from msm_dist.model.weights import load
from msm_kernels.patch_masking import random_masking
from msm_kernels.reference import select_rows
from tests.corpus import write_corpus
from tests.processes import HERE

STEPS = 24  # three epochs
SETTINGS = [
    "train.global_batch=16",
    "train.micro_batch=8",
    "train.precision=fp32",
    f"train.steps={STEPS}",
    "train.log_every=1",
    f"train.valid_every={STEPS}",
    "train.valid_clips=6",
    "train.pictures_every=0",
    "train.trace=true",
    "checkpoint.every=4",
    "data.num_workers=0",
    "data.block=4",
    "data.crop_frames=96",
    "model.size=null",
    "model.embed_dim=32",
    "model.depth=1",
    "model.num_heads=2",
    "model.decoder_embed_dim=16",
    "model.decoder_depth=1",
    "model.decoder_num_heads=2",
    "optim.lr=1e-2",
    "optim.warmup_steps=1",
]
KILLED = """
import os, runpy, signal, sys
from msm_dist import pretrain

stop_if_skipped = pretrain.stop_if_skipped

def dying(run, *rest):
    if run.step == 6:
        run.saver.finish()  # the write of step 4 may take longer than two steps
        os.kill(os.getpid(), signal.SIGKILL)
    stop_if_skipped(run, *rest)

pretrain.stop_if_skipped = dying
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def program() -> str:
    page = (HERE.parent / "docs" / "extend.md").read_text(encoding="utf-8")
    (found,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "build_model=" in block]
    return found


def tiny(**sections):
    model = {"embed_dim": 32, "depth": 1, "num_heads": 2, "decoder_embed_dim": 16, "decoder_depth": 1}
    values = {"data": {"crop_frames": 96, "block": 2}, "train": {"steps": 1, "micro_batch": 2, "global_batch": 2}}
    values["model"] = model | {"decoder_num_heads": 2} | sections.pop("model", {})
    return parse_config(values | sections, "test")


class Runs:
    """Starts the page's program as plain processes, on one corpus."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.program = folder / "my_run.py"
        self.program.write_text(program())
        self.killer = folder / "killer.py"
        self.killer.write_text(KILLED)
        (folder / "empty.yaml").write_text("")
        train = write_corpus(folder / "train", count=128, num_shards=2)
        valid = write_corpus(folder / "valid", count=8, num_shards=1, seed=1)
        places = [f"run.dir={folder}", f"data.shards={train}", f"data.valid_shards={valid}"]
        self.words = [str(folder / "empty.yaml"), *places, *SETTINGS]

    def run(self, name: str, *program: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *map(str, program), *self.words, f"run.name={name}"],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=600,
        )

    def lines(self, name: str, file: str = "metrics.jsonl") -> list[dict]:
        return [json.loads(line) for line in (self.folder / name / file).read_text().splitlines()]

    def results(self, name: str) -> tuple:
        kept = ("step", "loss", "grad_norm", "valid_loss", "reference_visible_mean", "reference_nearest_patch")
        numbers = [[line.get(key) for key in kept] for line in self.lines(name)]
        weights = (self.folder / name / "export" / "model.safetensors").read_bytes()
        return numbers, self.lines(name, "trace/rank-00000.jsonl"), weights


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    runs = Runs(tmp_path_factory.mktemp("extend"))
    done = runs.run("undisturbed", runs.program)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "M parameters, from my_run.py:ColumnModel" in done.stdout
    assert "patches visible" not in done.stdout
    assert "no mfu" not in done.stdout
    return runs


@pytest.fixture
def columns(tmp_path, monkeypatch):
    path = tmp_path / "my_run.py"
    path.write_text(program())
    spec = importlib.util.spec_from_file_location("my_run", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "my_run", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.distributed
def test_killed_run_of_the_pages_program_equals_one_never_killed(runs):
    done = runs.run("killed", runs.killer, runs.program)
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    assert [path.name for path in (runs.folder / "killed" / "checkpoints").iterdir()] == ["step-00000004"]
    done = runs.run("killed", runs.program)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "continued from" in done.stdout
    assert runs.results("killed") == runs.results("undisturbed")


@pytest.mark.distributed
def test_run_of_the_pages_program_learns_and_is_judged_on_its_own_masks_and_target(runs, columns):
    lines = runs.lines("undisturbed")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == STEPS
    assert np.mean(losses[-8:]) < np.mean(losses[:8])
    assert all(line["mfu"] > 0 for line in lines if "loss" in line)
    (valid,) = [line for line in lines if "valid_loss" in line]
    names = {"reference_visible_mean", "reference_nearest_patch"}
    assert names <= valid.keys()
    assert "reference_mel_mean" not in valid
    assert (runs.folder / "undisturbed" / "pictures" / f"step-{STEPS:08d}.png").exists()
    cfg = load_config(runs.words[0], runs.words[1:])
    model = columns.ColumnModel(cfg)
    for line in runs.lines("undisturbed", "trace/rank-00000.jsonl"):
        ids = torch.tensor([[line["epoch"], line["clip"], line["crop"]]])
        assert line["mask"] == _hash(model.hide_columns(ids).ids_keep.numpy()[0])


@pytest.mark.distributed
def test_export_of_the_pages_program_loads(runs):
    folder = runs.folder / "undisturbed"
    model, info = load(folder)
    assert info.origin["step"] == STEPS
    fresh = MaskedSpectrogramModel(info.model, 80, 96, 0).state_dict()
    assert not torch.equal(model.state_dict()["encoder.patch_embed.weight"], fresh["encoder.patch_embed.weight"])
    assert Encoder.load(folder).encode(torch.randn(1, 16000), 16000).shape == (1, 7, 5 * 32)


@pytest.mark.distributed
def test_run_of_a_model_from_outside_is_not_continued_with_the_configurations(runs):
    done = runs.run("undisturbed", Path("-m"), Path("msm_dist.pretrain"))
    assert done.returncode == 2
    assert "comes from my_run.py:ColumnModel, this one's comes from the configuration" in done.stderr
    assert "run.name=" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.distributed
def test_run_of_a_model_that_draws_from_torchs_generator_does_not_start(runs):
    careless = runs.folder / "careless.py"
    careless.write_text(
        program().replace(
            "        target = smooth", "        nn.functional.dropout(prediction)\n        target = smooth"
        )
    )
    done = runs.run("careless", careless)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "the model changes torch's random generator in a training step" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (runs.folder / "careless" / "config.yaml").exists()


def test_pages_mask_hides_whole_columns_as_a_function_of_seed_and_sample(columns):
    cfg = tiny(data={"crop_frames": 208, "block": 2})
    model = columns.ColumnModel(cfg)
    ids = torch.tensor([[epoch, clip, crop] for epoch in (0, 3) for clip in (1, 2, 70000) for crop in (0, 5)])
    masking = model.hide_columns(ids)
    assert masking.ids_keep.shape == (12, 5 * 3)
    seen = torch.zeros(12, 65).scatter(1, masking.ids_keep, 1).view(12, 5, 13)
    assert torch.equal(seen, seen[:, :1].expand(-1, 5, -1))
    assert (seen[:, 0].sum(dim=1) == 3).all()
    assert len({tuple(row) for row in seen[:, 0].tolist()}) > 6
    alone = model.hide_columns(ids[7:8])
    assert all(torch.equal(one[0], many[7]) for one, many in zip(alone, masking, strict=True))
    other = columns.ColumnModel(cfg.model_copy(update={"seed": 1}))
    assert not torch.equal(other.hide_columns(ids).ids_keep, masking.ids_keep)


def test_pages_loss_is_the_error_to_the_smoothed_spectrogram_on_the_hidden_columns(columns):
    model = columns.ColumnModel(tiny())
    spectrogram = torch.randn(2, 1, 80, 96)
    output = model(spectrogram, sample_ids=torch.tensor([[0, 1, 0], [0, 2, 0]]))
    smoothed = torch.zeros(2, 1, 80, 96)
    for frame in range(96):
        smoothed[..., frame] = spectrogram[..., max(0, frame - 4) : frame + 5].mean(dim=-1)
    assert torch.allclose(output.target, smoothed, atol=1e-6)
    errors = unpatchify(
        torch.zeros(2, 30, 256).scatter(1, output.masking.ids_masked[..., None].expand(-1, -1, 256), 1.0),
        PatchGrid(80, 96, (16, 16)),
    )
    target = select_rows(patchify(smoothed, (16, 16)), output.masking.ids_masked)
    assert output.loss.item() == pytest.approx((output.prediction - target).square().mean().item(), rel=1e-5)
    hidden_frames = errors[:, 0].amin(dim=1)
    assert torch.equal(hidden_frames, errors[:, 0].amax(dim=1))
    assert (hidden_frames.sum(dim=1) == 80).all()


class Other(nn.Module):
    """The configuration's model with something changed in what it returns, or done on the way."""

    def __init__(self, cfg, change=lambda output: output):
        super().__init__()
        self.inner = MaskedSpectrogramModel(cfg.model, cfg.features.n_mels, cfg.data.crop_frames, cfg.seed)
        self.register_buffer("average", torch.zeros(3))
        self.change = change

    def forward(self, spectrogram, sample_ids):
        return self.change(self, self.inner(spectrogram, sample_ids=sample_ids))


def held(change, cfg=None):
    """One forward pass under watch."""
    cfg = cfg or tiny()
    model = Other(cfg, change)
    with extension.held_to_contract(model, cfg, torch.device("cpu"), Other):
        model(torch.randn(2, 1, 80, 96, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 3).long())


def drop(model, output):
    nn.functional.dropout(output.prediction, 0.5)
    return output


def average(model, output):
    model.average += 1
    return output


def uneven(model, output):
    masking = output.masking
    return output._replace(masking=masking._replace(ids_keep=masking.ids_keep[:, 1:]))


FAULTS = {
    "random generator": drop,
    "the buffer average": average,
    "without prediction, masking": lambda model, output: nn.Parameter(torch.zeros(1)).sum().as_subclass(Lossy),
    "one floating-point number": lambda model, output: output._replace(loss=output.loss.expand(2)),
    "the model's masking is": uneven,
    "the model's target is": lambda model, output: Targeted(output, torch.zeros(2, 1, 80, 80)),
}


class Lossy(torch.Tensor):
    """A bare tensor as output, with a loss."""

    loss = None


class Targeted:
    def __init__(self, output, target):
        self.loss, self.prediction, self.masking = output
        self.target = target


@pytest.mark.parametrize("message", FAULTS)
def test_model_that_would_not_resume_or_fit_is_refused_before_step_1(message):
    with pytest.raises(ConfigError, match=message) as raised:
        held(FAULTS[message])
    assert raised.value.on_all_ranks


def test_model_that_keeps_to_the_contract_may_have_other_parameters_and_predictions():
    held(lambda model, output: output)
    held(lambda model, output: output._replace(prediction=output.prediction[..., :4]))
    held(lambda model, output: Targeted(output, None))


def test_configured_parameters_are_told_from_others():
    cfg = tiny()
    assert extension.has_configured_parameters(extension.configured_model(cfg), cfg)
    assert not extension.has_configured_parameters(Other(cfg), cfg)
    assert not extension.has_configured_parameters(extension.configured_model(cfg), tiny(model={"decoder_depth": 2}))


def test_builder_that_draws_from_torchs_generator_gives_the_seeds_weights():
    def build(cfg):
        return nn.Linear(4, 4)

    torch.manual_seed(11)
    state = torch.get_rng_state()
    first = extension.build_seeded(build, tiny())
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(12)
    again = extension.build_seeded(build, tiny())
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, extension.build_seeded(build, tiny(seed=1)).weight)
    with pytest.raises(ConfigError, match="must return an nn.Module"):
        extension.build_seeded(lambda cfg: None, tiny())


def test_another_builder_is_refused_and_a_changed_file_noted(tmp_path, columns):
    folder = tmp_path / "run"
    folder.mkdir()
    builder = columns.ColumnModel
    extension.record_builder(folder, builder)
    assert extension.compare_builder(folder, extension.configured_model) is None, "a start that failed binds nobody"
    (folder / "config.yaml").write_text(dump_config(tiny()))
    assert extension.compare_builder(folder, builder) is None
    assert extension.compare_builder(folder, partial(builder)) is None
    with pytest.raises(ConfigError, match=r"comes from my_run.py:ColumnModel.*the configuration.*run.name=NAME"):
        extension.compare_builder(folder, extension.configured_model)
    with pytest.raises(ConfigError, match=r"this one's comes from test_extend.py:Other"):
        extension.compare_builder(folder, Other)
    (tmp_path / "my_run.py").write_text(program() + "\n")
    assert "my_run.py:ColumnModel has changed" in extension.compare_builder(folder, builder)
    extension.record_builder(folder, builder)
    assert "has changed" in extension.compare_builder(folder, builder), "a later start overwrites no record"


def test_run_of_the_configurations_model_records_no_builder_and_takes_no_other(tmp_path):
    extension.record_builder(tmp_path, Other)
    extension.record_builder(tmp_path, extension.configured_model)
    assert not list(tmp_path.iterdir())
    (tmp_path / "config.yaml").write_text(dump_config(tiny()))
    with pytest.raises(ConfigError, match="comes from the configuration, this one's comes from test_extend.py:Other"):
        extension.compare_builder(tmp_path, Other)
    (tmp_path / "model.json").write_text("[")
    with pytest.raises(ConfigError, match="can't be read"):
        extension.compare_builder(tmp_path, Other)


def test_flops_follow_the_masks_own_number_of_visible_patches():
    cfg = tiny(data={"crop_frames": 208, "block": 2})
    ids = torch.zeros(1, 3, dtype=torch.int64)
    few, many = (pretrain.flops_per_clip(cfg, random_masking(0, ids, 65, keep)) for keep in (8, 32))
    # Each more visible patch costs its embedding, the encoder and the bridge, and spares the head.
    more = 24
    attention = 4 * 32 * (33**2 - 9**2)
    expected = more * (2 * 256 * 32 + 24 * 32**2 + 2 * 32 * 16 - 2 * 16 * 256) + attention
    assert many - few == pytest.approx(3 * expected)


def test_frozen_parameter_that_stage_3_gathers_has_not_changed():
    model = nn.Linear(2, 2).requires_grad_(False)
    for parameter in model.parameters():
        parameter.ds_tensor = parameter.detach().clone()  # this rank's part, as DeepSpeed keeps it
        parameter.data = torch.empty(0)
    before = extension._unsaved_state(model, torch.device("cpu"))
    for parameter in model.parameters():
        parameter.data = parameter.ds_tensor.clone()
    after = extension._unsaved_state(model, torch.device("cpu"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    model.weight.ds_tensor.add_(1)
    after = extension._unsaved_state(model, torch.device("cpu"))
    assert not torch.equal(before["the frozen weight"], after["the frozen weight"])
