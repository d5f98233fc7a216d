"""`msm-dist plan`: what a configuration means on a number of processes, without starting it.

In: a configuration file, overrides, a world size, a device's name. Out: a table as text; memory, communication and
time in it are predicted by `msm_dist.memory` and `msm_dist.costs`. Raises ConfigError, DataError as the run itself
would; where the corpus is not there yet, the lines that need it say so instead.
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
from msm_dist.errors import ConfigError, DataError
from msm_dist.memory import Memory, memory_of
from msm_dist.model.mae import Decoder, Encoder
from msm_dist.model.patches import PatchGrid

GB = 1e9


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

    @property
    def settings(self) -> str:
        """The overrides that choose it, but for the micro-batch."""
        words = [f"engine.zero_stage={self.stage}"]
        words += [f"engine.offload={self.offload}"] * (self.offload != "none")
        words += ["model.activation_checkpointing=true"] * self.checkpointing
        return " ".join(words)


def describe(path: str, overrides: Sequence[str], world_size: int, device_name: str = "h200") -> str:
    """Batch layout, parameters, learning rate, steps per epoch, predicted costs and a recommendation."""
    cfg = load_config(path, overrides)
    layout = batch_layout(cfg, world_size)
    if device_name not in costs.DEVICES:
        raise ConfigError(f"--device {device_name}: no such profile; choose from {', '.join(costs.DEVICES)}")
    device = costs.DEVICES[device_name]
    options = list(predicted(cfg, layout, device))
    choice = recommended(cfg, layout, device, options)
    rows = settings(cfg, layout)
    try:
        corpus = open_corpus(cfg, layout)
    except DataError as error:
        rows.append(("corpus", f"not here: {error}"))
    else:
        plan = corpus.plan
        steps = plan.clips_per_epoch * cfg.data.crops_per_clip / cfg.train.global_batch
        rows += [
            ("corpus", f"{plan.num_clips} clips in {len(corpus.index.shards)} shards, {plan.lanes} lanes"),
            ("epoch", f"{plan.clips_per_epoch} clips = {steps:.2f} steps"),
            ("length", f"{corpus.total_steps} steps, {corpus.warmup_steps:.0f} of warm-up"),
        ]
        if choice:
            rows.append(("", f"predicted, as recommended: {choice.seconds.step * steps / 3600:.2f} h an epoch"))
    rows += [
        ("predicted", f"GB of a rank on {device.name} with {device.memory / GB:.0f} GB ({device.source})"),
        ("", f"assumes MFU {costs.MFU} in forward and backward, and nothing overlapped; min: per million crops"),
    ]
    lines = [f"{name:<12} {value}" for name, value in rows]
    lines += table(options, cfg.train.global_batch, device)
    return "\n".join([*lines, f"{'recommended':<12} {advice(cfg, choice, options, device)}"])


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


def recommended(cfg: Config, layout: BatchLayout, device: costs.Device, options: Sequence[Option]) -> Option | None:
    """The least communication that fits; else checkpointing, a smaller micro-batch, offload, in this order."""

    def best(candidates: Iterable[Option]) -> Option | None:
        fitting = [option for option in candidates if fits(option, device)]
        return min(fitting, key=lambda option: (option.sent, option.stage), default=None)

    on_device = [option for option in options if option.offload == "none"]
    for checkpointing in (False, True):
        if found := best(option for option in on_device if option.checkpointing == checkpointing):
            return found
    smaller = list(_smaller_batches(cfg, layout.world_size))
    for other in smaller:
        again = predicted(other, batch_layout(other, layout.world_size), device)
        if found := best(option for option in again if option.offload == "none"):
            return found
    for offload in ("optimizer", "parameters"):
        if found := best(option for option in options if option.offload == offload):
            return found
    for other in smaller:
        if found := best(predicted(other, batch_layout(other, layout.world_size), device)):
            return found
    return None


def advice(cfg: Config, choice: Option | None, options: Sequence[Option], device: costs.Device) -> str:
    """One sentence about the choice, or about what is missing."""
    limit = costs.USABLE_MEMORY * device.memory / GB
    if choice is None:
        least = min(options, key=lambda option: option.memory.peak)
        return (
            f"nothing fits {limit:.1f} GB: the least is {least.memory.peak / GB:.1f} GB with {least.settings}; take "
            "more processes, a smaller model or shorter crops"
        )
    words = choice.settings
    if choice.micro_batch != cfg.train.micro_batch:
        words += f" train.micro_batch={choice.micro_batch}"
    reason = "least sent of what fits"
    if choice.offload != "none" or choice.checkpointing or choice.micro_batch != cfg.train.micro_batch:
        plain = min(option.memory.peak for option in options if option.offload == "none" and not option.checkpointing)
        reason = f"without, at least {plain / GB:.1f} GB are needed, of"
    return (
        f"{words} ({reason} {limit:.1f} GB): peak {choice.memory.peak / GB:.1f} GB, {choice.sent / GB:.2f} GB sent and "
        f"{choice.seconds.step:.3f} s a step"
    )


def fits(option: Option, device: costs.Device) -> bool:
    """Whether the peak leaves the device what else it needs."""
    return option.memory.peak <= costs.USABLE_MEMORY * device.memory


def table(options: Sequence[Option], global_batch: int, device: costs.Device) -> list[str]:
    """A line per stage and offload; the columns after the bar are with activation checkpointing."""
    heads = ("weights", "optim", "grads", "buffers", "acts", "peak", "host", "sent", "s/step", "min")
    lines = [f"  {'ZeRO offload':<14}" + "".join(f"{head:>8}" for head in heads) + " |    acts    peak  s/step"]
    for plain, kept in zip(options[::2], options[1::2], strict=True):
        memory = plain.memory
        values = [memory.weights, memory.optimizer, memory.gradients, memory.buffers, memory.activations, memory.peak]
        cells = [f"{value / GB:8.2f}" for value in (*values, memory.host, plain.sent)]
        cells += [f"{plain.seconds.step:8.3f}", f"{plain.seconds.step * 1e6 / global_batch / 60:8.2f}"]
        again = [f"{kept.memory.activations / GB:8.2f}", f"{kept.memory.peak / GB:8.2f}", f"{kept.seconds.step:8.3f}"]
        note = "" if fits(plain, device) else "  fits with checkpointing" if fits(kept, device) else "  does not fit"
        lines.append(f"  {plain.stage:<5}{plain.offload:<9}" + "".join(cells) + " |" + "".join(again) + note)
    return lines


def zero_section(cfg: Config, stage: int, offload: str) -> dict[str, object]:
    """`zero_optimization` of a stage: of the run's own DeepSpeed file where that is of this stage, else of ours."""
    shipped = Path(msm_configs.__path__[0]) / "deepspeed"
    name = f"zero{stage}.json" if offload == "none" else f"zero{stage}_offload_{offload}.json"
    values = json.loads((shipped / name).read_text(encoding="utf-8"))["zero_optimization"]
    if cfg.engine.deepspeed:
        try:
            own = json.loads(Path(cfg.engine.deepspeed).read_text(encoding="utf-8"))["zero_optimization"]
            same = costs.zero_settings(own)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"engine.deepspeed = {cfg.engine.deepspeed}: can't be planned ({error!r}); it must be a JSON object "
                "with zero_optimization.stage"
            ) from None
        if (same.stage, same.offload) == (stage, offload):
            return own
    return values


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


def _smaller_batches(cfg: Config, world_size: int) -> Iterator[Config]:
    """The same run with every smaller micro-batch that its global batch allows, the largest first."""
    per_rank = cfg.train.global_batch // world_size
    for micro in range(cfg.train.micro_batch - cfg.data.block, 0, -cfg.data.block):
        if micro % cfg.data.block == 0 and per_rank % micro == 0:
            yield cfg.model_copy(update={"train": cfg.train.model_copy(update={"micro_batch": micro})})


def _on_meta(cfg: Config) -> dict[str, nn.Module]:
    """Encoder and decoder to be counted: nothing is allocated."""
    grid = PatchGrid(cfg.features.n_mels, cfg.data.crop_frames, cfg.model.patch)
    with torch.device("meta"):
        return {"encoder": Encoder(cfg.model, grid), "decoder": Decoder(cfg.model, grid)}


def _numel(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)
