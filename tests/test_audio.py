"""Decoding: what a crop holds, what resampling keeps, what every kind of broken file is called."""

import io
import pickle
import tracemalloc

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from msm_dist.data import mp3
from msm_dist.data.audio import (
    CHUNK_VALUES,
    BadClip,
    Packed,
    decode,
    decode_crop,
    fit_int16,
    num_target_samples,
    probe,
    to_int16,
)
from tests.audio_files import CODECS, bad_files, encode, flac_claiming, noise, wav_claiming

CLIP = noise(8000)


def tone(frequency: float, rate: int, seconds: float = 1.0) -> np.ndarray:
    time = np.arange(round(rate * seconds)) / rate
    return (0.5 * np.sin(2 * np.pi * frequency * time) * 32767).astype(np.int16)


@pytest.mark.parametrize("codec", CODECS)
def test_probe_reads_the_header(codec):
    info = probe(encode(noise(9000, channels=2), codec, 48000))
    assert (info.samples, info.sample_rate, info.channels) == (9000, 48000, 2)
    assert info.format == {"opus": "ogg", "float.wav": "wav", "flac24": "flac"}.get(codec, codec)


@pytest.mark.parametrize("codec", CODECS)
def test_crop_is_the_slice_of_the_whole_clip(codec):
    encoded = encode(CLIP, codec)
    whole = to_int16(decode(encoded, 16000)).astype(int)
    crop = decode_crop(encoded, 3000, 5000, 8000, 16000)
    assert crop.dtype == np.int16
    # The bit reservoir of MP3 reaches back over the point of the seek.
    assert np.abs(crop - whole[3000:5000]).max() <= (1 if codec == "mp3" else 0)


@pytest.mark.parametrize("codec", ["wav", "flac"])
def test_sixteen_bit_mono_keeps_its_very_samples(codec):
    extremes = np.array([-32768, 32767, -1, 0, 1, 12345] * 100, np.int16)
    np.testing.assert_array_equal(decode_crop(encode(extremes, codec), 0, 600, 600, 16000), extremes)
    np.testing.assert_array_equal(to_int16(decode(encode(extremes, codec), 16000)), extremes)


@given(
    samples=st.integers(1, 60),
    missing=st.integers(0, 60),
    start=st.integers(-90, 90),
    length=st.integers(1, 90),
)
def test_crop_beyond_the_clip_is_silence_then_reflection(samples, missing, start, length):
    padded = np.pad(CLIP[:samples], (0, missing))
    wide = np.pad(padded, 400, mode="reflect")
    crop = decode_crop(encode(CLIP[:samples], "wav"), start, start + length, samples + missing, 16000)
    np.testing.assert_array_equal(crop, wide[400 + start : 400 + start + length])


def test_crop_of_another_rate_is_the_slice_of_the_resampled_clip():
    encoded = encode(noise(44100, channels=2), "wav", 44100)
    whole = np.pad(to_int16(decode(encoded, 16000)), (0, 500))
    crop = decode_crop(encoded, 15000, 16500, 16500, 16000)
    np.testing.assert_array_equal(crop, whole[15000:16500])


def test_only_the_span_of_a_crop_is_decoded():
    damaged = bytearray(encode(noise(160000)))
    damaged[-1000:] = bytes(1000)
    with pytest.raises(BadClip):
        decode(bytes(damaged), 16000)
    np.testing.assert_array_equal(decode_crop(bytes(damaged), 100, 9000, 160000, 16000), noise(160000)[100:9000])


def test_channels_are_averaged():
    stereo = noise(1000, channels=2)
    np.testing.assert_allclose(decode(encode(stereo, "wav"), 16000), stereo.mean(axis=1) / 32768, atol=1e-7)
    opposed = np.stack([CLIP, -CLIP], axis=1)
    assert not decode(encode(opposed, "wav"), 16000).any()


@pytest.mark.parametrize("rate", [1000, 8000, 11025, 22050, 37800, 44100, 44101, 48000, 96000, 768000])
def test_resampling_keeps_pitch_level_and_length(rate):
    frequency = min(440.0, rate / 8)
    waveform = decode(encode(tone(frequency, rate), "wav", rate), 16000)
    assert len(waveform) == num_target_samples(rate, rate, 16000) == 16000
    middle = slice(1000, 15000)
    expected = tone(frequency, 16000) / 32768
    error = np.linalg.norm(waveform[middle] - expected[middle]) / np.linalg.norm(expected[middle])
    assert error < 0.02


@pytest.mark.parametrize("rate", [11111, 15999, 16003, 22255, 191999])
def test_pitch_of_odd_rates_is_within_the_promised_rounding(rate):
    waveform = decode(encode(tone(1234.5, rate, seconds=4), "wav", rate), 16000)
    spectrum = np.abs(np.fft.rfft(waveform[:60000] * np.hanning(60000), 2**21))
    assert np.argmax(spectrum) * 16000 / 2**21 == pytest.approx(1234.5, rel=1 / 4000)


@given(samples=st.integers(1, 5000), rate=st.sampled_from([4000, 11111, 15999, 22255, 44100, 44101]))
def test_length_after_resampling_is_the_promised_one(samples, rate):
    assert len(decode(encode(noise(samples), "wav", rate), 16000)) == num_target_samples(samples, rate, 16000)


def test_length_at_another_rate_is_rounded_up():
    lengths = [
        (1, 44100, 1),
        (441, 44100, 160),
        (442, 44100, 161),
        (5, 8000, 10),
        (3, 48000, 1),
        (4, 48000, 2),
    ]
    assert [num_target_samples(samples, rate, 16000) for samples, rate, _ in lengths] == [n for *_, n in lengths]


@pytest.mark.parametrize("rate", [22050, 44100, 48000])
@pytest.mark.parametrize("frequency", [8200, 9000, 10500])
def test_resampling_leaves_out_what_the_new_rate_can_not_hold(rate, frequency):
    waveform = decode(encode(tone(frequency, rate), "wav", rate), 16000)
    assert np.abs(waveform[1000:-1000]).max() < 1e-4


@pytest.mark.parametrize("rate", [22050, 44100, 48000])
def test_resampling_keeps_the_level_up_to_7500_hz(rate):
    for frequency in (100, 3000, 7000, 7500):
        waveform = decode(encode(tone(frequency, rate), "wav", rate), 16000)[1000:-1000]
        assert 20 * np.log10(np.sqrt(2 * np.mean(waveform**2)) / 0.5) == pytest.approx(0, abs=0.5)


def test_loud_samples_are_clipped_not_wrapped():
    assert to_int16(np.array([1.5, -1.5, 1.0])).tolist() == [32767, -32768, 32767]
    loud = np.tile([1.0, 1.0, -1.0, -1.0], 4000) * 32767
    resampled = decode(encode(loud.astype(np.int16), "wav", 12000), 16000)
    assert resampled.max() > 1
    np.testing.assert_array_equal(to_int16(resampled) > 0, np.rint(resampled * 32768) > 0)


@given(peak=st.floats(0.5, 4), sign=st.sampled_from([-1, 1]))
def test_clip_beyond_full_scale_is_scaled_as_a_whole(peak, sign):
    waveform = np.linspace(-0.5, 1, 301, dtype=np.float32) * np.float32(peak * sign)
    samples, gain = fit_int16(waveform)
    assert gain == 1 or max(abs(samples.astype(int))) >= 32766
    assert gain <= 1
    np.testing.assert_allclose(samples / 32768, waveform * gain, atol=1 / 65536 + 1e-6)


def test_samples_within_full_scale_are_kept_as_they_are():
    extremes = np.array([-32768, 32767, -1, 0, 1], np.int16)
    samples, gain = fit_int16((extremes / 32768).astype(np.float32))
    assert gain == 1
    np.testing.assert_array_equal(samples, extremes)


@pytest.mark.parametrize("name", sorted(bad_files().keys() - {"one_sample.wav", "claims_a_year.flac"}))
def test_broken_file_is_a_named_fault_in_bounded_memory(name):
    content, reason = bad_files()[name]
    tracemalloc.start()
    with pytest.raises(BadClip) as fault:
        decode(content, 16000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert fault.value.reason == reason
    assert fault.value.reason in str(fault.value)
    assert peak < 50e6


def _mpeg(head: bytes) -> int:
    return next(i for i in range(len(head)) if mp3.frame_size(head[i : i + 4]))


@pytest.fixture(scope="module")
def bare_mp3() -> tuple[bytes, int]:
    """A VBR MP3 of noise that gets quieter, without its first frame, which tells the length; and how long it is."""
    rate = 16000
    sound = noise(rate * 30) // np.repeat([1, 400], rate * 15)
    content = encode(sound.astype(np.int16), "mp3", rate)
    first = _mpeg(content)
    place = content.find(b"Xing") if b"Xing" in content[:1000] else content.find(b"Info")
    assert 0 < place < 1000
    return content[first + mp3.frame_size(content[first : first + 4]) :], len(sound)


@pytest.mark.parametrize("tag", [b"", b"ID3\x04\0\0\0\0\x02\x05" + bytes(261), b"VBRI", b"Xing"])
def test_all_of_an_mp3_without_a_length_is_there(bare_mp3, tag):
    content, samples = bare_mp3
    if tag in (b"VBRI", b"Xing"):
        # A first frame that says something else than their number.
        start = mp3.count_header(content[:4], 7)
        content = start.replace(b"Xing\0\0\0\x01", tag + bytes(4)) + content
    else:
        content = tag + content
    for source in (content, io.BytesIO(content)):
        info = probe(source)
        assert samples <= info.samples <= samples + 3000
        whole = decode(source, 16000)
        assert len(whole) == info.samples
    # Its packing takes it for what it is, and so does training.
    packed = Packed(info.samples, 16000, "mp3")
    crop = decode_crop(memoryview(content), 400000, 410000, info.samples, 16000, packed)
    assert np.abs(crop.astype(int) - to_int16(whole[400000:410000])).max() <= 1


def test_half_an_mp3_without_a_length_is_what_is_there(bare_mp3):
    content, _ = bare_mp3
    info = probe(content[: len(content) // 2])
    assert len(decode(content[: len(content) // 2], 16000)) == info.samples
    damaged = content[:5000] + bytes(3000) + content[8000:]
    assert probe(damaged).samples < probe(content).samples
    for text in (b"\xff\xfb", b"ID3", b"ID3\x04\0\0\0\0\x7f\x7f", content[:100]):
        with pytest.raises(BadClip):
            decode(text, 16000)


def test_crops_and_pieces_of_an_mp3_begin_without_noise():
    # At few bits a frame is spread over many before it.
    samples = tone(440, 24000, seconds=60)
    file = io.BytesIO()
    soundfile.write(file, samples + noise(len(samples)) // 20, 24000, format="MP3", compression_level=0.99)
    encoded = file.getvalue()
    with soundfile.SoundFile(io.BytesIO(encoded)) as sound:
        whole = to_int16(sound.read(dtype="float32")).astype(int)
    for start in range(30000, len(whole) - 20000, 50021):
        crop = decode_crop(encoded, start, start + 9000, len(whole), 24000)
        assert np.abs(crop - whole[start : start + 9000]).max() <= 1
    long = io.BytesIO()
    soundfile.write(long, np.tile(samples, 2), 24000, format="MP3", compression_level=0.99)
    with soundfile.SoundFile(io.BytesIO(long.getvalue())) as sound:
        at_once = to_int16(sound.read(dtype="float32")).astype(int)
    assert len(at_once) > CHUNK_VALUES
    assert np.abs(to_int16(decode(long.getvalue(), 24000)) - at_once).max() <= 1


def test_wrong_suffix_does_not_matter_but_an_unknown_format_does():
    assert probe(encode(CLIP, "mp3")).format == "mp3"
    aiff = b"FORM" + (46 + 2000).to_bytes(4, "big") + b"AIFFCOMM" + (18).to_bytes(4, "big")
    aiff += (1).to_bytes(2, "big") + (1000).to_bytes(4, "big") + (16).to_bytes(2, "big")
    aiff += bytes.fromhex("400cfa00000000000000") + b"SSND" + (2008).to_bytes(4, "big") + bytes(2008)
    with pytest.raises(BadClip, match="wav, flac, ogg or mp3") as fault:
        probe(aiff)
    assert fault.value.reason == "unsupported_format"


def test_claimed_length_of_a_wav_is_not_believed():
    content = wav_claiming(CLIP.tobytes(), num_bytes=2**31)
    np.testing.assert_array_equal(to_int16(decode(content, 16000)), CLIP)


@pytest.mark.parametrize("codec", ["wav", "float.wav"])
@pytest.mark.parametrize("channels", [1, 2])
def test_wav_cut_in_half_is_truncated(codec, channels):
    encoded = encode(noise(8000, channels=channels), codec)
    assert probe(encoded).samples == 8000
    for content in (encoded[: len(encoded) // 2], encoded[:-5]):
        for source in (content, io.BytesIO(content)):
            with pytest.raises(BadClip, match="of 8000 samples") as fault:
                probe(source)
            assert fault.value.reason == "truncated"


def test_wav_with_other_chunks_is_read_past_them():
    encoded = encode(CLIP, "wav")
    extra = b"LIST" + (5).to_bytes(4, "little") + b"notes\0"
    assert probe(encoded[:36] + extra + encoded[36:]).samples == 8000
    assert probe(encoded + extra).samples == 8000
    with pytest.raises(BadClip, match="truncated"):
        probe((encoded[:36] + extra + encoded[36:])[:-100])


@pytest.mark.parametrize("claimed", [2**32 - 1, 0x7FFFFFFF, 0x7FFFF000])
def test_wav_from_a_pipe_holds_what_is_there(claimed):
    assert probe(wav_claiming(CLIP.tobytes(), num_bytes=claimed)).samples == 8000


@pytest.mark.parametrize(("claimed", "reason"), [(2**28, "undecodable"), (2**36 - 1, "too_long")])
def test_claimed_length_of_a_flac_is_not_allocated(claimed, reason):
    tracemalloc.start()
    with pytest.raises(BadClip) as fault:
        decode(flac_claiming(CLIP, claimed), 16000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert fault.value.reason == reason
    assert peak < 50e6


def test_crop_at_a_break_in_the_file_is_a_bad_clip():
    encoded = encode(noise(160000))
    with pytest.raises(BadClip):
        decode_crop(encoded[: len(encoded) // 2], 100000, 110000, 160000, 16000)


def test_fault_travels_between_processes():
    fault = pickle.loads(pickle.dumps(BadClip("empty", "0 samples")))
    assert (fault.reason, str(fault)) == ("empty", "empty (0 samples)")
