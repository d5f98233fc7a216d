"""Multi-head self-attention on the packed output of the query-key-value projection.

O = softmax(Q K^T / sqrt(D)) V per head, read from and written to the layouts that the projections around it use:
no transposes, no copies. Malformed arguments raise ValueError; a backend that can't run raises
BackendUnavailable.

Backward, from dO:  P = softmax(S),  dV = P^T dO,  dP = dO V^T,  delta_i = sum_j P_ij dP_ij,
dS = P * (dP - delta),  dQ = dS K / sqrt(D),  dK = dS^T Q / sqrt(D).

Two regimes, chosen by `regime` from the shape alone:
- short: one program holds all scores of a head, of one sequence or of several that lie one after the other. Nothing
  but qkv is saved: the backward recomputes the scores and writes dQ, dK and dV in one pass.
- tiled: blocks of keys pass by a block of queries with a running softmax (Dao 2023, FlashAttention-2); saves O and
  the log of the sum. The backward has one kernel for dQ, which also stores delta = sum_d dO O, and one for dK, dV.
Scores are kept in base 2, S * log2(e). No atomics: two runs give the same bits.

Legend: B clips, N tokens, H heads, D width of a head, W = H * D. A tile has ROWS rows of one head, or ROWS and a
TAIL more (66 tokens are 64 + 16, not 128); COLS is D rounded up to a power of two. q_ k_ v_ tiles of queries, keys,
values; _t their tails; d_ gradients.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from . import reference
from .backend import Backend, BackendUnavailable, dot_precision, jit, launch, resolve, tl
from .configurations import configuration

HEAD_DIMS = (32, 64, 80, 128)
LONGEST = 1024
"""Tokens in a sequence; longer ones go to torch's scaled_dot_product_attention."""
LOG2E = 1.4426950408889634

log = logging.getLogger("msm_kernels")


class Short(NamedTuple):
    """Launch parameters of the short regime: a tile of `rows` + `tail` rows holds as many sequences as fit, and one
    program works through `loops` tiles."""

    rows: int
    tail: int
    loops: int
    num_warps: int
    num_stages: int


class Tiled(NamedTuple):
    """Launch parameters of the tiled regime."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


# --- short sequences


@jit
def _load(pointer, rows, columns, valid, stride, D: tl.constexpr):
    """Rows of a matrix with D columns; zeros where not valid and beyond D."""
    mask = valid[:, None] & (columns < D)[None, :]
    return tl.load(pointer + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@jit
def _store(pointer, rows, columns, valid, stride, values, D: tl.constexpr):
    mask = valid[:, None] & (columns < D)[None, :]
    tl.store(pointer + rows[:, None] * stride + columns[None, :], values.to(pointer.dtype.element_ty), mask=mask)


@jit
def _allowed(query_rows, key_rows, key_valid, num_tokens, PACKED: tl.constexpr):
    """Which keys each query of a tile sees: valid ones, of its own sequence where several share the tile."""
    if PACKED:
        allowed = key_valid[None, :] & ((query_rows // num_tokens)[:, None] == (key_rows // num_tokens)[None, :])
    else:
        allowed = key_valid[None, :] & (query_rows >= 0)[:, None]
    return allowed


@jit
def _softmax(q, k, k_t, allowed, allowed_t, scale, TAIL: tl.constexpr, PRECISION: tl.constexpr):
    """exp2(S - row maximum) for both tiles of keys and 1 / row sum; all zeros where a query sees no key."""
    s = tl.where(allowed, tl.dot(q, tl.trans(k), input_precision=PRECISION), float("-inf"))
    top = tl.max(s, 1)
    if TAIL:
        s_t = tl.where(allowed_t, tl.dot(q, tl.trans(k_t), input_precision=PRECISION), float("-inf"))
        top = tl.maximum(top, tl.max(s_t, 1))
    top = tl.where(top == float("-inf"), 0.0, top * scale)
    p = tl.exp2(s * scale - top[:, None])  # the scale comes in here: one fused multiply-add for both
    total = tl.sum(p, 1)
    p_t = p
    if TAIL:
        p_t = tl.exp2(s_t * scale - top[:, None])
        total += tl.sum(p_t, 1)
    return p, p_t, 1.0 / tl.where(total == 0.0, 1.0, total)


@jit
def _attend(q, k, v, k_t, v_t, allowed, allowed_t, scale, TAIL: tl.constexpr, PRECISION: tl.constexpr):
    """The output rows of one tile of queries."""
    p, p_t, inverse = _softmax(q, k, k_t, allowed, allowed_t, scale, TAIL, PRECISION)
    out = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    if TAIL:
        out = tl.dot(p_t.to(v.dtype), v_t, out, input_precision=PRECISION)
    return out * inverse[:, None]


@jit
def _score_gradients(
    q, d_o, k, v, k_t, v_t, allowed, allowed_t, scale, natural, TAIL: tl.constexpr, PRECISION: tl.constexpr
):
    """P and dS / sqrt(D) of one tile of queries, for both tiles of keys."""
    p, p_t, inverse = _softmax(q, k, k_t, allowed, allowed_t, scale, TAIL, PRECISION)
    p *= inverse[:, None]
    d_p = tl.dot(d_o, tl.trans(v), input_precision=PRECISION)
    delta = tl.sum(p * d_p, 1)
    d_s_t = p
    if TAIL:
        p_t *= inverse[:, None]
        d_p_t = tl.dot(d_o, tl.trans(v_t), input_precision=PRECISION)
        delta += tl.sum(p_t * d_p_t, 1)
        d_s_t = p_t * (d_p_t - delta[:, None]) * natural
    d_s = p * (d_p - delta[:, None]) * natural
    return p.to(q.dtype), p_t.to(q.dtype), d_s.to(q.dtype), d_s_t.to(q.dtype)


@jit
def _transposed_products(a, x, a_t, x_t, PRECISION: tl.constexpr):
    """a^T x + a_t^T x_t."""
    product = tl.dot(tl.trans(a), x, input_precision=PRECISION)
    return tl.dot(tl.trans(a_t), x_t, product, input_precision=PRECISION)


@jit
def _valid_keys(key_mask, first, rows, valid, MASKED: tl.constexpr):
    if MASKED:
        valid = valid & (tl.load(key_mask + first + rows, mask=valid, other=0) != 0)
    return valid


@jit(do_not_specialize=["num_tokens", "num_rows", "num_heads"])
def short_forward(
    qkv,
    key_mask,
    out,
    num_tokens,
    num_rows,
    num_heads,
    width,
    scale,
    D: tl.constexpr,
    COLS: tl.constexpr,
    ROWS: tl.constexpr,
    TAIL: tl.constexpr,
    LOOPS: tl.constexpr,
    PACKED: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One head of LOOPS tiles: qkv [num_rows, 3 * width] -> out [num_rows, width]; heads of a tile are neighbours."""
    head = tl.program_id(0) % num_heads
    tile_rows = (ROWS + TAIL) // num_tokens * num_tokens
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLS)
    for loop in tl.range(0, LOOPS, num_stages=STAGES):
        first = ((tl.program_id(0) // num_heads).to(tl.int64) * LOOPS + loop) * tile_rows
        left = tl.minimum(tile_rows, num_rows - first).to(tl.int32)
        source = qkv + first * (3 * width) + head * D
        target = out + first * width + head * D
        valid = rows < left
        q = _load(source, rows, columns, valid, 3 * width, D)
        k = _load(source + width, rows, columns, valid, 3 * width, D)
        v = _load(source + 2 * width, rows, columns, valid, 3 * width, D)
        keys = _valid_keys(key_mask, first, rows, valid, MASKED)
        allowed = _allowed(rows, rows, keys, num_tokens, PACKED)
        if TAIL:
            rows_t = ROWS + tl.arange(0, TAIL)
            valid_t = rows_t < left
            q_t = _load(source, rows_t, columns, valid_t, 3 * width, D)
            k_t = _load(source + width, rows_t, columns, valid_t, 3 * width, D)
            v_t = _load(source + 2 * width, rows_t, columns, valid_t, 3 * width, D)
            keys_t = _valid_keys(key_mask, first, rows_t, valid_t, MASKED)
            allowed_t = _allowed(rows, rows_t, keys_t, num_tokens, PACKED)
            o = _attend(q, k, v, k_t, v_t, allowed, allowed_t, scale, TAIL, PRECISION)
            allowed = _allowed(rows_t, rows, keys, num_tokens, PACKED)
            allowed_t = _allowed(rows_t, rows_t, keys_t, num_tokens, PACKED)
            o_t = _attend(q_t, k, v, k_t, v_t, allowed, allowed_t, scale, TAIL, PRECISION)
            _store(target, rows_t, columns, valid_t, width, o_t, D)
        else:
            o = _attend(q, k, v, k, v, allowed, allowed, scale, TAIL, PRECISION)
        _store(target, rows, columns, valid, width, o, D)


@jit(do_not_specialize=["num_tokens", "num_rows", "num_heads"])
def short_backward(
    qkv,
    key_mask,
    d_out,
    d_qkv,
    num_tokens,
    num_rows,
    num_heads,
    width,
    scale,
    natural,
    D: tl.constexpr,
    COLS: tl.constexpr,
    ROWS: tl.constexpr,
    TAIL: tl.constexpr,
    LOOPS: tl.constexpr,
    PACKED: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One head of LOOPS tiles: qkv and d_out [num_rows, width] -> d_qkv, all three parts in one pass."""
    head = tl.program_id(0) % num_heads
    tile_rows = (ROWS + TAIL) // num_tokens * num_tokens
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLS)
    for loop in tl.range(0, LOOPS, num_stages=STAGES):
        first = ((tl.program_id(0) // num_heads).to(tl.int64) * LOOPS + loop) * tile_rows
        left = tl.minimum(tile_rows, num_rows - first).to(tl.int32)
        source = qkv + first * (3 * width) + head * D
        target = d_qkv + first * (3 * width) + head * D
        incoming = d_out + first * width + head * D
        valid = rows < left
        q = _load(source, rows, columns, valid, 3 * width, D)
        k = _load(source + width, rows, columns, valid, 3 * width, D)
        v = _load(source + 2 * width, rows, columns, valid, 3 * width, D)
        d_o = _load(incoming, rows, columns, valid, width, D)
        keys = _valid_keys(key_mask, first, rows, valid, MASKED)
        allowed = _allowed(rows, rows, keys, num_tokens, PACKED)
        if TAIL:
            rows_t = ROWS + tl.arange(0, TAIL)
            valid_t = rows_t < left
            q_t = _load(source, rows_t, columns, valid_t, 3 * width, D)
            k_t = _load(source + width, rows_t, columns, valid_t, 3 * width, D)
            v_t = _load(source + 2 * width, rows_t, columns, valid_t, 3 * width, D)
            d_o_t = _load(incoming, rows_t, columns, valid_t, width, D)
            keys_t = _valid_keys(key_mask, first, rows_t, valid_t, MASKED)
            allowed_t = _allowed(rows, rows_t, keys_t, num_tokens, PACKED)
            p, p_t, d_s, d_s_t = _score_gradients(
                q, d_o, k, v, k_t, v_t, allowed, allowed_t, scale, natural, TAIL, PRECISION
            )
            allowed = _allowed(rows_t, rows, keys, num_tokens, PACKED)
            allowed_t = _allowed(rows_t, rows_t, keys_t, num_tokens, PACKED)
            # Those of the tail of queries: e for P, f for dS.
            e, e_t, f, f_t = _score_gradients(
                q_t, d_o_t, k, v, k_t, v_t, allowed, allowed_t, scale, natural, TAIL, PRECISION
            )
            # One product after the other, stored at once: few accumulators live at a time.
            d_q = tl.dot(d_s_t, k_t, tl.dot(d_s, k, input_precision=PRECISION), input_precision=PRECISION)
            _store(target, rows, columns, valid, 3 * width, d_q, D)
            d_q = tl.dot(f_t, k_t, tl.dot(f, k, input_precision=PRECISION), input_precision=PRECISION)
            _store(target, rows_t, columns, valid_t, 3 * width, d_q, D)
            d_k = _transposed_products(d_s, q, f, q_t, PRECISION)
            _store(target + width, rows, columns, valid, 3 * width, d_k, D)
            d_k = _transposed_products(d_s_t, q, f_t, q_t, PRECISION)
            _store(target + width, rows_t, columns, valid_t, 3 * width, d_k, D)
            d_v = _transposed_products(p, d_o, e, d_o_t, PRECISION)
            _store(target + 2 * width, rows, columns, valid, 3 * width, d_v, D)
            d_v = _transposed_products(p_t, d_o, e_t, d_o_t, PRECISION)
            _store(target + 2 * width, rows_t, columns, valid_t, 3 * width, d_v, D)
        else:
            p, p_t, d_s, d_s_t = _score_gradients(q, d_o, k, v, k, v, allowed, allowed, scale, natural, TAIL, PRECISION)
            d_q = tl.dot(d_s, k, input_precision=PRECISION)
            _store(target, rows, columns, valid, 3 * width, d_q, D)
            d_k = tl.dot(tl.trans(d_s), q, input_precision=PRECISION)
            _store(target + width, rows, columns, valid, 3 * width, d_k, D)
            d_v = tl.dot(tl.trans(p), d_o, input_precision=PRECISION)
            _store(target + 2 * width, rows, columns, valid, 3 * width, d_v, D)


# --- long sequences


@jit
def _pass_keys(
    q, out, top, total, k_pointer, v_pointer, key_mask, start, num_tokens, columns, stride, scale,
    D: tl.constexpr, BLOCK_K: tl.constexpr, PARTIAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys passes by: the running output (unnormalised), row maximum and row sum."""
    keys = start + tl.arange(0, BLOCK_K)
    valid = keys < num_tokens
    k = _load(k_pointer, keys, columns, valid, stride, D)
    v = _load(v_pointer, keys, columns, valid, stride, D)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if PARTIAL or MASKED:
        seen = _valid_keys(key_mask, 0, keys, valid, MASKED)
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
    q = _load(source, queries, columns, valid, 3 * width, D)
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
    _store(out + clip * num_tokens * width + head * D, queries, columns, valid, width, o, D)
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
    k = _load(k_pointer, keys, columns, valid, stride, D)
    v = _load(v_pointer, keys, columns, valid, stride, D)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if PARTIAL or MASKED:
        seen = _valid_keys(key_mask, 0, keys, valid, MASKED)
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
    q = _load(source, queries, columns, valid, 3 * width, D)
    o = _load(out + narrow, queries, columns, valid, width, D)
    d_o = _load(d_out + narrow, queries, columns, valid, width, D)
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
    _store(target, queries, columns, valid, 3 * width, d_q * natural, D)


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
    k = _load(source + width, keys, columns, valid, 3 * width, D)
    v = _load(source + 2 * width, keys, columns, valid, 3 * width, D)
    seen = _valid_keys(key_mask, clip * num_tokens, keys, valid, MASKED)
    d_k = tl.zeros([BLOCK_K, COLS], tl.float32)
    d_v = tl.zeros([BLOCK_K, COLS], tl.float32)
    for start in tl.range(0, num_tokens, BLOCK_Q, num_stages=STAGES):
        queries = start + tl.arange(0, BLOCK_Q)
        present = queries < num_tokens
        q = _load(source, queries, columns, present, 3 * width, D)
        d_o = _load(incoming, queries, columns, present, width, D)
        # Queries past the end have lse = +inf, and with it p = 0.
        row_lse = tl.load(lse + statistics + queries, mask=present, other=float("inf"))
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
    _store(target + width, keys, columns, valid, 3 * width, d_k * natural, D)
    _store(target + 2 * width, keys, columns, valid, 3 * width, d_v, D)


# --- launchers


def regime(num_tokens: int, head_dim: int, dtype: torch.dtype) -> Literal["short", "tiled", "sdpa"]:
    """How a sequence is handled: a function of its shape alone, so that what is saved for backward is known ahead.

    What a program holds on the chip sets the bounds of the short regime; beyond LONGEST tokens, or for a width
    of a head that is none of HEAD_DIMS, it is torch's scaled_dot_product_attention.
    """
    if num_tokens > LONGEST or head_dim not in HEAD_DIMS:
        return "sdpa"
    longest = 32 if dtype == torch.float32 else 64 if head_dim > 64 else 128
    return "short" if num_tokens <= longest else "tiled"


def shape_class(num_tokens: int, head_dim: int) -> str:
    """The key of the configuration table: the least bound that holds the tokens, and the width of a head."""
    bounds = (16, 32, 48, 64, 80, 96, 112, 128, 192, 256, 384, 512, 768, 1024)
    return f"n{next(bound for bound in bounds if num_tokens <= bound)}_d{head_dim}"


def default_short(num_tokens: int, head_dim: int, dtype: torch.dtype, backward: bool) -> Short:
    """The tile that takes the fewest instructions a sequence without spilling registers (README, "Tiles")."""
    narrow = head_dim <= 64
    if dtype == torch.float32:
        return Short(32, 0, 1, 4 if narrow else 8, 1)
    tiles = {
        16: Short(16, 0, 1, 1, 1),
        32: Short(32, 0, 1, 1 if narrow else 2, 1),
        48: Short(32, 16, 1, 2 if narrow else 4, 1),
        64: Short(64, 0, 1, 4, 1),
        80: Short(64, 16, 1, 4, 1),
        96: Short(128, 0, 1, 8, 1) if backward else Short(64, 32, 1, 4, 1),
        128: Short(128, 0, 1, 8 if backward else 4, 1),
    }
    return next(tile for bound, tile in tiles.items() if num_tokens <= bound)


def default_tiled(head_dim: int, dtype: torch.dtype, backward: bool) -> Tiled:
    """Blocks whose values stay in registers; float32 takes several times the room of the 16-bit types."""
    if dtype == torch.float32:
        return Tiled(16, 16, 4, 1) if head_dim > 64 else Tiled(16, 32, 4, 1)
    if head_dim > 64:
        return Tiled(64, 64, 8, 1) if backward else Tiled(64, 64, 4, 2)
    return Tiled(64, 64, 4, 2 if backward else 3)


def launch_forward(
    qkv: Tensor, num_heads: int, key_mask: Tensor | None = None, config: Short | Tiled | None = None
) -> tuple[Tensor, Tensor]:
    """qkv [B, N, 3W], key_mask bool [B, N] -> O [B, N, W] and lse [B, H, N] float32 (short: empty)."""
    qkv, key_mask, shape = _prepared(qkv, num_heads, key_mask)
    B, N, W, D = shape
    out = torch.empty(B, N, W, dtype=qkv.dtype, device=qkv.device)
    if regime(N, D, qkv.dtype) == "short":
        config = config or _configured("attention_short_forward", default_short(N, D, qkv.dtype, False), N, D, qkv)
        _launch_short(short_forward, config, num_heads, shape, (qkv, key_mask, out), (_scale(D) * LOG2E,))
        return out, torch.empty(0, dtype=torch.float32, device=qkv.device)
    lse = torch.empty(B, num_heads, N, dtype=torch.float32, device=qkv.device)
    config = config or _configured("attention_tiled_forward", default_tiled(D, qkv.dtype, False), N, D, qkv)
    tensors = (qkv, key_mask, out, lse)
    _launch_tiled(tiled_forward, config, config.block_q, num_heads, shape, tensors, (_scale(D) * LOG2E,))
    return out, lse


def launch_backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor | None,
    lse: Tensor,
    num_heads: int,
    key_mask: Tensor | None = None,
    config: Short | Tiled | None = None,
) -> Tensor:
    """dO [B, N, W] and what the forward saved (short: no O) -> d qkv [B, N, 3W]."""
    qkv, key_mask, shape = _prepared(qkv, num_heads, key_mask)
    _, N, _, D = shape
    grad = grad.contiguous()
    d_qkv = torch.empty_like(qkv)
    scales = (_scale(D) * LOG2E, _scale(D))
    if regime(N, D, qkv.dtype) == "short":
        config = config or _configured("attention_short_backward", default_short(N, D, qkv.dtype, True), N, D, qkv)
        _launch_short(short_backward, config, num_heads, shape, (qkv, key_mask, grad, d_qkv), scales)
        return d_qkv
    delta = torch.empty_like(lse)
    config = config or _configured("attention_tiled_backward", default_tiled(D, qkv.dtype, True), N, D, qkv)
    tensors = (qkv, key_mask, out, grad, lse, delta, d_qkv)
    _launch_tiled(tiled_backward_queries, config, config.block_q, num_heads, shape, tensors, scales)
    tensors = (qkv, key_mask, grad, lse, delta, d_qkv)
    _launch_tiled(tiled_backward_keys, config, config.block_k, num_heads, shape, tensors, scales)
    return d_qkv


def _prepared(
    qkv: Tensor, num_heads: int, key_mask: Tensor | None
) -> tuple[Tensor, Tensor | None, tuple[int, int, int, int]]:
    """qkv and mask as the kernels read them, and the sizes B, N, W, D."""
    B, N, _ = qkv.shape
    W = qkv.shape[2] // 3
    return qkv.contiguous(), None if key_mask is None else key_mask.contiguous(), (B, N, W, W // num_heads)


def _configured(kernel: str, default: Short | Tiled, num_tokens: int, head_dim: int, qkv: Tensor) -> Short | Tiled:
    return configuration(kernel, shape_class(num_tokens, head_dim), qkv.dtype, qkv.device, default)


def _launch_short(
    kernel, config: Short, num_heads: int, shape: tuple[int, int, int, int], tensors: tuple, scales: tuple
) -> None:
    B, N, W, D = shape
    packed = (config.rows + config.tail) // N  # sequences in a tile
    programs = -(-B // (packed * config.loops)) * num_heads
    launch(
        kernel, programs, *_with_mask(tensors), N, B * N, num_heads, W, *scales,
        D=D, COLS=_columns(D), ROWS=config.rows, TAIL=config.tail, LOOPS=config.loops, PACKED=packed > 1,
        MASKED=tensors[1] is not None, PRECISION=dot_precision(tensors[0]), STAGES=config.num_stages,
        num_warps=config.num_warps,
    )  # fmt: skip


def _launch_tiled(
    kernel,
    config: Tiled,
    block: int,
    num_heads: int,
    shape: tuple[int, int, int, int],
    tensors: tuple,
    scales: tuple,
) -> None:
    B, N, W, D = shape
    launch(
        kernel, B * num_heads * -(-N // block), *_with_mask(tensors), N, num_heads, W, *scales,
        D=D, COLS=_columns(D), BLOCK_Q=config.block_q, BLOCK_K=config.block_k,
        MASKED=tensors[1] is not None, PRECISION=dot_precision(tensors[0]), STAGES=config.num_stages,
        num_warps=config.num_warps,
    )  # fmt: skip


def _with_mask(tensors: tuple) -> tuple:
    """Where there is no mask any pointer does: MASKED says that it is not read."""
    qkv, key_mask, *rest = tensors
    return (qkv, qkv if key_mask is None else key_mask.view(torch.uint8), *rest)


def _columns(head_dim: int) -> int:
    return 1 << (head_dim - 1).bit_length()


def _scale(head_dim: int) -> float:
    return head_dim**-0.5


# --- custom ops


@torch.library.custom_op(
    "msm_kernels::attention",
    mutates_args=(),
    schema="(Tensor qkv, int num_heads, Tensor? key_mask) -> (Tensor, Tensor)",
)
def _attention(qkv, num_heads, key_mask):
    return launch_forward(qkv, num_heads, key_mask)


@_attention.register_fake
def _(qkv, num_heads, key_mask):
    B, N, W = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    tiled = regime(N, W // num_heads, qkv.dtype) == "tiled"
    return qkv.new_empty(B, N, W), qkv.new_empty((B, num_heads, N) if tiled else (0,), dtype=torch.float32)


@torch.library.custom_op(
    "msm_kernels::attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor qkv, Tensor? out, Tensor lse, int num_heads, Tensor? key_mask) -> Tensor",
)
def _attention_backward(grad, qkv, out, lse, num_heads, key_mask):
    return launch_backward(grad, qkv, out, lse, num_heads, key_mask)


@_attention_backward.register_fake
def _(grad, qkv, out, lse, num_heads, key_mask):
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output) -> None:
    qkv, ctx.num_heads, key_mask = inputs
    out, lse = output
    short = regime(qkv.shape[1], qkv.shape[2] // 3 // ctx.num_heads, qkv.dtype) == "short"
    ctx.save_for_backward(qkv, None if short else out, lse, key_mask)


def _differentiate(ctx, grad, _):
    qkv, out, lse, key_mask = ctx.saved_tensors
    return _attention_backward(grad, qkv, out, lse, ctx.num_heads, key_mask), None, None


_attention.register_autograd(_differentiate, setup_context=_save)


# --- the public function


def attention(qkv: Tensor, num_heads: int, key_mask: Tensor | None = None, backend: Backend = "auto") -> Tensor:
    """softmax(q k^T / sqrt(D)) v per head, the softmax in float32 or better.

    qkv [B, N, 3 * H * D] as the projection wrote it (all queries, all keys, all values; heads contiguous
    within each) -> [B, N, H * D] in the dtype of `qkv`. `key_mask` bool [B, N]: False keys, finite ones, have
    no influence; a clip without any key gives zeros. The kernels take D in HEAD_DIMS and N up to LONGEST; past
    either, "auto" takes torch's scaled_dot_product_attention and says so once, as does "triton" for longer N.
    """
    if qkv.ndim != 3 or num_heads < 1 or qkv.shape[2] % (3 * num_heads) or not qkv.shape[2]:
        raise ValueError(f"qkv is {list(qkv.shape)}: must be [B, N, 3 * heads * width] for num_heads = {num_heads}")
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != qkv.shape[:2]):
        raise ValueError(
            f"key_mask is {key_mask.dtype} {list(key_mask.shape)}: must be torch.bool {list(qkv.shape[:2])}"
        )
    if resolve(backend, qkv.device, qkv.dtype) == "reference":
        return reference.attention(qkv, num_heads, key_mask)
    head_dim = qkv.shape[2] // 3 // num_heads
    if backend == "triton" and head_dim not in HEAD_DIMS:
        raise BackendUnavailable(
            f"backend = 'triton': heads are {head_dim} wide, the kernels take {HEAD_DIMS}; use 'auto' or 'reference'"
        )
    if regime(qkv.shape[1], head_dim, qkv.dtype) == "sdpa":
        return _sdpa(qkv, num_heads, key_mask)
    return _attention(qkv, num_heads, key_mask)[0]


def _sdpa(qkv: Tensor, num_heads: int, key_mask: Tensor | None) -> Tensor:
    """torch's attention on views of qkv; a clip without any key gives zeros here too."""
    B, N, _ = qkv.shape
    if not torch.compiler.is_compiling():
        _say_sdpa(N > LONGEST, qkv.shape[2] // 3 // num_heads)
    q, k, v = qkv.view(B, N, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    if key_mask is None:
        out = scaled_dot_product_attention(q, k, v)
    else:
        some = key_mask.any(dim=1)[:, None]
        # A clip without keys attends to all of them, then counts for nothing: no NaN on the way.
        out = scaled_dot_product_attention(q, k, v, attn_mask=(key_mask | ~some)[:, None, None, :])
        out = out * some[:, None, :, None]
    return out.transpose(1, 2).reshape(B, N, -1)


@cache
def _say_sdpa(too_long: bool, head_dim: int) -> None:
    reason = f"sequences longer than {LONGEST} tokens" if too_long else f"heads {head_dim} wide"
    log.warning("attention: %s go to torch's scaled_dot_product_attention", reason)
