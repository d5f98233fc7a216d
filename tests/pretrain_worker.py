"""`python -m msm_dist.pretrain` with a process that dies by SIGKILL at a chosen point.

KILL=step:S          rank KILL_RANK dies after the update of step S, before anything of it is recorded
KILL=write:N         ... instead of the N-th durable write of a checkpoint (state, meta.json, complete)
KILL=torn:N          ... in the middle of the N-th one
KILL=beside:N        ... in the middle of the N-th one, once training is STEPS_BESIDE steps past that checkpoint's
KILL=full:N          nobody dies; KILL_RANK finds the disk full at the N-th one
KILL=rename          ... before a written checkpoint gets its name
KILL=export          ... before the export
KILL=slow:S          nobody dies; a step takes S seconds longer
KILL=disk:S          nobody dies; writing the state of a checkpoint takes S seconds longer
KILL=nan:S, inf:S    nobody dies; the loss of KILL_RANK in step S is multiplied by that
POISON=nan:S,1e9:S   beside what KILL says: the loss of POISON_RANK in each such step S is multiplied by that
KILL=truncate:S      nobody dies; after step S KILL_RANK cuts the shards short
KILL=stuck:S         nobody dies; the loader worker of KILL_RANK blocks for ever in the read of step S
KILL=undead:S        nobody dies; ... blocks there, and no signal ends it
KILL=lost:S          nobody dies; ... blocks there, and those of the others find their data gone
KILL=pause:WHERE     nobody dies; KILL_RANK waits at WHERE (see PLACES) until there is a file MARK.go
KILL=both:S          nobody dies; after step S KILL_RANK cuts the shards short, the others send themselves USR1
KILL=loop:S          nobody dies; after step S KILL_RANK runs in an endless loop
KILL=hold:S          nobody dies; ... is in a call that holds Python's lock and does not return
KILL=stop:S          nobody dies; ... is stopped by SIGSTOP
KILL_RANK=all        means every rank
HANG_SECONDS=S       a run is hung after S seconds without progress; its ranks have a third of that to answer

For stuck to pause: a process that is where it is wanted says so by making the file that MARK names. For stuck, a rank
whose read is late makes MARK.late.
"""

import ctypes
import errno
import multiprocessing.process
import os
import signal
import sys
import time
from pathlib import Path

from msm_dist import pretrain
from msm_dist.config import Engine
from msm_dist.data import crops
from msm_dist.engine import checkpoint, hang, preempt
from msm_dist.errors import DataError

what, _, number = os.environ.get("KILL", "").partition(":")
mine = os.environ.get("KILL_RANK", "0") in (os.environ.get("RANK", "0"), "all")
poison = {}
if os.environ.get("POISON_RANK", "0") in (os.environ.get("RANK", "0"), "all"):
    words = [word.split(":") for word in os.environ.get("POISON", "").split(",") if word]
    poison = {int(step): float(factor) for factor, step in words}
writes = steps = 0
STEPS_BESIDE = 3
BLOCKS_PER_STEP = 4
PLACES = {
    "build": (pretrain, "build"),
    "validate": (pretrain, "validate"),
    "draw": (pretrain, "draw"),
    "save": (pretrain, "save"),
    "write": (checkpoint, "_write_state"),
    "export": (pretrain, "save_weights"),
}


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def on_step(run, *rest):
    if run.step == int(number):
        die()
    return stop_if_skipped(run, *rest)


def counting(run, *rest):
    global steps
    steps = run.step
    return stop_if_skipped(run, *rest)


def slowly(*arguments):
    time.sleep(float(number))
    return stop_if_skipped(*arguments)


def slow_disk(path, tensors):
    time.sleep(float(number))
    return write_state(path, tensors)


def poisoned(run, batch):
    output = forward(run, batch)
    if factor := poison.get(run.step + 1):
        output = output._replace(loss=output.loss * factor)
    return output


def truncating(run, *rest):
    if run.step == int(number):
        for shard in run.corpus.index.shards:
            os.truncate(shard.path, 1024)
    return stop_if_skipped(run, *rest)


def stuck(reader, numbers, *room):
    if numbers[-1] < BLOCKS_PER_STEP * (int(number) - 1):
        return read_blocks(reader, numbers, *room)
    if not mine:
        raise DataError("gone")
    fifo = Path(os.environ["MARK"] + f".fifo.{os.getpid()}")
    os.mkfifo(fifo)
    mark()
    return fifo.read_bytes()


def mark(what=""):
    Path(os.environ["MARK"] + what).touch()


def late(interruption):
    mark(".late")
    return heard_anywhere(interruption)


def pausing(action):
    def paused(*arguments, **options):
        mark()
        while not Path(os.environ["MARK"] + ".go").exists():
            time.sleep(0.1)
        return action(*arguments, **options)

    return paused


def standing_still(run, *rest):
    if run.step == int(number):
        if what == "hold":
            ctypes.PyDLL(None).pause()
        if what == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        while True:
            pass
    return stop_if_skipped(run, *rest)


def asking(run, *rest):
    if run.step == int(number):
        os.kill(os.getpid(), signal.SIGUSR1)
    return stop_if_skipped(run, *rest)


def dying(write):
    def on_write(path, content):
        global writes
        writes += 1
        if writes == int(number):
            if what == "full":
                raise checkpoint._cannot_write(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
            if what != "write":
                write(path, content)
                os.truncate(path, path.stat().st_size // 2)
            # Past the step that is saved, not the one reached by now: the next save would wait for this write.
            while what == "beside" and steps < int(path.parent.stem.removeprefix("step-")) + STEPS_BESIDE:
                time.sleep(0.01)
            die()
        return write(path, content)

    return on_write


stop_if_skipped, forward, write_state = pretrain.stop_if_skipped, pretrain.forward, checkpoint._write_state
if mine and what == "step":
    pretrain.stop_if_skipped = on_step
if mine and what in ("loop", "hold", "stop"):
    pretrain.stop_if_skipped = standing_still
if "HANG_SECONDS" in os.environ:
    hang.SHARE = float(os.environ["HANG_SECONDS"]) / 60 / Engine().timeout_minutes
    hang.ANSWERS = 3
if what == "slow":
    pretrain.stop_if_skipped = slowly
if mine and what in ("nan", "inf"):
    poison[int(number)] = float(what)
if poison:
    pretrain.forward = poisoned
if mine and what in ("truncate", "both"):
    pretrain.stop_if_skipped = truncating
if what == "both" and not mine:
    pretrain.stop_if_skipped = asking
if what == "disk":
    checkpoint._write_state = slow_disk
if what == "beside":
    pretrain.stop_if_skipped = counting
if mine and what in ("write", "torn", "beside", "full"):
    checkpoint._write_state = dying(checkpoint._write_state)
    checkpoint._write_durably = dying(checkpoint._write_durably)
if mine and what == "rename":
    checkpoint.Path.rename = lambda *_: die()
if mine and what == "export":
    pretrain.finish = lambda *_: die()
if (mine and what in ("stuck", "undead")) or what == "lost":
    read_blocks, crops.CropReader.blocks = crops.CropReader.blocks, stuck
if mine and what == "stuck":
    heard_anywhere, preempt.Interruption.heard_anywhere = preempt.Interruption.heard_anywhere, late
if what == "undead":
    multiprocessing.process.BaseProcess.kill = multiprocessing.process.BaseProcess.terminate = lambda *_: None
if mine and what == "pause":
    module, name = PLACES[number]
    setattr(module, name, pausing(getattr(module, name)))
sys.exit(pretrain.main(sys.argv[1:]))
