"""The HEAR 2021 common API over a trained encoder: the three functions that hear-validator and hear-eval-kit call.

In: the place of trained weights, and batches of mono waveforms at the model's own rate, which nobody resamples here.
Out: one vector per clip, or one per time step with its centre in milliseconds. A clip's vectors do not depend on its
batch. Fails with ConfigError where no weights are named or their rate is not one that HEAR has audio in, with
CheckpointError on weights that can't be loaded, with DataError on audio that can't be embedded.
Source: Turian et al. 2022, "HEAR: Holistic Evaluation of Audio Representations", section "Common API".

Legend: B clips, S samples, T time steps, E embedding size.
"""

import os

import torch
from torch import Tensor, nn

from msm_dist.errors import ConfigError
from msm_dist.evaluate.encoder import Encoder

VARIABLE = "MSM_DIST_HEAR_MODEL"
"""Environment variable that names the weights where `load_model` is called without any."""
SAMPLE_RATES = (16000, 22050, 32000, 44100, 48000)
"""Those that the audio of the HEAR tasks is published in, Hz."""


class HearModel(nn.Module):
    """A trained encoder with the attributes that HEAR asks for. It computes on the device of the audio it is given."""

    def __init__(self, source: str):
        super().__init__()
        self.source = source
        self.encoder = Encoder.load(source)
        self.sample_rate: int = self.encoder.features.sample_rate
        self.timestamp_embedding_size: int = self.encoder.embedding_size
        self.scene_embedding_size: int = self.encoder.embedding_size

    def forward(self, audio: Tensor) -> Tensor:
        """Vectors over time: floating [B, S] in [-1, 1] at `sample_rate` -> float32 [B, T, E]. Raises DataError."""
        return self.encoder_on(audio.device).encode(audio, self.sample_rate)

    def encoder_on(self, device: torch.device) -> Encoder:
        """The encoder on this device; the HEAR tools move a model with `to` and give it audio where they moved it."""
        if self.encoder.device != device:
            self.encoder = Encoder.load(self.source, device=device)
        return self.encoder

    def extra_repr(self) -> str:
        """What hear-validator prints of the model."""
        return f"{self.source}, {self.sample_rate} Hz, {self.scene_embedding_size} numbers a time step"


def load_model(model_file_path: str | os.PathLike[str] = "") -> HearModel:
    """The model in a run folder, a folder with exported weights, or hf://owner/name.

    Without a path the environment variable MSM_DIST_HEAR_MODEL names it. Raises ConfigError, CheckpointError.
    """
    source = os.fspath(model_file_path) or os.environ.get(VARIABLE, "")
    if not source:
        raise ConfigError(
            "model_file_path is empty: no weights are part of this package; name a run or a folder with exported "
            f"weights (--model runs/quickstart of the HEAR tools), or set {VARIABLE}=runs/quickstart"
        )
    model = HearModel(source)
    if model.sample_rate not in SAMPLE_RATES:
        raise ConfigError(
            f"{source}: features.sample_rate = {model.sample_rate}: HEAR's audio comes at "
            f"{', '.join(map(str, SAMPLE_RATES))} Hz, and its models may not resample; train at one of these rates"
        )
    return model


def get_scene_embeddings(audio: Tensor, model: HearModel) -> Tensor:
    """One vector per clip, the mean over its time steps: [B, S] in [-1, 1] -> float32 [B, E]. Raises DataError."""
    return model(audio).mean(dim=1)


def get_timestamp_embeddings(audio: Tensor, model: HearModel) -> tuple[Tensor, Tensor]:
    """Vectors over time and the centres of their time steps in ms: [B, S] -> float32 [B, T, E] and [B, T].

    A last step whose centre is past the end of the audio is left out: less than half of it was heard. A clip so short
    that it has no other keeps it, stamped with the clip's end. Raises DataError.
    """
    frames = model(audio)
    end_ms = 1000 * audio.shape[1] / model.sample_rate
    stamps = model.encoder.timestamps_ms(frames.shape[1]).to(audio.device)
    num_steps = max(1, int((stamps <= end_ms).sum()))
    stamps = stamps[:num_steps].clamp(max=end_ms)
    return frames[:, :num_steps], stamps.expand(len(frames), -1).contiguous()
