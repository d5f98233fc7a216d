"""The log-mel front end: waveforms to natural-log Slaney mel spectrograms.

In: a batch of mono waveforms at `Features.sample_rate`, whole clips or crops, or of stored log-mels. Out:
log-mel [B, 1, F, T] float32, not normalised; `normalize` applies the corpus' statistics. Fails with DataError on a
waveform that is too short to hold a frame.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torchaudio.functional import melscale_fbanks, spectrogram

from msm_dist.config import Features
from msm_dist.errors import DataError

LOG_OFFSET = 1.1920929e-7  # added before the logarithm; the spacing of float32 at 1
INT16_SCALE = 1 / 32768
CODE_LOW = math.log(LOG_OFFSET)  # silence
CODE_STEP = 0.09  # nat; 255 steps reach 7.008, and no waveform in -1..1 has more than 7.004 with the usual front end


class LogMel(nn.Module):
    """log(mel power + 1.1920929e-7), on the device of its input.

    The spectrum is formed in float64 and rounded to float32 once: in float32 the quiet bands beside a loud
    tone are off by up to 8e-4 nat, and TF32 would add to that. Window and filters are float64 buffers: keep
    it outside the module that an engine casts.
    """

    def __init__(self, features: Features):
        super().__init__()
        self.features = features
        window = torch.hann_window(features.win, periodic=True, dtype=torch.float64)
        self.register_buffer("window", window, persistent=False)
        self.register_buffer("filters", mel_filters(features), persistent=False)
        self.code_step = code_step(self.filters, self.window)

    def forward(self, waveform: Tensor, centred: bool = False) -> Tensor:
        """Log-mel of waveforms [B, S], floating in [-1, 1] or int16: float32 [B, 1, F, T].

        centred=False, for crops: frame t reads samples [hop * t, hop * t + n_fft); T is
        1 + (S - n_fft) // hop. centred=True, for whole clips: frame t is centred on sample hop * t, the ends
        are reflected (a clip of n_fft // 2 samples or fewer is zero-padded at its end first); T is
        1 + S // hop. uint8 [B, T, F] are crops of a stored log-mel (`quantize`). Raises DataError where S holds no
        frame.
        """
        if waveform.dtype == torch.uint8:
            return dequantize(waveform, self.code_step).transpose(1, 2).unsqueeze(1)
        if waveform.ndim != 2:
            raise ValueError(f"waveform is {list(waveform.shape)}: must be [clips, samples]")
        needed = 1 if centred else self.features.n_fft
        if waveform.shape[1] < needed:
            raise DataError(f"waveform of {waveform.shape[1]} samples: a log-mel needs at least {needed}")
        num_frames = self.features.num_frames(waveform.shape[1])
        scale = INT16_SCALE if waveform.dtype == torch.int16 else 1.0
        waveform = waveform.double() * scale
        if centred:
            waveform = _reflect_ends(waveform, self.features.n_fft // 2)[:, : self.features.crop_samples(num_frames)]
        power = spectrogram(
            waveform,
            pad=0,
            window=self.window.to(waveform.device),
            n_fft=self.features.n_fft,
            hop_length=self.features.hop,
            win_length=self.features.win,
            power=2.0,
            normalized=False,
            center=False,
        )
        mel = self.filters.to(waveform.device).T @ power
        return (mel + LOG_OFFSET).log().float().unsqueeze(1)


def normalize(logmel: Tensor, mean: float, std: float) -> Tensor:
    """(log-mel - mean) / std with the two scalars of the corpus."""
    return (logmel - mean) / std


def quantize(logmel: Tensor, step: float = CODE_STEP) -> Tensor:
    """Log-mel [..., F, T] as stored: uint8 [..., T, F], time-major, `step` nat apart from CODE_LOW on."""
    codes = ((logmel.transpose(-1, -2) - CODE_LOW) / step).round()
    return codes.clamp(0, 255).to(torch.uint8)


def dequantize(codes: Tensor, step: float = CODE_STEP) -> Tensor:
    """The log-mel values of uint8 codes, float32 of the same shape; off by half a `step` at most."""
    return codes.float() * step + CODE_LOW


def code_step(filters: Tensor, window: Tensor) -> float:
    """The step of a front end's codes: CODE_STEP, or as much more as 255 of them need to reach its loudest value.

    For samples in -1..1 a bin's power is at most (sum of the window) squared, a band's that times its filter's sum.
    """
    loudest = filters.sum(0).max() * window.sum() ** 2 + LOG_OFFSET
    return max(CODE_STEP, (loudest.log().item() - CODE_LOW) / 255)


def mel_filters(features: Features) -> Tensor:
    """Triangular filters, Slaney scale and area normalisation: float64 [n_fft // 2 + 1, n_mels]."""
    # torchaudio builds them in the default dtype, and in float32 they are off by 1e-4 nat.
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return melscale_fbanks(
            n_freqs=features.n_fft // 2 + 1,
            f_min=features.fmin,
            f_max=features.fmax,
            n_mels=features.n_mels,
            sample_rate=features.sample_rate,
            norm="slaney",
            mel_scale="slaney",
        )
    finally:
        torch.set_default_dtype(default)


def _reflect_ends(waveform: Tensor, margin: int) -> Tensor:
    missing = max(0, margin + 1 - waveform.shape[1])
    return pad(pad(waveform, (0, missing)), (margin, margin), mode="reflect")
