"""The memory of one rank, by arithmetic: what DeepSpeed and a micro-batch hold between steps, and at most within one.

In: the model as a list of parts, the ZeRO settings, how the run is spread (all of `msm_dist.costs`). Out: bytes by
kind. The formulas follow what DeepSpeed 0.19 allocates around torch's AdamW with fp32 accumulation and communication;
docs/plan.md has them in words, what they leave out, and how far they are from measured memory.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from msm_dist.costs import FP32, WEIGHT_BYTES, Part, Spread, Zero, flat_partition, groups_of, share_of, sizes_of

UNZEROED_BUCKET = 500_000_000
"""Elements that DeepSpeed flattens at once where ZeRO does not partition gradients: a constant of its engine."""
ADAM_SCRATCH = 2 * FP32
"""Two temporaries per element in torch's AdamW where it is not fused."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    weights: float
    """Of the model, in its precision."""
    optimizer: float
    """fp32 masters and both moments."""
    gradients: float
    """Between two micro-batches of a step, with buckets that are held with them."""
    buffers: float
    """A micro-batch, position tables, buckets that are never given back."""
    activations: float
    """What a micro-batch's backward needs."""
    steady: float
    """Between two steps."""
    accumulating: float
    """Between two micro-batches of a step."""
    peak: float
    """The most at any time of a step, or at the start, when every rank holds the whole model in fp32."""
    offloaded: float
    """In the host's memory, of the engine."""
    host: float
    """The most of the host's memory: what is offloaded, and the start's weights or a checkpoint being written."""


def memory_of(model: Sequence[Part], zero: Zero, spread: Spread, inputs: float) -> Memory:
    """Memory of a rank; `inputs` are bytes of tensors beside the model (a micro-batch, position tables).

    `peak` is the largest of: the start, the walk through forward and backward, the reduction of gradients, the update.
    """
    whole = FP32 * sum(sizes_of(model))
    layout = _layout(model, zero, spread)
    steady = layout.weights + layout.optimizer + layout.kept_gradients + layout.buffers + inputs
    before = layout.accumulated if spread.accumulation > 1 else 0.0
    saved = sum(part.kept if spread.checkpointing else part.saved for part in model)
    inside = max(part.saved - part.kept for part in model) if spread.checkpointing else 0
    walk = _walk(model, layout, spread, first=spread.accumulation == 1)
    peak = steady + max(before + walk, layout.reduction, layout.update)
    # A rank makes its model on the host and keeps a copy until the engine is set to it. A checkpoint copies its share.
    host = max(2 * whole, layout.host + max(whole, 3 * whole / spread.world_size))
    return Memory(
        layout.weights,
        layout.optimizer,
        layout.kept_gradients + layout.accumulated,
        layout.buffers + inputs,
        saved + inside,
        steady,
        steady + layout.accumulated,
        max(peak, whole),
        layout.host,
        host,
    )


@dataclass(frozen=True)
class _Layout:
    """What one kind of DeepSpeed optimiser keeps, and the most it adds while it reduces and updates."""

    weights: float
    optimizer: float
    accumulated: float
    """Gradients between two micro-batches, gone after the update, with buckets that are held with them."""
    reduction: float
    """Over the steady state, once all micro-batches are in; activations are gone."""
    update: float
    """Over the steady state."""
    kept_gradients: float = 0.0
    """Gradients that are never given back."""
    buffers: float = 0.0
    host: float = 0.0
    growing: float = 0.0
    """Bytes that each parameter's first gradient adds in the backward."""
    staging: float = 0.0
    """Bytes of a bucket that lives through the backward."""
    flush: float = 0.0
    """Bytes that come and go each time a bucket is reduced within the backward."""
    bucket: float = math.inf
    """Elements after which that happens."""
    gathered: tuple[float, float] = field(default=(0.0, 0.0))
    """Stage 3: most bytes of whole weights that live at once, and of the buffer they arrive in."""


def _layout(model: Sequence[Part], zero: Zero, spread: Spread) -> _Layout:
    if zero.stage == 0:
        return _unpartitioned(model, spread)
    if zero.stage == 3:
        return _stage_3(model, zero, spread)
    if zero.stage == 1 and spread.precision == "bf16" and zero.offload == "none":
        return _bf16_optimizer(model, spread)
    return _stage_1_and_2(model, zero, spread)


def _unpartitioned(model: Sequence[Part], spread: Spread) -> _Layout:
    """Stage 0: torch's AdamW on the model itself; DeepSpeed flattens gradients to reduce them."""
    total = sum(sizes_of(model))
    flat = min(total, UNZEROED_BUCKET)
    scratch = 0 if spread.gpu else ADAM_SCRATCH * max(sizes_of(model))
    grads = FP32 * total
    return _Layout(FP32 * total, 2 * FP32 * total, grads, grads + FP32 * flat, grads + scratch, growing=FP32)


def _bf16_optimizer(model: Sequence[Part], spread: Spread) -> _Layout:
    """Stage 1 in bf16: whole fp32 gradients for good, and those of the model's precision until the update."""
    total, groups = sum(sizes_of(model)), groups_of(model)
    shares = [flat_partition(group, spread.world_size) for group in groups]
    # A flat group is reduced in one piece, all of them together while they fit.
    flat = total if total <= UNZEROED_BUCKET else max(map(sum, groups))
    grads = 2 * total
    return _Layout(
        2 * total,
        3 * FP32 * sum(shares),
        grads,
        grads + FP32 * flat,
        grads + (0 if spread.gpu else ADAM_SCRATCH * max(shares)),
        kept_gradients=FP32 * total,
        growing=2,
    )


def _stage_1_and_2(model: Sequence[Part], zero: Zero, spread: Spread) -> _Layout:
    """Stage 2, and stage 1 but for bf16 on the device: gradients pass through a bucket of a fixed size."""
    sizes, groups, w, world = sizes_of(model), groups_of(model), WEIGHT_BYTES[spread.precision], spread.world_size
    total, shares = sum(sizes), [flat_partition(group, world) for group in groups]
    share, flat = sum(shares), min(total, zero.reduce_bucket)
    offloaded = zero.offload != "none"
    # In fp32 whole parameters are copied out of the bucket, in 16 bits exactly the partition.
    owned = FP32 * (share if w < FP32 else sum(_owned(group, world) for group in groups))
    scratch = 0 if spread.gpu else ADAM_SCRATCH * max(shares)
    optimizer, buffers, host = 3 * FP32 * share, 0.0, 0.0
    if offloaded:
        # Beside masters and moments: gradients, the weights in the model's precision, and a place for the largest.
        host, optimizer, buffers = optimizer + (FP32 + w) * share + w * max(sizes), 0.0, w * max(sizes)
    if offloaded and w == FP32:
        # Gradients go straight to the host, and are summed there over micro-batches.
        host, owned = host + (owned if zero.stage == 2 and spread.accumulation > 1 else 0), 0.0
    # In fp32 the update flattens what it owns.
    update = owned + (FP32 * max(shares) if w == FP32 and not offloaded else 0) + scratch
    if zero.stage == 1:
        bucket = FP32 * zero.reduce_bucket
        summed = FP32 * total + bucket
        # The bucket takes the place of the gradients, and is flattened; in 16 bits it is held until the update.
        update += bucket if w < FP32 else 0
        return _Layout(w * total, optimizer, summed, summed + owned, update, 0.0, buffers, host, growing=FP32)
    bucket = w * zero.reduce_bucket
    flush = w * flat + (FP32 * flat if w < FP32 else 0)
    reduction = owned + bucket + max(flush, owned if w == FP32 else 0)
    return _Layout(
        w * total,
        optimizer,
        owned,
        reduction,
        update,
        buffers=buffers,
        host=host,
        staging=bucket,
        flush=flush,
        bucket=zero.reduce_bucket,
    )


def _stage_3(model: Sequence[Part], zero: Zero, spread: Spread) -> _Layout:
    """Stage 3: everything in partitions; whole weights only while they are used."""
    sizes, w, world = sizes_of(model), WEIGHT_BYTES[spread.precision], spread.world_size
    shares = [sum(share_of(size, world) for size in group) for group in groups_of(model)]
    share = sum(shares)
    persistent = sum(size for size in sizes if size <= zero.persistence_threshold)
    passing = sum(sizes) - persistent
    # A block is gathered as one; ahead of it comes a bucket, filled up with whole parameters.
    block = max(sum(map(math.prod, part.shapes)) for part in model)
    arriving = min(passing, max(block, zero.prefetch_bucket + max(sizes))) if world > 1 else 0
    flat = min(sum(sizes), zero.reduce_bucket)
    scratch = FP32 * max(shares) + (0 if spread.gpu else ADAM_SCRATCH * max(shares))
    optimizer, grads, host, weights = 3 * FP32 * share, FP32 * share, 0.0, w * (share + persistent)
    if zero.offload != "none":
        # Gradients twice: as accumulated, and as the update reads them.
        host, optimizer, grads, scratch = optimizer + 2 * grads, 0.0, 0.0, scratch - FP32 * max(shares)
    if zero.offload == "parameters":
        host, weights = host + w * share, weights - w * share
    return _Layout(
        weights,
        optimizer,
        0.0,
        # gloo has no reduce-scatter of its own: it reduces a copy.
        FP32 * flat * (1 if spread.gpu else 2),
        scratch,
        kept_gradients=grads,
        buffers=FP32 * zero.reduce_bucket,
        host=host,
        flush=FP32 * flat * (1 if spread.gpu else 2),
        bucket=zero.reduce_bucket,
        gathered=(w * min(passing, zero.max_live), w * arriving),
    )


def _walk(model: Sequence[Part], layout: _Layout, spread: Spread, first: bool) -> float:
    """Most bytes over the state between micro-batches that forward and backward of one micro-batch take."""

    def held(part: Part) -> int:
        return part.kept if spread.checkpointing else part.saved

    live, arriving = layout.gathered
    saved = sum(held(part) for part in model)
    most, done, in_bucket, total = saved + live + arriving, 0, 0, sum(sizes_of(model))
    for part in reversed(model):
        inside = part.saved - part.kept if spread.checkpointing else 0
        gradients = (layout.growing * done if first else 0) + (layout.staging if done else 0)
        whole = min(live, live * (1 - done / total)) if live else 0.0
        most = max(most, saved + inside + part.working + gradients + whole)
        saved -= held(part)
        for shape in part.shapes:
            size = math.prod(shape)
            if in_bucket + size > layout.bucket:
                most = max(most, saved + inside + gradients + whole + layout.staging + layout.flush)
                in_bucket = 0
            in_bucket += size
        done += sum(math.prod(shape) for shape in part.shapes)
    return max(most, layout.staging + layout.flush)


def _owned(group: Sequence[int], world_size: int) -> int:
    """Most elements of whole parameters that touch one rank's share of a flat group."""
    share, start = flat_partition(group, world_size), 0
    owned = [0] * world_size
    for size in group:
        for rank in range(start // share, min(world_size - 1, (start + size - 1) // share) + 1):
            owned[rank] += size
        start += size
    return max(owned)
