"""Which fault hits a run, where and when: a pure function of a seed.

In: a seed and a number of rounds. Out: `Round`s, one after the other for one run, and its length in steps. As many
rounds as there are kinds have one of each; more draw again. A moment is a mark that the run passes, such as the write
of the loss of step 34, or of meta.json of the first checkpoint from step 34 on: the same one whenever the seed is
repeated. What is not drawn is what other processes and threads do at that moment, as how much of a checkpoint is
written by then beside training; so a round can begin at another checkpoint when it is repeated, never at another step.
"""

import random
from dataclasses import dataclass

EVERY = 2
"""Steps between the checkpoints of the run."""
FIRST_STEP = 4 * EVERY
NUM_RANKS = 2
MICRO_BATCHES = 2
"""Of a rank, in a step."""

# Marks that a rank passes: in a step, and while a checkpoint is written.
IN_STEP = ("trace", "line")
IN_CHECKPOINT = ("state", "sync", "meta", "complete", "rename")
ANYWHERE = ("starting", *IN_STEP, *IN_CHECKPOINT)
STATE_FILES = ("state of rank 0", "state of rank 1", "meta.json", "complete")


@dataclass(frozen=True)
class Kind:
    """A kind of fault: marks that it may come at, its variants, and how many steps further its start may come.

    Whatever stops a start, it is over before `reach` steps from the mark: rounds are further apart.
    """

    places: tuple[str, ...]
    variants: tuple[str, ...] = ("",)
    reach: int = 3 * EVERY


# A changed shard stops the run when it is read next, an epoch later at the latest.
EPOCH_STEPS = 6
KINDS = {
    "kill-rank": Kind(ANYWHERE),
    "kill-worker": Kind(IN_STEP),
    "kill-launcher": Kind(ANYWHERE, ("torchrun", "deepspeed", "deepspeed's own child")),
    "stop-burst": Kind(ANYWHERE, ("one rank", "both ranks")),
    "requeue-burst": Kind(ANYWHERE, ("USR1", "USR1 and USR2", "TERM, then USR1 to the other rank")),
    "disk-full": Kind(("state", "sync", "meta", "complete")),
    "disk-broken": Kind(("state", "sync", "meta", "complete")),
    "disk-slow": Kind(IN_STEP, reach=6 * EVERY),
    "clock-jump": Kind(IN_STEP, ("forward, then back", "back, then forward"), reach=4 * EVERY),
    "checkpoint-torn": Kind(IN_STEP, STATE_FILES),
    "checkpoint-flipped": Kind(IN_STEP, STATE_FILES),
    "checkpoint-stale": Kind(IN_STEP, ("an empty folder", "a copy of an older one", "an unfinished one")),
    "member-overwritten": Kind(IN_STEP, reach=EPOCH_STEPS + 3 * EVERY),
    "shard-deleted": Kind(IN_STEP, reach=EPOCH_STEPS + 3 * EVERY),
    "shard-truncated": Kind(IN_STEP, reach=EPOCH_STEPS + 3 * EVERY),
    "shard-replaced": Kind(IN_STEP, reach=EPOCH_STEPS + 3 * EVERY),
}


@dataclass(frozen=True)
class Round:
    """A fault and its moment."""

    number: int
    kind: str
    variant: str
    place: str
    """The mark at which it comes."""
    step: int
    """The step of that mark; of one in a checkpoint, that of the first from here on."""
    rank: int
    """Who passes the mark."""
    micro_batch: int
    """Of those of the step, where the mark is a trace."""
    victim: int
    """Who is killed, is sent signals, loses a worker."""
    amount: float
    """Uniform in [0, 1): which shard, byte or bit, how many signals, how far a clock is off."""

    def __str__(self) -> str:
        what = f"{self.kind} ({self.variant})" if self.variant else self.kind
        where = {
            "starting": "once it has started",
            "trace": f"in step {self.step}, micro-batch {self.micro_batch} of rank {self.rank}",
            "line": f"as the loss of step {self.step} is written",
            "rename": f"before the checkpoint of step {checkpoint_from(self.step)} gets its name",
        }
        file = f"{self.place} of rank {self.rank}" if self.place in ("state", "sync") else self.place
        moment = where.get(self.place, f"as the checkpoint of step {checkpoint_from(self.step)} is written: {file}")
        return f"{what} {moment}; victim {self.victim}, amount {self.amount:.4f}"


def draw(seed: int, num_rounds: int) -> tuple[list[Round], int]:
    """The rounds, and how many steps the run has in all."""
    source = random.Random(seed)
    order = list(KINDS)
    source.shuffle(order)
    rounds, step = [], FIRST_STEP
    for number in range(1, num_rounds + 1):
        name = order[number - 1] if number <= len(order) else source.choice(order)
        kind = KINDS[name]
        place = source.choice(kind.places)
        step += source.randrange(EVERY + 1)
        rounds.append(
            Round(
                number=number,
                kind=name,
                variant=source.choice(kind.variants),
                place=place,
                step=step,
                rank=source.randrange(NUM_RANKS) if place in ("trace", "state", "sync") else 0,
                micro_batch=1 + source.randrange(MICRO_BATCHES),
                victim=source.randrange(NUM_RANKS),
                amount=source.random(),
            )
        )
        step += kind.reach
    return rounds, step


def checkpoint_from(step: int) -> int:
    """The first step from `step` on that has a checkpoint."""
    return -(-step // EVERY) * EVERY
