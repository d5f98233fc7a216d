"""What an encoder is given, checked: waveforms, lengths, layers, devices and statistics.

In: what a caller gives. Out: the same in one form, waveforms as tensors without gradients. Fails with DataError on
audio that can't be embedded, with ConfigError on a wrong setting; each message names the value and the rule.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from msm_dist.errors import ConfigError, DataError
from msm_dist.evaluate.normalization import Normalization, Statistics
from msm_dist.evaluate.recordings import checked_rate
from msm_dist.model.weights import WeightsInfo

Layer = int | Literal["all"] | None


def checked_batch(waveform: Tensor | np.ndarray, sample_rate: int) -> tuple[Tensor, int]:
    """Clips [B, S], which must be finite where they are not padding (`checked_finite`), and their rate."""
    waveform = _tensor(waveform, "waveform")
    if waveform.ndim != 2 or not waveform.is_floating_point():
        raise DataError(
            f"waveform is {waveform.dtype} {list(waveform.shape)}: must be floating point [clips, samples] "
            "in [-1, 1]; a single clip is waveform[None], int16 samples are waveform / 32768"
        )
    if not waveform.numel():
        raise DataError(f"waveform is {list(waveform.shape)}: must hold at least one clip and one sample")
    return waveform, checked_rate(sample_rate)


def checked_clip(waveform: Tensor | np.ndarray) -> Tensor:
    """A clip or block [S]."""
    waveform = _tensor(waveform, "waveform")
    if waveform.ndim != 1 or not waveform.is_floating_point():
        raise DataError(
            f"waveform is {waveform.dtype} {list(waveform.shape)}: here it must be floating point [samples] in [-1, 1]"
        )
    return checked_finite(waveform)


def checked_finite(waveform: Tensor) -> Tensor:
    """Samples without NaN and infinity."""
    if not torch.isfinite(waveform).all():
        raise DataError("waveform holds NaN or infinite samples: leave those clips out")
    return waveform


def checked_lengths(lengths: Tensor | np.ndarray | Sequence[int], waveform: Tensor) -> list[int]:
    """The samples of each clip of a batch."""
    found = _tensor(lengths, "lengths")
    most = waveform.shape[1]
    if found.shape != (len(waveform),) or found.is_floating_point() or not ((found > 0) & (found <= most)).all():
        raise DataError(
            f"lengths is {found.dtype} {list(found.shape)}, {found.tolist()[:4]}: must be the samples of each of the "
            f"{len(waveform)} clips, whole numbers from 1 to {most}"
        )
    return found.tolist()


def check_layer(layer: Layer, depth: int) -> None:
    """Whether a layer is one of an encoder's."""
    if layer not in (None, "all") and not (type(layer) is int and 0 <= layer <= depth):
        raise ConfigError(f'layer = {layer!r}: this encoder has layers 0 to {depth}; or "all"')


def checked_device(device: str | torch.device) -> torch.device:
    """A device that is there."""
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device = {device!r}: must be cpu, cuda or cuda:N") from None
    if found.type == "cuda" and not (found.index or 0) < torch.cuda.device_count():
        raise ConfigError(f"device = {device}: torch sees {torch.cuda.device_count()} GPUs here; use cpu")
    return found


def checked_statistics(name: str, statistics: Statistics | None, info: WeightsInfo) -> Statistics | None:
    """The mean and deviation to normalise with; None where every batch has its own."""
    if name not in get_args(Normalization):
        raise ConfigError(f"normalization = {name!r}: must be one of {', '.join(get_args(Normalization))}")
    if name == "dataset":
        if statistics is None:
            raise ConfigError(
                "normalization = dataset: needs the data set's statistics; Encoder.for_dataset makes them"
            )
        return checked_mean_and_std(statistics)
    if statistics is not None:
        raise ConfigError(f"normalization = {name}: statistics were given, which go with normalization = dataset")
    return Statistics(info.features.mean, info.features.std) if name == "checkpoint" else None


def checked_mean_and_std(statistics: Sequence[float]) -> Statistics:
    """A mean and a deviation that a log-mel can be normalised with."""
    try:
        mean, std = map(float, statistics)
    except (TypeError, ValueError, OverflowError):
        mean = std = math.nan
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        raise ConfigError(
            f"statistics = {statistics}: must be the mean and the standard deviation of a log-mel, finite numbers, the "
            "second above 0; Encoder.for_dataset measures them"
        )
    return Statistics(mean, std)


def _tensor(values: Any, name: str) -> Tensor:
    """What torch, numpy or a list holds, as a tensor without gradient."""
    if isinstance(values, np.ndarray):
        taken = values.flags.writeable and values.dtype.isnative
        if not taken or min(values.strides, default=0) < 0:
            # torch takes no array that runs backwards or has another byte order, and warns of one that is read-only.
            values = values.astype(values.dtype.newbyteorder("="), order="C")
    try:
        return torch.as_tensor(values).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{name} is a {type(values).__name__}: must be an array of numbers ({error})") from None
