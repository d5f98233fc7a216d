"""The HEAR 2021 common API over a trained encoder: the three functions that hear-validator and hear-eval-kit call.

In: the place of trained weights, and batches of mono waveforms at the model's own rate, which nobody resamples here.
Out: one vector per clip, or one per time step with its centre in milliseconds. A clip's vectors do not depend on its
batch. Fails with ConfigError where no weights are named, on a wrong option and where HEAR has no audio at their rate,
with CheckpointError on weights that can't be loaded, with DataError on audio that can't be embedded.
Source: Turian et al. 2022, "HEAR: Holistic Evaluation of Audio Representations", section "Common API".

Legend: B clips, S samples, T time steps, E embedding size.
"""

import os

import torch
from torch import Tensor, nn

from msm_dist.errors import ConfigError
from msm_dist.evaluate.checks import check_layer, checked_mean_and_std
from msm_dist.evaluate.encoder import Encoder
from msm_dist.evaluate.normalization import Normalization

VARIABLE = "MSM_DIST_HEAR_MODEL"
"""Environment variable that names the weights where `load_model` is called without any."""
SAMPLE_RATES = (16000, 22050, 32000, 44100, 48000)
"""Those that the audio of the HEAR tasks is published in, Hz."""


class HearModel(nn.Module):
    """A trained encoder with the attributes that HEAR asks for. It computes on the device of the audio it is given."""

    def __init__(self, encoder: Encoder, source: str, layer: int | None = None):
        super().__init__()
        self.encoder = encoder
        self.source = source
        self.layer = layer
        self.sample_rate: int = self.encoder.features.sample_rate
        self.timestamp_embedding_size: int = self.encoder.embedding_size
        self.scene_embedding_size: int = self.encoder.embedding_size

    def forward(self, audio: Tensor) -> Tensor:
        """Vectors over time: floating [B, S] in [-1, 1] at `sample_rate` -> float32 [B, T, E]. Raises DataError."""
        return self.encoder_on(audio.device).encode(audio, self.sample_rate, layer=self.layer)

    def encoder_on(self, device: torch.device) -> Encoder:
        """The encoder on this device; the HEAR tools move a model with `to` and give it audio where they moved it."""
        self.encoder = self.encoder.to(device)
        return self.encoder

    def extra_repr(self) -> str:
        """What hear-validator prints of the model."""
        layer = "the result" if self.layer is None else f"layer {self.layer}"
        size = f"{self.scene_embedding_size} numbers a time step"
        return f"{self.source}, {self.sample_rate} Hz, {size}, {layer}, normalization {self.encoder.normalization}"


def load_model(
    model_file_path: str | os.PathLike[str] | None = "",
    normalization: Normalization = "checkpoint",
    mean: float | None = None,
    std: float | None = None,
    layer: int | None = None,
) -> HearModel:
    """The model in a run folder, a folder with exported weights, or hf://owner/name.

    Without a path the environment variable MSM_DIST_HEAR_MODEL names it. `normalization` is the encoder's, "dataset"
    with the `mean` and `std` of a log-mel; `layer` k is what leaves block k. Raises ConfigError, CheckpointError.
    """
    if not isinstance(model_file_path, str | os.PathLike | None):
        raise ConfigError(f"model_file_path = {model_file_path!r}: must be the path of a run or of exported weights")
    source = os.fspath(model_file_path or "") or os.environ.get(VARIABLE, "")
    if not source:
        raise ConfigError(
            "model_file_path is empty: no weights are part of this package; name a run or a folder with exported "
            f"weights (--model runs/quickstart of the HEAR tools), or set {VARIABLE}=runs/quickstart"
        )
    wanted = normalization == "dataset"
    if [mean is not None, std is not None] != [wanted, wanted]:
        raise ConfigError(
            f"normalization = {normalization}, mean = {mean}, std = {std}: normalization = dataset takes both numbers, "
            "no other takes any; Encoder.for_dataset measures them"
        )
    statistics = checked_mean_and_std((mean, std)) if wanted else None
    encoder = Encoder.load(source, normalization=normalization, statistics=statistics)
    if encoder.features.sample_rate not in SAMPLE_RATES:
        raise ConfigError(
            f"{source}: features.sample_rate = {encoder.features.sample_rate}: HEAR's audio comes at "
            f"{', '.join(map(str, SAMPLE_RATES))} Hz, and its models may not resample; train at one of these rates"
        )
    check_layer(layer, encoder.depth)
    if layer == "all":
        raise ConfigError("layer = 'all': HEAR takes one vector a time step; name one layer")
    return HearModel(encoder, source, layer)


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
