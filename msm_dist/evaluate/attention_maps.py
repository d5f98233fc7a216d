"""`msm-dist attention`: where the heads of a trained encoder look, over the spectrogram.

In: weights, audio files. Out: for each file a PNG with the self-attention of chosen layers and heads, as a query sees
it: the CLS token, one patch, or the mean over all patches. The weights are computed by a plain softmax from the queries
and keys of each block, not taken from a fused kernel, which never holds them. Fails with CheckpointError, DataError and
ConfigError.

Legend: B clips, F mel bands, T frames, P prefix tokens (1 with CLS), L = Fg * Tg patches, N = P + L tokens, H heads.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from msm_dist.errors import ConfigError
from msm_dist.evaluate.pictures import check_matplotlib, new_figure, png_bytes, read_crops, show, write_named
from msm_dist.model.mae import Encoder
from msm_dist.model.transformer import Block
from msm_dist.model.weights import WeightsInfo, load

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEADS_IN_A_ROW = 4
CLS, MEAN = "cls", "mean"


@dataclass(frozen=True)
class Seen:
    """What a query sees of the patches of one crop."""

    weights: Tensor
    """float32 [layers, heads, Fg, Tg]."""
    layers: Sequence[int]
    heads: Sequence[int]
    """Numbers from 0, as many as `weights` has."""
    query: str


def attention_files(
    run: Path,
    files: Sequence[Path],
    out: Path,
    layer: str = "last",
    head: int | None = None,
    query: str | None = None,
    start_seconds: float = 0.0,
) -> Iterator[str]:
    """Draw the attention over the first crop from `start_seconds` on of every file to `out`; as each is done, a line.

    `layer` is a number from 1, "last" or "all"; `head` a number from 1, or all. `query` is "cls", "mean" or a patch as
    ROW,COLUMN, counted from 0 at low frequencies and at the start; CLS where the model has it, else mean.
    """
    check_matplotlib()
    model, info = load(run)
    encoder = model.encoder.eval()
    query = query or (CLS if encoder.num_prefix else MEAN)
    layers = _layers(layer, len(encoder.blocks))
    heads = _heads(head, info.model.geometry.num_heads)
    taken: set[str] = set()
    for file in files:
        crops = read_crops(file, info, start_seconds)
        width = info.model.patch[1]
        # A short recording at its own length, as it is embedded: attention to filled-up silence would mean nothing.
        spectrogram = crops.spectrogram[..., : -(-crops.num_frames // width) * width]
        shape = (info.features.n_mels // info.model.patch[0], spectrogram.shape[-1] // width)
        maps = attention_maps(encoder, spectrogram)[layers][:, 0][:, heads]
        seen = Seen(from_query(maps, query, encoder.num_prefix, shape), layers, heads, query)
        picture = png_bytes(draw(seen, spectrogram[0, 0], info, crops.start_seconds, file.name))
        written = write_named(out, file.stem, {".attention.png": picture}, taken)
        yield f"{written}.attention.png: {_query_named(query)}, {len(layers)} layers x {len(heads)} heads"


@torch.no_grad()
def attention_maps(encoder: Encoder, spectrogram: Tensor) -> Tensor:
    """Attention weights of every block for normalised spectrograms [B, 1, F, T], all patches visible.

    float32 [depth, B, H, N, N]; the weights of a query (a row) sum to 1. With CLS, token 0 is CLS.
    """
    inputs: list[Tensor] = []
    hooks = [block.register_forward_pre_hook(lambda _, given: inputs.append(given[0])) for block in encoder.blocks]
    try:
        encoder(spectrogram)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack([attention_weights(block, x) for block, x in zip(encoder.blocks, inputs, strict=True)])


def attention_weights(block: Block, x: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(width of a head)) for what enters a block [B, N, D]: [B, H, N, N]."""
    heads = block.attn.num_heads
    q, k, _ = block.attn.qkv(block.norm1(x)).unflatten(2, (3, heads, -1)).float().permute(2, 0, 3, 1, 4)  # [B, H, N, C]
    return ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(dim=-1)


def from_query(maps: Tensor, query: str, num_prefix: int, shape: tuple[int, int]) -> Tensor:
    """What a query sees of the patches: weights [..., N, N] -> [..., Fg, Tg]. Raises ConfigError.

    What goes to CLS is left out, so that a map sums to 1 at most.
    """
    if query == MEAN:
        rows = maps[..., num_prefix:, :].mean(dim=-2)
    elif query == CLS and num_prefix:
        rows = maps[..., 0, :]
    elif query == CLS:
        raise ConfigError("--query cls: this model has no CLS token; take mean, or a patch as ROW,COLUMN")
    else:
        row, column = _patch(query, shape)
        rows = maps[..., num_prefix + row * shape[1] + column, :]
    return rows[..., num_prefix:].unflatten(-1, shape)


def draw(seen: Seen, spectrogram: Tensor, info: WeightsInfo, start_seconds: float, name: str) -> "Figure":
    """The spectrogram [F, T] of the recording `name`, below it every map over it, each on its own scale."""
    layers, heads = seen.layers, seen.heads
    columns = len(heads) if len(layers) > 1 else min(HEADS_IN_A_ROW, len(heads))
    panels = [(layer, head) for layer in range(len(layers)) for head in range(len(heads))]
    rows = -(-len(panels) // columns)
    figure = new_figure(max(6.0, 3.2 * columns), 0.6 + 2.2 * (rows + 1))
    figure.suptitle(f"{name}: attention of {_query_named(seen.query)}", fontsize=10)
    frames, values = spectrogram.shape[1], spectrogram.numpy()
    grid = figure.add_gridspec(rows + 1, columns)
    top = figure.add_subplot(grid[0, :])
    show(top, values, info, start_seconds, frames, cmap="magma")
    top.set_ylabel("mel band", fontsize=8)
    for number, (layer, head) in enumerate(panels):
        axes = figure.add_subplot(grid[1 + number // columns, number % columns])
        weights = seen.weights[layer, head].numpy()
        show(axes, values, info, start_seconds, frames, cmap="gray")
        show(axes, weights, info, start_seconds, frames, cmap="inferno", alpha=0.65, vmin=0, vmax=weights.max())
        axes.set_title(f"layer {layers[layer] + 1}, head {heads[head] + 1}, up to {weights.max():.3f}", fontsize=8)
        axes.tick_params(labelsize=6)
    if seen.query not in (CLS, MEAN):
        for axes in figure.axes:
            _mark(axes, seen.query, info, start_seconds, tuple(seen.weights.shape[-2:]))
    return figure


def _mark(axes: "Axes", query: str, info: WeightsInfo, start_seconds: float, shape: tuple[int, int]) -> None:
    """A frame around the patch that asks."""
    from matplotlib.patches import Rectangle

    row, column = _patch(query, shape)
    height, width = info.model.patch
    seconds = width * info.features.hop / info.features.sample_rate
    corner = (start_seconds + column * seconds, row * height)
    axes.add_patch(Rectangle(corner, seconds, height, fill=False, edgecolor="cyan", linewidth=1.5))


def _patch(query: str, shape: tuple[int, int]) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+),(\d+)", query)
    if not match:
        raise ConfigError(f"--query {query}: must be cls, mean, or a patch as ROW,COLUMN, such as 2,5")
    row, column = int(match[1]), int(match[2])
    if row >= shape[0] or column >= shape[1]:
        raise ConfigError(f"--query {query}: there are {shape[0]} x {shape[1]} patches, counted from 0,0")
    return row, column


def _query_named(query: str) -> str:
    return {CLS: "the CLS token", MEAN: "all patches, mean"}.get(query, f"patch {query}")


def _layers(layer: str, depth: int) -> list[int]:
    """Numbers from 0."""
    if layer == "all":
        return list(range(depth))
    number = depth if layer == "last" else int(layer) if layer.isdecimal() else 0
    if not 1 <= number <= depth:
        raise ConfigError(f"--layer {layer}: must be 1 to {depth}, last or all")
    return [number - 1]


def _heads(head: int | None, num_heads: int) -> list[int]:
    if head is not None and not 1 <= head <= num_heads:
        raise ConfigError(f"--head {head}: must be 1 to {num_heads}")
    return list(range(num_heads)) if head is None else [head - 1]
