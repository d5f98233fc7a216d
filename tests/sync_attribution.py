"""Who asked for a host sync, told by the stack at that moment, and who may, told by docs/profiling.md."""

import re
import traceback
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

CASES = ("0/fp32", "1/fp32", "1/bf16", "2/fp32", "2/bf16", "3/fp32", "3/bf16")
ROOT = Path(__file__).resolve().parent.parent
WHEN = {
    "start": {"feed.py:feeding"},
    "saving": {"pretrain.py:save", "pretrain.py:validate", "pretrain.py:draw"},
    "log point": {"pretrain.py:log_training", "pretrain.py:stop_if_too_much_is_bad", "saving.py:check"},
}
"""What of the loop is no step: anything inside these functions."""


def attribute(stack: Sequence[traceback.FrameSummary]) -> tuple[str, str, str]:
    """(step, log point, saving or start; msm_dist, deepspeed, torch or nobody; file.py:function).

    The innermost frame of ours or of DeepSpeed is the one that asked; torch's own optimiser asks for itself.
    DeepSpeed's accelerators only pass on what others ask for.
    """
    stack = [frame for frame in stack if "/deepspeed/accelerator/" not in frame.filename]
    ours = {_where(frame) for frame in stack if _is_ours(frame.filename)}
    when = next((name for name, functions in WHEN.items() if functions & ours), "step")
    for frame in reversed(stack):
        if _is_ours(frame.filename):
            return when, "msm_dist", _where(frame)
        for part, whose in (("/deepspeed/", "deepspeed"), ("/torch/optim/", "torch")):
            if part in frame.filename:
                return when, whose, _where(frame)
    return when, "nobody", _where(stack[0])


def _where(frame: traceback.FrameSummary) -> str:
    return f"{Path(frame.filename).name}:{frame.name}"


def _is_ours(path: str) -> bool:
    return Path(path).is_relative_to(ROOT / "msm_dist") or Path(path).is_relative_to(ROOT / "kernels")


def documented() -> dict[str, set[str]]:
    """DeepSpeed's waits by case (stage/precision), as the table of docs/profiling.md lists them."""
    waits: dict[str, set[str]] = defaultdict(set)
    for line in (ROOT / "docs/profiling.md").read_text(encoding="utf-8").splitlines():
        if row := re.fullmatch(r"\| `(\w+\.py:\w+)` \| ((?:\d/\w+ ?)+) \| .* \|", line):
            for case in row[2].split():
                waits[case].add(row[1])
    return waits
