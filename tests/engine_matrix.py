"""Every valid (ZeRO stage, precision, offload): 20 steps against plain AdamW, resume, and checkpoints read elsewhere.

`python -m tests.engine_matrix` runs all of it and prints the table of docs/engine.md; tests/test_engine_matrix.py
judges it. In: nothing. Out: a Row per case. Runs tests/engine_worker.py on two processes, then on one and three.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msm_dist.config import MODEL_SIZES, stage_conflicts
from tests.processes import run_ranks

Case = tuple[int, str, str]

OFFLOADS = {0: ("none",), 1: ("none", "optimizer"), 2: ("none", "optimizer"), 3: ("none", "optimizer", "parameters")}
CASES: tuple[Case, ...] = tuple(
    (stage, precision, offload)
    for precision in ("fp32", "bf16", "fp16")
    for stage in OFFLOADS
    for offload in OFFLOADS[stage]
    if not list(stage_conflicts(stage, offload, precision))
)
DIAGONAL: tuple[Case, ...] = (
    (0, "fp32", "none"),
    (1, "bf16", "none"),
    (2, "fp32", "optimizer"),
    (3, "bf16", "parameters"),
)
BOUNDS = {"fp32": 1e-5, "bf16": 5e-3, "fp16": 5e-3}
"""Largest relative distance of a parameter after 20 steps. In fp32 it is the order of sums over ranks; in 16 bit such
a difference now and then rounds a weight the other way."""


@dataclass(frozen=True)
class Row:
    """What one case gave, and what became of its checkpoint in another one."""

    case: Case
    trained: dict[str, Any]
    target: Case
    moved: dict[str, Any]


def run(cases: Sequence[Case], folder: Path) -> list[Row]:
    """Train all cases on two processes; then continue each one's checkpoint at another stage and world size."""
    trained = _phase(folder, "train", 2, [[case] for case in cases])
    moves = [(case, _elsewhere(case, cases), (1, 3)[number % 2]) for number, case in enumerate(cases)]
    moved: dict[Case, dict[str, Any]] = {}
    for size in (1, 3):
        pairs = [[source, target] for source, target, where in moves if where == size]
        results = _phase(folder, "move", size, pairs)
        moved |= {tuple(source): result for (source, _), result in zip(pairs, results, strict=True)}
    return [Row(case, result, target, moved[case]) for (case, target, _), result in zip(moves, trained, strict=True)]


def without_our_precision(folder: Path) -> float:
    """The distance to plain AdamW of bf16 at stage 1 with DeepSpeed's own dtypes for sums of gradients."""
    return _phase(folder, "defaults", 2, [[(1, "bf16", "none")]])[0]["error"]


def as_deep_as_giant(folder: Path) -> dict[str, Any]:
    """Ten steps at stage 3 of a narrow model with the depths of model.size = giant."""
    giant = MODEL_SIZES["giant"]
    return _phase(folder, "deep", 2, [[giant.depth, giant.decoder_depth]])[0]


def unreadable_for_one(folder: Path) -> list[str]:
    """What two ranks at stage 3 say of a checkpoint that only the first can open."""
    return _phase(folder, "unreadable", 2, [[(3, "fp32", "none")]])[0]


def on_one_process(cases: Sequence[Case], folder: Path) -> list[dict[str, Any]]:
    """What `run` trains, on one process: all there is to try on one GPU."""
    return _phase(folder, "train", 1, [[case] for case in cases])


def name_of(case: Case) -> str:
    """Of a case's folder of checkpoints."""
    return "-".join(map(str, case))


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    lines = [
        "| stage | precision | offload | distance to plain AdamW | resume | read by stage, offload, processes | state "
        "| distance 10 steps on |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        stage, precision, offload = row.case
        resume = "bit-equal" if row.trained["resumed_exact"] else "DIFFERS"
        state = "bit-equal" if row.moved["state_exact"] else "DIFFERS"
        lines.append(
            f"| {stage} | {precision} | {offload} | {row.trained['error']:.1e} | {resume} | {row.target[0]}, "
            f"{row.target[2]}, {row.moved['world']} | {state} | {row.moved['error']:.1e} |"
        )
    return "\n".join(lines)


def _elsewhere(case: Case, cases: Sequence[Case]) -> Case:
    """The next case of the same precision at another stage, with another offload where there is one."""
    start = cases.index(case)
    candidates = [other for other in (*cases[start + 1 :], *cases[:start], *CASES) if other[1] == case[1]]
    candidates = [other for other in candidates if other[0] != case[0]]
    return next((other for other in candidates if other[2] != case[2]), candidates[0])


def _phase(folder: Path, phase: str, size: int, work: Sequence[Any]) -> list[dict[str, Any]]:
    if not work:
        return []
    (folder / f"{phase}-{size}.json").write_text(json.dumps(work))
    run_ranks(["-m", "tests.engine_worker", str(folder), phase], size, timeout=1200)
    return json.loads((folder / f"{phase}-{size}-results.json").read_text())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        print(table(run(CASES, Path(scratch))))
        error = without_our_precision(Path(scratch))
        print(f"\nbf16 at stage 1 with DeepSpeed's own dtypes for sums of gradients: {error:.1e} from plain AdamW")
    sys.exit()
