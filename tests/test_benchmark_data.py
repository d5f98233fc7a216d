"""The benchmark of reading: a rehearsal of a moment, and that it times no reader that is wrong. Speed is no test."""

import json
import subprocess
import sys

import pytest

from benchmarks import data
from benchmarks.data_checks import check_all
from benchmarks.data_corpora import CODECS, files_of, make_corpora
from benchmarks.data_readers import ours, with_files, with_webdataset
from benchmarks.data_timing import Size, bytes_read, loader_rate, quiet_decoders
from msm_dist.data import crops
from tests.processes import HERE


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpora")
    make_corpora(root, 8)
    return root


def test_quick_run_fills_every_table_and_writes_the_result(tmp_path):
    folders = ["--work", str(tmp_path / "w"), "--out", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.data", "--quick", *folders]
    child = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout + child.stderr
    [path] = tmp_path.glob("data-*.json")
    content = json.loads(path.read_text())
    assert set(content["stage_microseconds"]) == {*CODECS, "logmel"}
    assert set(content["loaders_warm"]) == {"0", "1", "2"}
    for rates in [*content["loaders_warm"].values(), content["loaders_cold"], content["http"]]:
        assert all(rate["wall"] > 0 for rate in rates.values())
    assert all(rate["pss"] > rate["uss"] > 0 for rate in content["loaders_warm"]["1"].values())
    assert [target["wanted"] for target in content["targets"]] == [20_000, 4.0, 2.5, 1.1]
    for name in data.LOADERS:
        assert name in child.stdout
    assert not list((tmp_path / "w").iterdir())


def test_all_readers_are_right(corpora):
    with quiet_decoders():
        assert check_all(corpora) == []
    # Four tars with their tables, or a file for each of the eight clips.
    assert {folder.name: len(files_of(folder)) for folder in corpora.iterdir()} == dict.fromkeys(
        (*CODECS, "logmel", "npy"), 8
    )


@pytest.mark.parametrize("stage", ["decode_crops", "fill_crop"])
def test_a_reader_that_is_wrong_is_not_timed(stage, corpora, tmp_path, monkeypatch, capsys):
    right = getattr(crops, stage)

    def a_frame_late(content, starts, *rest):
        return right(content, [start + 160 for start in starts], *rest)

    def louder(crop, *rest):
        right(crop, *rest)
        crop += 1

    monkeypatch.setattr(crops, stage, a_frame_late if stage == "decode_crops" else louder)
    monkeypatch.setattr(data, "QUICK", Size(8, 0.01, 1, 16))
    monkeypatch.setattr(data, "measure", None)
    assert data.main(["--quick", "--work", str(tmp_path), "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "wrong, so nothing is timed:" in said and ("flac" if stage == "decode_crops" else "logmel") in said
    assert not list(tmp_path.glob("*.json"))


def test_economy_of_the_decoders_is_as_promised(corpora):
    assert bytes_read(corpora / "flac")[0] <= 2.5
    assert 1.0 <= bytes_read(corpora / "wav")[0] <= 1.1


def test_rates_count_the_crops_that_arrive(corpora):
    for start, form in ((ours, "wav"), (with_webdataset, "wav"), (with_files, "npy")):
        rate = loader_rate(lambda start=start, form=form: start(corpora / form, 1, 16), 0.0, num_crops=40)
        assert rate.wall > 0 and rate.first_batch_seconds > 0 and rate.pss > rate.uss > 1
