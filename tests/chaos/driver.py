"""Starts one run again and again, holds it at marks, and compares what it came to with a run that nothing disturbed.

In: a folder and the rounds (rounds.py). Out: starts whose ranks wait where a fault is wanted, and what is checked of
them. Fails with BrokenPromise, which says what was promised, what was found, and what the ranks had printed.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

from msm_dist.engine.checkpoint import is_complete
from msm_dist.engine.stored import checkpoint_name, folders
from tests.chaos.faulty import RENAME, SYNC, WRITE, Faulty, Hold, Where
from tests.chaos.rounds import EPOCH_STEPS, EVERY, NUM_RANKS, Round, checkpoint_from
from tests.corpus import write_corpus
from tests.forking import Forked, Forker
from tests.processes import HERE, free_port, rank_environment
from tests.test_pretrain import Runs

NAME, UNDISTURBED = "chaos", "undisturbed"
GLOBAL_BATCH = 16
SECONDS = 600.0
"""For whatever is waited for: a machine may be busy; a run that hangs is found all the same."""
KEPT_OUTPUT = 6000
CONTINUED = "continued from "


class BrokenPromise(Exception):
    """The run did not do what docs/operations.md says."""


@dataclass
class Start:
    """Ranks of one start of the run."""

    ranks: list[Forked]
    """To be used like Popen."""
    output: str = field(default="", init=False)
    codes: list[int] = field(default_factory=list, init=False)

    def end(self) -> None:
        """Wait for all ranks."""
        deadline = time.monotonic() + SECONDS
        while any(rank.poll() is None for rank in self.ranks):
            if time.monotonic() > deadline:
                self.kill()
                raise BrokenPromise(f"the ranks do not end: {[rank.poll() for rank in self.ranks]}")
            time.sleep(0.01)
        self.output = "\n".join(rank.communicate()[0] for rank in self.ranks)
        self.codes = [rank.returncode for rank in self.ranks]

    @property
    def is_unannounced(self) -> bool:
        """Whether it ended before it said where it begins."""
        return CONTINUED not in self.output and "from step 0" not in self.output

    def expect(self, codes: Sequence[int], *texts: str) -> None:
        """Wait for the end. Raises BrokenPromise unless it comes with these codes, these texts, and no traceback."""
        self.end()
        lacks = [text for text in texts if text not in self.output]
        if "Traceback" in self.output:
            lacks.append("an output without a traceback")
        if list(codes) != self.codes or lacks:
            raise BrokenPromise(
                f"exit codes {list(codes)} were promised, they are {self.codes}; lacking: {lacks or 'nothing'}\n"
                f"{self.output[-KEPT_OUTPUT:]}"
            )

    def kill(self) -> None:
        """SIGKILL to what still runs."""
        for rank in self.ranks:
            rank.kill()


class Chaos(Runs):
    """One run under faults, and one beside it without."""

    name = NAME

    def __init__(self, folder: Path, total_steps: int, forker: Forker, faulty: Faulty) -> None:
        """Make the corpora and train the undisturbed run, with the same library loaded."""
        super().__init__(folder)
        self.train = write_corpus(folder / "few", count=EPOCH_STEPS * GLOBAL_BATCH, seed=0)
        self.total_steps = total_steps
        self.forker, self.faulty = forker, faulty
        self.promised: list[str] = []
        """What the next start that trains has to say."""
        self._starts: list[Start] = []
        start = self.start(UNDISTURBED)
        start.end()
        self.expect(start, [0, 0])

    def command(self, name: str, *settings: str) -> list[str]:
        """What is started every time."""
        ours = [f"train.steps={self.total_steps}", f"checkpoint.every={EVERY}", "train.valid_every=25"]
        return super().command(name, *ours, *settings)

    @property
    def run_folder(self) -> Path:
        """Of the run that faults hit."""
        return self.folder / NAME

    def start(self, name: str = NAME) -> Start:
        """Both ranks of the run."""
        port = free_port()
        command = [str(HERE / "pretrain_worker.py"), *self.command(name)]
        return self.started(
            Start(
                [
                    self.forker.start(command, rank_environment(rank, NUM_RANKS, port), False)
                    for rank in range(NUM_RANKS)
                ]
            )
        )

    def started(self, start: Start) -> Start:
        """Remember a start, so that `close` ends it."""
        self._starts.append(start)
        return start

    def close(self) -> None:
        """End what still runs."""
        self.faulty.clear()
        for start in self._starts:
            start.kill()

    def where(self, round: Round, step: int | None = None) -> Where:
        """The calls that are a round's mark, or the same of another step."""
        step = step or round.step
        partial = f"{self.run_folder}/checkpoints/{checkpoint_name(checkpoint_from(step))}.partial"
        trace = f"{self.run_folder}/trace/rank-{round.rank:05d}.jsonl"
        return {
            "starting": Where(WRITE, f"{self.run_folder}/environment.json.*"),
            "trace": Where(WRITE, trace, f'{{"step": {step}, ', passed=round.micro_batch - 1),
            "line": Where(WRITE, f"{self.run_folder}/metrics.jsonl", f'{{"step": {step}, "loss"'),
            "state": Where(WRITE, f"{partial}/*", rank=round.rank),
            "sync": Where(SYNC, f"{partial}/state-*", rank=round.rank),
            "meta": Where(WRITE, f"{partial}/meta.json"),
            "complete": Where(WRITE, f"{partial}/complete"),
            "rename": Where(RENAME, partial),
        }[round.place]

    def hold(self, start: Start, where: Where) -> Hold:
        """A start that waits at a mark."""
        hold = self.faulty.pause(where)
        self.wait(hold.is_reached, start, f"the mark {where} is not reached")
        return hold

    def pass_on(self, start: Start, hold: Hold, where: Where) -> Hold:
        """Let a start that waits go on to another mark."""
        later = self.faulty.pause(where)
        hold.let_go()
        self.wait(later.is_reached, start, f"the mark {where} is not reached")
        return later

    def wait(self, condition: Callable[[], bool], start: Start, otherwise: str) -> None:
        """Raises BrokenPromise when the start ends before a condition holds, or takes for ever."""
        deadline = time.monotonic() + SECONDS
        while not condition():
            if all(rank.poll() is not None for rank in start.ranks):
                start.end()
                raise BrokenPromise(f"{otherwise}: the ranks ended with {start.codes}\n{start.output[-KEPT_OUTPUT:]}")
            if time.monotonic() > deadline:
                raise BrokenPromise(f"{otherwise} within {SECONDS:.0f} s")
            time.sleep(0.005)

    def expect(self, start: Start, codes: Sequence[int], *texts: str, trains: bool = True) -> None:
        """Wait for a start's end. Raises BrokenPromise unless it ends with these codes and has said this.

        One that trains must also say what an earlier fault has promised of it, where it goes on as soon as it comes to
        saying that.
        """
        start.end()
        due = [text for text in self.promised if trains and not (text.startswith(CONTINUED) and start.is_unannounced)]
        self.promised = [text for text in self.promised if text not in due]
        start.expect(codes, *texts, *due)

    def newest(self) -> Path:
        """The run's newest checkpoint that is whole."""
        whole = [path for path in folders(self.run_folder / "checkpoints") if is_complete(path)]
        return whole[-1]

    def newest_step(self) -> int:
        """Its step, 0 where there is none."""
        root = self.run_folder / "checkpoints"
        return step_of(self.newest()) if any(map(is_complete, folders(root))) else 0

    def lost(self) -> int:
        """Steps that are recorded and will be trained again."""
        return max((line["step"] for line in self.metrics(self.name)), default=0) - self.newest_step()

    def expect_lost(self, most: int) -> None:
        """Raises BrokenPromise when more steps are lost."""
        if (lost := self.lost()) > most:
            raise BrokenPromise(f"{lost} steps are lost since step {self.newest_step()}, {most} are promised at most")

    def finish(self) -> None:
        """Train to the end without faults. Raises BrokenPromise unless all is as in the undisturbed run."""
        self.expect(self.start(), [0, 0])
        if self.promised:
            raise BrokenPromise(f"no start has said {self.promised}")
        compare(self)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's folder is named for."""
    return int(checkpoint.name.removeprefix("step-"))


def compare(runs: Runs, name: str = NAME, undisturbed: str = UNDISTURBED) -> None:
    """Raises BrokenPromise unless losses, samples, weights and last checkpoint of two runs are equal, bit for bit."""
    for what in (runs.losses, runs.trace, runs.last_checkpoint, runs.weights):
        mine, theirs = what(name), what(undisturbed)
        if mine == theirs:
            continue
        told = f"{mine!r:.200}, not {theirs!r:.200}"
        if isinstance(mine, list):
            pairs = zip_longest(mine, theirs)
            number, told = next((i, f"{a}, not {b}") for i, (a, b) in enumerate(pairs) if a != b)
            told = f"record {number} of {len(mine)} and {len(theirs)} is {told}"
        raise BrokenPromise(f"{what.__name__} differ from those of the undisturbed run: {told}")
