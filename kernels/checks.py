"""What the public functions check of their arguments. All raise ValueError and read no values of tensors."""

import torch
from torch import Tensor


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} is {list(tensor.shape)}: must be {list(shape)}")


def check_device(device: torch.device, **tensors: Tensor) -> None:
    """A kernel that reads memory of another device ends the process."""
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}: must be on {device}, where the other tensors are")


def check_floating(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}: must be a floating-point tensor")
