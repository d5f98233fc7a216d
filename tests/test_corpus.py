"""What a run trains on: found, checked, measured in steps; and what is said when it does not fit."""

import json
import shutil
from dataclasses import replace

import pytest

from msm_dist.config import batch_layout, parse_config
from msm_dist.corpus import check_digests, corpus_identity, open_corpus, overlaps, plan_identity
from msm_dist.data.index import Official
from msm_dist.errors import ConfigError, DataError
from tests.corpus import write_corpus


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "shards", count=192, num_shards=3)


@pytest.fixture
def copy(shards, tmp_path):
    return shutil.copytree(shards, tmp_path / "shards")


def open_with(shards, world_size=1, **sections):
    sections = {"train": {"steps": 10, "global_batch": 32, "micro_batch": 8}} | sections
    sections["data"] = {"shards": str(shards), "num_workers": 1, "crop_frames": 96} | sections.get("data", {})
    cfg = parse_config(sections, "test")
    return open_corpus(cfg, batch_layout(cfg, world_size))


def edit_index(folder, **changes):
    path = folder / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_steps_follow_from_epochs_clips_and_crops(shards):
    train = {"epochs": 3, "global_batch": 32, "micro_batch": 8}
    corpus = open_with(shards, train=train, optim={"warmup_epochs": 1.5})
    assert corpus.plan.clips_per_epoch == 192
    assert (corpus.total_steps, corpus.warmup_steps) == (18, 9.0)
    corpus = open_with(shards, train=train, data={"crops_per_clip": 4}, optim={"warmup_epochs": 1})
    assert (corpus.total_steps, corpus.warmup_steps) == (72, 24.0)


def test_statistics_come_from_the_index_unless_given(shards):
    index = json.loads((shards / "index.json").read_text())
    assert open_with(shards).features.mean == index["mean"]
    given = open_with(shards, features={"mean": -7.1, "std": 4.2}).features
    assert (given.mean, given.std) == (-7.1, 4.2)


def test_missing_folder_prints_the_command_that_makes_it(tmp_path):
    with pytest.raises(DataError, match="msm-dist data pack YOUR_AUDIO_FOLDER .*absent"):
        open_with(tmp_path / "absent")


def test_missing_statistics_name_the_command_that_measures_them(copy):
    edit_index(copy, mean=None, std=None, mel_mean=None, features=None)
    with pytest.raises(ConfigError, match="msm-dist data stats"):
        open_with(copy)


def test_statistics_of_another_front_end_are_refused(shards):
    with pytest.raises(ConfigError, match=r"features.fmin = 20.0: the statistics .* were made with 50.0"):
        open_with(shards, features={"fmin": 20})


def test_truncated_shard_is_named_with_both_sizes(copy):
    tar = copy / "clips-000001.tar"
    size = tar.stat().st_size
    with tar.open("r+b") as file:
        file.truncate(size - 512)
    with pytest.raises(DataError, match=f"clips-000001.tar: {size - 512} bytes, index.json says {size}"):
        open_with(copy)


def test_changed_byte_is_found_where_digests_are_checked(copy):
    tar = copy / "clips-000002.tar"
    data = bytearray(tar.read_bytes())
    data[5000] ^= 1
    tar.write_bytes(data)
    index = open_with(copy).index
    # Of 3 shards the ranks of 2 have 0 and 2, and 1.
    check_digests(index, 1, world_size=2)
    with pytest.raises(DataError, match="clips-000002.tar: sha256"):
        check_digests(index, 0, world_size=2)


def test_missing_shard_stops_the_start_unless_allowed(copy):
    (copy / "clips-000000.tar").unlink()
    with pytest.raises(DataError, match="clips-000000.tar: missing") as caught:
        open_with(copy)
    assert "data.allow_missing_shards=true" in str(caught.value)
    assert open_with(copy, data={"allow_missing_shards": True}).missing == {0}
    for tar in copy.glob("*.tar"):
        tar.unlink()
    with pytest.raises(DataError, match="all 3 shards are missing"):
        open_with(copy, data={"allow_missing_shards": True})


def test_lanes_that_do_not_spread_over_processes_and_workers_list_those_that_do(shards):
    with pytest.raises(ConfigError, match="3 processes x 1 loader workers") as caught:
        open_with(shards, world_size=3, train={"steps": 1, "global_batch": 48, "micro_batch": 8})
    assert "choose" in str(caught.value)


def test_identity_changes_with_the_corpus_alone(shards, copy):
    assert plan_identity(open_with(shards)) == plan_identity(open_with(copy))
    index = json.loads((copy / "index.json").read_text())
    index["shards"][0]["sha256"] = "0" * 64
    edit_index(copy, shards=index["shards"])
    assert plan_identity(open_with(shards)) != plan_identity(open_with(copy))


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "own", count=64, num_shards=2, seed=5)


def mixed(first, second, weights=(3, 1), **sections):
    data = {"mix": dict(zip(map(str, (first, second)), weights, strict=True)), "shards": None}
    return open_with(None, **sections | {"data": data | sections.get("data", {})})


def test_a_mix_is_one_corpus_of_all_its_sources(shards, own):
    corpus = mixed(shards, own)
    assert [shard.path for shard in corpus.index.shards] == [*sorted(shards.glob("*.tar")), *sorted(own.glob("*.tar"))]
    assert corpus.index.location == f"{shards} + {own}"
    assert [source.location for source in corpus.sources] == [str(shards), str(own)]
    assert corpus.plan.shares == (0.75, 0.25)
    assert corpus.plan.clips_per_epoch == corpus.index.num_clips == 192 + 64
    assert corpus.index.seconds == sum(source.seconds for source in corpus.sources)
    train = {"epochs": 3, "global_batch": 32, "micro_batch": 8}
    assert mixed(shards, own, train=train).total_steps == 24


def test_statistics_of_a_mix_are_those_of_what_is_served(shards, own):
    corpus = mixed(shards, own)
    one, two = (json.loads((folder / "index.json").read_text()) for folder in (shards, own))
    mean = 0.75 * one["mean"] + 0.25 * two["mean"]
    second = 0.75 * (one["std"] ** 2 + one["mean"] ** 2) + 0.25 * (two["std"] ** 2 + two["mean"] ** 2)
    assert corpus.features.mean == pytest.approx(mean, rel=1e-12)
    assert corpus.features.std == pytest.approx((second - mean**2) ** 0.5, rel=1e-9)
    bands = [0.75 * a + 0.25 * b for a, b in zip(one["mel_mean"], two["mel_mean"], strict=True)]
    assert corpus.index.mel_mean == pytest.approx(bands, rel=1e-12)
    assert mixed(shards, own, features={"mean": -7.1, "std": 4.2}).features.mean == -7.1


def test_identity_of_a_mix_changes_with_weights_and_order_not_with_places(shards, own, copy):
    identity = plan_identity(mixed(shards, own))
    assert plan_identity(mixed(copy, own)) == identity
    assert plan_identity(mixed(shards, own, (6, 2))) == identity
    given = {"features": {"mean": -7.1, "std": 4.2}}
    identity, other = (plan_identity(mixed(shards, own, weights, **given)) for weights in ((3, 1), (2, 1)))
    assert {name for name in identity if identity[name] != other[name]} == {"mix_places"}
    assert plan_identity(mixed(own, shards, (1, 3), **given))["mix_digests"] == identity["mix_digests"][::-1]


def test_identity_tells_which_shards_are_of_which_source(shards):
    def split_at(*patterns):
        return plan_identity(mixed(*(f"{shards}/clips-00000{pattern}.tar" for pattern in patterns), (1, 1)))

    one, other = split_at("{0..1}", "2"), split_at("0", "{1..2}")
    assert one["index_digest"] == other["index_digest"]
    assert one["mix_digests"] != other["mix_digests"]


def test_what_was_trained_on_is_told_of_each_source(shards, copy, own, monkeypatch):
    (copy / "clips-000001.tar").unlink()
    corpus = mixed(own, copy, (1, 3), data={"allow_missing_shards": True})
    first, second = corpus_identity(corpus)
    told = [
        [source[name] for name in ("name", "share", "shards", "clips", "missing_shards")] for source in (first, second)
    ]
    assert told == [["own", 0.25, 2, 64, 0], ["shards", 0.75, 3, 192, 1]]
    assert [first["digest"], second["digest"]] == [source.digest for source in corpus.sources]
    monkeypatch.chdir(shards)
    for here in (".", "../shards/", str(shards), "clips-000000.tar"):
        (source,) = corpus_identity(open_with(here))
        assert source["name"] == shards.name


def test_sources_that_share_a_shard_are_refused_and_other_signs_of_the_same_clips_are_noted(shards, own, copy):
    with pytest.raises(ConfigError, match=r"2 shards of .*, such as clips-000000.tar, are in .*brace pattern"):
        mixed(shards, f"{shards}/clips-00000{{0,1}}.tar")
    with pytest.raises(ConfigError, match=r"1 shards of .*, such as other.tar, are in"):
        index = json.loads((copy / "index.json").read_text())
        (copy / "clips-000001.tar").rename(copy / "other.tar")
        (copy / "clips-000001.members.npy").rename(copy / "other.members.npy")
        index["shards"][1]["name"] = "other.tar"
        edit_index(copy, shards=index["shards"])
        mixed(shards, f"{copy}/other.tar")
    apart = mixed(f"{shards}/clips-00000{{0,1}}.tar", f"{shards}/clips-000002.tar")
    assert list(overlaps(apart.sources)) == []
    (note,) = overlaps(mixed(shards, own).sources)
    assert note.startswith(f"{shards} and {own} both have 2 shards of the same names, such as clips-000000.tar;")


def test_the_same_official_clips_in_other_shards_are_noted(shards, own):
    one, two = mixed(shards, own).sources
    two = replace(two, shards=tuple(replace(shard, name=f"own-{shard.name}") for shard in two.shards))
    official = Official(("eval_segments.csv",), 20, 10, "5" * 64)
    assert list(overlaps([one, two])) == list(overlaps([replace(one, official=official), two])) == []
    other = replace(two, official=replace(official, manifest="6" * 64))
    assert list(overlaps([replace(one, official=official), other])) == []
    (note,) = overlaps([replace(one, official=official), replace(two, official=official)])
    assert f"{shards} and {own} are the same clips of eval_segments.csv" in note


def test_sources_that_do_not_mix_are_refused_by_name(shards, own, copy):
    with pytest.raises(ConfigError, match=f"{shards} and {copy} are the same corpus"):
        mixed(shards, copy)
    edit_index(copy, kind="logmel")
    with pytest.raises(ConfigError, match=f"{copy} holds logmel clips, {shards} audio clips"):
        mixed(shards, copy)
    edit_index(copy, kind="audio", mean=None, std=None, mel_mean=None, features=None)
    with pytest.raises(ConfigError, match=f"features.mean, .* nor in {copy}/index.json"):
        mixed(own, copy)
    with pytest.raises(ConfigError, match="features.fmin = 20.0: the statistics .* were made with 50.0"):
        mixed(shards, own, features={"fmin": 20})
    with pytest.raises(ConfigError, match="data.shards = x and data.mix: give one of them"):
        mixed(shards, own, data={"shards": "x"})


def test_missing_shards_of_a_mix_are_numbered_through_all_sources(shards, copy, own):
    (copy / "clips-000001.tar").unlink()
    with pytest.raises(DataError, match="clips-000001.tar: missing"):
        mixed(own, copy)
    assert mixed(own, copy, data={"allow_missing_shards": True}).missing == {3}
    for tar in copy.glob("*.tar"):
        tar.unlink()
    with pytest.raises(DataError, match=f"{copy}: all 3 shards are missing"):
        mixed(own, copy, data={"allow_missing_shards": True})


def test_changed_byte_of_any_source_is_found_where_digests_are_checked(shards, own, tmp_path):
    folder = shutil.copytree(own, tmp_path / "own")
    tar = folder / "clips-000001.tar"
    data = bytearray(tar.read_bytes())
    data[5000] ^= 1
    tar.write_bytes(data)
    index = mixed(shards, folder).index
    # The last of 5 shards.
    for rank in (0, 2):
        check_digests(index, rank, world_size=3)
    with pytest.raises(DataError, match="own/clips-000001.tar: sha256"):
        check_digests(index, 1, world_size=3)
