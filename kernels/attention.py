"""Multi-head self-attention on the packed output of the query-key-value projection.

O = softmax(Q K^T / sqrt(D)) V per head, read from and written to the layouts that the projections around it use:
no transposes, no copies. Malformed arguments raise ValueError; a backend that can't run raises
BackendUnavailable.

Two regimes, chosen by `regime` from shape and dtype alone:
- short (attention_short.py): one program holds all scores of a head, of one sequence or of several. Nothing but
  qkv is saved: the backward recomputes the scores and writes dQ, dK and dV in one pass.
- tiled (attention_tiled.py): a running softmax over blocks of keys; saves O and the log of the row sums.
Neither uses atomics: two runs give the same bits. Longer sequences go to torch's scaled_dot_product_attention.

Legend: B clips, N tokens, H heads, D width of a head, W = H * D.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from . import attention_short, attention_tiled, reference
from .attention_short import Short
from .attention_tiled import Tiled
from .backend import Backend, BackendUnavailable, resolve
from .checks import check_device, check_floating

HEAD_DIMS = (32, 64, 80, 128)
LONGEST = 1024
"""Tokens in a sequence; longer ones go to torch's scaled_dot_product_attention."""

log = logging.getLogger("msm_kernels")


def regime(num_tokens: int, head_dim: int, dtype: torch.dtype) -> Literal["short", "tiled", "sdpa"]:
    """How a sequence is handled: a function of shape and dtype alone, so that what is saved for backward is known.

    What a program holds on the chip sets the bounds of the short regime; beyond LONGEST tokens, or for a width
    of a head that is none of HEAD_DIMS, it is torch's scaled_dot_product_attention.
    """
    if sdpa_note(num_tokens, head_dim):
        return "sdpa"
    longest = 32 if dtype == torch.float32 else 64 if head_dim > 64 else 128
    return "short" if num_tokens <= longest else "tiled"


def shape_class(num_tokens: int, head_dim: int) -> str:
    """The key of the configuration table: the least bound that holds the tokens, and the width of a head."""
    bounds = (16, 32, 48, 64, 80, 96, 112, 128, 192, 256, 384, 512, 768, 1024)
    return f"n{next(bound for bound in bounds if num_tokens <= bound)}_d{head_dim}"


def launch_forward(
    qkv: Tensor, num_heads: int, key_mask: Tensor | None = None, config: Short | Tiled | None = None
) -> tuple[Tensor, Tensor]:
    """qkv [B, N, 3W], key_mask bool [B, N] -> O [B, N, W] and lse [B, H, N] float32 (short: empty)."""
    qkv, key_mask, key = _prepared(qkv, num_heads, key_mask)
    if _regime_of(qkv, num_heads) == "tiled":
        return attention_tiled.launch_forward(qkv, num_heads, key_mask, key, config)
    out = attention_short.launch_forward(qkv, num_heads, key_mask, key, config)
    return out, torch.empty(0, dtype=torch.float32, device=qkv.device)


def launch_backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor | None,
    lse: Tensor,
    num_heads: int,
    key_mask: Tensor | None = None,
    config: Short | Tiled | None = None,
) -> Tensor:
    """dO [B, N, W] and what the forward saved (short: no O) -> d qkv [B, N, 3W]."""
    qkv, key_mask, key = _prepared(qkv, num_heads, key_mask)
    grad = grad.contiguous()
    if _regime_of(qkv, num_heads) == "tiled":
        return attention_tiled.launch_backward(grad, qkv, out, lse, num_heads, key_mask, key, config)
    return attention_short.launch_backward(grad, qkv, num_heads, key_mask, key, config)


def _prepared(qkv: Tensor, num_heads: int, key_mask: Tensor | None) -> tuple[Tensor, Tensor | None, str]:
    """qkv and mask as the kernels read them, and their key in the configuration table."""
    key = shape_class(qkv.shape[1], _head_dim(qkv, num_heads))
    return qkv.contiguous(), None if key_mask is None else key_mask.contiguous(), key


def _regime_of(qkv: Tensor, num_heads: int) -> Literal["short", "tiled", "sdpa"]:
    return regime(qkv.shape[1], _head_dim(qkv, num_heads), qkv.dtype)


def _head_dim(qkv: Tensor, num_heads: int) -> int:
    return qkv.shape[2] // 3 // num_heads


@torch.library.custom_op(
    "msm_kernels::attention",
    mutates_args=(),
    schema="(Tensor qkv, int num_heads, Tensor? key_mask) -> (Tensor, Tensor)",
)
def _attention(qkv, num_heads, key_mask):
    return launch_forward(qkv, num_heads, key_mask)


@_attention.register_fake
def _(qkv, num_heads, key_mask):
    B, N, W = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    tiled = _regime_of(qkv, num_heads) == "tiled"
    return qkv.new_empty(B, N, W), qkv.new_empty((B, num_heads, N) if tiled else (0,), dtype=torch.float32)


@torch.library.custom_op(
    "msm_kernels::attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor qkv, Tensor? out, Tensor lse, int num_heads, Tensor? key_mask) -> Tensor",
)
def _attention_backward(grad, qkv, out, lse, num_heads, key_mask):
    return launch_backward(grad, qkv, out, lse, num_heads, key_mask)


@_attention_backward.register_fake
def _(grad, qkv, out, lse, num_heads, key_mask):
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output) -> None:
    qkv, ctx.num_heads, key_mask = inputs
    out, lse = output
    short = _regime_of(qkv, ctx.num_heads) == "short"
    ctx.save_for_backward(qkv, None if short else out, lse, key_mask)


def _differentiate(ctx, grad, _):
    qkv, out, lse, key_mask = ctx.saved_tensors
    return _attention_backward(grad, qkv, out, lse, ctx.num_heads, key_mask), None, None


_attention.register_autograd(_differentiate, setup_context=_save)


def attention(qkv: Tensor, num_heads: int, key_mask: Tensor | None = None, backend: Backend = "auto") -> Tensor:
    """softmax(q k^T / sqrt(D)) v per head, the softmax in float32 or better.

    qkv [B, N, 3 * H * D] as the projection wrote it (all queries, all keys, all values; heads contiguous
    within each) -> [B, N, H * D] in the dtype of `qkv`. `key_mask` bool [B, N]: False keys, finite ones, have
    no influence; a clip without any key gives zeros. The kernels take D in HEAD_DIMS and N up to LONGEST. Past
    either, where kernels would run, "auto" takes torch's scaled_dot_product_attention and says so once, as does
    "triton" for longer N; its backward may use atomics unless torch.use_deterministic_algorithms is on. Short
    sequences can share a tile: a NaN or infinity in one clip then spoils its neighbours there too; finite values,
    however large, do not.
    """
    if qkv.ndim != 3 or num_heads < 1 or qkv.shape[2] % (3 * num_heads) or not qkv.shape[1:].numel():
        raise ValueError(
            f"qkv is {list(qkv.shape)}: must be [B, N, 3 * heads * width] for num_heads = {num_heads}, N and width "
            "1 or more"
        )
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != qkv.shape[:2]):
        raise ValueError(
            f"key_mask is {key_mask.dtype} {list(key_mask.shape)}: must be torch.bool {list(qkv.shape[:2])}"
        )
    check_floating(qkv=qkv)
    if key_mask is not None:
        check_device(qkv.device, key_mask=key_mask)
    if resolve(backend, qkv.device, qkv.dtype) == "reference":
        return reference.attention(qkv, num_heads, key_mask)
    head_dim = _head_dim(qkv, num_heads)
    if backend == "triton" and head_dim not in HEAD_DIMS:
        raise BackendUnavailable(
            f"backend = 'triton': heads are {head_dim} wide, the kernels take {HEAD_DIMS}; use 'auto' or 'reference'"
        )
    if _regime_of(qkv, num_heads) == "sdpa":
        return _sdpa(qkv, num_heads, key_mask)
    return _attention(qkv, num_heads, key_mask)[0]


def _sdpa(qkv: Tensor, num_heads: int, key_mask: Tensor | None) -> Tensor:
    """torch's attention on views of qkv; a clip without any key gives zeros here too."""
    B, N, _ = qkv.shape
    if not torch.compiler.is_compiling():
        _say(sdpa_note(N, _head_dim(qkv, num_heads)))
    q, k, v = qkv.view(B, N, 3, num_heads, _head_dim(qkv, num_heads)).permute(2, 0, 3, 1, 4)
    if key_mask is None:
        out = scaled_dot_product_attention(q, k, v)
    else:
        some = key_mask.any(dim=1)[:, None]
        # A clip without keys attends to all of them, then counts for nothing: no NaN on the way.
        out = scaled_dot_product_attention(q, k, v, attn_mask=(key_mask | ~some)[:, None, None, :])
        out = out * some[:, None, :, None]
    return out.transpose(1, 2).flatten(2)


def sdpa_note(num_tokens: int, head_dim: int) -> str | None:
    """What to log about sequences that no kernel takes; none for those that one does."""
    if num_tokens <= LONGEST and head_dim in HEAD_DIMS:
        return None
    reason = f"sequences longer than {LONGEST} tokens" if num_tokens > LONGEST else f"heads {head_dim} wide"
    return f"attention: {reason} go to torch's scaled_dot_product_attention"


@cache
def _say(note: str) -> None:
    """Once for each note: not at every step."""
    log.warning(note)
