"""The benchmark of the order at scale: a rehearsal on a small corpus, and that it notices what is wrong."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import scale
from msm_dist.data.index import load_index, members
from msm_dist.data.plan import check_lanes
from msm_dist.errors import ConfigError


def test_rehearsal_writes_figures_that_agree_with_each_other(tmp_path, capsys):
    (tmp_path / "work").mkdir()
    sizes = ["--clips", "9000", "--shards", "9", "--ranks", "12", "--workers", "3"]
    assert scale.main([*sizes, "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]) == 0
    (path,) = (tmp_path / "out").iterdir()
    found = json.loads(path.read_text())
    assert (found["subject"], found["default_lanes"], found["lanes"]) == ("scale", 128, 108)
    assert "data.lanes = 128: must be a multiple of 12 processes x 3 loader workers" in found["refusal"]
    for name in ("all ranks", "one rank"):
        assert found[name]["epoch_clips"] == found[name]["expected_clips"] == 9000 - found[name]["sit_out"]
        assert (found[name]["sit_out"], found[name]["served_twice"]) == (9000 % 108, 0)
        assert [resume["micro_batch"] for resume in found[name]["resumes"]][:2] == [0, 1]
    assert found["shard_clips"]["mean"] == 1000
    assert found["lane_bytes"]["mean"] * 108 == pytest.approx(found["rank_bytes"]["mean"] * 12)
    assert [target["verdict"] for target in found["targets"]][2] == "met"
    assert "default lanes: data.lanes = 128" in capsys.readouterr().out
    assert list((tmp_path / "work").iterdir()) == []


def test_simulated_corpus_is_one_that_a_run_opens(tmp_path):
    files = scale.simulate(tmp_path, 700, 5)
    index = load_index(str(tmp_path))
    assert index.num_clips == sum(len(members(shard)) for shard in index.shards) == 700
    assert files["shards"] == sum(shard.path.stat().st_size for shard in index.shards)


def test_coverage_notices_a_clip_served_twice_and_one_left_out(tmp_path, monkeypatch):
    scale.simulate(tmp_path, 700, 5)
    job = scale.Job(str(tmp_path), 2, 1, 4)
    assert scale.cover(job)["served_twice"] == 0
    monkeypatch.setattr(scale, "micro_batch_blocks", lambda i, rank, world, blocks: np.arange(i, i + blocks))
    assert scale.cover(job)["served_twice"] > 0
    monkeypatch.setattr(scale, "micro_batch_blocks", lambda *_: np.arange(1, 2))
    assert scale.cover(job)["epoch_clips"] < 700 // 4 * 4


def test_wrong_coverage_writes_nothing_and_fails(tmp_path, monkeypatch, capsys):
    wrong = {"served_twice": 1, "epoch_clips": 9, "expected_clips": 9}
    monkeypatch.setattr(scale, "apart", lambda function, job: dict(wrong))
    sizes = ["--clips", "700", "--shards", "2", "--ranks", "2", "--workers", "1"]
    assert scale.main([*sizes, "--work", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "WRONG" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_chosen_lanes_spread_over_all_workers():
    assert scale.choose_lanes(2_000_000, 1024, 8) == 24_576
    assert scale.choose_lanes(2_000_000, 1024, 2) == 30_720
    check_lanes(SimpleNamespace(lanes=24_576), 1024, 8)
    with pytest.raises(ConfigError, match="at least 524288"):
        scale.choose_lanes(100_000, 1024, 8)
