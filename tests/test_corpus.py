"""What a run trains on: found, checked, measured in steps; and what is said when it does not fit."""

import json
import shutil

import pytest

from msm_dist.config import batch_layout, parse_config
from msm_dist.corpus import check_digests, open_corpus, plan_identity
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
    for rank in range(2):
        check_digests(index, rank, world_size=3)
    with pytest.raises(DataError, match="clips-000002.tar: sha256"):
        check_digests(index, rank=2, world_size=3)


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
    assert plan_identity(mixed(shards, own, (2, 1))) != identity
    assert plan_identity(mixed(own, shards, (1, 3))) != identity


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
    for rank in range(4):
        check_digests(index, rank, world_size=5)
    with pytest.raises(DataError, match="own/clips-000001.tar: sha256"):
        check_digests(index, 4, world_size=5)
