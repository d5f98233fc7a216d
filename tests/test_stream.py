"""Batches from real loader processes: the plan's order whatever the layout, and clean ends of every kind."""

import gc
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import weakref
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from msm_dist.config import BatchLayout, Data, Features
from msm_dist.data.crops import CropReader, Source
from msm_dist.data.plan import make_plan, micro_batch_blocks
from msm_dist.data.stream import Batch, _start_worker, make_loader, trace_records
from msm_dist.errors import ConfigError, DataError
from tests.shards import damage_clip, noise_clips, write_corpus

BLOCK = 4
GLOBAL_BATCH = 32
FRAMES = 16


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"), noise_clips(150), clips_per_shard=40)


def layout_of(world_size, micro_batch):
    accumulation = GLOBAL_BATCH // (world_size * micro_batch)
    return BatchLayout(world_size, micro_batch, accumulation, GLOBAL_BATCH // BLOCK, micro_batch // BLOCK)


def open_loader(index, num_workers, layout, rank=0, start_step=0, missing=()):
    plan = make_plan([shard.clips for shard in index.shards], 7, None, BLOCK, 16, 1)
    data = Data(crop_frames=FRAMES, num_workers=num_workers)
    return make_loader(plan, index, Features(), data, layout, rank, start_step, missing)


def loader_of(*arguments, **options):
    return closing(open_loader(*arguments, **options))


def trace(index, num_workers, world_size, micro_batch, start_step=0, num_steps=3):
    """The trace of all ranks of a run, in the order of the plan, per step."""
    layout = layout_of(world_size, micro_batch)
    records = []
    for rank in range(world_size):
        with loader_of(index, num_workers, layout, rank, start_step) as loader:
            for i, batch in enumerate(islice(loader, num_steps * layout.accumulation)):
                blocks = micro_batch_blocks(
                    start_step * layout.accumulation + i, rank, world_size, layout.blocks_per_micro_batch
                )
                assert batch.blocks.tolist() == np.repeat(blocks, BLOCK).tolist()
                records += trace_records(batch, start_step + i // layout.accumulation + 1)
    return sorted(records, key=lambda record: (record["step"], record["block"], record["slot"]))


@pytest.fixture(scope="module")
def expected(corpus):
    """The trace of six steps, read without a loader."""
    plan = make_plan([shard.clips for shard in corpus.shards], 7, None, BLOCK, 16, 1)
    reader = CropReader(Source(plan, corpus, Features(), FRAMES))
    records = []
    for n in range(6 * GLOBAL_BATCH // BLOCK):
        crops = reader.read(plan.block_samples(n))
        batch = Batch(
            crops=torch.from_numpy(np.stack([crop.values for crop in crops])),
            sample_ids=torch.from_numpy(plan.block_samples(n)),
            blocks=torch.full((BLOCK,), n),
            offsets=torch.tensor([crop.offset for crop in crops]),
            keys=[f"clip-{clip:04d}" for clip in plan.block_samples(n)[:, 1]],
            num_bad=0,
            num_missing=0,
        )
        records += trace_records(batch, n // (GLOBAL_BATCH // BLOCK) + 1)
    return records


@pytest.mark.parametrize(
    ("world_size", "num_workers", "micro_batch"), [(1, 0, 32), (1, 0, 8), (2, 1, 8), (2, 2, 4), (4, 2, 8)]
)
def test_every_layout_serves_the_same_steps(corpus, expected, world_size, num_workers, micro_batch):
    steps = 3 * GLOBAL_BATCH
    assert trace(corpus, num_workers, world_size, micro_batch) == expected[:steps]


@pytest.mark.parametrize(("world_size", "num_workers", "micro_batch"), [(1, 0, 16), (2, 2, 8)])
def test_a_loader_started_later_serves_the_tail(corpus, expected, world_size, num_workers, micro_batch):
    tail = trace(corpus, num_workers, world_size, micro_batch, start_step=4, num_steps=2)
    assert tail == expected[4 * GLOBAL_BATCH :]


def test_a_batch_has_the_promised_shapes_and_types(corpus):
    with loader_of(corpus, 1, layout_of(1, 8)) as loader:
        batch = next(loader)
    assert (batch.crops.shape, batch.crops.dtype) == ((8, 160 * (FRAMES - 1) + 400), torch.int16)
    assert (batch.sample_ids.shape, batch.sample_ids.dtype) == ((8, 3), torch.int64)
    assert (batch.offsets.dtype, batch.blocks.dtype) == (torch.int64, torch.int64)
    assert len(batch.keys) == 8 and (batch.num_bad, batch.num_missing) == (0, 0)


def test_a_loader_draws_no_random_numbers_of_the_training_process(corpus):
    state = torch.get_rng_state()
    with loader_of(corpus, 1, layout_of(1, 8)) as loader:
        next(loader)
    assert torch.equal(torch.get_rng_state(), state)


def test_stand_ins_are_counted_apart_and_logged_once_per_worker(tmp_path, caplog):
    index = write_corpus(tmp_path, noise_clips(150), clips_per_shard=40)
    damage_clip(index, 10)
    index.shards[2].path.unlink()
    with loader_of(index, 0, layout_of(1, 32), missing={2}) as loader:
        batches = list(islice(loader, 10))
    served = np.concatenate([batch.sample_ids.numpy() for batch in batches])
    assert sum(batch.num_missing for batch in batches) > 60
    assert sum(batch.num_bad for batch in batches) >= 2
    assert not ({10} | set(range(80, 120))) & set(served[:, 1].tolist())
    assert len(np.unique(served, axis=0)) == len(served)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_trace_records_say_where_each_crop_stood_and_hash_what_was_used(corpus):
    with loader_of(corpus, 0, layout_of(1, 8)) as loader:
        batch = next(loader)
    records = trace_records(batch, 3, np.arange(16).reshape(8, 2))
    fields = ["step", "block", "slot", "key", "epoch", "clip", "crop", "offset", "audio", "mask"]
    assert list(records[0]) == fields
    assert [record["slot"] for record in records] == [0, 1, 2, 3] * 2
    assert [record["block"] for record in records] == [0] * 4 + [1] * 4
    assert [len(record["audio"]) for record in records] == [16] * 8
    assert len({record["audio"] for record in records}) == len({record["mask"] for record in records}) == 8
    waveform = batch.crops.clone()
    waveform[5, 100] += 1
    changed = trace_records(replace(batch, crops=waveform), 3, np.arange(16).reshape(8, 2))
    assert [i for i in range(8) if changed[i] != records[i]] == [5]


def test_a_fault_in_a_worker_arrives_as_it_was_raised(tmp_path, expected):
    index = write_corpus(tmp_path, noise_clips(150), clips_per_shard=40)
    with open(index.shards[1].path, "r+b") as file:
        file.truncate(5000)
    with (
        loader_of(index, 2, layout_of(1, 4)) as loader,
        pytest.raises(DataError) as error,
    ):
        for i, batch in enumerate(loader):
            assert batch.keys == [record["key"] for record in expected[4 * i : 4 * i + 4]]
    assert str(error.value).startswith(f"{index.shards[1].path}: 5000 bytes, its index says")
    assert "Traceback" not in str(error.value)


def test_a_killed_worker_is_an_error_of_the_next_batches(corpus):
    with loader_of(corpus, 2, layout_of(1, 8)) as loader:
        next(loader)
        os.kill(loader.worker_pids[1], signal.SIGKILL)
        with pytest.raises(DataError, match="a loader worker died .SIGKILL.*last checkpoint"):
            for _ in islice(loader, 100):
                pass


def test_the_training_process_keeps_its_signals_and_is_not_interrupted_by_a_dead_worker(corpus):
    handler = signal.getsignal(signal.SIGCHLD)
    with loader_of(corpus, 1, layout_of(1, 8)) as loader:
        assert signal.getsignal(signal.SIGCHLD) == handler
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
        os.kill(loader.worker_pids[0], signal.SIGKILL)
        wait_until(lambda: state_of(loader.worker_pids[0]) == "Z")


def test_workers_ignore_the_signals_of_the_training_process(corpus):
    with loader_of(corpus, 2, layout_of(1, 8)) as loader:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            for pid in loader.worker_pids:
                os.kill(pid, number)
        assert len(list(islice(loader, 20))) == 20
        assert all(state_of(pid) not in "ZX" for pid in loader.worker_pids)


def test_close_ends_a_worker_that_is_stuck(corpus):
    with loader_of(corpus, 2, layout_of(1, 8)) as loader:
        next(loader)
        pids = loader.worker_pids
        os.kill(pids[0], signal.SIGSTOP)
    assert [state_of(pid) for pid in pids] == ["X", "X"]


def test_workers_die_with_a_training_process_that_is_killed(corpus):
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def train():
        with loader_of(corpus, 2, layout_of(1, 8)) as loader:
            next(loader)
            sender.send(loader.worker_pids)
            time.sleep(600)

    process = multiprocessing.get_context("fork").Process(target=train)
    process.start()
    pids = receiver.recv()
    for pid in pids:
        # A stopped process can't find out by itself that its parent is gone.
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda pid=pid: state_of(pid) == "T")
    process.kill()
    process.join()
    wait_until(lambda: all(state_of(pid) in "ZX" for pid in pids))


def test_a_worker_whose_parent_died_before_it_could_ask_to_die_with_it_ends():
    process = multiprocessing.get_context("fork").Process(target=_start_worker, args=(1, 0))
    process.start()
    process.join()
    assert process.exitcode == 1


RANK_WITH_A_WORKER = """
import multiprocessing, os, sys, threading, time
from multiprocessing.resource_sharer import DupFd
from msm_dist.data.stream import _start_worker

def work(parent, sender):
    _start_worker(parent, 0)
    sender.send(DupFd(0))
    threading.Event().wait()

receiver, sender = multiprocessing.Pipe()
worker = multiprocessing.get_context("fork").Process(target=work, args=(os.getpid(), sender))
worker.start()
address, _ = receiver.recv()._id
# Half of what it takes to fetch the file: the worker waits for the other half.
from multiprocessing.connection import SocketClient
connection = SocketClient(address)
print("ready", flush=True)
sys.stdin.readline()
connection.close()
if sys.argv[1] == "dies":
    # As the kernel, which closes the files of a process before it tells its children; on a busy machine much later.
    time.sleep(0.3)
    os.kill(os.getpid(), 9)
sys.stdin.readline()
worker.kill()
"""


@pytest.mark.parametrize("end", ["dies", "hangs up"])
def test_a_worker_is_silent_about_a_connection_that_a_killed_rank_leaves(end):
    command = [sys.executable, "-c", RANK_WITH_A_WORKER, end]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        process.stdin.write("\n")
        process.stdin.flush()
        if end == "hangs up":
            while "Traceback" not in process.stderr.readline():
                pass
            process.stdin.write("\n")
            process.stdin.flush()
        _, said = process.communicate()
    assert "Traceback" not in said


def test_a_closed_loader_is_let_go(corpus):
    loader = open_loader(corpus, 0, layout_of(1, 8))
    loader.close()
    gone = weakref.ref(loader)
    del loader
    gc.collect()
    assert gone() is None


def test_a_program_that_forgets_to_close_its_loader_still_ends_and_leaves_nothing(corpus, tmp_path):
    script = f"""
from msm_dist.data.index import load_index
from tests.test_stream import layout_of, open_loader
loader = open_loader(load_index({str(corpus.root)!r}), 2, layout_of(1, 8))
print(len(next(loader).keys))
"""
    command = [sys.executable, "-c", script]
    root = Path(__file__).parents[1]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (0, "8\n"), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_lanes_that_do_not_fit_are_refused_before_a_worker_starts(corpus):
    with pytest.raises(ConfigError, match="data.lanes = 8: must be a multiple of 1 processes x 3 loader"):
        open_loader(corpus, 3, layout_of(1, 8))


def wait_until(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def state_of(pid):
    """The letter of a process's state; X when it is gone."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(") ")[2][0]
    except OSError:  # gone before it was opened, or between that and the read
        return "X"
