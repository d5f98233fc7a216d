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
