"""The pre-norm transformer block of encoder and decoder.

In and out: tokens [B, N, D] in the dtype of the parameters. With bfloat16 parameters the statistics of the
norms and the softmax are still float32.

A block can be trained with activation checkpointing (only its input is kept, the rest computed again in the
backward, to the same bits) and compiled (`Block.in_training`); without gradients it runs as written.

Legend: B clips, N tokens, D width, H heads.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from msm_kernels.attention import attention
from msm_kernels.backend import Backend

NORM_EPS = 1e-6
MLP_RATIO = 4


class QueryKeyValue(nn.Module):
    """The packed projection [B, N, D] -> [B, N, 3 * D]: queries, keys, values.

    Without `key_bias` (as in the paper) queries and values have a bias and the keys' is constant zero.
    """

    def __init__(self, width: int, key_bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3 * width, width))
        if key_bias:
            self.bias = nn.Parameter(torch.empty(3 * width))
        else:
            self.q_bias = nn.Parameter(torch.empty(width))
            self.v_bias = nn.Parameter(torch.empty(width))
        self.key_bias = key_bias

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias if self.key_bias else torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        # Not imported by name: ZeRO-3 puts a function there that doesn't hold the whole weight until the backward. Of
        # [B, N, D] that one rounds product and sum apart.
        return nn.functional.linear(x.flatten(0, 1), self.weight, bias).unflatten(0, x.shape[:2])


class Attention(nn.Module):
    """Multi-head self-attention with output projection."""

    def __init__(self, width: int, num_heads: int, key_bias: bool, backend: Backend):
        super().__init__()
        self.num_heads = num_heads
        self.backend: Backend = backend
        self.qkv = QueryKeyValue(width, key_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attention(self.qkv(x), self.num_heads, backend=self.backend))


class Mlp(nn.Module):
    """Two layers with exact GELU between, four times the width inside."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, MLP_RATIO * width)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(MLP_RATIO * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Attention and MLP, each normalised before and added to its input.

    `in_training` is what runs while gradients are wanted: `pre_norm_block`, or the same function compiled.
    """

    def __init__(self, width: int, num_heads: int, key_bias: bool, backend: Backend, checkpointing: bool = False):
        super().__init__()
        self.checkpointing = checkpointing
        self.in_training: Callable[[Block, Tensor], Tensor] = pre_norm_block
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, num_heads, key_bias, backend)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return pre_norm_block(self, x)
        if self.checkpointing:
            # There is no dropout, so no state of a generator to bring back.
            return checkpoint(self.in_training, self, x, use_reentrant=False, preserve_rng_state=False)
        return self.in_training(self, x)


def pre_norm_block(block: Block, x: Tensor) -> Tensor:
    """What a block computes; a function, so that all blocks share what it compiles to."""
    x = x + block.attn(block.norm1(x))
    return x + block.mlp(block.norm2(x))
