"""Tensors by name beside those that a model has: what differs, said so that a user can act on it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from msm_dist.config import Model, geometry_conflicts
from msm_dist.errors import CheckpointError, ConfigError
from msm_dist.model.mae import Decoder, Encoder, MaskedSpectrogramModel
from msm_dist.model.patches import PatchGrid

NAMES_SHOWN = 4
MAX_TABLE_VALUES = 2**27  # of a crop of an hour and a half, at width 768


def differences(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """How tensors differ in names and shapes from those expected, in one line; empty where they don't."""
    wrong = [
        f"{name} {list(state[name].shape)} (expected {list(expected[name].shape)})"
        for name in expected
        if name in state and state[name].shape != expected[name].shape
    ]
    faults = {
        "missing": [name for name in expected if name not in state],
        "unknown": [name for name in state if name not in expected],
        "wrong shape": wrong,
    }
    return "; ".join(f"{kind}: {some(names)}" for kind, names in faults.items() if names)


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def parameters_of(model: Model, source: str) -> dict[str, Tensor]:
    """The parameters of a model by name, shapes without memory: what files must match before any is made.

    Raises CheckpointError, which names `source`, where there can be no such model.
    """
    if faults := list(geometry_conflicts(model)):
        raise CheckpointError(f"{source}: {faults[0]}")
    height, width = model.patch
    grid = PatchGrid(2 * height, width, model.patch)  # the parameters are those of any grid
    try:
        with torch.device("meta"):
            parts = nn.ModuleDict({"encoder": Encoder(model, grid), "decoder": Decoder(model, grid)})
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error}") from None
    return parts.state_dict()


def built(model: Model, n_mels: int, crop_frames: int, source: str) -> MaskedSpectrogramModel:
    """A model of this geometry. Raises CheckpointError, which names `source`, where there can be none."""
    try:
        grid = PatchGrid(n_mels, crop_frames, model.patch)
        widest = max(model.geometry.embed_dim, model.geometry.decoder_embed_dim)
        if grid.num_patches * widest > MAX_TABLE_VALUES:
            raise CheckpointError(
                f"{source}: {grid.num_patches} patches of width {widest}: their position table is too large; crops of "
                f"{crop_frames} frames are no training's"
            )
        return MaskedSpectrogramModel(model, n_mels, crop_frames)
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error}") from None
