"""Embedding the visible patches: token[b, i] = W x + bias + position[ids_keep[b, i]].

x are the ph * pw pixels of that patch, row-major (f, t), read from the spectrogram where they lie. Backward:
d W = sum d token x^T, d bias = sum d token, over rows in chunks (chunked_sums.py). Rows and patches are counted in 32
bits, elements in 64. The launchers trust their arguments; `patch_masking.embed_visible_patches` checks them.

Legend: B clips, F mel bands, T frames, ph x pw a patch (bands x frames) on a grid of Fg x Tg, L = Fg * Tg patches
(frequency-major: index f * Tg + t), K of them visible, D width. d_ gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .backend import dot_precision, jit, launch, tl
from .blocks import blocks_of, power_of_two
from .chunked_sums import chunks_of, launch_sum_chunks
from .configurations import configuration
from .reference import unpatchify

EMBED_SCRATCH = 6 << 20
"""Numbers in the partial sums of the embedding's weight together, at most; 32 sums of the base model's."""
MANY_PROGRAMS = 256
"""Programs of the embedding, at least: fewer blocks of rows are split along the width, and read their patches again."""


@jit
def load_pixels(
    spectrogram,
    patch,  # [ROWS] index in the clip
    clip,  # [ROWS]
    pixel,  # [COLUMNS]
    inside,  # [ROWS]
    num_patches,
    grid_frames,
    PH: tl.constexpr,
    PW: tl.constexpr,
):
    """Pixels [ROWS, COLUMNS] of some patches, zeros outside."""
    frames = grid_frames * PW
    corner = (patch // grid_frames) * (PH * frames) + (patch % grid_frames) * PW
    corner += clip.to(tl.int64) * (num_patches * (PH * PW))
    offset = pixel // PW * frames + pixel % PW
    valid = pixel < PH * PW
    if PW < 4:
        # Few pixels of such a patch lie side by side, but the next visible patch is near: threads go along the
        # rows of a transposed tile, which they do where the compiler knows of no contiguity.
        source = tl.max_contiguous(spectrogram + corner[None, :] + offset[:, None], [1, 1])
        pixels = tl.trans(tl.load(source, mask=valid[:, None] & inside[None, :], other=0.0))
    else:
        source = spectrogram + corner[:, None] + offset[None, :]
        pixels = tl.load(source, mask=inside[:, None] & valid[None, :], other=0.0)
    return pixels


@jit
def load_weight(weight, pixel, d, D: tl.constexpr, PIXELS: tl.constexpr):
    """A block of weight^T [pixels, columns], zeros outside."""
    mask = (pixel < PIXELS)[:, None] & (d < D)[None, :]
    return tl.load(weight + d[None, :] * PIXELS + pixel[:, None], mask=mask, other=0.0)


@jit(do_not_specialize=["num_rows", "num_keep", "num_patches", "grid_frames"])
def embed_forward_kernel(
    spectrogram,  # [B, F, T]
    ids_keep,  # [B * K]
    weight,  # [D, ph * pw]
    bias,  # [D]
    positions,  # [L, D]
    tokens,  # [B * K, D]
    num_rows,  # B * K
    num_keep,
    num_patches,
    grid_frames,  # Tg
    D: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_ROWS tokens, BLOCKS * BLOCK_D columns of them.

    A patch of up to BLOCK_PIXELS + TAIL pixels is read once and held, a larger one again for each block of columns.
    """
    PIXELS: tl.constexpr = PH * PW
    HELD: tl.constexpr = BLOCK_PIXELS + TAIL >= PIXELS
    PARTS: tl.constexpr = (D + BLOCKS * BLOCK_D - 1) // (BLOCKS * BLOCK_D)
    row = tl.program_id(0) // PARTS * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < num_rows
    patch = tl.load(ids_keep + row, mask=inside, other=0).to(tl.int32)
    clip = row // num_keep
    dtype = weight.dtype.element_ty
    pixel = tl.arange(0, BLOCK_PIXELS)
    if HELD:
        x = load_pixels(spectrogram, patch, clip, pixel, inside, num_patches, grid_frames, PH, PW).to(dtype)
        if TAIL:
            last = BLOCK_PIXELS + tl.arange(0, TAIL)
            y = load_pixels(spectrogram, patch, clip, last, inside, num_patches, grid_frames, PH, PW).to(dtype)
    for block in range(BLOCKS):
        d = (tl.program_id(0) % PARTS * BLOCKS + block) * BLOCK_D + tl.arange(0, BLOCK_D)
        mask = inside[:, None] & (d < D)[None, :]
        # Asked for before the products, added after them.
        position = tl.load(positions + patch[:, None] * D + d[None, :], mask=mask, other=0.0)
        offset = tl.load(bias + d, mask=d < D, other=0.0)
        token = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
        if HELD:
            token = tl.dot(x, load_weight(weight, pixel, d, D, PIXELS), token, input_precision=PRECISION)
            if TAIL:
                token = tl.dot(y, load_weight(weight, last, d, D, PIXELS), token, input_precision=PRECISION)
        else:
            for start in range(0, PIXELS, BLOCK_PIXELS):
                part = start + pixel
                z = load_pixels(spectrogram, patch, clip, part, inside, num_patches, grid_frames, PH, PW).to(dtype)
                token = tl.dot(z, load_weight(weight, part, d, D, PIXELS), token, input_precision=PRECISION)
        token += offset.to(tl.float32)[None, :]
        token += position.to(tl.float32)
        tl.store(tokens + row.to(tl.int64)[:, None] * D + d[None, :], token.to(dtype), mask=mask)


@jit(do_not_specialize=["num_rows", "chunk_rows", "num_keep", "num_patches", "grid_frames"])
def embed_backward_kernel(
    d_tokens,  # [B * K, D]
    spectrogram,
    ids_keep,
    d_weight,  # partial sums [chunks, D, ph * pw]
    d_bias,  # partial sums [chunks, D]
    num_rows,
    chunk_rows,
    num_keep,
    num_patches,
    grid_frames,
    D: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of the weight's gradient, summed over one chunk of rows."""
    PIXELS: tl.constexpr = PH * PW
    PIXEL_BLOCKS: tl.constexpr = (PIXELS + BLOCK_PIXELS - 1) // BLOCK_PIXELS
    D_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    chunk = tl.program_id(0) // (D_BLOCKS * PIXEL_BLOCKS)
    d = tl.program_id(0) // PIXEL_BLOCKS % D_BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)
    pixel = tl.program_id(0) % PIXEL_BLOCKS * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    end = tl.minimum((chunk + 1) * chunk_rows, num_rows)
    weight_sum = tl.zeros([BLOCK_D, BLOCK_PIXELS], tl.float32)
    bias_sum = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    for start in range(chunk * chunk_rows, end, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        inside = row < end
        patch = tl.load(ids_keep + row, mask=inside, other=0).to(tl.int32)
        mask = inside[:, None] & (d < D)[None, :]
        grad = tl.load(d_tokens + row.to(tl.int64)[:, None] * D + d[None, :], mask=mask, other=0.0)
        x = load_pixels(spectrogram, patch, row // num_keep, pixel, inside, num_patches, grid_frames, PH, PW)
        weight_sum = tl.dot(tl.trans(grad), x.to(grad.dtype), weight_sum, input_precision=PRECISION)
        bias_sum += grad.to(tl.float32)
    places = chunk.to(tl.int64) * (D * PIXELS) + d[:, None] * PIXELS + pixel[None, :]
    tl.store(d_weight + places, weight_sum, mask=(d < D)[:, None] & (pixel < PIXELS)[None, :])
    if tl.program_id(0) % PIXEL_BLOCKS == 0:  # the others of these columns have the same sum
        tl.store(d_bias + chunk * D + d, tl.sum(bias_sum, 0), mask=d < D)


class EmbedConfig(NamedTuple):
    """Launch parameters of the embedding: the tile of each program, or the step along rows of its backward."""

    block_rows: int
    block_d: int
    block_pixels: int
    num_warps: int
    num_stages: int


def default_embed_forward(patch_size: tuple[int, int], dtype: torch.dtype) -> EmbedConfig:
    """Whole patches, up to 512 pixels, in 16 bits; short steps in float32, whose products take registers."""
    pixels = patch_size[0] * patch_size[1]
    if dtype == torch.float32:
        return EmbedConfig(64, 32, min(32, _block_pixels(pixels)), 4, 2)
    most = min(256, max(16, power_of_two(pixels + 1) // 2))  # the rest is the tail
    return EmbedConfig(64, 64 if pixels <= 256 else 32, most, 4, 2)


def default_embed_backward(patch_size: tuple[int, int], dtype: torch.dtype) -> EmbedConfig:
    """A tile of the weight as large as the registers hold; pixels read one by one take many for their addresses."""
    block_pixels = _block_pixels(patch_size[0] * patch_size[1])
    if dtype == torch.float32:
        return EmbedConfig(16, 64, min(64, block_pixels), 4, 2)
    return EmbedConfig(64 if patch_size[1] >= 4 else 32, 128, min(128, block_pixels), 8, 3)


def launch_embed_forward(
    spectrogram: Tensor,
    ids_keep: Tensor,
    weight: Tensor,
    bias: Tensor,
    positions: Tensor,
    patch_size: tuple[int, int],
    config: EmbedConfig | None = None,
) -> Tensor:
    """Tokens [B, K, D] in the dtype of `weight`."""
    default = default_embed_forward(patch_size, weight.dtype)
    config = config or configuration("embed_forward", embed_class(patch_size), weight.dtype, weight.device, default)
    (batch, num_keep), width = ids_keep.shape, weight.shape[0]
    tokens = torch.empty(batch, num_keep, width, dtype=weight.dtype, device=weight.device)
    tensors = (spectrogram, ids_keep, weight, bias, positions)
    row_blocks, d_blocks = blocks_of(batch * num_keep, config.block_rows), blocks_of(width, config.block_d)
    # Two blocks of columns at least: a loop of one would have no loads in flight during its products.
    blocks = min(d_blocks, max(2, blocks_of(d_blocks, blocks_of(MANY_PROGRAMS, max(1, row_blocks)))))
    rest = patch_size[0] * patch_size[1] - config.block_pixels
    tail = _block_pixels(rest) if 0 < rest <= config.block_pixels else 0
    launch(
        embed_forward_kernel, row_blocks * blocks_of(d_blocks, blocks), *(t.contiguous() for t in tensors), tokens,
        batch * num_keep, num_keep, *_grid(spectrogram, patch_size),
        D=width, PH=patch_size[0], PW=patch_size[1], BLOCK_ROWS=config.block_rows, BLOCK_D=config.block_d,
        BLOCK_PIXELS=config.block_pixels, TAIL=tail, BLOCKS=blocks, PRECISION=dot_precision(weight),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return tokens


def launch_embed_backward(
    d_tokens: Tensor,
    spectrogram: Tensor,
    ids_keep: Tensor,
    patch_size: tuple[int, int],
    bias_dtype: torch.dtype,
    config: EmbedConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """d weight [D, ph * pw] in the dtype of `d_tokens`, d bias [D]."""
    pixels = patch_size[0] * patch_size[1]
    default = default_embed_backward(patch_size, d_tokens.dtype)
    config = config or configuration(
        "embed_backward", embed_class(patch_size), d_tokens.dtype, d_tokens.device, default
    )
    batch, num_keep, width = d_tokens.shape
    chunks, chunk_rows = chunks_of(batch * num_keep, max(1, EMBED_SCRATCH // (width * pixels)))
    d_weight = torch.empty(chunks, width, pixels, dtype=torch.float32, device=d_tokens.device)
    d_bias = torch.empty(chunks, width, dtype=torch.float32, device=d_tokens.device)
    launch(
        embed_backward_kernel, chunks * blocks_of(width, config.block_d) * blocks_of(pixels, config.block_pixels),
        d_tokens.contiguous(), spectrogram.contiguous(), ids_keep.contiguous(), d_weight, d_bias,
        batch * num_keep, chunk_rows, num_keep, *_grid(spectrogram, patch_size),
        D=width, PH=patch_size[0], PW=patch_size[1],
        BLOCK_ROWS=config.block_rows, BLOCK_D=config.block_d, BLOCK_PIXELS=config.block_pixels,
        PRECISION=dot_precision(d_tokens), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return launch_sum_chunks(d_weight, d_tokens.dtype), launch_sum_chunks(d_bias, bias_dtype)


def embed_class(patch_size: tuple[int, int]) -> str:
    """The shape class of the embedding in the table of configurations."""
    return "{}x{}".format(*patch_size)


def _grid(spectrogram: Tensor, patch_size: tuple[int, int]) -> tuple[int, int]:
    """L and Tg."""
    grid_frames = spectrogram.shape[3] // patch_size[1]
    return spectrogram.shape[2] // patch_size[0] * grid_frames, grid_frames


def _block_pixels(pixels: int) -> int:
    return max(16, power_of_two(pixels))


@torch.library.custom_op("msm_kernels::embed_visible_patches", mutates_args=())
def embed_op(
    spectrogram: Tensor, ids_keep: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, ph: int, pw: int
) -> Tensor:
    return launch_embed_forward(spectrogram, ids_keep, weight, bias, positions, (ph, pw))


@embed_op.register_fake
def _(spectrogram, ids_keep, weight, bias, positions, ph, pw):
    return weight.new_empty(*ids_keep.shape, weight.shape[0])


@torch.library.custom_op("msm_kernels::embed_visible_patches_backward", mutates_args=())
def _embed_backward_op(
    d_tokens: Tensor, spectrogram: Tensor, ids_keep: Tensor, ph: int, pw: int, bias_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return launch_embed_backward(d_tokens, spectrogram, ids_keep, (ph, pw), bias_dtype)


@_embed_backward_op.register_fake
def _(d_tokens, spectrogram, ids_keep, ph, pw, bias_dtype):
    width = d_tokens.shape[2]
    return d_tokens.new_empty(width, ph * pw), d_tokens.new_empty(width, dtype=bias_dtype)


def _save_embed(ctx, inputs, output) -> None:
    spectrogram, ids_keep, weight, bias, positions, ph, pw = inputs
    ctx.patch_size = ph, pw
    ctx.spectrogram_like = spectrogram.shape, spectrogram.dtype
    ctx.positions_like = positions.shape[0], positions.dtype
    ctx.bias_dtype = bias.dtype
    needs_spectrogram, _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    # Under ZeRO-3 a saved weight would stay gathered.
    ctx.save_for_backward(
        ids_keep, spectrogram if needs_weight or needs_bias else None, weight if needs_spectrogram else None
    )


def _differentiate_embed(ctx, d_tokens):
    ids_keep, spectrogram, weight = ctx.saved_tensors
    d_spectrogram = d_weight = d_bias = d_positions = None
    if ctx.needs_input_grad[0]:
        d_spectrogram = _spectrogram_gradient(d_tokens, ids_keep, weight, ctx.patch_size, *ctx.spectrogram_like)
    if spectrogram is not None:
        d_weight, d_bias = _embed_backward_op(d_tokens, spectrogram, ids_keep, *ctx.patch_size, ctx.bias_dtype)
    if ctx.needs_input_grad[4]:
        num_patches, dtype = ctx.positions_like
        d_positions = _at_patches(d_tokens.float(), ids_keep, num_patches).sum(0).to(dtype)
    return d_spectrogram, None, d_weight, d_bias, d_positions, None, None


embed_op.register_autograd(_differentiate_embed, setup_context=_save_embed)


def _spectrogram_gradient(
    d_tokens: Tensor, ids_keep: Tensor, weight: Tensor, patch_size: tuple[int, int], shape: torch.Size, dtype
) -> Tensor:
    """d spectrogram [B, 1, F, T], zeros at the masked patches; training never asks for it."""
    (ph, pw), (_, _, F, T) = patch_size, shape
    d_patches = _at_patches(d_tokens.float() @ weight.float(), ids_keep, F // ph * (T // pw))
    return unpatchify(d_patches, (F, T), patch_size).to(dtype)


def _at_patches(rows: Tensor, ids_keep: Tensor, num_patches: int) -> Tensor:
    """Rows [B, K, n] at their patches [B, L, n], zeros at the others; no patch is met twice, so nothing is summed."""
    zeros = rows.new_zeros(rows.shape[0], num_patches, rows.shape[2])
    return zeros.scatter(1, ids_keep.unsqueeze(-1).expand_as(rows), rows)
