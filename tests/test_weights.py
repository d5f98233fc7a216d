import argparse
import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from msm_dist.config import Features, Model
from msm_dist.errors import CheckpointError
from msm_dist.model.mae import MaskedSpectrogramModel
from msm_dist.model.weights import WeightsInfo, from_published, load, read_published, save, to_published

FEATURES = Features(mean=-7.1, std=4.2)


def random_model(frames: int = 96, **settings) -> MaskedSpectrogramModel:
    """A tiny model, every parameter drawn, biases included."""
    model = MaskedSpectrogramModel(Model(size="tiny", **settings), 80, frames)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return model


def info(model: MaskedSpectrogramModel) -> WeightsInfo:
    return WeightsInfo(model.config, FEATURES, model.grid.frames, {"run": "r", "step": 7})


def assert_equal_states(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


@pytest.fixture
def saved(tmp_path):
    model = random_model(patch_size="16x8", key_bias=True, decoder_positions="2d", mask_ratio=0.6)
    return save(tmp_path / "export", model.state_dict(), info(model)), model


@pytest.mark.parametrize("file", ["", "model.safetensors"])
def test_loading_gives_back_what_was_saved(saved, file):
    folder, model = saved
    loaded, loaded_info = load(folder / file)
    assert_equal_states(loaded.state_dict(), model.state_dict())
    assert loaded.grid == model.grid
    assert loaded.num_keep == model.num_keep
    assert loaded_info.features == FEATURES
    assert loaded_info.origin == {"run": "r", "step": 7}
    assert loaded_info.model.geometry == model.config.geometry
    spectrogram = torch.randn(1, 1, 80, 96)
    ids = torch.zeros(1, 3).long()
    assert torch.equal(loaded(spectrogram, ids).loss, model(spectrogram, ids).loss)


def test_weights_can_be_read_by_whoever_may_read_the_folder(saved):
    folder, _ = saved
    weights = (folder / "model.safetensors").stat().st_mode
    assert weights & 0o444 == folder.stat().st_mode & 0o444


def test_a_named_size_is_spelt_out(saved):
    config = json.loads((saved[0] / "config.json").read_text())
    assert config["model"]["size"] is None
    assert config["model"]["embed_dim"] == 192


def test_weights_are_stored_in_float32(tmp_path):
    model = random_model().bfloat16()
    folder = save(tmp_path, model.state_dict(), info(model))
    assert {value.dtype for value in load_file(folder / "model.safetensors").values()} == {torch.float32}


def test_equal_weights_give_equal_files(saved, tmp_path):
    folder, model = saved
    shuffled = dict(reversed(model.state_dict().items()))
    again = save(tmp_path / "again", shuffled, info(model))
    for name in ("model.safetensors", "config.json"):
        assert (folder / name).read_bytes() == (again / name).read_bytes()
    assert sorted(os.listdir(again)) == ["config.json", "model.safetensors"]


def test_weights_need_their_statistics(tmp_path):
    model = random_model()
    with pytest.raises(CheckpointError, match="statistics"):
        save(tmp_path, model.state_dict(), WeightsInfo(model.config, Features(), 96))


def test_an_unwritable_folder_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    model = random_model()
    with pytest.raises(CheckpointError, match="can't write the weights"):
        save(tmp_path / "file" / "export", model.state_dict(), info(model))


def rewrite(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("encoder.cls_token"), "missing: encoder.cls_token"),
        (lambda s: s.update(extra=torch.zeros(1)), "unknown: extra"),
        (
            lambda s: s.update({"decoder.norm.bias": torch.zeros(3)}),
            r"decoder.norm.bias \[3\] \(expected \[96\]\)",
        ),
    ],
)
def test_loading_is_strict(saved, change, message):
    rewrite(saved[0], change)
    with pytest.raises(CheckpointError, match=message):
        load(saved[0])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format": "other"}, "format 'other' version 1"),
        ({"version": 2}, "version 2"),
        ({"model": {"nonsense": 1}}, "nonsense"),
        ({"crop_frames": "many"}, "not the configuration"),
        ({"crop_frames": 97}, "80 mel bands x 97 frames"),
    ],
)
def test_a_wrong_configuration_is_a_clear_error(saved, change, message):
    path = saved[0] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        load(saved[0])


def test_missing_and_damaged_files_are_clear_errors(saved, tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        load(tmp_path / "nowhere")
    weights = saved[0] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="not readable weights"):
        load(saved[0])
    (saved[0] / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not the configuration"):
        load(saved[0])


@pytest.mark.parametrize("cls_token", [True, False])
@pytest.mark.parametrize("settings", [{}, {"key_bias": True, "decoder_positions": "2d"}])
@pytest.mark.parametrize("frames, patch_size", [(96, "16x16"), (304, "80x4")])
def test_published_layout_round_trips(cls_token, settings, frames, patch_size):
    model = random_model(frames, patch_size=patch_size, cls_token=cls_token, **settings)
    published = to_published(model)
    back = from_published(published)
    assert_equal_states(back.state_dict(), model.state_dict())
    assert back.grid == model.grid
    assert back.config.geometry == model.config.geometry
    assert_equal_states(to_published(back), published)


def test_published_names_and_shapes_are_those_of_the_checkpoints():
    published = to_published(random_model(208))
    block = {name.removeprefix("blocks.3."): list(v.shape) for name, v in published.items() if "blocks.3." in name}
    assert block == {
        "norm1.weight": [192],
        "norm1.bias": [192],
        "attn.q_bias": [192],
        "attn.v_bias": [192],
        "attn.qkv.weight": [576, 192],
        "attn.proj.weight": [192, 192],
        "attn.proj.bias": [192],
        "norm2.weight": [192],
        "norm2.bias": [192],
        "mlp.fc1.weight": [768, 192],
        "mlp.fc1.bias": [768],
        "mlp.fc2.weight": [192, 768],
        "mlp.fc2.bias": [192],
    }
    outside = {name: list(v.shape) for name, v in published.items() if "blocks." not in name}
    assert outside == {
        "cls_token": [1, 1, 192],
        "pos_embed": [1, 66, 192],
        "mask_token": [1, 1, 96],
        "decoder_pos_embed": [1, 66, 96],
        "patch_embed.proj.weight": [192, 1, 16, 16],
        "patch_embed.proj.bias": [192],
        "norm.weight": [192],
        "norm.bias": [192],
        "decoder_embed.weight": [96, 192],
        "decoder_embed.bias": [96],
        "decoder_norm.weight": [96],
        "decoder_norm.bias": [96],
        "decoder_pred.weight": [256, 96],
        "decoder_pred.bias": [256],
    }


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_published_file_is_read_without_running_its_code(tmp_path, wrapped):
    model = random_model(key_bias=True)
    state = to_published(model) | {"norm_stats": torch.tensor([-7.1, 4.2])}
    args = argparse.Namespace(model="mae", lr=1e-3)
    torch.save({"model": state, "epoch": 99, "args": args} if wrapped else state, tmp_path / "p.pth")
    assert read_published(tmp_path / "p.pth")["norm_stats"].tolist() == pytest.approx([-7.1, 4.2])
    assert_equal_states(from_published(tmp_path / "p.pth").state_dict(), model.state_dict())


class Trap:
    """Creates a file when unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_code_in_a_published_file_is_refused(tmp_path):
    torch.save({"model": {}, "args": Trap(tmp_path / "sprung")}, tmp_path / "trap.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Trap(tmp_path / "sprung"), protocol=2))
    for name in ("trap.pth", "plain.pth"):
        with pytest.raises(CheckpointError, match="without running its code"):
            read_published(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [{"model": [1, 2]}, {"model": {"a": 1}}, [1]])
def test_a_file_without_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "p.pth")
    with pytest.raises(CheckpointError, match="no state_dict"):
        read_published(tmp_path / "p.pth")


def test_a_missing_published_file_is_a_clear_error(tmp_path):
    with pytest.raises(CheckpointError, match="nothing.pth"):
        from_published(tmp_path / "nothing.pth")


def test_another_decoder_leaves_the_encoder():
    model = random_model()
    published = to_published(model)
    published["decoder_pos_embed"] = torch.randn_like(published["decoder_pos_embed"])
    with pytest.raises(CheckpointError, match="encoder_only=True"):
        from_published(published)
    published["decoder_blocks.0.something.else"] = torch.zeros(3)
    back = from_published(published, encoder_only=True)
    assert_equal_states(back.encoder.state_dict(), model.encoder.state_dict())


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("pos_embed"), "pos_embed is missing"),
        (lambda s: s.pop("blocks.1.attn.q_bias"), r"encoder is not whole:\n  missing  blocks.1.attn.q_bias \[192\]"),
        (lambda s: s.update({"head.weight": torch.zeros(2)}), "unused   head.weight"),
        (lambda s: s["pos_embed"].mul_(1.01), "not the fixed 2-D table"),
        (lambda s: s.update({"blocks.4.norm1.bias": torch.zeros(192)}), "no published geometry"),
    ],
)
def test_conversion_is_strict(change, message):
    published = {name: value.clone() for name, value in to_published(random_model()).items()}
    change(published)
    with pytest.raises(CheckpointError, match=message):
        from_published(published)
