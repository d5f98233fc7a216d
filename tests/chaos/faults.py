"""What each kind of fault does to a start, and what is promised of it: exit codes, words, steps lost.

In: the run (driver.Chaos) and a round. Out: a word on what was found. Fails with driver.BrokenPromise. Faults are real:
signals and system calls that fail, are slow or lie (faulty.c), and files changed on the disk; nothing of the program is
replaced.
"""

import errno
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from msm_dist.data.index import load_index, members
from msm_dist.engine.checkpoint import is_complete
from msm_dist.engine.stored import checkpoint_name, folders
from tests.chaos.driver import CONTINUED, SECONDS, BrokenPromise, Chaos, Start, step_of
from tests.chaos.faulty import ANY_RANK, SYNC, WRITE
from tests.chaos.launched import Launcher, children, command_of, descendants, workers_of
from tests.chaos.rounds import EVERY, NUM_RANKS, Round, checkpoint_from
from tests.processes import free_port, is_alive

KILL = -signal.SIGKILL
SINCE_THE_NEWEST = 2 * EVERY
"""Steps that a kill costs at most: a checkpoint may be being written, and the one before is whole once it is begun."""
PEER_LOST = "another process of the run ended"
STOPPED = "stopped and saved at step"
SLOW_SECONDS = 0.1
YEAR_SECONDS = 365 * 86400


def kill_rank(chaos: Chaos, round: Round) -> None:
    """SIGKILL of a rank: the other ends by itself, and says why."""
    start = chaos.start()
    hold = chaos.hold(start, chaos.where(round))
    start.ranks[round.victim].kill()
    hold.let_go()
    codes = [1] * NUM_RANKS
    codes[round.victim] = KILL
    chaos.expect(start, codes, PEER_LOST)
    chaos.expect_lost(SINCE_THE_NEWEST)


def kill_worker(chaos: Chaos, round: Round) -> None:
    """SIGKILL of a loader worker: what it had read is trained on, and saved."""
    start = chaos.start()
    hold = chaos.hold(start, chaos.where(round))
    (worker,) = workers_of(start.ranks[round.victim].pid)
    os.kill(worker, signal.SIGKILL)
    hold.let_go()
    chaos.expect(start, [2] * NUM_RANKS, "a loader worker died (SIGKILL)")
    chaos.expect_lost(0)


def kill_launcher(chaos: Chaos, round: Round) -> None:
    """SIGKILL of the program that started the ranks: they stop, saved, and none is left."""
    door = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(NUM_RANKS)]
    port = ["--master-port", str(free_port())]
    if round.variant != "torchrun":
        door = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(NUM_RANKS)]
        port = ["--master_port", port[1]]
    program = ["--module", "msm_dist.pretrain", *chaos.command(chaos.name)]
    launcher = Launcher([*door, *port, *program], chaos.folder / f"launcher-{round.number}", chaos.faulty.environment)
    start = chaos.started(Start([launcher]))
    hold = chaos.hold(start, chaos.where(round))
    everybody = descendants(launcher.pid)
    victim, code = launcher.pid, KILL
    if round.variant == "deepspeed's own child":
        (victim,) = [pid for pid in children(launcher.pid) if "deepspeed.launcher.launch" in command_of(pid)]
        code = 0  # the command passes on positive codes only
    os.kill(victim, signal.SIGKILL)
    hold.let_go()
    deadline = time.monotonic() + SECONDS
    while left := [pid for pid in everybody if is_alive(pid)]:
        if time.monotonic() > deadline:
            raise BrokenPromise(f"processes {left} outlive the launcher\n{launcher.communicate()[0]}")
        time.sleep(0.01)
    chaos.expect(start, [code], STOPPED)
    chaos.expect_lost(0)


def stop_burst(chaos: Chaos, round: Round) -> None:
    """TERM twice at once: a save, and exit code 143."""
    start = chaos.start()
    hold = chaos.hold(start, chaos.where(round))
    both = round.variant == "both ranks"
    for rank in start.ranks if both else [start.ranks[round.victim]]:
        rank.send_signal(signal.SIGTERM)
        rank.send_signal(signal.SIGTERM)
    hold.let_go()
    chaos.expect(start, [143] * NUM_RANKS, STOPPED)
    chaos.expect_lost(0)


def requeue_burst(chaos: Chaos, round: Round) -> None:
    """USR1 and USR2, also after a TERM, many at once: a save, and exit code 75."""
    start = chaos.start()
    hold = chaos.hold(start, chaos.where(round))
    mine, other = start.ranks[round.victim], start.ranks[1 - round.victim]
    if round.variant.startswith("TERM"):
        mine.send_signal(signal.SIGTERM)
        mine = other
    for number in range(1 + int(round.amount * 50)):
        mine.send_signal(signal.SIGUSR1)
        if round.variant == "USR1 and USR2":
            (mine, other)[number % 2].send_signal(signal.SIGUSR2)
    hold.let_go()
    chaos.expect(start, [75] * NUM_RANKS, STOPPED)
    chaos.expect_lost(0)


def disk_full(chaos: Chaos, round: Round, error: int = errno.ENOSPC) -> None:
    """No room for a file of a checkpoint: all ranks end, one says where and why, and the one before is whole."""
    chaos.faulty.fail(chaos.where(round), error)
    start = chaos.start()
    chaos.expect(start, [2] * NUM_RANKS, os.strerror(error), f"{chaos.run_folder}/checkpoints/")
    if (said := start.output.count(os.strerror(error))) != 1:
        raise BrokenPromise(f"the fault is told {said} times\n{start.output}")
    left, failed = chaos.newest_step(), checkpoint_from(round.step)
    if not failed - EVERY <= left < failed:
        raise BrokenPromise(f"the newest checkpoint is step {left}, that of step {failed} could not be written")
    chaos.expect_lost(SINCE_THE_NEWEST)


def disk_broken(chaos: Chaos, round: Round) -> None:
    """The same of a disk that can't be written."""
    disk_full(chaos, round, errno.EIO)


def disk_slow(chaos: Chaos, round: Round) -> None:
    """Writes and flushes of checkpoints that take long: it trains on, saves, and can be stopped as ever."""
    start = chaos.start()
    hold = chaos.hold(start, chaos.where(round))
    where = replace(chaos.where(round), calls=WRITE | SYNC, content="", rank=ANY_RANK, passed=0)
    chaos.faulty.delay(replace(where, path=f"{chaos.run_folder}/checkpoints/*"), SLOW_SECONDS * (1 + round.amount))
    later = chaos.pass_on(start, hold, chaos.where(round, round.step + 2 * EVERY))
    start.ranks[round.victim].send_signal(signal.SIGUSR1)
    later.let_go()
    chaos.expect(start, [75] * NUM_RANKS, STOPPED)
    chaos.expect_lost(0)


def clock_jump(chaos: Chaos, round: Round) -> None:
    """The clock of the day is set by up to ten years, twice: nothing is noticed."""
    start = chaos.start()
    hold = chaos.hold(start, chaos.where(round))
    seconds = (0.0001 + round.amount) * 10 * YEAR_SECONDS
    sign = 1 if round.variant.startswith("forward") else -1
    chaos.faulty.shift_clock(sign * seconds)
    hold = chaos.pass_on(start, hold, chaos.where(round, round.step + EVERY))
    chaos.faulty.shift_clock(-sign * seconds / 2)
    hold = chaos.pass_on(start, hold, chaos.where(round, round.step + 2 * EVERY))
    start.ranks[round.victim].send_signal(signal.SIGUSR1)
    hold.let_go()
    chaos.expect(start, [75] * NUM_RANKS, STOPPED)
    chaos.expect_lost(0)


def checkpoint_torn(chaos: Chaos, round: Round) -> None:
    """A file of the newest checkpoint lacks its end: it is put aside, named, and the one before is taken."""
    path = damaged_file(chaos, round)
    os.truncate(path, int(round.amount * path.stat().st_size))
    promise_fallback(chaos, path.parent)


def checkpoint_flipped(chaos: Chaos, round: Round) -> None:
    """A bit of it is another one: the same."""
    path = damaged_file(chaos, round)
    content = bytearray(path.read_bytes())
    bit = int(round.amount * len(content) * 8)
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    promise_fallback(chaos, path.parent)


def checkpoint_stale(chaos: Chaos, round: Round) -> None:
    """What looks newer than the newest checkpoint and is none is not taken for it."""
    kill_all(chaos, round)
    older, newest = [path for path in folders(chaos.run_folder / "checkpoints") if is_complete(path)][-2:]
    name = checkpoint_name(step_of(newest) + 1 + int(round.amount * 2 * chaos.total_steps))
    if round.variant == "an empty folder":
        (newest.parent / name).mkdir()
    elif round.variant == "an unfinished one":
        shutil.copytree(newest, newest.parent / f"{name}.partial")
    else:
        copy = shutil.copytree(older, newest.parent / name)
        start = chaos.start()
        chaos.expect(start, [2] * NUM_RANKS, f"{copy}", trains=False)
        shutil.rmtree(copy)
    chaos.promised.append(f"{CONTINUED}{newest},")


def shard_deleted(chaos: Chaos, round: Round) -> None:
    """A shard is gone: the run stops, saved, and does not start without it."""
    changed_shard(chaos, round, Path.unlink)


def shard_truncated(chaos: Chaos, round: Round) -> None:
    """It lacks its end."""
    changed_shard(chaos, round, lambda path: os.truncate(path, int(round.amount * path.stat().st_size)))


def shard_replaced(chaos: Chaos, round: Round) -> None:
    """There is another one of its name and size."""

    def replace_it(path: Path) -> None:
        other = path.with_suffix(".other")
        other.write_bytes(bytes(byte ^ 255 for byte in path.read_bytes()))
        other.replace(path)

    changed_shard(chaos, round, replace_it)


def member_overwritten(chaos: Chaos, round: Round) -> None:
    """A clip in it has other bytes, in place."""

    def overwrite(path: Path) -> None:
        (shard,) = [shard for shard in load_index(str(chaos.train)).shards if Path(shard.path) == path]
        row = members(shard)[int(round.amount * shard.clips)]
        with path.open("r+b") as file:
            file.seek(row["offset"] + row["size"] // 2)
            file.write(bytes(int(row["size"]) // 4))

    changed_shard(chaos, round, overwrite)


FAULTS: dict[str, Callable[[Chaos, Round], None]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        kill_rank,
        kill_worker,
        kill_launcher,
        stop_burst,
        requeue_burst,
        disk_full,
        disk_broken,
        disk_slow,
        clock_jump,
        checkpoint_torn,
        checkpoint_flipped,
        checkpoint_stale,
        member_overwritten,
        shard_deleted,
        shard_truncated,
        shard_replaced,
    )
}


def kill_all(chaos: Chaos, round: Round) -> None:
    """SIGKILL of both ranks at the round's mark."""
    start = chaos.start()
    hold = chaos.hold(start, chaos.where(round))
    start.kill()
    hold.let_go()
    start.end()
    # The last one to be killed may have missed the first by then.
    chaos.expect(start, [KILL, 1 if start.codes[1] == 1 else KILL])
    chaos.expect_lost(SINCE_THE_NEWEST)


def damaged_file(chaos: Chaos, round: Round) -> Path:
    """The file of the newest checkpoint that a round is for, once all ranks are killed."""
    kill_all(chaos, round)
    newest = chaos.newest()
    names = {f"state of rank {rank}": f"state-{rank:05d}-of-{NUM_RANKS:05d}.safetensors" for rank in range(NUM_RANKS)}
    return newest / names.get(round.variant, round.variant)


def promise_fallback(chaos: Chaos, damaged: Path) -> None:
    """Of the next start."""
    (before,) = [path for path in folders(damaged.parent) if is_complete(path) and path != damaged][-1:]
    chaos.promised += [str(damaged), f"{damaged.name}.damaged", f"{CONTINUED}{before},"]


def changed_shard(chaos: Chaos, round: Round, change: Callable[[Path], None]) -> None:
    """Change a shard under the run, which stops, saved; is refused until the shard is back; and goes on then."""
    shards = sorted(chaos.train.glob("*.tar"))
    shard = shards[int(round.amount * len(shards))]
    good = shutil.copy2(shard, chaos.folder / "good.tar")
    start = chaos.start()
    hold = chaos.hold(start, chaos.where(round))
    change(shard)
    hold.let_go()
    chaos.expect(start, [2] * NUM_RANKS, STOPPED)
    # A worker in the midst of a page that was cut off dies of it; which shard that was the next start tells.
    if shard.name not in start.output and not (round.kind == "shard-truncated" and "SIGBUS" in start.output):
        raise BrokenPromise(f"{shard.name} was changed and is not named\n{start.output}")
    chaos.expect_lost(0)
    before = chaos.newest_step()
    refused = chaos.start()
    chaos.expect(refused, [2] * NUM_RANKS, shard.name, trains=False)
    if chaos.newest_step() != before:
        raise BrokenPromise(f"a start with {shard.name} changed has trained")
    shutil.copy2(good, shard.with_suffix(".restored")).replace(shard)
