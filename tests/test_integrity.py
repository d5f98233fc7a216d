"""Whole runs whose files change under them: what was saved is verified, what is trained on is what the index says."""

import io
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import soundfile

from msm_dist.changed import CHANGED_FILE
from msm_dist.data.index import load_index, members
from tests.test_preempt import ForkedRuns
from tests.test_pretrain import finish
from tests.test_resume import STATE, flip

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(3000)]

FIRST_OF_TWO = STATE.replace("of-00001", "of-00002")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, forker):
    runs = ForkedRuns(tmp_path_factory.mktemp("runs"), forker)
    codes, output = runs.run("undisturbed")
    assert codes == [0, 0], output
    return runs


def test_run_that_falls_back_to_an_older_checkpoint_equals_one_never_disturbed(runs):
    codes, output = runs.run("damaged", "checkpoint.keep=9", KILL="step:15", KILL_RANK="1")
    assert codes[1] == -signal.SIGKILL, output
    folder = runs.folder / "damaged" / "checkpoints"
    # The write of step 12 beside training may have ended or not; those before have.
    shutil.rmtree(folder / "step-00000012", ignore_errors=True)
    flip(folder / "step-00000008" / FIRST_OF_TWO.replace("00000-", "00001-"))
    (folder / "step-00000900.partial").mkdir()
    (folder / "latest").symlink_to("step-00000008")
    codes, output = runs.run("damaged", "checkpoint.keep=9")
    assert codes == [0, 0], output
    assert "step-00000008.damaged" in output
    assert f"continued from {folder / 'step-00000004'}" in output
    assert output.count("taken instead of step-00000008") == 1
    assert (folder / "step-00000008.damaged").is_dir() and (folder / "step-00000008").is_dir()
    (folder / "latest").unlink()
    shutil.rmtree(folder / "step-00000008.damaged")
    runs.is_as_undisturbed("damaged")


def test_run_without_a_good_checkpoint_stops_with_a_remedy_and_goes_on_when_one_is_brought_back(runs, tmp_path):
    codes, output = runs.run("spoilt", KILL="step:7", KILL_RANK="0")
    assert codes[0] == -signal.SIGKILL, output
    folder = runs.folder / "spoilt" / "checkpoints"
    shutil.copytree(folder / "step-00000004", tmp_path / "step-00000004")
    flip(folder / "step-00000004" / FIRST_OF_TWO, 0)
    for _ in range(2):
        codes, output = finish(runs.start("spoilt"), end_peers=False)
        assert codes == [2, 2], output
        assert "holds step-00000004.damaged, but no whole checkpoint; bring one back" in output
        assert "Traceback" not in output
    shutil.rmtree(folder / "step-00000004.damaged")
    shutil.copytree(tmp_path / "step-00000004", folder / "step-00000004")
    codes, output = runs.run("spoilt")
    assert codes == [0, 0], output
    runs.is_as_undisturbed("spoilt")


LONG = ("train.steps=52", "train.valid_every=8", "train.valid_clips=4")


def with_padding(flac: bytes, size: int) -> bytes:
    """The same sound in a FLAC file of so many bytes."""
    end = 4
    while True:
        header, end = end, end + 4 + int.from_bytes(flac[end + 1 : end + 4], "big")
        if flac[header] & 0x80:
            break
    length = size - len(flac) - 4
    block = bytes([0x81]) + length.to_bytes(3, "big") + bytes(length)
    return flac[:header] + bytes([flac[header] & 0x7F]) + flac[header + 1 : end] + block + flac[end:]


def quieter(shard: Path, path: Path) -> None:
    """Overwrite a shard's clips in `path` by valid ones of their size and length: the same, an eighth as loud."""
    table = members(next(known for known in load_index(str(shard.parent)).shards if known.name == shard.name))
    with path.open("r+b") as file:
        for row in table:
            file.seek(row["offset"])
            sound, rate = soundfile.read(io.BytesIO(file.read(row["size"])), dtype="int16")
            encoded = io.BytesIO()
            soundfile.write(encoded, sound // 8, rate, format="FLAC", subtype="PCM_16")
            file.seek(row["offset"])
            file.write(with_padding(encoded.getvalue(), int(row["size"])))


def replaced(shard: Path) -> None:
    """Another file of the same size takes its name."""
    other = Path(shutil.copy(shard, shard.with_name("other")))
    quieter(shard, other)
    other.rename(shard)


# What happens, what is said of it, loader workers.
CHANGES = [
    (lambda shard: quieter(shard, shard), "was written to", 1),
    (Path.unlink, "was deleted", 0),
    (lambda shard: os.truncate(shard, 3000), "has 3000 bytes, its index says", 1),
    (replaced, "was replaced by another file", 0),
]


def test_shards_changed_in_mid_run_stop_it_saved_until_they_are_restored_and_nothing_of_them_is_trained_on(
    runs, tmp_path
):
    codes, output = runs.run("whole", *LONG)
    assert codes == [0, 0], output
    shards = shutil.copytree(runs.train, tmp_path / runs.train.name)
    shard = shards / "clips-000001.tar"
    listed = runs.folder / "changed" / CHANGED_FILE
    step = 0
    for change, told, workers in CHANGES:
        settings = (*LONG, f"data.shards={shards}", f"data.num_workers={workers}")
        # It waits in the next validation, at a step between this and the one it stops at.
        processes = runs.reach("changed", *settings, KILL="pause:validate", KILL_RANK="all")
        whole = shard.read_bytes()
        change(shard)
        runs.go.touch()
        codes, output = finish(processes, end_peers=False)
        assert codes == [2, 2], output
        assert f"clips-000001.tar {told}" in output
        assert "stopped and saved at step" in output and "Traceback" not in output
        assert step < (step := runs.newest("changed"))
        assert [entry["name"] for entry in json.loads(listed.read_text())] == ["clips-000001.tar"]

        codes, output = finish(runs.start("changed", *settings), end_peers=False)
        assert codes == [2, 2], output
        assert "clips-000001.tar" in output and "Traceback" not in output
        assert runs.newest("changed") == step and listed.exists()
        shard.write_bytes(whole)
    # Told to stop before it has come to read the shard again.
    processes = runs.reach("changed", *settings, KILL="pause:validate", KILL_RANK="all")
    quieter(shard, shard)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    runs.go.touch()
    codes, output = finish(processes, end_peers=False)
    assert codes == [143, 143], output
    assert [entry["name"] for entry in json.loads(listed.read_text())] == ["clips-000001.tar"]
    codes, output = finish(runs.start("changed", *settings), end_peers=False)
    assert codes == [2, 2], output
    shard.write_bytes(whole)
    codes, output = runs.run("changed", *LONG, f"data.shards={shards}")
    assert codes == [0, 0], output
    assert "note       shards that had changed are what they were again: clips-000001.tar" in output
    assert not listed.exists()
    runs.is_as_undisturbed("changed", "whole")
