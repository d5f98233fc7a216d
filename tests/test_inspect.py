"""Looking into a corpus: its summary, a shard's clips, a clip as picture and sound."""

import io
import json

import numpy as np
import pytest
import soundfile
from matplotlib.image import imread

from msm_dist.config import Features
from msm_dist.data.index import load_index, members
from msm_dist.data.inspect import band_centres, picture
from msm_dist.data.pack import PackSettings, pack
from msm_dist.data.repack import repack
from msm_dist.data.shards import index_shards
from msm_dist.errors import ConfigError, DataError
from tests.audio_files import encode, noise, write_audio
from tests.bad_clips import break_clip
from tests.test_data_commands import run
from tests.test_shards import write_tar


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    for i in range(6):
        write_audio(folder / "files" / f"clip{i}.flac", noise(16000 + 1600 * i, seed=i))
    pack(folder / "files", folder / "audio", PackSettings(shard_clips=4, name="clips"))
    repack(folder / "audio", folder / "mels", Features())
    return folder


def test_summary_of_a_folder(corpora):
    index = load_index(str(corpora / "audio"))
    output = run("inspect", corpora / "audio")
    assert output.count(f"mean {index.mean:.4f}") == 1
    for part in (
        "6 clips",
        "2 shards",
        index.digest,
        "16000 Hz: 6",
        "flac: 6",
        f"mean {index.mean:.4f}",
        "-7.1",
        "n_mels 80",
    ):
        assert part in output
    assert f"made from  the audio with digest {index.digest}" in run("inspect", corpora / "mels")


def test_clips_of_a_shard(corpora):
    shard = load_index(str(corpora / "audio")).shards[1]
    lines = run("inspect", shard.path).splitlines()
    assert [line.split()[-1] for line in lines[1:]] == [row["key"].decode() for row in members(shard)]
    assert float(lines[1].split()[0]) == pytest.approx(members(shard)[0]["samples"] / 16000, abs=5e-4)


def test_a_clip_is_shown_and_heard(corpora, tmp_path):
    output = run("inspect", corpora / "audio", "clip3_0", "--out", tmp_path, "--original")
    sound, rate = soundfile.read(tmp_path / "clip3_0.wav", dtype="int16")
    np.testing.assert_array_equal(sound, noise(16000 + 4800, seed=3))
    assert rate == 16000
    stored = soundfile.read(tmp_path / "clip3_0.original.flac", dtype="int16")[0]
    np.testing.assert_array_equal(stored, sound)
    pixels = imread(tmp_path / "clip3_0.png")
    assert pixels.shape[0] > 200 and pixels.shape[1] > 400 and pixels[..., :3].std() > 0.05
    peak, rms = (
        20 * np.log10(value / 32768) for value in (np.abs(sound).max(), np.sqrt(np.mean(sound.astype(float) ** 2)))
    )
    for part in (f"peak {peak:.1f} dBFS, rms {rms:.1f} dBFS", "file clip3.flac", "20800 samples at 16000 Hz", "flac"):
        assert part in output


def test_a_stored_log_mel_is_shown_and_not_heard(corpora, tmp_path):
    output = run("inspect", corpora / "mels", "clip3_0", "--out", tmp_path, "--original")
    assert {path.name for path in tmp_path.iterdir()} == {"clip3_0.png", "clip3_0.logmel.npy"}
    assert "no .wav is written" in output and "131 frames of 80 bands" in output and "file clip3.flac" in output
    codes = np.load(tmp_path / "clip3_0.logmel.npy", allow_pickle=False)
    assert codes.dtype == np.uint8 and codes.shape[1] == 80
    audio = run("inspect", corpora / "audio", "clip3_0", "--out", tmp_path / "audio")
    means = [float(text.split("bands, mean ")[1].split(",")[0]) for text in (audio, output)]
    assert means[0] == pytest.approx(means[1], abs=0.01)


def test_keys_are_found_by_how_they_begin_and_misspelt_ones_get_a_hint(corpora, tmp_path):
    assert "clip5_0" in run("inspect", corpora / "audio", "clip5", "--out", tmp_path)
    with pytest.raises(ConfigError, match="6 keys in .* begin so"):
        run("inspect", corpora / "audio", "clip", "--out", tmp_path)
    with pytest.raises(ConfigError, match="did you mean .*clip2_0"):
        run("inspect", corpora / "audio", "clp2_0", "--out", tmp_path)
    shards = load_index(str(corpora / "audio")).shards
    key = members(shards[0])[0]["key"].decode()
    assert key in run("inspect", shards[0].path, key, "--out", tmp_path / "of_shard")
    with pytest.raises(ConfigError, match="no clip of"):
        run("inspect", shards[1].path, key, "--out", tmp_path)


def test_a_packed_clip_is_found_by_its_ytid(tmp_path):
    names = ("--PJHxphWEs", "YZY-SXAuDSo", "A_b-C_d-E_f")
    for number, name in enumerate(names):
        write_audio(tmp_path / "files" / "sub" / f"Y{name}_30_40.flac", noise(16000, seed=number))
    write_audio(tmp_path / "files" / "other" / "-_-abcdefgh.flac", noise(20 * 16000))
    pack(tmp_path / "files", tmp_path / "audio", PackSettings())
    for name in names:
        output = run("inspect", tmp_path / "audio", name, "--out", tmp_path / name.strip("-"))
        assert f"sub_Y{name}_30_40_0\n" in output
    with pytest.raises(ConfigError, match="2 keys in .* have it in them"):
        run("inspect", tmp_path / "audio", "-_-abcdefgh", "--out", tmp_path)
    for part in ("PJHxphWE", "HxphWEs"):
        with pytest.raises(ConfigError, match="no clip of"):
            run("inspect", tmp_path / "audio", part)
    with pytest.raises(ConfigError, match="--orignal: no such option, and no clip of"):
        run("inspect", tmp_path / "audio", "--orignal")


def test_shards_that_are_missing_or_cut_off_are_named(tmp_path):
    tars = [write_tar(tmp_path / f"{name}.tar", {f"{name}.flac": encode(noise(8000))}) for name in "abc"]
    index_shards(tars, Features())
    assert "faults" not in run("inspect", tmp_path)
    tars[0].unlink()
    tars[2].write_bytes(tars[2].read_bytes()[:1000])
    output = run("inspect", tmp_path)
    assert "1 of 3 shards missing, 1 of another size (a.tar, c.tar)" in output
    assert f"msm-dist data verify {tmp_path}" in output


def test_no_file_is_replaced_unless_asked_for(corpora, tmp_path):
    (tmp_path / "clip1_0.png").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="is there already"):
        run("inspect", corpora / "audio", "clip1", "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["clip1_0.png"]
    (tmp_path / "clip2_0.wav").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="clip2_0.wav: is there already"):
        run("inspect", corpora / "audio", "clip2", "--out", tmp_path)
    assert not (tmp_path / "clip2_0.png").exists() and (tmp_path / "clip2_0.wav").read_bytes() == b"mine"
    run("inspect", corpora / "audio", "clip1", "--out", tmp_path, "--overwrite")
    assert (tmp_path / "clip1_0.png").read_bytes()[1:4] == b"PNG"


def test_keys_of_strangers_stay_in_the_folder_and_damage_is_named(tmp_path):
    files = {"../../up/$x.wav": encode(noise(8000), "wav"), "b.flac": encode(noise(8000), rate=44100)}
    index = index_shards([write_tar(tmp_path / "tars" / "a.tar", files)], Features())
    run("inspect", tmp_path / "tars", "../../up/$x", "--out", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"_.._up__x.wav", "_.._up__x.png"}
    assert "there is no json" in run("inspect", tmp_path / "tars", "b", "--out", tmp_path / "out")
    assert soundfile.info(tmp_path / "out" / "b.wav").samplerate == 16000
    break_clip(index, 1, "flipped")
    with pytest.raises(DataError, match="b: undecodable"):
        run("inspect", tmp_path / "tars", "b", "--out", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def strange_corpus(folder):
    """Clips whose keys and labels are not for a terminal."""
    keys = ["ok", "bad\x1b[31mred", "new\nline", "t\udcffx"]
    told = {"origin": {"file": "\ud800x", "a\nb": 1}, "labels": ["\ud800", "\x1b[31mred", "caf\u00e9"]}
    files = {f"{key}.flac": encode(noise(8000, i)) for i, key in enumerate(keys)}
    files["ok.json"] = json.dumps(told).encode()
    index_shards([write_tar(folder / "a.tar", files, errors="surrogateescape")], Features())
    return keys


def test_keys_and_labels_of_strangers_do_not_steer_the_terminal(tmp_path):
    keys = strange_corpus(tmp_path / "tars")
    lines = run("inspect", tmp_path / "tars" / "a.tar").splitlines()
    assert len(lines) == 1 + len(keys) and all(line.isprintable() for line in lines)
    shown = [line.split("  ")[-1] for line in lines[1:]]
    assert shown == ["ok", "bad\\x1b[31mred", "new\\nline", "t\\xffx"]
    output = run("inspect", tmp_path / "tars", "ok", "--out", tmp_path / "out")
    assert "labels     \\ud800, \\x1b[31mred, caf\u00e9" in output and "file \\ud800x, a\\nb 1" in output
    for number, (key, text) in enumerate(zip(keys, shown, strict=True)):
        for given, name in ((key, "typed"), (text, "shown")):
            out = tmp_path / f"{name} {number}"
            assert f"a.tar: {text}" in run("inspect", tmp_path / "tars", given, "--out", out)
    with pytest.raises(ConfigError, match=r"\\x1bq: no clip of .*, such as ok"):
        run("inspect", tmp_path / "tars", "\x1bq", "--out", tmp_path)


def test_the_axes_are_seconds_and_hertz():
    centres = band_centres(Features())
    assert centres.shape == (80,) and (np.diff(centres) > 0).all() and centres[0] > 50 and centres[-1] < 8000
    logmel = np.random.default_rng(0).normal(size=(80, 300)).astype(np.float32)
    assert imread(io.BytesIO(picture(logmel, Features(), "$a_{key$"))).shape[2] == 4
    assert picture(logmel, Features(), "x") == picture(logmel, Features(), "x")
