"""The masking path (mask, embed, restore, select, loss) against the usual eager chain, and that chain compiled.

The transformers between are left out: what they would hand over, and their gradients, are random tensors. The eager
chain (benchmarks/eager.py) embeds every patch, keeps all positions through the loss and lets autograd store what it
likes; ours draws masks in a kernel, embeds the visible patches only and reads its targets in place.

Legend: B clips, F bands, T frames, ph x pw a patch, L patches, K visible, M masked, D and E widths of encoder and
decoder.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import eager
from benchmarks.measure import (
    Ceilings,
    Check,
    Target,
    peak_bytes,
    poisoned_outputs,
    relative_error,
    take_turns,
)
from msm_kernels import reference
from msm_kernels.masked_loss import masked_patch_loss
from msm_kernels.patch_masking import (
    Masking,
    embed_visible_patches,
    random_masking,
    restore_tokens,
    select_masked_tokens,
)

OURS, EAGER, EAGER_COMPILED = "triton", "eager", "eager compiled"
WHOLE = "whole path"
DIFFERENTIABLE = ("embed", "restore", "select", "loss")
SEED = 7
TOLERANCES = {
    # One rounding of the storage type, and that of the scalar loss; float32 products of three tf32 ones each.
    torch.float32: 1e-5,
    torch.float16: 1e-3,
    torch.bfloat16: 5e-3,
}
WANTED_SPEED, WANTED_MEMORY = 3.0, 0.5


class Shape(NamedTuple):
    """Spectrogram, patches and widths; a quarter of the patches is visible."""

    what: str
    bands: int
    frames: int
    patch: tuple[int, int]
    width: int
    decoder_width: int
    clips: int

    @property
    def num_patches(self) -> int:
        return self.bands // self.patch[0] * (self.frames // self.patch[1])

    @property
    def num_keep(self) -> int:
        return self.num_patches // 4

    @property
    def num_masked(self) -> int:
        return self.num_patches - self.num_keep

    @property
    def pixels(self) -> int:
        return self.patch[0] * self.patch[1]


SHAPES = (
    Shape("base, 80x208", 80, 208, (16, 16), 768, 384, 8192),
    Shape("base, 80x608", 80, 608, (16, 16), 768, 384, 2048),
)
COMPILED = SHAPES[:1]
"""Where the eager chain is also compiled."""


@dataclass(frozen=True)
class Tensors:
    """Parameters, what the transformers hand over, and gradients, all random."""

    spectrogram: Tensor  # [B, 1, F, T] float32
    sample_ids: Tensor  # [B, 3]
    weight: Tensor  # [D, ph * pw]
    bias: Tensor  # [D]
    positions: Tensor  # [L, D] float32
    latent: Tensor  # [B, 1 + K, E]
    mask_token: Tensor  # [1, 1, E]
    decoder_positions: Tensor  # [1 + L, E] float32
    decoded: Tensor  # [B, 1 + L, E]
    prediction: Tensor  # [B, M, ph * pw]
    prediction_of_all: Tensor  # [B, L, ph * pw]
    d_tokens: Tensor  # [B, K, D]
    d_restored: Tensor  # [B, 1 + L, E]
    d_selected: Tensor  # [B, M, E]
    d_selected_of_all: Tensor  # [B, L, E]

    def double(self) -> "Tensors":
        """The same in float64, for the reference."""
        values = (getattr(self, field.name) for field in fields(self))
        return Tensors(*(_leaf(value.double(), value) if value.is_floating_point() else value for value in values))


class Op(NamedTuple):
    """One op: what it computes, from what gradients are asked, and the gradient that comes in (none: of a loss)."""

    forward: Callable[[], Any]
    inputs: tuple[Tensor, ...] = ()
    grad: Tensor | None = None

    def __call__(self) -> tuple[Any, tuple[Tensor, ...]]:
        """Outputs and gradients."""
        out = self.forward()
        return out, torch.autograd.grad(out, self.inputs, self.grad) if self.inputs else ()

    def backward(self) -> Callable[[], Any]:
        """The backward alone, on the graph of one forward."""
        out = self.forward()
        return lambda: torch.autograd.grad(out, self.inputs, self.grad, retain_graph=True)


def draw(shape: Shape, clips: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensors:
    """Fresh random tensors."""
    generator = torch.Generator(device).manual_seed(seed)
    B, L, K, M = clips, shape.num_patches, shape.num_keep, shape.num_masked
    D, E, pixels = shape.width, shape.decoder_width, shape.pixels

    def normal(*sizes: int, kind: torch.dtype = dtype, leaf: bool = False) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=kind, device=device).requires_grad_(leaf)

    ids = torch.randint(0, 2**23, (B, 3), generator=generator, device=device)
    return Tensors(
        spectrogram=normal(B, 1, shape.bands, shape.frames, kind=torch.float32),
        sample_ids=ids,
        weight=normal(D, pixels, leaf=True),
        bias=normal(D, leaf=True),
        positions=normal(L, D, kind=torch.float32),
        latent=normal(B, 1 + K, E, leaf=True),
        mask_token=normal(1, 1, E, leaf=True),
        decoder_positions=normal(1 + L, E, kind=torch.float32),
        decoded=normal(B, 1 + L, E, leaf=True),
        prediction=normal(B, M, pixels, leaf=True),
        prediction_of_all=normal(B, L, pixels, leaf=True),
        d_tokens=normal(B, K, D),
        d_restored=normal(B, 1 + L, E),
        d_selected=normal(B, M, E),
        d_selected_of_all=normal(B, L, E),
    )


def our_ops(shape: Shape, x: Tensors, masking: Masking, backend: str) -> dict[str, Op]:
    """By name; all but "mask" under the given masking."""
    sizes = (shape.num_patches, shape.num_keep)
    return {
        "mask": Op(lambda: random_masking(SEED, x.sample_ids, *sizes, backend)),
        "embed": Op(
            lambda: embed_visible_patches(x.spectrogram, masking, x.weight, x.bias, x.positions, shape.patch, backend),
            (x.weight, x.bias),
            x.d_tokens,
        ),
        "restore": Op(
            lambda: restore_tokens(x.latent, masking, x.mask_token, x.decoder_positions, 1, backend),
            (x.latent, x.mask_token),
            x.d_restored,
        ),
        "select": Op(lambda: select_masked_tokens(x.decoded, masking, 1, backend), (x.decoded,), x.d_selected),
        "loss": Op(
            lambda: masked_patch_loss(x.prediction, x.spectrogram, masking, shape.patch, False, backend),
            (x.prediction,),
        ),
    }


def eager_ops(shape: Shape, x: Tensors, chosen: eager.Shuffle) -> dict[str, Op]:
    """The usual chain, in bfloat16 wherever that is possible."""
    positions, decoder_positions = x.positions.to(x.weight.dtype), x.decoder_positions.to(x.weight.dtype)
    return {
        "mask": Op(lambda: eager.shuffle(_noise(shape, x), shape.num_keep)),
        "embed": Op(
            lambda: _eager_embed(shape, x.spectrogram, x.weight, x.bias, positions, chosen),
            (x.weight, x.bias),
            x.d_tokens,
        ),
        "restore": Op(
            lambda: eager.restore(x.latent, x.mask_token, decoder_positions, chosen),
            (x.latent, x.mask_token),
            x.d_restored,
        ),
        # Every patch goes through the head; only CLS is dropped.
        "select": Op(lambda: x.decoded[:, 1:], (x.decoded,), x.d_selected_of_all),
        "loss": Op(
            lambda: eager.masked_loss(x.prediction_of_all, x.spectrogram, shape.patch, chosen.mask),
            (x.prediction_of_all,),
        ),
    }


def our_path(shape: Shape, x: Tensors) -> Callable[[], Any]:
    """All ops one after the other, then one backward pass through all."""

    def run() -> Any:
        masking = random_masking(SEED, x.sample_ids, shape.num_patches, shape.num_keep, "triton")
        ops = our_ops(shape, x, masking, "triton")
        outputs = [ops[name].forward() for name in DIFFERENTIABLE]
        inputs = [tensor for name in DIFFERENTIABLE for tensor in ops[name].inputs]
        return outputs, torch.autograd.grad(outputs, inputs, [ops[name].grad for name in DIFFERENTIABLE])

    return run


def eager_path(shape: Shape, x: Tensors, compiled: bool) -> Callable[[], Any]:
    """The usual chain likewise; `compiled`: its forward and backward by torch.compile."""
    forward = torch.compile(_eager_chain, dynamic=False) if compiled else _eager_chain
    positions, decoder_positions = x.positions.to(x.weight.dtype), x.decoder_positions.to(x.weight.dtype)
    inputs = (x.weight, x.bias, x.latent, x.mask_token, x.decoded, x.prediction_of_all)
    gradients = (x.d_tokens, x.d_restored, x.d_selected_of_all, None)

    def run() -> Any:
        outputs = forward(shape, x.spectrogram, positions, decoder_positions, *inputs)
        return outputs, torch.autograd.grad(outputs, inputs, gradients)

    return run


def bytes_to_move(shape: Shape, clips: int) -> dict[str, int]:
    """The least for each op, forward and backward, with 16-bit tokens, float32 spectrograms and int64 indices.

    Weights, positions and sums over the batch are left out: they are small or stay in the cache.
    """
    L, K, M = shape.num_patches, shape.num_keep, shape.num_masked
    D, E, pixels = shape.width, shape.decoder_width, shape.pixels
    return {
        "mask": clips * (24 + 16 * L),
        # Pixels and tokens, twice: the backward reads the pixels again and the tokens' gradient.
        "embed": clips * 2 * (4 * K * pixels + 2 * K * D + 8 * K),
        "restore": clips * 2 * (2 * (1 + K) * E + 2 * (1 + L) * E + 8 * L),
        "select": clips * (2 * 2 * M * E + 2 * M * E + 2 * (1 + L) * E + 16 * M),
        # Predictions and targets, twice; the gradient once.
        "loss": clips * (2 * (2 * M * pixels + 4 * M * pixels + 8 * M) + 2 * M * pixels),
    }


def flops(shape: Shape, clips: int) -> dict[str, int]:
    """Of the one product: the embedding and the gradient of its weight."""
    return {"embed": 2 * 2 * clips * shape.num_keep * shape.pixels * shape.width}


def check(shape: Shape, clips: int, dtype: torch.dtype, device: torch.device, seed: int) -> list[Check]:
    """Every op of ours and all its gradients, against the reference in float64."""
    x = draw(shape, clips, dtype, device, seed)
    masking = reference.random_masking(SEED, x.sample_ids, shape.num_patches, shape.num_keep)
    with poisoned_outputs():
        ours = {name: op() for name, op in our_ops(shape, x, masking, "triton").items()}
    exact = {name: op() for name, op in our_ops(shape, x.double(), masking, "reference").items()}
    drawn = ours.pop("mask")[0]
    same = all(torch.equal(one, other) for one, other in zip(drawn, masking, strict=True))
    what = f"{shape.what}, B = {clips}, {dtype}"
    checks = [Check(f"mask, {what}: bits", 0.0 if same else float("inf"), 0.0)]
    for name, (out, gradients) in ours.items():
        values = zip((out, *gradients), (exact[name][0], *exact[name][1]), strict=True)
        error = max(relative_error(value, correct) for value, correct in values)
        checks.append(Check(f"{name} forward and backward, {what}", error, TOLERANCES[dtype]))
    return checks


def measure(
    shape: Shape, ceilings: Ceilings, device: torch.device, dtype: torch.dtype, seed: int
) -> Iterator[dict[str, Any]]:
    """A row for every op and for the whole path, forward and backward: time and peak memory."""
    clips = shape.clips
    x = draw(shape, clips, dtype, device, seed)
    masking = random_masking(SEED, x.sample_ids, shape.num_patches, shape.num_keep, "triton")
    ours = our_ops(shape, x, masking, "triton")
    usual = eager_ops(shape, x, eager.shuffle(_noise(shape, x), shape.num_keep))
    whole = {OURS: our_path(shape, x), EAGER: eager_path(shape, x, compiled=False)}
    if shape in COMPILED:
        whole[EAGER_COMPILED] = eager_path(shape, x, compiled=True)
    variants = {WHOLE: whole} | {name: {OURS: ours[name], EAGER: usual[name]} for name in ours}
    least, products = bytes_to_move(shape, clips), flops(shape, clips)
    floors = {name: ceilings.floor_ms(least[name], products.get(name, 0)) for name in ours}
    floors[WHOLE] = sum(floors.values())
    for name, functions in variants.items():
        peaks = {variant: peak_bytes(function) for variant, function in functions.items()}
        for variant, timing in take_turns(functions).items():
            yield {
                "subject": "masking",
                "what": shape.what,
                "clips": clips,
                "dtype": str(dtype).removeprefix("torch."),
                "phase": name,
                "implementation": variant,
                **timing._asdict(),
                "floor_ms": floors[name],
                "share": floors[name] / timing.ms,
                "peak_bytes": peaks[variant],
            }


def targets(shape: Shape, rows: Sequence[dict[str, Any]]) -> list[Target]:
    """The whole path against the eager chain: time and memory."""
    whole = {row["implementation"]: row for row in rows if row["phase"] == WHOLE}
    both = {OURS, EAGER} <= whole.keys()
    speed = whole[EAGER]["ms"] / whole[OURS]["ms"] if both else None
    memory = whole[OURS]["peak_bytes"] / whole[EAGER]["peak_bytes"] if both else None
    return [
        Target(f"masking path, {shape.what}: eager / ours", WANTED_SPEED, speed),
        Target(f"masking path, {shape.what}: peak memory, ours / eager", WANTED_MEMORY, memory, at_most=True),
    ]


def _eager_chain(
    shape: Shape,
    spectrogram: Tensor,
    positions: Tensor,
    decoder_positions: Tensor,
    weight: Tensor,
    bias: Tensor,
    latent: Tensor,
    mask_token: Tensor,
    decoded: Tensor,
    prediction: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    noise = torch.rand(spectrogram.shape[0], shape.num_patches, device=spectrogram.device)
    chosen = eager.shuffle(noise, shape.num_keep)
    tokens = _eager_embed(shape, spectrogram, weight, bias, positions, chosen)
    restored = eager.restore(latent, mask_token, decoder_positions, chosen)
    return tokens, restored, decoded[:, 1:], eager.masked_loss(prediction, spectrogram, shape.patch, chosen.mask)


def _eager_embed(
    shape: Shape, spectrogram: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, chosen: eager.Shuffle
) -> Tensor:
    kernel = weight.view(-1, 1, *shape.patch)
    return eager.keep(eager.embed(spectrogram.to(weight.dtype), kernel, bias, positions), chosen)


def _noise(shape: Shape, x: Tensors) -> Tensor:
    return torch.rand(x.spectrogram.shape[0], shape.num_patches, device=x.spectrogram.device)


def _leaf(value: Tensor, like: Tensor) -> Tensor:
    return value.detach().requires_grad_(like.requires_grad)
