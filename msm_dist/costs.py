"""What a run costs, by arithmetic alone: bytes that a micro-batch saves and that a rank sends, seconds of a step.

In: the model as a list of parts (`parts`), the ZeRO settings, how the run is spread (`Spread`), a device's rates. Out:
bytes and seconds. Nothing is allocated, no engine is asked; `msm_dist.memory` adds up a rank's memory. The formulas
follow what DeepSpeed 0.19 sends with fp32 accumulation and communication; docs/plan.md has them in words.

Legend: W ranks, P parameters, w bytes of a weight in the model's precision, B clips of a micro-batch, N tokens of a
sequence, D width. All sizes in bytes unless "elements" is said.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from msm_dist.config import Config

FP32 = 4
WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
SHORT_ATTENTION = 128
"""Tokens up to which the kernels save nothing but the packed projection (one row more of statistics beyond)."""


@dataclass(frozen=True)
class Zero:
    """What of DeepSpeed's `zero_optimization` memory and communication depend on; sizes in elements."""

    stage: int
    offload: str
    reduce_bucket: int
    prefetch_bucket: int
    persistence_threshold: int
    max_live: int
    max_reuse: int


@dataclass(frozen=True)
class Part:
    """A piece of the model, in the order of the forward pass."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    saved: int
    """Bytes that its backward needs."""
    kept: int
    """Bytes of them that stay with activation checkpointing; the rest comes back for one part at a time."""
    working: int
    """Bytes that come and go while its backward runs."""


@dataclass(frozen=True)
class Spread:
    """How a run is spread over ranks and time."""

    world_size: int
    accumulation: int
    precision: str
    checkpointing: bool = False
    gpu: bool = True
    """Fused AdamW, Triton kernels and NCCL; else torch's AdamW, the reference and gloo."""


@dataclass(frozen=True)
class Traffic:
    """Bytes of one step and rank by collective, as DeepSpeed's communication log counts them.

    all_reduce and reduce_scatter are counted by the whole tensor, all_gather by the rank's own share.
    """

    all_reduce: float = 0.0
    reduce_scatter: float = 0.0
    all_gather: float = 0.0

    def sent(self, world_size: int) -> float:
        """Bytes that leave a rank when each collective runs as a ring."""
        share = (world_size - 1) / world_size
        return share * (2 * self.all_reduce + self.reduce_scatter) + (world_size - 1) * self.all_gather


@dataclass(frozen=True)
class Device:
    """Rates of a device; `source` says what was measured and what is a data sheet's figure times a share."""

    name: str
    matrix_flops: float
    """Of 16-bit matrix products, per second."""
    fp32_flops: float
    memory_rate: float
    """Bytes per second, read plus written."""
    link_rate: float
    """Bytes per second that a rank sends to another of its machine."""
    network_rate: float
    """Bytes per second of one network card."""
    memory: float
    """Bytes that torch reports, a little less than is printed on the card."""
    source: str


@dataclass(frozen=True)
class Seconds:
    """Predicted time of one step."""

    compute: float
    communication: float
    update: float

    @property
    def step(self) -> float:
        """Nothing is taken to overlap."""
        return self.compute + self.communication + self.update


MFU = 0.5
"""Share of the matrix rate that forward and backward are taken to reach."""
GPUS_PER_MACHINE = 8
NICS_PER_MACHINE = 8
"""One beside each GPU: NCCL opens a ring through every one, so that each carries an eighth of what is sent."""
HOST_LINK_RATE = 50e9
"""Bytes per second between a GPU and its host (PCIe 5 x16, data sheet 64e9 x 0.8)."""
HOST_MEMORY_RATE = 40e9
"""Bytes per second of a rank's share of host memory (a server of 8 ranks with 400e9, data sheet x 0.8)."""
USABLE_MEMORY = 0.9
"""Of a device: the rest is for the CUDA context, NCCL, cuBLAS and holes between blocks."""
DEVICES = {
    "h200": Device(
        "H200",
        790e12,
        67e12 * 0.8,
        4.3e12,
        450e9 * 0.8,
        50e9 * 0.8,
        139 * 2**30,
        "matrix and memory rate measured; fp32 and links from the data sheet x 0.8",
    ),
    "h100": Device(
        "H100 SXM",
        989e12 * 0.8,
        67e12 * 0.8,
        3.35e12 * 0.9,
        450e9 * 0.8,
        50e9 * 0.8,
        79 * 2**30,
        "data sheet x 0.8 (memory x 0.9)",
    ),
    "a100": Device(
        "A100 SXM 80 GB",
        312e12 * 0.8,
        19.5e12 * 0.8,
        2.04e12 * 0.9,
        300e9 * 0.8,
        25e9 * 0.8,
        79 * 2**30,
        "data sheet x 0.8 (memory x 0.9)",
    ),
}


def zero_settings(values: Mapping[str, Any]) -> Zero:
    """The `zero_optimization` section of a DeepSpeed file, with DeepSpeed's defaults."""

    def device(name: str) -> str:
        return (values.get(name) or {}).get("device", "none")

    offload = "parameters" if device("offload_param") != "none" else "none"
    if offload == "none" and device("offload_optimizer") != "none":
        offload = "optimizer"
    return Zero(
        values["stage"],
        offload,
        int(values.get("reduce_bucket_size", 500_000_000)),
        int(values.get("stage3_prefetch_bucket_size", 50_000_000)),
        int(values.get("stage3_param_persistence_threshold", 100_000)),
        int(values.get("stage3_max_live_parameters", 1_000_000_000)),
        int(values.get("stage3_max_reuse_distance", 1_000_000_000)),
    )


def parts(cfg: Config, shapes: Mapping[str, tuple[int, ...]], gpu: bool) -> list[Part]:
    """The model in forward order, with what each part saves of a micro-batch.

    `shapes`: every parameter by its name in MaskedSpectrogramModel.
    """
    geometry, batch, w = cfg.model.geometry, cfg.train.micro_batch, WEIGHT_BYTES[cfg.train.precision]
    prefix, pixels = int(cfg.model.cls_token), math.prod(cfg.model.patch)
    seen, masked = cfg.num_keep + prefix, cfg.num_patches - cfg.num_keep
    encoded = batch * seen * geometry.embed_dim * w
    masked_width = batch * masked * geometry.decoder_embed_dim * w
    predicted = batch * masked * pixels
    # The reference keeps the visible pixels and the error in fp32; the kernels read both again.
    embedding = 0 if gpu else batch * cfg.num_keep * pixels * FP32
    # Norm in and out, and what the loss saves.
    head = 2 * masked_width + predicted * (w if gpu else FP32)

    def named(*prefixes: str) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(shape) for name, shape in shapes.items() if name.startswith(prefixes))

    def block(name: str, tokens: int, width: int, heads: int) -> Part:
        return _block(name, named(f"{name}."), (batch, tokens, width, heads), w, gpu)

    bridge = ("encoder.norm.", "decoder.embed.", "decoder.mask_token")
    found = [Part("embedding", named("encoder.cls_token", "encoder.patch_embed."), embedding, embedding, 0)]
    found += [block(f"encoder.blocks.{i}", seen, geometry.embed_dim, geometry.num_heads) for i in range(geometry.depth)]
    found.append(Part("bridge", named(*bridge), 2 * encoded, 2 * encoded, encoded))
    found += [
        block(f"decoder.blocks.{i}", cfg.num_patches + prefix, geometry.decoder_embed_dim, geometry.decoder_num_heads)
        for i in range(geometry.decoder_depth)
    ]
    found.append(Part("head", named("decoder.norm.", "decoder.pred."), head, head, 2 * predicted * FP32))
    return found


def traffic(model: Sequence[Part], zero: Zero, spread: Spread) -> Traffic:
    """Bytes that a rank hands to collectives in one step, without the few of norms and flags.

    A rank by itself reduces, which sends nothing, and gathers nothing.
    """
    sizes, w, world = sizes_of(model), WEIGHT_BYTES[spread.precision], spread.world_size
    total = sum(sizes)
    if zero.stage == 0:
        return Traffic(all_reduce=FP32 * total)
    if zero.stage in (1, 2):
        times = spread.accumulation if zero.stage == 2 else 1
        share = sum(flat_partition(group, world) for group in groups_of(model))
        return Traffic(all_reduce=FP32 * total * times, all_gather=w * share * (world > 1))
    gathered = [size for size in sizes if size > zero.persistence_threshold]
    persistent = sum(share_of(size, world) for size in sizes if size <= zero.persistence_threshold)
    # Weights stay gathered until their backward where that comes soon; the others are gathered a second time.
    stays = zero.max_reuse / 2 + zero.prefetch_bucket
    twice = 1 + max(0.0, 1 - stays / max(1, sum(gathered)))
    once = sum(share_of(size, world) for size in gathered)
    return Traffic(
        reduce_scatter=FP32 * sum(share_of(size, world) for size in sizes) * world * spread.accumulation,
        all_gather=w * (once * twice * spread.accumulation + persistent) * (world > 1),
    )


def seconds(model: Sequence[Part], zero: Zero, spread: Spread, device: Device, flops_per_micro_batch: float) -> Seconds:
    """Time of a step on `device`: arithmetic at MFU of its rate, rings at the link's rate, the update at memory's."""
    work = flops_per_micro_batch * spread.accumulation * (4 / 3 if spread.checkpointing else 1)
    rate = device.fp32_flops if spread.precision == "fp32" else device.matrix_flops
    link = device.link_rate
    if spread.world_size > GPUS_PER_MACHINE:
        link = min(link, NICS_PER_MACHINE * device.network_rate)
    total, w = sum(sizes_of(model)), WEIGHT_BYTES[spread.precision]
    share = total / (spread.world_size if zero.stage else 1)
    # Masters and both moments read and written, the gradient read, the weight written.
    update = share * (7 * FP32 + w)
    if zero.offload == "none":
        update_seconds = update / device.memory_rate
    else:
        update_seconds = update / HOST_MEMORY_RATE + share * (FP32 + w) / HOST_LINK_RATE
    # Every micro-batch adds its gradients to the sums: one read of the new, one read and one write of the sum.
    adding = spread.accumulation * (w + 2 * FP32) * (share if zero.stage >= 2 else total) / device.memory_rate
    sent = traffic(model, zero, spread).sent(spread.world_size)
    if zero.offload == "parameters":
        update_seconds += 2 * spread.accumulation * w * share / HOST_LINK_RATE
    return Seconds(work / (rate * MFU), sent / link, update_seconds + adding)


def _block(name: str, shapes: tuple[tuple[int, ...], ...], sizes: tuple[int, int, int, int], w: int, gpu: bool) -> Part:
    """A transformer block: 16 B N D elements, of which attention's packed projection is 3.

    Input, norm's output, projection (3), attention's output, sum, norm's output, MLP inside twice (8). The reference
    keeps queries, keys, values and the softmax in fp32.
    """
    batch, tokens, width, heads = sizes
    unit = batch * tokens * width
    if gpu:
        attention = 3 * unit * w + (FP32 * batch * heads * tokens if tokens > SHORT_ATTENTION else 0)
    else:
        attention = 3 * unit * FP32 + FP32 * batch * heads * tokens**2
    statistics = 4 * FP32 * batch * tokens
    # The gradient of the residual stream and those on both sides of the GELU, one of which takes a saved one's place.
    return Part(name, shapes, 13 * unit * w + attention + statistics, unit * w, 5 * unit * w)


def sizes_of(model: Sequence[Part]) -> list[int]:
    return [math.prod(shape) for part in model for shape in part.shapes]


def groups_of(model: Sequence[Part]) -> list[list[int]]:
    """Elements of the parameters of AdamW's groups: decayed, and 1-D ones."""
    shapes = [shape for part in model for shape in part.shapes]
    groups = ([math.prod(shape) for shape in shapes if (len(shape) <= 1) == plain] for plain in (False, True))
    return [group for group in groups if group]


def flat_partition(group: Iterable[int], world_size: int) -> int:
    """Elements of a rank's share of a flat group, which is padded to two per rank."""
    return 2 * math.ceil(sum(group) / (2 * world_size))


def share_of(size: int, world_size: int) -> int:
    """Elements of a rank's share of one parameter."""
    return math.ceil(size / world_size)
