"""Which checkpoint a start takes: the newest whole one; damaged ones are put aside, nothing else is touched."""

import errno
import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from msm_dist.engine import checkpoint, stored
from msm_dist.engine.meta import PretrainingMeta, RunMeta
from msm_dist.engine.resume import newest_good
from msm_dist.errors import CheckpointError
from tests.test_checkpoint import Alone

STATE = "state-00000-of-00001.safetensors"
EXTRA = {"bad_samples": 2, "missing_samples": 0, "mean": -7.0, "std": 4.0, "corpus": [{"name": "x"}]}
EXTRA |= {"skipped_updates": [3]}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A run's checkpoints of steps 5, 10 and 15."""
    parts = {"param": torch.arange(6.0), "exp_avg": torch.ones(6), "exp_avg_sq": torch.zeros(6)}
    monkeypatch.setattr(checkpoint.state, "shapes", lambda engine: {"w": parts["param"].shape})
    monkeypatch.setattr(checkpoint.state, "full_state", lambda engine: iter([("w", parts)]))
    monkeypatch.setattr(checkpoint.state, "optimizer_step", lambda engine: 5.0)
    monkeypatch.setattr(checkpoint.state, "loss_scale", lambda engine: None)
    for step in (5, 10, 15):
        checkpoint.save(None, tmp_path, step, {"cursor": step * 8} | EXTRA, Alone())
    return tmp_path


def newest(root: Path) -> int | None:
    saved = newest_good(root, Alone())
    assert saved is None or saved.verified
    return saved and saved.step


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def flip(path: Path, place: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "bit of a weight": lambda folder: flip(folder / STATE),
    "bit of a header": lambda folder: flip(folder / STATE, 0),
    "bit of meta.json": lambda folder: flip(folder / "meta.json", 20),
    "bit of the marker": lambda folder: flip(folder / "complete", 3),
    "empty marker": lambda folder: (folder / "complete").write_text(""),
    "truncated": lambda folder: os.truncate(folder / STATE, 100),
    "grown": lambda folder: (folder / STATE).write_bytes((folder / STATE).read_bytes() + b"0"),
    "file gone": lambda folder: (folder / STATE).unlink(),
    "meta.json gone": lambda folder: (folder / "meta.json").unlink(),
    "another step's file": lambda folder: shutil.copy(other_state(folder), folder / STATE),
}


def other_state(folder: Path) -> Path:
    """A whole file of a checkpoint, of the same size."""
    path = folder.with_name("step-00000010") / STATE
    flip(path)
    shutil.copy(path, folder.parent / "other")
    flip(path)
    return folder.parent / "other"


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_checkpoint_is_put_aside_and_the_one_before_taken_and_both_are_named(root, damage, caplog):
    before = (root / "step-00000010" / STATE).read_bytes()
    damage(root / "step-00000015")
    (root / "other").unlink(missing_ok=True)
    assert newest(root) == 10
    assert names(root) == ["step-00000005", "step-00000010", "step-00000015.damaged"]
    assert "kept as step-00000015.damaged" in caplog.text
    assert "step-00000010: taken instead of step-00000015" in caplog.text
    assert (root / "step-00000010" / STATE).read_bytes() == before
    caplog.clear()
    assert newest(root) == 10
    assert not caplog.text


def test_whole_checkpoint_is_taken_without_a_word(root, caplog):
    assert newest(root) == 15
    assert names(root) == ["step-00000005", "step-00000010", "step-00000015"]
    assert not caplog.text


def test_several_damaged_ones_are_all_put_aside_and_with_no_good_one_the_run_is_not_started_over(root, caplog):
    flip(root / "step-00000015" / STATE)
    os.truncate(root / "step-00000010" / STATE, 3)
    assert newest(root) == 5
    assert "taken instead of step-00000015, step-00000010" in caplog.text
    flip(root / "step-00000005" / STATE)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"step-00000005.damaged, .*but no whole checkpoint; bring one back"):
            newest(root)
    assert names(root) == [f"step-000000{step}.damaged" for step in ("05", "10", "15")]


def test_same_step_damaged_again_gets_a_number(root):
    for name in ("step-00000015.damaged", "step-00000015.damaged-2", "step-00000015.damaged-3"):
        checkpoint.save(None, root, 15, {"cursor": 120}, Alone())
        flip(root / "step-00000015" / STATE)
        assert newest(root) == 10
        assert (root / name).is_dir()
    checkpoint.rotate(root, keep=1, keep_every=0)
    assert names(root) == ["step-00000010"] + [f"step-00000015.damaged{number}" for number in ("", "-2", "-3")]


def test_half_deleted_checkpoint_is_skipped_and_left_to_be_deleted(root, caplog):
    (root / "step-00000015/complete").unlink()
    assert newest(root) == 10
    assert "skipped" in caplog.text
    assert names(root) == ["step-00000005", "step-00000010", "step-00000015"]
    checkpoint.rotate(root, keep=2, keep_every=0)
    assert names(root) == ["step-00000005", "step-00000010"]


def test_links_and_folders_of_other_names_are_harmless_however_new(root, caplog):
    (root / "latest").symlink_to("step-00000005")
    (root / "latest.txt").write_text("global_step900")
    shutil.copytree(root / "step-00000010", root / "step-00000900.partial")
    shutil.copytree(root / "step-00000010", root / "step-900")
    shutil.copytree(root / "step-00000010", root / "global_step900")
    (root / "step-00000900.damaged").mkdir()
    there = names(root)
    assert newest(root) == 15
    assert names(root) == there
    assert not caplog.text


def test_stray_file_or_empty_folder_with_a_name_of_ours_is_skipped(root):
    (root / "step-00000901").mkdir()
    (root / "step-00000900").write_text("")
    assert newest(root) == 15


def test_checkpoint_of_another_step_than_its_name_is_refused_and_not_deleted(root):
    shutil.copytree(root / "step-00000005", root / "step-00000900")
    with pytest.raises(CheckpointError, match="step-00000900: is the checkpoint of step 5; call it step-00000005, or"):
        newest(root)
    checkpoint.rotate(root, keep=1, keep_every=0)
    assert names(root) == ["step-00000015", "step-00000900"]


@contextmanager
def failing(monkeypatch, name: str, number: int):
    """Whatever opens a file of that name finds this error."""
    opened = Path.open

    def fail(path, *args, **options):
        if path.name == name and "00000015" in str(path):
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fail)
        yield


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE])
@pytest.mark.parametrize("name", ["meta.json", "complete", STATE])
def test_what_can_not_be_read_is_an_error_with_a_way_out_and_nothing_is_renamed_or_deleted(
    root, monkeypatch, name, number
):
    with failing(monkeypatch, name, number):
        with pytest.raises(CheckpointError, match=f"{name}: can't be read .*mend that.*move .*step-00000015 away"):
            newest(root)
        checkpoint.rotate(root, keep=2, keep_every=0)
    assert "step-00000015" in names(root)
    assert newest(root) == 15


def test_folder_that_can_not_be_listed_does_not_start_the_run_over(root, monkeypatch):
    def fail(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "iterdir", fail)
    with pytest.raises(CheckpointError, match="can't be read .Permission denied"):
        newest(root)


def test_damaged_checkpoint_that_can_not_be_renamed_is_an_error_that_says_so(root, monkeypatch):
    def fail(path, target):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    flip(root / "step-00000015" / STATE)
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(CheckpointError, match="can't be renamed to step-00000015.damaged .Permission denied.; give"):
        newest(root)


class Second(Alone):
    """Rank 1 of two, both at once: what it does, rank 0 is said to have done without a fault."""

    rank, size, is_main = 0, 1, True

    def gather(self, value):
        return [[], [STATE]] if isinstance(value, list) else [value]


def test_one_machine_that_reads_other_bytes_condemns_no_checkpoint(root):
    with pytest.raises(CheckpointError, match="another machine reads other bytes than rank 0's"):
        newest_good(root, Second())
    assert names(root) == ["step-00000005", "step-00000010", "step-00000015"]


def test_what_was_verified_is_not_read_twice(root, monkeypatch):
    taken = []
    digest = stored.digest
    monkeypatch.setattr(stored, "digest", lambda path: taken.append(path.name) or digest(path))
    monkeypatch.setattr(checkpoint, "_load_state", lambda engine, saved: None)
    monkeypatch.setattr(checkpoint.state, "refresh_weights", lambda engine: None)
    saved = newest_good(root, Alone())
    checkpoint.load(None, saved, Alone())
    assert taken == [STATE]
    checkpoint.load(None, replace(saved, verified=False), Alone())
    assert taken == [STATE, STATE]


def test_shares_of_the_ranks_are_all_files(root, monkeypatch):
    monkeypatch.setattr(stored, "verify_file", lambda path, entry: (_ for _ in ()).throw(stored.Torn("")))
    saved = stored.Saved(root, {"files": dict.fromkeys("abcdefg")})
    shares = [stored.wrong_files(saved, rank, 3) for rank in range(3)]
    assert sorted(sum(shares, [])) == list("abcdefg")
    assert [len(share) for share in shares] == [3, 2, 2]


SCALE = {"cur_scale": 65536, "cur_iter": 15, "last_overflow_iter": -1, "cur_hysteresis": 2}
HOSTILE = {
    "a file elsewhere": ({"files": {"../../secret": {"bytes": 1, "sha256": "0" * 64}}}, "files.* must look like"),
    "an absolute path": ({"files": {"/etc/passwd": {"bytes": 1, "sha256": "0" * 64}}}, "files.* must look like"),
    "files as a list": ({"files": ["meta.json"]}, r"files = \['meta.json'\]: must be an object"),
    "no files": ({"files": {}}, "files = {}: .*at least 1"),
    "a size in words": ({"files": {STATE: {"bytes": "many", "sha256": "0" * 64}}}, "bytes = 'many': must be .*integer"),
    "a digest that is a number": ({"files": {STATE: {"bytes": 1, "sha256": 1}}}, "sha256 = 1: must be .*string"),
    "a format in words": ({"format": "1"}, "format = '1': must be .*integer"),
    "a step in words": ({"step": "ten"}, "step = 'ten': must be .*integer"),
    "no step": ({"step": None}, "step = None: must be .*integer"),
    "a step without end": ({"step": 10**400}, "step = 1000.*: must be less than"),
    "another cursor's kind": ({"cursor": True}, "cursor = True: must be .*integer"),
    "updates in words": ({"optimizer_step": "x"}, "optimizer_step = 'x': must be .*number"),
    "more updates than steps": ({"optimizer_step": 16.0}, "optimizer_step = 16.0: .* at most the 15 steps"),
    "part of an update": ({"optimizer_step": 4.5}, "optimizer_step = 4.5: must be a whole number"),
    "updates without end": ({"optimizer_step": float("inf")}, "optimizer_step = inf: must be a finite number"),
    "skipped updates as a number": ({"skipped_updates": 7}, "skipped_updates = 7: must be .*list"),
    "an update skipped later": ({"skipped_updates": [3, 16]}, r"skipped_updates = \[3, 16\]: .*steps from 1 to 15"),
    "an update skipped twice": ({"skipped_updates": [3, 3]}, r"skipped_updates = \[3, 3\]: .*larger than the one"),
    "another loss scale": ({"loss_scale": {"a": 1}}, "loss_scale.cur_scale is missing"),
    "no loss scale": ({"loss_scale": SCALE | {"cur_scale": 0.0}}, "cur_scale = 0.0: must be greater than 0"),
    "a statistic that is none": ({"mean": float("nan")}, "mean = nan: must be a finite number"),
    "no deviation": ({"std": 0.0}, "std = 0.0: must be greater than 0"),
    "another corpus": ({"corpus": ["x"]}, "corpus.0 = 'x': must be an object"),
}
"""What is altered, and what is said of it."""
HOSTILE_TO_PRETRAINING = {
    "bad samples in words": ({"bad_samples": "x"}, "bad_samples = 'x': must be .*integer"),
    "less than no bad samples": ({"bad_samples": -1}, "bad_samples = -1: must be greater than or equal to 0"),
    "bad samples without end": ({"bad_samples": 10**400}, "bad_samples = 1000.*: must be less than"),
    "missing samples in words": ({"missing_samples": None}, "missing_samples = None: must be .*integer"),
}


@pytest.mark.parametrize(
    ("values", "says"), (HOSTILE | HOSTILE_TO_PRETRAINING).values(), ids=HOSTILE | HOSTILE_TO_PRETRAINING
)
def test_metadata_that_no_run_saves_is_refused_and_neither_put_aside_nor_deleted(root, values, says):
    folder = root / "step-00000015"
    alter(folder, values)
    there = names(root)
    with pytest.raises(CheckpointError, match=f"15/meta.json: .*{says}.*put .* back .*, or move .*15 away") as caught:
        newest_good(root, Alone(), PretrainingMeta)
    assert not isinstance(caught.value, stored.Torn)
    checkpoint.rotate(root, keep=3, keep_every=0)
    assert names(root) == there
    folder.rename(root / "away")
    assert newest_good(root, Alone(), PretrainingMeta).step == 10


@pytest.mark.parametrize(
    "name", ["format", "step", "files", "optimizer_step", "loss_scale", "cursor", "bad_samples", "mean", "std"]
)
def test_metadata_that_lacks_what_a_start_reads_is_refused(root, name):
    alter(root / "step-00000015", without=name)
    with pytest.raises(CheckpointError, match=f"meta.json: {name} is missing"):
        newest_good(root, Alone(), PretrainingMeta)


def test_metadata_of_the_first_versions_is_taken(root):
    for name in ("missing_samples", "corpus", "skipped_updates"):
        alter(root / "step-00000015", without=name)
    saved = newest_good(root, Alone(), PretrainingMeta)
    assert (saved.step, saved.bad_samples, saved.missing_samples, saved.skipped_updates) == (15, 2, 0, ())


def test_metadata_of_later_versions_and_of_fp16_is_taken(root):
    alter(root / "step-00000015", {"loss_scale": SCALE, "new": {"a": [1]}})
    saved = newest_good(root, Alone(), PretrainingMeta)
    assert (saved.step, saved.skipped_updates, saved.meta["new"]) == (15, (3,), {"a": [1]})


def test_fine_tuning_needs_nothing_of_pre_training(root):
    for name in EXTRA:
        alter(root / "step-00000015", without=name)
    assert newest_good(root, Alone(), RunMeta).step == 15


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "null", "{}", "\x00", "1e999", '{"format": 1}', "9" * 5000])
def test_metadata_that_is_no_object_of_ours_is_named(root, text):
    write_meta(root / "step-00000015", text)
    with pytest.raises(CheckpointError, match="00000015/meta.json: (no JSON|its content =|.* is missing)"):
        stored.open_checkpoint(root / "step-00000015")


def test_endless_metadata_is_not_read_into_memory(root):
    with (root / "step-00000015/meta.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(CheckpointError, match="more than .* bytes"):
        stored.open_checkpoint(root / "step-00000015")


def alter(folder: Path, values: dict | None = None, without: str | None = None) -> None:
    """Change a checkpoint's meta.json, and mark it complete as if it had been saved so."""
    meta = json.loads((folder / "meta.json").read_text()) | (values or {})
    write_meta(folder, json.dumps({name: value for name, value in meta.items() if name != without}))


def write_meta(folder: Path, text: str) -> None:
    (folder / "meta.json").write_text(text)
    (folder / "complete").write_text(stored.hashlib.sha256(text.encode()).hexdigest())
