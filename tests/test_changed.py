"""Shards changed under a reader: noticed before a crop of them is handed out, listed, compared at the next start."""

import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from msm_dist.changed import CHANGED_FILE, check_restored, recording_changed
from msm_dist.corpus import Corpus, stamp
from msm_dist.data import storage
from msm_dist.data.crops import CropReader
from msm_dist.data.storage import Access, stamps
from msm_dist.data.stores import FolderStores
from msm_dist.errors import ChangedShard, DataError
from tests.shards import noise_clips, write_corpus
from tests.test_checkpoint import Alone
from tests.test_crops import source_of

IN_SHARD_1 = np.array([[0, 30, 0]])
IN_SHARD_0 = np.array([[0, 3, 0]])


@pytest.fixture
def index(tmp_path):
    return write_corpus(tmp_path / "corpus", noise_clips(70), clips_per_shard=24)


def overwrite(path: Path) -> None:
    """One bit, in place."""
    with path.open("r+b") as file:
        file.seek(2000)
        byte = file.read(1)
        file.seek(2000)
        file.write(bytes([byte[0] ^ 1]))


def replace_by_rename(path: Path) -> None:
    other = shutil.copy(path, path.with_suffix(".new"))
    overwrite(Path(other))
    os.replace(other, path)


def replace_keeping_times(path: Path) -> None:
    status = path.stat()
    replace_by_rename(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "overwritten": (overwrite, "was written to"),
    "replaced": (replace_by_rename, "was replaced by another file"),
    "replaced, its times kept": (replace_keeping_times, "was replaced by another file"),
    "deleted": (Path.unlink, "was deleted"),
    "truncated": (lambda path: os.truncate(path, 1000), "has 1000 bytes, its index says"),
    "emptied": (lambda path: os.truncate(path, 0), "has 0 bytes, its index says"),
    "grown": (lambda path: os.truncate(path, 10**6), "has 1000000 bytes, its index says"),
}


@pytest.fixture(params=CHANGES.values(), ids=CHANGES.keys())
def change(request):
    return request.param


def shard_of(index, number: int) -> ChangedShard:
    shard = index.shards[number]
    return ChangedShard(shard.name, shard.location, shard.sha256)


def test_shard_changed_after_it_was_read_gives_no_crop_and_is_named(index, change):
    reader = CropReader(source_of(index))
    reader.read(IN_SHARD_1)
    act, told = change
    act(index.shards[1].path)
    with pytest.raises(DataError, match=f"noise-000001.tar {told}.*sha256 {index.shards[1].sha256}.*Restore") as caught:
        reader.read(IN_SHARD_1)
    assert caught.value.changed == (shard_of(index, 1),)
    assert reader.read(IN_SHARD_0)[0].key == "clip-0003"


# One whose times and size are kept is not noticed there: nothing but the bytes would tell (data.verify=digest).
@pytest.mark.parametrize("change", [value for value in CHANGES.values() if value[0] is not replace_keeping_times])
def test_shard_changed_between_the_start_and_its_first_read_is_named_too(index, change, monkeypatch):
    monkeypatch.setattr(storage, "PAUSES", (0.0,))
    start = stamps(shard.location for shard in index.shards)
    act, _ = change
    act(index.shards[1].path)
    reader = CropReader(replace(source_of(index), stamped=start))
    with pytest.raises(DataError, match="since the run began") as caught:
        reader.read(IN_SHARD_1)
    assert caught.value.changed == (shard_of(index, 1),)


def test_shard_changed_while_its_clips_are_decoded_gives_no_block(index, monkeypatch):
    reader = CropReader(source_of(index))
    cut = reader._decode

    def changing(*arguments):
        cut(*arguments)
        overwrite(index.shards[1].path)

    monkeypatch.setattr(reader, "_decode", changing)
    with pytest.raises(DataError) as caught:
        reader.blocks(range(20))
    assert caught.value.changed == (shard_of(index, 1),)


def test_all_changed_shards_of_a_block_are_named(index):
    reader = CropReader(source_of(index))
    reader.blocks(range(20))
    for shard in index.shards:
        overwrite(shard.path)
    with pytest.raises(DataError) as caught:
        reader.blocks(range(20))
    assert set(caught.value.changed) == {shard_of(index, number) for number in range(3)}


def test_shard_that_was_put_away_for_others_is_held_to_what_it_was(index, monkeypatch):
    monkeypatch.setattr(storage, "MAX_OPEN_FILES", 1)
    reader = CropReader(source_of(index))
    reader.read(IN_SHARD_1)
    reader.read(IN_SHARD_0)
    overwrite(index.shards[1].path)
    with pytest.raises(DataError, match="was written to"):
        reader.read(IN_SHARD_1)


def test_reading_linking_and_changing_who_may_read_change_nothing(index):
    reader = CropReader(source_of(index))
    before = reader.read(IN_SHARD_1)
    path = index.shards[1].path
    path.read_bytes()
    path.chmod(0o444)
    path.with_suffix(".backup").hardlink_to(path)
    np.testing.assert_array_equal(reader.read(IN_SHARD_1)[0].values, before[0].values)


def test_shard_that_can_not_be_looked_at_is_not_called_changed(index, monkeypatch):
    reader = CropReader(source_of(index))
    reader.read(IN_SHARD_1)
    stat, pauses = os.stat, []
    monkeypatch.setattr(storage.time, "sleep", pauses.append)

    def failing(path, *arguments, **options):
        if str(path).endswith(".tar"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return stat(path, *arguments, **options)

    monkeypatch.setattr(storage.os, "stat", failing)
    with pytest.raises(DataError, match=r"can't be looked at \(Input/output error\), tried 4 times") as caught:
        reader.read(IN_SHARD_1)
    assert caught.value.changed == () and pauses == [0.1, 0.2, 0.4]


def test_only_what_a_block_reads_is_looked_at_once(index, monkeypatch):
    reader = CropReader(source_of(index))
    reader.read(IN_SHARD_1)
    looked_at = []
    stat = os.stat
    monkeypatch.setattr(storage.os, "stat", lambda path, **options: looked_at.append(path) or stat(path, **options))
    reader.read(np.repeat(IN_SHARD_1, 4, axis=0) + [[0, i, 0] for i in range(4)])
    assert looked_at == [index.shards[1].location]


def test_stamps_are_of_files_that_are_there(index):
    there = index.shards[0].location
    status = os.stat(there)
    names = [there, there + ".gone", "https://host/x.tar", "pipe:cat x.tar"]
    assert stamps(names) == {there: (status.st_mtime_ns, status.st_size)}
    assert FolderStores(Access(), stamps(names)).confirm([there]) == {}


def test_what_changed_travels_from_a_worker_with_its_error(index):
    error = DataError("gone")
    error.changed = (shard_of(index, 1),)
    found = pickle.loads(pickle.dumps(error))
    assert (str(found), found.changed) == ("gone", error.changed)


def record(folder: Path, index, *numbers: int) -> None:
    error = DataError("gone")
    error.changed = tuple(shard_of(index, number) for number in numbers)
    with pytest.raises(DataError), recording_changed(folder, corpus_of(index), is_main=True):
        raise error


def corpus_of(index) -> Corpus:
    return stamp(Corpus(index, None, None, frozenset(), 1, 0, (index,)))


class Node(Alone):
    """A world of one, the first of its machine."""

    local_rank = 0


def test_listed_shards_hold_the_run_until_their_digests_are_those_of_the_index(index, tmp_path, caplog):
    content = index.shards[1].path.read_bytes()
    overwrite(index.shards[1].path)
    overwrite(index.shards[2].path)
    record(tmp_path, index, 1)
    assert [entry["name"] for entry in json.loads((tmp_path / CHANGED_FILE).read_text())] == ["noise-000001.tar"]
    assert CHANGED_FILE in caplog.text
    for _ in range(2):
        with pytest.raises(DataError, match=f"(?s){CHANGED_FILE}: these shards changed.*{index.shards[1].sha256}"):
            check_restored(tmp_path, index, Access(), Node())
    index.shards[1].path.write_bytes(content)
    # The other one is not listed: this is no comparison of all shards.
    assert check_restored(tmp_path, index, Access(), Node()) == [
        "shards that had changed are what they were again: noise-000001.tar"
    ]
    assert not (tmp_path / CHANGED_FILE).exists()
    assert check_restored(tmp_path, index, Access(), Node()) == []


def test_shard_restored_elsewhere_counts_by_its_digest(index, tmp_path):
    moved = shutil.copytree(index.root, tmp_path / "moved")
    overwrite(index.shards[1].path)
    record(tmp_path, index, 1)
    elsewhere = replace(
        index,
        location=str(moved),
        shards=tuple(replace(shard, location=str(moved / shard.name)) for shard in index.shards),
    )
    assert check_restored(tmp_path, elsewhere, Access(), Node())


def record_by(folder: Path, index, corpus: Corpus, is_main: bool) -> None:
    error = DataError("gone")
    error.changed = (shard_of(index, 1),)
    with pytest.raises(DataError), recording_changed(folder, corpus, is_main):
        raise error


def test_nothing_is_listed_of_other_faults_other_corpora_and_by_other_ranks(index, tmp_path):
    record(tmp_path, index)
    record_by(tmp_path, index, corpus_of(index), is_main=False)
    record_by(tmp_path, index, corpus_of(replace(index, shards=index.shards[:1])), is_main=True)
    assert not (tmp_path / CHANGED_FILE).exists()


def test_whatever_ends_a_start_the_shards_that_are_not_as_it_found_them_are_listed(index, change, tmp_path):
    corpus, (act, _) = corpus_of(index), change
    with pytest.raises(RuntimeError, match="a rank died"), recording_changed(tmp_path, corpus, is_main=True):
        act(index.shards[1].path)
        raise RuntimeError("a rank died")
    assert listed(tmp_path) == ([] if act is replace_keeping_times else ["noise-000001.tar"])


def listed(folder: Path) -> list[str]:
    path = folder / CHANGED_FILE
    return [entry["name"] for entry in json.loads(path.read_text())] if path.exists() else []


def test_run_that_stops_as_it_was_told_lists_them_too(index, tmp_path):
    corpus = corpus_of(index)
    with recording_changed(tmp_path, corpus, is_main=True):
        pass
    assert listed(tmp_path) == []
    with recording_changed(tmp_path, corpus, is_main=True):
        overwrite(index.shards[1].path)
    assert listed(tmp_path) == ["noise-000001.tar"]


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[{"name": "x"}]', "[" * 100_000, "\x80"])
def test_list_that_can_not_be_read_is_named_with_a_way_out(index, tmp_path, text):
    (tmp_path / CHANGED_FILE).write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match="can't be read as a list of shards .*remove it and give data.verify=digest"):
        check_restored(tmp_path, index, Access(), Node())


def test_list_that_can_not_be_written_does_not_hide_the_fault(index, tmp_path, caplog):
    record(tmp_path / "nowhere", index, 1)
    assert "can't be written (No such file or directory)" in caplog.text
