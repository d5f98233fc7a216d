"""Labelled subsets of packed shards: the listed clips with the table's labels, byte for byte."""

import hashlib
import json
import tarfile
from dataclasses import replace

import numpy as np
import pytest

from msm_dist.config import Features
from msm_dist.data.contents import MAX_JSON_BYTES, stored_clips
from msm_dist.data.index import Official, load_index, members
from msm_dist.data.pack import PackSettings, pack
from msm_dist.data.repack import repack
from msm_dist.data.shards import index_shards, measure_shards
from msm_dist.data.split import SplitSettings, split
from msm_dist.data.verify import verify_shards
from msm_dist.errors import ConfigError, DataError
from tests.audio_files import encode, noise, write_audio
from tests.bad_clips import break_clip
from tests.test_data_commands import run
from tests.test_shards import write_tar

CLASSES = "index,mid,display_name\n0,/m/cat,Cat\n1,/m/dog,Dog\n"
LISTED = {f"clip{i:02d}_-aZ9": ("/m/cat",) if i % 2 else ("/m/cat", "/m/dog") for i in range(0, 24, 3)}
ABSENT = ("nowhere_A01", "nowhere_B02")


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """The same 24 clips as audio and as log-mels, and a table of eight of them and two others."""
    folder = tmp_path_factory.mktemp("corpora")
    for i in range(24):
        name = f"Yclip{i:02d}_-aZ9.flac" if i % 3 else f"clip{i:02d}_-aZ9_30.000.flac"
        write_audio(folder / "files" / f"{i % 4}" / name, noise(8000 + 100 * i, seed=i))
    pack(folder / "files", folder / "audio", PackSettings(shard_clips=7))
    repack(folder / "audio", folder / "mels", Features())
    rows = [f'{ytid}, 30.000, 40.000, "{",".join(labels)}"' for ytid, labels in LISTED.items()]
    rows += [f'{ytid}, 0.000, 10.000, "/m/dog"' for ytid in ABSENT]
    (folder / "own_segments.csv").write_text("# YTID, start_seconds, end_seconds, positive_labels\n" + "\n".join(rows))
    (folder / "classes.csv").write_text(CLASSES)
    return folder


def contents(index) -> dict[str, tuple[bytes, dict]]:
    """(member, json) by key, in the order of the shards."""
    found = {}
    for shard in index.shards:
        content = shard.path.read_bytes()
        for clip in stored_clips(shard):
            begin = int(clip.row["offset"])
            found[clip.key] = content[begin : begin + int(clip.row["size"])], clip.description
    return found


@pytest.mark.parametrize("kind", ["audio", "mels"])
def test_a_subset_has_the_listed_clips_byte_for_byte_with_the_tables_labels(corpora, tmp_path, kind):
    source = load_index(str(corpora / kind))
    settings = SplitSettings(corpora / "own_segments.csv", corpora / "classes.csv", shard_clips=3)
    made = split(str(corpora / kind), tmp_path / "out", settings)
    assert load_index(str(tmp_path / "out")) == made
    assert verify_shards(made, decode_clips=True) == []
    assert (made.kind, made.num_clips, [shard.clips for shard in made.shards]) == (source.kind, 8, [3, 3, 2])
    assert [shard.name for shard in made.shards] == [f"own_segments-{i:06d}.tar" for i in range(3)]
    before, after = contents(source), contents(made)
    assert list(after) == [key for key in before if key in after], "the corpus' order"
    for key, (member, description) in after.items():
        ytid = description["segment"]["ytid"]
        assert ytid in key and member == before[key][0]
        assert tuple(description["labels"]) == LISTED[ytid]
        assert description["names"] == [{"/m/cat": "Cat", "/m/dog": "Dog"}[label] for label in LISTED[ytid]]
        assert description["origin"] == before[key][1]["origin"]
    assert {d["segment"]["ytid"] for _, d in after.values()} == set(LISTED)
    manifest = hashlib.sha256("".join(f"{ytid}\n" for ytid in sorted(LISTED)).encode()).hexdigest()
    assert made.official == Official(("own_segments.csv",), 10, 8, manifest)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["missing"], report["csv_clips_without_clip"], report["left_out"]) == (list(ABSENT), 2, [])
    assert report["split_from"] == source.digest


def test_statistics_are_those_of_the_subset(corpora, tmp_path):
    settings = SplitSettings(corpora / "own_segments.csv")
    audio = split(str(corpora / "audio"), tmp_path / "audio", settings)
    measured = measure_shards(audio, Features())
    assert (measured.mean, measured.std, measured.mel_mean) == (audio.mean, audio.std, audio.mel_mean)
    assert audio.mean != load_index(str(corpora / "audio")).mean
    mels = split(str(corpora / "mels"), tmp_path / "mels", settings)
    assert repack(tmp_path / "audio", tmp_path / "again", Features()).mean == pytest.approx(mels.mean, abs=1e-12)
    assert mels.made_from == load_index(str(corpora / "audio")).digest


def test_the_same_call_again_and_other_workers_give_the_same_bytes(corpora, tmp_path):
    settings = SplitSettings(corpora / "own_segments.csv", shard_clips=3)
    first = split(str(corpora / "audio"), tmp_path / "a", settings)
    assert split(str(corpora / "audio"), tmp_path / "a", settings) == first
    second = split(str(corpora / "audio"), tmp_path / "b", settings, workers=2)
    assert [shard.sha256 for shard in second.shards] == [shard.sha256 for shard in first.shards]
    assert second.digest == first.digest and second.mean == first.mean


def test_a_split_that_was_cut_short_starts_again(corpora, tmp_path, monkeypatch):
    settings = SplitSettings(corpora / "own_segments.csv", shard_clips=3)
    whole = split(str(corpora / "audio"), tmp_path / "whole", settings)

    def stop(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("msm_dist.data.split.write_index", stop)
        with pytest.raises(KeyboardInterrupt):
            split(str(corpora / "audio"), tmp_path / "out", settings)
    with pytest.raises(DataError):
        load_index(str(tmp_path / "out"))
    for leftover in (tmp_path / "out" / "x.tmp", tmp_path / "out" / ".pack" / "own_segments-000009.tar.tmp"):
        leftover.parent.mkdir(exist_ok=True)
        leftover.write_bytes(b"cut short")
    again = split(str(corpora / "audio"), tmp_path / "out", settings)
    assert again.digest == whole.digest
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_another_table_or_corpus_does_not_go_into_the_same_folder(corpora, tmp_path):
    settings = SplitSettings(corpora / "own_segments.csv")
    split(str(corpora / "audio"), tmp_path / "out", settings)
    (tmp_path / "own_segments.csv").write_text(f'{next(iter(LISTED))}, 30.000, 40.000, "/m/dog"\n')
    with pytest.raises(ConfigError, match="labels differ"):
        split(str(corpora / "audio"), tmp_path / "out", replace(settings, csv=tmp_path / "own_segments.csv"))
    with pytest.raises(ConfigError, match="split_from"):
        split(str(corpora / "mels"), tmp_path / "out", settings)


def test_foreign_tars_are_split_by_their_keys(corpora, tmp_path):
    names = [f"train/{ytid}_30.wav" for ytid in LISTED] + ["train/other.wav", f"train/{next(iter(LISTED))}_70.wav"]
    tar = write_tar(tmp_path / "tars" / "a.tar", {name: encode(noise(8000, i), "wav") for i, name in enumerate(names)})
    index_shards([tar], Features())
    made = split(str(tmp_path / "tars"), tmp_path / "out", SplitSettings(corpora / "own_segments.csv"))
    assert [row["key"].decode() for row in members(made.shards[0])] == [f"train/{ytid}_30" for ytid in LISTED]
    with tarfile.open(made.shards[0].path) as written:
        assert [m.name for m in written][:2] == [f"train/{next(iter(LISTED))}_30.{end}" for end in ("wav", "json")]


def test_clips_that_are_cut_from_one_file_or_do_not_decode_are_reported(corpora, tmp_path):
    first, second, third = list(LISTED)[:3]
    write_audio(tmp_path / "files" / f"{first}.flac", noise(16000 * 25))
    for name in (second, third):
        write_audio(tmp_path / "files" / f"{name}.flac", noise(16000))
    source = pack(tmp_path / "files", tmp_path / "audio", PackSettings())
    keys = [row["key"].decode() for row in members(source.shards[0])]
    break_clip(source, next(i for i, key in enumerate(keys) if key.startswith(third)), "flipped")
    made = split(str(source.root), tmp_path / "out", SplitSettings(corpora / "own_segments.csv"))
    assert {row["key"].decode() for row in members(made.shards[0])} == {f"{first}_0", f"{second}_0"}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["reasons"] == {"duplicate": 2, "undecodable": 1}
    assert third in report["missing"]


ODD_JSON = {
    "huge": b'{"origin": {"start_seconds": 1' + b"0" * 400 + b"}}",
    "not_finite": b'{"origin": {"start_seconds": NaN, "gain": -Infinity, "peak": 1e999}}',
    "true": b'{"origin": {"start_seconds": true}}',
    "text": b'{"origin": {"start_seconds": "7", "file": 3}}',
    "surrogate": b'{"origin": {"file": "\\ud800x"}, "labels": ["\\ud800"]}',
    "list": b'[{"origin": 1}]',
    "origin_list": b'{"origin": [1]}',
    "deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "not_utf_8": b'{"origin": "\xff"}',
    "long": b'{"origin": {"start_seconds": 3}}' + b" " * MAX_JSON_BYTES,
}


def test_json_of_strangers_is_taken_for_what_it_says_and_no_more(tmp_path):
    ytids = {name: f"abcdefgh{i:03d}" for i, name in enumerate(ODD_JSON)}
    files = {}
    for name, content in ODD_JSON.items():
        files |= {f"{ytids[name]}.flac": encode(noise(4000)), f"{ytids[name]}.json": content}
    index = index_shards([write_tar(tmp_path / "tars" / "a.tar", files)], Features())
    stored = dict(zip(ODD_JSON, stored_clips(index.shards[0]), strict=True))
    assert [name for name, clip in stored.items() if not clip.description] == ["list", "deep", "not_utf_8", "long"]
    assert {clip.start_seconds for clip in stored.values()} == {0.0}
    assert stored["not_finite"].origin == {"start_seconds": None, "gain": None, "peak": None}
    (tmp_path / "own.csv").write_text("".join(f'{ytid}, 0, 10, "/m/cat"\n' for ytid in ytids.values()))
    made = split(str(tmp_path / "tars"), tmp_path / "out", SplitSettings(tmp_path / "own.csv"))
    assert [clip.description["labels"] for clip in stored_clips(made.shards[0])] == [["/m/cat"]] * len(ODD_JSON)
    assert verify_shards(made, decode_clips=True) == []


def test_clips_that_changed_since_they_were_packed_are_left_out(tmp_path):
    keys = ["abcdefgh000", "abcdefgh001"]
    long, short = encode(noise(8000), "wav"), encode(noise(4000), "wav")
    index = index_shards([write_tar(tmp_path / "a.tar", {f"{key}.wav": long for key in keys})], Features())
    row = members(index.shards[0])[1]
    with open(index.shards[0].path, "r+b") as tar:
        tar.seek(int(row["offset"]))
        tar.write(short)
    (tmp_path / "own.csv").write_text("".join(f'{key}, 0, 10, "/m/cat"\n' for key in keys))
    made = split(str(tmp_path), tmp_path / "out", SplitSettings(tmp_path / "own.csv"))
    assert [row["key"] for row in members(made.shards[0])] == [keys[0].encode()]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["reasons"] == {"changed": 1}


def test_the_file_a_clip_was_packed_from_decides_before_its_key_and_its_start_counts(tmp_path):
    listed, other, third = "abcdefgh000", "abcdefgh001", "abcdefgh002"
    origins = {"clip": f"{listed}_30.wav", "later": f"{other}_70.wav", f"{third}_70": 3}
    files = {}
    for key, file in origins.items():
        files |= {f"{key}.flac": encode(noise(4000)), f"{key}.json": json.dumps({"origin": {"file": file}}).encode()}
    # Of a clip that was packed the start in its key is one in its file, and says nothing of the video.
    files |= {f"{third}_20.flac": encode(noise(4000)), f"{third}_20.json": b'{"origin": {"file": "renamed.wav"}}'}
    index_shards([write_tar(tmp_path / "a.tar", files)], Features())
    (tmp_path / "own.csv").write_text("".join(f'{ytid}, 30, 40, "/m/cat"\n' for ytid in (listed, other, third)))
    made = split(str(tmp_path), tmp_path / "out", SplitSettings(tmp_path / "own.csv"))
    assert [row["key"].decode() for row in members(made.shards[0])] == ["clip", f"{third}_20"]


def test_the_command_says_what_it_found_and_refuses_what_it_can_not_split(corpora, tmp_path):
    table, classes = ["--csv", corpora / "own_segments.csv"], ["--labels", corpora / "classes.csv"]
    output = run("split", corpora / "audio", tmp_path / "out", *table, *classes, "--workers", 1)
    assert "8 clips" in output and output.count("8 of 10 official clips of own_segments.csv") == 1
    assert output.count("own_segments.csv") == 1
    (tmp_path / "other.csv").write_text('unknown_A01, 0, 10, "/m/cat"\n')
    with pytest.raises(DataError, match="none of the 1 clips of"):
        run("split", corpora / "audio", tmp_path / "none", "--csv", tmp_path / "other.csv", "--workers", 1)
    (tmp_path / "few.csv").write_text("index,mid,display_name\n0,/m/cat,Cat\n")
    with pytest.raises(DataError, match="/m/dog"):
        run("split", corpora / "audio", tmp_path / "x", *table, "--labels", tmp_path / "few.csv", "--workers", 1)
    with pytest.raises(DataError, match="copy them here"):
        run("split", "http://127.0.0.1:1/corpus", tmp_path / "x", *table, "--workers", 1)
    assert np.isfinite(load_index(str(tmp_path / "out")).mean)
