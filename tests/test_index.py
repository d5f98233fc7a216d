"""The shard index: what data.shards may name, what is refused, what a start checks."""

import hashlib
import json
import pickle
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest

from msm_dist.config import Features
from msm_dist.data.index import (
    Index,
    check_shards,
    load_index,
    member_table,
    members,
    write_index,
    write_members,
)
from msm_dist.errors import DataError
from tests.shards import noise_clips, write_corpus
from tests.test_data_commands import run

FRONT_END = Features().front_end()
MEASURED = {"mean": -7.0, "std": 4.0, "mel_mean": [0.0] * 80, "features": FRONT_END}


@pytest.fixture
def corpus(tmp_path) -> Index:
    return write_corpus(tmp_path / "corpus", noise_clips(10), clips_per_shard=4)


def test_index_survives_the_disk(corpus):
    statistics = {"mean": -7.1, "std": 4.2, "mel_mean": (0.1, -0.3)}
    statistics["features"] = Features(n_mels=2, hop=80).front_end()
    written = replace(corpus, **statistics)
    write_index(written)
    loaded = load_index(str(corpus.root))
    assert loaded == written
    assert loaded.num_clips == 10
    assert [shard.clips for shard in loaded.shards] == [4, 4, 2]


def test_every_way_to_name_shards_leads_to_the_same_corpus(corpus):
    root, names = corpus.root, [shard.name for shard in corpus.shards]
    for given in [
        str(root),
        [str(root)],
        str(root / "index.json"),
        str(root / "noise-{000000..000002}.tar"),
        [str(root / name) for name in reversed(names)],
    ]:
        loaded = load_index(given)
        assert loaded.digest == corpus.digest
        assert loaded.seconds == pytest.approx(corpus.seconds)


def test_a_single_tar_is_a_part_of_the_corpus(corpus):
    part = load_index(str(corpus.shards[1].path))
    assert part.shards == corpus.shards[1:2]
    assert part.seconds == pytest.approx(sum(map(len, noise_clips(10)[4:8])) / 16000)
    assert part.digest != corpus.digest


def test_digest_follows_every_part_of_the_identity(corpus):
    first, *rest = corpus.shards
    for changed in [{"name": "other.tar"}, {"clips": 3}, {"sha256": "0" * 64}]:
        assert replace(corpus, shards=(replace(first, **changed), *rest)).digest != corpus.digest
    assert replace(corpus, shards=corpus.shards[::-1]).digest != corpus.digest
    assert replace(corpus, mean=1.0, std=1.0).digest == corpus.digest


def test_members_locate_every_clip(corpus):
    shard = corpus.shards[2]
    table = members(shard)
    content = shard.path.read_bytes()
    for row, clip, number in zip(table, noise_clips(10)[8:], (8, 9), strict=True):
        assert content[row["offset"] :][:4] == b"fLaC"
        assert (row["samples"], row["rate"], row["format"]) == (len(clip), 16000, b"flac")
        assert row["key"] == f"clip-{number:04d}".encode()
    np.testing.assert_array_equal(table, np.load(shard.members_path, allow_pickle=False, mmap_mode="r"))


@pytest.mark.parametrize("given", ["{}", "{}/index.json", "{}/a-{{000..003}}.tar"])
def test_missing_folder_is_answered_with_the_pack_command(tmp_path, given):
    missing = tmp_path / "data" / "audioset"
    with pytest.raises(DataError) as fault:
        load_index(given.format(missing))
    assert f"\n  msm-dist data pack YOUR_AUDIO_FOLDER {missing}\n" in str(fault.value)
    assert "--csv" in str(fault.value)


def test_tars_without_an_index_are_answered_with_the_index_command(corpus):
    (corpus.root / "index.json").unlink()
    with pytest.raises(DataError, match=f"msm-dist data index {corpus.root}/\\*.tar"):
        load_index(str(corpus.root))


def test_unfinished_pack_says_so(tmp_path):
    (tmp_path / ".pack").mkdir()
    with pytest.raises(DataError, match="unfinished"):
        load_index(str(tmp_path))


def test_what_is_no_corpus_is_refused(corpus):
    root = str(corpus.root)
    for given, message in [
        ([], "empty"),
        ("pipe:cat x.tar", "pipe:"),
        (["https://example.org/a.tar", f"{root}/noise-000000.tar"], "one folder"),
        (f"{root}/a-{{000..", "unbalanced"),
        ([root, f"{root}/noise-000000.tar"], "tar files only|one folder, or"),
        ([f"{root}/noise-000000.tar", f"{root}/sub/x.tar"], "one folder"),
        (f"{root}/unknown.tar", "lacks unknown.tar"),
    ]:
        with pytest.raises(DataError, match=message):
            load_index(given)


def edit(index: Index, **changes) -> None:
    path = index.root / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_shard(index: Index, **changes) -> None:
    shards = json.loads((index.root / "index.json").read_text())["shards"]
    edit(index, shards=[shards[0] | changes, *shards[1:]])


@pytest.mark.parametrize(
    "name",
    ["../x.tar", "/etc/x.tar", "a/b.tar", "..\\x.tar", "x.tar\0", ".tar", "x.zip", ".hidden.tar", "", 7],
)
def test_shard_names_stay_inside_the_folder(corpus, name):
    edit_shard(corpus, name=name)
    with pytest.raises(DataError, match=r"shards\.0\.name"):
        load_index(str(corpus.root))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version"),
        ({"kind": "video"}, "kind"),
        ({"sample_rate": "16000"}, "sample_rate"),
        ({"sample_rate": 0}, "sample_rate"),
        ({"shards": []}, "shards"),
        ({"shards": "x"}, "shards"),
        ({"clips": 11}, "clips = 11: the shards have 10"),
        ({"seconds": -1}, "seconds"),
        ({"mean": float("nan")}, "mean: .*finite"),
        ({"std": 0.0}, "std"),
        ({"mean": -7.0}, "go together"),
        (MEASURED | {"mel_mean": [1.0]}, "features.n_mels = 80"),
        (
            MEASURED | {"features": FRONT_END | {"zz": "$(touch x)" * 1000}},
            "n_mels, fmin, fmax, and to nothing else",
        ),
        (MEASURED | {"features": FRONT_END | {"mean": -7.0}}, "to nothing else"),
        (MEASURED | {"features": {"n_mels": 80}}, "to each of sample_rate, n_fft"),
        (MEASURED | {"features": FRONT_END | {"hop": "160"}}, "a number"),
        (MEASURED | {"features": FRONT_END | {"hop": True}}, "a number"),
        (MEASURED | {"features": FRONT_END | {"hop": 0}}, "features.hop: .*greater than"),
        (MEASURED | {"features": []}, "a number to each"),
    ],
)
def test_hand_made_index_is_checked(corpus, changes, message):
    edit(corpus, **changes)
    with pytest.raises(DataError, match=message) as fault:
        load_index(str(corpus.root))
    assert "msm-dist data index" in str(fault.value)
    assert "touch" not in str(fault.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_what_is_no_index_is_refused(corpus, content):
    (corpus.root / "index.json").write_bytes(content)
    with pytest.raises(DataError, match="not a valid shard index"):
        load_index(str(corpus.root))


@pytest.mark.parametrize("changes", [{"clips": 0}, {"bytes": -1}, {"sha256": "abc"}, {"members_sha256": None}])
def test_shard_entries_are_checked(corpus, changes):
    edit_shard(corpus, **changes)
    with pytest.raises(DataError, match=rf"shards\.0\.{next(iter(changes))}"):
        load_index(str(corpus.root))


def test_shard_listed_twice_is_refused(corpus):
    entries = json.loads((corpus.root / "index.json").read_text())["shards"]
    edit(corpus, shards=[entries[0], entries[0]], clips=8)
    with pytest.raises(DataError, match="noise-000000.tar is listed twice"):
        load_index(str(corpus.root))


def test_whole_corpus_passes_the_check(corpus):
    assert check_shards(corpus, "size") == set()
    assert check_shards(corpus, "digest") == set()


def test_wrong_size_names_file_both_values_and_remedy(corpus):
    path = corpus.shards[1].path
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(DataError) as fault:
        check_shards(corpus, "size")
    for part in (str(path), str(corpus.shards[1].bytes), str(corpus.shards[1].bytes - 512), "again"):
        assert part in str(fault.value)
    assert check_shards(corpus, "size", allow_missing=True) == {1}


def test_changed_bytes_are_seen_by_the_digest_only(corpus):
    path = corpus.shards[0].path
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content)
    assert check_shards(corpus, "size") == set()
    with pytest.raises(DataError) as fault:
        check_shards(corpus, "digest")
    assert corpus.shards[0].sha256 in str(fault.value)
    assert hashlib.sha256(content).hexdigest() in str(fault.value)


def test_missing_shards_are_all_named_or_counted(corpus):
    for number in (0, 2):
        corpus.shards[number].path.unlink()
    assert check_shards(corpus, "size", allow_missing=True) == {0, 2}
    with pytest.raises(DataError, match="; data.allow_missing_shards=true starts without") as fault:
        check_shards(corpus, "size", allow_missing=False)
    with pytest.raises(DataError, match="pack them again:\n"):
        check_shards(corpus, "size")
    assert "noise-000000.tar: missing" in str(fault.value)
    assert "noise-000002.tar: missing" in str(fault.value)


def resealed(index: Index, content: bytes):
    """The first shard with a sidecar of this content, and a digest that agrees."""
    shard = index.shards[0]
    shard.members_path.write_bytes(content)
    return replace(shard, members_sha256=hashlib.sha256(content).hexdigest())


def test_sidecar_must_have_its_digest(corpus):
    shard = corpus.shards[0]
    content = bytearray(shard.members_path.read_bytes())
    content[-1] ^= 1
    shard.members_path.write_bytes(content)
    with pytest.raises(DataError, match="sha256"):
        members(shard)
    shard.members_path.unlink()
    with pytest.raises(DataError, match="msm-dist data index"):
        members(shard)


def test_sidecar_of_a_stranger_is_never_unpickled(corpus, tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    np.save(tmp_path / "trap.npy", np.array([Trap()] * 4, dtype=object), allow_pickle=True)
    for content in [(tmp_path / "trap.npy").read_bytes(), pickle.dumps(Trap())]:
        with pytest.raises(DataError, match="another format"):
            members(resealed(corpus, content))
    assert not (tmp_path / "sprung").exists()


def test_sidecar_of_other_shape_or_fields_is_refused(corpus, tmp_path):
    table = members(corpus.shards[0])
    write_members(tmp_path / "good.npy", table)
    good = (tmp_path / "good.npy").read_bytes()
    np.save(tmp_path / "other.npy", table.view([(name.upper(), kind) for name, kind in table.dtype.descr]))
    for content in [
        good[:-1],
        good + b"x",
        good.replace(b"'shape': (4,)", b"'shape': (9,)"),
        (tmp_path / "other.npy").read_bytes(),
    ]:
        with pytest.raises(DataError, match="another format"):
            members(resealed(corpus, content))


@pytest.mark.parametrize(
    ("field", "value"),
    [("offset", -1), ("offset", 2**40), ("size", 0), ("size", 2**62), ("samples", 0), ("rate", 0)],
)
def test_sidecar_points_into_its_tar_only(corpus, tmp_path, field, value):
    table = members(corpus.shards[0]).copy()
    table[field][1] = value
    write_members(tmp_path / "bad.npy", table)
    with pytest.raises(DataError, match="outside"):
        members(resealed(corpus, (tmp_path / "bad.npy").read_bytes()))


def test_sidecar_must_have_as_many_clips_as_the_index_says(corpus):
    with pytest.raises(DataError, match="holds 4 clips, index.json says 5"):
        members(replace(corpus.shards[0], clips=5))


def test_member_table_keeps_long_keys_and_no_rows(tmp_path):
    table = member_table([(512, 9, 100, 8000, "wav", b"a"), (2048, 9, 100, 8000, "mp3", b"folder/" + b"k" * 90)])
    assert table["key"].tolist() == [b"a", b"folder/" + b"k" * 90]
    assert len(member_table([])) == 0


def test_a_folder_may_be_called_as_a_shard_is(corpus, tmp_path):
    folder = shutil.copytree(corpus.root, tmp_path / "corpus.tar")
    for given in (str(folder), [str(folder)], f"{folder}/"):
        found = load_index(given)
        assert (found.digest, found.root) == (corpus.digest, folder)
    assert load_index(f"{folder}/{corpus.shards[0].name}").shards[0].path == folder / corpus.shards[0].name
    assert corpus.digest in run("inspect", folder)


def test_a_brace_pattern_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "braceexpand", None)
    with pytest.raises(DataError, match=r"msm-dist\[train\]"):
        load_index("corpus/noise-{000000..000002}.tar")
