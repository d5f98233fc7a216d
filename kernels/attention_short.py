"""Attention of short sequences: one program holds all scores of a head, of one sequence or of several.

Several are rows that follow each other in memory; a query then sees the keys of its own sequence only. A tile has
ROWS rows, or ROWS and a TAIL more (66 tokens are 64 + 16, not 128). From qkv alone, with S = Q K^T / sqrt(D):

    forward    P = softmax(S),  O = P V
    backward   dV = P^T dO,  dP = dO V^T,  delta_i = sum_j P_ij dP_ij,  dS = P * (dP - delta),
               dQ = dS K / sqrt(D),  dK = dS^T Q / sqrt(D)

The backward recomputes P, needs neither O nor row sums, and writes dQ, dK and dV in one pass. Scores are kept in
base 2, S * log2(e). The launchers trust their arguments; `attention.attention` checks them.

Legend: B clips, N tokens, H heads, D width of a head, W = H * D; COLS is D rounded up to a power of two. q, k, v tiles
of queries, keys, values; x_t the tail of x; d_x its gradient; scale is log2(e) / sqrt(D), natural 1 / sqrt(D).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .attention_rows import LOG2E, load_rows, sizes, store_rows, valid_keys, with_mask
from .backend import dot_precision, jit, launch, tl
from .blocks import blocks_of, power_of_two
from .configurations import configuration


class Short(NamedTuple):
    """Launch parameters: a tile of `rows` + `tail` rows holds as many sequences as fit, and one program works
    through `loops` tiles."""

    rows: int
    tail: int
    loops: int
    num_warps: int
    num_stages: int


@jit
def _allowed(query_rows, key_rows, key_valid, num_tokens, PACKED: tl.constexpr):
    """Which keys each query of a tile sees: valid ones, of its own sequence where several share the tile."""
    if PACKED:
        allowed = key_valid[None, :] & ((query_rows // num_tokens)[:, None] == (key_rows // num_tokens)[None, :])
    else:
        allowed = key_valid[None, :] & (query_rows >= 0)[:, None]  # the second is true: it gives the shape
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
        q = load_rows(source, rows, columns, valid, 3 * width, D)
        k = load_rows(source + width, rows, columns, valid, 3 * width, D)
        v = load_rows(source + 2 * width, rows, columns, valid, 3 * width, D)
        keys = valid_keys(key_mask, first, rows, valid, MASKED)
        allowed = _allowed(rows, rows, keys, num_tokens, PACKED)
        if TAIL:
            rows_t = ROWS + tl.arange(0, TAIL)
            valid_t = rows_t < left
            q_t = load_rows(source, rows_t, columns, valid_t, 3 * width, D)
            k_t = load_rows(source + width, rows_t, columns, valid_t, 3 * width, D)
            v_t = load_rows(source + 2 * width, rows_t, columns, valid_t, 3 * width, D)
            keys_t = valid_keys(key_mask, first, rows_t, valid_t, MASKED)
            allowed_t = _allowed(rows, rows_t, keys_t, num_tokens, PACKED)
            o = _attend(q, k, v, k_t, v_t, allowed, allowed_t, scale, TAIL, PRECISION)
            allowed = _allowed(rows_t, rows, keys, num_tokens, PACKED)
            allowed_t = _allowed(rows_t, rows_t, keys_t, num_tokens, PACKED)
            o_t = _attend(q_t, k, v, k_t, v_t, allowed, allowed_t, scale, TAIL, PRECISION)
            store_rows(target, rows_t, columns, valid_t, width, o_t, D)
        else:
            o = _attend(q, k, v, k, v, allowed, allowed, scale, TAIL, PRECISION)
        store_rows(target, rows, columns, valid, width, o, D)


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
        q = load_rows(source, rows, columns, valid, 3 * width, D)
        k = load_rows(source + width, rows, columns, valid, 3 * width, D)
        v = load_rows(source + 2 * width, rows, columns, valid, 3 * width, D)
        d_o = load_rows(incoming, rows, columns, valid, width, D)
        keys = valid_keys(key_mask, first, rows, valid, MASKED)
        allowed = _allowed(rows, rows, keys, num_tokens, PACKED)
        if TAIL:
            rows_t = ROWS + tl.arange(0, TAIL)
            valid_t = rows_t < left
            q_t = load_rows(source, rows_t, columns, valid_t, 3 * width, D)
            k_t = load_rows(source + width, rows_t, columns, valid_t, 3 * width, D)
            v_t = load_rows(source + 2 * width, rows_t, columns, valid_t, 3 * width, D)
            d_o_t = load_rows(incoming, rows_t, columns, valid_t, width, D)
            keys_t = valid_keys(key_mask, first, rows_t, valid_t, MASKED)
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
            store_rows(target, rows, columns, valid, 3 * width, d_q, D)
            d_q = tl.dot(f_t, k_t, tl.dot(f, k, input_precision=PRECISION), input_precision=PRECISION)
            store_rows(target, rows_t, columns, valid_t, 3 * width, d_q, D)
            d_k = _transposed_products(d_s, q, f, q_t, PRECISION)
            store_rows(target + width, rows, columns, valid, 3 * width, d_k, D)
            d_k = _transposed_products(d_s_t, q, f_t, q_t, PRECISION)
            store_rows(target + width, rows_t, columns, valid_t, 3 * width, d_k, D)
            d_v = _transposed_products(p, d_o, e, d_o_t, PRECISION)
            store_rows(target + 2 * width, rows, columns, valid, 3 * width, d_v, D)
            d_v = _transposed_products(p_t, d_o, e_t, d_o_t, PRECISION)
            store_rows(target + 2 * width, rows_t, columns, valid_t, 3 * width, d_v, D)
        else:
            p, p_t, d_s, d_s_t = _score_gradients(q, d_o, k, v, k, v, allowed, allowed, scale, natural, TAIL, PRECISION)
            d_q = tl.dot(d_s, k, input_precision=PRECISION)
            store_rows(target, rows, columns, valid, 3 * width, d_q, D)
            d_k = tl.dot(tl.trans(d_s), q, input_precision=PRECISION)
            store_rows(target + width, rows, columns, valid, 3 * width, d_k, D)
            d_v = tl.dot(tl.trans(p), d_o, input_precision=PRECISION)
            store_rows(target + 2 * width, rows, columns, valid, 3 * width, d_v, D)


def default(num_tokens: int, head_dim: int, dtype: torch.dtype, backward: bool) -> Short:
    """Tiles that take few instructions a sequence and leave room for several programs beside each other (README,
    "Tiles"); chosen for sm_90. What they spill is bounded in tests/test_aot.py."""
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


def launch_forward(
    qkv: Tensor, num_heads: int, key_mask: Tensor | None, shape_class: str, config: Short | None
) -> Tensor:
    """qkv [B, N, 3W] contiguous, key_mask bool [B, N] -> O [B, N, W]."""
    B, N, W, D = sizes(qkv, num_heads)
    out = torch.empty(B, N, W, dtype=qkv.dtype, device=qkv.device)
    if config is None:
        default_config = default(N, D, qkv.dtype, backward=False)
        config = configuration("attention_short_forward", shape_class, qkv.dtype, qkv.device, default_config)
    _launch(short_forward, config, num_heads, (qkv, key_mask, out), (D**-0.5 * LOG2E,))
    return out


def launch_backward(
    grad: Tensor, qkv: Tensor, num_heads: int, key_mask: Tensor | None, shape_class: str, config: Short | None
) -> Tensor:
    """dO [B, N, W], qkv [B, N, 3W], contiguous both -> d qkv [B, N, 3W]."""
    _, N, _, D = sizes(qkv, num_heads)
    d_qkv = torch.empty_like(qkv)
    if config is None:
        default_config = default(N, D, qkv.dtype, backward=True)
        config = configuration("attention_short_backward", shape_class, qkv.dtype, qkv.device, default_config)
    _launch(short_backward, config, num_heads, (qkv, key_mask, grad, d_qkv), (D**-0.5 * LOG2E, D**-0.5))
    return d_qkv


def _launch(kernel, config: Short, num_heads: int, tensors: tuple, scales: tuple) -> None:
    qkv, key_mask = tensors[:2]
    B, N, W, D = sizes(qkv, num_heads)
    packed = (config.rows + config.tail) // N  # sequences in a tile
    programs = blocks_of(B, packed * config.loops) * num_heads
    launch(
        kernel, programs, *with_mask(tensors), N, B * N, num_heads, W, *scales,
        D=D, COLS=power_of_two(D), ROWS=config.rows, TAIL=config.tail, LOOPS=config.loops, PACKED=packed > 1,
        MASKED=key_mask is not None, PRECISION=dot_precision(qkv), STAGES=config.num_stages,
        num_warps=config.num_warps,
    )  # fmt: skip
