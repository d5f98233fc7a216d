"""AdamW's parameter groups and the learning rate as a pure function of the step."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups: weights are decayed, 1-D tensors (biases, norms) are not.

    CLS and mask token are 3-D and so are decayed, as in the published code.
    """
    decayed, plain = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (plain if parameter.ndim <= 1 else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def build_optimizer(
    model: nn.Module, betas: tuple[float, float], weight_decay: float, device: torch.device
) -> torch.optim.AdamW:
    """AdamW over `model`; its learning rate is set before every step."""
    return adamw(parameter_groups(model, weight_decay), betas, device)


def adamw(groups: Sequence[dict[str, Any]], betas: tuple[float, float], device: torch.device) -> torch.optim.AdamW:
    """AdamW over groups of parameters on `device`; a group's `lr_scale`, if it has one, multiplies its learning rate.

    The learning rate is set before every step (`engine.zero.set_lr`).
    """
    return torch.optim.AdamW(list(groups), lr=0.0, betas=betas, eps=1e-8, fused=device.type == "cuda")


def lr_at(step: int, peak: float, warmup_steps: float, total_steps: int) -> float:
    """Learning rate of the update after `step` updates: linear warm-up from 0, then half a cosine to 0."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps)))
