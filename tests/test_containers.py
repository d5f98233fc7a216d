"""Containers through torchcodec: files that ffmpeg made, whole and damaged, and what is said where it is missing."""

import builtins
import io
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from msm_dist.data import containers, media
from msm_dist.data.audio import BadClip
from msm_dist.data.pack import PackSettings, pack
from msm_dist.errors import DataError
from tests.audio_files import encode, noise, write_audio

needs_ffmpeg = pytest.mark.skipif(
    shutil.which("ffmpeg") is None or containers.unusable() is not None,
    reason=f"needs ffmpeg and torchcodec: {containers.unusable() or 'no ffmpeg here (apt-get install ffmpeg)'}",
)
VIDEO = ["-f", "lavfi", "-i", "testsrc=size=64x64:rate=5:duration=30", "-shortest"]
CODECS = {
    "m4a": ["-c:a", "aac"],
    "webm": ["-c:a", "libopus"],
    "mkv": ["-c:a", "libvorbis"],
    "mp4": [*VIDEO, "-c:a", "aac"],
    "aac": ["-c:a", "aac"],
}
MORE = {"mka": ["-c:a", "libopus", "-frame_duration", "60"], "flac.mkv": ["-c:a", "flac"]}
RATE = 44100


def tone(seconds: float, frequency: float = 440.0, channels: int = 1) -> np.ndarray:
    """int16 [S] or [S, channels], its level rising."""
    time = np.arange(round(seconds * RATE)) / RATE
    wave = np.sin(2 * np.pi * frequency * time) * (0.1 + 0.02 * time) * 32767
    return (np.stack([wave] * channels, axis=1) if channels > 1 else wave).astype(np.int16)


def make(path: Path, samples: np.ndarray, kind: str | None = None) -> Path:
    """A container of this kind, by default the one that its suffix names."""
    kind = kind or path.suffix[1:]
    path.parent.mkdir(parents=True, exist_ok=True)
    made = path.with_name(f"{path.stem}.made.{kind}")
    command = ["ffmpeg", "-v", "error", "-y", "-i", "-", *(CODECS | MORE)[kind], str(made)]
    subprocess.run(command, input=encode(samples, "wav", RATE), check=True)
    return made.replace(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    if shutil.which("ffmpeg") is None:
        pytest.skip("no ffmpeg here")
    folder = tmp_path_factory.mktemp("containers")
    return {kind: make(folder / f"x.{kind}", tone(12)) for kind in CODECS}


@needs_ffmpeg
@pytest.mark.parametrize("kind", CODECS)
def test_a_span_is_that_of_the_sound(files, kind):
    content = files[kind].read_bytes()
    assert containers.is_container(content[:12])
    info = containers.probe(content)
    assert info.samples / info.sample_rate == pytest.approx(12, abs=0.1)
    expected = media.read_span(encode(tone(12), "wav", RATE), 5 * RATE, 7 * RATE, 16000)[0] / 32768
    for source in (content, io.BytesIO(content)):
        found = containers.decode_span(source, 5 * info.sample_rate, 7 * info.sample_rate, 16000)
        assert len(found) == pytest.approx(32000, abs=2)
        # Codecs shift a sound by milliseconds: compare level and pitch, not samples.
        assert np.sqrt(np.mean(found**2)) == pytest.approx(np.sqrt(np.mean(expected**2)), rel=0.03)
        assert np.argmax(np.abs(np.fft.rfft(found[:32000], 32000))) == pytest.approx(880, abs=2)


@needs_ffmpeg
@pytest.mark.parametrize("kind", [*CODECS, "mka", "flac.mkv"])
def test_pieces_joined_are_the_whole(tmp_path, kind):
    sound = noise(round(12.3 * RATE))
    content = make(tmp_path / f"x.{kind}", sound, kind).read_bytes()
    info = containers.probe(content)
    rate = info.sample_rate
    whole = containers.decode_span(content, 0, info.samples, rate)
    cuts = [0, 3 * rate + 17, 10 * rate, info.samples]
    pieces = [containers.decode_span(content, a, b, rate) for a, b in itertools.pairwise(cuts)]
    assert len(whole) == pytest.approx(info.samples, abs=0.1 * rate)
    np.testing.assert_allclose(np.concatenate(pieces), whole, atol=1e-6)


@needs_ffmpeg
@pytest.mark.parametrize("kind", ["webm", "mkv"])
def test_late_pieces_of_a_long_matroska_are_near_their_place(tmp_path, kind, monkeypatch):
    sound = noise(20 * RATE)
    content = make(tmp_path / f"x.{kind}", sound).read_bytes()
    rate = containers.probe(content).sample_rate
    exact = containers.decode_span(content, 9 * rate, 11 * rate, rate)
    monkeypatch.setattr(containers, "EXACT_SECONDS", 5)
    found = containers.decode_span(content, 9 * rate, 11 * rate, rate)
    lags = range(-rate // 500, rate // 500)
    errors = [np.abs(found[rate // 2 : rate] - exact[rate // 2 + lag : rate + lag]).mean() for lag in lags]
    assert min(errors) < 1e-3
    assert abs(lags[int(np.argmin(errors))]) <= rate / 1000


@needs_ffmpeg
@pytest.mark.parametrize("kind", ["mp4", "mkv", "webm"])
@pytest.mark.parametrize("case", ["late", "short"])
def test_sound_beside_a_longer_picture_is_packed_at_its_time(tmp_path, kind, case):
    """A picture of 20 s; sound of 8 s, or of 18 s that begins after 2 s."""
    seconds, delay = (18, 2) if case == "late" else (8, 0)
    (tmp_path / "sound.wav").write_bytes(encode(tone(seconds), "wav", RATE))
    (tmp_path / "source").mkdir()
    path = tmp_path / "source" / f"x.{kind}"
    coders = {"mp4": ["-c:a", "aac"], "mkv": ["-c:a", "libvorbis"], "webm": ["-c:a", "libopus", "-c:v", "libvpx"]}
    inputs = ["-f", "lavfi", "-i", "testsrc=size=64x64:rate=5:duration=20", "-itsoffset", str(delay)]
    command = ["ffmpeg", "-v", "error", *inputs, "-i", str(tmp_path / "sound.wav"), *coders[kind], str(path)]
    subprocess.run(command, check=True)
    info = containers.probe(path.read_bytes())
    rate = info.sample_rate
    assert info.samples / rate == pytest.approx(seconds + delay, abs=0.1)
    whole = containers.decode_span(path.read_bytes(), 0, info.samples, rate)
    loud = np.flatnonzero(np.abs(whole) > 0.02)
    assert loud[0] / rate == pytest.approx(delay, abs=0.05)
    assert loud[-1] / rate == pytest.approx(seconds + delay, abs=0.05)
    if delay:
        assert not containers.decode_span(path.read_bytes(), 0, rate, rate).any()
    index = pack(tmp_path / "source", tmp_path / "out", PackSettings(segment_seconds=5.0))
    assert index.seconds == pytest.approx(seconds + delay, abs=0.1)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["left_out"] == []


@needs_ffmpeg
def test_container_without_a_sample_is_empty(files, monkeypatch):
    class Silent:
        def __init__(self, file):
            self.metadata = SimpleNamespace(
                sample_rate=RATE,
                num_channels=1,
                duration_seconds=0.0,
                duration_seconds_from_header=0.0,
                begin_stream_seconds_from_header=0.0,
            )

    monkeypatch.setattr("torchcodec.decoders.AudioDecoder", Silent)
    with pytest.raises(BadClip, match="0 samples") as fault:
        containers.probe(files["m4a"].read_bytes())
    assert fault.value.reason == "empty"


@needs_ffmpeg
def test_channels_are_averaged(tmp_path):
    stereo = tone(2, channels=2)
    stereo[:, 1] = 0
    content = make(tmp_path / "x.m4a", stereo).read_bytes()
    one, both = containers.decode_span(content, 0, RATE, RATE), tone(2)[:RATE] / 32768
    assert np.sqrt(np.mean(one**2)) == pytest.approx(np.sqrt(np.mean(both**2)) / 2, rel=0.05)


@needs_ffmpeg
@pytest.mark.parametrize("kind", CODECS)
def test_damage_is_a_named_fault(files, kind):
    content = files[kind].read_bytes()
    zeroed = content[: len(content) // 3] + bytes(len(content) // 3) + content[2 * len(content) // 3 :]
    for broken in (content[: len(content) // 2], zeroed):
        with pytest.raises(BadClip) as fault:
            info = containers.probe(broken)
            containers.decode_span(broken, 0, info.samples, 16000)
            assert kind == "aac" and info.samples < 7 * RATE
            raise BadClip("truncated", "a bare stream ends anywhere")
        assert fault.value.reason in ("undecodable", "truncated")
        assert ".cpp" not in str(fault.value)


@needs_ffmpeg
def test_video_without_sound_says_so(tmp_path):
    path = tmp_path / "silent.mp4"
    subprocess.run(["ffmpeg", "-v", "error", *VIDEO[:4], str(path)], check=True)
    with pytest.raises(BadClip, match="no audio stream"):
        containers.probe(path.read_bytes())


SPANS = """
import resource, sys
from msm_dist.data import containers
with open(sys.argv[1], "rb") as file:
    info = containers.probe(file)
    peaks = []
    for start in (0, info.samples - 10 * info.sample_rate):
        containers.decode_span(file, start, start + 10 * info.sample_rate, 16000)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
print(peaks[1] - peaks[0])
"""


@needs_ffmpeg
def test_span_of_a_long_recording_takes_the_memory_of_the_span(tmp_path):
    path = make(tmp_path / "long.m4a", tone(300))
    child = subprocess.run([sys.executable, "-c", SPANS, str(path)], capture_output=True, text=True, check=True)
    assert int(child.stdout) < 300 * RATE * 4 / 3


@needs_ffmpeg
def test_folder_of_videos_is_packed_also_under_wrong_names(tmp_path):
    for kind in CODECS:
        make(tmp_path / "source" / kind / f"a.{kind}", tone(3))
    make(tmp_path / "source" / "lies.wav", tone(3), "m4a")
    write_audio(tmp_path / "source" / "wav.mp4", noise(16000), "wav")
    (tmp_path / "source" / "text.mkv").write_bytes(b"no video at all" * 100)
    index = pack(tmp_path / "source", tmp_path / "out", PackSettings())
    assert index.num_clips == len(CODECS) + 2
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [(entry["file"], entry["reason"]) for entry in report["left_out"]] == [("text.mkv", "undecodable")]
    assert index.seconds == pytest.approx(3 * (len(CODECS) + 1) + 1, abs=0.5)


@needs_ffmpeg
def test_of_a_whole_video_the_listed_segment_is_a_clip(tmp_path):
    make(tmp_path / "source" / "abcdefghijk.mp4", tone(28))
    make(tmp_path / "source" / "bbcdefghijk.m4a", tone(28))
    (tmp_path / "segments.csv").write_text('abcdefghijk, 10, 20, "/m/a"\nbbcdefghijk, 90, 100, "/m/a"\n')
    index = pack(tmp_path / "source", tmp_path / "out", PackSettings(csv=(tmp_path / "segments.csv",)))
    assert (index.num_clips, index.seconds) == (1, pytest.approx(10, abs=0.01))
    (entry,) = json.loads((tmp_path / "out" / "report.json").read_text())["left_out"]
    assert (entry["file"], entry["reason"]) == ("bbcdefghijk.m4a", "no_segment")
    assert "28.0 s long, its segment is 90 to 100 s" in entry["detail"]


@pytest.fixture
def without_torchcodec(monkeypatch):
    """As where the extra is not installed."""
    real = builtins.__import__

    def fail(name, *rest):
        if name.startswith("torchcodec"):
            raise ModuleNotFoundError("No module named 'torchcodec'")
        return real(name, *rest)

    containers.unusable.cache_clear()
    monkeypatch.setattr(builtins, "__import__", fail)
    yield
    monkeypatch.undo()
    containers.unusable.cache_clear()


MP4_HEAD = b"\x00\x00\x00\x1cftypM4A " + bytes(100)


def test_missing_torchcodec_names_the_extra_and_the_files(tmp_path, without_torchcodec, caplog):
    write_audio(tmp_path / "source" / "good.wav", noise(16000), "wav")
    for name in ("a.m4a", "b.mp4"):
        (tmp_path / "source" / name).write_bytes(MP4_HEAD)
    index = pack(tmp_path / "source", tmp_path / "out", PackSettings())
    assert index.num_clips == 1
    (message,) = caplog.messages
    assert "2 files are left out, such as a.m4a" in message and "msm-dist[video]" in message
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["reasons"] == {"no_torchcodec": 2}


def test_nothing_but_videos_without_torchcodec_is_an_error(tmp_path, without_torchcodec):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.m4a").write_bytes(MP4_HEAD)
    with pytest.raises(DataError, match=r"(?s)none of its 1 files can be used.*a\.m4a.*msm-dist\[video\]"):
        pack(tmp_path / "source", tmp_path / "out", PackSettings())


def test_torchcodec_without_its_libraries_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def fail(name, *rest):
        if name.startswith("torchcodec"):
            raise RuntimeError("Could not load libtorchcodec. Likely causes: ...\nmore")
        return real(name, *rest)

    containers.unusable.cache_clear()
    monkeypatch.setattr(builtins, "__import__", fail)
    sentence = containers.unusable()
    monkeypatch.undo()
    containers.unusable.cache_clear()
    assert "Could not load libtorchcodec" in sentence and "apt-get install ffmpeg" in sentence


def test_other_formats_are_not_taken_for_containers():
    for codec in ("wav", "flac", "ogg", "mp3", "opus"):
        assert not containers.is_container(encode(noise(8000), codec)[:12])
    assert not containers.is_container(b"")
