"""An engine's training state by parameter name: fp32 masters, Adam's moments and step, loss scale.

In: a DeepSpeed engine at any ZeRO stage, precision and offload. Out: whole tensors, the same whatever the stage;
setting them leaves the engine as if it had trained to there. Reading is a collective. The optimiser has state to
read or to set once it has made an update: `engine.zero.dry_run` makes one.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from msm_dist.engine.stored import MASTER, PARTS

LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def shapes(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Size]:
    """Every trainable parameter's whole shape, in the order of the model."""
    return {name: getattr(parameter, "ds_shape", parameter.shape) for name, parameter in _trainable(engine)}


def full_state(engine: deepspeed.DeepSpeedEngine) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Name and {param, exp_avg, exp_avg_sq}, whole and fp32, of one parameter after the other; a collective."""
    for name, parameter in _trainable(engine):
        yield name, {part: _whole(engine, parameter, part) for part in PARTS}


def full_weights(engine: deepspeed.DeepSpeedEngine) -> Iterator[tuple[str, Tensor]]:
    """Name and fp32 master of every parameter, on the host; a collective."""
    for name, parameter in _trainable(engine):
        yield name, _whole(engine, parameter, MASTER).to("cpu", torch.float32, copy=True)


def set_state(
    engine: deepspeed.DeepSpeedEngine,
    read: Callable[[str, str], Tensor],
    optimizer_step: float,
    loss_scale: Mapping[str, Any] | None = None,
) -> None:
    """Set every parameter's parts to `read(part, name)`, whole fp32 tensors, and the counters beside them.

    No collective; `refresh_weights` must follow.
    """
    for name, parameter in _trainable(engine):
        for part in PARTS:
            _assign(engine, parameter, part, read(part, name))
    for state in adam_states(engine):
        state["step"].fill_(optimizer_step)
    _set_loss_scale(engine, loss_scale)


def reset(engine: deepspeed.DeepSpeedEngine, weights: Mapping[str, Tensor]) -> None:
    """Set the engine to the state before its first update: these fp32 weights, empty moments; a collective."""
    set_state(engine, lambda part, name: weights[name] if part == MASTER else torch.zeros_like(weights[name]), 0.0)
    refresh_weights(engine)


def optimizer_step(engine: deepspeed.DeepSpeedEngine) -> float:
    """Updates Adam has made: in fp16 fewer than steps, as DeepSpeed leaves out those that overflow."""
    steps = {float(state["step"]) for state in adam_states(engine)}
    if len(steps) != 1:
        raise AssertionError(f"parameter groups are at different steps: {steps}")
    return steps.pop()


def loss_scale(engine: deepspeed.DeepSpeedEngine) -> dict[str, Any] | None:
    """The state of fp16's dynamic loss scale, as plain numbers; None in other precisions."""
    scaler = _loss_scaler(engine)
    return {name: getattr(scaler, name) for name in LOSS_SCALE} if scaler else None


def adam_states(engine: deepspeed.DeepSpeedEngine) -> list[dict[str, Tensor]]:
    """Adam's own dictionaries, one per flat partition or parameter."""
    return list(_adam(engine).state.values())


def was_refused(engine: deepspeed.DeepSpeedEngine) -> bool:
    """Whether the last update was left out for its gradient; in fp16, whether at the smallest loss scale too."""
    scaler = _loss_scaler(engine)
    if scaler is None:
        # Before its first step torch's AdamW, which stage 0 has, knows of no overflow.
        return getattr(engine.optimizer, "overflow", False)
    return engine.optimizer.overflow and scaler.cur_scale <= scaler.min_scale


def link_optimizer_state(engine: deepspeed.DeepSpeedEngine) -> None:
    """Make all optimiser state readable by parameter name; needed once, after the first update.

    Stages 1 and 2 link it by themselves, but after the first parameter group's step, when the other has none yet.
    """
    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def refresh_weights(engine: deepspeed.DeepSpeedEngine) -> None:
    """Recompute the model's weights from the fp32 masters; a collective."""
    stage = engine.zero_optimization_stage()
    if stage == 3:
        optimizer = engine.optimizer
        # The small parameters that every rank keeps whole are gathered anew only after they were partitioned.
        optimizer.checkpoint_event_prologue()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()
    elif stage:
        engine.optimizer.update_lp_params()


def _trainable(engine: deepspeed.DeepSpeedEngine) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad]


def _adam(engine: deepspeed.DeepSpeedEngine) -> torch.optim.Optimizer:
    """torch's AdamW, under whatever DeepSpeed has put around it."""
    return engine.optimizer.optimizer if engine.zero_optimization_stage() else engine.optimizer


def _whole(engine: deepspeed.DeepSpeedEngine, parameter: nn.Parameter, part: str) -> Tensor:
    if engine.zero_optimization_stage() == 0:
        return parameter.detach() if part == MASTER else _adam(engine).state[parameter][part]
    if part == MASTER:
        return safe_get_full_fp32_param(parameter)
    return safe_get_full_optimizer_state(parameter, part)


def _assign(engine: deepspeed.DeepSpeedEngine, parameter: nn.Parameter, part: str, value: Tensor) -> None:
    stage = engine.zero_optimization_stage()
    value = value.to(dtype=torch.float32)
    if stage == 0:
        _whole(engine, parameter, part).copy_(value)
    elif stage == 3:
        # DeepSpeed's safe_set_full_* reads past the end of a parameter that its ranks don't divide.
        share = parameter.ds_tensor.numel()
        rank, flat = torch.distributed.get_rank(parameter.ds_process_group), value.flatten()
        mine = torch.zeros(share)
        piece = flat[rank * share : (rank + 1) * share]
        mine[: piece.numel()] = piece
        if part == MASTER:
            safe_set_local_fp32_param(parameter, mine)
        else:
            safe_set_local_optimizer_state(parameter, mine, part)
    elif part == MASTER:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, part)


def _loss_scaler(engine: deepspeed.DeepSpeedEngine) -> DynamicLossScaler | None:
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return scaler if isinstance(scaler, DynamicLossScaler) else None


def _set_loss_scale(engine: deepspeed.DeepSpeedEngine, values: Mapping[str, Any] | None) -> None:
    """Without values (a new run, or one that was not fp16 before) the scale starts where DeepSpeed starts it."""
    scaler = _loss_scaler(engine)
    if scaler is None:
        return
    if values is None:
        initial_scale = float(engine._config.float16_config.initial_dynamic_scale())
        values = dict(zip(LOSS_SCALE, (initial_scale, 0, -1, scaler.delayed_shift), strict=True))
    for name in LOSS_SCALE:
        setattr(scaler, name, values[name])
