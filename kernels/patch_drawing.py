"""Drawing masks: the random keys of a clip's patches and their ranking, in one program.

A patch is visible if its key is among the K smallest of its clip, of equal keys the first. The K-th smallest is found
bit by bit from the top: the largest bound that has fewer than K keys below it. Keys as `patch_masking.random_masking`
documents them; the launcher trusts its arguments, which that checks.

Legend: B clips, L patches, K of them visible, M = L - K masked.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .backend import jit, launch, tl
from .blocks import power_of_two
from .configurations import configuration
from .reference import Masking


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


class MaskConfig(NamedTuple):
    """Launch parameters of random_masking."""

    num_warps: int


def default_mask(num_patches: int) -> MaskConfig:
    """One warp as long as its registers hold the keys: it counts without waiting for others."""
    return MaskConfig(max(1, min(16, _block_patches(num_patches) // 512)))


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


def _block_patches(num_patches: int) -> int:
    return max(32, power_of_two(num_patches))


def _signed(word: int) -> int:
    """The same 32 bits as a signed number, so that Triton sees one type and compiles one kernel for all seeds."""
    return word - (word >> 31 << 32)


@torch.library.custom_op("msm_kernels::random_masking", mutates_args=())
def mask_op(
    sample_ids: Tensor, seed_low: int, seed_high: int, num_patches: int, num_keep: int
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(launch_random_masking(seed_low | seed_high << 32, sample_ids, num_patches, num_keep))


@mask_op.register_fake
def _(sample_ids, seed_low, seed_high, num_patches, num_keep):
    sizes = (num_keep, num_patches - num_keep, num_patches)
    return tuple(sample_ids.new_empty(sample_ids.shape[0], size) for size in sizes)
