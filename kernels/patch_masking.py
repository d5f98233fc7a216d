"""Choosing, embedding, restoring and selecting patches: the two ends of the masked autoencoder.

Legend: B clips, F mel bands, T frames, ph x pw a patch (bands x frames) on a grid of Fg x Tg, L = Fg * Tg patches
(frequency-major: index f * Tg + t), K of them visible, M = L - K masked, P prefix tokens (1 with CLS, 0 without),
D width, N = P + L tokens. d_ gradients.

Malformed arguments raise ValueError; a backend that can't run raises BackendUnavailable. The values of
indices are not checked: that would stop a GPU at every step.

Mathematics, b clip, i visible, l any patch, j masked, order = ids_restore[b, l]:
    mask      a patch is visible if its key is among the K smallest of its clip, of equal keys the first. The K-th
              smallest is found bit by bit from the top: the largest bound that has fewer than K keys below it.
    embed     token[b, i] = W x + bias + position[ids_keep[b, i]], x the ph * pw pixels of that patch, row-major
              (f, t), read from the spectrogram where they lie. d W = sum d token x^T, d bias = sum d token.
    restore   token[b, P + l] = (visible[b, P + order] if order < K else mask token) + position[P + l]. Backward:
              a visible row moves back to P + order, a masked one is added to d mask token: each is read once.
    select    row[b, j] = token[b, P + ids_masked[b, j]]. Backward: d token[b, P + l] = d row[b, order - K], or 0.

Sums over rows (d W, d bias, d mask token) are cut into chunks of rows, as many as the shape alone says; each chunk
leaves a partial sum in a float32 scratch and `sum_chunks` adds them in a fixed order. No atomics: two runs give
the same bits. Rows and patches are counted in 32 bits, elements in 64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .backend import DTYPES, Backend, dot_precision, jit, launch, resolve, tl
from .configurations import configuration
from .reference import Masking, masking_from_keep

__all__ = [
    "Masking",
    "embed_visible_patches",
    "masking_from_keep",
    "random_masking",
    "restore_tokens",
    "select_masked_tokens",
]

CHUNK_ROWS = 256
"""Rows of a partial sum, at least."""
EMBED_SCRATCH = 6 << 20
"""Numbers in the partial sums of the embedding's weight together, at most; 32 sums of the base model's."""
RESTORE_CHUNKS = 256
"""Partial sums of the mask token, at most."""
MANY_PROGRAMS = 256
"""Programs of the embedding, at least: fewer blocks of rows are split along the width, and read their patches again."""


@jit
def patch_keys(sample, seed_low, seed_high, CROP_BITS: tl.constexpr, MASK_TAG: tl.constexpr, BLOCK_L: tl.constexpr):
    """Random keys [BLOCK_L] of a clip, uint32. `sample` points to its (epoch, clip, crop)."""
    group = tl.arange(0, BLOCK_L // 4).to(tl.uint32)  # four patches share a counter
    zero = group * 0
    epoch = zero + tl.load(sample).to(tl.uint32)
    clip = zero + tl.load(sample + 1).to(tl.uint32)
    crop = zero + ((tl.load(sample + 2).to(tl.uint32) & ((1 << CROP_BITS) - 1)) | (MASK_TAG << CROP_BITS))
    key_low, key_high = seed_low.to(tl.uint32, bitcast=True), seed_high.to(tl.uint32, bitcast=True)
    word0, word1, word2, word3 = tl.philox_impl(group, crop, clip, epoch, key_low, key_high)
    return tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3))


@jit
def smallest(keys, num_keep):
    """Which of the keys [n], uint32, are the `num_keep` smallest; of equal ones the first."""
    bound = tl.full([], 0, tl.uint32)
    bit = tl.full([], 1 << 31, tl.uint32)
    for _ in range(32):
        fewer = tl.sum((keys < (bound | bit)).to(tl.int32), 0) < num_keep
        bound = tl.where(fewer, bound | bit, bound)
        bit >>= 1
    below, equal = keys < bound, keys == bound
    wanted = num_keep - tl.sum(below.to(tl.int32), 0)
    return below | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= wanted))


@jit(do_not_specialize=["seed_low", "seed_high", "num_patches", "num_keep"])
def mask_kernel(
    sample_ids,  # [B, 3]
    ids_keep,  # [B, K]
    ids_masked,  # [B, M]
    ids_restore,  # [B, L]
    seed_low,
    seed_high,
    num_patches,
    num_keep,
    CROP_BITS: tl.constexpr,
    MASK_TAG: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """The masking of one clip."""
    clip = tl.program_id(0).to(tl.int64)
    patch = tl.arange(0, BLOCK_L)
    inside = patch < num_patches
    keys = patch_keys(sample_ids + clip * 3, seed_low, seed_high, CROP_BITS, MASK_TAG, BLOCK_L)
    # The padding has the largest key and comes last, so that it is never among the smallest.
    visible = smallest(tl.where(inside, keys, 0xFFFFFFFF), num_keep)
    before = tl.cumsum(visible.to(tl.int32), 0) - visible.to(tl.int32)  # visible patches before this one
    tl.store(ids_keep + clip * num_keep + before, patch.to(tl.int64), mask=visible)
    hidden = inside & (visible == 0)
    tl.store(ids_masked + clip * (num_patches - num_keep) + patch - before, patch.to(tl.int64), mask=hidden)
    order = tl.where(visible, before, num_keep + patch - before)
    tl.store(ids_restore + clip * num_patches + patch, order.to(tl.int64), mask=inside)


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


class MaskConfig(NamedTuple):
    """Launch parameters of random_masking."""

    num_warps: int


class EmbedConfig(NamedTuple):
    """Launch parameters of the embedding: the tile of each program, or the step along rows of its backward."""

    block_rows: int
    block_d: int
    block_pixels: int
    num_warps: int
    num_stages: int


class RowsConfig(NamedTuple):
    """Launch parameters of the kernels that move rows: a tile of `rows` x `block_d`."""

    rows: int
    block_d: int
    num_warps: int


def default_mask(num_patches: int) -> MaskConfig:
    """One warp as long as its registers hold the keys: it counts without waiting for others."""
    return MaskConfig(max(1, min(16, _block_patches(num_patches) // 512)))


def default_embed_forward(patch_size: tuple[int, int], dtype: torch.dtype) -> EmbedConfig:
    """Whole patches, up to 512 pixels, in 16 bits; short steps in float32, whose products take registers."""
    pixels = patch_size[0] * patch_size[1]
    if dtype == torch.float32:
        return EmbedConfig(64, 32, min(32, _block_pixels(pixels)), 4, 2)
    most = min(256, max(16, _power_of_two(pixels + 1) // 2))  # the rest is the tail
    return EmbedConfig(64, 64 if pixels <= 256 else 32, most, 4, 2)


def default_embed_backward(patch_size: tuple[int, int], dtype: torch.dtype) -> EmbedConfig:
    """A tile of the weight as large as the registers hold; pixels read one by one take many for their addresses."""
    block_pixels = _block_pixels(patch_size[0] * patch_size[1])
    if dtype == torch.float32:
        return EmbedConfig(16, 64, min(64, block_pixels), 4, 2)
    return EmbedConfig(64 if patch_size[1] >= 4 else 32, 128, min(128, block_pixels), 8, 3)


def default_rows(width: int, dtype: torch.dtype) -> RowsConfig:
    """64 bytes a thread in accesses of 16; columns in blocks that leave no thread idle where the width allows."""
    block_d = min(128, width & -width if width % 32 == 0 else _power_of_two(width))
    return RowsConfig(8192 // dtype.itemsize // block_d, block_d, 4)


def launch_random_masking(
    seed: int, sample_ids: Tensor, num_patches: int, num_keep: int, config: MaskConfig | None = None
) -> Masking:
    """The masks of sample_ids [B, 3]."""
    batch, device = sample_ids.shape[0], sample_ids.device
    config = config or configuration(
        "random_masking", f"patches{_block_patches(num_patches)}", torch.int64, device, default_mask(num_patches)
    )
    sizes = (num_keep, num_patches - num_keep, num_patches)
    masking = Masking(*(torch.empty(batch, size, dtype=torch.int64, device=device) for size in sizes))
    launch(
        mask_kernel, batch, sample_ids.contiguous(), *masking,
        _signed(seed & reference.UINT32), _signed(seed >> 32), num_patches, num_keep,
        CROP_BITS=reference.CROP_BITS, MASK_TAG=reference.MASK_TAG, BLOCK_L=_block_patches(num_patches),
        num_warps=config.num_warps,
    )  # fmt: skip
    return masking


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
    config = config or _configured("embed_forward", embed_class(patch_size), weight, default)
    (batch, num_keep), width = ids_keep.shape, weight.shape[0]
    tokens = torch.empty(batch, num_keep, width, dtype=weight.dtype, device=weight.device)
    tensors = (spectrogram, ids_keep, weight, bias, positions)
    row_blocks, d_blocks = _blocks(batch * num_keep, config.block_rows), _blocks(width, config.block_d)
    # Two blocks of columns at least: a loop of one would have no loads in flight during its products.
    blocks = min(d_blocks, max(2, _blocks(d_blocks, _blocks(MANY_PROGRAMS, max(1, row_blocks)))))
    rest = patch_size[0] * patch_size[1] - config.block_pixels
    tail = _block_pixels(rest) if 0 < rest <= config.block_pixels else 0
    launch(
        embed_forward_kernel, row_blocks * _blocks(d_blocks, blocks), *(t.contiguous() for t in tensors), tokens,
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
    config = config or _configured("embed_backward", embed_class(patch_size), d_tokens, default)
    batch, num_keep, width = d_tokens.shape
    chunks, chunk_rows = _chunks(batch * num_keep, max(1, EMBED_SCRATCH // (width * pixels)))
    d_weight = torch.empty(chunks, width, pixels, dtype=torch.float32, device=d_tokens.device)
    d_bias = torch.empty(chunks, width, dtype=torch.float32, device=d_tokens.device)
    launch(
        embed_backward_kernel, chunks * _blocks(width, config.block_d) * _blocks(pixels, config.block_pixels),
        d_tokens.contiguous(), spectrogram.contiguous(), ids_keep.contiguous(), d_weight, d_bias,
        batch * num_keep, chunk_rows, num_keep, *_grid(spectrogram, patch_size),
        D=width, PH=patch_size[0], PW=patch_size[1],
        BLOCK_ROWS=config.block_rows, BLOCK_D=config.block_d, BLOCK_PIXELS=config.block_pixels,
        PRECISION=dot_precision(d_tokens), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return launch_sum_chunks(d_weight, d_tokens.dtype), launch_sum_chunks(d_bias, bias_dtype)


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
    clips = min(config.rows, _power_of_two(batch))
    tensors = (tokens, ids_restore, mask_token, positions)
    launch(
        restore_forward_kernel, _blocks(batch, clips) * num_tokens * _blocks(width, config.block_d),
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
    chunks, chunk_rows = _chunks(batch * num_tokens, RESTORE_CHUNKS)
    d_tokens = torch.empty(batch, num_prefix + num_keep, width, dtype=d_restored.dtype, device=d_restored.device)
    d_mask_token = torch.empty(chunks, width, dtype=torch.float32, device=d_restored.device)
    launch(
        restore_backward_kernel, chunks * _blocks(width, config.block_d),
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
        select_forward_kernel, _blocks(batch * num_masked, config.rows) * _blocks(width, config.block_d),
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
        select_backward_kernel, _blocks(batch * num_tokens, config.rows) * _blocks(width, config.block_d),
        d_selected.contiguous(), ids_restore.contiguous(), d_tokens, batch * num_tokens,
        N=num_tokens, M=num_masked, PREFIX=num_prefix, D=width, ROWS=config.rows, BLOCK_D=config.block_d,
        num_warps=config.num_warps,
    )  # fmt: skip
    return d_tokens


def launch_sum_chunks(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of partial sums [chunks, ...] over their chunks, formed in float32."""
    total = torch.empty(partial.shape[1:], dtype=dtype, device=partial.device)
    columns = total.numel()
    launch(
        sum_chunks_kernel, _blocks(columns, 64), partial, total, partial.shape[0], columns,
        BLOCK_CHUNKS=32, BLOCK_COLUMNS=64, num_warps=4,
    )  # fmt: skip
    return total


def embed_class(patch_size: tuple[int, int]) -> str:
    """The shape class of the embedding in the table of configurations."""
    return "{}x{}".format(*patch_size)


def rows_class(width: int) -> str:
    """The shape class of the kernels that move rows."""
    return f"width{width}"


def _configured(
    kernel: str, shape_class: str, tensor: Tensor, default: EmbedConfig | RowsConfig
) -> EmbedConfig | RowsConfig:
    return configuration(kernel, shape_class, tensor.dtype, tensor.device, default)


def _configured_rows(kernel: str, tensor: Tensor) -> RowsConfig:
    width = tensor.shape[-1]
    return _configured(kernel, rows_class(width), tensor, default_rows(width, tensor.dtype))


def _grid(spectrogram: Tensor, patch_size: tuple[int, int]) -> tuple[int, int]:
    """L and Tg."""
    grid_frames = spectrogram.shape[3] // patch_size[1]
    return spectrogram.shape[2] // patch_size[0] * grid_frames, grid_frames


def _chunks(num_rows: int, most: int) -> tuple[int, int]:
    """How many chunks the rows are cut into, and how many rows each has."""
    chunk_rows = _blocks(max(CHUNK_ROWS, _blocks(num_rows, most)), 16) * 16
    return _blocks(num_rows, chunk_rows), chunk_rows


def _blocks(number: int, block: int) -> int:
    return -(-number // block)


def _block_patches(num_patches: int) -> int:
    return max(32, _power_of_two(num_patches))


def _block_pixels(pixels: int) -> int:
    return max(16, _power_of_two(pixels))


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _signed(word: int) -> int:
    """The same 32 bits as a signed number, so that Triton sees one type and compiles one kernel for all seeds."""
    return word - (word >> 31 << 32)


@torch.library.custom_op("msm_kernels::random_masking", mutates_args=())
def _mask_op(
    sample_ids: Tensor, seed_low: int, seed_high: int, num_patches: int, num_keep: int
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(launch_random_masking(seed_low | seed_high << 32, sample_ids, num_patches, num_keep))


@_mask_op.register_fake
def _(sample_ids, seed_low, seed_high, num_patches, num_keep):
    sizes = (num_keep, num_patches - num_keep, num_patches)
    return tuple(sample_ids.new_empty(sample_ids.shape[0], size) for size in sizes)


@torch.library.custom_op("msm_kernels::embed_visible_patches", mutates_args=())
def _embed_op(
    spectrogram: Tensor, ids_keep: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, ph: int, pw: int
) -> Tensor:
    return launch_embed_forward(spectrogram, ids_keep, weight, bias, positions, (ph, pw))


@_embed_op.register_fake
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


_embed_op.register_autograd(_differentiate_embed, setup_context=_save_embed)


def _spectrogram_gradient(
    d_tokens: Tensor, ids_keep: Tensor, weight: Tensor, patch_size: tuple[int, int], shape: torch.Size, dtype
) -> Tensor:
    """d spectrogram [B, 1, F, T], zeros at the masked patches; training never asks for it."""
    (ph, pw), (B, _, F, T) = patch_size, shape
    d_patches = _at_patches(d_tokens.float() @ weight.float(), ids_keep, F // ph * (T // pw))
    return d_patches.view(B, F // ph, T // pw, ph, pw).transpose(2, 3).reshape(shape).to(dtype)


def _at_patches(rows: Tensor, ids_keep: Tensor, num_patches: int) -> Tensor:
    """Rows [B, K, n] at their patches [B, L, n], zeros at the others; no patch is met twice, so nothing is summed."""
    zeros = rows.new_zeros(rows.shape[0], num_patches, rows.shape[2])
    return zeros.scatter(1, ids_keep.unsqueeze(-1).expand_as(rows), rows)


@torch.library.custom_op("msm_kernels::restore_tokens", mutates_args=())
def _restore_op(tokens: Tensor, ids_restore: Tensor, mask_token: Tensor, positions: Tensor, num_prefix: int) -> Tensor:
    return launch_restore_forward(tokens, ids_restore, mask_token, positions, num_prefix)


@_restore_op.register_fake
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


_restore_op.register_autograd(_differentiate_restore, setup_context=_save_restore)


@torch.library.custom_op("msm_kernels::select_masked_tokens", mutates_args=())
def _select_op(tokens: Tensor, ids_masked: Tensor, ids_restore: Tensor, num_prefix: int) -> Tensor:
    return launch_select_forward(tokens, ids_masked, num_prefix)


@_select_op.register_fake
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


_select_op.register_autograd(_differentiate_select, setup_context=_save_select)


def random_masking(
    seed: int, sample_ids: Tensor, num_patches: int, num_keep: int, backend: Backend = "auto"
) -> Masking:
    """Keep `num_keep` patches of each clip, uniformly without replacement: a pure function of its arguments.

    sample_ids int64 [B, 3] = (epoch, clip, crop), crop < 2**24. Patch p's random key is output word p % 4 of
    Philox4x32-10 with key (seed low, seed high) and counter (p // 4, crop + (1 << 24), clip low 32 bits,
    epoch); the patches with the smallest keys stay visible, ties go to the lower index.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed = {seed}: must fit 64 bits, 0 <= seed < 2**64")
    if sample_ids.dtype != torch.int64 or sample_ids.ndim != 2 or sample_ids.shape[1] != 3:
        raise ValueError(
            f"sample_ids is {sample_ids.dtype} {list(sample_ids.shape)}: must be int64 [B, 3], one row of "
            "(epoch, clip, crop) per clip"
        )
    if not 0 < num_keep < num_patches:
        raise ValueError(f"num_keep = {num_keep} of {num_patches} patches: at least one must be visible and one masked")
    if resolve(backend, sample_ids.device) == "reference":
        return reference.random_masking(seed, sample_ids, num_patches, num_keep)
    return Masking(*_mask_op(sample_ids, seed & reference.UINT32, seed >> 32, num_patches, num_keep))


def embed_visible_patches(
    spectrogram: Tensor,
    masking: Masking,
    weight: Tensor,
    bias: Tensor,
    positions: Tensor,
    patch_size: tuple[int, int],
    backend: Backend = "auto",
) -> Tensor:
    """Project the visible patches and add their positions, without touching the masked ones.

    spectrogram [B, 1, F, T], weight [D, ph * pw], bias [D], positions [L, D] -> tokens [B, K, D] in the order
    of ids_keep and the dtype of `weight`. The sum is formed in float32 or better and rounded once; where the
    weight has 16 bits, the kernels round the pixels to its dtype before they multiply. No prefix token is
    added here.
    """
    num_patches = check_patches(spectrogram, masking, patch_size)
    width, pixels = weight.shape[0], patch_size[0] * patch_size[1]
    check_shape("weight", weight, (width, pixels))
    check_shape("bias", bias, (width,))
    check_shape("positions", positions, (num_patches, width))
    if resolve(backend, spectrogram.device, _deciding_dtype(weight, spectrogram, bias, positions)) == "reference":
        return reference.embed_visible_patches(spectrogram, masking, weight, bias, positions, patch_size)
    return _embed_op(spectrogram, masking.ids_keep, weight, bias, positions, *patch_size)


def restore_tokens(
    tokens: Tensor,
    masking: Masking,
    mask_token: Tensor,
    positions: Tensor,
    num_prefix: int,
    backend: Backend = "auto",
) -> Tensor:
    """Put visible tokens back to their places, mask tokens at the others, and add positions.

    tokens [B, P + K, D], mask_token [1, 1, D], positions [P + L, D] -> [B, P + L, D], dtype of `tokens`.
    The `num_prefix` = P leading tokens keep their place; every patch token is used.
    """
    batch, num_keep = masking.ids_keep.shape
    width = tokens.shape[-1]
    check_shape("tokens", tokens, (batch, num_prefix + num_keep, width))
    check_shape("mask_token", mask_token, (1, 1, width))
    check_shape("positions", positions, (num_prefix + masking.ids_restore.shape[1], width))
    if resolve(backend, tokens.device, _deciding_dtype(tokens, mask_token, positions)) == "reference":
        return reference.restore_tokens(tokens, masking, mask_token, positions, num_prefix)
    return _restore_op(tokens, masking.ids_restore, mask_token, positions, num_prefix)


def select_masked_tokens(tokens: Tensor, masking: Masking, num_prefix: int, backend: Backend = "auto") -> Tensor:
    """The tokens of the masked patches, in the order of ids_masked.

    tokens [B, P + L, D] -> [B, M, D]; the `num_prefix` = P leading tokens are no patches.
    """
    batch, num_patches = masking.ids_restore.shape
    check_shape("tokens", tokens, (batch, num_prefix + num_patches, tokens.shape[-1]))
    check_shape("masking.ids_masked", masking.ids_masked, (batch, num_patches - masking.ids_keep.shape[1]))
    if resolve(backend, tokens.device, tokens.dtype) == "reference":
        return reference.select_masked_tokens(tokens, masking, num_prefix)
    return _select_op(tokens, masking.ids_masked, masking.ids_restore, num_prefix)


def check_patches(spectrogram: Tensor, masking: Masking, patch_size: tuple[int, int]) -> int:
    """Check that patches, spectrogram and masking agree; returns L."""
    ph, pw = patch_size
    if spectrogram.ndim != 4 or spectrogram.shape[1] != 1:
        raise ValueError(f"spectrogram is {list(spectrogram.shape)}: must be [B, 1, mel bands, frames]")
    batch, _, bands, frames = spectrogram.shape
    if bands % ph or frames % pw or not bands * frames:
        raise ValueError(f"spectrogram of {bands} bands x {frames} frames: must be a whole number of {ph}x{pw} patches")
    num_patches = (bands // ph) * (frames // pw)
    check_shape("masking.ids_restore", masking.ids_restore, (batch, num_patches))
    num_keep = masking.ids_keep.shape[-1]
    check_shape("masking.ids_keep", masking.ids_keep, (batch, num_keep))
    check_shape("masking.ids_masked", masking.ids_masked, (batch, num_patches - num_keep))
    return num_patches


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} is {list(tensor.shape)}: must be {list(shape)}")


def _deciding_dtype(*operands: Tensor) -> torch.dtype:
    """That of the first operand, unless another one has a dtype that the kernels don't take."""
    for operand in operands:
        if operand.dtype not in DTYPES:
            return operand.dtype
    return operands[0].dtype
