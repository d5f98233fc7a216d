"""Whole runs in real processes: the same samples at any world size, and nothing lost by a kill."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from msm_dist.data.index import load_index, members
from msm_dist.engine.checkpoint import is_complete
from tests.chaos.faulty import WRITE, Faulty, Where
from tests.corpus import write_corpus
from tests.processes import HERE, free_port, rank_environment

pytestmark = pytest.mark.distributed

STEPS = 14
SETTINGS = [
    "train.global_batch=16",
    "train.micro_batch=4",
    "train.precision=fp32",
    f"train.steps={STEPS}",
    "train.log_every=1",
    "train.valid_every=7",
    "train.valid_clips=12",
    "train.pictures_every=0",
    "train.trace=true",
    "checkpoint.every=4",
    "checkpoint.keep=2",
    "data.num_workers=1",
    "data.block=4",
    "data.crop_frames=96",
    "data.shuffle_window=16",
    "model.size=null",
    "model.embed_dim=32",
    "model.depth=1",
    "model.num_heads=2",
    "model.decoder_embed_dim=16",
    "model.decoder_depth=1",
    "model.decoder_num_heads=2",
    "optim.lr=1e-2",
    "optim.warmup_steps=2",
]


class Runs:
    """Starts runs on one corpus, in one folder of runs."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.train = write_corpus(folder / "train", seed=0)
        self.valid = write_corpus(folder / "valid", count=24, num_shards=1, seed=1)
        self.config = folder / "empty.yaml"
        self.config.write_text("")

    def command(self, name: str, *settings: str) -> list[str]:
        return [
            str(self.config),
            f"run.dir={self.folder}",
            f"run.name={name}",
            f"data.shards={self.train}",
            f"data.valid_shards={self.valid}",
            *SETTINGS,
            *settings,
        ]

    def start(self, name: str, *settings: str, ranks: int = 2, **environment: str) -> list[subprocess.Popen]:
        port = free_port()
        return [
            subprocess.Popen(
                [sys.executable, str(HERE / "pretrain_worker.py"), *self.command(name, *settings)],
                env=rank_environment(rank, ranks, port) | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=HERE.parent,
            )
            for rank in range(ranks)
        ]

    def run(self, name: str, *settings: str, ranks: int = 2, **environment: str) -> tuple[list[int], str]:
        """Exit codes and outputs; when a rank fails its peers are ended, as a launcher does."""
        return finish(self.start(name, *settings, ranks=ranks, **environment))

    def trace(self, name: str) -> list[dict]:
        records = [
            json.loads(line)
            for path in (self.folder / name / "trace").glob("rank-*.jsonl")
            for line in path.read_text().splitlines()
        ]
        return sorted(records, key=lambda record: (record["step"], record["block"], record["slot"]))

    def metrics(self, name: str) -> list[dict]:
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def losses(self, name: str) -> list[tuple]:
        kept = ("step", "loss", "lr", "grad_norm", "valid_loss", "reference_mel_mean")
        return [tuple(line.get(key) for key in kept) for line in self.metrics(name)]

    def weights(self, name: str) -> str:
        return hashlib.sha256((self.folder / name / "export/model.safetensors").read_bytes()).hexdigest()

    def checkpoints(self, name: str) -> list[str]:
        return sorted(path.name for path in (self.folder / name / "checkpoints").iterdir())

    def last_checkpoint(self, name: str) -> dict[str, bytes]:
        """Its files; meta.json has the digests of those that hold the state."""
        folder = self.folder / name / "checkpoints" / self.checkpoints(name)[-1]
        assert is_complete(folder)
        return {file: (folder / file).read_bytes() for file in ("meta.json", "complete")}


def finish(processes: list[subprocess.Popen], timeout: float = 600, end_peers: bool = True) -> tuple[list[int], str]:
    """Exit codes and rank 0's output, other ranks' behind it."""
    deadline = time.monotonic() + timeout
    try:
        while any(process.poll() is None for process in processes):
            assert time.monotonic() < deadline, "the run hangs"
            if end_peers and any(process.poll() not in (None, 0) for process in processes):
                time.sleep(1)
                for process in processes:
                    process.kill()
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
    outputs = [process.communicate()[0] for process in processes]
    return [process.returncode for process in processes], "\n".join(outputs)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    runs = Runs(tmp_path_factory.mktemp("runs"))
    codes, output = runs.run("undisturbed")
    assert codes == [0, 0], output
    return runs


def test_run_leaves_what_the_readme_promises(runs):
    folder = runs.folder / "undisturbed"
    assert {path.name for path in folder.iterdir()} >= {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "plan.json",
        "tensorboard",
        "checkpoints",
        "export",
        "pictures",
        "trace",
    }
    assert not (folder / "lock.json").exists()
    assert runs.checkpoints("undisturbed") == ["step-00000012", "step-00000014"]
    assert all(is_complete(path) for path in (folder / "checkpoints").iterdir())
    train = [line for line in runs.metrics("undisturbed") if "loss" in line]
    valid = [line for line in runs.metrics("undisturbed") if "valid_loss" in line]
    assert [line["step"] for line in train] == list(range(1, STEPS + 1))
    assert [line["step"] for line in valid] == [7, 14]
    assert set(valid[0]) >= {"reference_mel_mean", "reference_visible_mean", "reference_nearest_patch"}
    assert train[-1]["loss"] < train[0]["loss"]


def test_every_sample_of_an_epoch_is_served_once(runs):
    first = [record["clip"] for record in runs.trace("undisturbed") if record["epoch"] == 0]
    assert len(first) == len(set(first)) == 192


@pytest.mark.parametrize(("ranks", "workers", "micro"), [(1, 0, 16), (2, 2, 8)])
def test_world_size_workers_and_micro_batch_do_not_change_the_samples(runs, ranks, workers, micro):
    name = f"world-{ranks}-{workers}-{micro}"
    codes, output = runs.run(
        name, f"data.num_workers={workers}", f"train.micro_batch={micro}", "train.steps=6", ranks=ranks
    )
    assert codes == [0] * ranks, output
    expected = [record for record in runs.trace("undisturbed") if record["step"] <= 6]
    assert runs.trace(name) == expected
    # The learning rate differs with the length, so that only the first two steps, in warm-up, can be compared.
    for mine, theirs in zip(runs.losses(name)[:2], runs.losses("undisturbed")[:2], strict=True):
        assert mine[1] == pytest.approx(theirs[1], rel=1e-5)


def test_failed_first_start_records_no_settings(runs):
    codes, output = runs.run("mistaken", "data.valid_shards=nowhere", ranks=1)
    assert codes == [2]
    assert "data.valid_shards = nowhere" in output
    codes, output = runs.run("mistaken", "data.valid_shards=null", "optim.lr=2e-2", "train.steps=3", ranks=1)
    assert codes == [0], output


def test_slots_of_a_missing_shard_are_filled_and_counted(runs, tmp_path):
    shards = shutil.copytree(runs.train, tmp_path / "shards")
    (shards / "clips-000001.tar").unlink()
    where = (f"data.shards={shards}", "data.allow_missing_shards=true")
    codes, output = runs.run("missing", *where, ranks=1)
    assert codes == [0], output
    absent = {f"clip{number:04d}" for number in range(1, 192, 3)}
    expected = runs.trace("undisturbed")
    served = runs.trace("missing")
    kept = [(mine, theirs) for mine, theirs in zip(served, expected, strict=True) if theirs["key"] not in absent]
    assert all(mine == theirs for mine, theirs in kept)
    assert not absent & {record["key"] for record in served}
    last = [line for line in runs.metrics("missing") if "loss" in line][-1]
    assert (last["bad_clips"], last["missing_clips"]) == (0, len(served) - len(kept))


def test_bf16_run_killed_and_continued_equals_one_never_killed(runs):
    settings = ("train.precision=bf16", "train.steps=8")
    codes, output = runs.run("bf16", *settings)
    assert codes == [0, 0], output
    # Where the next is begun the one before is complete: here that of step 2.
    runs.run("bf16-killed", *settings, "checkpoint.every=2", KILL="step:6")
    codes, output = runs.run("bf16-killed", *settings)
    assert codes == [0, 0], output
    assert "continued from" in output
    assert ("Triton" if torch.cuda.is_available() else "reference kernels") in output
    assert runs.losses("bf16-killed") == runs.losses("bf16")
    assert runs.weights("bf16-killed") == runs.weights("bf16")


KILLS = [
    ("step:2", 0),
    ("step:6", 1),
    ("torn:1", 1),
    ("write:2", 0),
    ("torn:3", 0),
    ("rename", 0),
    ("step:13", 0),
    ("export", 0),
]


def test_run_killed_at_many_points_equals_one_never_killed(runs):
    for kill, rank in KILLS:
        codes, output = runs.run("killed", KILL=kill, KILL_RANK=str(rank))
        assert codes[rank] == -signal.SIGKILL, f"{kill}: {output}"
    codes, output = runs.run("killed")
    assert codes == [0, 0], output
    assert runs.losses("killed") == runs.losses("undisturbed")
    assert runs.trace("killed") == runs.trace("undisturbed")
    assert runs.weights("killed") == runs.weights("undisturbed")
    assert runs.last_checkpoint("killed") == runs.last_checkpoint("undisturbed")


def test_kill_while_a_checkpoint_is_written_beside_training_falls_back_to_the_one_before(runs):
    codes, output = finish(runs.start("beside", KILL="beside:2", KILL_RANK="1"), end_peers=False)
    assert codes == [1, -signal.SIGKILL], output
    assert "Traceback" not in output
    assert runs.checkpoints("beside") == ["step-00000004", "step-00000008.partial"]
    assert runs.metrics("beside")[-1]["step"] >= 10
    codes, output = runs.run("beside")
    assert codes == [0, 0], output
    assert "continued from" in output
    assert "step-00000004," in output
    assert runs.losses("beside") == runs.losses("undisturbed")
    assert runs.weights("beside") == runs.weights("undisturbed")
    assert runs.last_checkpoint("beside") == runs.last_checkpoint("undisturbed")


def test_finished_run_has_waited_for_its_last_checkpoint_and_tells_what_steps_waited_for(runs):
    codes, output = runs.run("slow-disk", "train.steps=6", "checkpoint.every=2", ranks=1, KILL="disk:1")
    assert codes == [0], output
    assert runs.checkpoints("slow-disk") == ["step-00000004", "step-00000006"]
    assert runs.last_checkpoint("slow-disk")
    held_up = [line["step"] for line in runs.metrics("slow-disk") if line.get("checkpoint_stall_seconds", 0) > 0]
    assert held_up == [3, 5]


def test_run_whose_last_checkpoint_can_not_be_written_is_not_finished(runs):
    processes = runs.start("unsaved", "train.steps=3", "checkpoint.every=50", KILL="full:1", KILL_RANK="1")
    codes, output = finish(processes, end_peers=False)
    assert codes == [2, 2], output
    assert output.count("rank 1: ") == output.count("No space left on device") == 1
    assert "Traceback" not in output
    assert runs.checkpoints("unsaved") == []
    assert not (runs.folder / "unsaved" / "export").exists()


def test_second_signal_does_not_wait_for_a_checkpoint_being_written(runs):
    processes = runs.start("impatient", "checkpoint.every=2", ranks=1, KILL="disk:600")
    metrics, partial = (runs.folder / "impatient" / name for name in ("metrics.jsonl", "checkpoints"))
    partial /= "step-00000002.partial"
    wait_for(lambda: partial.exists() and len(metrics.read_text().splitlines()) >= 3, processes)
    deadline = time.monotonic() + 300
    while processes[0].poll() is None:
        assert time.monotonic() < deadline
        processes[0].send_signal(signal.SIGTERM)
        time.sleep(0.2)
    codes, output = finish(processes)
    assert codes == [143], output
    assert runs.checkpoints("impatient") == ["step-00000002.partial"]


def test_rank_that_is_killed_is_missed_at_once_by_the_others(runs):
    codes, output = finish(runs.start("left", KILL="step:3", KILL_RANK="1"), end_peers=False)
    assert codes == [1, -signal.SIGKILL], output
    assert "rank 0: another process of the run ended" in output
    assert "Traceback" not in output


@pytest.mark.parametrize(("sent", "expected"), [(signal.SIGUSR1, [75, 75]), (signal.SIGHUP, [143, 129])])
def test_signal_to_one_rank_stops_all_after_a_save_and_the_run_continues(runs, sent, expected):
    name = f"signal-{sent.name}"
    ignored = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as it would be inherited where nohup started the tests
    processes = runs.start(name, KILL="slow:1")  # the signal comes in the midst of them, ten steps before the end
    signal.signal(signal.SIGHUP, ignored)
    metrics = runs.folder / name / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 2, processes)
    processes[1].send_signal(sent)
    codes, output = finish(processes, end_peers=False)
    assert codes == expected, output
    assert "stopped and saved at step" in output
    codes, output = runs.run(name)
    assert codes == [0, 0], output
    assert "continued from" in output
    assert runs.losses(name) == runs.losses("undisturbed")
    assert runs.weights(name) == runs.weights("undisturbed")


def wait_for(condition, processes, timeout=600):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes), finish(processes)
        time.sleep(0.01)


def test_finished_run_says_so_and_more_steps_continue_it(runs):
    codes, output = runs.run("undisturbed")
    assert codes == [0, 0], output
    assert "is finished: 14 steps" in output


def test_second_start_of_a_running_run_is_refused(runs):
    lock = runs.folder / "busy" / "lock.json"
    processes = runs.start("busy", "train.steps=100000", "checkpoint.every=100000")
    try:
        wait_for(lock.exists, processes)
        owner = json.loads(lock.read_text())["pid"]
        codes, output = runs.run("busy", ranks=1)
        assert codes == [2]
        assert f"process {owner}" in output
        assert "Traceback" not in output
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_other_settings_for_the_same_run_are_refused(runs):
    codes, output = runs.run("undisturbed", "optim.lr=0.5", "seed=3", ranks=1)
    assert codes == [2]
    assert "optim.lr: 0.01" in output
    assert "seed: 0" in output
    assert "run.name=" in output
    assert "Traceback" not in output


@pytest.mark.parametrize("poison", ["nan", "inf"])
def test_loss_that_is_not_finite_on_one_rank_stops_all_with_step_rate_and_clips(runs, poison):
    name = f"diverged-{poison}"
    processes = runs.start(name, KILL=f"{poison}:6", KILL_RANK="1")
    codes, output = finish(processes, end_peers=False)
    assert codes == [3, 3], output
    assert "step 6, lr " in output
    assert "Traceback" not in output
    clips = json.loads((runs.folder / name / "diverged.json").read_text())["clips"]
    assert sorted(clips) == sorted(record["key"] for record in runs.trace("undisturbed") if record["step"] == 6)
    codes, output = runs.run(name)
    assert codes == [0, 0], output
    assert runs.weights(name) == runs.weights("undisturbed")


def test_shards_that_break_in_mid_run_stop_all_ranks_saved_and_the_run_continues_once_mended(runs, tmp_path):
    shards = shutil.copytree(runs.train, tmp_path / "shards")
    where = f"data.shards={shards}"
    processes = runs.start("broken", where, "data.num_workers=0", KILL="truncate:3", KILL_RANK="1")
    codes, output = finish(processes, end_peers=False)
    assert codes == [2, 2], output
    assert "its index says" in output
    assert "Traceback" not in output
    shutil.rmtree(shards)
    shutil.copytree(runs.train, shards)
    codes, output = runs.run("broken", where)
    assert codes == [0, 0], output
    assert "continued from" in output
    assert runs.trace("broken") == runs.trace("undisturbed")
    assert runs.weights("broken") == runs.weights("undisturbed")


def spoil(shards: Path, keys: list[str]) -> None:
    """Overwrite the FLAC data of members in place, and give the tars digests of their own in the index."""
    index = load_index(str(shards))
    for shard in index.shards:
        table = members(shard)
        with shard.path.open("r+b") as file:
            for row in table[np.isin(table["key"], [key.encode() for key in keys])]:
                file.seek(row["offset"])
                file.write(b"\0" * int(row["size"]))


def test_bad_clips_are_filled_and_counted_and_too_many_stop_the_run(runs, tmp_path):
    shards = shutil.copytree(runs.train, tmp_path / "shards")
    expected = runs.trace("undisturbed")
    bad = [expected[0]["key"], expected[20]["key"]]
    spoil(shards, bad)
    where = f"data.shards={shards}"
    codes, output = runs.run("bad", where, "data.max_bad_fraction=0.02", ranks=1)
    assert codes == [0], output
    assert all(key in output for key in bad)
    served = runs.trace("bad")
    filled = [mine for mine, theirs in zip(served, expected, strict=True) if mine != theirs]
    slots = [(record["step"], record["block"], record["slot"]) for record in expected if record["key"] in bad]
    assert [(record["step"], record["block"], record["slot"]) for record in filled] == slots
    assert all(record["crop"] >= 1 and record["key"] not in bad for record in filled)
    last = [line for line in runs.metrics("bad") if "loss" in line][-1]
    assert (last["bad_clips"], last["missing_clips"]) == (len(slots), 0)

    codes, output = runs.run("too-bad", where, "data.max_bad_fraction=0.001", ranks=1)
    assert codes == [2], output
    assert "data.max_bad_fraction = 0.001: 1 of 16 samples by step 1 could not be decoded (an epoch has 192)" in output
    assert f"Check with `msm-dist data verify {shards} --decode`" in output
    assert "Traceback" not in output


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_full_disk_stops_all_ranks_with_one_message_and_the_last_checkpoint_whole(runs):
    disk = runs.folder / "full" / "checkpoints"
    disk.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", str(disk)], check=True)
    try:
        processes = runs.start("full", "checkpoint.every=2", "checkpoint.keep=9")
        codes, output = finish(processes, end_peers=False)
        assert codes == [2, 2], output
        assert output.count("No space left on device") == 1
        assert "Traceback" not in output
        left = runs.checkpoints("full")
        assert left
        assert all(is_complete(disk / name) for name in left)
        shutil.rmtree(disk / left[0])
        codes, output = runs.run("full", "checkpoint.every=50", "checkpoint.keep=1", ranks=1)
        assert codes == [0], output
        assert "continued from" in output
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def launch(runs: Runs, name: str, ranks: int, *settings: str, **environment: str) -> subprocess.Popen:
    script = Path(sys.executable).with_name("deepspeed")
    door = [str(script), "--num_accelerators", str(ranks), "--master_port", str(free_port())]
    return subprocess.Popen(
        [*door, "--module", "msm_dist.pretrain", *runs.command(name, *settings)],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=HERE.parent,
    )


def test_torchrun_starts_the_same_run(runs):
    door = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    done = subprocess.run(
        [*door, "-m", "msm_dist.pretrain", *runs.command("torchrun")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=HERE.parent,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert runs.trace("torchrun") == runs.trace("undisturbed")
    assert runs.weights("torchrun") == runs.weights("undisturbed")


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_launcher_leaves_no_orphans_and_the_same_command_continues(runs, ranks, tmp_path):
    name, faulty = f"launched-{ranks}", Faulty(tmp_path)
    settings = ["train.steps=80", "train.valid_every=80", "checkpoint.every=30"]
    hold = faulty.pause(Where(WRITE, f"{runs.folder}/{name}/metrics.jsonl", '{"step": 4, "loss"'))
    first = launch(runs, name, ranks, *settings, **faulty.environment)
    wait_for(hold.is_reached, [first])
    first.kill()
    hold.let_go()
    first.communicate()
    second = launch(runs, name, ranks, *settings)
    output = second.communicate(timeout=600)[0]
    assert second.returncode == 0, output
    assert "continued from" in output
    trace = runs.trace(name)
    assert [record["step"] for record in trace] == [1 + i // 16 for i in range(80 * 16)]
    assert [record for record in trace if record["step"] <= STEPS] == runs.trace("undisturbed")
