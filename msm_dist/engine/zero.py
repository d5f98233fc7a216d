"""The DeepSpeed engine: its configuration as a pure function of ours, and its construction.

DeepSpeed owns the optimiser step, ZeRO, precision, clipping and accumulation. Batch sizes, precision and
clipping have one home, the YAML; a DeepSpeed file that contradicts them is a ConfigError.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import deepspeed
import msm_configs
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.runtime.utils import combine_grad_norm_groups, get_global_norm_of_tensors
from deepspeed.runtime.zero.utils import ZeRORuntimeException
from pydantic import ValidationError
from torch import nn

from msm_dist.config import BatchLayout, Engine, Optim, stage_conflicts
from msm_dist.engine.compilation import explaining_compiler, prepare_blocks
from msm_dist.engine.optim import adamw, parameter_groups
from msm_dist.engine.state import link_optimizer_state, was_refused
from msm_dist.errors import ConfigError
from msm_dist.settings import flat_items, merged

OFFLOADS = {"offload_param": "parameters", "offload_optimizer": "optimizer"}


class Batches(Protocol):
    """Sizes of batches, and the arithmetic."""

    global_batch: int
    micro_batch: int
    precision: Literal["fp32", "bf16", "fp16"]


class EngineSettings(Protocol):
    """What an engine is made by: these sections of a configuration, of pre-training or of fine-tuning."""

    optim: Optim
    train: Batches
    engine: Engine


def deepspeed_config(cfg: EngineSettings, layout: BatchLayout) -> dict[str, Any]:
    """DeepSpeed's configuration for a run. Raises ConfigError for a file that can't be used."""
    if cfg.engine.deepspeed:
        path = Path(cfg.engine.deepspeed)
    else:
        offload = "" if cfg.engine.offload == "none" else f"_offload_{cfg.engine.offload}"
        path = Path(msm_configs.__path__[0]) / "deepspeed" / f"zero{cfg.engine.zero_stage}{offload}.json"
    values = _read_json(path)
    zero = values.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if type(stage) is not int or stage not in range(4):
        raise ConfigError(f"{path}: zero_optimization.stage = {stage!r}: must be there, as 0, 1, 2 or 3")
    if faults := [*_unknown_offload(zero), *stage_conflicts(stage, _offload(zero), cfg.train.precision)]:
        raise ConfigError("\n".join(f"{path}: {fault}" for fault in faults))
    owned = {
        "train_batch_size": cfg.train.global_batch,
        "train_micro_batch_size_per_gpu": cfg.train.micro_batch,
        "gradient_accumulation_steps": layout.accumulation,
        # At stage 0 the optimiser's hook clips: it also needs the norm, which DeepSpeed throws away there.
        "gradient_clipping": (cfg.optim.clip_norm or 0.0) if stage else 0.0,
        # A non-finite gradient is never applied: stages 1 and 2 can be told not to look.
        "bf16": {"enabled": cfg.train.precision == "bf16", "check_grad_overflow": True},
        "zero_optimization": {"compute_grad_norm": True},
        "fp16": {"enabled": cfg.train.precision == "fp16"},
        # Gradients are summed in fp32 over micro-batches AND over ranks: DeepSpeed's defaults follow the
        # precision of the model in both.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        # The optimiser is torch's AdamW wherever its state lies.
        "zero_force_ds_cpu_optimizer": False,
        # It waits for the device twice in every micro-batch.
        "timers": {"throughput": {"enabled": False}},
    }
    given = flat_items(values)
    contradictions = [
        f"{path}: {name} = {given[name]!r} contradicts the run's {value!r}; remove it, the YAML is its only home"
        for name, value in flat_items(owned).items()
        if name in given and given[name] != value
    ]
    unused = [
        f"{path}: {name}: not ours to pass on; remove it" for name in ("optimizer", "scheduler") if name in values
    ]
    if contradictions or unused:
        raise ConfigError("\n".join(contradictions + unused))
    return merged(values, owned) | {"steps_per_print": None}


def build_engine(
    model: nn.Module,
    cfg: EngineSettings,
    layout: BatchLayout,
    device: torch.device,
    groups: Sequence[dict[str, Any]] | None = None,
) -> deepspeed.DeepSpeedEngine:
    """`model` under DeepSpeed with AdamW; same parameters whatever the world size.

    `groups` of its parameters (engine.optim), else weights with decay and 1-D tensors without.
    """
    check_precision(cfg.train.precision, device)
    values = deepspeed_config(cfg, layout)
    stage = values["zero_optimization"]["stage"]
    prepare_blocks(model, cfg.engine.compile)
    model.to(device)
    optimizer = adamw(groups or parameter_groups(model, cfg.optim.weight_decay), cfg.optim.betas, device)
    if stage == 0:
        optimizer.register_step_pre_hook(_clip_or_refuse(cfg.optim.clip_norm))
    try:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=values)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise ConfigError(f"{cfg.engine.deepspeed or 'DeepSpeed'}: {'; '.join(faults)}") from None
    except (DeepSpeedConfigError, ZeRORuntimeException) as error:
        raise ConfigError(f"{cfg.engine.deepspeed or 'DeepSpeed'}: {error}") from None
    if cfg.train.precision == "fp16":
        # Diverged says it better, and on all ranks at once.
        engine.optimizer.loss_scaler.raise_error_at_min_scale = False
    return engine


def check_precision(precision: str, device: torch.device) -> None:
    """Raise ConfigError for fp16 without a GPU."""
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError(
            "train.precision = fp16: needs a GPU; on a CPU its products are slower than fp32's. Take bf16 or fp32"
        )


def dry_run(engine: deepspeed.DeepSpeedEngine, spectrogram: torch.Tensor, sample_ids: torch.Tensor) -> None:
    """`rehearse` the masked autoencoder on made-up input."""
    rehearse(engine, lambda: engine(spectrogram, sample_ids=sample_ids).loss)


@explaining_compiler()
def rehearse(engine: deepspeed.DeepSpeedEngine, forward: Callable[[], torch.Tensor]) -> None:
    """One whole step on a loss of made-up input, so that memory runs out now or never; the caller sets the state after.

    A whole accumulation cycle with its update: less would leave gradients or counters behind. In fp16 cycles are
    repeated until the loss scale is small enough for an update.
    """
    skipped = -1
    while skipped < engine.skipped_steps and not was_refused(engine):
        skipped = engine.skipped_steps
        for _ in range(engine.gradient_accumulation_steps()):
            engine.backward(forward())
            engine.step()
    if was_refused(engine):
        error = ConfigError(
            "the model's loss or a gradient is not finite on made-up input: look at the model and at the weights it "
            "starts from, or take train.precision=fp32"
        )
        error.on_all_ranks = True
        raise error
    engine.skipped_steps = 0
    link_optimizer_state(engine)


@contextlib.contextmanager
def fitting_memory(device: torch.device, micro_batch: int) -> Iterator[None]:
    """Turn a lack of memory into a ConfigError that says which settings to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "alloc" not in str(error):
            raise
        raise ConfigError(
            f"train.micro_batch = {micro_batch}: model, optimiser and a step do not fit the memory of {device}; lower "
            "train.micro_batch (train.global_batch, and with it the result, stays), or take "
            "model.activation_checkpointing=true, a higher engine.zero_stage or engine.offload; `msm-dist plan` says "
            "what each needs"
        ) from None


def describe_engine(engine: deepspeed.DeepSpeedEngine) -> str:
    """Stage and offload as they are, whichever file they come from."""
    config = engine.config.get("zero_optimization", {})
    offload = {"none": "", "optimizer": ", optimiser in host memory", "parameters": ", parameters in host memory"}
    return f"ZeRO {engine.zero_optimization_stage()}{offload[_offload(config)]}"


def set_lr(engine: deepspeed.DeepSpeedEngine, lr: float) -> None:
    """Learning rate of the next update, of each group by its scale."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def refuse_norms_above(engine: deepspeed.DeepSpeedEngine, bound: float) -> None:
    """From now on leave out an update whose global gradient norm, before clipping, is above `bound`.

    Where DeepSpeed judges the norm it is told of an infinite one instead. It reads the norm in every update, so that
    the host waits for the device no more often than before.
    """
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    optimizer.norm_bound = bound

    def judged(norm: torch.Tensor, norms: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        optimizer.norm_found = norm
        return [torch.where(norm > bound, torch.inf, value) for value in norms]

    if isinstance(optimizer, BF16_Optimizer):
        of_norm = optimizer.get_grads_for_norm

        def grads_for_norm(for_clipping: bool = False) -> Any:
            if for_clipping:
                return of_norm(for_clipping)
            grads, others = of_norm()
            # One gradient tells of the norm; a copy of it, as the others' numbers must stay.
            smallest = min(range(len(grads)), key=lambda i: grads[i].numel())
            grads[smallest] = judged(get_global_norm_of_tensors(grads), [grads[smallest]])[0]
            return grads, others

        optimizer.get_grads_for_norm = grads_for_norm
    elif stage == 3:
        of_groups = optimizer._get_norm_groups

        def norm_groups() -> list[torch.Tensor]:
            norms = of_groups()
            return judged(combine_grad_norm_groups(norms), norms)

        optimizer._get_norm_groups = norm_groups
    elif stage:
        of_all = optimizer.scaled_global_norm

        def norm_of_all() -> torch.Tensor:
            norm = of_all()
            return judged(norm, [norm])[0]

        optimizer.scaled_global_norm = norm_of_all


def take_norm_found(engine: deepspeed.DeepSpeedEngine) -> torch.Tensor | None:
    """The gradient norm that was compared with a bound in the last update, if one was; to be asked for once."""
    norm, engine.optimizer.norm_found = getattr(engine.optimizer, "norm_found", None), None
    return norm


def forget_refused(engine: deepspeed.DeepSpeedEngine) -> None:
    """Drop the gradients of an update that was left out, where DeepSpeed would add the next ones to them.

    0.19.8 does so in 16 bit with the optimiser offloaded at stages 1 and 2.
    """
    if engine.zero_optimization_stage() in (1, 2) and getattr(engine.optimizer, "cpu_offload", False):
        sums = engine.optimizer.averaged_gradients
        sums.update(dict.fromkeys(sums))


def _clip_or_refuse(clip_norm: float | None) -> Callable[[torch.optim.Optimizer, Any, Any], None]:
    """What the other stages do around Adam's step: clip, keep the norm, leave out a non-finite update.

    DeepSpeed reads `_global_grad_norm` and `overflow` from any optimiser that has them.
    """

    def before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip_norm or math.inf)
        optimizer.norm_found = norm
        optimizer.overflow = not bool(norm.isfinite() & (norm <= getattr(optimizer, "norm_bound", math.inf)))
        optimizer._global_grad_norm = math.inf if optimizer.overflow else norm
        if optimizer.overflow:
            for parameter in parameters:
                parameter.grad = None  # torch's AdamW passes over it, decay and all

    return before_step


def _offload(zero: dict[str, Any]) -> str:
    """What a DeepSpeed file moves to host memory, in the words of engine.offload."""
    for part, word in OFFLOADS.items():
        if isinstance(zero.get(part), dict) and zero[part].get("device", "none") != "none":
            return word
    return "none"


def _unknown_offload(zero: dict[str, Any]) -> Iterator[str]:
    """Ways to offload that nobody has tried with this engine."""
    for part in OFFLOADS:
        settings = zero.get(part)
        if settings is None:
            continue
        if not isinstance(settings, dict) or settings.get("device", "none") not in ("none", "cpu"):
            yield f"zero_optimization.{part} = {settings!r}: must be an object with device cpu, or be left out"
        elif settings.get("ratio", 1) != 1:
            yield f"zero_optimization.{part}.ratio = {settings['ratio']}: must be 1, or be left out"
    for legacy in ("cpu_offload", "cpu_offload_params"):
        if zero.get(legacy):
            yield f"zero_optimization.{legacy} = {zero[legacy]!r}: write offload_optimizer or offload_param instead"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such DeepSpeed file; leave engine.deepspeed out to use ours") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold a JSON object")
    return values
