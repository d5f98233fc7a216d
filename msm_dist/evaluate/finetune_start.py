"""What a fine-tuning run starts from: the weights, the classifier made of them, the length of the run.

In: a FinetuneConfig. Out: `Start`, a Classifier at step 0, numbers of steps. Fails with CheckpointError on weights that
can't be read, with ConfigError where they don't fit the settings.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

import torch

from msm_dist.engine.runfolder import compare_plan
from msm_dist.errors import CheckpointError, ConfigError
from msm_dist.evaluate import hub
from msm_dist.evaluate.augment import num_kept
from msm_dist.evaluate.classifier import Classifier, Head
from msm_dist.evaluate.finetune_config import FinetuneConfig
from msm_dist.evaluate.finetune_data import Cut
from msm_dist.model import weights
from msm_dist.model.tensors import differences
from msm_dist.model.weights import WEIGHTS_FILE, WeightsInfo, weights_folder
from msm_dist.plain import parse_yaml


@dataclass(frozen=True)
class Start:
    """The weights that fine-tuning starts from."""

    encoder: dict[str, torch.Tensor]
    decoder: dict[str, torch.Tensor]
    """Goes into the export as it is, for the encoder to be read as any other."""
    info: WeightsInfo
    digest: str
    """sha256 of the file of tensors."""

    @property
    def identity(self) -> str:
        """The digest of all that a run starts from: tensors, geometry, front end with its statistics, crop."""
        # How they are trained is no property of weights.
        model = self.info.model.model_dump(mode="json", exclude={"backend", "activation_checkpointing"})
        features = self.info.features.model_dump(mode="json")
        return hashlib.sha256(
            json.dumps([self.digest, model, features, self.info.crop_frames], sort_keys=True).encode()
        ).hexdigest()


def read_start(cfg: FinetuneConfig) -> Start:
    """The weights to start from, their digest. Raises CheckpointError."""
    folder = hub.download(cfg.weights) if cfg.weights.startswith(hub.SCHEME) else weights_folder(cfg.weights)
    tensors, info = weights.read(folder)
    try:
        with (folder / WEIGHTS_FILE).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{folder / WEIGHTS_FILE}: can't be read ({error.strerror})") from None
    encoder = {name: value for name, value in tensors.items() if name.startswith("encoder.")}
    decoder = {name: value for name, value in tensors.items() if not name.startswith("encoder.")}
    return Start(encoder, decoder, info, digest)


def compare_identity(cfg: FinetuneConfig, identity: dict[str, Any]) -> None:
    """Raise ConfigError where a run of that name began with other weights, clips or labels; another task is named."""
    try:
        compare_plan(cfg.run.folder, identity)
    except ConfigError as error:
        try:
            recorded = parse_yaml((cfg.run.folder / "config.yaml").read_text(encoding="utf-8"))["data"]["task"]
        except (OSError, ValueError, LookupError, TypeError):
            recorded = cfg.data.task
        told = "" if recorded == cfg.data.task else f"\nIts task was {recorded}, now it is {cfg.data.task}."
        raise ConfigError(f"{error}{told}") from None


def new_classifier(cfg: FinetuneConfig, start: Start, head: Head) -> Classifier:
    """The weights' encoder with a fresh head. Raises ConfigError, CheckpointError."""
    how = {"backend": cfg.model.backend, "activation_checkpointing": cfg.model.activation_checkpointing}
    model = Classifier(start.info.model.model_copy(update=how), start.info.features, head, cfg.seed)
    if found := differences(
        start.encoder, {f"encoder.{name}": value for name, value in model.encoder.state_dict().items()}
    ):
        raise CheckpointError(f"{cfg.weights}: its encoder is not that of its configuration; {found}")
    model.load_state_dict(start.encoder, strict=False)
    return model


def made_up(
    cfg: FinetuneConfig, cut: Cut, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Arguments of the model for a micro-batch of noise, of as many patches as training has."""
    batch, (rows, columns) = cfg.train.micro_batch, num_kept(cfg.augment, cut.grid)
    noise = torch.randn(batch, 1, *cut.spectrogram, generator=torch.Generator().manual_seed(0)).to(device)
    targets = torch.full((batch, cut.num_classes), 1 / cut.num_classes, device=device)
    if (rows, columns) == cut.grid:
        return noise, targets, None
    kept = torch.arange(rows)[:, None] * cut.grid[1] + torch.arange(columns)
    return noise, targets, kept.reshape(1, -1).repeat(batch, 1).to(device)


def length_of(cfg: FinetuneConfig, num_clips: int) -> tuple[int, float]:
    """Steps of the run, and of its warm-up. Raises ConfigError where the warm-up takes all of it."""
    steps_per_epoch = num_clips / cfg.train.global_batch
    total = cfg.train.steps or max(1, math.ceil(cfg.train.epochs * steps_per_epoch))
    warmup = cfg.optim.warmup_steps
    warmup = (cfg.optim.warmup_epochs or 0) * steps_per_epoch if warmup is None else warmup
    if warmup >= total:
        raise ConfigError(
            f"optim.warmup_steps, warmup_epochs: {warmup:.0f} steps of warm-up in a run of {total} steps; lower it"
        )
    return total, warmup
