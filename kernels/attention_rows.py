"""What both regimes of attention share: rows of one head in the packed layouts.

Legend: N tokens, H heads, D width of a head, W = H * D.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import jit, tl

LOG2E = 1.4426950408889634


@jit
def load_rows(pointer, rows, columns, valid, stride, D: tl.constexpr):
    """Rows of a matrix with D columns; zeros where not valid and beyond D."""
    mask = valid[:, None] & (columns < D)[None, :]
    return tl.load(pointer + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@jit
def store_rows(pointer, rows, columns, valid, stride, values, D: tl.constexpr):
    mask = valid[:, None] & (columns < D)[None, :]
    tl.store(pointer + rows[:, None] * stride + columns[None, :], values.to(pointer.dtype.element_ty), mask=mask)


@jit
def valid_keys(key_mask, first, rows, valid, MASKED: tl.constexpr):
    if MASKED:
        valid = valid & (tl.load(key_mask + first + rows, mask=valid, other=0) != 0)
    return valid


def sizes(qkv: Tensor, num_heads: int) -> tuple[int, int, int, int]:
    """B, N, W, D."""
    width = qkv.shape[2] // 3
    return qkv.shape[0], qkv.shape[1], width, width // num_heads


def with_mask(tensors: tuple) -> tuple:
    """Where there is no mask any pointer does: MASKED says that it is not read."""
    qkv, key_mask, *rest = tensors
    return (qkv, qkv if key_mask is None else key_mask.view(torch.uint8), *rest)
