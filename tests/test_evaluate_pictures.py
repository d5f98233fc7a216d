"""Pictures of a trained model, judged by their values: reconstructions, attention, maps of embeddings."""

import csv
import sys
from dataclasses import replace

import matplotlib.image
import numpy as np
import pytest
import soundfile
import torch
from typer.main import get_command

from msm_dist.cli import app
from msm_dist.config import Features, Model
from msm_dist.data import audio
from msm_dist.errors import CheckpointError, ConfigError, DataError
from msm_dist.evaluate import attention_maps as attention
from msm_dist.evaluate import embedding_map, pictures, reconstruction
from msm_dist.evaluate.encoder import Encoder
from msm_dist.evaluate.pictures import read_crops, write_named, write_png
from msm_dist.evaluate.recordings import read_audio
from msm_dist.features import LogMel, normalize
from msm_dist.model.mae import MaskedSpectrogramModel
from msm_dist.model.weights import WeightsInfo, save
from msm_kernels.patch_masking import masking_from_keep
from msm_kernels.reference import patchify
from tests.test_tasks import write_shard

RATE = 16000
MODEL = Model(
    embed_dim=32, depth=2, num_heads=4, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2, patch_size="16x8"
)
INFO = WeightsInfo(MODEL, Features(mean=-7.0, std=4.0), 96)
GREY = 128


def reconstruct(*arguments, **options):
    return "\n".join(reconstruction.reconstruct_files(*arguments, **options))


def look(*arguments, **options):
    return "\n".join(attention.attention_files(*arguments, **options))


@pytest.fixture(scope="module")
def model():
    model = MaskedSpectrogramModel(MODEL, 80, 96, seed=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def folder(tmp_path, model):
    """Weights in a folder."""
    return save(tmp_path / "weights", model.state_dict(), INFO)


def write_sound(path, seconds=2.5, seed=0, rate=RATE):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    tone = 0.3 * np.sin(2 * np.pi * (300 + 100 * seed + 200 * time) * time)
    soundfile.write(path, tone + 0.02 * rng.standard_normal(time.size), rate, subtype="FLOAT")
    return path


@pytest.fixture
def sound(tmp_path):
    return write_sound(tmp_path / "dog.wav")


def whole_logmel(path):
    waveform = torch.from_numpy(soundfile.read(path, dtype="float32")[0])[None]
    return normalize(LogMel(INFO.features)(waveform, centred=True)[0], -7.0, 4.0)


@pytest.mark.parametrize(
    ("start", "num_crops", "first", "count"),
    [(0.0, 1, 0, 1), (0.0, 9, 0, 3), (1.0, 1, 100, 1), (1.234, 2, 123, 2), (2.49, 3, 249, 1)],
)
def test_crops_are_slices_of_the_whole_recordings_log_mel(sound, start, num_crops, first, count):
    crops = read_crops(sound, INFO, start, num_crops)
    assert crops.spectrogram.shape == (count, 1, 80, 96)
    assert crops.start_seconds == pytest.approx(first / 100)
    assert crops.num_frames == min(250 - first, count * 96)
    joined = torch.cat(list(crops.spectrogram), dim=-1)
    compared = max(
        0, min(crops.num_frames, 248 - first)
    )  # the last windows reach past the end, where here silence follows
    assert torch.equal(joined[..., :compared], whole_logmel(sound)[..., first : first + compared])
    silence = (np.log(1.1920929e-7) + 7.0) / 4.0
    rest = joined[..., crops.num_frames + 2 :]
    assert torch.allclose(rest, torch.full_like(rest, silence), atol=1e-5)


@pytest.mark.parametrize("rate", [RATE, 44100])
def test_one_crop_of_a_recording_too_long_to_be_decoded_at_once(tmp_path, monkeypatch, rate):
    path = write_sound(tmp_path / "long.wav", 90.0, rate=rate)
    waveform = torch.from_numpy(read_audio(path, RATE)[0])[None]
    whole = normalize(LogMel(INFO.features)(waveform, centred=True)[0], -7.0, 4.0)
    monkeypatch.setattr(audio, "MAX_SAMPLES", 2**20)
    with pytest.raises(DataError, match="decoded at once"):
        read_audio(path, RATE)
    sizes = []
    monkeypatch.setattr(
        pictures.torch, "from_numpy", lambda samples: (sizes.append(len(samples)), torch.as_tensor(samples))[1]
    )
    for start in (0.0, 71.5, 88.5):
        crops = read_crops(path, INFO, start)
        first = round(start * 100)
        assert torch.allclose(crops.spectrogram[0], whole[..., first : first + 96], atol=1e-4)
    assert max(sizes) < 2 * RATE
    with pytest.raises(DataError, match=r"ends after 90.00 s"):
        read_crops(path, INFO, 90.0)


def test_broken_file_keeps_nothing_back_of_the_files_before_it(folder, sound, tmp_path):
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    for call, name in ((reconstruction.reconstruct_files, "dog.png"), (attention.attention_files, "dog.attention.png")):
        said = []
        with pytest.raises(DataError, match="broken.wav"):
            for report in call(folder, [sound, tmp_path / "broken.wav"], tmp_path / "out"):
                said.append(report)
        assert len(said) == 1 and name in said[0]
        assert (tmp_path / "out" / name).is_file()


def test_place_past_the_end_is_an_error(sound):
    with pytest.raises(DataError, match=r"--start 2.5: .*dog.wav ends after 2.50 s"):
        read_crops(sound, INFO, 2.5)


def test_nothing_is_written_over_but_what_is_equal(tmp_path):
    out = tmp_path / "new" / "out"
    calls = [("a", b"1"), ("a", b"2"), ("a", b"1"), ("a", b"2"), ("a", b"3"), ("a-2", b"4"), ("b", b"1")]
    names = [write_named(out, stem, {".x": content, ".y": b"all"}, set()).name for stem, content in calls]
    assert names == ["a", "a-2", "a", "a-2", "a-3", "a-2-2", "b"]
    (out / "c.y").write_bytes(b"other")  # of two files one is enough
    assert write_named(out, "c", {".x": b"1", ".y": b"all"}, set()).name == "c-2"
    (out / "d.x").write_bytes(b"1")  # begun before
    assert write_named(out, "d", {".x": b"1", ".y": b"all"}, set()).name == "d"
    assert (out / "a.x").read_bytes() == b"1" and (out / "d.y").read_bytes() == b"all"
    taken = set()
    assert [write_named(out, "e", {".x": b"1"}, taken).name for _ in range(2)] == ["e", "e-2"]


def test_calls_with_other_settings_keep_the_pictures_of_earlier_ones(folder, sound, tmp_path):
    for seed in (0, 1, 0):
        assert ("dog-2.png" in reconstruct(folder, [sound], tmp_path / "out", seed=seed)) == (seed == 1)
        assert ("dog-2.att" in look(folder, [sound], tmp_path / "out", head=1 + seed)) == (seed == 1)
    files = contents(tmp_path / "out")
    assert len(files) == 10
    for kind in ("png", "attention.png", "masked.wav"):
        assert files[f"dog.{kind}"] != files[f"dog-2.{kind}"]


@pytest.fixture
def made(model, sound):
    return reconstruction.reconstructions(model, INFO, read_crops(sound, INFO, 0, 3).spectrogram, 0.7, seed=5)


def test_visible_cells_are_the_original_and_the_loss_is_that_of_the_hidden_ones(made):
    assert [one.start_seconds for one in made] == pytest.approx([0, 0.96, 1.92])
    for one in made:
        assert one.hidden.sum() == one.num_masked * 16 * 8 == (60 - int(60 * (1 - 0.7))) * 128
        assert torch.equal(one.rebuilt[~one.hidden], one.original[~one.hidden])
        assert not torch.isclose(one.rebuilt[one.hidden], one.original[one.hidden]).all()
        assert one.loss == pytest.approx((one.rebuilt - one.original)[one.hidden].square().mean().item(), rel=1e-5)
        assert one.references["corpus mean"] == pytest.approx(one.original[one.hidden].square().mean().item(), rel=1e-5)
    assert not torch.equal(made[0].hidden, made[1].hidden)


def test_reference_of_visible_means_is_computed_per_band(made):
    one = made[0]
    guess = torch.zeros(80, 1)
    for band in range(80):
        if (~one.hidden[band]).any():
            guess[band] = one.original[band][~one.hidden[band]].mean()
    expected = (guess - one.original)[one.hidden].square().mean().item()
    assert one.references["visible mean per band"] == pytest.approx(expected, rel=1e-5)


def test_masks_are_a_function_of_the_seed(model, made, sound):
    crops = read_crops(sound, INFO, 0, 3).spectrogram
    again = reconstruction.reconstructions(model, INFO, crops, 0.7, seed=5)
    other = reconstruction.reconstructions(model, INFO, crops, 0.7, seed=6)
    for one, same, different in zip(made, again, other, strict=True):
        assert torch.equal(one.rebuilt, same.rebuilt)
        assert not torch.equal(one.hidden, different.hidden)


def test_normalised_targets_are_measured_and_drawn_on_their_own_scales(sound):
    config = MODEL.model_copy(update={"normalize_targets": True})
    info = replace(INFO, model=config)
    model = MaskedSpectrogramModel(config, 80, 96, seed=3)
    crop = read_crops(sound, INFO).spectrogram
    (one,) = reconstruction.reconstructions(model, info, crop, 0.75)
    # A constant predicts nothing of a patch that is normalised: its error is the variance of the target, 127 / 128.
    assert one.references["corpus mean"] == pytest.approx(127 / 128, abs=1e-3)
    patches, rebuilt = (patchify(part[None, None], (16, 8))[0] for part in (one.original, one.rebuilt))
    hidden = patchify(one.hidden[None, None].float(), (16, 8))[0].bool()[:, 0]
    variance, mean = torch.var_mean(patches[hidden], dim=-1, keepdim=True)
    prediction = (rebuilt[hidden] - mean) / (variance + 1e-6).sqrt()
    target = (patches[hidden] - mean) / (variance + 1e-6).sqrt()
    assert one.loss == pytest.approx((prediction - target).square().mean().item(), rel=1e-3)


def test_panels_hold_original_masked_reconstruction_and_error(made):
    figure = reconstruction.draw(made, INFO, "dog.wav")
    panels = [axes for axes in figure.axes if axes.images and axes.get_xlabel() == "seconds"]
    assert len(panels) == 12
    for number, one in enumerate(made):
        original, masked, rebuilt, error = (axes.images[0].get_array() for axes in panels[4 * number : 4 * number + 4])
        assert np.allclose(original, one.original * 4 - 7, atol=1e-5)
        assert np.array_equal(masked.mask, one.hidden.numpy())
        assert np.allclose(rebuilt, one.rebuilt * 4 - 7, atol=1e-5)
        assert (error[~one.hidden.numpy()] == 0).all()
        assert np.allclose(error, (one.rebuilt - one.original).abs() * 4, atol=1e-5)
        assert [axes.images[0].get_extent()[:2] for axes in panels[4 * number : 4 * number + 4]] == [
            pytest.approx((0.96 * number, 0.96 * number + 0.96))
        ] * 4
        assert all(axes.images[0].origin == "lower" for axes in panels)
    assert "reconstruction, loss" in panels[2].get_title()


def test_png_shows_hidden_cells_grey_and_needs_no_global_state(made, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it fails
    write_png(reconstruction.draw(made[:1], INFO, "dog"), tmp_path / "a.png")
    write_png(reconstruction.draw(made[:1], INFO, "dog"), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    pixels = (matplotlib.image.imread(tmp_path / "a.png")[..., :3] * 255).round()
    grey = (np.abs(pixels - GREY) <= 1).all(axis=-1)
    columns = np.flatnonzero(grey.mean(axis=0) > 0.3)  # more than the edges of letters
    width = pixels.shape[1]
    assert len(columns) > 0.1 * width
    assert columns.min() > 0.2 * width and columns.max() < 0.5 * width  # the second of four panels, alone


def test_sounds_share_a_scale_and_hidden_parts_are_silent_in_the_masked_one(made):
    perfect = [replace(one, rebuilt=one.original) for one in made]
    found = reconstruction.sounds(perfect, INFO)
    assert list(found) == ["original", "masked", "reconstruction"]
    assert torch.equal(found["original"], found["reconstruction"])
    assert max(sound.abs().max().item() for sound in found.values()) == pytest.approx(0.9, rel=1e-4)
    assert len(found["original"]) == 160 * (3 * 96 - 1)
    assert found["masked"].square().mean() < 0.7 * found["original"].square().mean()
    nothing = [replace(one, hidden=torch.ones_like(one.hidden)) for one in made]
    assert reconstruction.sounds(nothing, INFO)["masked"].abs().max() < 0.05


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_equal_calls_write_equal_files_and_say_the_loss(folder, sound, tmp_path):
    first = reconstruct(folder, [sound, sound], tmp_path / "a", 1.0)
    second = reconstruct(folder, [sound], tmp_path / "b", 1.0)
    files = contents(tmp_path / "a")
    kinds = ("png", "original.wav", "masked.wav", "reconstruction.wav")
    assert set(files) == {f"dog{number}.{kind}" for number in ("", "-2") for kind in kinds}
    assert contents(tmp_path / "b") == {f"dog.{kind}": files[f"dog.{kind}"] for kind in kinds}
    assert all(files[f"dog.{kind}"] == files[f"dog-2.{kind}"] for kind in kinds)
    assert first.count("from 1.00 s: loss ") == 2
    assert "on 45 masked patches; without a model: corpus mean " in second
    waveform, rate = soundfile.read(tmp_path / "a" / "dog.original.wav")
    assert (rate, waveform.shape) == (RATE, (160 * 95,))
    reconstruct(folder, [sound], tmp_path / "c", 1.0, seed=1)
    assert contents(tmp_path / "c")["dog.png"] != files["dog.png"]


def test_wrong_uses_are_one_error_and_leave_nothing(folder, sound, tmp_path, model):
    out = tmp_path / "out"
    for ratio in (0.0, 0.999, 1.5):
        with pytest.raises(ConfigError, match="--mask-ratio"):
            reconstruct(folder, [sound], out, mask_ratio=ratio)
    with pytest.raises(DataError, match="nowhere.wav"):
        reconstruct(folder, [tmp_path / "nowhere.wav"], out)
    alone = save(tmp_path / "alone", model.state_dict(), replace(INFO, origin={"untrained": ["decoder"]}))
    with pytest.raises(CheckpointError, match="decoder is not trained"):
        reconstruct(alone, [sound], out)
    assert not out.exists()


def test_missing_package_is_named_with_its_extra(folder, sound, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for call in (
        lambda: reconstruct(folder, [sound], tmp_path / "out"),
        lambda: look(folder, [sound], tmp_path / "out"),
        lambda: embedding_map.draw_map(folder, str(tmp_path), tmp_path / "map.png"),
    ):
        with pytest.raises(ConfigError, match=r"pip install 'msm-dist\[eval\]'"):
            call()


@pytest.mark.parametrize("cls_token", [True, False])
def test_attention_weights_sum_to_one_and_give_the_blocks_output(sound, cls_token):
    config = MODEL.model_copy(update={"cls_token": cls_token})
    encoder = MaskedSpectrogramModel(config, 80, 96, seed=3).encoder
    crops = read_crops(sound, INFO, 0, 2).spectrogram
    maps = attention.attention_maps(encoder, crops)
    tokens = 60 + cls_token
    assert maps.shape == (2, 2, 4, tokens, tokens)
    assert torch.allclose(maps.sum(dim=-1), torch.ones(2, 2, 4, tokens), atol=1e-5)
    outputs = []
    hooks = [b.register_forward_hook(lambda b, given, _: outputs.append((b, given[0]))) for b in encoder.blocks]
    with torch.no_grad():
        encoder(crops)
        for number, (block, x) in enumerate(outputs):
            normed = block.norm1(x)
            values = block.attn.qkv(normed)[..., 64:].unflatten(2, (4, 8)).transpose(1, 2)
            rebuilt = block.attn.proj((maps[number] @ values).transpose(1, 2).flatten(2))
            assert torch.allclose(rebuilt, block.attn(normed), atol=1e-5)
    for hook in hooks:
        hook.remove()
    assert not any(block._forward_pre_hooks for block in encoder.blocks)


def test_query_picks_its_row_of_the_map():
    maps = torch.rand(2, 3, 31, 31)
    shape = (5, 6)
    assert torch.equal(attention.from_query(maps, "cls", 1, shape), maps[:, :, 0, 1:].unflatten(-1, shape))
    assert torch.equal(attention.from_query(maps, "2,4", 1, shape), maps[:, :, 17, 1:].unflatten(-1, shape))
    assert torch.allclose(attention.from_query(maps, "mean", 1, shape), maps[:, :, 1:, 1:].mean(2).unflatten(-1, shape))
    without = maps[..., 1:, 1:]
    assert torch.equal(attention.from_query(without, "0,5", 0, shape), without[:, :, 5].unflatten(-1, shape))
    with pytest.raises(ConfigError, match="no CLS token"):
        attention.from_query(without, "cls", 0, shape)
    for query in ("5,0", "0,6", "-1,0", "here"):
        with pytest.raises(ConfigError, match=f"--query {query}"):
            attention.from_query(maps, query, 1, shape)


@pytest.mark.parametrize(("layer", "head", "panels"), [("last", None, 4), ("1", 3, 1), ("all", None, 8), ("all", 2, 2)])
def test_attention_is_drawn_over_the_spectrogram(folder, sound, tmp_path, monkeypatch, layer, head, panels):
    figures = []
    monkeypatch.setattr(attention, "png_bytes", lambda figure: figures.append(figure) or b"")
    said = look(folder, [sound], tmp_path, layer, head, query="1,2")
    (figure,) = figures
    assert (tmp_path / "dog.attention.png").is_file()
    assert "patch 1,2" in said
    crop = read_crops(sound, INFO).spectrogram
    maps = attention.attention_maps(Encoder.load(folder)._encoder, crop)[:, 0]
    layers = {"last": [1], "1": [0], "all": [0, 1]}[layer]
    heads = range(4) if head is None else [head - 1]
    expected = [maps[a, b, 1 + 1 * 12 + 2, 1:].view(5, 12) for a in layers for b in heads]
    top, *rest = figure.axes
    assert np.array_equal(top.images[0].get_array(), crop[0, 0].numpy())
    assert len(rest) == panels
    for axes, weights in zip(rest, expected, strict=True):
        assert np.array_equal(axes.images[0].get_array(), crop[0, 0].numpy())
        assert np.allclose(axes.images[1].get_array(), weights, atol=1e-6)
        assert axes.images[0].get_extent() == axes.images[1].get_extent()
        (mark,) = axes.patches
        assert (mark.get_x(), mark.get_y()) == pytest.approx((0.16, 16))


def test_short_recording_is_looked_at_in_its_own_length(folder, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(attention, "png_bytes", lambda figure: figures.append(figure) or b"")
    look(folder, [write_sound(tmp_path / "short.wav", 0.2)], tmp_path)
    (figure,) = figures
    assert figure.axes[0].images[0].get_array().shape == (80, 24)
    assert figure.axes[1].images[1].get_array().shape == (5, 3)


@pytest.mark.parametrize(
    ("options", "message"), [({"layer": "3"}, "--layer 3"), ({"layer": "x"}, "--layer x"), ({"head": 5}, "--head 5")]
)
def test_layers_and_heads_that_are_not_there_are_named(folder, sound, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        look(folder, [sound], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_components_are_those_of_the_covariance():
    vectors = torch.randn(40, 7, generator=torch.Generator().manual_seed(2)) * torch.tensor([5, 3, 1, 1, 1, 1, 1.0])
    points, shares = embedding_map.principal_components(vectors + 100)
    covariance = np.cov(vectors.double().numpy().T)
    values, loadings = np.linalg.eigh(covariance)
    assert shares == pytest.approx(values[::-1][:2] / values.sum(), rel=1e-5)
    centred = vectors.double().numpy() - vectors.double().numpy().mean(axis=0)
    for number in range(2):
        loading = loadings[:, -1 - number]
        loading = loading * np.sign(loading[np.abs(loading).argmax()])
        assert np.allclose(points[:, number], centred @ loading, atol=1e-3)


def test_equal_embeddings_have_a_map_too():
    points, shares = embedding_map.principal_components(torch.ones(3, 5))
    assert (points == 0).all()
    assert (shares == 0).all()


@pytest.fixture
def sounds_folder(tmp_path):
    for number in range(6):
        write_sound(tmp_path / "sounds" / ("high" if number % 2 else "low") / f"{number}.wav", 0.5, 10 * (number % 2))
    return tmp_path / "sounds"


def test_map_of_a_folder_has_a_colour_per_label_and_the_coordinates(folder, sounds_folder, tmp_path, monkeypatch):
    figures = []
    write = embedding_map.write_png
    monkeypatch.setattr(embedding_map, "write_png", lambda figure, path: (figures.append(figure), write(figure, path)))
    (sounds_folder / "low" / "broken.wav").write_bytes(b"RIFF")
    said = embedding_map.draw_map(folder, str(sounds_folder), tmp_path / "map.png")
    with (tmp_path / "map.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["file"], row["label"]) for row in rows] == [
        *((f"high/{n}.wav", "high") for n in (1, 3, 5)),
        *((f"low/{n}.wav", "low") for n in (0, 2, 4)),
    ]
    encoder = Encoder.load(folder)
    waveforms = [soundfile.read(sounds_folder / row["file"], dtype="float32")[0] for row in rows]
    vectors = torch.stack([encoder.embed(torch.from_numpy(w)[None], RATE)[0] for w in waveforms])
    points, shares = embedding_map.principal_components(vectors)
    written = np.array([[float(row["component_1"]), float(row["component_2"])] for row in rows])
    assert np.allclose(written, points, rtol=1e-4, atol=1e-6)
    assert f"6 recordings, 2 labels; the axes hold {shares[0]:.1%} and {shares[1]:.1%}" in said
    assert "left out     1, such as" in said and "broken.wav" in said
    (figure,) = figures
    (axes,) = figure.axes
    assert [points.get_label() for points in axes.collections] == ["high", "low"]
    assert np.allclose(axes.collections[0].get_offsets(), points[:3])
    assert f"{shares[0]:.1%} of the variance" in axes.get_xlabel()
    assert matplotlib.image.imread(tmp_path / "map.png").ndim == 3


def test_map_of_a_task_takes_its_labels(folder, sounds_folder, tmp_path):
    lines = [
        f"{n % 2 and 'high' or 'low'}/{n}.wav,{'a' if n < 3 else 'b'},{'train' if n < 4 else 'test'}" for n in range(6)
    ]
    (sounds_folder / "task.csv").write_text("\n".join(["file,label,split", *lines]) + "\n")
    embedding_map.draw_map(folder, str(sounds_folder / "task.csv"), tmp_path / "map.png")
    rows = list(csv.DictReader((tmp_path / "map.csv").read_text().splitlines()))
    assert [row["label"] for row in rows] == ["a", "a", "a", "b", "b", "b"]


def test_map_of_a_csv_takes_its_audio_from_elsewhere(folder, sounds_folder, tmp_path):
    lines = [f"{n % 2 and 'high' or 'low'}/{n}.wav,{'ab'[n % 2]},{'train' if n < 4 else 'test'}" for n in range(6)]
    table = tmp_path / "tables" / "task.csv"
    table.parent.mkdir()
    table.write_text("\n".join(["file,label,split", *lines]) + "\n")
    with pytest.raises(DataError, match="with --audio"):
        embedding_map.draw_map(folder, str(table), tmp_path / "map.png")
    call = get_command(app).main
    call(
        ["map", str(folder), str(table), "--out", str(tmp_path / "map.png"), "--audio", str(sounds_folder)],
        standalone_mode=False,
    )
    rows = list(csv.DictReader((tmp_path / "map.csv").read_text().splitlines()))
    assert [row["label"] for row in rows] == list("ababab")
    with pytest.raises(DataError, match=r"--audio .*: is for the files of a .csv"):
        embedding_map.find_recordings(str(sounds_folder), RATE, sounds_folder)


def test_map_of_shards_takes_each_labelled_clip_once(folder, tmp_path):
    shards = tmp_path / "shards"
    write_shard(shards, [["a"], ["b"], None, ["a"], ["b"]])
    recordings = embedding_map.find_recordings(str(shards), RATE)
    assert sorted(recording.label for recording in recordings) == ["a", "a", "b", "b"]
    said = embedding_map.draw_map(folder, str(shards), tmp_path / "map.png")
    assert "4 recordings, 2 labels" in said
    write_shard(tmp_path / "bare", [None, []])
    with pytest.raises(DataError, match="none of its 2 clips has labels"):
        embedding_map.find_recordings(str(tmp_path / "bare"), RATE)


def test_what_is_no_data_is_told_what_a_map_takes(sound, tmp_path):
    for data in (sound, tmp_path / "nowhere"):
        with pytest.raises(DataError, match="must be a folder with a subfolder for each label") as raised:
            embedding_map.find_recordings(str(data), RATE)
        assert "--test" not in str(raised.value)


def test_folders_that_make_no_map_are_named(folder, sounds_folder, tmp_path):
    out = tmp_path / "map.png"
    with pytest.raises(ConfigError, match="must end in .png"):
        embedding_map.draw_map(folder, str(sounds_folder), tmp_path / "map.csv")
    with pytest.raises(DataError, match="a map needs two or more"):
        write_sound(tmp_path / "one" / "a" / "x.wav", 0.2)
        embedding_map.draw_map(folder, str(tmp_path / "one"), out)
    write_sound(sounds_folder / "loose.wav", 0.2)
    with pytest.raises(DataError, match="loose.wav, lie in no subfolder"):
        embedding_map.draw_map(folder, str(sounds_folder), out)
    with pytest.raises(DataError, match="nowhere"):
        embedding_map.draw_map(folder, str(tmp_path / "nowhere"), out)
    assert not out.exists()


def test_masking_of_one_crop_is_what_the_model_was_given(model, sound):
    crop = read_crops(sound, INFO).spectrogram
    (one,) = reconstruction.reconstructions(model, INFO, crop, 0.75, seed=2)
    kept = (~patchify(one.hidden[None, None].float(), (16, 8))[0].bool()[:, 0]).nonzero()[:, 0]
    with torch.no_grad():
        output = model(crop, masking=masking_from_keep(kept[None], 60))
    assert output.loss.item() == one.loss
