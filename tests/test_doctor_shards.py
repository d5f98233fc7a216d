"""`msm-dist doctor SHARDS` on a real corpus: a healthy one is ok, and each damage has its finding and its remedy."""

import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
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


def shell(command: str) -> subprocess.CompletedProcess:
    """What a user gets who copies it into a terminal."""
    ours = f'msm-dist() {{ {shlex.quote(sys.executable)} -m msm_dist "$@"; }}'
    return subprocess.run(["bash", "-c", f"{ours}\n{command}"], capture_output=True, text=True, timeout=600)


def test_the_command_for_cut_shards_gives_an_index_of_the_others(packed, tmp_path):
    corpus = Path(shutil.copytree(packed, tmp_path / "the corpus; exit 3"))
    os.truncate(corpus / "clips-000002.tar", 4096)
    shutil.copy(corpus / "clips-000000.tar", corpus / "copy.tar")
    finding = next(finding for finding in examine(corpus, quick=True) if finding.status == "fail")
    assert finding.remedy.endswith("which takes in what the index does not list, unless you move it away: copy.tar")
    command = finding.remedy.splitlines()[1].removeprefix("an index without them: ")
    before = (corpus / "index.json").read_bytes()
    ended = shell(command)
    assert ended.returncode == 2 and "clips-000000.tar and copy.tar are the same tar" in ended.stderr, ended
    assert (corpus / "index.json").read_bytes() == before, "clips that are there twice make no index"
    (corpus / "copy.tar").unlink()
    assert shell(command.rpartition("&& ")[2]).returncode == 0
    assert [shard.name for shard in load_index(str(corpus)).shards] == [f"clips-00000{n}.tar" for n in (0, 1, 3)]
    only(corpus, "warn", "orphans", "belong to no shard", "clips-000002.members.npy")


def test_many_cut_shards_are_not_all_written_out(corpus):
    content = json.loads((corpus / "index.json").read_text())
    entries = [content["shards"][0] | {"name": f"x{number}.tar"} for number in range(30)]
    edit(corpus, shards=entries, clips=30 * entries[0]["clips"])
    for entry in entries:
        (corpus / entry["name"]).write_bytes(b"x")
    remedy = next(finding.remedy for finding in examine(corpus, quick=True) if finding.status == "fail")
    assert remedy.count("/x") == 20 and "once the other 10 are moved away too" in remedy


def test_shards_of_stored_logmels_get_no_command_that_refuses_them(corpus, tmp_path):
    repack(corpus, tmp_path / "logmels", Features(), 1)
    os.truncate(tmp_path / "logmels" / "clips-000002.tar", 4096)
    finding = only(tmp_path / "logmels", "fail", "shards", "pack them again", "data.allow_missing_shards=true")
    assert "data index" not in finding.remedy
    (tmp_path / "logmels" / "clips-000001.members.npy").write_bytes(b"x")
    assert not [finding for finding in examine(tmp_path / "logmels", quick=True) if "data index" in finding.remedy]


def cut(corpus: Path) -> None:
    """A shard whose name a shell would run."""
    content = json.loads((corpus / "index.json").read_text())
    content["shards"][0]["name"] = "$(touch EVIL).tar"
    edit(corpus, shards=content["shards"])
    (corpus / "$(touch EVIL).tar").write_bytes(b"x")


DAMAGE = {
    "no index": lambda corpus: (corpus / "index.json").unlink(),
    "broken index": lambda corpus: (corpus / "index.json").write_text("{"),
    "missing": lambda corpus: (corpus / "clips-000001.tar").unlink(),
    "cut": cut,
    "sidecar": lambda corpus: (corpus / "clips-000001.members.npy").write_bytes(b"x"),
    "bytes": lambda corpus: (corpus / "clips-000001.tar").write_bytes(
        bytes((corpus / "clips-000001.tar").stat().st_size)
    ),
    "orphan": lambda corpus: shutil.copy(corpus / "clips-000001.tar", corpus / "`touch EVIL`.tar"),
    "not measured": lambda corpus: edit(corpus, mean=None, std=None, mel_mean=None, features=None),
    "front end": lambda corpus: edit(corpus, features=Features(fmin=20.0).front_end()),
    "narrow": lambda corpus: edit(corpus, mean=0.0, std=0.01, mel_mean=[0.0] * 80),
    "AudioSet": lambda corpus: edit(
        corpus, official={"tables": ["balanced_train_segments.csv"], "clips": 9, "found": 9, "manifest": "0" * 64}
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_whoever_copies_a_command_runs_no_words_of_a_stranger(packed, tmp_path, damage):
    corpus = Path(shutil.copytree(packed, tmp_path / "x; touch EVIL; $(touch EVIL)"))
    DAMAGE[damage](corpus)
    found = [finding for finding in examine(corpus) if finding.status != "ok"]
    told = "\n".join(finding.remedy for finding in found)
    assert "EVIL" in told, "else this shows nothing"
    for finding in found:
        # In front of a quoted word of the shell stands its quote.
        for text in (str(corpus), "$(touch EVIL).tar", "`touch EVIL`.tar"):
            assert f" {text}" not in finding.remedy and f"={text}" not in finding.remedy, finding.remedy
        quoted = [part for part in shlex.shlex(finding.remedy, posix=False) if "EVIL" in part]
        assert all(part[0] == part[-1] == "'" for part in quoted), quoted


def test_front_end_of_a_stranger_is_not_made_a_command(corpus):
    features = json.loads((corpus / "index.json").read_text())["features"]
    edit(corpus, features=features | {"zz": "$(touch EVIL)"})
    finding = only(corpus, "fail", "index", "not a valid shard index", "features")
    assert "EVIL" not in f"{finding.detail}{finding.remedy}"


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
