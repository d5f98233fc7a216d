"""Stored log-mels: what is kept of the values, and that a crop of them is the crop of the audio."""

import io
import math

import numpy as np
import pytest
import torch

from msm_dist.config import Features
from msm_dist.data.audio import decode_crop
from msm_dist.data.logmel import HEADER_BYTES, check_rows, clip_codes, code_sums, crop_spans, encode_clip, fill_crop
from msm_dist.data.stats import LogMelMeter, combine
from msm_dist.data.synthetic import make_clip
from msm_dist.errors import DataError
from msm_dist.features import CODE_LOW, CODE_STEP, LogMel, dequantize, quantize
from tests.audio_files import encode

FEATURES = Features()
FRONT_END = LogMel(FEATURES)
OTHERS = [
    Features(n_fft=1024, win=1024),
    Features(sample_rate=32000, n_fft=1024, win=1024, hop=320, fmax=16000, n_mels=128),
    Features(n_mels=128),
]


def sound(number: int) -> np.ndarray:
    """A clip of the embedded corpus, int16 at 16 kHz."""
    waveform, rate, _ = make_clip(np.random.default_rng([3, number]), 8 * number)
    assert rate == 16000
    return np.rint(waveform * 32767).astype(np.int16)


def loudest(features: Features) -> torch.Tensor:
    """Windows of samples in -1..1 that put as much as they can into one bin each: float64 [bins, n_fft]."""
    angles = 2 * math.pi * torch.outer(torch.arange(features.n_fft // 2 + 1), torch.arange(features.n_fft))
    return torch.sign(torch.cos(angles.double() / features.n_fft + 0.1))


@pytest.mark.parametrize("features", [FEATURES, *OTHERS], ids=lambda f: f"{f.sample_rate}-{f.n_fft}-{f.n_mels}")
def test_no_sound_is_louder_than_the_largest_code(features):
    front_end = LogMel(features)
    # |X| <= sum of the window in every bin, so a band holds at most that squared times the sum of its filter.
    bound = math.log(front_end.filters.sum(0).max() * front_end.window.sum() ** 2 + 1.2e-7)
    assert bound <= CODE_LOW + 255 * front_end.code_step + 1e-9
    logmel = front_end(loudest(features))
    assert 5.5 < logmel.max() <= bound
    error = dequantize(quantize(logmel, front_end.code_step), front_end.code_step) - logmel.transpose(2, 3)
    assert error.abs().max() <= front_end.code_step / 2 + 1e-5
    silence = front_end(torch.zeros(1, 4000))
    assert not quantize(silence, front_end.code_step).any()


def test_the_usual_front_end_has_the_usual_step_and_others_a_larger_one():
    assert FRONT_END.code_step == CODE_STEP
    assert all(CODE_STEP < LogMel(features).code_step < 0.11 for features in OTHERS)
    features = OTHERS[0]
    front_end = LogMel(features)
    codes = clip_codes(sound(1), front_end)
    logmel = front_end(torch.from_numpy(sound(1)[None]), centred=True)[0, 0].T
    restored = front_end(torch.from_numpy(codes[None, : len(logmel)]))
    assert (restored[0, 0].T - logmel).abs().max() <= front_end.code_step / 2 + 1e-5


def test_what_is_lost_is_a_hundredth_of_the_corpus_deviation():
    errors, values = [], []
    for number in range(13):
        logmel = FRONT_END(torch.from_numpy(sound(number)[None]), centred=True)
        restored = FRONT_END(quantize(logmel)[:, 0])
        errors.append((restored - logmel).flatten())
        values.append(logmel.flatten())
    error, value = torch.cat(errors), torch.cat(values)
    assert error.abs().max() <= CODE_STEP / 2 + 1e-5
    assert error.square().mean().sqrt() < 0.01 * value.std()
    assert error.mean().abs() < 1e-3


def test_a_member_is_an_ordinary_npy_file_of_the_whole_log_mel():
    samples = sound(2)
    content = encode_clip(samples, FRONT_END)
    codes = np.load(io.BytesIO(content), allow_pickle=False)
    num_frames = FEATURES.num_frames(len(samples))
    assert codes.shape == (num_frames + 4, 80) and len(content) == HEADER_BYTES + codes.nbytes
    expected = quantize(FRONT_END(torch.from_numpy(samples[None]), centred=True))[0, 0].numpy()
    np.testing.assert_array_equal(codes[:num_frames], expected)


def test_a_long_clip_is_encoded_in_pieces_without_a_difference(monkeypatch):
    samples = sound(4)
    whole = clip_codes(samples, FRONT_END)
    monkeypatch.setattr("msm_dist.data.logmel.CHUNK_FRAMES", 37)
    np.testing.assert_array_equal(clip_codes(samples, FRONT_END), whole)


def crop_of(samples: np.ndarray, offset: int, frames: int) -> np.ndarray:
    """A crop of the stored log-mel of a clip, cut out of a larger file."""
    content = bytes(77) + encode_clip(samples, FRONT_END) + bytes(99)
    num_frames = np.array([FEATURES.num_frames(len(samples))])
    sizes = np.array([len(content) - 77 - 99])
    starts, stops = crop_spans(np.array([77]), sizes, num_frames, np.array([offset]), frames, 80)
    crop = np.full((frames, 80), 111, np.uint8)
    fill_crop(crop, memoryview(content)[starts[0] : stops[0]], int(num_frames[0]), FEATURES)
    return crop


@pytest.mark.parametrize("num_samples", [400, 479, 480, 500, 639, 640, 2000, 2159, 2160, 5000, 5120])
@pytest.mark.parametrize("frames", [2, 16])
def test_a_crop_is_that_of_the_audio_padded_with_silence(num_samples, frames):
    samples = sound(1)[5000 : 5000 + num_samples]
    num_frames = FEATURES.num_frames(num_samples)
    length = max(num_samples, 160 * (frames - 1))
    for offset in {0, max(0, num_frames - frames) // 2, max(0, num_frames - frames)}:
        start = 160 * offset - 200
        encoded = encode(samples, "wav")
        audio = decode_crop(encoded, start, start + FEATURES.crop_samples(frames), length, 16000)
        expected = FRONT_END(torch.from_numpy(audio[None]))
        stored = FRONT_END(torch.from_numpy(crop_of(samples, offset, frames)[None]))
        # A clip that ends within a window of the crop's own end is reflected there by the audio path.
        same = frames - 2 if num_frames in (frames - 1, frames - 2) else frames
        assert (stored - expected)[..., :same].abs().max() <= CODE_STEP / 2 + 1e-5


def test_sums_of_codes_are_those_of_their_values():
    clips = [sound(5), sound(6)]
    codes = [clip_codes(clip, FRONT_END)[:-4] for clip in clips]
    statistics = combine(code_sums(part, FRONT_END) for part in codes)
    values = dequantize(torch.from_numpy(np.concatenate(codes))).double().numpy()
    assert statistics.mean == pytest.approx(values.mean(), abs=1e-5)
    assert statistics.std == pytest.approx(values.std(), abs=1e-5)
    np.testing.assert_allclose(statistics.mel_mean, values.mean(0), atol=1e-5)
    meter = LogMelMeter(FEATURES)
    for clip in clips:
        meter.add(clip)
    exact = combine([meter.sums])
    assert statistics.mean == pytest.approx(exact.mean, abs=0.002)
    assert statistics.std == pytest.approx(exact.std, abs=0.002)


def test_a_member_that_is_not_as_long_as_its_clip_is_refused():
    rows = np.array(
        [(0, HEADER_BYTES + 80 * 15, b"a"), (9, 0, b"b")], [("offset", "<i8"), ("size", "<i8"), ("key", "S1")]
    )
    check_rows(rows[:1], np.array([11]), FEATURES)
    with pytest.raises(DataError, match="b: its stored log-mel has 0 bytes, 11 frames of 80 bands need 1328; pack"):
        check_rows(rows, np.array([11, 11]), FEATURES)
