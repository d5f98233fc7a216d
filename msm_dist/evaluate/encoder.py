"""Audio of any length to embeddings, with a trained encoder and nothing that only training needs.

In: mono waveforms at any rate, and the weights of a run. Out: a vector per time step, or one per clip; a
clip's vectors do not depend on the other clips of its batch. The log-mel is cut in chunks as long as the
model's crops; the last one runs at its own length, with its own columns of the position table (RECIPE of the
method: features for downstream use). Fails with CheckpointError on weights that can't be loaded, with
DataError on a waveform that can't be embedded.

Legend: B clips, S samples, F mel bands, T time steps, L = Fg * Tg patches of a chunk, D width of the encoder,
E = Fg * D.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from msm_dist.data.audio import MAX_RATE, MIN_RATE, resample
from msm_dist.errors import DataError
from msm_dist.features import LogMel, normalize
from msm_dist.model.mae import MaskedSpectrogramModel
from msm_dist.model.weights import WeightsInfo, load


class Encoder:
    """A trained encoder with its front end and the statistics it was trained with."""

    def __init__(self, model: MaskedSpectrogramModel, info: WeightsInfo, device: str | torch.device = "cpu"):
        self.info = info
        """What the weights say beside themselves: geometry, front end, crop and origin."""
        self.features = info.features
        self.device = torch.device(device)
        self._grid = model.grid
        self._encoder = model.encoder.to(self.device).eval()
        self._front_end = LogMel(info.features).to(self.device)
        self.embedding_size = self._grid.shape[0] * info.model.geometry.embed_dim
        """E: the patches of a time step side by side, low frequencies first."""

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "Encoder":
        """Read the weights of a run folder, or of a folder that holds weights. Raises CheckpointError."""
        return cls(*load(path), device=device)

    @torch.no_grad()
    def encode(self, waveform: Tensor, sample_rate: int) -> Tensor:
        """Vectors over time: floating [B, S] in [-1, 1] at `sample_rate` Hz -> float32 [B, T, E].

        One per patch width (160 ms at 16 frames), zeros filling up the last. Raises DataError.
        """
        _check(waveform, sample_rate)
        chunks = self._spectrogram(self._at_own_rate(waveform, sample_rate)).split(self._grid.frames, dim=-1)
        return torch.cat([self._encode_chunk(chunk) for chunk in chunks], dim=1)

    def embed(self, waveform: Tensor, sample_rate: int) -> Tensor:
        """One vector per clip, the mean of `encode` over time: [B, S] -> float32 [B, E]."""
        return self.encode(waveform, sample_rate).mean(dim=1)

    def timestamps_ms(self, num_steps: int) -> Tensor:
        """Centres of the first `num_steps` time steps in ms: float32 [num_steps], such as 75, 235, 395."""
        width = self._grid.patch[1]
        frames = torch.arange(num_steps, dtype=torch.float64) * width + (width - 1) / 2
        return (frames * (1000 * self.features.hop / self.features.sample_rate)).float()

    def _at_own_rate(self, waveform: Tensor, sample_rate: int) -> Tensor:
        """float32 [B, S] on the encoder's device, resampled as the clips were that it was trained on."""
        if sample_rate != self.features.sample_rate:
            clips = [resample(clip, sample_rate, self.features.sample_rate) for clip in waveform.float().cpu().numpy()]
            waveform = torch.from_numpy(np.stack(clips))
        return waveform.to(self.device, torch.float32)

    def _spectrogram(self, waveform: Tensor) -> Tensor:
        """Normalised log-mel [B, 1, F, T * pw] of whole patches; the waveform's last patch is zero-padded."""
        hop, width = self.features.hop, self._grid.patch[1]
        # A frame centred on the very end of a clip holds no new samples; it would open a patch of padding.
        num_frames = -(-waveform.shape[1] // hop)
        num_frames = -(-num_frames // width) * width
        missing = max(0, hop * (num_frames - 1) - waveform.shape[1])
        logmel = self._front_end(pad(waveform, (0, missing)), centred=True)[..., :num_frames]
        return normalize(logmel, self.features.mean, self.features.std)

    def _encode_chunk(self, spectrogram: Tensor) -> Tensor:
        """[B, 1, F, Tg * pw] -> [B, Tg, E]."""
        tokens = self._encoder.features(spectrogram)  # [B, L, D], frequency-major
        rows = self._grid.shape[0]
        return tokens.unflatten(1, (rows, -1)).transpose(1, 2).flatten(2)


def _check(waveform: Tensor, sample_rate: int) -> None:
    if waveform.ndim != 2 or not waveform.is_floating_point():
        raise DataError(
            f"waveform is {waveform.dtype} {list(waveform.shape)}: must be floating point [clips, samples] "
            "in [-1, 1]; a single clip is waveform[None], int16 samples are waveform / 32768"
        )
    if not waveform.numel():
        raise DataError(f"waveform is {list(waveform.shape)}: must hold at least one clip and one sample")
    if not torch.isfinite(waveform).all():
        raise DataError("waveform holds NaN or infinite samples: leave those clips out")
    if not MIN_RATE <= sample_rate <= MAX_RATE:
        raise DataError(
            f"sample_rate = {sample_rate}: must be the rate of the waveform in Hz, {MIN_RATE} to {MAX_RATE}"
        )
