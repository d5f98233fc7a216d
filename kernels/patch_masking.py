"""Choosing, embedding, restoring and selecting patches: the two ends of the masked autoencoder.

The kernels are in patch_drawing.py (masks), patch_embedding.py (embedding) and patch_rows.py (restoring and
selecting). No atomics: two runs give the same bits.

Legend: B clips, F mel bands, T frames, ph x pw a patch, L patches (frequency-major), K visible, M = L - K
masked, P prefix tokens (1 with CLS, 0 without), D width.

Malformed arguments raise ValueError; a backend that can't run raises BackendUnavailable. The values of
indices are not checked: that would stop a GPU at every step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .backend import DTYPES, Backend, resolve
from .checks import check_device, check_floating, check_shape
from .patch_drawing import mask_op
from .patch_embedding import embed_op
from .patch_rows import restore_op, select_op
from .reference import Masking, masking_from_keep

__all__ = [
    "Masking",
    "embed_visible_patches",
    "masking_from_keep",
    "random_masking",
    "restore_tokens",
    "select_masked_tokens",
]


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
    return Masking(*mask_op(sample_ids, seed & reference.UINT32, seed >> 32, num_patches, num_keep))


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
    width, pixels = weight.shape[0] if weight.ndim else 0, patch_size[0] * patch_size[1]
    check_shape("weight", weight, (width, pixels))
    check_shape("bias", bias, (width,))
    check_shape("positions", positions, (num_patches, width))
    check_device(spectrogram.device, weight=weight, bias=bias, positions=positions)
    check_floating(weight=weight, bias=bias, positions=positions)
    if resolve(backend, spectrogram.device, _deciding_dtype(weight, spectrogram, bias, positions)) == "reference":
        return reference.embed_visible_patches(spectrogram, masking, weight, bias, positions, patch_size)
    return embed_op(spectrogram, masking.ids_keep, weight, bias, positions, *patch_size)


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
    check_masking(masking, tokens.device)
    check_prefix(num_prefix)
    batch, num_keep = masking.ids_keep.shape
    width = tokens.shape[-1]
    check_shape("tokens", tokens, (batch, num_prefix + num_keep, width))
    check_shape("mask_token", mask_token, (1, 1, width))
    check_shape("positions", positions, (num_prefix + masking.ids_restore.shape[1], width))
    check_device(tokens.device, mask_token=mask_token, positions=positions)
    check_floating(tokens=tokens, mask_token=mask_token, positions=positions)
    if resolve(backend, tokens.device, _deciding_dtype(tokens, mask_token, positions)) == "reference":
        return reference.restore_tokens(tokens, masking, mask_token, positions, num_prefix)
    return restore_op(tokens, masking.ids_restore, mask_token, positions, num_prefix)


def select_masked_tokens(tokens: Tensor, masking: Masking, num_prefix: int, backend: Backend = "auto") -> Tensor:
    """The tokens of the masked patches, in the order of ids_masked.

    tokens [B, P + L, D] -> [B, M, D]; the `num_prefix` = P leading tokens are no patches.
    """
    check_masking(masking, tokens.device)
    check_prefix(num_prefix)
    batch, num_patches = masking.ids_restore.shape
    check_shape("tokens", tokens, (batch, num_prefix + num_patches, tokens.shape[-1]))
    check_floating(tokens=tokens)
    if resolve(backend, tokens.device, tokens.dtype) == "reference":
        return reference.select_masked_tokens(tokens, masking, num_prefix)
    return select_op(tokens, masking.ids_masked, masking.ids_restore, num_prefix)


def check_patches(spectrogram: Tensor, masking: Masking, patch_size: tuple[int, int]) -> int:
    """Check that patches, spectrogram and masking agree; returns L."""
    ph, pw = patch_size
    if spectrogram.ndim != 4 or spectrogram.shape[1] != 1:
        raise ValueError(f"spectrogram is {list(spectrogram.shape)}: must be [B, 1, mel bands, frames]")
    batch, _, bands, frames = spectrogram.shape
    if ph < 1 or pw < 1:
        raise ValueError(f"patch_size = {patch_size}: must be 1 or more bands and frames")
    if bands % ph or frames % pw or not bands * frames:
        raise ValueError(f"spectrogram of {bands} bands x {frames} frames: must be a whole number of {ph}x{pw} patches")
    num_patches = (bands // ph) * (frames // pw)
    check_shape("masking.ids_restore", masking.ids_restore, (batch, num_patches))
    check_masking(masking, spectrogram.device)
    check_floating(spectrogram=spectrogram)
    return num_patches


def check_masking(masking: Masking, device: torch.device) -> None:
    """Check that the three index tensors agree with each other and can be read on `device`."""
    for name, ids in masking._asdict().items():
        if ids.dtype != torch.int64 or ids.ndim != 2:
            raise ValueError(f"masking.{name} is {ids.dtype} {list(ids.shape)}: must be int64 [B, patches]")
    batch, num_patches = masking.ids_restore.shape
    num_keep = masking.ids_keep.shape[1]
    check_shape("masking.ids_keep", masking.ids_keep, (batch, num_keep))
    check_shape("masking.ids_masked", masking.ids_masked, (batch, num_patches - num_keep))
    check_device(device, **masking._asdict())


def check_prefix(num_prefix: int) -> None:
    if num_prefix < 0:
        raise ValueError(f"num_prefix = {num_prefix}: must be 0 or more")


def _deciding_dtype(*operands: Tensor) -> torch.dtype:
    """That of the first operand, unless another one has a dtype that the kernels don't take."""
    for operand in operands:
        if operand.dtype not in DTYPES:
            return operand.dtype
    return operands[0].dtype
