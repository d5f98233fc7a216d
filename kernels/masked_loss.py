"""The loss of the masked autoencoder: mean squared error on the masked patches only.

Legend: B clips, F mel bands, T frames, ph x pw a patch (bands x frames) on a grid of Tg = T / pw columns,
M masked patches, P = ph * pw pixels of a patch, row-major (f, t). Malformed arguments raise ValueError; a backend
that can't run raises BackendUnavailable.

Mathematics. Patch m of clip b, index l = ids_masked[b, m], begins at band (l // Tg) * ph, frame (l % Tg) * pw:
    x[p]   = spectrogram[b, 0, (l // Tg) * ph + p // pw, (l % Tg) * pw + p % pw]
    y[p]   = x[p], or normalised z[p] = (x[p] - mean x) / s with s = sqrt(unbiased variance of x + 1e-6)
    loss   = sum over b, m, p of (prediction - y)**2 / (B * M * P)
    d prediction = 2 (prediction - y) * d loss / (B * M * P)
    d y = -d prediction;  normalised: d x = (d y - mean d y - z * sum(d y * z) / (P - 1)) / s

The kernels see prediction and ids_masked as B * M rows; a program takes ROWS consecutive ones. Targets are read
in place, by the backward once more, so that nothing of their size is ever stored. Each program of the forward
leaves its share of the mean and torch.sum adds them in a fixed order. The gradient of the spectrogram, which
training never asks for, is plain torch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .backend import Backend, jit, launch, resolve, tl
from .blocks import blocks_of, power_of_two
from .checks import check_device, check_floating, check_shape
from .configurations import configuration
from .patch_masking import check_patches
from .reference import EPSILON, Masking

# Rows and patches are counted in 32 bits; pixels of the whole batch are not.
UNSPECIALIZED = ["num_rows", "num_masked", "num_bands"]


@jit
def loss_errors(
    prediction,  # [B * M, P]
    spectrogram,  # [B, F, T]
    ids_masked,  # [B * M]
    rows,  # [ROWS]
    num_rows,  # B * M
    num_masked,  # M
    num_bands,  # F
    num_frames,  # T
    PH: tl.constexpr,
    PW: tl.constexpr,
    PIXELS: tl.constexpr,  # P rounded up to a power of two
    NORMALIZE: tl.constexpr,
    EPSILON: tl.constexpr,
):
    """prediction - y [ROWS, PIXELS] of some rows, zero outside; where in `prediction` that is, and what is inside."""
    pixels = tl.arange(0, PIXELS)
    within = rows < num_rows
    inside = within[:, None] & (pixels < PH * PW)[None, :]
    places = (rows.to(tl.int64) * (PH * PW))[:, None] + pixels[None, :]
    predicted = tl.load(prediction + places, mask=inside, other=0.0).to(tl.float32)

    patch = tl.load(ids_masked + rows, mask=within, other=0).to(tl.int32)
    num_columns = num_frames // PW
    corner = (patch // num_columns) * (PH * num_frames) + (patch % num_columns) * PW
    corner += (rows // num_masked).to(tl.int64) * (num_bands * num_frames)
    offsets = (pixels // PW) * num_frames + pixels % PW
    if PW < 4:
        # In such a patch few pixels lie side by side, but the next masked patch is near: threads go along the rows of
        # a transposed tile. It is loaded as a vector, whose order no version of the compiler changes.
        ROWS: tl.constexpr = rows.shape[0]
        sources = tl.reshape(offsets[:, None] + corner[None, :], [PIXELS * ROWS])
        column_inside = tl.reshape((pixels < PH * PW)[:, None] & within[None, :], [PIXELS * ROWS])
        target = tl.load(spectrogram + sources, mask=column_inside, other=0.0).to(tl.float32)
        target = tl.trans(tl.reshape(target, [PIXELS, ROWS]))
    else:
        sources = corner[:, None] + offsets[None, :]
        target = tl.load(spectrogram + sources, mask=inside, other=0.0).to(tl.float32)
    if NORMALIZE:
        # Taken from the patch's first pixel, so that a constant patch, silence, gives zeros to the last bit.
        pivot = tl.load(spectrogram + corner, mask=within, other=0.0).to(tl.float32)
        target = tl.where(inside, target - pivot[:, None], 0.0)
        mean = tl.sum(target, axis=1) / (PH * PW)
        target = tl.where(inside, target - mean[:, None], 0.0)
        variance = tl.sum(target * target, axis=1) / (PH * PW - 1)
        target /= tl.sqrt(variance + EPSILON)[:, None]
    return predicted - target, places, inside


@jit(do_not_specialize=UNSPECIALIZED)
def loss_forward_kernel(
    prediction,
    spectrogram,
    ids_masked,
    shares,  # [programs]
    num_rows,
    num_masked,
    num_bands,
    num_frames,
    PH: tl.constexpr,
    PW: tl.constexpr,
    PIXELS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EPSILON: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    error, _, _ = loss_errors(
        prediction, spectrogram, ids_masked, rows, num_rows, num_masked, num_bands, num_frames,
        PH, PW, PIXELS, NORMALIZE, EPSILON,
    )  # fmt: skip
    # Divided by one after the other: their product may pass 2**31.
    tl.store(shares + tl.program_id(0), tl.sum(error * error) / (PH * PW) / num_rows)


@jit(do_not_specialize=UNSPECIALIZED)
def loss_backward_kernel(
    prediction,
    spectrogram,
    ids_masked,
    d_loss,  # []
    d_prediction,  # [B * M, P]
    num_rows,
    num_masked,
    num_bands,
    num_frames,
    PH: tl.constexpr,
    PW: tl.constexpr,
    PIXELS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EPSILON: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    error, places, inside = loss_errors(
        prediction, spectrogram, ids_masked, rows, num_rows, num_masked, num_bands, num_frames,
        PH, PW, PIXELS, NORMALIZE, EPSILON,
    )  # fmt: skip
    scale = tl.load(d_loss).to(tl.float32) * 2.0 / (PH * PW) / num_rows
    tl.store(d_prediction + places, (error * scale).to(d_prediction.dtype.element_ty), mask=inside)


class LossConfig(NamedTuple):
    rows: int  # of a program, a power of two
    num_warps: int


def shape_class(patch_size: tuple[int, int]) -> str:
    """What the configuration of both kernels may depend on, with the dtype of the prediction."""
    return "{}x{}".format(*patch_size)


def default_config(patch_size: tuple[int, int]) -> LossConfig:
    """About 4096 elements a program, 32 a thread; a warp's breadth of rows where threads go along the rows."""
    padded = power_of_two(patch_size[0] * patch_size[1])
    rows = max(4096 // padded, 32 if patch_size[1] < 4 else 1)
    return LossConfig(rows, max(1, min(8, rows * padded // 1024)))


def launch_forward(
    prediction: Tensor,
    spectrogram: Tensor,
    ids_masked: Tensor,
    patch_size: tuple[int, int],
    normalize: bool,
    config: LossConfig | None = None,
) -> Tensor:
    """The loss, a float32 scalar."""
    config = config or _configuration("masked_loss_forward", prediction, patch_size)
    num_programs = blocks_of(ids_masked.numel(), config.rows)
    shares = torch.empty(num_programs, dtype=torch.float32, device=prediction.device)
    _launch(loss_forward_kernel, (prediction, spectrogram, ids_masked, shares), patch_size, normalize, config)
    return shares.sum()


def launch_backward(
    d_loss: Tensor,
    prediction: Tensor,
    spectrogram: Tensor,
    ids_masked: Tensor,
    patch_size: tuple[int, int],
    normalize: bool,
    config: LossConfig | None = None,
) -> Tensor:
    """The gradient of the prediction, in its dtype."""
    config = config or _configuration("masked_loss_backward", prediction, patch_size)
    d_prediction = torch.empty_like(prediction, memory_format=torch.contiguous_format)
    tensors = (prediction, spectrogram, ids_masked, d_loss, d_prediction)
    _launch(loss_backward_kernel, tensors, patch_size, normalize, config)
    return d_prediction


def _launch(
    kernel, tensors: tuple[Tensor, ...], patch_size: tuple[int, int], normalize: bool, config: LossConfig
) -> None:
    _, spectrogram, ids_masked, *_ = tensors
    num_rows = ids_masked.numel()
    launch(
        kernel,
        blocks_of(num_rows, config.rows),
        *(tensor.contiguous() for tensor in tensors),
        num_rows,
        ids_masked.shape[1],
        *spectrogram.shape[2:],
        PH=patch_size[0],
        PW=patch_size[1],
        PIXELS=power_of_two(patch_size[0] * patch_size[1]),
        NORMALIZE=normalize,
        EPSILON=EPSILON,
        ROWS=config.rows,
        num_warps=config.num_warps,
    )


def _configuration(kernel: str, prediction: Tensor, patch_size: tuple[int, int]) -> LossConfig:
    default = default_config(patch_size)
    return configuration(kernel, shape_class(patch_size), prediction.dtype, prediction.device, default)


@torch.library.custom_op("msm_kernels::masked_loss", mutates_args=())
def _forward_op(
    prediction: Tensor, spectrogram: Tensor, ids_masked: Tensor, ph: int, pw: int, normalize: bool
) -> Tensor:
    return launch_forward(prediction, spectrogram, ids_masked, (ph, pw), normalize)


@_forward_op.register_fake
def _(prediction, spectrogram, ids_masked, ph, pw, normalize):
    return prediction.new_empty((), dtype=torch.float32)


@torch.library.custom_op("msm_kernels::masked_loss_backward", mutates_args=())
def _backward_op(
    d_loss: Tensor, prediction: Tensor, spectrogram: Tensor, ids_masked: Tensor, ph: int, pw: int, normalize: bool
) -> Tensor:
    return launch_backward(d_loss, prediction, spectrogram, ids_masked, (ph, pw), normalize)


@_backward_op.register_fake
def _(d_loss, prediction, spectrogram, ids_masked, ph, pw, normalize):
    return torch.empty_like(prediction, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ph, pw, normalize = inputs
    ctx.save_for_backward(*tensors)
    ctx.settings = ph, pw, normalize


def _backward(ctx, d_loss):
    d_prediction = d_spectrogram = None
    if ctx.needs_input_grad[0]:
        d_prediction = _backward_op(d_loss, *ctx.saved_tensors, *ctx.settings)
    if ctx.needs_input_grad[1]:
        d_spectrogram = _spectrogram_gradient(d_loss, *ctx.saved_tensors, *ctx.settings)
    return d_prediction, d_spectrogram, None, None, None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def _spectrogram_gradient(
    d_loss: Tensor, prediction: Tensor, spectrogram: Tensor, ids_masked: Tensor, ph: int, pw: int, normalize: bool
) -> Tensor:
    """d spectrogram [B, 1, F, T]; no patch is masked twice, so that nothing is summed where patches are put back."""
    patches = reference.patchify(spectrogram, (ph, pw))  # [B, L, P]
    target = reference.select_rows(patches, ids_masked).float()
    if normalize:
        variance, mean = torch.var_mean(target, dim=-1, correction=1, keepdim=True)
        spread = (variance + EPSILON).sqrt()
        target = (target - mean) / spread
    d_target = (target - prediction.float()) * (d_loss * 2 / prediction.numel())
    if normalize:
        along = (d_target * target).sum(dim=-1, keepdim=True) / (ph * pw - 1)
        d_target = (d_target - d_target.mean(dim=-1, keepdim=True) - target * along) / spread
    ids = ids_masked.unsqueeze(-1).expand_as(d_target)
    d_patches = torch.zeros_like(patches).scatter(1, ids, d_target.to(patches.dtype))
    return reference.unpatchify(d_patches, spectrogram.shape[2:], (ph, pw))


def masked_patch_loss(
    prediction: Tensor,
    spectrogram: Tensor,
    masking: Masking,
    patch_size: tuple[int, int],
    normalize: bool,
    backend: Backend = "auto",
) -> Tensor:
    """Mean over pixels of the squared error of a patch, averaged over the masked patches of the batch.

    prediction [B, M, ph * pw] in the order of ids_masked, spectrogram [B, 1, F, T] -> scalar, float32 or, if
    an operand is, float64. With `normalize` a target patch is (x - mean) / sqrt(unbiased variance + 1e-6).
    Source: Niizumi et al. 2022; normalised targets: He et al. 2022.
    """
    check_patches(spectrogram, masking, patch_size)
    pixels = patch_size[0] * patch_size[1]
    check_shape("prediction", prediction, (*masking.ids_masked.shape, pixels))
    check_device(spectrogram.device, prediction=prediction)
    check_floating(prediction=prediction)
    if not prediction.numel():
        raise ValueError(
            f"masking hides no patch of the batch of {prediction.shape[0]} clips: the loss needs at least one"
        )
    if normalize and pixels < 2:
        raise ValueError(f"patch_size = {patch_size}: the variance of a normalised target needs 2 pixels or more")
    if resolve(backend, prediction.device, torch.promote_types(prediction.dtype, spectrogram.dtype)) == "reference":
        return reference.masked_patch_loss(prediction, spectrogram, masking, patch_size, normalize)
    return _forward_op(prediction, spectrogram, masking.ids_masked, *patch_size, normalize)
