"""Moving tokens between the visible patches and all places, in one pass each.

order = ids_restore[b, l] of patch l:
    restore   token[b, P + l] = (visible[b, P + order] if order < K else mask token) + position[P + l]. Backward:
              a visible row moves back to P + order, a masked one is added to d mask token, in chunks
              (chunked_sums.py): each is read once.
    select    row[b, j] = token[b, P + ids_masked[b, j]]. Backward: d token[b, P + l] = d row[b, order - K], or 0.
Rows are counted in 32 bits, elements in 64. The launchers trust their arguments; `patch_masking` checks them.

Legend: B clips, L patches, K of them visible, M = L - K masked, P prefix tokens (1 with CLS, 0 without), D width,
N = P + L tokens. d_ gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .backend import jit, launch, tl
from .blocks import blocks_of, power_of_two
from .chunked_sums import chunks_of, launch_sum_chunks
from .configurations import configuration

RESTORE_CHUNKS = 256
"""Partial sums of the mask token, at most."""


@jit(do_not_specialize=["num_clips"])
def restore_forward_kernel(
    tokens,  # [B, P + K, D]
    ids_restore,  # [B, L]
    mask_token,  # [D]
    positions,  # [N, D]
    restored,  # [B, N, D]
    num_clips,
    N: tl.constexpr,
    K: tl.constexpr,
    PREFIX: tl.constexpr,
    D: tl.constexpr,
    CLIPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One place in the sequence of several clips, so that its position is read once."""
    D_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    d = tl.program_id(0) % D_BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)
    place = tl.program_id(0) // D_BLOCKS % N
    clip = (tl.program_id(0) // (D_BLOCKS * N) * CLIPS + tl.arange(0, CLIPS)).to(tl.int64)
    inside = clip < num_clips
    # Prefix tokens have negative patch numbers; they and the visible patches lie in `tokens` in the order of place.
    patch = tl.zeros([CLIPS], tl.int32) + place - PREFIX
    order = tl.load(ids_restore + clip * (N - PREFIX) + patch, mask=inside & (patch >= 0), other=patch)
    visible = order < K
    mask = inside[:, None] & (d < D)[None, :]
    source = tokens + (clip * (PREFIX + K) + PREFIX + order)[:, None] * D + d[None, :]
    row = tl.load(source, mask=mask & visible[:, None], other=0.0)
    hidden = tl.load(mask_token + d, mask=d < D, other=0.0).to(row.dtype)
    position = tl.load(positions + place * D + d, mask=d < D, other=0.0).to(tl.float32)
    row = tl.where(visible[:, None], row, hidden[None, :]).to(tl.float32) + position[None, :]
    tl.store(restored + (clip * N + place)[:, None] * D + d[None, :], row.to(tokens.dtype.element_ty), mask=mask)


@jit(do_not_specialize=["num_rows", "chunk_rows"])
def restore_backward_kernel(
    d_restored,  # [B * N, D]
    ids_restore,  # [B, L]
    d_tokens,  # [B, P + K, D]
    d_mask_token,  # partial sums [chunks, D]
    num_rows,  # B * N
    chunk_rows,
    N: tl.constexpr,
    K: tl.constexpr,
    PREFIX: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One chunk of rows: the visible ones move to their places, the masked ones are summed."""
    D_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    chunk = tl.program_id(0) // D_BLOCKS
    d = tl.program_id(0) % D_BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)
    end = tl.minimum((chunk + 1) * chunk_rows, num_rows)
    hidden_sum = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for start in range(chunk * chunk_rows, end, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = row < end
        clip = (row // N).to(tl.int64)
        patch = row % N - PREFIX
        order = tl.load(ids_restore + clip * (N - PREFIX) + patch, mask=inside & (patch >= 0), other=patch)
        visible = order < K
        mask = inside[:, None] & (d < D)[None, :]
        grad = tl.load(d_restored + row.to(tl.int64)[:, None] * D + d[None, :], mask=mask, other=0.0)
        target = d_tokens + (clip * (PREFIX + K) + PREFIX + order)[:, None] * D + d[None, :]
        tl.store(target, grad, mask=mask & visible[:, None])
        hidden_sum += tl.where(visible[:, None], 0.0, grad.to(tl.float32))
    tl.store(d_mask_token + chunk * D + d, tl.sum(hidden_sum, 0), mask=d < D)


@jit(do_not_specialize=["num_rows"])
def select_forward_kernel(
    tokens,  # [B, N, D]
    ids_masked,  # [B * M]
    selected,  # [B * M, D]
    num_rows,  # B * M
    N: tl.constexpr,
    M: tl.constexpr,
    PREFIX: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    D_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    d = tl.program_id(0) % D_BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.program_id(0) // D_BLOCKS * ROWS + tl.arange(0, ROWS)
    place = PREFIX + tl.load(ids_masked + row, mask=row < num_rows, other=0)
    mask = (row < num_rows)[:, None] & (d < D)[None, :]
    values = tl.load(tokens + ((row // M).to(tl.int64) * N + place)[:, None] * D + d[None, :], mask=mask)
    tl.store(selected + row.to(tl.int64)[:, None] * D + d[None, :], values, mask=mask)


@jit(do_not_specialize=["num_rows"])
def select_backward_kernel(
    d_selected,  # [B, M, D]
    ids_restore,  # [B, L]
    d_tokens,  # [B * N, D]
    num_rows,  # B * N
    N: tl.constexpr,
    M: tl.constexpr,
    PREFIX: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Every row of d_tokens once: zeros for prefix tokens and visible patches."""
    D_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    K: tl.constexpr = N - PREFIX - M
    d = tl.program_id(0) % D_BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.program_id(0) // D_BLOCKS * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    clip = (row // N).to(tl.int64)
    patch = row % N - PREFIX
    order = tl.load(ids_restore + clip * (N - PREFIX) + patch, mask=inside & (patch >= 0), other=-1)
    mask = inside[:, None] & (d < D)[None, :]
    source = d_selected + (clip * M + order - K)[:, None] * D + d[None, :]
    grad = tl.load(source, mask=mask & (order >= K)[:, None], other=0.0)
    tl.store(d_tokens + row.to(tl.int64)[:, None] * D + d[None, :], grad, mask=mask)


class RowsConfig(NamedTuple):
    """Launch parameters of the kernels that move rows: a tile of `rows` x `block_d`."""

    rows: int
    block_d: int
    num_warps: int


def default_rows(width: int, dtype: torch.dtype) -> RowsConfig:
    """64 bytes a thread in accesses of 16; columns in blocks that leave no thread idle where the width allows."""
    block_d = min(128, width & -width if width % 32 == 0 else power_of_two(width))
    return RowsConfig(8192 // dtype.itemsize // block_d, block_d, 4)


def launch_restore_forward(
    tokens: Tensor,
    ids_restore: Tensor,
    mask_token: Tensor,
    positions: Tensor,
    num_prefix: int,
    config: RowsConfig | None = None,
) -> Tensor:
    """Tokens [B, N, D] of all places."""
    config = config or _configured_rows("restore_forward", tokens)
    (batch, rows, width), (num_tokens, _) = tokens.shape, positions.shape
    restored = torch.empty(batch, num_tokens, width, dtype=tokens.dtype, device=tokens.device)
    clips = min(config.rows, power_of_two(batch))
    tensors = (tokens, ids_restore, mask_token, positions)
    launch(
        restore_forward_kernel, blocks_of(batch, clips) * num_tokens * blocks_of(width, config.block_d),
        *(t.contiguous() for t in tensors), restored, batch,
        N=num_tokens, K=rows - num_prefix, PREFIX=num_prefix, D=width, CLIPS=clips, BLOCK_D=config.block_d,
        num_warps=config.num_warps,
    )  # fmt: skip
    return restored


def launch_restore_backward(
    d_restored: Tensor,
    ids_restore: Tensor,
    num_keep: int,
    num_prefix: int,
    mask_dtype: torch.dtype,
    config: RowsConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """d tokens [B, P + K, D] and d mask_token [D]."""
    config = config or _configured_rows("restore_backward", d_restored)
    batch, num_tokens, width = d_restored.shape
    chunks, chunk_rows = chunks_of(batch * num_tokens, RESTORE_CHUNKS)
    d_tokens = torch.empty(batch, num_prefix + num_keep, width, dtype=d_restored.dtype, device=d_restored.device)
    d_mask_token = torch.empty(chunks, width, dtype=torch.float32, device=d_restored.device)
    launch(
        restore_backward_kernel, chunks * blocks_of(width, config.block_d),
        d_restored.contiguous(), ids_restore.contiguous(), d_tokens, d_mask_token, batch * num_tokens, chunk_rows,
        N=num_tokens, K=num_keep, PREFIX=num_prefix, D=width, ROWS=config.rows, BLOCK_D=config.block_d,
        num_warps=config.num_warps,
    )  # fmt: skip
    return d_tokens, launch_sum_chunks(d_mask_token, mask_dtype)


def launch_select_forward(
    tokens: Tensor, ids_masked: Tensor, num_prefix: int, config: RowsConfig | None = None
) -> Tensor:
    """The rows [B, M, D] of the masked patches."""
    config = config or _configured_rows("select_forward", tokens)
    (batch, num_masked), (_, num_tokens, width) = ids_masked.shape, tokens.shape
    selected = torch.empty(batch, num_masked, width, dtype=tokens.dtype, device=tokens.device)
    launch(
        select_forward_kernel, blocks_of(batch * num_masked, config.rows) * blocks_of(width, config.block_d),
        tokens.contiguous(), ids_masked.contiguous(), selected, batch * num_masked,
        N=num_tokens, M=num_masked, PREFIX=num_prefix, D=width, ROWS=config.rows, BLOCK_D=config.block_d,
        num_warps=config.num_warps,
    )  # fmt: skip
    return selected


def launch_select_backward(
    d_selected: Tensor, ids_restore: Tensor, num_prefix: int, config: RowsConfig | None = None
) -> Tensor:
    """d tokens [B, P + L, D]."""
    config = config or _configured_rows("select_backward", d_selected)
    batch, num_masked, width = d_selected.shape
    num_tokens = num_prefix + ids_restore.shape[1]
    d_tokens = torch.empty(batch, num_tokens, width, dtype=d_selected.dtype, device=d_selected.device)
    launch(
        select_backward_kernel, blocks_of(batch * num_tokens, config.rows) * blocks_of(width, config.block_d),
        d_selected.contiguous(), ids_restore.contiguous(), d_tokens, batch * num_tokens,
        N=num_tokens, M=num_masked, PREFIX=num_prefix, D=width, ROWS=config.rows, BLOCK_D=config.block_d,
        num_warps=config.num_warps,
    )  # fmt: skip
    return d_tokens


def rows_class(width: int) -> str:
    """The shape class of the kernels that move rows."""
    return f"width{width}"


def _configured_rows(kernel: str, tensor: Tensor) -> RowsConfig:
    width = tensor.shape[-1]
    return configuration(kernel, rows_class(width), tensor.dtype, tensor.device, default_rows(width, tensor.dtype))


@torch.library.custom_op("msm_kernels::restore_tokens", mutates_args=())
def restore_op(tokens: Tensor, ids_restore: Tensor, mask_token: Tensor, positions: Tensor, num_prefix: int) -> Tensor:
    return launch_restore_forward(tokens, ids_restore, mask_token, positions, num_prefix)


@restore_op.register_fake
def _(tokens, ids_restore, mask_token, positions, num_prefix):
    return tokens.new_empty(tokens.shape[0], *positions.shape)


@torch.library.custom_op("msm_kernels::restore_tokens_backward", mutates_args=())
def _restore_backward_op(
    d_restored: Tensor, ids_restore: Tensor, num_keep: int, num_prefix: int, mask_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return launch_restore_backward(d_restored, ids_restore, num_keep, num_prefix, mask_dtype)


@_restore_backward_op.register_fake
def _(d_restored, ids_restore, num_keep, num_prefix, mask_dtype):
    batch, _, width = d_restored.shape
    return d_restored.new_empty(batch, num_prefix + num_keep, width), d_restored.new_empty(width, dtype=mask_dtype)


def _save_restore(ctx, inputs, output) -> None:
    tokens, ids_restore, mask_token, positions, ctx.num_prefix = inputs
    ctx.num_keep = tokens.shape[1] - ctx.num_prefix
    ctx.dtypes = mask_token.dtype, positions.dtype
    ctx.save_for_backward(ids_restore)


def _differentiate_restore(ctx, d_restored):
    needs_tokens, _, needs_mask, needs_positions, _ = ctx.needs_input_grad
    mask_dtype, positions_dtype = ctx.dtypes
    d_tokens = d_mask_token = d_positions = None
    if needs_tokens or needs_mask:
        d_tokens, d_mask_token = _restore_backward_op(
            d_restored, *ctx.saved_tensors, ctx.num_keep, ctx.num_prefix, mask_dtype
        )
        d_mask_token = d_mask_token.view(1, 1, -1)
    if needs_positions:
        d_positions = d_restored.sum(0, dtype=torch.float32).to(positions_dtype)
    return d_tokens, None, d_mask_token, d_positions, None


restore_op.register_autograd(_differentiate_restore, setup_context=_save_restore)


@torch.library.custom_op("msm_kernels::select_masked_tokens", mutates_args=())
def select_op(tokens: Tensor, ids_masked: Tensor, ids_restore: Tensor, num_prefix: int) -> Tensor:
    return launch_select_forward(tokens, ids_masked, num_prefix)


@select_op.register_fake
def _(tokens, ids_masked, ids_restore, num_prefix):
    return tokens.new_empty(*ids_masked.shape, tokens.shape[2])


@torch.library.custom_op("msm_kernels::select_masked_tokens_backward", mutates_args=())
def _select_backward_op(d_selected: Tensor, ids_restore: Tensor, num_prefix: int) -> Tensor:
    return launch_select_backward(d_selected, ids_restore, num_prefix)


@_select_backward_op.register_fake
def _(d_selected, ids_restore, num_prefix):
    batch, _, width = d_selected.shape
    return d_selected.new_empty(batch, num_prefix + ids_restore.shape[1], width)


def _save_select(ctx, inputs, output) -> None:
    _, _, ids_restore, ctx.num_prefix = inputs
    ctx.save_for_backward(ids_restore)


def _differentiate_select(ctx, d_selected):
    return _select_backward_op(d_selected, *ctx.saved_tensors, ctx.num_prefix), None, None, None


select_op.register_autograd(_differentiate_select, setup_context=_save_select)
