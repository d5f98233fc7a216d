"""Multi-head self-attention on the packed output of the query-key-value projection.

Legend: B clips, N tokens, H heads, D width of a head. Malformed arguments raise ValueError; a backend
that can't run raises BackendUnavailable.
"""

import torch
from torch import Tensor

from . import reference
from .backend import Backend, resolve


def attention(qkv: Tensor, num_heads: int, key_mask: Tensor | None = None, backend: Backend = "auto") -> Tensor:
    """softmax(q k^T / sqrt(D)) v per head, the softmax in float32 or better.

    qkv [B, N, 3 * H * D] as the projection wrote it (all queries, all keys, all values; heads contiguous
    within each) -> [B, N, H * D] in the dtype of `qkv`. `key_mask` bool [B, N]: False keys, finite ones, have
    no influence; a clip without any key gives zeros.
    """
    if qkv.ndim != 3 or num_heads < 1 or qkv.shape[2] % (3 * num_heads) or not qkv.shape[2]:
        raise ValueError(f"qkv is {list(qkv.shape)}: must be [B, N, 3 * heads * width] for num_heads = {num_heads}")
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != qkv.shape[:2]):
        raise ValueError(
            f"key_mask is {key_mask.dtype} {list(key_mask.shape)}: must be torch.bool {list(qkv.shape[:2])}"
        )
    resolve(backend, qkv.device)
    return reference.attention(qkv, num_heads, key_mask)
