"""Embeddings of audio of any length: shapes, chunks, and nothing taken from a neighbour."""

import math
from dataclasses import replace

import pytest
import torch

from msm_dist.config import Features, Model
from msm_dist.errors import CheckpointError, DataError
from msm_dist.evaluate.encoder import Encoder
from msm_dist.features import LogMel, normalize
from msm_dist.model.mae import MaskedSpectrogramModel
from msm_dist.model.weights import WeightsInfo, save

RATE = 16000
WIDTH = 192
INFO = WeightsInfo(Model(size="tiny"), Features(mean=-6.5, std=3.5), 208)


def noise(num_clips, num_samples, seed=0):
    return 0.1 * torch.randn(num_clips, num_samples, generator=torch.Generator().manual_seed(seed))


def model_of(info):
    return MaskedSpectrogramModel(info.model, 80, info.crop_frames, seed=3)


@pytest.fixture(scope="module")
def encoder():
    return Encoder(model_of(INFO), INFO)


@pytest.mark.parametrize(
    ("crop_frames", "patch_size", "steps", "rows"),
    [(208, "16x16", 63, 5), (512, "16x16", 63, 5), (208, "16x4", 250, 5), (208, "80x4", 250, 1)],
)
def test_ten_seconds_give_a_vector_per_patch_width(crop_frames, patch_size, steps, rows):
    info = replace(INFO, model=Model(size="tiny", patch_size=patch_size), crop_frames=crop_frames)
    encoder = Encoder(model_of(info), info)
    waveform = noise(1, 10 * RATE)
    frames = encoder.encode(waveform, RATE)
    assert frames.shape == (1, steps, rows * WIDTH)
    assert frames.dtype == torch.float32
    assert encoder.embedding_size == rows * WIDTH
    assert torch.allclose(encoder.embed(waveform, RATE), frames.mean(dim=1))


@pytest.mark.parametrize(
    ("num_samples", "steps"),
    [(1, 1), (200, 1), (2560, 1), (2561, 2), (33120, 13), (33280, 13), (33281, 14), (66560, 26), (66561, 27)],
)
def test_no_time_step_is_padding_alone(encoder, num_samples, steps):
    assert encoder.encode(noise(1, num_samples), RATE).shape[1] == steps


def test_a_time_step_is_its_patches_from_low_to_high_frequency(encoder):
    waveform = noise(2, 33120)
    model = model_of(INFO)
    spectrogram = normalize(LogMel(INFO.features)(waveform, centred=True), -6.5, 3.5)
    with torch.no_grad():
        tokens = model.encoder(spectrogram)[:, 1:]  # without CLS
    frames = encoder.encode(waveform, RATE)
    for f, t in ((0, 0), (1, 0), (4, 12), (2, 7)):
        vector = frames[:, t, f * WIDTH : (f + 1) * WIDTH]
        assert torch.allclose(vector, tokens[:, f * 13 + t], atol=1e-5)


def test_a_short_clip_runs_at_its_own_length(encoder):
    waveform = noise(1, RATE)
    padded = torch.nn.functional.pad(waveform, (0, 160 * 111 - RATE))
    spectrogram = normalize(LogMel(INFO.features)(padded, centred=True), -6.5, 3.5)
    assert spectrogram.shape[-1] == 112
    with torch.no_grad():
        tokens = model_of(INFO).encoder(spectrogram)[:, 1:]
    expected = tokens.view(1, 5, 7, WIDTH).transpose(1, 2).flatten(2)
    assert torch.allclose(encoder.encode(waveform, RATE), expected, atol=1e-5)


def test_an_embedding_does_not_depend_on_its_neighbours(encoder):
    clip = noise(1, RATE)
    neighbours = torch.cat([5 * noise(3, RATE, seed=1), torch.zeros(1, RATE)])
    together = encoder.embed(torch.cat([neighbours[:2], clip, neighbours[2:]]), RATE)
    assert torch.allclose(together[2:3], encoder.embed(clip, RATE), atol=1e-5)
    assert not torch.allclose(together[0], together[2], atol=1e-2)


def test_a_chunk_sees_nothing_of_later_ones(encoder):
    waveform = noise(1, 5 * RATE)
    other = waveform.clone()
    other[:, 36000:] = 0.5
    frames, changed = encoder.encode(waveform, RATE), encoder.encode(other, RATE)
    assert torch.allclose(frames[:, :13], changed[:, :13], atol=1e-6)
    assert not torch.allclose(frames[:, 13:], changed[:, 13:], atol=1e-2)


def test_a_probe_can_be_trained_on_embeddings(encoder):
    probe = torch.nn.Linear(encoder.embedding_size, 2)
    probe(encoder.encode(noise(2, 3200), RATE)).sum().backward()
    assert probe.weight.grad.abs().sum() > 0


def test_other_sample_rates_are_resampled(encoder):
    def tone(rate):
        return 0.3 * torch.sin(2 * math.pi * 700 * torch.arange(rate) / rate)[None]

    expected = encoder.embed(tone(RATE), RATE)
    assert torch.nn.functional.cosine_similarity(encoder.embed(tone(48000), 48000), expected) > 0.999


def test_timestamps_are_the_centres_of_the_time_steps(encoder):
    assert encoder.timestamps_ms(3).tolist() == [75.0, 235.0, 395.0]


def test_weights_load_from_a_run_or_from_its_export(tmp_path, encoder):
    waveform = noise(1, RATE)
    save(tmp_path / "run" / "export", model_of(INFO).state_dict(), INFO)
    (tmp_path / "run" / "config.yaml").write_text("")
    for folder in ("run", "run/export"):
        loaded = Encoder.load(tmp_path / folder)
        assert torch.equal(loaded.embed(waveform, RATE), encoder.embed(waveform, RATE))


def test_a_run_that_has_not_finished_is_named(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(CheckpointError, match="without exported weights"):
        Encoder.load(tmp_path)


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        Encoder.load(tmp_path)


@pytest.mark.parametrize(
    ("waveform", "rate", "message"),
    [
        (torch.zeros(16000), RATE, r"waveform\[None\]"),
        (torch.zeros(1, 16000, dtype=torch.int16), RATE, "32768"),
        (torch.zeros(1, 0), RATE, "at least one"),
        (torch.full((1, 16000), math.nan), RATE, "NaN"),
        (torch.zeros(1, 16000), 0, "sample_rate"),
    ],
)
def test_a_waveform_that_can_not_be_embedded_is_an_error(encoder, waveform, rate, message):
    with pytest.raises(DataError, match=message):
        encoder.encode(waveform, rate)
