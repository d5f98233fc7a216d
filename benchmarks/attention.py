"""Attention against what a user would pick instead: from a packed qkv [B, N, 3 * H * D] to [B, N, H * D].

Against torch's scaled_dot_product_attention with each of its back-ends, plain eager, and eager compiled. What SDPA
needs around it counts: views in, the transposition of its output, the packing of its three gradients into one.

Legend: B clips, N tokens, H heads, D width of a head.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import eager
from benchmarks.measure import (
    Ceilings,
    Check,
    Target,
    poisoned_outputs,
    relative_error,
    take_turns,
)
from msm_kernels import reference
from msm_kernels.attention import attention

Attention = Callable[[Tensor, int], Tensor]

QKV_BYTES = 2**30
"""Of a measured qkv: a launch then takes many times what starting it takes, and the data many times the cache."""
CHECKED_CLIPS = 48
"""Clips of a batch that are compared with the reference, the first and the last among them."""
OURS = "triton"
OUR_ATTENTION: Attention = partial(attention, backend="triton")
SDPA = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA cudnn": SDPBackend.CUDNN_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}
TOLERANCES = {
    # A few roundings of the storage type: of the softmax' weights, the scores' gradients and the result. float32:
    # products of three tf32 ones each, summed in another order.
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.2e-2,
}
OTHERS_TOLERANCE = 4e-2  # their intermediate results may be stored in bfloat16 too


class Shape(NamedTuple):
    """Attention as a model has it."""

    tokens: int
    heads: int
    head_dim: int
    what: str

    @property
    def clips(self) -> int:
        return QKV_BYTES // (6 * self.tokens * self.heads * self.head_dim)

    def __str__(self) -> str:
        return f"N = {self.tokens}, {self.heads} heads of {self.head_dim}"


SHAPES = (
    Shape(17, 12, 64, "base encoder, 80x208"),
    Shape(66, 6, 64, "base decoder, 80x208"),
    Shape(48, 12, 64, "base encoder, 80x608"),
    Shape(191, 6, 64, "base decoder, 80x608"),
    Shape(32, 8, 64, "published yardstick"),
    Shape(64, 8, 64, "published yardstick"),
    Shape(128, 8, 64, "published yardstick"),
    Shape(66, 12, 64, "base encoder, 16x4 patches"),
    Shape(261, 6, 64, "base decoder, 16x4 patches"),
    Shape(103, 12, 64, "encoder of AudioMAE's shape"),
    Shape(513, 16, 32, "decoder of AudioMAE's shape"),
    Shape(16, 12, 64, "base encoder without CLS"),
    Shape(17, 16, 80, "huge encoder, 80x208"),
    Shape(1024, 12, 64, "the longest"),
)
COMPILED = SHAPES[:2]
"""Where the eager chain is also compiled, which takes several seconds each."""


def bytes_to_move(clips: int, tokens: int, heads: int, head_dim: int) -> tuple[int, int]:
    """The least for 16-bit attention, forward (qkv, out) and backward (qkv, out, d out, d qkv)."""
    elements = clips * tokens * heads * head_dim
    return 8 * elements, 16 * elements


def flops(clips: int, tokens: int, heads: int, head_dim: int) -> tuple[int, int]:
    """Of the products: two forward; five backward, which forms the scores again."""
    product = 2 * clips * heads * tokens**2 * head_dim
    return 2 * product, 5 * product


def sdpa(backend: SDPBackend, qkv: Tensor, num_heads: int) -> Tensor:
    """torch's attention on views of qkv, whose gradients torch concatenates."""
    batch, tokens, _ = qkv.shape
    q, k, v = (part.view(batch, tokens, num_heads, -1).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
    with sdpa_kernel(backend):
        out = scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).reshape(batch, tokens, -1)


def inputs(shape: Shape, clips: int, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    """Fresh random qkv and gradient of the output."""
    generator = torch.Generator(device).manual_seed(seed)
    width = shape.heads * shape.head_dim
    options = {"generator": generator, "dtype": dtype, "device": device}
    qkv = torch.randn(clips, shape.tokens, 3 * width, **options).requires_grad_()
    return qkv, torch.randn(clips, shape.tokens, width, **options)


def implementations(shape: Shape) -> dict[str, Attention]:
    """By name, ours first."""
    chosen: dict[str, Attention] = {OURS: OUR_ATTENTION}
    chosen |= {name: partial(sdpa, backend) for name, backend in SDPA.items()}
    chosen["eager"] = eager.attention
    if shape in COMPILED:
        chosen["eager compiled"] = torch.compile(eager.attention, dynamic=False)
    return chosen


def errors(
    function: Attention, shape: Shape, clips: int, dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[float, float]:
    """Forward and backward on fresh random input, against the reference in float64."""
    qkv, grad = inputs(shape, clips, dtype, device, seed)
    with poisoned_outputs():
        out = function(qkv, shape.heads)
        (d_qkv,) = torch.autograd.grad(out, qkv, grad)
    if not (out.isfinite().all() and d_qkv.isfinite().all()):
        return float("inf"), float("inf")
    some = torch.linspace(0, clips - 1, min(clips, CHECKED_CLIPS), device=device).long()
    exact_qkv = qkv.detach()[some].double().requires_grad_()
    exact = reference.attention(exact_qkv, shape.heads, None)
    (exact_d_qkv,) = torch.autograd.grad(exact, exact_qkv, grad[some].double())
    return relative_error(out[some], exact), relative_error(d_qkv[some], exact_d_qkv)


def check(shape: Shape, clips: int, dtype: torch.dtype, device: torch.device, seed: int) -> list[Check]:
    """Our attention, forward and backward."""
    found = errors(OUR_ATTENTION, shape, clips, dtype, device, seed)
    return [
        Check(f"attention {phase}, {shape}, B = {clips}, {dtype}", error, TOLERANCES[dtype])
        for phase, error in zip(("forward", "backward"), found, strict=True)
    ]


def measure(
    shape: Shape, ceilings: Ceilings, device: torch.device, dtype: torch.dtype, seed: int
) -> Iterator[dict[str, Any]]:
    """A row for every implementation and phase; one that can't run or is wrong has a note instead of a time."""
    clips = shape.clips
    about = {"subject": "attention", **shape._asdict(), "clips": clips, "dtype": str(dtype).removeprefix("torch.")}
    working: dict[str, Attention] = {}
    for name, function in implementations(shape).items():
        if note := _fault(name, function, shape, clips, dtype, device, seed):
            yield {**about, "implementation": name, "phase": "any", "ms": None, "note": note}
        else:
            working[name] = function
    qkv, grad = inputs(shape, clips, dtype, device, seed + 1)
    sizes = (clips, shape.tokens, shape.heads, shape.head_dim)
    floors = [ceilings.floor_ms(*pair) for pair in zip(bytes_to_move(*sizes), flops(*sizes), strict=True)]
    for phase, floor in zip(("forward", "backward", "both"), (*floors, sum(floors)), strict=True):
        variants = {name: call(function, phase, qkv, grad, shape.heads) for name, function in working.items()}
        for name, timing in take_turns(variants).items():
            row = {"implementation": name, "phase": phase, **timing._asdict()}
            yield {**about, **row, "floor_ms": floor, "share": floor / timing.ms}


def call(function: Attention, phase: str, qkv: Tensor, grad: Tensor, num_heads: int) -> Callable[[], Any]:
    """One phase as a call: "forward", "backward" on the graph of one forward, or "both"."""
    if phase == "forward":
        return lambda: function(qkv, num_heads)
    if phase == "both":
        return lambda: torch.autograd.grad(function(qkv, num_heads), qkv, grad)
    out = function(qkv, num_heads)
    return lambda: torch.autograd.grad(out, qkv, grad, retain_graph=True)


def targets(shape: Shape, rows: Sequence[dict[str, Any]]) -> list[Target]:
    """What is promised at this length: against the best SDPA of each phase, and against the floor."""
    times = {(row["implementation"], row["phase"]): row["ms"] for row in rows if row["ms"]}
    floors = {row["phase"]: row["floor_ms"] for row in rows if row["ms"]}
    phases = ("forward", "backward")
    ours = sum(times.get((OURS, phase), float("nan")) for phase in phases)
    best = {
        phase: min(((times[name, phase], name) for name in SDPA if (name, phase) in times), default=None)
        for phase in phases
    }
    found = all(best.values())
    note = ", ".join(f"{phase}: {best[phase][1]} {best[phase][0]:.3f} ms" for phase in phases) if found else ""
    reached = sum(best[phase][0] for phase in phases) / ours if found else None
    result = [Target(f"attention, {shape}: SDPA / ours", wanted_ratio(shape.tokens), reached, note=note)]
    if (wanted := wanted_floor(shape.tokens)) is not None:
        reached = ours / sum(floors[phase] for phase in phases) if floors else None
        result.append(Target(f"attention, {shape}: ours / byte floor", wanted, reached, at_most=True))
    return result


def wanted_ratio(tokens: int) -> float:
    """How many times faster than the best SDPA of each phase, forward and backward together."""
    return next(ratio for longest, ratio in ((32, 3.0), (66, 2.0), (128, 1.5), (1024, 1.0)) if tokens <= longest)


def wanted_floor(tokens: int) -> float | None:
    """How many times the byte floor at most; none is promised past 66 tokens."""
    return next((ratio for longest, ratio in ((48, 1.5), (66, 2.0)) if tokens <= longest), None)


def _fault(
    name: str,
    function: Attention,
    shape: Shape,
    clips: int,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
) -> str | None:
    """Why an implementation is not timed; none if it is."""
    tolerance = TOLERANCES[dtype] if name == OURS else OTHERS_TOLERANCE
    try:
        error = max(errors(function, shape, clips, dtype, device, seed))
    except RuntimeError as fault:  # SDPA has no such kernel; memory is too small
        return f"not available: {str(fault).splitlines()[0][:160]}"
    return None if error <= tolerance else f"wrong: error {error:.1e}"
