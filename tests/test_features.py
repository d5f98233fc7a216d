import librosa
import numpy as np
import pytest
import torch

from msm_dist.config import Features
from msm_dist.errors import DataError
from msm_dist.features import LogMel, normalize

RATE = 16000


def waveform(kind: str, seconds: float = 1.0) -> np.ndarray:
    time = np.arange(round(seconds * RATE)) / RATE
    sounds = {
        "noise": 0.1 * np.random.default_rng(0).normal(size=len(time)),
        "tone": 0.9 * np.sin(2 * np.pi * 440 * time),
        "high tone": np.sin(2 * np.pi * 7000 * time),
        "chirp": np.sin(2 * np.pi * (100 + 1500 * time) * time),
        "silence": np.zeros(len(time)),
    }
    return sounds[kind].astype(np.float32)


def logmel(samples: np.ndarray, centred: bool) -> torch.Tensor:
    return LogMel(Features())(torch.from_numpy(samples)[None], centred=centred)[0, 0]


@pytest.mark.parametrize("kind", ["noise", "tone", "high tone", "chirp", "silence"])
def test_logmel_agrees_with_librosa(kind):
    samples = waveform(kind)
    mel = librosa.feature.melspectrogram(
        y=samples.astype(np.float64),
        sr=RATE,
        n_fft=400,
        hop_length=160,
        n_mels=80,
        fmin=50,
        fmax=8000,
        power=2,
        center=True,
        pad_mode="reflect",
        htk=False,
        norm="slaney",
        dtype=np.float64,
    )
    expected = np.log(mel + 1.1920929e-7)
    assert np.abs(logmel(samples, centred=True).numpy() - expected).max() < 3e-6


def test_output_is_float32_with_one_channel():
    out = LogMel(Features())(torch.zeros(3, 10 * RATE), centred=True)
    assert (out.dtype, out.shape) == (torch.float32, (3, 1, 80, 1001))
    assert torch.allclose(out, torch.tensor(1.1920929e-7).log())


@pytest.mark.parametrize("first, num_frames", [(0, 208), (1, 208), (2, 5), (93, 208), (791, 208), (793, 208), (998, 3)])
def test_logmel_of_a_crop_is_the_slice_of_the_whole_clip(first, num_frames):
    """Samples [160 * f0 - 200, 160 * (f0 + T - 1) + 200), reflected only past the true ends of the clip."""
    whole = waveform("noise", 10.0) + waveform("chirp", 10.0)
    start, stop = 160 * first - 200, 160 * (first + num_frames - 1) + 200
    before, after = max(0, -start), max(0, stop - len(whole))
    crop = np.pad(whole, (before, after), mode="reflect")[start + before : stop + before]
    assert len(crop) == Features().crop_samples(num_frames)
    expected = logmel(whole, centred=True)[:, first : first + num_frames]
    torch.testing.assert_close(logmel(crop, centred=False), expected, rtol=0, atol=1e-6)


def test_int16_is_scaled_to_one():
    samples = torch.randint(-32768, 32767, (2, 4000), generator=torch.Generator().manual_seed(0))
    front_end = LogMel(Features())
    assert torch.equal(front_end(samples.to(torch.int16)), front_end(samples / 32768))


@pytest.mark.parametrize("num_samples, num_frames", [(1, 1), (159, 1), (160, 2), (200, 2), (201, 2), (320, 3)])
def test_a_very_short_clip_is_padded_with_silence(num_samples, num_frames):
    samples = waveform("noise")[:num_samples]
    out = logmel(samples, centred=True)
    padded = np.pad(samples, (0, max(0, 201 - num_samples)))
    assert out.shape == (80, num_frames)
    assert torch.equal(out, logmel(padded, centred=True)[:, :num_frames])


@pytest.mark.parametrize("num_samples, centred", [(0, True), (399, False)])
def test_a_waveform_without_a_frame_is_a_data_error(num_samples, centred):
    with pytest.raises(DataError, match=f"{num_samples} samples"):
        LogMel(Features())(torch.zeros(1, num_samples), centred=centred)


def test_a_waveform_without_a_batch_is_refused():
    with pytest.raises(ValueError, match="must be \\[clips, samples\\]"):
        LogMel(Features())(torch.zeros(4000))


def test_normalize_uses_two_scalars():
    assert normalize(torch.tensor([-7.1, -2.9, -11.3]), -7.1, 4.2).tolist() == pytest.approx([0, 1, -1])


def test_building_leaves_the_default_dtype_alone():
    LogMel(Features())
    assert torch.get_default_dtype() == torch.float32
