"""Packing: what ends up in the shards, in which order, and that a kill costs nothing but time."""

import errno
import fcntl
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import webdataset

from msm_dist.config import Features
from msm_dist.data.audio import decode, to_int16
from msm_dist.data.clips import cut, find_files, unique_stems
from msm_dist.data.index import Official, load_index, members
from msm_dist.data.pack import PackSettings, pack
from msm_dist.errors import ConfigError, DataError
from msm_dist.features import CODE_LOW
from tests.audio_files import bad_files, encode, noise, write_audio
from tests.chaos.faulty import RENAME, Faulty, Where

SETTINGS = PackSettings(shard_clips=8, seed=1)


@pytest.fixture
def source(tmp_path) -> Path:
    """Two nested folders of twelve short FLAC files each, sorted by class."""
    for label in ("cat", "dog"):
        for i in range(12):
            clip = noise(2000 + 100 * i, seed=2 * i + (label == "dog"))
            write_audio(tmp_path / "source" / label / f"{label}{i:02d}.flac", clip)
    return tmp_path / "source"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def packed(out: Path) -> list[tuple[str, np.ndarray, dict]]:
    """(key, samples, json) in the order of the shards, read by the sidecars' offsets and by tarfile."""
    clips = []
    for shard in load_index(str(out)).shards:
        content = shard.path.read_bytes()
        with tarfile.open(shard.path) as tar:
            assert [member.mtime + member.uid + member.gid for member in tar] == [0] * (2 * shard.clips)
            for row in members(shard):
                key = row["key"].decode()
                encoded = content[row["offset"] : row["offset"] + row["size"]]
                assert encoded == tar.extractfile(f"{key}.flac").read()
                samples = to_int16(decode(encoded, 16000))
                assert (len(samples), row["rate"], row["format"]) == (row["samples"], 16000, b"flac")
                clips.append((key, samples, json.load(tar.extractfile(f"{key}.json"))))
    return clips


def report(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())


def test_every_file_is_packed_once_with_its_samples_and_origin(source, tmp_path):
    index = pack(source, tmp_path / "out", SETTINGS)
    assert (index.num_clips, index.sample_rate, [shard.clips for shard in index.shards]) == (
        24,
        16000,
        [8, 8, 8],
    )
    assert [shard.name for shard in index.shards] == [f"source-{i:06d}.tar" for i in range(3)]
    clips = packed(tmp_path / "out")
    assert len({key for key, _, _ in clips}) == 24
    for key, samples, info in clips:
        file = info["origin"]["file"]
        assert key == file.replace("/", "_").replace(".flac", "_0")
        np.testing.assert_array_equal(samples, soundfile.read(source / file, dtype="int16")[0])
    assert index.seconds == pytest.approx(sum(len(samples) for _, samples, _ in clips) / 16000)
    assert not (tmp_path / "out" / ".pack").exists()


def test_webdataset_reads_the_shards(source, tmp_path):
    pack(source, tmp_path / "out", SETTINGS)
    samples = list(webdataset.WebDataset(str(tmp_path / "out" / "source-{000000..000002}.tar"), shardshuffle=False))
    assert len(samples) == 24
    assert all({"flac", "json", "__key__"} <= set(sample) for sample in samples)


def test_order_is_a_seeded_permutation_over_all_files(source, tmp_path):
    orders = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        pack(source, tmp_path / name, replace(SETTINGS, seed=seed))
        orders[name] = [key for key, _, _ in packed(tmp_path / name)]
    assert orders["a"] == orders["b"]
    assert orders["a"] != orders["c"]
    assert sorted(orders["a"]) == sorted(orders["c"]) != orders["a"]
    for first in (0, 8, 16):
        assert len({key[:3] for key in orders["a"][first : first + 8]}) == 2


def test_any_codec_rate_and_channel_count_becomes_16_khz_mono(tmp_path):
    source = tmp_path / "source"
    for codec, suffix, rate, channels in [
        ("wav", "wav", 44100, 2),
        ("float.wav", "WAV", 22050, 1),
        ("ogg", "ogg", 48000, 6),
        ("mp3", "mp3", 32000, 2),
        ("flac24", "flac", 8000, 1),
        ("flac", "wav", 16000, 1),
    ]:
        clip = noise(rate, channels=channels)
        write_audio(source / f"{codec.replace('.', '-')}{rate}.{suffix}", clip, codec, rate)
    write_audio(source / ".hidden.wav", noise(16000), "wav")
    (source / "notes.txt").write_text("no audio")
    index = pack(source, tmp_path / "out", SETTINGS)
    assert index.num_clips == 6
    for _, samples, info in packed(tmp_path / "out"):
        assert len(samples) == 16000
        assert samples.any()
        assert info["origin"]["seconds"] == 1
        assert str(info["origin"]["sample_rate"]) in info["origin"]["file"]


def test_long_recording_is_cut_and_nothing_of_it_is_lost(tmp_path):
    recording = noise(16000 * 5 + 12000)
    write_audio(tmp_path / "source" / "long.flac", recording)
    index = pack(tmp_path / "source", tmp_path / "out", replace(SETTINGS, segment_seconds=2.0))
    clips = sorted(packed(tmp_path / "out"), key=lambda clip: clip[2]["origin"]["start_seconds"])
    assert [key for key, _, _ in clips] == ["long_0", "long_2000", "long_4000"]
    np.testing.assert_array_equal(np.concatenate([samples for _, samples, _ in clips]), recording)
    assert index.seconds == 5.75


@pytest.mark.parametrize(
    ("seconds", "pieces"),
    [
        (9.0, [9.0]),
        (10.0, [10.0]),
        (10.99, [10.99]),
        (11.0, [10.0, 1.0]),
        (20.0, [10.0, 10.0]),
        (20.5, [10.0, 10.5]),
        (21.5, [10.0, 10.0, 1.5]),
    ],
)
def test_tail_under_a_second_joins_the_last_piece(seconds, pieces):
    found = cut(round(seconds * 44100), 44100, 10.0)
    assert [(stop - start) / 44100 for start, stop in found] == pytest.approx(pieces)


def test_keys_are_unique_and_safe_in_a_webdataset_tar(tmp_path):
    files = [
        "a.b/c d.wav",
        "a_b/c_d.wav",
        "a_b/c_d.flac",
        "猫/鳴き声.wav",
        "犬/鳴き声.wav",
        "x" * 120 + ".ogg",
    ]
    stems = unique_stems(files)
    assert len(set(stems.values())) == len(files)
    assert all(set(stem) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-") for stem in stems.values())
    assert max(map(len, stems.values())) <= 72
    assert unique_stems(files[::-1]) == stems
    for file in files:
        write_audio(tmp_path / "source" / file, noise(1000), "wav")
    pack(tmp_path / "source", tmp_path / "out", SETTINGS)
    assert {info["origin"]["file"] for _, _, info in packed(tmp_path / "out")} == set(files)


def test_bad_files_are_left_out_with_their_reasons(source, tmp_path):
    for name, (content, _) in bad_files().items():
        (source / "dog" / name).write_bytes(content)
    (source / "gone.wav").symlink_to(source / "nowhere.wav")
    os.mkfifo(source / "pipe.wav")
    index = pack(source, tmp_path / "out", SETTINGS)
    assert index.num_clips == 24
    expected = {f"dog/{name}": reason for name, (_, reason) in bad_files().items()}
    expected |= {"gone.wav": "unreadable", "pipe.wav": "unreadable"}
    left_out = report(tmp_path / "out")["left_out"]
    assert {entry["file"]: entry["reason"] for entry in left_out} == expected
    assert [entry["file"] for entry in left_out] == sorted(expected)
    assert report(tmp_path / "out")["reasons"]["undecodable"] == list(expected.values()).count("undecodable")
    assert len(packed(tmp_path / "out")) == 24


def test_long_recording_that_is_cut_off_is_left_out_at_once(source, tmp_path):
    path = write_audio(source / "long.flac", noise(16000 * 30))
    path.write_bytes(path.read_bytes()[:-20000])
    pack(source, tmp_path / "out", replace(SETTINGS, segment_seconds=2.0))
    assert [entry["file"] for entry in report(tmp_path / "out")["left_out"]] == ["long.flac"]


def test_shard_without_a_good_clip_is_not_listed(tmp_path):
    write_audio(tmp_path / "source" / "good.wav", noise(4000), "wav")
    (tmp_path / "source" / "nan.wav").write_bytes(bad_files()["nan.wav"][0])
    index = pack(tmp_path / "source", tmp_path / "out", replace(SETTINGS, shard_clips=1))
    assert [shard.clips for shard in index.shards] == [1]
    assert len(list((tmp_path / "out").glob("*.tar"))) == 1


def test_statistics_are_those_of_every_value_of_the_log_mel(source, tmp_path):
    import torch

    from msm_dist.features import LogMel

    write_audio(source / "long.flac", noise(16000 * 70) // 100)
    index = pack(source, tmp_path / "out", replace(SETTINGS, segment_seconds=3600.0))
    log_mel = LogMel(Features())
    values = [log_mel(torch.from_numpy(s)[None], centred=True)[0, 0].double().numpy() for _, s, _ in packed(index.root)]
    values = np.concatenate(values, axis=1)
    assert index.mean == pytest.approx(values.mean(), abs=1e-9)
    assert index.std == pytest.approx(values.std(), abs=1e-9)
    np.testing.assert_allclose(index.mel_mean, values.mean(axis=1), atol=1e-9)
    assert index.features == Features().front_end()


@pytest.fixture
def audioset(source, tmp_path) -> PackSettings:
    rows = [f'cat{i:02d}, 0.0, 1.0, "/m/cat"' for i in range(6)] + [
        'dog03, 0.0, 1.0, "/m/dog,/m/cat"',
        'owl, 0, 1, "/m/cat"',
    ]
    (tmp_path / "segments.csv").write_text("\n".join(["# YTID, start_seconds, end_seconds, labels", *rows]))
    (tmp_path / "classes.csv").write_text("index,mid,display_name\n0,/m/cat,Cat\n1,/m/dog,Dog\n")
    return replace(SETTINGS, csv=(tmp_path / "segments.csv",), labels=tmp_path / "classes.csv")


def test_audioset_csv_selects_and_labels(source, tmp_path, audioset):
    pack(source, tmp_path / "out", audioset)
    clips = {key: info for key, _, info in packed(tmp_path / "out")}
    assert set(clips) == {f"cat_cat{i:02d}_0" for i in range(6)} | {"dog_dog03_0"}
    assert (clips["dog_dog03_0"]["labels"], clips["dog_dog03_0"]["names"]) == (
        ["/m/dog", "/m/cat"],
        ["Dog", "Cat"],
    )
    found = report(tmp_path / "out")
    assert (found["files"], found["files_not_in_csv"], found["csv_clips_without_file"]) == (24, 17, 1)


def test_csv_that_fits_nothing_is_an_error(source, tmp_path, audioset):
    (tmp_path / "classes.csv").write_text("index,mid,display_name\n0,/m/cat,Cat\n")
    with pytest.raises(DataError, match="'/m/dog'"):
        pack(source, tmp_path / "out", audioset)
    (tmp_path / "segments.csv").write_text('elsewhere, 0.0, 1.0, "/m/cat"\n')
    with pytest.raises(DataError, match=r"elsewhere\.wav"):
        pack(source, tmp_path / "out", audioset)
    assert not (tmp_path / "out").exists()


def test_folder_without_usable_audio_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        pack(tmp_path / "missing", tmp_path / "out", SETTINGS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no audio"):
        pack(tmp_path / "empty", tmp_path / "out", SETTINGS)
    for name in ("text.wav", "nan.wav"):
        (tmp_path / "bad").mkdir(exist_ok=True)
        (tmp_path / "bad" / name).write_bytes(bad_files()[name][0])
    with pytest.raises(DataError, match="none of its clips decodes") as fault:
        pack(tmp_path / "bad", tmp_path / "out", SETTINGS)
    assert "text.wav: undecodable" in str(fault.value)
    assert "nan.wav: non_finite" in str(fault.value)
    (tmp_path / "bad" / "nan.wav").unlink()
    with pytest.raises(DataError, match=r"none of its 1 files can be used:\n  text.wav: undecodable"):
        pack(tmp_path / "bad", tmp_path / "out2", SETTINGS)


def test_silent_folder_has_no_statistics(tmp_path):
    write_audio(tmp_path / "source" / "silence.wav", np.zeros(4000, np.int16), "wav")
    with pytest.raises(DataError, match="silent"):
        pack(tmp_path / "source", tmp_path / "out", SETTINGS)


def test_index_says_how_many_official_clips_it_holds(source, tmp_path, audioset):
    (source / "cat" / "cat01.flac").write_bytes(bad_files()["truncated.flac"][0])
    index = pack(source, tmp_path / "out", audioset)
    found = sorted(["cat00", "cat02", "cat03", "cat04", "cat05", "dog03"])
    digest = hashlib.sha256("".join(f"{name}\n" for name in found).encode()).hexdigest()
    assert index.official == Official(("segments.csv",), 8, 6, digest)
    assert load_index(str(tmp_path / "out")).official == index.official
    assert report(tmp_path / "out")["official"] == json.loads(json.dumps(asdict(index.official)))


def test_evaluation_segments_are_left_out_unless_asked_for(source, tmp_path, audioset):
    table = tmp_path / "eval_segments.csv"
    table.write_text('cat02, 0, 1, "/m/cat"\ndog07, 0, 1, "/m/cat"\n')
    pack(source, tmp_path / "out", audioset)
    left_out = report(tmp_path / "out")["left_out"]
    expected = [("cat/cat02.flac", "evaluation"), ("dog/dog07.flac", "evaluation")]
    assert [(entry["file"], entry["reason"]) for entry in left_out] == expected
    assert pack(source, tmp_path / "kept", replace(audioset, keep_evaluation=True)).num_clips == 7
    both = replace(audioset, csv=(*audioset.csv, table))
    assert pack(source, tmp_path / "both", both).num_clips == 8
    without = replace(SETTINGS, eval_csv=table)
    assert pack(source, tmp_path / "without", without).num_clips == 22
    assert report(tmp_path / "without")["evaluation_told_apart"] is True


def test_duplicates_and_other_segments_are_reported(source, tmp_path, audioset):
    write_audio(source / "again" / "Ycat00.flac", noise(4000))
    write_audio(source / "dog03_30000_40000.flac", noise(4000))
    pack(source, tmp_path / "out", audioset)
    reasons = {entry["file"]: entry["reason"] for entry in report(tmp_path / "out")["left_out"]}
    assert reasons == {"cat/cat00.flac": "duplicate", "dog03_30000_40000.flac": "other_segment"}


def test_loud_clip_is_scaled_as_a_whole_and_its_gain_is_kept(tmp_path):
    wave = 0.9 * np.sin(np.arange(16000) * 0.1)
    for name, peak in (("loud", 2.0), ("quiet", 0.5)):
        path = tmp_path / "source" / f"{name}.wav"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, wave * peak, 16000, subtype="FLOAT")
    pack(tmp_path / "source", tmp_path / "out", SETTINGS)
    clips = {key: (samples, info) for key, samples, info in packed(tmp_path / "out")}
    samples, info = clips["loud_0"]
    assert info["gain"] == pytest.approx(1 / 1.8, rel=1e-3)
    np.testing.assert_allclose(samples / 32768, wave * 2 * info["gain"], atol=2e-5)
    assert "gain" not in clips["quiet_0"][1]
    assert report(tmp_path / "out")["scaled_to_full_scale"] == 1


def test_wav_cut_in_half_is_left_out(source, tmp_path):
    content = encode(noise(16000), "wav")
    (source / "half.wav").write_bytes(content[: len(content) // 2])
    pack(source, tmp_path / "out", SETTINGS)
    (entry,) = report(tmp_path / "out")["left_out"]
    assert (entry["file"], entry["reason"]) == ("half.wav", "truncated")


def test_damaged_ogg_page_is_found_in_a_file_too(source, tmp_path):
    content = bytearray(encode(noise(160000), "ogg"))
    content[len(content) // 2] ^= 0xFF
    (source / "damaged.ogg").write_bytes(bytes(content))
    pack(source, tmp_path / "out", SETTINGS)
    (entry,) = report(tmp_path / "out")["left_out"]
    assert (entry["file"], entry["reason"]) == ("damaged.ogg", "undecodable")


def test_log_mels_are_those_of_the_clips_that_audio_shards_hold(source, tmp_path):
    import torch

    from msm_dist.features import LogMel

    audio = pack(source, tmp_path / "audio", SETTINGS)
    index = pack(source, tmp_path / "out", replace(SETTINGS, kind="logmel"))
    assert (index.kind, index.num_clips, index.seconds) == ("logmel", 24, audio.seconds)
    front_end, values = LogMel(Features()), []
    clips = {key: samples for key, samples, _ in packed(tmp_path / "audio")}
    for shard in index.shards:
        with tarfile.open(shard.path) as tar:
            for row in members(shard):
                key = row["key"].decode()
                content = tar.extractfile(f"{key}.logmel.npy").read()
                assert (len(content), row["format"]) == (row["size"], b"logmel")
                codes = np.load(io.BytesIO(content), allow_pickle=False)[: 1 + len(clips[key]) // 160]
                stored = codes * front_end.code_step + CODE_LOW
                exact = front_end(torch.from_numpy(clips.pop(key)[None]), centred=True)[0, 0].numpy().T
                assert np.abs(stored - exact).max() <= front_end.code_step / 2 + 1e-3
                values.append(stored)
                assert json.load(tar.extractfile(f"{key}.json"))["origin"]
    assert not clips
    values = np.concatenate(values)
    assert index.mean == pytest.approx(values.mean(), abs=1e-9)
    assert index.std == pytest.approx(values.std(), abs=1e-9)
    np.testing.assert_allclose(index.mel_mean, values.mean(axis=0), atol=1e-9)


def test_folder_of_tars_is_sent_to_data_index(source, tmp_path):
    pack(source, tmp_path / "out", SETTINGS)
    with pytest.raises(DataError, match=r"3 tar shards are packed already.*msm-dist data index .*out/\*\.tar"):
        pack(tmp_path / "out", tmp_path / "again", SETTINGS)
    (tmp_path / "out" / "index.json").unlink()
    with pytest.raises(DataError, match=r"3 tar shards hold the audio.*without a copy"):
        pack(tmp_path / "out", tmp_path / "again", SETTINGS)


@pytest.mark.parametrize("stop", (2, 7))
def test_log_mels_stopped_on_the_way_continue_to_the_same_bytes(source, tmp_path, monkeypatch, stop):
    settings = replace(SETTINGS, kind="logmel")
    pack(source, tmp_path / "undisturbed", settings)
    rename, names = Path.replace, []

    def stopping(path, target):
        names.append(target)
        if len(names) == stop:
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "replace", stopping)
        pack(source, tmp_path / "out", settings)
    pack(source, tmp_path / "out", settings)
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shard_clips": 0}, "--shard-clips = 0"),
        ({"segment_seconds": 0.5}, "--segment-seconds = 0.5"),
        ({"segment_seconds": float("nan")}, "--segment-seconds = nan"),
        ({"seed": -1}, "--seed = -1"),
        ({"name": "../x"}, "--name = ../x"),
        ({"labels": Path("x.csv")}, "--labels = x.csv"),
        ({"eval_csv": Path("x.csv"), "keep_evaluation": True}, "--eval-csv = x.csv leaves its clips out"),
    ],
)
def test_impossible_settings_are_refused(source, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        pack(source, tmp_path / "out", replace(SETTINGS, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 2}, "seed was 1, is 2"),
        ({"shard_clips": 4}, "shard_clips was 8, is 4"),
        ({"segment_seconds": 5.0}, "segment_seconds was 10.0, is 5.0"),
        ({"name": "x"}, "first_shard was source-000000.tar, is x-000000.tar"),
        ({"features": Features(n_mels=64)}, "features was"),
        ({"kind": "logmel"}, "kind was audio, is logmel"),
    ],
)
def test_folder_packed_with_other_settings_is_left_alone(source, tmp_path, changes, message):
    pack(source, tmp_path / "out", SETTINGS)
    before = contents(tmp_path / "out")
    with pytest.raises(ConfigError, match=message):
        pack(source, tmp_path / "out", replace(SETTINGS, **changes))
    assert contents(tmp_path / "out") == before


def test_folder_packed_from_other_audio_is_left_alone(source, tmp_path):
    pack(source, tmp_path / "out", SETTINGS)
    write_audio(source / "new.wav", noise(4000), "wav")
    with pytest.raises(ConfigError, match="audio files or labels differ"):
        pack(source, tmp_path / "out", SETTINGS)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.tar").write_bytes(b"x")
    with pytest.raises(ConfigError, match="not packed by this command"):
        pack(source, tmp_path / "other", SETTINGS)


def test_finished_pack_is_not_done_again(source, tmp_path):
    first = pack(source, tmp_path / "out", SETTINGS)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert pack(source, tmp_path / "out", SETTINGS) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == times
    first.shards[0].path.write_bytes(b"damaged")
    with pytest.raises(DataError, match="(?s)7 bytes.*remove"):
        pack(source, tmp_path / "out", SETTINGS)


def test_two_packs_do_not_share_a_folder(source, tmp_path):
    pack(source, tmp_path / "out", SETTINGS)
    with open(tmp_path / "out" / "pack.json") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another pack"):
            pack(source, tmp_path / "out", SETTINGS)


def test_full_disk_is_a_clear_error_and_the_same_call_continues(source, tmp_path, monkeypatch):
    pack(source, tmp_path / "undisturbed", SETTINGS)
    sync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 6:
            raise OSError(errno.ENOSPC, "No space left on device", "the/shard")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="the/shard: No space left on device"):
        pack(source, tmp_path / "out", SETTINGS)
    with pytest.raises(DataError, match="unfinished"):
        load_index(str(tmp_path / "out"))
    monkeypatch.setattr(os, "fsync", sync)
    pack(source, tmp_path / "out", SETTINGS)
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("stop", range(1, 12))
def test_pack_stopped_before_any_rename_continues_to_the_same_bytes(source, tmp_path, monkeypatch, stop):
    undisturbed = pack(source, tmp_path / "undisturbed", SETTINGS)
    rename, names = Path.replace, []

    def stopping(path, target):
        names.append(Path(target).name)
        if len(names) == stop:
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "replace", stopping)
        pack(source, tmp_path / "out", SETTINGS)
    assert not (tmp_path / "out" / "index.json").exists()
    assert pack(source, tmp_path / "out", SETTINGS).digest == undisturbed.digest
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


def descendants(pid: int) -> set[int]:
    found = {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
    return found.union(*map(descendants, found))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_killed_pack_continues_to_the_same_bytes_and_leaves_no_process(source, tmp_path):
    for i in range(48):
        write_audio(source / f"more{i}.wav", noise(16000 * 9, seed=i), "wav")
    settings = replace(SETTINGS, shard_clips=4)
    pack(source, tmp_path / "undisturbed", settings)
    out = tmp_path / "out"
    arguments = ["data", "pack", source, out, "--shard-clips", "4", "--seed", "1", "--workers", "2"]
    faulty = Faulty(tmp_path)
    # Each worker waits before a record gets its name, but for the first one to come there.
    hold = faulty.pause(Where(RENAME, f"{out}/.pack/*.json.*", passed=1))
    process = subprocess.Popen(
        [sys.executable, "-m", "msm_dist", *map(str, arguments)],
        env=os.environ | faulty.environment,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not (hold.is_reached(2) and list((out / ".pack").glob("*.json"))):
            assert process.poll() is None
            time.sleep(0.005)
        started = descendants(process.pid)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    deadline = time.monotonic() + 300
    while any(map(is_running, started)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(started) >= 3
    assert not any(map(is_running, started))
    with pytest.raises(DataError, match="unfinished"):
        load_index(str(out))
    finished = {path.stem: (out / path.stem).stat().st_ino for path in (out / ".pack").glob("*.json")}
    pack(source, out, settings)
    assert contents(out) == contents(tmp_path / "undisturbed")
    assert 0 < len(finished) < 18
    assert {name: (out / name).stat().st_ino for name in finished} == finished


def test_linked_folders_are_followed_and_loops_are_not(tmp_path):
    write_audio(tmp_path / "elsewhere" / "deep" / "a.wav", noise(16000), "wav")
    write_audio(tmp_path / "source" / "b.wav", noise(17000), "wav")
    (tmp_path / "source" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "source" / "again").symlink_to(tmp_path / "source")
    (tmp_path / "elsewhere" / "deep" / "up").symlink_to(tmp_path / "elsewhere")
    assert find_files(tmp_path / "source", {".wav"}) == ["b.wav", "link/deep/a.wav"]
    assert pack(tmp_path / "source", tmp_path / "out", PackSettings()).num_clips == 2


def test_folder_that_can_not_be_listed_stops_the_pack(tmp_path, monkeypatch):
    for name in ("a", "b"):
        write_audio(tmp_path / "source" / name / "x.wav", noise(16000), "wav")
    real = os.scandir

    def scandir(path):
        if str(path).endswith("/b"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match="source/b: can't be listed .Permission denied.; mend that"):
        pack(tmp_path / "source", tmp_path / "out", PackSettings())
    assert not (tmp_path / "out").exists()


def test_leftovers_of_a_killed_pack_are_removed(source, tmp_path):
    out = tmp_path / "out"
    pack(source, out, PackSettings())
    expected = sorted(path.name for path in out.iterdir())
    (out / "index.json").unlink()
    (out / "x.tar.tmp").write_bytes(b"half")
    pack(source, out, PackSettings())
    assert sorted(path.name for path in out.iterdir()) == expected
