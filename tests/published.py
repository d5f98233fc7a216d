"""State dicts of the published checkpoints, by the names and shapes that the method's authors published."""

import torch
from torch import Tensor

from msm_dist.model.patches import PatchGrid, sincos_1d, sincos_2d

BASE = {"width": 768, "depth": 12, "decoder_width": 384, "decoder_depth": 4}
TINY = {"width": 192, "depth": 4, "decoder_width": 96, "decoder_depth": 2}
PAPER, RERUN = "paper", "re-run"


def shapes(
    patch: tuple[int, int], generation: str, sizes: dict[str, int], cls_token: bool = True
) -> dict[str, list[int]]:
    """Every tensor but the tables and norm_stats."""
    width, decoder_width = sizes["width"], sizes["decoder_width"]
    found = {
        "mask_token": [1, 1, decoder_width],
        "patch_embed.proj.weight": [width, 1, *patch],
        "patch_embed.proj.bias": [width],
        "norm.weight": [width],
        "norm.bias": [width],
        "decoder_embed.weight": [decoder_width, width],
        "decoder_embed.bias": [decoder_width],
        "decoder_norm.weight": [decoder_width],
        "decoder_norm.bias": [decoder_width],
        "decoder_pred.weight": [patch[0] * patch[1], decoder_width],
        "decoder_pred.bias": [patch[0] * patch[1]],
    }
    if cls_token:
        found["cls_token"] = [1, 1, width]
    for number in range(sizes["depth"]):
        found |= block(f"blocks.{number}.", width, generation)
    for number in range(sizes["decoder_depth"]):
        found |= block(f"decoder_blocks.{number}.", decoder_width, generation)
    return found


def block(prefix: str, width: int, generation: str) -> dict[str, list[int]]:
    """The tensors of one transformer block: 13 in the paper's generation, 12 in the re-run's."""
    biases = {"attn.q_bias": [width], "attn.v_bias": [width]} if generation == PAPER else {"attn.qkv.bias": [3 * width]}
    parts = biases | {
        "norm1.weight": [width],
        "norm1.bias": [width],
        "attn.qkv.weight": [3 * width, width],
        "attn.proj.weight": [width, width],
        "attn.proj.bias": [width],
        "norm2.weight": [width],
        "norm2.bias": [width],
        "mlp.fc1.weight": [4 * width, width],
        "mlp.fc1.bias": [4 * width],
        "mlp.fc2.weight": [width, 4 * width],
        "mlp.fc2.bias": [width],
    }
    return {prefix + name: shape for name, shape in parts.items()}


def tables(
    frames: int, patch: tuple[int, int], generation: str, sizes: dict[str, int], cls_token: bool = True
) -> dict[str, Tensor]:
    """The two position tables."""
    grid, prefix = PatchGrid(80, frames, patch), int(cls_token)
    width = sizes["decoder_width"]
    decoder = sincos_1d(grid.num_patches, width, prefix) if generation == PAPER else sincos_2d(grid, width, prefix)
    return {"pos_embed": sincos_2d(grid, sizes["width"], prefix)[None], "decoder_pos_embed": decoder[None]}


def random_state(
    frames: int, patch: tuple[int, int], generation: str, sizes: dict[str, int], cls_token: bool = True
) -> dict[str, Tensor]:
    """A state dict in which every value that is learnt is drawn."""
    generator = torch.Generator().manual_seed(frames)
    state = {
        name: torch.randn(shape, generator=generator)
        for name, shape in shapes(patch, generation, sizes, cls_token).items()
    }
    statistics = {"norm_stats": torch.tensor([-7.1, 4.2])} if generation == RERUN else {}
    return state | tables(frames, patch, generation, sizes, cls_token) | statistics
