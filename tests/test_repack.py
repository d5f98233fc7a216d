"""Log-mel shards from audio shards: the same order, what training sees, kills, damage."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from msm_dist.config import Features
from msm_dist.data.audio import decode
from msm_dist.data.crops import CropReader, Source
from msm_dist.data.index import load_index, members
from msm_dist.data.plan import make_plan
from msm_dist.data.repack import repack
from msm_dist.data.shards import index_shards
from msm_dist.errors import ConfigError, DataError
from msm_dist.features import CODE_STEP, LogMel
from tests.audio_files import encode, noise
from tests.processes import HERE
from tests.shards import damage_clip, noise_clips, write_corpus

FEATURES = Features()
FRAMES = 16


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def source_of(index, crops_per_clip=2):
    plan = make_plan([shard.clips for shard in index.shards], 7, None, 4, 16, crops_per_clip)
    return Source(plan, index, FEATURES, FRAMES)


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def audio(tmp_path_factory):
    """Three shards: two rates, three codecs, json members."""
    folder = tmp_path_factory.mktemp("corpus") / "audio"
    folder.mkdir()
    for i in range(42):
        samples, rate = noise(3400 + 211 * i, seed=i), 22050 if i % 7 == 0 else 16000
        codec = ("flac", "wav", "mp3")[i % 3]
        with tarfile.open(folder / f"sounds-{i // 14}.tar", "a") as tar:
            add(tar, f"sound{i}.{codec}", encode(samples, codec, rate))
            add(tar, f"sound{i}.json", json.dumps({"labels": [i]}).encode())
    index_shards(sorted(folder.glob("*.tar")), FEATURES)
    return folder


@pytest.fixture(scope="module")
def stored(audio):
    return repack(audio, audio.parent / "logmel", FEATURES)


def test_the_shards_hold_the_same_clips_in_the_same_order(audio, stored):
    index = load_index(str(audio))
    assert (stored.kind, stored.made_from, stored.num_clips) == ("logmel", index.digest, 42)
    assert stored == load_index(str(audio.parent / "logmel"))
    assert stored.digest != index.digest and stored.seconds == index.seconds
    for made, shard in zip(stored.shards, index.shards, strict=True):
        assert (made.name, made.clips) == (shard.name, shard.clips)
        rows, other = members(made), members(shard)
        for field in ("key", "samples", "rate"):
            np.testing.assert_array_equal(rows[field], other[field])
        assert set(rows["format"]) == {b"logmel"}
        with tarfile.open(made.path) as tar, tarfile.open(shard.path) as old:
            for row in rows:
                key = row["key"].decode()
                assert tar.getmember(f"{key}.logmel.npy").offset_data == row["offset"]
                assert tar.extractfile(f"{key}.json").read() == old.extractfile(f"{key}.json").read()


def test_statistics_are_those_of_the_stored_values(audio, stored):
    values = []
    for shard in stored.shards:
        content = shard.path.read_bytes()
        for row in members(shard):
            codes = np.load(io.BytesIO(content[row["offset"] :][: row["size"]]), allow_pickle=False)
            values.append(LogMel(FEATURES)(torch.from_numpy(codes[None, :-4]))[0, 0].double())
    values = torch.cat(values, dim=1)
    assert stored.mean == pytest.approx(values.mean().item(), abs=1e-5)
    assert stored.std == pytest.approx(values.std().item(), abs=1e-4)
    np.testing.assert_allclose(stored.mel_mean, values.mean(1), atol=1e-5)
    assert stored.mean == pytest.approx(load_index(str(audio)).mean, abs=0.002)


def test_a_run_reads_the_same_samples_from_both(audio, stored):
    of_audio, of_logmel = CropReader(source_of(load_index(str(audio)))), CropReader(source_of(stored))
    front_end, short = LogMel(FEATURES), 0
    for n in range(30):
        one, other = of_audio.blocks([n, n + 1]), of_logmel.blocks([n, n + 1])
        np.testing.assert_array_equal(one.sample_ids, other.sample_ids)
        np.testing.assert_array_equal(one.offsets, other.offsets)
        assert one.keys == other.keys and other.values.dtype == np.uint8
        difference = front_end(torch.from_numpy(one.values)) - front_end(torch.from_numpy(other.values))
        assert difference.abs().max() <= CODE_STEP / 2 + 1e-5
        short += (other.values[:, -1] == 0).all(axis=1).sum()
    assert short == 0  # clips are longer than a crop here; test_logmel.py has the others


def test_webdataset_reads_the_shards(stored):
    dataset = webdataset.WebDataset([str(stored.shards[0].path)], shardshuffle=False)
    sample = next(iter(dataset))
    row = members(stored.shards[0])[0]
    assert sample["__key__"] == row["key"].decode()
    assert np.load(io.BytesIO(sample["logmel.npy"]), allow_pickle=False).dtype == np.uint8
    assert json.loads(sample["json"]) == {"labels": [0]}


def test_foreign_tars_with_folders_and_without_json_are_repacked(tmp_path):
    tmp_path.joinpath("audio").mkdir()
    long = "folder/" + "n" * 90
    for number in range(2):
        with tarfile.open(tmp_path / "audio" / f"{number}.tar", "w") as tar:
            for name in ("same.wav", f"{long}.flac", "notes.txt", "c.d.flac"):
                content = encode(noise(4000, seed=number), "wav" if name.endswith("wav") else "flac")
                add(tar, name, content)
    index = index_shards(sorted((tmp_path / "audio").glob("*.tar")), FEATURES)
    made = repack(tmp_path / "audio", tmp_path / "logmel", FEATURES)
    for new, old in zip(made.shards, index.shards, strict=True):
        np.testing.assert_array_equal(members(new)["key"], members(old)["key"])
        with tarfile.open(new.path) as tar:
            assert tar.getnames() == [f"{name}.logmel.npy" for name in ("same", long, "c.d")]
            assert [member.offset_data for member in tar] == members(new)["offset"].tolist()


def test_workers_make_the_same_bytes(audio, stored, tmp_path):
    repack(audio, tmp_path / "two", FEATURES, workers=2)
    assert content_of(tmp_path / "two") == content_of(stored.root)


def test_a_killed_call_is_continued_without_making_shards_anew(audio, stored, tmp_path):
    out = tmp_path / "logmel"
    script = (
        "import itertools, sys, time; from pathlib import Path; from msm_dist.config import Features\n"
        "from msm_dist.data import repack\n"
        "make, calls = repack.clip_codes, itertools.count()\n"
        # Without end in the second shard of 14 clips.
        "repack.clip_codes = lambda *a: make(*a) if next(calls) < 20 else time.sleep(600)\n"
        "repack.repack(Path(sys.argv[1]), Path(sys.argv[2]), Features())\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script, str(audio), str(out)], cwd=HERE.parent)
    deadline = time.monotonic() + 500
    while not list(out.glob(".pack/*.json")):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (out / "index.json").exists()
    finished = {path: os.stat(path).st_mtime_ns for path in out.glob("*.tar")}
    assert finished and len(finished) < len(stored.shards)
    assert repack(audio, out, FEATURES) == load_index(str(out))
    assert content_of(out) == content_of(stored.root)
    recorded = {path for path in finished if os.stat(path).st_mtime_ns == finished[path]}
    assert recorded
    again = {path: os.stat(path).st_mtime_ns for path in out.iterdir()}
    repack(audio, out, FEATURES)
    assert again == {path: os.stat(path).st_mtime_ns for path in out.iterdir()}


def test_a_damaged_shard_is_named_and_not_repacked(tmp_path):
    index = write_corpus(tmp_path / "audio", noise_clips(6), clips_per_shard=3)
    damage_clip(index, 4)
    with pytest.raises(
        DataError, match=r"noise-000001.tar: sha256 \w+, index.json says \w+; restore it: see `msm-dist"
    ):
        repack(tmp_path / "audio", tmp_path / "logmel", FEATURES)
    assert not (tmp_path / "logmel" / "index.json").exists()


def test_a_clip_that_no_longer_decodes_moves_no_other(tmp_path, monkeypatch):
    write_corpus(tmp_path / "audio", noise_clips(6), clips_per_shard=3)

    def shorter(encoded, rate):
        return decode(encoded, rate)[:-1]

    monkeypatch.setattr("msm_dist.data.repack.decode", shorter)
    with pytest.raises(DataError, match=r"noise-000000.tar: clip-0000: \d+ samples, its sidecar says .* data verify"):
        repack(tmp_path / "audio", tmp_path / "logmel", FEATURES)
    assert not list((tmp_path / "logmel").glob("*.tar"))


def test_a_folder_of_something_else_is_refused(audio, stored, tmp_path):
    with pytest.raises(ConfigError, match="features was .* choose another output"):
        repack(audio, stored.root, Features(n_mels=64))
    with pytest.raises(ConfigError, match="holds shards that were not packed by this command"):
        write_corpus(tmp_path / "other", noise_clips(3), clips_per_shard=3)
        repack(audio, tmp_path / "other", FEATURES)
    with pytest.raises(DataError, match="its clips are stored log-mels already"):
        repack(stored.root, tmp_path / "again", FEATURES)
