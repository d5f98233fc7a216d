"""The ops of this package in plain torch: what they mean, and what the fused kernels are compared with.

Autograd-native, any device, deterministic. Arithmetic is float32, or float64 where an operand is float64;
bfloat16 and float16 are storage only. Shapes are checked by the public functions, not here.

Legend: B clips, F mel bands, T frames, ph x pw a patch (bands x frames), L patches in frequency-major order
(index = f * Tg + t on the grid Fg x Tg), K of them visible, M = L - K masked, P prefix tokens (1 with CLS),
D width, N tokens, H heads, C = D / H.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

MASK_TAG = 1  # purpose of the draw, in the top byte of counter word 1: other draws of a sample take other tags
CROP_BITS = 24
UINT32 = 0xFFFFFFFF
EPSILON = 1e-6
"""Added to the variance of a target patch that is normalised."""


class Masking(NamedTuple):
    """Which patches are visible; int64 indices. K and M are the same for every clip of a batch."""

    ids_keep: Tensor  # [B, K] visible patches, ascending
    ids_masked: Tensor  # [B, M] hidden patches, ascending
    ids_restore: Tensor  # [B, L] position of patch l in concat(ids_keep, ids_masked)


def philox(seed: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al. 2011): four random words for each counter, equal to Triton's `tl.philox`.

    Key = (low, high) 32 bits of `seed`; counters are int64 tensors that broadcast, their low 32 bits count.
    Returns int64 tensors in [0, 2**32).
    """
    key0, key1 = seed & UINT32, seed >> 32
    c0, c1, c2, c3 = (word & UINT32 for word in (c0, c1, c2, c3))
    for _ in range(10):
        high_a, low_a = _multiply(0xD2511F53, c0)
        high_b, low_b = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ key0, low_b, high_a ^ c3 ^ key1, low_a
        key0, key1 = (key0 + 0x9E3779B9) & UINT32, (key1 + 0xBB67AE85) & UINT32
    return c0, c1, c2, c3


def masking_from_keep(ids_keep: Tensor, num_patches: int) -> Masking:
    """Complete the Masking of given visible patches [B, K], distinct in each clip, in any order."""
    ids_keep = ids_keep.sort(dim=1).values
    hidden = torch.ones(ids_keep.shape[0], num_patches, dtype=torch.int64, device=ids_keep.device)
    hidden = hidden.scatter(1, ids_keep, 0)
    # A stable sort on hidden-or-not lists the visible ones first, both groups in ascending order.
    order = hidden.argsort(dim=1, stable=True)
    return Masking(ids_keep, order[:, ids_keep.shape[1] :], order.argsort(dim=1))


def random_masking(seed: int, sample_ids: Tensor, num_patches: int, num_keep: int) -> Masking:
    """See `patch_masking.random_masking`."""
    epoch, clip, crop = sample_ids.unsqueeze(-1).unbind(1)  # [B, 1] each
    group = torch.arange((num_patches + 3) // 4, device=sample_ids.device)  # four patches share a counter
    c1 = (crop & ((1 << CROP_BITS) - 1)) | (MASK_TAG << CROP_BITS)
    words = torch.broadcast_tensors(*philox(seed, group, c1, clip, epoch))
    keys = torch.stack(words, dim=-1).flatten(1)[:, :num_patches]
    return masking_from_keep(keys.argsort(dim=1, stable=True)[:, :num_keep], num_patches)


def patchify(spectrogram: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Cut [B, 1, F, T] into patches [B, L, ph * pw]: frequency-major, pixels row-major (f, t)."""
    ph, pw = patch_size
    patches = spectrogram[:, 0].unfold(1, ph, ph).unfold(2, pw, pw)  # [B, Fg, Tg, ph, pw]
    return patches.flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, shape: tuple[int, int], patch_size: tuple[int, int]) -> Tensor:
    """Patches [B, L, ph * pw] back to spectrograms [B, 1, *shape]: the inverse of `patchify`."""
    (bands, frames), (ph, pw) = shape, patch_size
    tiles = patches.reshape(-1, bands // ph, frames // pw, ph, pw)
    return tiles.transpose(2, 3).reshape(-1, 1, bands, frames)


def embed_visible_patches(
    spectrogram: Tensor,
    masking: Masking,
    weight: Tensor,
    bias: Tensor,
    positions: Tensor,
    patch_size: tuple[int, int],
) -> Tensor:
    """See `patch_masking.embed_visible_patches`."""
    dtype = _compute_dtype(weight)
    visible = select_rows(patchify(spectrogram, patch_size), masking.ids_keep)
    tokens = linear(visible.to(dtype), weight.to(dtype), bias.to(dtype))
    return (tokens + positions.to(dtype)[masking.ids_keep]).to(weight.dtype)


def restore_tokens(tokens: Tensor, masking: Masking, mask_token: Tensor, positions: Tensor, num_prefix: int) -> Tensor:
    """See `patch_masking.restore_tokens`."""
    dtype = _compute_dtype(tokens)
    prefix, visible = tokens[:, :num_prefix], tokens[:, num_prefix:]
    hidden = mask_token.to(tokens.dtype).expand(*masking.ids_masked.shape, -1)
    patches = select_rows(torch.cat([visible, hidden], dim=1), masking.ids_restore)
    return (torch.cat([prefix, patches], dim=1).to(dtype) + positions.to(dtype)).to(tokens.dtype)


def select_masked_tokens(tokens: Tensor, masking: Masking, num_prefix: int) -> Tensor:
    """See `patch_masking.select_masked_tokens`."""
    return select_rows(tokens[:, num_prefix:], masking.ids_masked)


def masked_patch_loss(
    prediction: Tensor, spectrogram: Tensor, masking: Masking, patch_size: tuple[int, int], normalize: bool
) -> Tensor:
    """See `masked_loss.masked_patch_loss`."""
    dtype = _compute_dtype(prediction, spectrogram)
    target = select_rows(patchify(spectrogram, patch_size), masking.ids_masked).to(dtype)
    if normalize:
        variance, mean = torch.var_mean(target, dim=-1, correction=1, keepdim=True)
        target = (target - mean) / (variance + EPSILON).sqrt()
    return (prediction.to(dtype) - target).square().mean()


def attention(qkv: Tensor, num_heads: int, key_mask: Tensor | None) -> Tensor:
    """See `attention.attention`."""
    B, N, _ = qkv.shape
    dtype = _compute_dtype(qkv)
    parts = qkv.to(dtype).view(B, N, 3, num_heads, qkv.shape[2] // 3 // num_heads)
    q, k, v = parts.permute(2, 0, 3, 1, 4)  # [B, H, N, C] each
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # [B, H, N, N]
    if key_mask is not None:
        hidden = ~key_mask[:, None, None, :]
        # Masked a second time after the softmax, so that a clip without any key gives zeros and not NaN.
        scores = scores.masked_fill(hidden, torch.finfo(dtype).min)
        weights = scores.softmax(dim=-1).masked_fill(hidden, 0)
    else:
        weights = scores.softmax(dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2).to(qkv.dtype)


def select_rows(values: Tensor, ids: Tensor) -> Tensor:
    """Rows `ids` [B, n] of `values` [B, L, D], clip by clip: [B, n, D]."""
    return values.gather(1, ids.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


def _compute_dtype(*operands: Tensor) -> torch.dtype:
    """float64 if an operand is, else float32."""
    return torch.float64 if any(operand.dtype == torch.float64 for operand in operands) else torch.float32


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of constant * word, through 48-bit products: int64 never overflows."""
    low = constant * (word & 0xFFFF)
    high = constant * (word >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)
