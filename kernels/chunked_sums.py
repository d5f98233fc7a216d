"""Sums over rows without atomics.

Rows are cut into chunks, as many as the shape alone says; each chunk leaves a partial sum in a float32 scratch, and
`launch_sum_chunks` adds them in a fixed order: two runs give the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import jit, launch, tl
from .blocks import blocks_of

CHUNK_ROWS = 256
"""Rows of a partial sum, at least."""


@jit(do_not_specialize=["num_chunks"])
def sum_chunks_kernel(
    partial,  # [chunks, columns] float32
    total,  # [columns]
    num_chunks,
    num_columns,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    sums = tl.zeros([BLOCK_CHUNKS, BLOCK_COLUMNS], tl.float32)
    for start in range(0, num_chunks, BLOCK_CHUNKS):
        chunk = start + tl.arange(0, BLOCK_CHUNKS)
        mask = (chunk < num_chunks)[:, None] & (column < num_columns)[None, :]
        sums += tl.load(partial + chunk.to(tl.int64)[:, None] * num_columns + column[None, :], mask=mask, other=0.0)
    tl.store(total + column, tl.sum(sums, 0).to(total.dtype.element_ty), mask=column < num_columns)


def launch_sum_chunks(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of partial sums [chunks, ...] over their chunks, formed in float32."""
    total = torch.empty(partial.shape[1:], dtype=dtype, device=partial.device)
    columns = total.numel()
    launch(
        sum_chunks_kernel, blocks_of(columns, 64), partial, total, partial.shape[0], columns,
        BLOCK_CHUNKS=32, BLOCK_COLUMNS=64, num_warps=4,
    )  # fmt: skip
    return total


def chunks_of(num_rows: int, most: int) -> tuple[int, int]:
    """How many chunks the rows are cut into, and how many rows each has."""
    chunk_rows = blocks_of(max(CHUNK_ROWS, blocks_of(num_rows, most)), 16) * 16
    return blocks_of(num_rows, chunk_rows), chunk_rows
