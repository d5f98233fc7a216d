"""What a model sees and what it makes of it: spectrogram pictures and their sound.

In: a normalised log-mel [1, F, T], its Masking and the prediction of its masked patches, plain CPU tensors
of one clip. Out: an image (input | masked | reconstruction, low frequencies at the bottom) and two waveforms,
made from the mels by least squares and Griffin-Lim: an impression of the sound, not the recording. Nothing
is random and no global state of matplotlib is touched. Needs the [train] extra. Fails with OSError where a
PNG can't be written.

Legend: F mel bands, T frames, L patches, M masked ones, ph x pw a patch, H x W pixels of an image, S samples,
Q bins of the Fourier transform.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torchaudio.functional as audio
from torch import Tensor

from msm_dist.config import Features
from msm_dist.features import mel_filters
from msm_dist.model.patches import PatchGrid, patchify, unpatchify
from msm_kernels.patch_masking import Masking

COLORMAP = "magma"
MASKED_GREY = 128
PIXELS_PER_CELL = 3
GAP_PIXELS = 6
MEL_ITERATIONS = 60
PHASE_ITERATIONS = 32
PEAK = 0.9
QUIETEST = 0.03  # a peak below it is not raised to PEAK: silence stays silent
LOUDEST = 20.0  # nat; a wild prediction must not overflow


@dataclass(frozen=True)
class Picture:
    """One clip as TensorBoard shows it."""

    image: Tensor
    """uint8 [3, H, W]: input | masked | reconstruction."""
    audio: dict[str, Tensor]
    """input, reconstruction: float32 [S] in -1..1, both scaled by the same factor."""
    sample_rate: int


def make_picture(
    spectrogram: Tensor,
    masking: Masking,
    prediction: Tensor,
    patch_size: tuple[int, int],
    normalize_targets: bool,
    features: Features,
) -> Picture:
    """Picture of one clip: spectrogram [1, F, T], its prediction [M, ph * pw], its masking (batch size 1).

    `features` holds the mean and std that normalised the spectrogram.
    """
    rebuilt = reconstruct(spectrogram, masking, prediction, patch_size, normalize_targets)
    hidden = hidden_cells(spectrogram, masking, patch_size)
    logmels = torch.stack([spectrogram[0], rebuilt[0]]).float() * features.std + features.mean
    sounds = invert_logmel(logmels, features)
    sounds = sounds * (PEAK / sounds.abs().max().clamp_min(QUIETEST))
    return Picture(
        draw(spectrogram[0], hidden, rebuilt[0]),
        {"input": sounds[0], "reconstruction": sounds[1]},
        features.sample_rate,
    )


def reconstruct(
    spectrogram: Tensor,
    masking: Masking,
    prediction: Tensor,
    patch_size: tuple[int, int],
    normalize_targets: bool,
) -> Tensor:
    """The input [1, F, T] with its masked patches replaced by the prediction [M, ph * pw].

    A prediction of normalised targets is brought back with the mean and deviation of the patch it predicts.
    """
    patches = patchify(spectrogram[None], patch_size)[0]  # [L, ph * pw]
    masked = masking.ids_masked[0]
    prediction = prediction.to(patches.dtype)
    if normalize_targets:
        variance, mean = torch.var_mean(patches[masked], dim=-1, correction=1, keepdim=True)
        prediction = prediction * (variance + 1e-6).sqrt() + mean
    grid = PatchGrid(*spectrogram.shape[1:], patch_size)
    return unpatchify(patches.index_copy(0, masked, prediction), grid)[0]


def hidden_cells(spectrogram: Tensor, masking: Masking, patch_size: tuple[int, int]) -> Tensor:
    """Which cells of the spectrogram [1, F, T] the encoder did not see: bool [F, T]."""
    patches = torch.zeros(masking.ids_restore.shape[1], patch_size[0] * patch_size[1])
    patches[masking.ids_masked[0]] = 1
    return unpatchify(patches, PatchGrid(*spectrogram.shape[1:], patch_size))[0, 0].bool()


def draw(spectrogram: Tensor, hidden: Tensor, rebuilt: Tensor) -> Tensor:
    """Input, masked input and reconstruction [F, T] side by side on the input's scale: uint8 [3, H, W]."""
    from matplotlib import colormaps

    low, high = torch.quantile(spectrogram.float().flatten(), torch.tensor([0.005, 0.995]))
    shades = (torch.stack([spectrogram, rebuilt]).float() - low) / (high - low).clamp_min(1e-6)
    table = torch.from_numpy(colormaps[COLORMAP](range(256), bytes=True))[:, :3]
    seen, made = table[(shades.clamp(0, 1) * 255).round().long()]  # [F, T, 3] each
    masked = seen.masked_fill(hidden[..., None], MASKED_GREY)
    panels = [panel.flip(0).permute(2, 0, 1) for panel in (seen, masked, made)]
    panels = [p.repeat_interleave(PIXELS_PER_CELL, 1).repeat_interleave(PIXELS_PER_CELL, 2) for p in panels]
    gap = panels[0].new_full((3, panels[0].shape[1], GAP_PIXELS), 255)
    return torch.cat([panels[0], gap, panels[1], gap, panels[2]], dim=2)


def stack(images: Sequence[Tensor]) -> Tensor:
    """Images uint8 [3, H, W] of one size below each other."""
    gap = images[0].new_full((3, GAP_PIXELS, images[0].shape[2]), 255)
    rows = [row for image in images for row in (gap, image)]
    return torch.cat(rows[1:], dim=1)


def write_png(image: Tensor, path: Path) -> None:
    """Write uint8 [3, H, W] as a PNG that is there whole or not at all."""
    from matplotlib.image import imsave

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    imsave(temporary, image.permute(1, 2, 0).contiguous().numpy(), format="png")
    os.replace(temporary, path)


def invert_logmel(logmel: Tensor, features: Features) -> Tensor:
    """Waveforms whose log-mel is near `logmel` (natural log, not normalised): [B, F, T] -> float32 [B, S].

    S = hop * (T - 1). The power spectrum is the non-negative least-squares solution by multiplicative updates
    (Lee and Seung 2001), the phase is Griffin and Lim's (1984) with momentum, from zero phases.
    """
    bank = mel_filters(features).float()  # [Q, F]
    mel = logmel.float().clamp(max=LOUDEST).exp()
    projected, gram = bank @ mel, bank @ bank.T
    power = projected.clone()
    for _ in range(MEL_ITERATIONS):
        power = power * projected / (gram @ power).clamp_min(torch.finfo(power.dtype).tiny)
    waveform = audio.griffinlim(
        power,
        torch.hann_window(features.win),
        features.n_fft,
        features.hop,
        features.win,
        power=2.0,
        n_iter=PHASE_ITERATIONS,
        momentum=0.99,
        length=features.hop * (logmel.shape[-1] - 1),
        rand_init=False,
    )
    # The outer windows of a crop reach past its ends, where the phase has nothing to agree with: a click.
    fade = torch.linspace(0, 1, features.n_fft // 2)
    waveform[:, : len(fade)] *= fade
    waveform[:, -len(fade) :] *= fade.flip(0)
    return waveform
