"""The masked spectrogram autoencoder: mask, embed the visible patches, encode, restore, decode, loss.

In: normalised log-mel spectrograms, float32. Out: loss, prediction of the masked patches, and the masking.
Fails with ConfigError on a geometry or backend that can't be; with ValueError on a malformed call.
Source: Niizumi et al. 2022, "Masked Spectrogram Modeling using Masked Autoencoders", arXiv 2204.12260.

Legend: B clips, F mel bands, T frames, ph x pw a patch, L patches, K visible, M = L - K masked, P prefix
tokens (1 with CLS, 0 without), D width of the encoder, E width of the decoder.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from msm_dist.config import Model
from msm_dist.errors import ConfigError
from msm_dist.model.patches import PatchGrid, PositionTable, sincos_1d, sincos_2d
from msm_dist.model.transformer import NORM_EPS, Block
from msm_kernels.backend import Backend, BackendUnavailable, require
from msm_kernels.masked_loss import masked_patch_loss
from msm_kernels.patch_masking import (
    Masking,
    embed_visible_patches,
    masking_from_keep,
    random_masking,
    restore_tokens,
    select_masked_tokens,
)

TOKEN_STD = 0.02


class Output(NamedTuple):
    """What a forward pass returns; `prediction` is in the order of `masking.ids_masked`."""

    loss: Tensor  # scalar, float32 or better
    prediction: Tensor  # [B, M, ph * pw]
    masking: Masking


class MaskedSpectrogramModel(nn.Module):
    """Encoder and decoder with the loss between them.

    `seed` keys the initial weights and the masks; building a model leaves the global generators alone. Raises
    ConfigError where patches don't fit the spectrogram, hide all or nothing, or the backend is not there.
    """

    def __init__(self, model: Model, n_mels: int, crop_frames: int, seed: int = 0):
        super().__init__()
        self.config = model
        self.grid = PatchGrid(n_mels, crop_frames, model.patch)
        self.num_keep = int(self.grid.num_patches * (1 - model.mask_ratio))
        self.seed = seed
        self.backend = _checked_backend(model)
        if not 0 < self.num_keep < self.grid.num_patches:
            raise ConfigError(
                f"model.mask_ratio = {model.mask_ratio}: of {self.grid.num_patches} patches {self.num_keep} "
                "stay visible; at least one must be visible and one hidden"
            )
        with torch.device("meta"):  # no memory and no random numbers until `initialize`
            self.encoder = Encoder(model, self.grid)
            self.decoder = Decoder(model, self.grid)
        self.to_empty(device="cpu")
        initialize(self, seed)

    def forward(self, spectrogram: Tensor, sample_ids: Tensor | None = None, masking: Masking | None = None) -> Output:
        """Reconstruct the masked patches of normalised log-mels [B, 1, F, T].

        Masks are drawn from (seed, sample_ids int64 [B, 3] = (epoch, clip, crop)) unless `masking` is given.
        """
        if tuple(spectrogram.shape[1:]) != (1, self.grid.n_mels, self.grid.frames):
            raise ValueError(
                f"spectrogram is {list(spectrogram.shape)}: must be "
                f"[B, 1, {self.grid.n_mels}, {self.grid.frames}] for this model"
            )
        if masking is None:
            masking = self.draw_masking(sample_ids)
        latent = self.encoder(spectrogram, masking)
        prediction = self.decoder(latent, masking)
        loss = masked_patch_loss(
            prediction, spectrogram, masking, self.grid.patch, self.config.normalize_targets, self.backend
        )
        return Output(loss, prediction, masking)

    def draw_masking(self, sample_ids: Tensor | None) -> Masking:
        """The masks of the samples [B, 3] = (epoch, clip, crop) under the run's seed."""
        if sample_ids is None:
            raise ValueError("give sample_ids, which key the random masks, or a masking; neither was given")
        return random_masking(self.seed, sample_ids, self.grid.num_patches, self.num_keep, self.backend)


class Encoder(nn.Module):
    """A vision transformer over patches of a spectrogram that sees the visible ones only.

    Parameters are uninitialised until `initialize`.
    """

    def __init__(self, model: Model, grid: PatchGrid):
        super().__init__()
        geometry = model.geometry
        self.grid = grid
        self.num_prefix = int(model.cls_token)
        self.backend = _checked_backend(model)
        if model.cls_token:
            self.cls_token = nn.Parameter(torch.empty(1, 1, geometry.embed_dim))
        self.patch_embed = PatchEmbed(grid.patch, geometry.embed_dim, self.backend)
        self.positions = PositionTable(sincos_2d(grid, geometry.embed_dim, self.num_prefix))
        self.blocks = nn.ModuleList(
            Block(geometry.embed_dim, geometry.num_heads, model.key_bias, self.backend, model.activation_checkpointing)
            for _ in range(geometry.depth)
        )
        self.norm = nn.LayerNorm(geometry.embed_dim, eps=NORM_EPS)

    def forward(self, spectrogram: Tensor, masking: Masking | None = None) -> Tensor:
        """Encode [B, 1, F, T] to tokens [B, P + K, D]; without a masking every patch is visible, K = L.

        T may be any multiple of the patch width: the position table is made for the grid at hand.
        """
        x = self._embed(spectrogram, masking)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def features(self, spectrogram: Tensor) -> Tensor:
        """Patch features [B, L, D] of whole spectrograms [B, 1, F, T], any T; the CLS token is left out."""
        return self(spectrogram)[:, self.num_prefix :]

    def layers(self, spectrogram: Tensor) -> Iterator[Tensor]:
        """Patch features [B, L, D] before the first block and after each, 1 + depth in all, without the final norm."""
        x = self._embed(spectrogram, None)
        yield x[:, self.num_prefix :]
        for block in self.blocks:
            x = block(x)
            yield x[:, self.num_prefix :]

    def _embed(self, spectrogram: Tensor, masking: Masking | None) -> Tensor:
        """What enters the first block: visible patches with their positions, after the CLS token."""
        positions = self._positions(spectrogram)
        if masking is None:
            masking = _all_visible(spectrogram.shape[0], positions.shape[0] - self.num_prefix, positions.device)
        x = self.patch_embed(spectrogram, masking, positions[self.num_prefix :])
        if self.num_prefix:
            cls = (self.cls_token + positions[: self.num_prefix]).to(x.dtype)
            x = torch.cat([cls.expand(x.shape[0], -1, -1), x], dim=1)
        return x

    def _positions(self, spectrogram: Tensor) -> Tensor:
        """The table [P + L, D] for the number of frames at hand."""
        bands, width = self.grid.n_mels, self.grid.patch[1]
        frames = spectrogram.shape[-1]
        if tuple(spectrogram.shape[1:-1]) != (1, bands) or frames % width or not frames:
            raise ValueError(
                f"spectrogram is {list(spectrogram.shape)}: must be [B, 1, {bands}, frames] with frames a "
                f"multiple of the patch width {width}; pad the waveform or cut the spectrogram"
            )
        table = self.positions()
        if frames == self.grid.frames:
            return table
        grid = PatchGrid(bands, frames, self.grid.patch)
        return sincos_2d(grid, table.shape[1], self.num_prefix).to(table)


class PatchEmbed(nn.Module):
    """The linear projection of patches; `weight` [D, ph * pw] sees a patch row by row."""

    def __init__(self, patch: tuple[int, int], width: int, backend: Backend):
        super().__init__()
        self.patch = patch
        self.backend: Backend = backend
        self.weight = nn.Parameter(torch.empty(width, patch[0] * patch[1]))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, spectrogram: Tensor, masking: Masking, positions: Tensor) -> Tensor:
        """Tokens [B, K, D] of the visible patches, positions [L, D] added."""
        return embed_visible_patches(spectrogram, masking, self.weight, self.bias, positions, self.patch, self.backend)


class Decoder(nn.Module):
    """A smaller transformer over all patches that predicts the pixels of the masked ones.

    Parameters are uninitialised until `initialize`.
    """

    def __init__(self, model: Model, grid: PatchGrid):
        super().__init__()
        geometry = model.geometry
        width = geometry.decoder_embed_dim
        self.num_prefix = int(model.cls_token)
        self.backend = _checked_backend(model)
        if model.decoder_positions == "1d":
            table = sincos_1d(grid.num_patches, width, self.num_prefix)
        else:
            table = sincos_2d(grid, width, self.num_prefix)
        self.embed = nn.Linear(geometry.embed_dim, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.positions = PositionTable(table)
        self.blocks = nn.ModuleList(
            Block(width, geometry.decoder_num_heads, model.key_bias, self.backend, model.activation_checkpointing)
            for _ in range(geometry.decoder_depth)
        )
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.pred = nn.Linear(width, grid.patch_pixels)

    def forward(self, latent: Tensor, masking: Masking) -> Tensor:
        """Latent tokens [B, P + K, D] to the pixels [B, M, ph * pw] of the masked patches."""
        x = self.embed(latent)
        x = restore_tokens(x, masking, self.mask_token, self.positions(), self.num_prefix, self.backend)
        for block in self.blocks:
            x = block(x)
        x = select_masked_tokens(x, masking, self.num_prefix, self.backend)  # [B, M, E]: the others aren't scored
        return self.pred(self.norm(x))


def initialize(module: nn.Module, seed: int) -> None:
    """Set every parameter, as a function of `seed` alone, on any machine.

    Weights of linear maps xavier-uniform (the patch projection as one of them, queries, keys and values as
    one), biases 0, norms 1 and 0, CLS and mask token N(0, 0.02).
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 3:
                parameter.normal_(std=TOKEN_STD, generator=generator)
            elif parameter.ndim == 2:
                nn.init.xavier_uniform_(parameter, generator=generator)
            else:
                parameter.zero_()
        for part in module.modules():
            if isinstance(part, nn.LayerNorm):
                part.weight.fill_(1.0)


def _all_visible(batch: int, num_patches: int, device: torch.device) -> Masking:
    ids = torch.arange(num_patches, device=device)
    return masking_from_keep(ids.expand(batch, -1), num_patches)


def _checked_backend(model: Model) -> Backend:
    try:
        require(model.backend)
    except BackendUnavailable as error:
        raise ConfigError(f"model.backend: {error}") from None
    return model.backend
