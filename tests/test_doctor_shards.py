"""`msm-dist doctor SHARDS` on a real corpus: a healthy one is ok, and each damage has its finding and its remedy."""

import json
import os
import shutil
import stat
from pathlib import Path

import pytest

from msm_dist.config import Features
from msm_dist.data.audioset import USUAL_MEAN, USUAL_STD
from msm_dist.data.clips import quiet
from msm_dist.data.index import load_index
from msm_dist.data.repack import repack
from msm_dist.data.shards import index_shards
from msm_dist.doctor import host as doctor_host
from msm_dist.doctor import shards as doctor_shards
from msm_dist.doctor.findings import Finding
from tests.corpus import write_corpus
from tests.http_server import serving

CLIPS, SHARDS = 256, 4


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("packed") / "corpus", CLIPS, SHARDS)


@pytest.fixture
def corpus(packed, tmp_path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "corpus"))


def examine(where: object, quick: bool = False) -> list[Finding]:
    return list(doctor_shards.examine_shards(str(where), quick, 1, quiet))


def only(where: object, status: str, name: str, *says: str, quick: bool = False) -> Finding:
    """The one finding that is not ok, which says all that."""
    found = [finding for finding in examine(where, quick) if finding.status != "ok"]
    assert [(finding.status, finding.name) for finding in found] == [(status, name)], found
    assert all(word in f"{found[0].detail}\n{found[0].remedy}" for word in says), found
    return found[0]


def edit(corpus: Path, **values: object) -> None:
    path = corpus / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def everything(folder: Path) -> dict[str, tuple]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in [folder, *folder.rglob("*")]}


@pytest.mark.parametrize("quick", [False, True])
def test_a_whole_corpus_is_ok_and_left_as_it_is(corpus, quick):
    before, reported = everything(corpus), []
    found = list(doctor_shards.examine_shards(str(corpus), quick, 1, lambda *args: reported.append(args)))
    assert [finding for finding in found if finding.status != "ok"] == []
    told = {finding.name: finding.detail for finding in found}
    assert f"{CLIPS} clips" in told["index"] and f"{SHARDS} there" in told["shards"]
    assert "lanes of" in told["order"] and "16000 Hz" in told["sample rate"]
    assert ("digests" in told) is not quick and ("tables" in told) is quick
    assert reported[-1][1:] == (SHARDS, SHARDS), "progress is said"
    assert everything(corpus) == before


def test_a_pattern_a_tar_and_an_index_name_a_corpus_too(corpus):
    for where in (corpus / "clips-{000000..000003}.tar", corpus / "index.json"):
        assert {finding.status for finding in examine(where)} == {"ok"}
    # A part of the index: the other tars are in it all the same, so that they are no orphans.
    found = {finding.name: finding for finding in examine(corpus / "clips-000000.tar")}
    assert found["orphans"].status == "ok" and "64 clips" in found["index"].detail


def test_tars_without_an_index_get_the_command_that_makes_one(corpus):
    (corpus / "index.json").unlink()
    finding = only(corpus, "fail", "index", "has tar shards but no index.json")
    assert finding.remedy == f"msm-dist data index {corpus}/*.tar"


def test_a_broken_index_gets_the_command_that_writes_it_again(corpus):
    (corpus / "index.json").write_text('{"version": 1')
    finding = only(corpus, "fail", "index", "not a valid shard index")
    assert finding.remedy == f"msm-dist data index {corpus}/*.tar"
    index_shards(sorted(corpus.glob("*.tar")), Features())
    assert {finding.status for finding in examine(corpus)} == {"ok"}


def test_an_unfinished_packing_is_named(corpus):
    (corpus / ".pack").mkdir()
    only(corpus, "warn", "orphans", "not finished", "msm-dist data pack")
    (corpus / "index.json").unlink()
    only(corpus, "fail", "index", "the same `msm-dist data pack` command again finishes it")


@pytest.mark.parametrize("quick", [False, True])
def test_missing_and_cut_shards_are_named(corpus, quick):
    (corpus / "clips-000001.tar").unlink()
    only(corpus, "fail", "shards", "1 of 4 missing: clips-000001.tar", "copy them again", quick=quick)
    size = (corpus / "clips-000002.tar").stat().st_size
    os.truncate(corpus / "clips-000002.tar", 4096)
    found = [finding for finding in examine(corpus, quick) if finding.status == "fail"]
    assert [finding.name for finding in found] == ["shards", "shards"]
    assert f"clips-000002.tar (4096 bytes, not {size})" in found[1].detail


def test_changed_bytes_are_found_unless_it_is_to_be_quick(corpus):
    path = corpus / "clips-000002.tar"
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    finding = only(corpus, "fail", "digests", "clips-000002.tar: sha256", f"msm-dist data verify {corpus} --decode")
    assert "clips-000001" not in finding.detail
    assert {finding.status for finding in examine(corpus, quick=True)} == {"ok"}


@pytest.mark.parametrize(("quick", "name"), [(False, "digests"), (True, "tables")])
def test_a_damaged_sidecar_is_found(corpus, quick, name):
    path = corpus / "clips-000003.members.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    only(corpus, "fail", name, "clips-000003.members.npy", f"msm-dist data index {corpus}/*.tar", quick=quick)


def test_missing_statistics_get_the_command_that_measures_them(corpus):
    edit(corpus, mean=None, std=None, mel_mean=None, features=None)
    finding = only(corpus, "fail", "statistics", "not measured: a run refuses")
    assert finding.remedy == f"msm-dist data stats {corpus}"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda values: {"mean": values["mean"] + 1}, "the mean of its bands is"),
        (lambda values: {"std": 0.05}, "its bands alone vary by"),
        (lambda values: {"mean": -40.0, "mel_mean": [-40.0] * 80}, "no audio has these"),
        (lambda values: {"std": 50.0}, "no audio has these"),
    ],
    ids=["other mean", "other std", "below silence", "too wide"],
)
def test_impossible_statistics_fail(corpus, change, says):
    edit(corpus, **change(json.loads((corpus / "index.json").read_text())))
    only(corpus, "fail", "statistics", says, f"msm-dist data stats {corpus}")


def test_audioset_is_compared_with_the_usual_statistics_and_nothing_else_is(corpus):
    index = load_index(str(corpus))
    assert abs(index.mean - USUAL_MEAN) > 1 or abs(index.std - USUAL_STD) > 1, "else this shows nothing"
    official = {"tables": ["balanced_train_segments.csv"], "clips": 9, "found": 9, "manifest": "0" * 64}
    edit(corpus, official=official)
    only(corpus, "warn", "statistics", f"AudioSet's are about {USUAL_MEAN}", f"msm-dist data inspect {corpus} KEY")


def test_other_rates_and_front_ends_than_the_defaults_are_told(corpus, tmp_path):
    edit(corpus, sample_rate=8000)
    only(corpus, "warn", "sample rate", "8000 Hz, below", "above 4000 Hz hold nothing", "features.sample_rate=8000")
    edit(corpus, sample_rate=44100)
    assert "resampled to 16000" in next(f.detail for f in examine(corpus) if f.name == "sample rate")
    edit(corpus, sample_rate=None)
    assert "mixed" in next(f.detail for f in examine(corpus) if f.name == "sample rate")
    edit(corpus, sample_rate=16000)
    other = Features(n_mels=64)
    index_shards(sorted(corpus.glob("*.tar")), other)
    only(corpus, "warn", "front end", "statistics were made with features.n_mels=64", f"data stats {corpus}")


def test_stored_logmels_are_looked_at_as_such(corpus, tmp_path):
    repack(corpus, tmp_path / "logmels", Features(), 1)
    found = {finding.name: finding for finding in examine(tmp_path / "logmels")}
    assert {finding.status for finding in found.values()} == {"ok"}
    assert "no resampling" in found["sample rate"].detail


def test_a_corpus_too_small_for_the_default_order_is_told(tmp_path):
    small = write_corpus(tmp_path / "small", count=5, num_shards=1)
    finding = next(finding for finding in examine(small) if finding.name == "order")
    assert finding.status == "warn" and "data.num_workers" in finding.detail


def test_tars_and_tables_that_nobody_reads_are_named(corpus):
    shutil.copy(corpus / "clips-000000.tar", corpus / "more.tar")
    only(corpus, "warn", "orphans", "not in index.json", "more.tar", f"msm-dist data index {corpus}/*.tar")
    (corpus / "more.tar").unlink()
    shutil.copy(corpus / "clips-000000.members.npy", corpus / "gone.members.npy")
    only(corpus, "warn", "orphans", "belong to no shard", "gone.members.npy", "remove them")


def test_files_without_rights_are_named(corpus, monkeypatch):
    path = corpus / "clips-000001.tar"
    path.chmod(0)
    # root may read anything: what counts is what the system says of this user.
    real = os.access
    closed = lambda file, mode: real(file, mode) and bool(Path(file).stat().st_mode & stat.S_IRUSR)  # noqa: E731
    monkeypatch.setattr(doctor_shards.os, "access", closed)
    found = [finding for finding in examine(corpus, quick=True) if finding.status == "fail"]
    assert [finding.name for finding in found] == ["rights"]
    assert "clips-000001.tar" in found[0].detail and f"chmod -R u+rX {corpus}" in found[0].remedy


def test_a_file_system_over_the_network_is_a_warning(corpus, monkeypatch, tmp_path):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"1 0 0:1 / {corpus} rw - nfs4 server:/x rw\n")
    monkeypatch.setattr(doctor_host, "MOUNTS", mounts)
    only(corpus, "warn", "file system", f"nfs4 at {corpus}", "rsync -a", "data.shards=LOCAL_FOLDER", quick=True)
    monkeypatch.setattr(doctor_host, "MOUNTS", tmp_path / "none")
    only(corpus, "note", "file system", "can't be found out", quick=True)


def test_a_corpus_behind_a_url_is_read_as_far_as_that_goes(corpus):
    with serving(corpus) as server:
        finding = only(server.url, "note", "folder", "behind a URL")
        assert "can't be found out" in finding.detail
        (corpus / "clips-000001.tar").unlink()
        found = [finding for finding in examine(server.url) if finding.status == "fail"]
        assert [(finding.name, "clips-000001.tar" in finding.detail) for finding in found] == [("shards", True)]


def test_a_shell_command_is_refused(tmp_path):
    only(f"pipe:touch {tmp_path}/EVIL; cat {{}}", "fail", "index", "would run a shell command")
    assert not (tmp_path / "EVIL").exists()


@pytest.mark.parametrize("name", ["../outside.tar", "/etc/passwd.tar", "a\x1b[2J.tar"])
def test_a_hostile_index_names_no_file_elsewhere(corpus, name):
    content = json.loads((corpus / "index.json").read_text())
    content["shards"][0]["name"] = name
    (corpus / "index.json").write_text(json.dumps(content))
    only(corpus, "fail", "index", "shards.0.name")
