"""Signals to real processes at every kind of moment: saved, the documented exit code, and nothing lost or changed."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from msm_dist.engine.checkpoint import is_complete
from tests.forking import Forked, Forker
from tests.processes import HERE, free_port, is_alive, rank_environment
from tests.test_pretrain import Runs, finish, wait_for

pytestmark = pytest.mark.distributed

USR1, USR2, TERM = signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM
STEPS = 20
# Of those that stop after a signal: long before the 22 minutes after which a run that stands still would be ended.
SECONDS_TO_STOP = 300


class ForkedRuns(Runs):
    """Runs whose ranks are forks, for one scenario after the other."""

    def __init__(self, folder: Path, forker: Forker):
        super().__init__(folder)
        self.forker = forker
        self.mark, self.go, self.late = (folder / name for name in ("mark", "mark.go", "mark.late"))

    def start(self, name: str, *settings: str, ranks: int = 2, blocked: bool = False, **environment: str):
        port = free_port()
        for path in (self.mark, self.go, self.late):
            path.unlink(missing_ok=True)
        environment["MARK"] = str(self.mark)
        command = self.worker(name, *settings)
        return [
            self.forker.start(command, rank_environment(rank, ranks, port) | environment, blocked)
            for rank in range(ranks)
        ]

    def command(self, name: str, *settings: str) -> list[str]:
        return super().command(name, f"train.steps={STEPS}", *settings)

    def worker(self, name: str, *settings: str) -> list[str]:
        return [str(HERE / "pretrain_worker.py"), *self.command(name, *settings)]

    def reach(self, name: str, *settings: str, **options) -> list[Forked]:
        """Ranks of which those of KILL_RANK are where KILL wants them."""
        processes = self.start(name, *settings, **options)
        wait_for(self.mark.exists, processes)
        return processes

    def newest(self, name: str) -> int:
        """Step of the newest checkpoint, which is whole; 0 while there is none."""
        folder = self.folder / name / "checkpoints"
        if not (there := [path for path in folder.iterdir() if path.suffix != ".partial"]):
            return 0
        newest = max(there)
        assert is_complete(newest)
        return int(newest.name.removeprefix("step-"))

    def is_as_undisturbed(self, name: str, undisturbed: str = "undisturbed") -> None:
        assert self.losses(name) == self.losses(undisturbed)
        assert self.trace(name) == self.trace(undisturbed)
        assert self.weights(name) == self.weights(undisturbed)
        assert self.last_checkpoint(name) == self.last_checkpoint(undisturbed)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, forker):
    runs = ForkedRuns(tmp_path_factory.mktemp("runs"), forker)
    codes, output = runs.run("undisturbed", "train.pictures_every=9")
    assert codes == [0, 0], output
    return runs


def ended(processes) -> tuple[list[int], str]:
    return finish(processes, timeout=SECONDS_TO_STOP, end_peers=False)


def send(process, *numbers: int) -> None:
    for number in numbers:
        process.send_signal(number)


def waits(process) -> bool:
    """Whether a process does no more than look, now and then, whether it may go on: two ticks in half a second.

    On a busy machine one that was given no processor looks the same.
    """

    def used() -> int:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    before = used()
    time.sleep(0.5)
    return used() <= before + 2


def test_no_signal_at_any_moment_is_lost_or_changes_what_is_trained(runs):
    def stops(kill: str, rank: str, first: dict[int, tuple], then: dict[int, tuple], code: int, *steps: int, **options):
        """A start that is sent signals once it is where it is wanted, more of them once it waits, and is let go on."""
        processes = runs.reach("signals", "train.pictures_every=9", KILL=kill, KILL_RANK=rank, **options)
        for number in first:
            send(processes[number], *first[number])
        if then:
            if kill.startswith("stuck"):
                wait_for(runs.late.exists, processes)
            wait_for(lambda: waits(processes[0]) and waits(processes[1]), processes)
        for number in then:
            send(processes[number], *then[number])
        runs.go.touch()
        codes, output = ended(processes)
        assert codes == [code, code], f"{kill}: {output}"
        assert "Traceback" not in output
        assert runs.newest("signals") in steps, f"{kill}: {output}"

    burst = (USR2,) * 50
    # The start: heard while the engine is built. What was not trained is saved, or is the newest checkpoint already.
    stops("pause:build", "0", {1: (USR2,)}, {}, 75, 0, blocked=True)
    # A worker stuck in the read of a step: the signal goes to the rank itself, or to one that waits in a collective.
    stops("stuck:3", "1", {}, {0: (USR1,)}, 75, 2)
    stops("stuck:3", "0", {}, {0: (TERM,), 1: (USR1,)}, 75, 2)
    stops("stuck:4", "0", {}, {0: (TERM,)}, 143, 3)
    # ... or none is sent, and another rank can read no more.
    stops("lost:5", "0", {}, {}, 2, 4)
    stops("pause:validate", "all", {0: burst, 1: burst}, {}, 75, 8)
    stops("pause:draw", "0", {0: (TERM,), 1: (USR1, TERM)}, {}, 75, 10)
    # The write of step 12 beside training, which goes on to step 16 at most; then the last save, which waits for it.
    stops("pause:write", "all", {0: (USR1, USR1)}, {0: (TERM,), 1: burst}, 75, *range(13, 18))
    # After the last step nothing is left to stop.
    stops("pause:export", "0", {0: (*burst, TERM), 1: (USR1,)}, {}, 0, STEPS)
    runs.is_as_undisturbed("signals")


def test_signal_that_waits_while_python_starts_stops_the_run_before_its_first_step(runs):
    settings = ("train.steps=3", "data.valid_shards=null")
    codes, output = runs.run("alone", *settings, ranks=1)
    assert codes == [0], output

    def stops(sign: str, *sent: int):
        process = subprocess.Popen(
            ["env", "--block-signal=USR1,USR2", sys.executable, *runs.worker("waiting", *settings)],
            env=rank_environment(0, 1, free_port()),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        files = Path(f"/proc/{process.pid}")
        wait_for(lambda: is_blocked(files) and sign in (files / "maps").read_text(), [process])
        send(process, *sent)
        codes, output = ended([process])
        assert codes == [75], output
        assert "stopped and saved at step 0" in output
        assert runs.newest("waiting") == 0

    stops("", USR1)
    stops("libtorch_cpu", USR2, USR1)
    codes, output = runs.run("waiting", *settings, ranks=1)
    assert codes == [0], output
    assert "continued from" in output
    runs.is_as_undisturbed("waiting", "alone")


def is_blocked(files: Path) -> bool:
    blocked = int((files / "status").read_text().partition("SigBlk:")[2].split()[0], 16)
    return bool(blocked >> (USR1 - 1) & 1)


def test_second_term_ends_a_rank_that_waits_for_another_and_leaves_the_newest_checkpoint(runs):
    processes = runs.reach("twice", KILL="pause:validate", KILL_RANK="1")
    wait_for(lambda: waits(processes[0]) and runs.newest("twice") == 4, processes)
    deadline = time.monotonic() + SECONDS_TO_STOP
    while processes[0].poll() is None:
        assert time.monotonic() < deadline
        send(processes[0], TERM)
        time.sleep(0.1)
    assert (processes[0].returncode, processes[1].poll()) == (143, None)
    processes[1].kill()
    processes[1].communicate()
    assert runs.newest("twice") == 4


def test_worker_that_nothing_ends_does_not_hold_the_exit(runs):
    process = Runs.start(runs, "undead", ranks=1, KILL="undead:2", MARK=str(runs.folder / "undead.mark"))[0]
    wait_for((runs.folder / "undead.mark").exists, [process])
    send(process, USR1)
    codes, output = ended([process])
    assert codes == [75], output
    (fifo,) = runs.folder.glob("undead.mark.fifo.*")
    worker = int(fifo.suffix.removeprefix("."))
    wait_for(lambda: not is_alive(worker), [])  # the kernel kills it with its parent, a moment later


def test_missing_data_weighs_more_than_a_requeue_and_both_are_saved(runs, tmp_path):
    shards = shutil.copytree(runs.train, tmp_path / runs.train.name)  # a checkpoint names its corpus by the folder
    settings = (f"data.shards={shards}", "data.num_workers=0")
    processes = runs.start("both", *settings, KILL="both:3", KILL_RANK="1")
    codes, output = ended(processes)
    assert codes == [2, 2], output
    assert "its index says" in output
    assert runs.newest("both") == 4
    shutil.rmtree(shards)
    shutil.copytree(runs.train, shards)
    codes, output = runs.run("both", *settings)
    assert codes == [0, 0], output
    runs.is_as_undisturbed("both")


ALONE = """
import os, signal, sys, time
from msm_dist.engine.preempt import Interruption, listening
from msm_dist.engine.world import join_world
from msm_dist.errors import ConfigError
interruption = Interruption(join_world(1).control)
"""


def alone(program: str) -> str:
    """What a process that listens by itself prints."""
    done = subprocess.run([sys.executable, "-c", ALONE + program], text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_signal_that_others_listen_to_is_no_reason_to_stop():
    said = alone("""
signal.signal(signal.SIGCONT, lambda *_: None)
with listening(interruption):
    os.kill(os.getpid(), signal.SIGCONT)
    time.sleep(0.5)
    before = interruption.heard_anywhere()
    os.kill(os.getpid(), signal.SIGUSR1)
    print(before, interruption.heard_anywhere())
""")
    assert said == "False True"


def test_term_that_slurm_sends_twice_at_once_is_one():
    said = alone("""
from msm_dist.engine import preempt
preempt.SECOND_SECONDS = 60.0
with listening(interruption):
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
    time.sleep(0.5)
    print(interruption.heard_anywhere(), flush=True)
""")
    assert said == "True"


def test_failing_run_keeps_its_exit_code_when_the_launcher_ends_the_last_ranks():
    said = alone("""
try:
    with listening(interruption):
        raise ConfigError("on all ranks")
except ConfigError:
    os.kill(os.getpid(), signal.SIGTERM)  # srun's, as another rank was quicker to end
    print("its own")
""")
    assert said == "its own"
