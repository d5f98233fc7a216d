"""Recordings as waveforms: every format, what their rates and channels become, and files that can't be read."""

import math

import numpy as np
import pytest

from msm_dist.data.audio import resample, resample_blocks
from msm_dist.errors import DataError
from msm_dist.evaluate.recordings import read_audio, read_blocks
from tests.audio_files import CODECS, bad_files, encode, noise, write_audio

RATE = 16000
EXACT = {"wav", "flac", "float.wav", "flac24"}


@pytest.mark.parametrize("codec", CODECS)
def test_every_format_that_training_packs_is_read(tmp_path, codec):
    rate = 48000 if codec == "opus" else RATE
    samples = (np.sin(np.arange(rate) * 2 * np.pi * 440 / rate) * 8000).astype(np.int16)
    written = samples / 32768 if codec == "float.wav" else samples
    waveform, found = read_audio(write_audio(tmp_path / "x", written, codec, rate))
    assert found == rate
    assert waveform.dtype == np.float32
    assert waveform.shape == (rate,)
    tolerance = 2 / 32768 if codec in EXACT else 0.03
    np.testing.assert_allclose(waveform[500:-500], samples[500:-500] / 32768, atol=tolerance)


def test_pcm_comes_back_to_the_sample(tmp_path):
    samples = noise(RATE)
    waveform, _ = read_audio(write_audio(tmp_path / "x.flac", samples))
    np.testing.assert_array_equal(waveform, samples.astype(np.float32) / 32768)


def test_another_rate_is_resampled_as_in_training(tmp_path):
    samples = noise(22050)
    waveform, rate = read_audio(write_audio(tmp_path / "x.wav", samples, "wav", 22050), RATE)
    assert rate == RATE
    np.testing.assert_array_equal(waveform, resample(samples.astype(np.float32) / 32768, 22050, RATE))


def test_channels_are_averaged(tmp_path):
    samples = noise(RATE, channels=2)
    waveform, _ = read_audio(write_audio(tmp_path / "x.wav", samples, "wav"))
    np.testing.assert_allclose(waveform, samples.mean(axis=1) / 32768, atol=1e-7)


def test_what_is_louder_than_full_scale_is_scaled_down_as_a_whole(tmp_path):
    samples = 4 * noise(RATE) / 32768
    waveform, _ = read_audio(write_audio(tmp_path / "x.wav", samples, "float.wav"))
    assert np.abs(waveform).max() <= 1
    assert np.corrcoef(waveform, samples)[0, 1] > 0.999999


@pytest.mark.parametrize(("codec", "rate"), [("flac", RATE), ("wav", 44100), ("ogg", 22050), ("mp3", 44100)])
def test_blocks_are_the_recording(tmp_path, monkeypatch, codec, rate):
    monkeypatch.setattr("msm_dist.data.audio.CHUNK_VALUES", 10000)
    path = write_audio(tmp_path / "x", noise(50001, channels=2), codec, rate)
    blocks = list(read_blocks(path, RATE))
    assert len(blocks) >= 5
    np.testing.assert_array_equal(np.concatenate(blocks), read_audio(path, RATE)[0])


@pytest.mark.parametrize("rate", [1000, 11025, 44100, 48000, 96001])
@pytest.mark.parametrize("length", [1, 2, 7, 999, 20011])
def test_blocks_are_resampled_to_the_very_samples_of_the_whole(rate, length):
    waveform = noise(length).astype(np.float32) / 32768
    blocks = np.array_split(waveform, min(length, 5))
    found = np.concatenate(list(resample_blocks(blocks, rate, RATE)))
    np.testing.assert_array_equal(found, resample(waveform, rate, RATE))


def test_blocks_of_a_loud_recording_share_one_gain(tmp_path, monkeypatch):
    monkeypatch.setattr("msm_dist.data.audio.CHUNK_VALUES", 10000)
    samples = noise(50000) / 32768
    samples[45000:] *= 8
    path = write_audio(tmp_path / "x.wav", samples, "float.wav")
    found = np.concatenate(list(read_blocks(path, RATE)))
    assert np.abs(found).max() <= 1
    np.testing.assert_array_equal(found, read_audio(path)[0])


def test_a_recording_that_breaks_off_gives_no_block(tmp_path, monkeypatch):
    monkeypatch.setattr("msm_dist.data.audio.CHUNK_VALUES", 10000)
    content = encode(noise(160000), "flac")
    (tmp_path / "x.flac").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"x\.flac.*undecodable"):
        next(read_blocks(tmp_path / "x.flac", RATE))


@pytest.mark.parametrize("name", sorted(bad_files().keys() - {"one_sample.wav"}))
def test_a_file_that_can_not_be_read_is_named_with_its_reason(tmp_path, name):
    content, reason = bad_files()[name]
    reason = "too_long" if name == "claims_a_year.flac" else reason
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}.*{reason}"):
        read_audio(tmp_path / name)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match="absent.wav.*No such file"):
        read_audio(tmp_path / "absent.wav")


@pytest.mark.parametrize("rate", [8000.0, np.float64(8000), np.float32(8000), np.int32(8000)])
def test_a_rate_is_a_whole_number_of_any_type(tmp_path, rate):
    (tmp_path / "x.wav").write_bytes(encode(noise(RATE), "wav"))
    waveform, found = read_audio(tmp_path / "x.wav", rate)
    assert (len(waveform), found, type(found)) == (8000, 8000, int)


@pytest.mark.parametrize("rate", [8000.5, math.nan, math.inf, "8000", 0, -8000, True, [8000]])
def test_what_is_no_rate_is_named(tmp_path, rate):
    (tmp_path / "x.wav").write_bytes(encode(noise(RATE), "wav"))
    for read in (read_audio, lambda path, rate: next(read_blocks(path, rate))):
        with pytest.raises(DataError, match="sample_rate = .* whole number of Hz"):
            read(tmp_path / "x.wav", rate)


def test_the_content_decides_not_the_name(tmp_path):
    (tmp_path / "x.wav").write_bytes(encode(noise(RATE), "flac"))
    assert len(read_audio(tmp_path / "x.wav")[0]) == RATE
