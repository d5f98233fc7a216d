"""`msm-dist reconstruct`: what a trained model makes of the parts of a recording that it does not see.

In: weights with a trained decoder, audio files. Out: for each file a PNG (original, masked, reconstruction, error), the
sounds of the first three made from their mels, and the loss beside what is reached without a model. Equal calls give
equal files. Fails with CheckpointError, DataError, ConfigError.

Legend: C crops, F mel bands, T frames, L patches, M masked ones, S samples.
"""

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import soundfile
import torch
from torch import Tensor

from msm_dist.errors import CheckpointError, ConfigError
from msm_dist.evaluate.pictures import check_matplotlib, new_figure, png_bytes, read_crops, show, write_named
from msm_dist.features import CODE_LOW
from msm_dist.model.mae import MaskedSpectrogramModel
from msm_dist.model.origin import is_trained
from msm_dist.model.weights import WeightsInfo, load
from msm_dist.pictures import COLORMAP, MASKED_GREY, PEAK, QUIETEST, hidden_cells, invert_logmel, reconstruct
from msm_dist.references import mel_mean_patches, nearest_patches, normalized_patches, visible_mean_patches
from msm_kernels.masked_loss import masked_patch_loss
from msm_kernels.patch_masking import random_masking

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = ("original", "masked", "reconstruction", "error")
CORPUS_MEAN, VISIBLE_MEAN, NEAREST = "corpus mean", "visible mean per band", "nearest visible patch"


@dataclass(frozen=True)
class Reconstruction:
    """One crop; all [F, T] on the normalised scale."""

    start_seconds: float
    original: Tensor
    hidden: Tensor
    """bool: what the encoder did not see."""
    rebuilt: Tensor
    """The original with its hidden patches as predicted."""
    num_masked: int
    loss: float
    references: dict[str, float]
    """The same loss of predictions without a model."""


def reconstruct_files(
    run: Path,
    files: Sequence[Path],
    out: Path,
    start_seconds: float = 0.0,
    num_crops: int = 1,
    mask_ratio: float | None = None,
    seed: int = 0,
) -> Iterator[str]:
    """Write pictures and sounds of every file to `out`; as each is done, its losses as text.

    Raises CheckpointError and ConfigError before the first file, DataError at one that can't be read.
    """
    check_matplotlib()
    model, info = load(run)
    if not is_trained(info.origin, "decoder"):
        raise CheckpointError(
            f"{run}: its decoder is not trained, or not with this encoder (fine-tuned, or converted with the encoder "
            "alone), so it can reconstruct nothing; take the weights of a pre-training run"
        )
    ratio = info.model.mask_ratio if mask_ratio is None else mask_ratio
    taken: set[str] = set()
    for file in files:
        crops = read_crops(file, info, start_seconds, num_crops)
        made = reconstructions(model, info, crops.spectrogram, ratio, seed, crops.start_seconds)
        rate = info.features.sample_rate
        contents = {f".{kind}.wav": _wav_bytes(waveform, rate) for kind, waveform in sounds(made, info).items()}
        contents[".png"] = png_bytes(draw(made, info, file.name))
        written = write_named(out, file.stem, contents, taken)
        lines = [f"{file} from {one.start_seconds:.2f} s: {_told(one)}" for one in made]
        yield "\n".join([*lines, f"  {written}.png, and .original.wav, .masked.wav, .reconstruction.wav"])


@torch.no_grad()
def reconstructions(
    model: MaskedSpectrogramModel,
    info: WeightsInfo,
    spectrogram: Tensor,
    mask_ratio: float,
    seed: int = 0,
    start_seconds: float = 0.0,
) -> list[Reconstruction]:
    """Hide patches of consecutive crops [C, 1, F, T] and let the model predict them, each crop with a mask of its own.

    Masks are a function of (seed, number of the crop). Raises ConfigError for a ratio that hides all or nothing.
    """
    num_patches, patch = model.grid.num_patches, model.grid.patch
    num_keep = int(num_patches * (1 - mask_ratio))
    if not 0 < num_keep < num_patches:
        raise ConfigError(
            f"--mask-ratio {mask_ratio:g}: of {num_patches} patches {num_keep} stay visible; at least one must be "
            "visible and one hidden"
        )
    normalized, seconds = info.model.normalize_targets, info.crop_frames * info.features.hop / info.features.sample_rate
    model.eval()
    made = []
    for number, crop in enumerate(spectrogram):
        ids = torch.tensor([[0, number, 0]])
        masking = random_masking(seed, ids, num_patches, num_keep, model.backend)
        output = model(crop[None], masking=masking)
        means = crop.new_zeros(info.features.n_mels)
        predictions = {
            CORPUS_MEAN: mel_mean_patches(crop[None], masking, patch, means),
            VISIBLE_MEAN: visible_mean_patches(crop[None], masking, patch, means),
            NEAREST: nearest_patches(crop[None], masking, patch),
        }
        if normalized:
            predictions = {name: normalized_patches(patches) for name, patches in predictions.items()}
        references = {
            name: masked_patch_loss(patches, crop[None], masking, patch, normalized, model.backend).item()
            for name, patches in predictions.items()
        }
        rebuilt = reconstruct(crop, masking, output.prediction[0], patch, normalized)
        made.append(
            Reconstruction(
                start_seconds + number * seconds,
                crop[0],
                hidden_cells(crop, masking, patch),
                rebuilt[0],
                num_patches - num_keep,
                output.loss.item(),
                references,
            )
        )
    return made


def draw(made: Sequence[Reconstruction], info: WeightsInfo, title: str) -> "Figure":
    """A row for each crop: original, masked (hidden cells grey), reconstruction, and the error in nat."""
    from matplotlib import colormaps

    std = info.features.std
    values = torch.cat([one.original for one in made]).flatten() * std + info.features.mean
    low, high = np.quantile(values.numpy(), [0.005, 0.995])
    grey = (MASKED_GREY / 255,) * 3
    colors = colormaps[COLORMAP].with_extremes(bad=grey)
    errors = [(one.rebuilt - one.original).abs() * std for one in made]
    largest = max(error.max().item() for error in errors)
    figure = new_figure(16, 0.8 + 2.4 * len(made))
    figure.suptitle(title)
    axes = figure.subplots(len(made), len(PANELS), squeeze=False, sharey=True)
    for row, one, error in zip(axes, made, errors, strict=True):
        original, rebuilt = ((part * std + info.features.mean).numpy() for part in (one.original, one.rebuilt))
        masked = np.ma.masked_where(one.hidden.numpy(), original)
        for panel, name, image in zip(row, PANELS, (original, masked, rebuilt, error.numpy()), strict=True):
            scale = (
                {"vmin": 0, "vmax": largest or 1} if name == "error" else {"vmin": low, "vmax": max(high, low + 1e-3)}
            )
            shown = show(panel, image, info, one.start_seconds, info.crop_frames, cmap=colors, **scale)
            panel.set_title(name if name != "reconstruction" else f"{name}, loss {one.loss:.3f}", fontsize=9)
            panel.set_xlabel("seconds", fontsize=8)
            if name in PANELS[2:]:
                figure.colorbar(shown, ax=panel, label="nat")
        row[0].set_ylabel("mel band", fontsize=8)
    return figure


def sounds(made: Sequence[Reconstruction], info: WeightsInfo) -> dict[str, Tensor]:
    """original, masked (hidden cells silent) and reconstruction as float32 [S] in -1..1, scaled by one factor.

    Made from the mels, the original too, so that they can be compared: an impression, not the recording.
    """
    silence = torch.tensor((CODE_LOW - info.features.mean) / info.features.std)
    parts = {
        "original": [one.original for one in made],
        "masked": [torch.where(one.hidden, silence, one.original) for one in made],
        "reconstruction": [one.rebuilt for one in made],
    }
    logmels = torch.stack([torch.cat(crops, dim=1) for crops in parts.values()])  # [3, F, C * T]
    waveforms = invert_logmel(logmels * info.features.std + info.features.mean, info.features)
    waveforms = waveforms * (PEAK / waveforms.abs().max().clamp_min(QUIETEST))
    return dict(zip(parts, waveforms, strict=True))


def _told(one: Reconstruction) -> str:
    references = ", ".join(f"{name} {loss:.4f}" for name, loss in one.references.items())
    loss = f"{one.loss:.4f}" if math.isfinite(one.loss) else "not finite"
    return f"loss {loss} on {one.num_masked} masked patches; without a model: {references}"


def _wav_bytes(waveform: Tensor, sample_rate: int) -> bytes:
    content = io.BytesIO()
    soundfile.write(content, waveform.numpy(), sample_rate, format="WAV", subtype="PCM_16")
    return content.getvalue()
