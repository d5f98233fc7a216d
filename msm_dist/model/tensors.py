"""Tensors by name beside those that a model has: what differs, said so that a user can act on it."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from msm_dist.config import Model
from msm_dist.errors import CheckpointError, ConfigError
from msm_dist.model.mae import MaskedSpectrogramModel

NAMES_SHOWN = 4


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


def built(model: Model, n_mels: int, crop_frames: int, source: str) -> MaskedSpectrogramModel:
    """A model of this geometry. Raises CheckpointError, which names `source`, where there can be none."""
    try:
        return MaskedSpectrogramModel(model, n_mels, crop_frames)
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error}") from None
