"""The HEAR common API: what hear-validator and hear-eval-kit rely on, and what they fail to check."""

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from msm_dist.config import Features, Model
from msm_dist.errors import CheckpointError, ConfigError, DataError
from msm_dist.evaluate import hear
from msm_dist.evaluate.encoder import Encoder
from msm_dist.evaluate.normalization import Statistics
from msm_dist.model.mae import MaskedSpectrogramModel
from msm_dist.model.weights import WeightsInfo, save

RATE = 16000
SIZE = 5 * 192
INFO = WeightsInfo(Model(size="tiny"), Features(mean=-6.5, std=3.5), 208)


TWENTY_MINUTES = """
import resource, sys, torch
from msm_dist.evaluate import hear
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = hear.load_model(sys.argv[1])
hear.get_timestamp_embeddings(torch.rand(1, 160000), model)
before = peak()
frames, stamps = hear.get_timestamp_embeddings(torch.rand(1, 20 * 60 * 16000), model)
print(list(frames.shape), stamps[0, -1].item(), peak() - before)
"""


def write_weights(folder, info=INFO):
    model = MaskedSpectrogramModel(info.model, info.features.n_mels, info.crop_frames, seed=3)
    return save(folder, model.state_dict(), info)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("run") / "export")


@pytest.fixture(scope="module")
def model(weights):
    return hear.load_model(str(weights))


def noise(num_clips, seconds, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(num_clips, round(seconds * RATE), generator=generator) - 1


def test_a_model_says_what_hear_asks_of_it(model):
    assert isinstance(model, torch.nn.Module)
    assert model.sample_rate == RATE
    sizes = (model.scene_embedding_size, model.timestamp_embedding_size)
    assert sizes == (SIZE, SIZE)
    assert [type(number) for number in (*sizes, model.sample_rate)] == [int, int, int]


@pytest.mark.parametrize("seconds", [0.01, 1.07, 1.98, 2.0, 2.08, 3.74, 4.0])
def test_scene_embeddings_are_a_float32_vector_per_clip(model, seconds):
    embeddings = hear.get_scene_embeddings(noise(3, seconds), model)
    assert embeddings.shape == (3, SIZE)
    assert embeddings.dtype == torch.float32


@pytest.mark.parametrize(
    ("seconds", "steps"),
    [
        (0.2, 1),
        (1.07, 7),
        (1.98, 12),
        (2.0, 13),
        (2.08, 13),
        (2.09, 13),
        (2.74, 17),
        (4.0, 25),
        (10.0, 63),
        (10.07, 63),
    ],
)
def test_timestamps_are_the_centres_of_time_steps_within_the_audio(model, seconds, steps):
    embeddings, stamps = hear.get_timestamp_embeddings(noise(2, seconds), model)
    assert embeddings.shape == (2, steps, SIZE)
    assert embeddings.dtype == stamps.dtype == torch.float32
    assert stamps.tolist() == 2 * [[75.0 + 160 * step for step in range(steps)]]
    assert stamps.max() <= 1000 * seconds
    # None is missing either: a whole patch more would not fit.
    assert stamps.max() + 160 > 1000 * seconds


def test_a_stamp_is_where_the_sound_is(model):
    """A click changes the vector whose stamp is nearest more than any other's."""
    silence = torch.zeros(1, 2 * RATE)
    quiet, stamps = hear.get_timestamp_embeddings(silence, model)
    for step in (2, 7):
        click = silence.clone()
        middle = round(stamps[0, step].item() * RATE / 1000)
        click[0, middle - 80 : middle + 80] = noise(1, 0.01)[0]
        changed = (hear.get_timestamp_embeddings(click, model)[0] - quiet).norm(dim=-1)
        assert changed.argmax().item() == step


def test_finer_patches_give_finer_timestamps(tmp_path):
    info = replace(INFO, model=Model(size="tiny", patch_size="16x4"))
    model = hear.load_model(write_weights(tmp_path, info))
    _, stamps = hear.get_timestamp_embeddings(noise(1, 1), model)
    assert stamps[0, :3].tolist() == [15.0, 55.0, 95.0]


@pytest.mark.parametrize("num_samples", [1, 200, 1199])
def test_audio_shorter_than_half_a_patch_has_one_stamp_at_its_end(model, num_samples):
    embeddings, stamps = hear.get_timestamp_embeddings(noise(1, num_samples / RATE), model)
    assert embeddings.shape == (1, 1, SIZE)
    assert stamps.item() == pytest.approx(num_samples / 16)


def test_the_stamps_of_twenty_minutes_are_exact(model):
    stamps = model.encoder.timestamps_ms(7500)
    assert (stamps.diff() == 160).all()


def test_a_clip_does_not_depend_on_its_batch(model):
    audio = torch.cat([noise(2, 2.5), torch.zeros(1, 40000), 0.01 * noise(2, 2.5, seed=1)])
    scenes = hear.get_scene_embeddings(audio, model)
    frames, stamps = hear.get_timestamp_embeddings(audio, model)
    for part in (slice(0, 1), slice(1, 4), slice(4, 5)):
        assert torch.allclose(hear.get_scene_embeddings(audio[part], model), scenes[part], atol=1e-5)
        alone, own_stamps = hear.get_timestamp_embeddings(audio[part], model)
        assert torch.allclose(alone, frames[part], atol=1e-5)
        assert torch.equal(own_stamps, stamps[part])
    assert not torch.allclose(scenes[0], scenes[3], atol=1e-2)


def test_a_second_call_gives_the_same_to_the_bit(model):
    audio = noise(2, 2.5)
    model.train()  # the kit never calls eval()
    assert torch.equal(hear.get_scene_embeddings(audio, model), hear.get_scene_embeddings(audio, model))
    once, again = (hear.get_timestamp_embeddings(audio, model) for _ in range(2))
    assert torch.equal(once[0], again[0])


def test_scene_embeddings_are_the_mean_of_all_time_steps(model):
    audio = noise(2, 1.98)
    frames = model.encoder.encode(audio, RATE)
    assert frames.shape[1] == 13
    assert torch.allclose(hear.get_scene_embeddings(audio, model), frames.mean(dim=1), atol=1e-6)


@pytest.mark.parametrize(
    "audio",
    [torch.zeros(2, 24000), torch.ones(2, 24000), torch.full((2, 24000), -1.0), 1e-9 * noise(2, 1.5), noise(2, 1.5)],
    ids=["silence", "constant", "constant below", "nearly silence", "full scale"],
)
def test_embeddings_are_finite(model, audio):
    assert hear.get_scene_embeddings(audio, model).isfinite().all()
    assert hear.get_timestamp_embeddings(audio, model)[0].isfinite().all()


def test_outputs_need_no_gradient_and_leave_the_audio_alone(model):
    audio = noise(2, 1.07)
    before = audio.clone()
    frames, stamps = hear.get_timestamp_embeddings(audio, model)
    assert not (frames.requires_grad or stamps.requires_grad)
    stamps[0] += 1
    assert torch.equal(stamps[1, :1], torch.tensor([75.0]))
    assert torch.equal(audio, before)


def test_weights_load_from_every_place_of_theirs(weights, model, monkeypatch):
    expected = hear.get_scene_embeddings(noise(1, 1), model)
    (weights.parent / "config.yaml").write_text("")
    for place in (weights, str(weights), weights / "model.safetensors", weights.parent):
        assert torch.equal(hear.get_scene_embeddings(noise(1, 1), hear.load_model(place)), expected)
    monkeypatch.setenv(hear.VARIABLE, str(weights))
    for loaded in (hear.load_model(), hear.load_model("")):
        assert torch.equal(hear.get_scene_embeddings(noise(1, 1), loaded), expected)


def test_a_model_computes_where_the_audio_is(weights, monkeypatch):
    model = hear.load_model(weights)
    monkeypatch.setattr(Encoder, "load", None)  # the weights are read once
    assert model.to("cpu") is model
    assert model.encoder_on(torch.device("cpu")) is model.encoder
    assert model.encoder_on(torch.device("meta")).device.type == "meta"


def test_options_reach_the_encoder(weights):
    audio = noise(2, 1.5)
    encoder = Encoder.load(weights)
    layer = hear.load_model(weights, layer=1)
    assert torch.equal(layer(audio), encoder.encode(audio, RATE, layer=1))
    assert hear.get_scene_embeddings(audio, layer).shape == (2, layer.scene_embedding_size)
    other = hear.load_model(weights, normalization="dataset", mean=-5.0, std=2.0)
    assert torch.equal(other(audio), encoder.with_statistics(Statistics(-5.0, 2.0)).encode(audio, RATE))
    batch = hear.load_model(weights, normalization="batch")
    assert torch.equal(batch(audio), Encoder.load(weights, normalization="batch").encode(audio, RATE))
    texts = [repr(model) for model in (layer, other, batch)]
    assert "layer 1" in texts[0] and "normalization dataset" in texts[1] and "normalization batch" in texts[2]


@pytest.mark.gpu
def test_a_gpu_gives_what_the_cpu_gives(weights, model):
    audio = noise(2, 2.5)
    moved = hear.load_model(weights).to("cuda")
    frames, stamps = hear.get_timestamp_embeddings(audio.cuda(), moved)
    scenes = hear.get_scene_embeddings(audio.cuda(), moved)
    assert {found.device.type for found in (frames, stamps, scenes)} == {"cuda"}
    expected, own_stamps = hear.get_timestamp_embeddings(audio, model)
    assert torch.equal(stamps.cpu(), own_stamps)
    for found, own in ((frames, expected), (scenes, hear.get_scene_embeddings(audio, model))):
        assert (found.cpu() - own).norm() < 1e-4 * own.norm()
    back = hear.get_timestamp_embeddings(audio, moved)[0]
    assert torch.equal(back, expected)


def test_options_are_kept_where_the_model_moves(weights):
    model = hear.load_model(weights, normalization="dataset", mean=-5.0, std=2.0)
    assert model.encoder_on(torch.device("meta")).statistics == (-5.0, 2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalization": "dataset"}, "mean = None.*takes both numbers"),
        ({"normalization": "dataset", "mean": -5.0}, "std = None"),
        ({"normalization": "dataset", "mean": -5.0, "std": 0.0}, "above 0"),
        ({"normalization": "dataset", "mean": math.nan, "std": 2.0}, "statistics = .*nan"),
        ({"normalization": "dataset", "mean": -5.0, "std": math.inf}, "statistics = .*inf"),
        ({"normalization": "dataset", "mean": "low", "std": 2.0}, "statistics = .*low"),
        ({"mean": -5.0}, "normalization = checkpoint.*mean = -5"),
        ({"mean": -5.0, "std": 2.0}, "no other takes any"),
        ({"normalization": "corpus"}, "checkpoint, dataset, batch"),
        ({"layer": 13}, "layer = 13: .*0 to 4"),
        ({"layer": "all"}, "layer = 'all'"),
        ({"layer": -1}, "layer = -1"),
        ({"layer": True}, "layer = True"),
        ({"layer": 1.0}, "layer = 1.0"),
        ({"layer": "1"}, "layer = '1'"),
        ({"model_file_path": 3}, "model_file_path = 3"),
        ({"model_file_path": b"runs"}, "model_file_path = b'runs'"),
    ],
)
def test_a_wrong_option_is_an_error(weights, options, message):
    with pytest.raises(ConfigError, match=message):
        hear.load_model(**{"model_file_path": weights} | options)


def test_twenty_minutes_take_little_more_memory_than_the_audio_itself(tmp_path):
    """In a process of its own, since a peak is never forgotten. The log-mel's spectra alone would take 390 MB."""
    small = Model(embed_dim=48, depth=1, num_heads=2, decoder_embed_dim=48, decoder_depth=1, decoder_num_heads=2)
    write_weights(tmp_path, replace(INFO, model=small))
    child = subprocess.run([sys.executable, "-c", TWENTY_MINUTES, str(tmp_path)], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    shape, growth = child.stdout.strip().rsplit(" ", 1)
    assert shape == "[1, 7500, 240] 1199915.0"
    assert int(growth) < 300_000  # KiB; the audio is 75,000, and so is a copy of it


def test_no_weights_named_is_an_error_that_says_how(monkeypatch):
    monkeypatch.delenv(hear.VARIABLE, raising=False)
    for given in ((), ("",), (None,)):
        with pytest.raises(ConfigError, match="--model .* or set MSM_DIST_HEAR_MODEL="):
            hear.load_model(*given)


def test_a_folder_without_weights_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        hear.load_model(tmp_path)


def test_a_rate_that_hear_has_no_audio_in_is_an_error(tmp_path):
    features = Features(sample_rate=24000, mean=-6.5, std=3.5)
    write_weights(tmp_path, replace(INFO, features=features))
    with pytest.raises(ConfigError, match="sample_rate = 24000.*16000"):
        hear.load_model(tmp_path)


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (torch.zeros(RATE), "waveform"),
        (torch.zeros(1, RATE).short(), "int16"),
        (torch.full((1, RATE), math.nan), "NaN"),
    ],
)
def test_audio_that_can_not_be_embedded_is_an_error(model, audio, message):
    for function in (hear.get_scene_embeddings, hear.get_timestamp_embeddings):
        with pytest.raises(DataError, match=message):
            function(audio, model)


def test_the_api_embeds_as_the_encoder_does(weights, model):
    audio = noise(1, 3)
    assert torch.equal(hear.get_scene_embeddings(audio, model), Encoder.load(weights).embed(audio, RATE))
