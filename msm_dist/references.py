"""What can be predicted of masked patches without a model: the references that a loss stands beside.

In: normalised spectrograms [B, 1, F, T] and their masking. Out: predictions of the masked patches [B, M, ph * pw].

Legend: B clips, F mel bands, T frames, L patches, K visible, M masked, ph x pw a patch.
"""

import torch
from torch import Tensor

from msm_dist.model.patches import PatchGrid, patchify, unpatchify
from msm_kernels.patch_masking import Masking
from msm_kernels.reference import select_rows


def mel_mean_patches(spectrogram: Tensor, masking: Masking, patch_size: tuple[int, int], mel_mean: Tensor) -> Tensor:
    """Predict `mel_mean` [F], normalised like the spectrogram [B, 1, F, T], everywhere: [B, M, ph * pw]."""
    predicted = mel_mean.to(spectrogram.dtype)[None, None, :, None].expand_as(spectrogram)
    return select_rows(patchify(predicted, patch_size), masking.ids_masked)


def visible_mean_patches(
    spectrogram: Tensor, masking: Masking, patch_size: tuple[int, int], mel_mean: Tensor
) -> Tensor:
    """Predict a band's mean over visible patches of the clip, else `mel_mean` [F]: [B, M, ph * pw]."""
    batch, num_patches = masking.ids_restore.shape
    seen = spectrogram.new_zeros(batch, num_patches).scatter(1, masking.ids_keep, 1.0)
    grid = PatchGrid(*spectrogram.shape[2:], patch_size)
    seen = unpatchify(seen.unsqueeze(-1).expand(-1, -1, grid.patch_pixels), grid)  # [B, 1, F, T]
    count = seen.sum(dim=-1, keepdim=True)
    mean = (spectrogram * seen).sum(dim=-1, keepdim=True) / count.clamp_min(1)
    predicted = mean.where(count > 0, mel_mean.to(spectrogram.dtype)[None, None, :, None])
    return select_rows(patchify(predicted.expand_as(spectrogram), patch_size), masking.ids_masked)


def nearest_patches(spectrogram: Tensor, masking: Masking, patch_size: tuple[int, int]) -> Tensor:
    """Predict the nearest visible patch on the grid, ties to the lower index: [B, M, ph * pw]."""
    rows, columns = PatchGrid(*spectrogram.shape[2:], patch_size).shape
    index = torch.arange(rows * columns, device=spectrogram.device)
    row, column = index // columns, index % columns
    distance = (row[:, None] - row).square() + (column[:, None] - column).square()  # [L, L], squared
    # argmin promises nothing about ties: every candidate gets a rank of its own.
    rank = distance * len(index) + index
    to_visible = rank[masking.ids_masked[:, :, None], masking.ids_keep[:, None, :]]  # [B, M, K]
    nearest = masking.ids_keep.gather(1, to_visible.argmin(dim=-1))
    return select_rows(patchify(spectrogram, patch_size), nearest)


def normalized_patches(patches: Tensor) -> Tensor:
    """Each patch [..., ph * pw] less its mean, over its deviation: as targets are with model.normalize_targets."""
    variance, mean = torch.var_mean(patches, dim=-1, correction=1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()
