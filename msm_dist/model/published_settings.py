"""What model the tensors of a published MSM-MAE checkpoint describe: sizes, patch, grid, CLS token, biases, decoder.

In: tensors by their published names. Out: settings of `Model` and a PatchGrid, found in names and shapes alone; the
number of heads, which leaves no trace in them, is that of the named sizes. Fails with KeyError for a missing tensor,
CheckpointError for what no published model has.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from msm_dist.config import MODEL_SIZES
from msm_dist.errors import CheckpointError
from msm_dist.model.patches import PatchGrid, sincos_1d, sincos_2d

TABLE_TOLERANCE = 1e-4  # between float32 tables computed in different orders
WEIGHT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def encoder_settings(state: Mapping[str, Tensor], label: str) -> tuple[dict[str, Any], PatchGrid]:
    """Settings of the encoder and the grid behind the tensors. Raises KeyError for a missing one, CheckpointError."""
    projection, table = (_floats(state, name, label) for name in ("patch_embed.proj.weight", "pos_embed"))
    if projection.ndim != 4 or projection.shape[1] != 1:
        raise CheckpointError(
            f"{label}: patch_embed.proj.weight is {list(projection.shape)}: an MSM-MAE has one input channel, "
            "[width, 1, bands, frames]; a model of images is none"
        )
    width, _, height, frames = projection.shape
    num_prefix = int("cls_token" in state)
    if table.ndim != 3 or table.shape[0] != 1 or table.shape[1] <= num_prefix or table.shape[2] != width:
        raise CheckpointError(f"{label}: pos_embed is {list(table.shape)}: must be [1, patches + CLS, {width}]")
    grid = _grid(table[0], num_prefix, (height, frames))
    if not _equal(table[0], sincos_2d(grid, width, num_prefix)):
        raise CheckpointError(f"{label}: pos_embed is not the fixed 2-D table of {grid}")
    encoder = _heads(width, _num_blocks(state, "blocks."), decoder=False, label=label)
    values = dict(zip(("embed_dim", "depth", "num_heads"), encoder, strict=True))
    settings = {"patch_size": f"{height}x{frames}", "cls_token": bool(num_prefix)}
    return values | settings | {"key_bias": "blocks.0.attn.qkv.bias" in state}, grid


def decoder_settings(state: Mapping[str, Tensor], grid: PatchGrid, cls_token: bool, label: str) -> dict[str, Any]:
    """Settings of the decoder. Raises KeyError for a missing tensor, CheckpointError."""
    embed, table = (_floats(state, name, label) for name in ("decoder_embed.weight", "decoder_pos_embed"))
    width = embed.shape[0] if embed.ndim == 2 else 0
    rows = int(cls_token) + grid.num_patches
    if list(table.shape) != [1, rows, width]:
        raise CheckpointError(f"{label}: decoder_pos_embed is {list(table.shape)}: must be [1, {rows}, {width}]")
    tables = {
        "1d": sincos_1d(grid.num_patches, width, int(cls_token)),
        "2d": sincos_2d(grid, width, int(cls_token)),
    }
    positions = next((name for name, ours in tables.items() if _equal(table[0], ours)), None)
    if positions is None:
        raise CheckpointError(
            f"{label}: decoder_pos_embed is neither the 1-D nor the 2-D table; take the encoder alone with "
            "encoder_only=True (--encoder-only)"
        )
    _, depth, heads = _heads(width, _num_blocks(state, "decoder_blocks."), decoder=True, label=label)
    return {
        "decoder_embed_dim": width,
        "decoder_depth": depth,
        "decoder_num_heads": heads,
        "decoder_positions": positions,
    }


def _floats(state: Mapping[str, Tensor], name: str, label: str) -> Tensor:
    """A tensor that must be there and hold weights, or a table."""
    if state[name].dtype not in WEIGHT_TYPES:
        kind = str(state[name].dtype).removeprefix("torch.")
        raise CheckpointError(f"{label}: {name} is {kind}: must be float32, or float16, bfloat16, float64")
    return state[name]


def _grid(table: Tensor, num_prefix: int, patch: tuple[int, int]) -> PatchGrid:
    """The grid behind a table [P + L, D]: the time half of a row repeats after Tg patches."""
    time = table[num_prefix:, : table.shape[1] // 2].double()
    repeats = (time - time[0]).abs().amax(dim=1)[1:] < _tolerance(table)
    columns = int(repeats.nonzero()[0]) + 1 if repeats.any() else len(time)
    return PatchGrid(len(time) // columns * patch[0], columns * patch[1], patch)


def _heads(width: int, depth: int, decoder: bool, label: str) -> tuple[int, int, int]:
    """Width, depth, heads; the heads leave no trace in the tensors and come from the named sizes."""
    for size in MODEL_SIZES.values():
        known = size[3:] if decoder else size[:3]
        if known[:2] == (width, depth):
            return known
    part = "decoder" if decoder else "encoder"
    raise CheckpointError(
        f"{label}: {part} of width {width} with {depth} blocks is no published geometry, so its number of "
        f"heads is not known; known: {', '.join(MODEL_SIZES)}"
    )


def _num_blocks(state: Iterable[str], prefix: str) -> int:
    return len({name.split(".")[1] for name in state if name.startswith(prefix)})


def _equal(table: Tensor, ours: Tensor) -> bool:
    return table.shape == ours.shape and bool((table.double() - ours).abs().max() < _tolerance(table))


def _tolerance(table: Tensor) -> float:
    """How far a table may be from ours: in half precision, its rounding."""
    return max(TABLE_TOLERANCE, torch.finfo(table.dtype).eps)
