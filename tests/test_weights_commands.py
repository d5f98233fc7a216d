"""`msm-dist weights`: from runs and published files to folders that load, with every tensor accounted for."""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from msm_dist.config import dump_config, parse_config
from msm_dist.errors import CheckpointError, ConfigError
from msm_dist.evaluate.encoder import Encoder
from msm_dist.evaluate.weights_commands import app
from msm_dist.evaluate.weights_export import export
from msm_dist.evaluate.weights_import import import_published
from msm_dist.evaluate.weights_inspect import inspect
from msm_dist.model.mae import MaskedSpectrogramModel
from msm_dist.model.weights import load
from tests.processes import HERE
from tests.published import PAPER, RERUN, TINY, random_state
from tests.test_pretrain import Runs

SMALL = {
    "embed_dim": 32,
    "depth": 1,
    "num_heads": 2,
    "decoder_embed_dim": 16,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}
CORPUS = [{"name": "birds", "clips": 128, "seconds": 1280.0, "digest": "c" * 64, "share": 1.0, "official": None}]


def config():
    return parse_config(
        {
            "run": {"name": "mine"},
            "model": SMALL | {"backend": "reference"},
            "data": {"crop_frames": 96, "block": 2},
            "train": {"steps": 9, "micro_batch": 2, "global_batch": 4},
        },
        "test",
    )


def weights(step: int) -> dict[str, torch.Tensor]:
    model = MaskedSpectrogramModel(config().model, 80, 96, seed=step)
    return {name: value + step for name, value in model.state_dict().items()}


def write_checkpoint(run: Path, step: int, num_files: int = 2) -> Path:
    """A checkpoint as two ranks write it, with moments that are no weights."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    state, files = weights(step), {}
    for rank in range(num_files):
        names = list(state)[rank::num_files]
        name = f"state-{rank:05d}-of-{num_files:05d}.safetensors"
        moments = {f"{part}/{n}": state[n] * 0 for part in ("exp_avg", "exp_avg_sq") for n in names}
        save_file({f"param/{n}": state[n] for n in names} | moments, folder / name)
        content = (folder / name).read_bytes()
        files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    meta = {"format": 1, "files": files, "step": step, "mean": -7.0, "std": 4.0, "corpus": CORPUS}
    text = json.dumps(meta).encode()
    (folder / "meta.json").write_bytes(text)
    (folder / "complete").write_text(hashlib.sha256(text).hexdigest())
    return folder


@pytest.fixture
def run(tmp_path):
    """An unfinished run with checkpoints of steps 4 and 6."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(config()))
    (folder / "plan.json").write_text('{"index_digest": "abc"}')
    lines = [{"step": step, "loss": 1 / step} for step in range(1, 7)]
    lines.append({"step": 6, "valid_loss": 0.5, "reference_mel_mean": 0.75})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in (4, 6):
        write_checkpoint(folder, step)
    return folder


def assert_holds(folder: Path, step: int) -> None:
    state = load_file(folder / "model.safetensors")
    expected = weights(step)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


def test_newest_checkpoint_becomes_the_runs_export(run):
    report = export(run)
    assert_holds(run / "export", 6)
    assert "step-00000006, step 6" in report
    info = load(run)[1]
    assert (info.features.mean, info.features.std, info.crop_frames) == (-7.0, 4.0, 96)
    assert info.model.backend == "auto"
    assert info.origin == {"run": "mine", "step": 6, "index_digest": "abc", "corpus": CORPUS}
    assert Encoder.load(run).embedding_size == 5 * 32
    assert sorted(os.listdir(run / "export")) == ["README.md", "config.json", "model.safetensors"]


def test_torn_checkpoint_is_not_taken(run):
    (run / "checkpoints" / "step-00000006" / "complete").unlink()
    export(run)
    assert_holds(run / "export", 4)
    with pytest.raises(CheckpointError, match="step-00000006: incomplete"):
        export(run, step=6)


def test_changed_bytes_of_a_checkpoint_are_found_and_nothing_is_written(run):
    file = run / "checkpoints" / "step-00000006" / "state-00001-of-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="not those that were saved"):
        export(run)
    assert not (run / "export").exists()


@pytest.mark.parametrize("path", ["", "checkpoints/step-00000004"])
def test_step_is_chosen_and_an_earlier_one_does_not_replace_a_later_export(run, path):
    export(run)
    chosen = {"step": 4} if not path else {}
    with pytest.raises(ConfigError, match="holds the weights of step 6: give --out"):
        export(run / path, **chosen)
    assert_holds(run / "export", 6)
    export(run / path, **chosen, out=run.parent / "early")
    assert_holds(run.parent / "early", 4)
    assert export(run).startswith(f"{run / 'export'}: {len(weights(6))} tensors from {run / 'export'}, step 6")


def test_later_checkpoint_than_the_export_is_taken(run):
    export(run)
    write_checkpoint(run, 8, num_files=1)
    export(run)
    assert_holds(run / "export", 8)


def test_exported_folder_is_copied_and_written_in_the_published_layout(run, tmp_path):
    export(run)
    export(run / "export", out=tmp_path / "copy", published=tmp_path / "deep" / "mine.pth")
    assert_holds(tmp_path / "copy", 6)
    assert (tmp_path / "copy" / "config.json").read_bytes() == (run / "export" / "config.json").read_bytes()
    content = torch.load(tmp_path / "deep" / "mine.pth", weights_only=True)
    assert content["model"]["blocks.0.norm1.weight"].tolist() == weights(6)["encoder.blocks.0.norm1.weight"].tolist()
    assert content["norm_stats"].tolist() == [-7.0, 4.0]


def test_wrong_uses_of_export_are_one_error(run, tmp_path):
    with pytest.raises(CheckpointError, match="--step 5: .* has no checkpoint of it; it has 4, 6"):
        export(run, step=5)
    with pytest.raises(ConfigError, match="no run folder"):
        export(tmp_path, step=5)
    with pytest.raises(CheckpointError, match="no such file"):
        export(tmp_path)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match="neither exported weights nor a complete checkpoint"):
        export(run)
    with pytest.raises(CheckpointError, match="msm-dist weights export"):
        load(run)


def test_export_needs_no_package_of_training(run):
    source = (
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in {'deepspeed', 'triton', 'webdataset', 'tensorboard', 'matplotlib'}:\n"
        "            raise ImportError(f'{name} is blocked by this test')\n"
        "sys.meta_path.insert(0, Blocked())\n"
        f"sys.argv = ['msm-dist', 'weights', 'export', {str(run)!r}]\n"
        "from msm_dist.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, cwd=HERE.parent)
    assert done.returncode == 0, done.stderr
    assert_holds(run / "export", 6)


@pytest.mark.distributed
def test_export_of_a_sharded_offloaded_checkpoint_is_the_runs_own_export(tmp_path):
    runs = Runs(tmp_path)
    settings = ("train.steps=4", "checkpoint.every=2", "train.valid_every=4")
    codes, output = runs.run("three", *settings, "engine.zero_stage=3", "engine.offload=parameters")
    assert codes == [0, 0], output
    folder = tmp_path / "three"
    own = {name: (folder / "export" / name).read_bytes() for name in ("model.safetensors", "config.json")}
    export(folder, step=4, out=tmp_path / "four")
    assert {name: (tmp_path / "four" / name).read_bytes() for name in own} == own
    export(folder, step=2, out=tmp_path / "two")
    assert (tmp_path / "two" / "model.safetensors").read_bytes() != own["model.safetensors"]
    assert load(tmp_path / "two")[1].origin["step"] == 2
    shutil.rmtree(folder / "export")
    export(folder)
    assert {name: (folder / "export" / name).read_bytes() for name in own} == own
    card = (folder / "export" / "README.md").read_text()
    assert "| held-out loss at step 4 | " in card
    assert "| train | 192 | " in card


def published(path: Path, generation: str = PAPER, cls_token: bool = True, **more) -> dict[str, torch.Tensor]:
    """A published file beside optimizer, scaler and args, as those are."""
    state = random_state(208, (16, 16), generation, TINY, cls_token)
    args = argparse.Namespace(model="mae_vit_base", lr=None, input_size=[80, 208])
    beside = {"optimizer": {"state": {0: torch.ones(2)}, "param_groups": [{"lr": 0.1}]}, "scaler": {"scale": 1.0}}
    torch.save({"model": state | more, "epoch": 99, "args": args} | beside, path)
    return state


def unwrapped(report: str) -> str:
    return report.replace("\n" + " " * 15, " ")


def test_published_file_is_imported_with_everything_accounted_for(tmp_path):
    state = published(tmp_path / "p.pth")
    report = import_published(tmp_path / "p.pth", tmp_path / "out")
    assert f"{len(state)} of {len(state)} tensors" in report
    assert "epoch 99" in report
    assert "unused       3: args (beside the tensors), optimizer (beside the tensors), scaler" in unwrapped(report)
    assert "missing" not in report
    assert "mean -7.1, deviation 4.2: assumed, as the file has none: AudioSet's" in report
    model, info = load(tmp_path / "out")
    assert torch.equal(model.encoder.patch_embed.weight, state["patch_embed.proj.weight"].flatten(1))
    assert (info.features.mean, info.features.std, info.crop_frames) == (-7.1, 4.2, 208)
    assert info.origin["published_file"] == "p.pth"
    assert info.origin["statistics"].startswith("assumed")
    assert Encoder.load(tmp_path / "out").embed(torch.zeros(1, 16000), 16000).shape == (1, 960)
    back = export(tmp_path / "out", published=tmp_path / "back.pth")
    assert "back.pth" in back
    again = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("given", "expected", "told"),
    [((None, None), (-7.1, 4.2), "the file's norm_stats"), ((-6.5, 3.0), (-6.5, 3.0), "as given")],
)
def test_statistics_are_the_files_unless_given(tmp_path, given, expected, told):
    published(tmp_path / "p.pth", RERUN)
    report = import_published(tmp_path / "p.pth", tmp_path / "out", given)
    info = load(tmp_path / "out")[1]
    assert (info.features.mean, info.features.std) == expected
    assert told in report
    assert told in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(("given", "message"), [((-7.0, None), "one of them"), ((-7.0, 0.0), "--std 0.0")])
def test_half_or_impossible_statistics_are_refused(tmp_path, given, message):
    published(tmp_path / "p.pth")
    with pytest.raises(ConfigError, match=message):
        import_published(tmp_path / "p.pth", tmp_path / "out", given)
    assert not (tmp_path / "out").exists()


def test_import_names_every_tensor_without_a_place_and_takes_the_rest_when_told_to(tmp_path):
    names = [f"head.layer{number}.weight" for number in range(30)]
    state = published(tmp_path / "p.pth", **dict.fromkeys(names, torch.zeros(2)))
    with pytest.raises(CheckpointError, match="--no-strict") as raised:
        import_published(tmp_path / "p.pth", tmp_path / "out")
    assert all(f"unused   {name}" in str(raised.value) for name in names)
    assert not (tmp_path / "out").exists()
    report = import_published(tmp_path / "p.pth", tmp_path / "out", strict=False)
    assert all(re.search(rf"\b{re.escape(name)}\b", report) for name in names)
    assert f"{len(state)} of {len(state) + 30} tensors" in report
    assert max(len(line) for line in report.splitlines() if "head.layer" in line) < 121


def test_encoder_alone_says_that_its_decoder_is_not_trained(tmp_path):
    state = published(tmp_path / "p.pth", decoder_pos_embed=torch.randn(1, 66, 96))
    with pytest.raises(CheckpointError, match="--encoder-only"):
        import_published(tmp_path / "p.pth", tmp_path / "out")
    report = import_published(tmp_path / "p.pth", tmp_path / "out", encoder_only=True)
    unused = [name for name in state if name.startswith(("decoder_", "mask_token"))]
    assert all(name in report for name in unused)
    assert "missing" in report and "reconstructions mean nothing" in unwrapped(report)
    model, info = load(tmp_path / "out")
    assert info.origin["untrained"] == ["decoder"]
    assert "random values" in (tmp_path / "out" / "README.md").read_text()
    assert torch.equal(model.encoder.norm.weight, state["norm.weight"])


def test_import_without_cls_prints_the_originals_flaw(tmp_path):
    published(tmp_path / "p.pth", cls_token=False)
    done = CliRunner().invoke(app, ["import", str(tmp_path / "p.pth"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "drops the first visible token and shifts the others" in done.output
    assert "rops the first visible token" in (tmp_path / "out" / "README.md").read_text()


class Trap:
    """Makes a folder when unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_malicious_file_runs_nothing_and_leaves_nothing(tmp_path):
    published(tmp_path / "p.pth")
    content = torch.load(tmp_path / "p.pth", weights_only=False)
    torch.save(content | {"args": Trap(tmp_path / "sprung")}, tmp_path / "p.pth")
    command = [sys.executable, "-m", "msm_dist", "weights", "import", "p.pth", "--out", "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "without running its code" in done.stderr
    assert "Traceback" not in done.stderr
    with pytest.raises(CheckpointError, match="without running its code"):
        inspect(tmp_path / "p.pth")
    assert os.listdir(tmp_path) == ["p.pth"]
    torch.load(tmp_path / "p.pth", weights_only=False)
    assert (tmp_path / "sprung").is_dir()  # the trap was a real one


def test_inspect_says_what_weights_are(run, tmp_path):
    export(run, out=tmp_path / "out")
    text = inspect(tmp_path / "out")
    digest = hashlib.sha256((tmp_path / "out" / "model.safetensors").read_bytes()).hexdigest()
    total = sum(value.numel() for value in weights(6).values())
    for said in (
        "run mine, step 6, corpus birds",
        "1 blocks, width 32, 2 heads, query and value biases, CLS token",
        "80 bands x 96 frames (0.96 s at 16000 Hz)",
        "5 x 6 of them, 75% masked",
        f"all {total:,}",
        "mean -7, deviation 4",
        digest,
        "encoder.blocks.0.attn.qkv.weight [96, 32] float32",
    ):
        assert said in text
    assert "other model" not in text


def test_inspect_reads_a_runs_newest_checkpoint_without_writing(run):
    before = sorted(str(path) for path in run.rglob("*"))
    text = inspect(run)
    assert "step-00000006" in text
    assert "state-00001-of-00002.safetensors" in text
    assert "step 4" in inspect(run / "checkpoints" / "step-00000004")
    assert sorted(str(path) for path in run.rglob("*")) == before


def test_inspect_tells_of_tensors_that_are_not_the_configurations(run, tmp_path):
    export(run, out=tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    save_file(load_file(file) | {"projector.weight": torch.ones(2)}, file)
    assert "not those that model.* describes; unknown: projector.weight" in inspect(tmp_path / "out")


@pytest.mark.parametrize("cls_token", [True, False])
def test_inspect_reads_published_files_in_their_own_names(tmp_path, cls_token):
    published(tmp_path / "p.pth", cls_token=cls_token)
    text = inspect(tmp_path / "p.pth")
    assert "epoch        99" in text
    assert "4 blocks, width 192, 3 heads, query and value biases" in text
    assert "statistics   not in the file" in text
    assert "beside       args, optimizer, scaler" in text
    assert "blocks.{0..3}.attn.q_bias [192] float32" in text
    assert "masked" not in text.partition("tensors")[0].partition("note")[0]
    assert ("drops the first visible token" in text) != cls_token


def test_options_reach_the_work(run, tmp_path):
    runner = CliRunner()
    done = runner.invoke(app, ["export", str(run), "--step", "4", "--out", str(tmp_path / "a")])
    assert done.exit_code == 0, done.output
    assert_holds(tmp_path / "a", 4)
    published(tmp_path / "p.pth", extra=torch.ones(1))
    words = ["import", str(tmp_path / "p.pth"), "--out", str(tmp_path / "b"), "--mean", "-6", "--std", "3"]
    done = runner.invoke(app, [*words, "--no-strict", "--encoder-only"])
    assert done.exit_code == 0, done.output
    info = load(tmp_path / "b")[1]
    assert (info.features.mean, info.features.std, info.origin["untrained"]) == (-6.0, 3.0, ["decoder"])
