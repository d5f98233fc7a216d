"""What tiles of the short attention cost, read off compiled code: the choice of defaults without a GPU.

`python -m benchmarks.tiles` compiles candidates for sm_90 in bfloat16 and prints, for each: instructions of a warp
(the code has no loops), registers and bytes of spills a thread, programs that fit a multiprocessor, and what a
sequence costs of the four schedulers' time beside the time in which an H200 moves its bytes. `--json FILE` writes the
rows. A filter, not a measurement: it knows nothing of latency.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from msm_kernels import attention, attention_short, backend
from msm_kernels.attention_short import Short
from tests.aot import Driver, nvidia_resources

HEAD_DIM, NUM_HEADS, CLIPS = 64, 12, 2048
CANDIDATES = {
    16: ((16, 0, 1), (32, 0, 1), (64, 0, 4)),
    17: ((32, 0, 1), (32, 0, 2), (16, 16, 1), (64, 0, 2), (64, 0, 4), (128, 0, 8)),
    32: ((32, 0, 1), (32, 0, 2)),
    48: ((64, 0, 4), (32, 16, 1), (32, 16, 2), (32, 16, 4)),
    64: ((64, 0, 4), (64, 0, 2), (32, 32, 4)),
    66: ((64, 16, 4), (64, 16, 2), (64, 16, 8), (128, 0, 8)),
    103: ((128, 0, 4), (128, 0, 8), (64, 64, 4)),
}
"""Tokens: (rows, tail, warps)."""
MULTIPROCESSORS, CLOCK, BANDWIDTH = 132, 1.75e9, 4.3e12
REGISTERS, SHARED, WARPS, PROGRAMS = 65536, 232448, 64, 32
"""Of a multiprocessor of an H200."""


class Row(NamedTuple):
    """One kernel under one tile; cycles are those of a multiprocessor for one sequence of one head."""

    num_tokens: int
    phase: str
    tile: Short
    is_default: bool
    instructions: int
    registers: int
    spills: int
    programs: int
    issue_cycles: float
    floor_cycles: float


def rows() -> Iterator[Row]:
    """Compile and count."""
    triton.runtime.driver.set_active(Driver(GPUTarget("cuda", 90, 32)))
    backend.capability.cache_clear()
    kernels, run = [], JITFunction.run

    def compile_only(function, *args, grid, warmup, **kwargs):
        kernels.append(run(function, *args, grid=grid, warmup=True, **kwargs))

    JITFunction.run = compile_only
    for num_tokens, tiles in CANDIDATES.items():
        qkv = torch.empty(CLIPS, num_tokens, 3 * NUM_HEADS * HEAD_DIM, dtype=torch.bfloat16, device="meta")
        for tile in (Short(rows, tail, 1, warps, 1) for rows, tail, warps in tiles):
            kernels.clear()
            out, lse = attention.launch_forward(qkv, NUM_HEADS, None, tile)
            attention.launch_backward(out, qkv, None, lse, NUM_HEADS, None, tile)
            for phase, kernel in zip(("forward", "backward"), kernels, strict=True):
                yield counted(num_tokens, phase, tile, kernel)


def counted(num_tokens: int, phase: str, tile: Short, kernel) -> Row:
    cubin = kernel.asm["cubin"]
    registers, spills = nvidia_resources(cubin)
    instructions = count_instructions(cubin)
    sequences = (tile.rows + tile.tail) // num_tokens
    byte_count = (8 if phase == "forward" else 14) * num_tokens * HEAD_DIM
    default = attention_short.default(num_tokens, HEAD_DIM, torch.bfloat16, phase == "backward")
    programs = min(
        REGISTERS // (-(-registers // 8) * 8 * 32 * tile.num_warps),
        SHARED // (kernel.metadata.shared + 1024),
        WARPS // tile.num_warps,
        PROGRAMS,
    )
    return Row(
        num_tokens,
        phase,
        tile,
        tile == default,
        instructions,
        registers,
        spills,
        programs,
        instructions * tile.num_warps / sequences / 4,
        byte_count / (BANDWIDTH / MULTIPROCESSORS) * CLOCK,
    )


def count_instructions(cubin: bytes) -> int:
    """Instructions up to the last EXIT: what a warp issues, as the code has no loops."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z]\w+)", text, re.MULTILINE)
    return max(place for place, name in enumerate(names) if name == "EXIT")


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tiles", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--json", type=Path, help="write the rows there")
    arguments = parser.parse_args()
    if backend.INTERPRETED:
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing; unset it")
    found = []
    print("| tokens | phase | tile, warps | instructions | registers | spills | programs | issue / floor |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in rows():
        found.append(row._asdict())
        tile = f"{row.tile.rows} + {row.tile.tail}" if row.tile.tail else f"{row.tile.rows}"
        mark = " (default)" if row.is_default else ""
        print(
            f"| {row.num_tokens} | {row.phase} | {tile}, {row.tile.num_warps}{mark} | {row.instructions} | "
            f"{row.registers} | {row.spills} | {row.programs} | {row.issue_cycles:.0f} / {row.floor_cycles:.0f} = "
            f"{row.issue_cycles / row.floor_cycles:.2f} |",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
