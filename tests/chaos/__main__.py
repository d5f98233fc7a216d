"""`python -m tests.chaos [--rounds N] [--seed S] [--only K]`: a run under N drawn faults, one after the other.

Out: a line per round, exit code 0 when losses, samples, weights and last checkpoint are those of the undisturbed run,
1 with the command that repeats it when a promise was broken; the folder of the runs is kept then.
"""

import argparse
import contextlib
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.chaos.driver import BrokenPromise, Chaos
from tests.chaos.faults import FAULTS
from tests.chaos.faulty import Faulty
from tests.chaos.rounds import draw
from tests.forking import Forker

ROUNDS = 25


def run(folder: Path, seed: int, num_rounds: int, only: int | None = None) -> Chaos:
    """Make a run in `folder` go through the rounds of a seed, or one of them. Raises BrokenPromise, which names it."""
    rounds, total_steps = draw(seed, num_rounds)
    faulty = Faulty(folder)
    with contextlib.closing(Forker(folder, faulty.environment)) as forker:
        began = time.monotonic()
        chaos = Chaos(folder, total_steps, forker, faulty)
        with contextlib.closing(chaos):
            print(f"undisturbed: {total_steps} steps, {time.monotonic() - began:.1f} s", flush=True)
            for round in rounds if only is None else [rounds[only - 1]]:
                began = time.monotonic()
                name = f"round {round.number} of {num_rounds}: {round}"
                try:
                    FAULTS[round.kind](chaos, round)
                except BrokenPromise as error:
                    raise BrokenPromise(f"{name}\n{error}") from None
                faulty.clear()
                print(
                    f"{name}: newest checkpoint {chaos.newest_step()}, {chaos.lost()} steps lost, "
                    f"{time.monotonic() - began:.1f} s",
                    flush=True,
                )
            began = time.monotonic()
            chaos.finish()
            print(f"finished, and equal to the undisturbed run: {time.monotonic() - began:.1f} s", flush=True)
    return chaos


def main(arguments: Sequence[str]) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="A run under drawn faults.")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="how many (%(default)s)")
    parser.add_argument("--seed", type=int, help="of the draw (another one each time)")
    parser.add_argument("--only", type=int, metavar="K", help="only the K-th of the rounds")
    options = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    began = time.monotonic()
    try:
        run(folder, seed, options.rounds, options.only)
    except BrokenPromise as error:
        again = f"python -m tests.chaos --rounds {options.rounds} --seed {seed}"
        print(f"\nbroken: {error}\n\nrepeat with: {again}\nthe runs are in {folder}", flush=True)
        return 1
    shutil.rmtree(folder)
    print(f"{options.rounds} rounds in {time.monotonic() - began:.0f} s, {os.cpu_count()} CPUs", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
