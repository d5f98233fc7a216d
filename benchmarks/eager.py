"""What a user would write: the masked autoencoder in plain eager PyTorch, in the usual style of such code.

The style: random noise and two argsorts choose the patches; every patch is embedded, by a convolution, and the
visible ones are gathered; mask tokens are concatenated and un-shuffled by a gather; the decoder predicts every patch;
the loss is formed for every patch and weighted by the mask; attention is two products and a softmax. Written from the
description of the method, to be compared with. `EagerMae` names its parameters as published checkpoints do.

Legend: B clips, F mel bands, T frames, ph x pw a patch, L patches, K visible, D and E widths of encoder and decoder.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from msm_dist.config import Geometry
from msm_dist.model.patches import PatchGrid, sincos_1d, sincos_2d


class Shuffle(NamedTuple):
    """A random order of the patches of each clip, the first of which stay visible."""

    ids_keep: Tensor  # [B, K]
    ids_restore: Tensor  # [B, L]
    mask: Tensor  # [B, L]: 0 visible, 1 masked


def shuffle(noise: Tensor, num_keep: int) -> Shuffle:
    """Keep the patches with the smallest noise [B, L]."""
    order = noise.argsort(dim=1)
    ids_restore = order.argsort(dim=1)
    mask = torch.ones_like(noise)
    mask[:, :num_keep] = 0
    return Shuffle(order[:, :num_keep], ids_restore, mask.gather(1, ids_restore))


def embed(spectrogram: Tensor, weight: Tensor, bias: Tensor, positions: Tensor) -> Tensor:
    """Every patch: [B, 1, F, T] and weight [D, 1, ph, pw] to [B, L, D], positions [L, D] added."""
    tokens = functional.conv2d(spectrogram, weight, bias, stride=weight.shape[2:])
    return tokens.flatten(2).transpose(1, 2) + positions


def keep(tokens: Tensor, chosen: Shuffle) -> Tensor:
    """The visible ones of [B, L, D]: [B, K, D]."""
    return tokens.gather(1, chosen.ids_keep.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def restore(tokens: Tensor, mask_token: Tensor, positions: Tensor, chosen: Shuffle) -> Tensor:
    """CLS and visible tokens [B, 1 + K, E] with mask tokens in the order of the clip: [B, 1 + L, E]."""
    batch, num_patches = chosen.ids_restore.shape
    hidden = mask_token.repeat(batch, num_patches + 1 - tokens.shape[1], 1)
    patches = torch.cat([tokens[:, 1:], hidden], dim=1)
    patches = patches.gather(1, chosen.ids_restore.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
    return torch.cat([tokens[:, :1], patches], dim=1) + positions


def patchify(spectrogram: Tensor, patch: tuple[int, int]) -> Tensor:
    """[B, 1, F, T] to [B, L, ph * pw]."""
    batch, _, bands, frames = spectrogram.shape
    ph, pw = patch
    grid = spectrogram.reshape(batch, bands // ph, ph, frames // pw, pw)
    return torch.einsum("bhpwq->bhwpq", grid).reshape(batch, -1, ph * pw)


def masked_loss(prediction: Tensor, spectrogram: Tensor, patch: tuple[int, int], mask: Tensor) -> Tensor:
    """Mean squared error of every patch [B, L, ph * pw], averaged over the masked ones."""
    errors = (prediction - patchify(spectrogram, patch)) ** 2
    return (errors.mean(dim=-1) * mask).sum() / mask.sum()


def attention(qkv: Tensor, num_heads: int) -> Tensor:
    """qkv [B, N, 3 * H * D] to [B, N, H * D], with scores and weights in memory."""
    batch, tokens, _ = qkv.shape
    q, k, v = qkv.reshape(batch, tokens, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(batch, tokens, -1)


class EagerMae(nn.Module):
    """Encoder, decoder and loss; parameters are uninitialised until a state_dict is loaded."""

    def __init__(self, geometry: Geometry, grid: PatchGrid, num_keep: int):
        super().__init__()
        self.patch, self.num_keep = grid.patch, num_keep
        width, narrow = geometry.embed_dim, geometry.decoder_embed_dim
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = _fixed(sincos_2d(grid, width, 1))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(1, width, grid.patch, grid.patch)})
        self.blocks = nn.Sequential(*(Block(width, geometry.num_heads) for _ in range(geometry.depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_embed = nn.Linear(width, narrow)
        self.mask_token = nn.Parameter(torch.empty(1, 1, narrow))
        self.decoder_pos_embed = _fixed(sincos_1d(grid.num_patches, narrow, 1))
        heads = geometry.decoder_num_heads
        self.decoder_blocks = nn.Sequential(*(Block(narrow, heads) for _ in range(geometry.decoder_depth)))
        self.decoder_norm = nn.LayerNorm(narrow, eps=1e-6)
        self.decoder_pred = nn.Linear(narrow, grid.patch_pixels)

    def forward(self, spectrogram: Tensor, noise: Tensor) -> Tensor:
        """The loss on [B, 1, F, T]; noise [B, L] chooses the patches."""
        chosen = shuffle(noise, self.num_keep)
        projection = self.patch_embed["proj"]
        x = keep(embed(spectrogram, projection.weight, projection.bias, self.pos_embed[:, 1:]), chosen)
        cls = self.cls_token + self.pos_embed[:, :1]
        x = self.norm(self.blocks(torch.cat([cls.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)))
        x = restore(self.decoder_embed(x), self.mask_token, self.decoder_pos_embed, chosen)
        x = self.decoder_pred(self.decoder_norm(self.decoder_blocks(x)))
        return masked_loss(x[:, 1:], spectrogram, self.patch, chosen.mask)


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](functional.gelu(self.mlp["fc1"](self.norm2(x))))


class Attention(nn.Module):
    """Queries and values with a bias, keys without."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.empty(width))
        self.v_bias = nn.Parameter(torch.empty(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        return self.proj(attention(functional.linear(x, self.qkv.weight, bias), self.num_heads))


def _fixed(table: Tensor) -> nn.Parameter:
    return nn.Parameter(table[None].clone(), requires_grad=False)
