"""Pictures and sounds of a reconstruction."""

import math

import matplotlib.image
import pytest
import torch

from msm_dist.config import Features
from msm_dist.features import LogMel, normalize
from msm_dist.pictures import (
    GAP_PIXELS,
    MASKED_GREY,
    PIXELS_PER_CELL,
    draw,
    invert_logmel,
    make_picture,
    reconstruct,
    stack,
    write_png,
)
from msm_kernels.patch_masking import masking_from_keep
from msm_kernels.reference import patchify, select_rows

FEATURES = Features(mean=-7.1, std=4.2)
PATCH = (16, 16)


@pytest.fixture(scope="module")
def logmel():
    """Log-mel [1, 80, 208] of a 1 kHz tone in noise."""
    seconds = torch.arange(FEATURES.crop_samples(208)) / FEATURES.sample_rate
    noise = torch.randn(len(seconds), generator=torch.Generator().manual_seed(1))
    return LogMel(FEATURES)((0.3 * torch.sin(2 * math.pi * 1000 * seconds) + 0.001 * noise)[None])[0]


@pytest.fixture(scope="module")
def spectrogram(logmel):
    return normalize(logmel, FEATURES.mean, FEATURES.std)


@pytest.fixture(scope="module")
def masking():
    return masking_from_keep(torch.tensor([[0, 7, 20, 33, 64]]), 65)


def masked_patches(spectrogram, masking):
    return select_rows(patchify(spectrogram[None], PATCH), masking.ids_masked)[0]


def test_a_perfect_prediction_reconstructs_the_input(spectrogram, masking):
    target = masked_patches(spectrogram, masking)
    assert torch.equal(reconstruct(spectrogram, masking, target, PATCH, False), spectrogram)


def test_visible_patches_are_the_input_and_masked_ones_the_prediction(spectrogram, masking):
    rebuilt = reconstruct(spectrogram, masking, torch.full((60, 256), 9.0), PATCH, False)
    patches, original = patchify(rebuilt[None], PATCH)[0], patchify(spectrogram[None], PATCH)[0]
    assert torch.equal(patches[masking.ids_keep[0]], original[masking.ids_keep[0]])
    assert (patches[masking.ids_masked[0]] == 9.0).all()


def test_a_prediction_of_normalised_targets_gets_its_patch_statistics_back(spectrogram, masking):
    target = masked_patches(spectrogram, masking)
    variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
    rebuilt = reconstruct(spectrogram, masking, (target - mean) / (variance + 1e-6).sqrt(), PATCH, True)
    assert torch.allclose(rebuilt, spectrogram, atol=1e-5)


def test_image_has_three_panels_with_low_frequencies_at_the_bottom():
    spectrogram = torch.linspace(0, 1, 80)[:, None].expand(80, 208)
    hidden = torch.zeros(80, 208, dtype=torch.bool)
    hidden[:16, :16] = True
    image = draw(spectrogram, hidden, spectrogram.flip(0))
    height, width = 80 * PIXELS_PER_CELL, 208 * PIXELS_PER_CELL
    assert image.dtype == torch.uint8
    assert image.shape == (3, height, 3 * width + 2 * GAP_PIXELS)
    first, masked, rebuilt = (image[:, :, n * (width + GAP_PIXELS) :][:, :, :width].int() for n in range(3))
    brightness = first.sum(0)[:, 0]
    assert brightness[0] > brightness[height // 2] > brightness[-1]
    assert torch.equal(rebuilt, first.flip(1))
    grey = (masked == MASKED_GREY).all(0)
    assert grey[height - 16 * PIXELS_PER_CELL :, : 16 * PIXELS_PER_CELL].all()
    assert grey.sum() == (16 * PIXELS_PER_CELL) ** 2
    assert torch.equal(masked[:, ~grey], first[:, ~grey])


def test_a_constant_spectrogram_can_be_drawn():
    flat = torch.full((80, 32), -3.0)
    assert draw(flat, torch.zeros(80, 32, dtype=torch.bool), flat).shape[0] == 3


def test_inverted_mels_sound_like_their_source(logmel):
    waveform = invert_logmel(logmel, FEATURES)
    assert waveform.shape == (1, 160 * 207)
    spectrum = torch.fft.rfft(waveform[0]).abs()
    assert spectrum.argmax().item() * FEATURES.sample_rate / waveform.shape[1] == pytest.approx(1000, abs=5)
    again = LogMel(FEATURES)(waveform, centred=True)[0, :, :, 10:-10]
    original = logmel[:, :, 10:-10]
    loud = original > original.max() - 5
    assert (again - original)[loud].abs().mean() < 0.2


def test_inversion_is_deterministic_and_leaves_the_generator_alone(logmel):
    state = torch.get_rng_state()
    assert torch.equal(invert_logmel(logmel, FEATURES), invert_logmel(logmel, FEATURES))
    assert torch.equal(torch.get_rng_state(), state)


def test_picture_scales_both_sounds_by_one_factor(spectrogram, masking):
    quieter = masked_patches(spectrogram, masking) - 3.0 / FEATURES.std
    picture = make_picture(spectrogram, masking, quieter, PATCH, False, FEATURES)
    peaks = {name: waveform.abs().max().item() for name, waveform in picture.audio.items()}
    assert max(peaks.values()) == pytest.approx(0.9, rel=1e-5)
    level = {name: waveform.square().mean().sqrt().item() for name, waveform in picture.audio.items()}
    # 3 nat of power less over most of the clip.
    assert 0.1 < level["reconstruction"] / level["input"] < 0.6


def test_silence_stays_silent(masking):
    silence = normalize(torch.full((1, 80, 208), math.log(1.1920929e-7)), FEATURES.mean, FEATURES.std)
    target = masked_patches(silence, masking)
    picture = make_picture(silence, masking, target, PATCH, False, FEATURES)
    assert picture.audio["input"].abs().max() < 0.1


def test_png_holds_the_stacked_images(tmp_path):
    images = [torch.full((3, 4, 5), value, dtype=torch.uint8) for value in (10, 200)]
    path = tmp_path / "pictures" / "step-00000001.png"
    write_png(stack(images), path)
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[:2] == (8 + GAP_PIXELS, 5)
    assert pixels[0, 0, 0] == pytest.approx(10 / 255)
    assert pixels[-1, 0, 0] == pytest.approx(200 / 255)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
