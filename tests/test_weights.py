import argparse
import json
import os
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from msm_dist.config import Features, Model
from msm_dist.errors import CheckpointError
from msm_dist.model import weights
from msm_dist.model.mae import MaskedSpectrogramModel
from msm_dist.model.patches import PatchGrid
from msm_dist.model.published import convert, read_file, statistics_of, write_file
from msm_dist.model.weights import WeightsInfo, from_published, load, read, read_published, save, to_published
from msm_kernels.patch_masking import masking_from_keep
from msm_kernels.reference import select_rows
from tests.published import PAPER, RERUN, TINY, random_state

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


def test_weights_with_a_stretched_table_are_refused_where_they_would_be_computed_with_another(saved, tmp_path):
    folder, model = saved
    stretched = replace(info(model), origin={"positions": "interpolated"})
    save(tmp_path / "run" / "export" / "classifier", model.state_dict(), stretched)
    for path in ("run", "run/export", "run/export/classifier"):
        for reader in (load, read):
            with pytest.raises(CheckpointError, match=r"model.positions=interpolated: .* only .*Tagger has"):
                reader(tmp_path / path)
    assert_equal_states(read(tmp_path / "run/export/classifier", any_positions=True)[0], load(folder)[0].state_dict())


def test_two_programs_that_save_do_not_share_a_temporary_file(saved, tmp_path, monkeypatch):
    names = []

    def fail(tensors, path):
        names.append(path.name)
        path.write_bytes(b"half")
        raise OSError("no space")

    monkeypatch.setattr(weights, "save_file", fail)
    for pid in (11, 12):
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        with pytest.raises(CheckpointError, match="no space"):
            save(tmp_path / "full", saved[1].state_dict(), info(saved[1]))
    assert len(set(names)) == 2
    assert not os.listdir(tmp_path / "full")


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


@pytest.mark.parametrize("generation", [PAPER, RERUN])
@pytest.mark.parametrize("cls_token", [True, False])
@pytest.mark.parametrize(
    ("frames", "patch"), [(208, (16, 16)), (96, (16, 8)), (96, (8, 16)), (304, (80, 4)), (96, (80, 2)), (608, (16, 16))]
)
def test_published_state_comes_back_identical(frames, patch, generation, cls_token):
    state = random_state(frames, patch, generation, TINY, cls_token)
    conversion = convert(state)
    assert (conversion.unused, conversion.missing) == ((), ())
    assert conversion.model.grid == PatchGrid(80, frames, patch)
    assert conversion.model.config.key_bias == (generation == RERUN)
    assert conversion.model.config.decoder_positions == ("1d" if generation == PAPER else "2d")
    back = to_published(conversion.model)
    assert back.keys() == state.keys() - {"norm_stats"}
    assert all(torch.equal(back[name], state[name]) for name in back)


@pytest.mark.parametrize("generation", [PAPER, RERUN])
def test_published_file_comes_back_identical_through_our_files(tmp_path, generation):
    state = random_state(208, (16, 16), generation, TINY)
    model = from_published(state)
    folder = save(tmp_path / "ours", model.state_dict(), WeightsInfo(model.config, FEATURES, 208))
    loaded, _ = load(folder)
    write_file(loaded, -7.1, 4.2, tmp_path / "back.pth")
    back = read_file(tmp_path / "back.pth")
    assert back.beside == ()
    assert back.state.keys() == state.keys() | {"norm_stats"}
    assert all(torch.equal(back.state[name], state[name]) for name in state)
    assert all(back.state[name].dtype == state[name].dtype for name in state)
    content = torch.load(tmp_path / "back.pth", weights_only=True)
    assert content["model"].keys() == state.keys()  # what a strict reader of that generation expects
    assert sorted(os.listdir(tmp_path)) == ["back.pth", "ours"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_statistics_of_a_file_are_read_by_their_digits(dtype):
    stored = torch.tensor([-7.1, 4.2], dtype=dtype)
    mean, std = statistics_of({"norm_stats": stored})
    assert (mean, std) == pytest.approx(stored.tolist(), rel=1e-6)
    if dtype.itemsize >= 4:
        assert (mean, std) == (-7.1, 4.2)
    assert statistics_of({}) is None


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [1.0, -1.0], [float("nan"), 1.0], [1.0, 2.0, 3.0]])
def test_statistics_that_are_none_are_refused(values):
    with pytest.raises(CheckpointError, match="norm_stats is"):
        statistics_of({"norm_stats": torch.tensor(values)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_convert(dtype):
    state = {name: value.to(dtype) for name, value in random_state(208, (16, 16), PAPER, TINY).items()}
    model = from_published(state)
    assert model.encoder.norm.weight.dtype == dtype
    assert torch.equal(model.encoder.norm.weight, state["norm.weight"])


def test_lenient_conversion_leaves_out_what_has_no_place_and_says_all_of_it():
    state = random_state(208, (16, 16), PAPER, TINY)
    state |= {f"head.{number}": torch.zeros(2) for number in range(9)}
    conversion = convert(state, strict=False)
    assert conversion.unused == tuple(f"head.{number}" for number in range(9))
    assert conversion.missing == ()
    assert torch.equal(conversion.model.decoder.mask_token, state["mask_token"])
    with pytest.raises(CheckpointError) as raised:
        convert(state)
    assert all(f"unused   head.{number}" in str(raised.value) for number in range(9))


@pytest.mark.parametrize("lacks", ["decoder_embed.weight", "decoder_norm.bias", "decoder_pos_embed"])
def test_lenient_conversion_takes_a_decoder_whole_or_not_at_all(lacks):
    state = random_state(208, (16, 16), PAPER, TINY)
    del state[lacks]
    with pytest.raises(CheckpointError, match=lacks):
        convert(state)
    conversion = convert(state, strict=False)
    fresh = MaskedSpectrogramModel(conversion.model.config, 80, 208)
    assert_equal_states(conversion.model.decoder.state_dict(), fresh.decoder.state_dict())
    decoder = {name for name in state if name.startswith(("decoder_", "mask_token"))}
    assert set(conversion.unused) == decoder
    if lacks == "decoder_norm.bias":  # else its geometry is not known, and the decoder is one of the usual size
        assert set(conversion.missing) == (decoder | {lacks}) - {"decoder_pos_embed"}
    assert not conversion.has_decoder
    assert torch.equal(conversion.model.encoder.norm.weight, state["norm.weight"])


def test_encoder_that_is_not_whole_is_never_taken():
    state = random_state(208, (16, 16), PAPER, TINY)
    del state["blocks.2.norm1.bias"], state["blocks.3.attn.v_bias"]
    state["norm.weight"] = torch.ones(7)
    with pytest.raises(CheckpointError) as raised:
        convert(state, strict=False)
    for line in (
        "missing  blocks.2.norm1.bias [192]",
        "missing  blocks.3.attn.v_bias [192]",
        "shape    norm.weight [7], expected [192]",
    ):
        assert line in str(raised.value)


def test_weights_that_are_not_finite_are_refused():
    state = random_state(208, (16, 16), PAPER, TINY)
    state["blocks.2.norm1.bias"][3] = float("nan")
    state["norm.bias"] = torch.zeros(192, dtype=torch.int64)
    with pytest.raises(CheckpointError, match="not finite floating-point numbers:\n  blocks.2.norm1.bias\n  norm.bias"):
        convert(state)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    "name", ["patch_embed.proj.weight", "pos_embed", "decoder_pos_embed", "decoder_embed.weight", "norm.weight"]
)
def test_tensors_of_other_kinds_are_refused_whichever_they_are(name, dtype):
    state = random_state(208, (16, 16), PAPER, TINY)
    state[name] = state[name].to(dtype)
    with pytest.raises(CheckpointError, match=name):
        convert(state)


def test_file_of_ours_says_where_its_weights_come_from_and_may_leave_the_decoder_out(tmp_path):
    model = random_model()
    write_file(model, -7.1, 4.2, tmp_path / "p.pth", {"run": "r"}, encoder_only=True)
    file = read_file(tmp_path / "p.pth")
    assert (file.origin, file.beside) == ({"run": "r"}, ())
    assert not [name for name in file.state if name.startswith(("decoder_", "mask_token"))]
    with pytest.raises(CheckpointError, match="decoder_embed.weight is missing; --encoder-only takes the encoder"):
        convert(file.state)
    conversion = convert(file.state, strict=False)
    assert not conversion.has_decoder
    assert_equal_states(conversion.model.encoder.state_dict(), model.encoder.state_dict())


@pytest.mark.parametrize("mark", [3, "{", "[]", '{"origin": 1}', "[" * 5000, {"origin": {}}, torch.ones(2)])
def test_entry_of_another_program_by_our_name_is_no_origin(tmp_path, mark):
    torch.save({"model": to_published(random_model()), "msm_dist": mark}, tmp_path / "p.pth")
    file = read_file(tmp_path / "p.pth")
    assert (file.origin, file.beside) == (None, ("msm_dist",))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("patch_embed.proj.weight", (192, 3, 16, 16), "a model of images is none"),
        ("patch_embed.proj.weight", (192, 256), "one input channel"),
        ("pos_embed", (1, 66, 96), "pos_embed is"),
        ("pos_embed", (66, 192), "pos_embed is"),
        ("pos_embed", (1, 1, 192), "pos_embed is"),
        ("decoder_pos_embed", (1, 65, 96), "decoder_pos_embed is"),
        ("decoder_embed.weight", (7,), "decoder_pos_embed is"),
    ],
)
def test_tensors_of_other_models_are_named(name, shape, message):
    state = random_state(208, (16, 16), PAPER, TINY) | {name: torch.zeros(shape)}
    with pytest.raises(CheckpointError, match=message):
        convert(state)


def as_the_original_arranges(latent, masking, model):
    """What the published decoder does without CLS: the first visible token dropped, the others a place too early."""
    x = model.decoder.embed(latent)
    hidden = model.decoder.mask_token.expand(len(x), masking.ids_masked.shape[1] + 1, -1)
    x = select_rows(torch.cat([x[:, 1:], hidden], dim=1), masking.ids_restore) + model.decoder.positions()
    for block in model.decoder.blocks:
        x = block(x)
    return model.decoder.pred(model.decoder.norm(select_rows(x, masking.ids_masked)))


def test_model_without_cls_says_and_does_not_share_the_originals_flaw():
    conversion = convert(random_state(208, (16, 16), PAPER, TINY, cls_token=False))
    model = conversion.model
    (note,) = conversion.notes
    assert "drops the first visible token and shifts the others" in note
    assert convert(random_state(208, (16, 16), PAPER, TINY, cls_token=False), keeps_places=True).notes == ()
    masking = masking_from_keep(torch.arange(0, 64, 4)[None], 65)
    spectrogram = torch.randn(1, 1, 80, 208, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        latent = model.encoder(spectrogram, masking)
        flawed, ours = as_the_original_arranges(latent, masking, model), model.decoder(latent, masking)
        # A visible token counts where it stands: the first one for ours, in the original for nothing.
        changed = torch.cat([latent[:, :1] + 1, latent[:, 1:]], dim=1)
        assert torch.equal(as_the_original_arranges(changed, masking, model), flawed)
        assert not torch.allclose(model.decoder(changed, masking), ours, atol=1e-2)
    assert (flawed - ours).norm() > 0.01 * ours.norm()
    assert convert(random_state(208, (16, 16), PAPER, TINY)).notes == ()
    assert convert(random_state(208, (16, 16), PAPER, TINY, cls_token=False), encoder_only=True).notes == ()


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_published_file_is_read_without_running_its_code(tmp_path, wrapped):
    model = random_model(key_bias=True)
    state = to_published(model) | {"norm_stats": torch.tensor([-7.1, 4.2])}
    args = argparse.Namespace(model="mae", lr=1e-3)
    torch.save({"model": state, "epoch": 99, "args": args} if wrapped else state, tmp_path / "p.pth")
    assert read_published(tmp_path / "p.pth")["norm_stats"].tolist() == pytest.approx([-7.1, 4.2])
    assert_equal_states(from_published(tmp_path / "p.pth").state_dict(), model.state_dict())
    file = read_file(tmp_path / "p.pth")
    assert (file.beside, file.epoch) == ((("args",), 99) if wrapped else ((), None))


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
        for reader in (read_published, from_published):
            with pytest.raises(CheckpointError, match="without running its code: it calls for .*io.open, ") as raised:
                reader(tmp_path / name)
            assert "weights_only" not in str(raised.value)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no such file$"),
        (b"", "no checkpoint at all"),
        (b"hello", "no checkpoint at all"),
        (pickle.dumps({"model": {}}, protocol=4), "no checkpoint at all"),
        (b"PK\x03\x04" + bytes(100), "no checkpoint at all"),
    ],
)
def test_what_is_no_checkpoint_is_not_called_unsafe(tmp_path, content, says, recwarn):
    if content is not None:
        (tmp_path / "p.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=says) as raised:
        read_published(tmp_path / "p.pth")
    assert "\n" not in str(raised.value)
    assert "weights_only" not in str(raised.value)
    assert not recwarn.list


def test_the_trap_would_spring(tmp_path):
    torch.save({"model": {}, "args": Trap(tmp_path / "sprung")}, tmp_path / "trap.pth")
    torch.load(tmp_path / "trap.pth", weights_only=False)
    assert (tmp_path / "sprung").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_files_are_one_error(tmp_path):
    torch.save({"model": to_published(random_model())}, tmp_path / "p.pth")
    whole = (tmp_path / "p.pth").read_bytes()
    torch.save({"model": {"a": torch.ones(3)}}, tmp_path / "p.pth", _use_new_zipfile_serialization=False)
    old = (tmp_path / "p.pth").read_bytes()
    # Cut off, another kind of file, a pickle's opcodes changed.
    for content in (
        b"",
        whole[:1000],
        whole[:-50],
        b"RIFF" * 99,
        *(old[:n] + b"\x00" + old[n + 1 :] for n in range(150)),
    ):
        (tmp_path / "p.pth").write_bytes(content)
        with pytest.raises(CheckpointError, match="p.pth"):
            from_published(tmp_path / "p.pth")


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
