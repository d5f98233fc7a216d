"""Attention of long sequences: blocks of keys pass by a block of queries with a running softmax.

FlashAttention-2 (Dao 2023). The forward keeps the output unnormalised, with each row's maximum and sum so far, and
saves O and lse = log2 of the row sums. The backward has two kernels, so that no two programs add to one place:

    queries   delta_i = sum_d dO_id O_id, stored for the second one;  dQ = dS K / sqrt(D), keys pass by
    keys      dK = dS^T Q / sqrt(D),  dV = P^T dO, queries pass by

with P = exp2(S - lse) and dS = P * (dO V^T - delta). Scores are kept in base 2, S = Q K^T log2(e) / sqrt(D). The
launchers trust their arguments; `attention.attention` checks them.

Legend: B clips, N tokens, H heads, D width of a head, W = H * D; COLS is D rounded up to a power of two. q, k, v blocks
of queries, keys, values; d_x the gradient of x; scale is log2(e) / sqrt(D), natural 1 / sqrt(D).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .attention_rows import LOG2E, load_rows, sizes, store_rows, valid_keys, with_mask
from .backend import dot_precision, jit, launch, tl
from .blocks import blocks_of, power_of_two
from .configurations import configuration


class Tiled(NamedTuple):
    """Launch parameters."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


@jit
def _pass_keys(
    q, out, top, total, k_pointer, v_pointer, key_mask, start, num_tokens, columns, stride, scale,
    D: tl.constexpr, BLOCK_K: tl.constexpr, PARTIAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys passes by: the running output (unnormalised), row maximum and row sum."""
    keys = start + tl.arange(0, BLOCK_K)
    valid = keys < num_tokens
    k = load_rows(k_pointer, keys, columns, valid, stride, D)
    v = load_rows(v_pointer, keys, columns, valid, stride, D)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if PARTIAL or MASKED:
        seen = valid_keys(key_mask, 0, keys, valid, MASKED)
        s = tl.where(seen[None, :], s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1) * scale)
    base = new_top
    if MASKED:  # as long as no key was seen
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(s * scale - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(p, 1)
    out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)
    return out, new_top, total


@jit(do_not_specialize=["num_tokens", "num_heads"])
def tiled_forward(
    qkv,
    key_mask,
    out,
    lse,
    num_tokens,
    num_heads,
    width,
    scale,
    D: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One block of queries of a head; lse [B, H, N] float32 is log2 of the row sums, +inf where no key is seen."""
    blocks = tl.cdiv(num_tokens, BLOCK_Q)
    head = (tl.program_id(0) // blocks) % num_heads
    clip = (tl.program_id(0) // (blocks * num_heads)).to(tl.int64)
    queries = tl.program_id(0) % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    columns = tl.arange(0, COLS)
    valid = queries < num_tokens
    source = qkv + clip * num_tokens * (3 * width) + head * D
    mask_row = key_mask + clip * num_tokens
    q = load_rows(source, queries, columns, valid, 3 * width, D)
    o = tl.zeros([BLOCK_Q, COLS], tl.float32)
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    whole = num_tokens // BLOCK_K * BLOCK_K
    for start in tl.range(0, whole, BLOCK_K, num_stages=STAGES):
        o, top, total = _pass_keys(
            q, o, top, total, source + width, source + 2 * width, mask_row, start, num_tokens, columns, 3 * width,
            scale, D, BLOCK_K, False, MASKED, PRECISION,
        )  # fmt: skip
    if whole < num_tokens:
        o, top, total = _pass_keys(
            q, o, top, total, source + width, source + 2 * width, mask_row, whole, num_tokens, columns, 3 * width,
            scale, D, BLOCK_K, True, MASKED, PRECISION,
        )  # fmt: skip
    seen = total > 0.0
    total = tl.where(seen, total, 1.0)
    o = o / total[:, None]
    store_rows(out + clip * num_tokens * width + head * D, queries, columns, valid, width, o, D)
    row = lse + (clip * num_heads + head) * num_tokens
    tl.store(row + queries, tl.where(seen, top + tl.log2(total), float("inf")), mask=valid)


@jit
def _pass_keys_backward(
    q, d_o, lse, delta, d_q, k_pointer, v_pointer, key_mask, start, num_tokens, columns, stride, scale,
    D: tl.constexpr, BLOCK_K: tl.constexpr, PARTIAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys passes by: adds its share of dQ, without the factor 1 / sqrt(D)."""
    keys = start + tl.arange(0, BLOCK_K)
    valid = keys < num_tokens
    k = load_rows(k_pointer, keys, columns, valid, stride, D)
    v = load_rows(v_pointer, keys, columns, valid, stride, D)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if PARTIAL or MASKED:
        seen = valid_keys(key_mask, 0, keys, valid, MASKED)
        s = tl.where(seen[None, :], s, float("-inf"))
    p = tl.exp2(s * scale - lse[:, None])
    d_p = tl.dot(d_o, tl.trans(v), input_precision=PRECISION)
    d_s = p * (d_p - delta[:, None])
    return tl.dot(d_s.to(k.dtype), k, d_q, input_precision=PRECISION)


@jit(do_not_specialize=["num_tokens", "num_heads"])
def tiled_backward_queries(
    qkv,
    key_mask,
    out,
    d_out,
    lse,
    delta,
    d_qkv,
    num_tokens,
    num_heads,
    width,
    scale,
    natural,
    D: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dQ of one block of queries of a head, and delta [B, H, N] float32 for `tiled_backward_keys`."""
    blocks = tl.cdiv(num_tokens, BLOCK_Q)
    head = (tl.program_id(0) // blocks) % num_heads
    clip = (tl.program_id(0) // (blocks * num_heads)).to(tl.int64)
    queries = tl.program_id(0) % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    columns = tl.arange(0, COLS)
    valid = queries < num_tokens
    source = qkv + clip * num_tokens * (3 * width) + head * D
    mask_row = key_mask + clip * num_tokens
    statistics = (clip * num_heads + head) * num_tokens + queries
    narrow = clip * num_tokens * width + head * D
    q = load_rows(source, queries, columns, valid, 3 * width, D)
    o = load_rows(out + narrow, queries, columns, valid, width, D)
    d_o = load_rows(d_out + narrow, queries, columns, valid, width, D)
    row_lse = tl.load(lse + statistics, mask=valid, other=float("inf"))
    row_delta = tl.sum(o.to(tl.float32) * d_o.to(tl.float32), 1)
    tl.store(delta + statistics, row_delta, mask=valid)
    d_q = tl.zeros([BLOCK_Q, COLS], tl.float32)
    whole = num_tokens // BLOCK_K * BLOCK_K
    for start in tl.range(0, whole, BLOCK_K, num_stages=STAGES):
        d_q = _pass_keys_backward(
            q, d_o, row_lse, row_delta, d_q, source + width, source + 2 * width, mask_row, start, num_tokens,
            columns, 3 * width, scale, D, BLOCK_K, False, MASKED, PRECISION,
        )  # fmt: skip
    if whole < num_tokens:
        d_q = _pass_keys_backward(
            q, d_o, row_lse, row_delta, d_q, source + width, source + 2 * width, mask_row, whole, num_tokens,
            columns, 3 * width, scale, D, BLOCK_K, True, MASKED, PRECISION,
        )  # fmt: skip
    target = d_qkv + clip * num_tokens * (3 * width) + head * D
    store_rows(target, queries, columns, valid, 3 * width, d_q * natural, D)


@jit(do_not_specialize=["num_tokens", "num_heads"])
def tiled_backward_keys(
    qkv,
    key_mask,
    d_out,
    lse,
    delta,
    d_qkv,
    num_tokens,
    num_heads,
    width,
    scale,
    natural,
    D: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dK and dV of one block of keys of a head: blocks of queries pass by, scores transposed [keys, queries]."""
    blocks = tl.cdiv(num_tokens, BLOCK_K)
    head = (tl.program_id(0) // blocks) % num_heads
    clip = (tl.program_id(0) // (blocks * num_heads)).to(tl.int64)
    keys = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    columns = tl.arange(0, COLS)
    valid = keys < num_tokens
    source = qkv + clip * num_tokens * (3 * width) + head * D
    incoming = d_out + clip * num_tokens * width + head * D
    statistics = (clip * num_heads + head) * num_tokens
    k = load_rows(source + width, keys, columns, valid, 3 * width, D)
    v = load_rows(source + 2 * width, keys, columns, valid, 3 * width, D)
    seen = valid_keys(key_mask, clip * num_tokens, keys, valid, MASKED)
    d_k = tl.zeros([BLOCK_K, COLS], tl.float32)
    d_v = tl.zeros([BLOCK_K, COLS], tl.float32)
    for start in tl.range(0, num_tokens, BLOCK_Q, num_stages=STAGES):
        queries = start + tl.arange(0, BLOCK_Q)
        present = queries < num_tokens
        q = load_rows(source, queries, columns, present, 3 * width, D)
        d_o = load_rows(incoming, queries, columns, present, width, D)
        # Queries past the end have q = dO = 0 and add nothing.
        row_lse = tl.load(lse + statistics + queries, mask=present, other=0.0)
        row_delta = tl.load(delta + statistics + queries, mask=present, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        if MASKED:
            s = tl.where(seen[:, None], s, float("-inf"))
        p = tl.exp2(s * scale - row_lse[None, :])
        d_v = tl.dot(p.to(d_o.dtype), d_o, d_v, input_precision=PRECISION)
        d_p = tl.dot(v, tl.trans(d_o), input_precision=PRECISION)
        d_s = p * (d_p - row_delta[None, :])
        d_k = tl.dot(d_s.to(q.dtype), q, d_k, input_precision=PRECISION)
    target = d_qkv + clip * num_tokens * (3 * width) + head * D
    store_rows(target + width, keys, columns, valid, 3 * width, d_k * natural, D)
    store_rows(target + 2 * width, keys, columns, valid, 3 * width, d_v, D)


def default(head_dim: int, dtype: torch.dtype, backward: bool) -> Tiled:
    """Blocks whose values stay in registers; float32 takes several times the room of the 16-bit types."""
    if dtype == torch.float32:
        return Tiled(16, 16, 4, 1) if head_dim > 64 else Tiled(16, 32, 4, 1)
    if head_dim > 64:
        return Tiled(64, 64, 8, 1) if backward else Tiled(64, 64, 4, 2)
    return Tiled(64, 64, 4, 2 if backward else 3)


def launch_forward(
    qkv: Tensor, num_heads: int, key_mask: Tensor | None, shape_class: str, config: Tiled | None
) -> tuple[Tensor, Tensor]:
    """qkv [B, N, 3W] contiguous, key_mask bool [B, N] -> O [B, N, W], lse [B, H, N] float32."""
    B, N, W, D = sizes(qkv, num_heads)
    out = torch.empty(B, N, W, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(B, num_heads, N, dtype=torch.float32, device=qkv.device)
    if config is None:
        default_config = default(D, qkv.dtype, backward=False)
        config = configuration("attention_tiled_forward", shape_class, qkv.dtype, qkv.device, default_config)
    tensors = (qkv, key_mask, out, lse)
    _launch(tiled_forward, config, config.block_q, num_heads, tensors, (D**-0.5 * LOG2E,))
    return out, lse


def launch_backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    key_mask: Tensor | None,
    shape_class: str,
    config: Tiled | None,
) -> Tensor:
    """dO [B, N, W], contiguous, and what the forward took and gave -> d qkv [B, N, 3W]."""
    _, _, _, D = sizes(qkv, num_heads)
    d_qkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    if config is None:
        default_config = default(D, qkv.dtype, backward=True)
        config = configuration("attention_tiled_backward", shape_class, qkv.dtype, qkv.device, default_config)
    scales = (D**-0.5 * LOG2E, D**-0.5)
    tensors = (qkv, key_mask, out, grad, lse, delta, d_qkv)
    _launch(tiled_backward_queries, config, config.block_q, num_heads, tensors, scales)
    tensors = (qkv, key_mask, grad, lse, delta, d_qkv)
    _launch(tiled_backward_keys, config, config.block_k, num_heads, tensors, scales)
    return d_qkv


def _launch(kernel, config: Tiled, block: int, num_heads: int, tensors: tuple, scales: tuple) -> None:
    qkv, key_mask = tensors[:2]
    B, N, W, D = sizes(qkv, num_heads)
    launch(
        kernel, B * num_heads * blocks_of(N, block), *with_mask(tensors), N, num_heads, W, *scales,
        D=D, COLS=power_of_two(D), BLOCK_Q=config.block_q, BLOCK_K=config.block_k,
        MASKED=key_mask is not None, PRECISION=dot_precision(qkv), STAGES=config.num_stages,
        num_warps=config.num_warps,
    )  # fmt: skip
