"""Checkpoints as files: what counts as whole, in which order they are written, what is kept; and beside training.

That engines of any world size read them back exactly is in test_engine.py and test_pretrain.py.
"""

import errno
import json
import os
import subprocess
import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from msm_dist.config import BatchLayout, Checkpoint
from msm_dist.engine import checkpoint, saving
from msm_dist.engine.resume import newest_of_run
from msm_dist.errors import CheckpointError, ConfigError, MsmError


class Alone:
    """A world of one, without process groups."""

    rank, size, is_main, device = 0, 1, True, torch.device("cpu")

    def agree_any(self, flag):
        return flag

    def gather(self, value):
        return [value]

    def on_main(self, action):
        return action()

    def together(self, action, kind):
        try:
            return action()
        except MsmError as error:
            raise kind(str(error)) from error

    def beside(self, timeout_minutes):
        return self


@pytest.fixture
def live(monkeypatch):
    """The state of a made-up engine with one parameter."""
    parts = {"param": torch.arange(6.0), "exp_avg": torch.ones(6), "exp_avg_sq": torch.zeros(6)}
    monkeypatch.setattr(checkpoint.state, "shapes", lambda engine: {"w": parts["param"].shape})
    monkeypatch.setattr(checkpoint.state, "full_state", lambda engine: iter([("w", parts)]))
    monkeypatch.setattr(checkpoint.state, "optimizer_step", lambda engine: 5.0)
    monkeypatch.setattr(checkpoint.state, "loss_scale", lambda engine: None)
    return parts


@pytest.fixture
def saving_now(live):
    """`save(root, step)` of that engine."""
    return lambda root, step: checkpoint.save(None, root, step, {"cursor": step * 8}, Alone())


def test_newest_whole_checkpoint_is_found_with_what_was_saved(tmp_path, saving_now):
    assert checkpoint.newest_complete(tmp_path) is None
    for step in (5, 10, 100):
        saving_now(tmp_path, step)
    saved = checkpoint.newest_complete(tmp_path)
    assert (saved.step, saved.meta["cursor"], saved.meta["optimizer_step"]) == (100, 800, 5.0)
    assert saved.folder == tmp_path / "step-00000100"


def test_saving_a_step_again_changes_nothing(tmp_path, saving_now):
    folder = saving_now(tmp_path, 5)
    before = (folder / "meta.json").stat().st_mtime_ns
    assert saving_now(tmp_path, 5) == folder
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
def test_torn_checkpoint_is_skipped_for_the_one_before(tmp_path, saving_now, damage, caplog):
    saving_now(tmp_path, 5)
    damage(saving_now(tmp_path, 10))
    assert checkpoint.newest_complete(tmp_path).step == 5
    assert "step-00000010" in caplog.text or (tmp_path / "step-00000010.partial").exists()


def test_flipped_byte_is_found_when_the_checkpoint_is_read(tmp_path, saving_now):
    saved = checkpoint.open_checkpoint(saving_now(tmp_path, 10))
    path = saved.folder / "state-00000-of-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="not those that were saved"):
        checkpoint.load(None, saved, Alone())


def test_marker_is_written_last_and_nothing_is_named_before_it_is_on_the_disk(tmp_path, saving_now, monkeypatch):
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
    saving_now(tmp_path, 10)
    assert events == [
        "state-00000-of-00001.safetensors",
        "meta.json",
        "complete",
        "step-00000010.partial",
        "rename",
        tmp_path.name,
    ]


@pytest.mark.parametrize("failing", [1, 2, 3, 4])
def test_failing_disk_leaves_the_last_good_checkpoint(tmp_path, saving_now, monkeypatch, failing):
    saving_now(tmp_path, 5)
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises((CheckpointError, OSError), match="No space left on device"):
        saving_now(tmp_path, 10)
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
def test_full_disk_is_a_clear_error(tmp_path, saving_now, live):
    with small_disk(tmp_path / "disk", kilobytes=64) as disk:
        saving_now(disk, 5)
        live["param"] = torch.zeros(100_000)
        with pytest.raises(CheckpointError, match="No space left.*are untouched"):
            saving_now(disk, 10)
        assert [path.name for path in disk.iterdir()] == ["step-00000005"]
        assert checkpoint.newest_complete(disk).step == 5


def test_the_newest_and_every_nth_are_kept(tmp_path, saving_now):
    for step in range(1, 11):
        saving_now(tmp_path, step)
        checkpoint.rotate(tmp_path, keep=2, keep_every=4)
    assert sorted(int(path.name.removeprefix("step-")) for path in tmp_path.iterdir()) == [4, 8, 9, 10]


def test_torn_and_foreign_folders_never_count_as_kept_ones(tmp_path, saving_now):
    saving_now(tmp_path, 10)
    truncate(saving_now(tmp_path, 20))
    (tmp_path / "step-00000030.partial").mkdir()
    (tmp_path / "step-old").mkdir()
    saving_now(tmp_path, 12)
    checkpoint.rotate(tmp_path, keep=1, keep_every=10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000012", "step-old"]
    assert checkpoint.newest_complete(tmp_path).step == 12


def test_run_whose_checkpoints_are_all_torn_is_not_started_over(tmp_path, saving_now):
    layout = BatchLayout(world_size=1, micro_batch=8, accumulation=1, blocks_per_step=8, blocks_per_micro_batch=8)
    assert newest_of_run(tmp_path, 100, layout, Alone()) is None
    truncate(saving_now(tmp_path, 10))
    with pytest.raises(CheckpointError, match="step-00000010.damaged, but no whole checkpoint"):
        newest_of_run(tmp_path, 100, layout, Alone())
    saving_now(tmp_path, 20)
    assert newest_of_run(tmp_path, 100, layout, Alone()).step == 20
    with pytest.raises(ConfigError, match="the run is 15 steps long, its checkpoint .* is at step 20"):
        newest_of_run(tmp_path, 15, layout, Alone())
    with pytest.raises(CheckpointError, match="cursor 160 is not that of step 20 with 4 blocks"):
        newest_of_run(tmp_path, 100, replace(layout, blocks_per_step=4), Alone())


def test_format_of_the_future_is_refused(tmp_path, saving_now):
    folder = saving_now(tmp_path, 5)
    meta = json.loads((folder / "meta.json").read_text()) | {"format": 99}
    text = json.dumps(meta).encode()
    (folder / "meta.json").write_bytes(text)
    (folder / "complete").write_text(checkpoint.hashlib.sha256(text).hexdigest())
    with pytest.raises(CheckpointError, match="format 99, this version reads 1"):
        checkpoint.open_checkpoint(folder)


def test_files_may_be_read_by_whoever_may_read_the_folder(tmp_path, saving_now):
    folder = saving_now(tmp_path, 5)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {folder.stat().st_mode & 0o666}


class Gate:
    """Holds up the write of every state until it is opened, and notes when each begins and ends."""

    def __init__(self, monkeypatch):
        self.events = []
        self.opened = threading.Event()
        write_state = checkpoint._write_state

        def held_up(path, tensors):
            self.events.append(f"begin {path.parent.name}")
            assert self.opened.wait(600)
            entry = write_state(path, tensors)
            self.events.append(f"end {path.parent.name}")
            return entry

        monkeypatch.setattr(checkpoint, "_write_state", held_up)


@pytest.fixture
def gate(monkeypatch):
    return Gate(monkeypatch)


class Run:
    """Saves beside training, as the training loop does."""

    def __init__(self, root, keep=9):
        self.root = root
        self.saver = saving.Saver(root, Checkpoint(keep=keep), Alone(), timeout_minutes=1)
        self.record_synced = []

    def begin(self, step):
        self.saver.begin(None, step, {"cursor": step * 8}, lambda: self.record_synced.append(self.names()))

    def names(self):
        return sorted(path.name for path in self.root.iterdir()) if self.root.exists() else []


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_checkpoint_written_beside_training_is_that_of_its_step_to_the_byte(tmp_path, saving_now, live, gate):
    run = Run(tmp_path / "beside")
    for step in (5, 10):
        gate.opened.set()
        expected = contents(saving_now(tmp_path / "now", step))
        gate.opened.clear()
        run.begin(step)
        for value in live.values():
            value.add_(1.0)  # training goes on
        assert not (run.root / checkpoint.checkpoint_name(step)).exists()
        gate.opened.set()
        run.saver.finish()
        assert contents(run.root / checkpoint.checkpoint_name(step)) == expected


def test_memory_of_a_copy_is_used_again_for_the_next(live):
    host = {}
    checkpoint.copy_state(None, host, Alone())
    before = {name: value.data_ptr() for name, value in host.items()}
    live["param"] += 1
    checkpoint.copy_state(None, host, Alone())
    assert {name: value.data_ptr() for name, value in host.items()} == before
    assert torch.equal(host["param/w"], live["param"])
    assert host["param/w"].data_ptr() != live["param"].data_ptr()


def test_second_save_waits_for_the_first_and_the_wait_is_said(tmp_path, live, gate, monkeypatch, caplog):
    monkeypatch.setattr(saving, "WORTH_A_WORD_SECONDS", 0.0)
    run = Run(tmp_path)
    run.begin(5)
    assert run.saver.lap().keys() == {"checkpoint_stall_seconds"}
    finish = run.saver.finish

    def opening():
        gate.opened.set()
        finish()

    monkeypatch.setattr(run.saver, "finish", opening)  # what it waits in
    run.begin(10)
    assert checkpoint.newest_complete(tmp_path).step == 5
    run.saver.finish()
    assert gate.events == [f"{event} step-{step:08d}.partial" for step in (5, 10) for event in ("begin", "end")]
    seconds = run.saver.lap()
    assert seconds["checkpoint_stall_seconds"] >= seconds["checkpoint_wait_seconds"] > 0
    assert run.saver.lap() == {}
    assert "step 10: waited" in caplog.text
    assert "such waits so far: 1" in caplog.text


def test_old_checkpoint_is_deleted_only_after_the_new_one_is_complete(tmp_path, live, gate):
    run = Run(tmp_path, keep=1)
    gate.opened.set()
    run.begin(5)
    run.saver.finish()
    gate.opened.clear()
    run.begin(10)
    assert checkpoint.newest_complete(tmp_path).step == 5
    gate.opened.set()
    run.saver.finish()
    assert run.names() == ["step-00000010"]


def test_record_of_the_run_is_on_the_disk_before_the_checkpoint_counts(tmp_path, live):
    run = Run(tmp_path)
    run.begin(5)
    run.saver.finish()
    assert run.record_synced == [[]]
    assert run.names() == ["step-00000005"]


def test_saving_the_same_step_again_beside_training_changes_nothing(tmp_path, live):
    run = Run(tmp_path)
    run.begin(5)
    run.begin(5)
    run.saver.finish()
    assert len(run.record_synced) == 1
    assert checkpoint.newest_complete(tmp_path).step == 5


@pytest.fixture
def full_disk(monkeypatch):
    """Nothing can be flushed to the disk until this is called."""
    fsync = os.fsync

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    return lambda: monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("noticed_by", ["check", "begin", "finish"])
def test_failing_disk_beside_training_is_raised_at_the_next_point_of_all_ranks(
    tmp_path, live, saving_now, request, gate, noticed_by
):
    gate.opened.set()
    saving_now(tmp_path, 5)
    gate.opened.clear()
    make_room = request.getfixturevalue("full_disk")
    run = Run(tmp_path)
    run.begin(10)
    run.saver.check()  # nothing is wrong yet, and nobody waits
    gate.opened.set()
    run.saver._thread.submit(lambda: None).result()  # behind the write
    with pytest.raises(CheckpointError, match="step-00000010.*No space left.*are untouched"):
        run.begin(15) if noticed_by == "begin" else getattr(run.saver, noticed_by)()
    assert run.names() == ["step-00000005"]
    make_room()
    run.begin(20)
    run.saver.finish()
    assert checkpoint.newest_complete(tmp_path).step == 20


def test_whatever_ends_a_run_its_last_write_is_ended_first(tmp_path, live, gate, caplog):
    run = Run(tmp_path)
    run.begin(5)
    threading.Timer(0.2, gate.opened.set).start()
    run.saver.close()
    assert checkpoint.newest_complete(tmp_path).step == 5
    assert not caplog.text


def test_last_write_that_fails_does_not_hide_what_ended_the_run(tmp_path, live, full_disk, caplog):
    run = Run(tmp_path)
    run.begin(5)
    run.saver.close()
    assert "No space left" in caplog.text
    assert run.names() == []
