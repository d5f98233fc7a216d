"""The fused kernels against what a user would pick instead: `python -m benchmarks.kernels` on a GPU.

Attention (benchmarks/attention.py) and the masking path (benchmarks/masking.py), forward and backward, bfloat16: time,
memory, share of what the ceilings of this device allow, and the project's targets, met or not. First every kernel is
compared with a float64 reference on fresh random inputs, at the sizes that are timed: if one is wrong it is named,
nothing is timed and the exit code is 1. Writes benchmarks/results/kernels-<device>.json.

`--tune` instead measures launch configurations and writes kernels/configurations.json (benchmarks/tune.py).
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config

from benchmarks import attention, masking, tune
from benchmarks.measure import (
    RESULTS,
    Budget,
    Check,
    Target,
    ceilings_line,
    measure_ceilings,
    say_no_gpu,
    table,
    targets_table,
    write_results,
)

MINUTES, TUNING_MINUTES = 2.5, 8.0
SHAPE_SECONDS = 10.0
"""What a shape may take at most: one that would pass the end of the allotted time is left out, and said to be."""


def main(arguments: Sequence[str]) -> int:
    """The exit code: 0 also where there is no GPU, 1 where a kernel is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.partition("\n")[0])
    parser.add_argument("--tune", action="store_true", help="write kernels/configurations.json instead")
    parser.add_argument("--minutes", type=float, help=f"time allowed ({MINUTES:g}; with --tune {TUNING_MINUTES:g})")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args(arguments)
    if say_no_gpu("benchmarks.kernels"):
        return 0
    if options.tune:
        return tune.tune(Budget(options.minutes or TUNING_MINUTES))
    budget = Budget(options.minutes or MINUTES)
    tune.compile_in_parallel([*tune.all_cases()])
    return compare(budget, options.out, torch.device("cuda"), torch.bfloat16)


def compare(budget: Budget, folder: Path, device: torch.device, dtype: torch.dtype) -> int:
    """Check, measure, print, write."""
    seed = torch.seed() % 2**31
    print(f"seed of the inputs: {seed}", flush=True)
    if report_wrong(check_all(device, dtype, seed)):
        return 1
    # A compiled graph is run backward again and again: its buffers must stay.
    torch._functorch.config.donated_buffer = False
    ceilings = measure_ceilings()
    print(ceilings_line(ceilings), flush=True)
    rows: list[dict[str, Any]] = []
    targets: list[Target] = []

    def save(finished: bool) -> Path:
        content = {
            "finished": finished,
            "seed": seed,
            "ceilings": ceilings._asdict(),
            "targets": [target.record() for target in targets],
            "left_out": budget.left_out,
            "rows": rows,
        }
        return write_results(folder, "kernels", content)

    for shape in masking.SHAPES:
        if budget.allows(f"masking path, {shape.what}", SHAPE_SECONDS):
            found = rows_of(masking.measure(shape, ceilings, device, dtype, seed))
            print(f"\nmasking path, {shape.what}, B = {shape.clips}\n{masking_table(found)}", flush=True)
            rows += found
            targets += masking.targets(shape, found)
            save(finished=False)
    for shape in attention.SHAPES:
        if budget.allows(f"attention, {shape}", SHAPE_SECONDS):
            found = rows_of(attention.measure(shape, ceilings, device, dtype, seed))
            print(f"\nattention, {shape}, B = {shape.clips}: {shape.what}\n{attention_table(found)}", flush=True)
            rows += found
            targets += attention.targets(shape, found)
            save(finished=False)
    path = save(finished=True)
    print(f"\n{ceilings_line(ceilings)}\n{targets_table(targets)}\nwritten: {path}", flush=True)
    return 0


def check_all(device: torch.device, dtype: torch.dtype, seed: int) -> list[Check]:
    """Every kernel at every size that is timed."""
    checks: list[Check] = []
    for shape in masking.SHAPES:
        checks += masking.check(shape, shape.clips, dtype, device, seed)
    for shape in attention.SHAPES:
        checks += attention.check(shape, shape.clips, dtype, device, seed)
    return checks


def report_wrong(checks: Sequence[Check]) -> bool:
    """Whether a kernel is wrong; says which, or how far off the worst one is."""
    wrong = [check for check in checks if check.wrong]
    for check in wrong:
        print(f"WRONG: {check.what}: error {check.error:.2e}, tolerance {check.tolerance:.1e}: nothing is timed")
    if not wrong:
        worst = max(checks, key=lambda check: check.error / check.tolerance if check.tolerance else 0.0)
        print(f"{len(checks)} checks passed; nearest to its tolerance: {worst.what}: {worst.error:.1e}", flush=True)
    return bool(wrong)


def rows_of(measured: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """All rows of a shape, and what they took given back."""
    rows = list(measured)
    torch.cuda.empty_cache()
    torch.compiler.reset()
    return rows


def attention_table(rows: Sequence[dict[str, Any]]) -> str:
    """ms and share of the floor, an implementation a line."""
    times = {(row["implementation"], row["phase"]): row for row in rows}
    lines = []
    for name in dict.fromkeys(row["implementation"] for row in rows):
        if (name, "any") in times:
            lines.append((name, times[name, "any"]["note"], *[""] * 5))
            continue
        found = [times[name, phase] for phase in ("forward", "backward", "both")]
        lines.append((name, *[value for row in found for value in (row["ms"], f"{row['share']:.0%}")]))
    header = ("ms and share of floor", "forward", "", "backward", "", "both", "")
    return table(header, lines)


def masking_table(rows: Sequence[dict[str, Any]]) -> str:
    """ms, share of the floor and peak memory, an op and implementation a line."""
    header = ("forward + backward", "", "ms", "of floor", "peak MB")
    lines = [
        (row["phase"], row["implementation"], row["ms"], f"{row['share']:.0%}", f"{row['peak_bytes'] / 1e6:.0f}")
        for row in rows
    ]
    return table(header, lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
