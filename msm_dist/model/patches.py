"""The grid of patches on a spectrogram, and the fixed position tables of encoder and decoder.

A spectrogram [B, 1, F, T] is cut into patches of ph x pw (bands x frames): L = Fg * Tg of them, numbered
frequency-major (index = f * Tg + t), pixels row-major (f, t). Fails with ConfigError where patches don't fit.
Legend: B clips, F mel bands, T frames, Fg x Tg the grid, L patches, P prefix tokens (1 with CLS), D width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from msm_dist.errors import ConfigError
from msm_kernels import reference
from msm_kernels.reference import patchify

__all__ = ["PatchGrid", "PositionTable", "patchify", "sincos_1d", "sincos_2d", "unpatchify"]


@dataclass(frozen=True)
class PatchGrid:
    """The patches of one spectrogram: bands, frames and the patch (height in bands, width in frames)."""

    n_mels: int
    frames: int
    patch: tuple[int, int]

    def __post_init__(self) -> None:
        height, width = self.patch
        if min(self.n_mels, self.frames, height, width) < 1 or self.n_mels % height or self.frames % width:
            raise ConfigError(
                f"{self.n_mels} mel bands x {self.frames} frames: must be a whole number of {height}x{width} "
                "patches; change model.patch_size, features.n_mels or data.crop_frames"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Fg, Tg: patches along frequency and along time."""
        return self.n_mels // self.patch[0], self.frames // self.patch[1]

    @property
    def num_patches(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def patch_pixels(self) -> int:
        return self.patch[0] * self.patch[1]


def unpatchify(patches: Tensor, grid: PatchGrid) -> Tensor:
    """Patches [B, L, ph * pw] back to a spectrogram [B, 1, F, T]: the inverse of `patchify`."""
    return reference.unpatchify(patches, (grid.n_mels, grid.frames), grid.patch)


def sincos_2d(grid: PatchGrid, width: int, num_prefix: int = 0) -> Tensor:
    """Position table float32 [P + L, D]: first half of D encodes time, second half frequency.

    Each half is [sin | cos] of position / 10000^(i / (D / 4)), i < D / 4; prefix rows are zero.
    """
    if width % 4:
        raise ConfigError(f"model width {width}: must be a multiple of 4 for the 2-D position table")
    rows, columns = grid.shape
    frequency, time = torch.meshgrid(_count(rows), _count(columns), indexing="ij")
    table = torch.cat([_sin_and_cos(time.flatten(), width // 2), _sin_and_cos(frequency.flatten(), width // 2)], 1)
    return torch.cat([table.new_zeros(num_prefix, width), table]).float()


def sincos_1d(num_patches: int, width: int, num_prefix: int = 0) -> Tensor:
    """Position table float32 [P + L, D] over the flat patch index, sine and cosine interleaved.

    Dim j holds sin (j even) or cos (j odd) of position / 10000^(2 * (j // 2) / D); prefix rows are zero.
    """
    dims = _count(width)
    angles = _count(num_patches)[:, None] / 10000.0 ** (2 * (dims // 2) / width)
    table = torch.where(dims % 2 == 0, angles.sin(), angles.cos())
    return torch.cat([table.new_zeros(num_prefix, width), table]).float()


class PositionTable(nn.Module):
    """A fixed table that follows its model to any device, but never below float32.

    Casting the model to bfloat16 or float16 leaves it float32, and no chain of casts changes its values. It
    is not part of the state_dict: the geometry determines it.
    """

    def __init__(self, table: Tensor):
        super().__init__()
        self.register_buffer("table", table, persistent=False)

    def forward(self) -> Tensor:
        """The table [P + L, D]."""
        return self.table

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PositionTable":
        moved = fn(self.table)
        self.table = self.table.to(moved.device, torch.promote_types(moved.dtype, torch.float32))
        return self


def _count(length: int) -> Tensor:
    # The tables are values, not parameters: on the CPU whatever device a model is being built on.
    return torch.arange(length, dtype=torch.float64, device="cpu")


def _sin_and_cos(positions: Tensor, width: int) -> Tensor:
    angles = positions[:, None] / 10000.0 ** (_count(width // 2) / (width // 2))
    return torch.cat([angles.sin(), angles.cos()], dim=1)
