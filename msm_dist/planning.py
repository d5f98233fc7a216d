"""`msm-dist plan`: what a configuration means on a number of processes, without starting it.

In: a configuration file, overrides, a world size, a device's name. Out: a table as text; memory, communication and
time in it are predicted by `msm_dist.memory` and `msm_dist.costs`. Raises ConfigError, DataError as the run itself
would; where the corpus can't be opened, as it is not there yet, the lines that need it say why instead.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msm_configs
import torch
from torch import nn

from msm_dist import costs, monitor
from msm_dist.config import BatchLayout, Config, batch_layout, load_config, stage_conflicts
from msm_dist.corpus import open_corpus
from msm_dist.corpus_report import corpus_rows
from msm_dist.errors import ConfigError, DataError
from msm_dist.memory import Memory, memory_of
from msm_dist.model.mae import Decoder, Encoder
from msm_dist.model.patches import PatchGrid

GIB = 2**30
WORTH = 0.3
"""Share of a step that a higher stage must be predicted to save. What it saves is communication, of which a real run
hides a part, and what its gathers cost to launch from Python is not modelled."""


@dataclass(frozen=True)
class Option:
    """One way to run a configuration, with what it is predicted to cost."""

    stage: int
    offload: str
    checkpointing: bool
    micro_batch: int
    memory: Memory
    sent: float
    """Bytes that leave a rank in a step."""
    seconds: costs.Seconds


def describe(path: str, overrides: Sequence[str], world_size: int, device_name: str = "h200") -> str:
    """Batch layout, parameters, learning rate, steps per epoch, predicted costs and a recommendation."""
    cfg = load_config(path, overrides)
    layout = batch_layout(cfg, world_size)
    if device_name not in costs.DEVICES:
        raise ConfigError(f"--device {device_name}: no such profile; choose from {', '.join(costs.DEVICES)}")
    device = costs.DEVICES[device_name]
    if cfg.engine.deepspeed:
        from msm_dist.engine.zero import deepspeed_config  # here, as DeepSpeed takes seconds to import

        deepspeed_config(cfg, layout)
    options = list(predicted(cfg, layout, device))
    mine = configured(cfg, options)
    choice = recommended(candidates(cfg, world_size, device), device)
    rows = settings(cfg, layout)
    try:
        corpus = open_corpus(cfg, layout)
    except DataError as error:
        rows.append(("corpus", f"can't be opened: {error}"))
    else:
        steps = corpus.plan.clips_per_epoch * cfg.data.crops_per_clip / cfg.train.global_batch
        hours = [f"{mine.seconds.step * steps / 3600:.2f} h an epoch as configured"]
        hours += [f"{choice.seconds.step * steps / 3600:.2f} h as recommended"] * (choice is not None)
        rows += [*corpus_rows(cfg, layout, corpus), ("predicted", ", ".join(hours))]
    rows += [
        ("predicted", f"GiB of a rank on {device.name} with {device.memory / GIB:.0f} GiB ({device.source})"),
        ("", f"assumes MFU {costs.MFU} in forward and backward, and nothing overlapped"),
        ("", "small micro-batches and models do not reach that MFU: what it costs to launch kernels is not modelled"),
        ("", "sent: GiB a step; min: minutes per million crops; right of the bar: with activation checkpointing"),
        ("", f"host: of a rank at most; a machine needs {min(world_size, costs.GPUS_PER_MACHINE)} times that"),
    ]
    if world_size > costs.GPUS_PER_MACHINE:
        rows.append(("", f"{costs.GPUS_PER_MACHINE} ranks and {costs.NICS_PER_MACHINE} network cards a machine"))
    lines = [f"{name:<12} {value}" for name, value in rows]
    lines += table(options, mine, cfg.train.global_batch, device)
    return "\n".join([*lines, *advice(cfg, choice, mine, options, device)])


def settings(cfg: Config, layout: BatchLayout) -> list[tuple[str, str]]:
    """What the configuration says, worked out."""
    models = _on_meta(cfg)
    in_encoder, in_decoder = (_numel(part.parameters()) for part in models.values())
    tables = sum(_numel(part.buffers()) for part in models.values())
    lr_rule = f"optim.lr = {cfg.optim.lr}"
    if cfg.optim.lr is None:
        lr_rule = f"{cfg.optim.base_lr or 3e-4:g} per 256 clips x {cfg.train.global_batch} / 256"
    own = [f"offload {cfg.engine.offload}"] * (cfg.engine.offload != "none")
    own += ["activation checkpointing"] * cfg.model.activation_checkpointing
    engine = cfg.engine.deepspeed or f"ZeRO {cfg.engine.zero_stage}"
    return [
        ("run folder", str(cfg.run.folder)),
        (
            "batch",
            f"{cfg.train.global_batch} crops = {layout.world_size} processes x micro-batch {layout.micro_batch} x "
            f"{layout.accumulation} accumulated",
        ),
        ("blocks", f"{layout.blocks_per_step} of {cfg.data.block} crops a step"),
        (
            "parameters",
            f"{(in_encoder + in_decoder) / 1e6:.2f} M, of them {in_encoder / 1e6:.2f} M in the encoder "
            f"({(in_encoder + in_decoder + tables) / 1e6:.2f} M with the fixed position tables)",
        ),
        (
            "patches",
            f"{cfg.num_patches} of {cfg.model.patch_size} ({cfg.features.n_mels} x {cfg.data.crop_frames} frames), "
            f"{cfg.num_keep} visible",
        ),
        ("precision", ", ".join([cfg.train.precision, engine, *own])),
        ("peak lr", f"{cfg.peak_lr:.6g} ({lr_rule})"),
    ]


def predicted(cfg: Config, layout: BatchLayout, device: costs.Device) -> Iterator[Option]:
    """Every valid stage and offload, without and with activation checkpointing."""
    model, inputs = costs.parts(cfg, parameter_shapes(cfg), gpu=True), tensor_bytes(cfg)
    flops = layout.micro_batch * monitor.flops_per_clip(
        cfg.model.geometry,
        cfg.num_patches,
        cfg.num_keep,
        cfg.num_patches - cfg.num_keep,
        cfg.model.patch[0] * cfg.model.patch[1],
        cfg.model.cls_token,
    )
    for stage, offload in itertools.product(range(4), ("none", "optimizer", "parameters")):
        if any(stage_conflicts(stage, offload, cfg.train.precision)):
            continue
        zero = costs.zero_settings(zero_section(cfg, stage, offload))
        for checkpointing in (False, True):
            spread = costs.Spread(layout.world_size, layout.accumulation, cfg.train.precision, checkpointing)
            memory = memory_of(model, zero, spread, inputs)
            sent = costs.traffic(model, zero, spread).sent(layout.world_size)
            seconds = costs.seconds(model, zero, spread, device, flops)
            yield Option(stage, offload, checkpointing, layout.micro_batch, memory, sent, seconds)


def candidates(cfg: Config, world_size: int, device: costs.Device) -> Iterator[Option]:
    """The options of the micro-batch and of every smaller one that the global batch allows."""
    per_rank = cfg.train.global_batch // world_size
    for micro in range(cfg.data.block, cfg.train.micro_batch + 1, cfg.data.block):
        if per_rank % micro == 0:
            smaller = cfg.model_copy(update={"train": cfg.train.model_copy(update={"micro_batch": micro})})
            yield from predicted(smaller, batch_layout(smaller, world_size), device)


def recommended(options: Iterable[Option], device: costs.Device) -> Option | None:
    """The fastest of those that fit, or the same at a lower stage where that costs less than WORTH of the step."""
    fitting = [option for option in options if fits(option, device)]
    if not fitting:
        return None
    fastest = min(fitting, key=lambda option: option.seconds.step)
    alike = [
        option
        for option in fitting
        if (option.offload, option.checkpointing) == (fastest.offload, fastest.checkpointing)
        and option.seconds.step * (1 - WORTH) <= fastest.seconds.step
    ]
    return min(alike, key=lambda option: (option.stage, option.seconds.step))


def configured(cfg: Config, options: Iterable[Option]) -> Option:
    """The option that the run's own settings choose."""
    own = (*_stage_and_offload(cfg), cfg.model.activation_checkpointing)
    return next(option for option in options if (option.stage, option.offload, option.checkpointing) == own)


def changes(cfg: Config, option: Option) -> list[str]:
    """The overrides that make the run's settings an option's; none where they are."""
    wanted = []
    if _stage_and_offload(cfg) != (option.stage, option.offload):
        wanted += ["engine.deepspeed=null"] * bool(cfg.engine.deepspeed)
        wanted += [f"engine.zero_stage={option.stage}"] * (option.stage != cfg.engine.zero_stage)
        wanted += [f"engine.offload={option.offload}"] * (option.offload != cfg.engine.offload)
    if option.checkpointing != cfg.model.activation_checkpointing:
        wanted.append(f"model.activation_checkpointing={str(option.checkpointing).lower()}")
    if option.micro_batch != cfg.train.micro_batch:
        wanted.append(f"train.micro_batch={option.micro_batch}")
    return wanted


def advice(
    cfg: Config, choice: Option | None, mine: Option, options: Sequence[Option], device: costs.Device
) -> list[str]:
    """Lines about the run as configured, and about the choice or what is missing for one."""

    def costing(option: Option) -> str:
        fit = "" if fits(option, device) else ", which does not fit"
        return (
            f"peak {option.memory.peak / GIB:.1f} GiB{fit}, {option.sent / GIB:.2f} GiB sent and "
            f"{option.seconds.step:.3f} s a step"
        )

    limit = costs.USABLE_MEMORY * device.memory / GIB
    if choice is None:
        least = min(options, key=lambda option: option.memory.peak)
        return [
            f"{'recommended':<12} nothing fits {limit:.1f} GiB: the least is {least.memory.peak / GIB:.1f} GiB with "
            f"{' '.join(changes(cfg, least)) or 'the settings as they are'}; take more processes, a smaller model or "
            "shorter crops"
        ]
    words = " ".join(changes(cfg, choice)) or "as configured"
    return [
        f"{'configured':<12} {costing(mine)}",
        f"{'recommended':<12} {words}",
        f"{'':<12} {costing(choice)}, of {limit:.1f} GiB; none that fits saves over {WORTH:.0%} of it",
    ]


def fits(option: Option, device: costs.Device) -> bool:
    """Whether the peak leaves the device what else it needs."""
    return option.memory.peak <= costs.USABLE_MEMORY * device.memory


def table(options: Sequence[Option], mine: Option, global_batch: int, device: costs.Device) -> list[str]:
    """A line per stage and offload, * the configured one; columns after the bar are with activation checkpointing."""
    heads = ("weights", "optim", "grads", "buffers", "acts", "peak", "host", "sent", "s/step", "min")
    lines = [f"  {'ZeRO offload':<14}" + "".join(f"{head:>8}" for head in heads) + " |    acts    peak  s/step"]
    for plain, kept in zip(options[::2], options[1::2], strict=True):
        memory = plain.memory
        values = [memory.weights, memory.optimizer, memory.gradients, memory.buffers, memory.activations, memory.peak]
        cells = [f"{value / GIB:8.2f}" for value in (*values, memory.host, plain.sent)]
        cells += [f"{plain.seconds.step:8.3f}", f"{plain.seconds.step * 1e6 / global_batch / 60:8.2f}"]
        again = [f"{kept.memory.activations / GIB:8.2f}", f"{kept.memory.peak / GIB:8.2f}", f"{kept.seconds.step:8.3f}"]
        note = "" if fits(plain, device) else "  fits with checkpointing" if fits(kept, device) else "  does not fit"
        mark = "*" if mine in (plain, kept) else " "
        lines.append(f"{mark} {plain.stage:<5}{plain.offload:<9}" + "".join(cells) + " |" + "".join(again) + note)
    return lines


def zero_section(cfg: Config, stage: int, offload: str) -> dict[str, object]:
    """`zero_optimization` of a stage: of the run's own DeepSpeed file where that is of this stage, else of ours."""
    if cfg.engine.deepspeed and _stage_and_offload(cfg) == (stage, offload):
        return _own_section(cfg)
    shipped = Path(msm_configs.__path__[0]) / "deepspeed"
    name = f"zero{stage}.json" if offload == "none" else f"zero{stage}_offload_{offload}.json"
    return json.loads((shipped / name).read_text(encoding="utf-8"))["zero_optimization"]


def parameter_shapes(cfg: Config) -> dict[str, tuple[int, ...]]:
    """Every parameter's shape by its name in MaskedSpectrogramModel; nothing is allocated."""
    return {
        f"{name}.{inner}": tuple(parameter.shape)
        for name, part in _on_meta(cfg).items()
        for inner, parameter in part.named_parameters()
    }


def tensor_bytes(cfg: Config) -> float:
    """What a rank holds beside model and engine: a micro-batch of log-mels with its ids, the position tables."""
    pixels = cfg.train.micro_batch * cfg.features.n_mels * cfg.data.crop_frames
    tables = sum(_numel(part.buffers()) for part in _on_meta(cfg).values())
    return 4 * (pixels + tables) + 8 * cfg.train.micro_batch * (3 + 2 * cfg.num_patches)


def _stage_and_offload(cfg: Config) -> tuple[int, str]:
    if not cfg.engine.deepspeed:
        return cfg.engine.zero_stage, cfg.engine.offload
    own = costs.zero_settings(_own_section(cfg))
    return own.stage, own.offload


def _own_section(cfg: Config) -> dict[str, object]:
    """`zero_optimization` of the run's own DeepSpeed file. Raises ConfigError where it can't be planned."""
    path = Path(cfg.engine.deepspeed)
    try:
        section = json.loads(path.read_text(encoding="utf-8"))["zero_optimization"]
        own = costs.zero_settings(section)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"engine.deepspeed = {path}: can't be planned ({error!r}); it must be a JSON object with "
            "zero_optimization.stage"
        ) from None
    if own.stage not in range(4):
        raise ConfigError(f"{path}: zero_optimization.stage = {own.stage}: must be 0, 1, 2 or 3")
    if faults := list(stage_conflicts(own.stage, own.offload, cfg.train.precision)):
        raise ConfigError("\n".join(f"{path}: {fault}" for fault in faults))
    return section


def _on_meta(cfg: Config) -> dict[str, nn.Module]:
    """Encoder and decoder to be counted: nothing is allocated."""
    grid = PatchGrid(cfg.features.n_mels, cfg.data.crop_frames, cfg.model.patch)
    with torch.device("meta"):
        return {"encoder": Encoder(cfg.model, grid), "decoder": Decoder(cfg.model, grid)}


def _numel(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)
