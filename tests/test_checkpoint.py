"""Checkpoints as files: what counts as whole, in which order they are written, what is kept.

That engines of any world size read them back exactly is in test_engine.py and test_pretrain.py.
"""

import errno
import json
import os
import subprocess
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from msm_dist.config import BatchLayout
from msm_dist.engine import checkpoint
from msm_dist.errors import CheckpointError, ConfigError, MsmError
from msm_dist.pretrain import newest_checkpoint


class Alone:
    """A world of one, without process groups."""

    rank, size, is_main, control = 0, 1, True, None

    def agree_any(self, flag):
        return flag

    def on_main(self, action):
        return action()

    def together(self, action, kind):
        try:
            return action()
        except MsmError as error:
            raise kind(str(error)) from error


@pytest.fixture
def saving(monkeypatch):
    """`save(root, step)` of made-up tensors."""
    tensors = {"param/w": torch.arange(6.0), "exp_avg/w": torch.ones(6), "exp_avg_sq/w": torch.zeros(6)}
    monkeypatch.setattr(checkpoint, "_gather", lambda engine, world: (tensors, {"optimizer_step": 5.0}))
    monkeypatch.setattr(checkpoint, "_exchange", lambda mine, world: mine)
    return lambda root, step: checkpoint.save(None, root, step, {"cursor": step * 8}, Alone())


def test_newest_whole_checkpoint_is_found_with_what_was_saved(tmp_path, saving):
    assert checkpoint.newest_complete(tmp_path) is None
    for step in (5, 10, 100):
        saving(tmp_path, step)
    saved = checkpoint.newest_complete(tmp_path)
    assert (saved.step, saved.meta["cursor"], saved.meta["optimizer_step"]) == (100, 800, 5.0)
    assert saved.folder == tmp_path / "step-00000100"


def test_saving_a_step_again_changes_nothing(tmp_path, saving):
    folder = saving(tmp_path, 5)
    before = (folder / "meta.json").stat().st_mtime_ns
    assert saving(tmp_path, 5) == folder
    assert (folder / "meta.json").stat().st_mtime_ns == before


def truncate(folder):
    path = folder / "state-00000-of-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def edit_meta(folder):
    path = folder / "meta.json"
    path.write_text(path.read_text().replace('"step": 10', '"step": 11'))


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        edit_meta,
        lambda folder: (folder / "complete").unlink(),
        lambda folder: (folder / "meta.json").unlink(),
        lambda folder: (folder / "state-00000-of-00001.safetensors").unlink(),
        lambda folder: folder.rename(folder.with_name(folder.name + ".partial")),
    ],
)
def test_torn_checkpoint_is_skipped_for_the_one_before(tmp_path, saving, damage, caplog):
    saving(tmp_path, 5)
    damage(saving(tmp_path, 10))
    assert checkpoint.newest_complete(tmp_path).step == 5
    assert "step-00000010" in caplog.text or (tmp_path / "step-00000010.partial").exists()


def test_flipped_byte_is_found_when_the_checkpoint_is_read(tmp_path, saving):
    saved = checkpoint.open_checkpoint(saving(tmp_path, 10))
    path = saved.folder / "state-00000-of-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="not those that were saved"):
        checkpoint.load(None, saved, Alone())


def test_marker_is_written_last_and_nothing_is_named_before_it_is_on_the_disk(tmp_path, saving, monkeypatch):
    events = []
    fsync, rename = os.fsync, checkpoint.Path.rename

    def on_fsync(descriptor):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def on_rename(path, target):
        events.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", on_fsync)
    monkeypatch.setattr(checkpoint.Path, "rename", on_rename)
    saving(tmp_path, 10)
    assert events == [
        "state-00000-of-00001.safetensors",
        "meta.json",
        "complete",
        "step-00000010.partial",
        "rename",
        tmp_path.name,
    ]


@pytest.mark.parametrize("failing", [1, 2, 3, 4])
def test_failing_disk_leaves_the_last_good_checkpoint(tmp_path, saving, monkeypatch, failing):
    saving(tmp_path, 5)
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises((CheckpointError, OSError), match="No space left on device"):
        saving(tmp_path, 10)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]
    assert checkpoint.newest_complete(tmp_path).step == 5


@contextmanager
def small_disk(folder, kilobytes):
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_full_disk_is_a_clear_error(tmp_path, saving, monkeypatch):
    with small_disk(tmp_path / "disk", kilobytes=64) as disk:
        saving(disk, 5)
        big = {"param/w": torch.zeros(100_000)}
        monkeypatch.setattr(checkpoint, "_gather", lambda engine, world: (big, 5.0))
        with pytest.raises(CheckpointError, match="No space left.*are untouched"):
            saving(disk, 10)
        assert [path.name for path in disk.iterdir()] == ["step-00000005"]
        assert checkpoint.newest_complete(disk).step == 5


def test_the_newest_and_every_nth_are_kept(tmp_path, saving):
    for step in range(1, 11):
        saving(tmp_path, step)
        checkpoint.rotate(tmp_path, keep=2, keep_every=4)
    assert sorted(int(path.name.removeprefix("step-")) for path in tmp_path.iterdir()) == [4, 8, 9, 10]


def test_torn_and_foreign_folders_never_count_as_kept_ones(tmp_path, saving):
    saving(tmp_path, 10)
    truncate(saving(tmp_path, 20))
    (tmp_path / "step-00000030.partial").mkdir()
    (tmp_path / "step-old").mkdir()
    saving(tmp_path, 12)
    checkpoint.rotate(tmp_path, keep=1, keep_every=10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000012", "step-old"]
    assert checkpoint.newest_complete(tmp_path).step == 12


def test_run_whose_checkpoints_are_all_torn_is_not_started_over(tmp_path, saving):
    layout = BatchLayout(world_size=1, micro_batch=8, accumulation=1, blocks_per_step=8, blocks_per_micro_batch=8)
    assert newest_checkpoint(tmp_path, 100, layout) is None
    truncate(saving(tmp_path, 10))
    with pytest.raises(CheckpointError, match="step-00000010, but no whole checkpoint"):
        newest_checkpoint(tmp_path, 100, layout)
    saving(tmp_path, 20)
    assert newest_checkpoint(tmp_path, 100, layout).step == 20
    with pytest.raises(ConfigError, match="the run is 15 steps long, its checkpoint .* is at step 20"):
        newest_checkpoint(tmp_path, 15, layout)
    with pytest.raises(CheckpointError, match="cursor 160 is not that of step 20 with 4 blocks"):
        newest_checkpoint(tmp_path, 100, replace(layout, blocks_per_step=4))


def test_format_of_the_future_is_refused(tmp_path, saving):
    folder = saving(tmp_path, 5)
    meta = json.loads((folder / "meta.json").read_text()) | {"format": 99}
    text = json.dumps(meta).encode()
    (folder / "meta.json").write_bytes(text)
    (folder / "complete").write_text(checkpoint.hashlib.sha256(text).hexdigest())
    with pytest.raises(CheckpointError, match="format 99, this version reads 1"):
        checkpoint.open_checkpoint(folder)
