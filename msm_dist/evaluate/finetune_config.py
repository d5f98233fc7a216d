"""The configuration of a fine-tuning run: typed, frozen, with its defaults here and nowhere else.

In: the weights to start from, the data, a YAML file if wanted, `a.b=c` overrides. Out: a `FinetuneConfig`. Everything
wrong with it is reported at once, as one ConfigError. What depends on the task or on the weights is checked where
those are read.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, field_validator

from msm_dist.config import (
    BatchLayout,
    Beta,
    Checkpoint,
    Engine,
    Optim,
    Run,
    bound_conflicts,
    engine_conflicts,
    length_conflicts,
)
from msm_dist.errors import ConfigError
from msm_dist.settings import read_settings, validated

Share = Annotated[float, Field(ge=0, le=1)]


class FinetuneData(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True):
    """The labelled clips, and how they are cut and drawn."""

    task: str
    """A HEAR task folder, a CSV of file,label,split (or fold), RECIPE:FOLDER, or a folder of labelled shards."""
    audio: str | None = None
    """Folder that the files of a CSV are relative to; none: the CSV's own."""
    valid: str | None = None
    """Labelled shards to validate on, where data.task is shards; none: no validation."""
    test: str | None = None
    """Labelled shards to be judged on, where data.task is shards."""
    fold: str | None = None
    """Name of the fold to be judged on, where the task has folds; all others are trained on."""
    seconds: float | None = Field(None, gt=0, le=600)
    """Length of a clip, cut or padded at its end; none: of the longest of the first 32 training clips, at most 10."""
    weighted: bool = False
    """Draw clips of rare labels more often, with replacement (AudioSet's labels are unbalanced)."""
    num_workers: int = Field(4, ge=0)
    """Loader processes per rank; 0 loads in the training process."""

    @field_validator("fold", mode="before")
    @classmethod
    def _fold(cls, value: Any) -> Any:
        # YAML reads `fold: 1` as a number.
        return str(value) if type(value) is int else value


class FinetuneModel(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True):
    """The classifier: the encoder of the weights with a linear head."""

    pooling: Literal["mean", "cls"] = "mean"
    """What the head sees: the mean over all patches, or the CLS token."""
    positions: Literal["computed", "interpolated"] = "computed"
    """Position table of another duration than the weights': continued by its formula, or theirs stretched in time."""
    backend: Literal["auto", "triton", "reference"] = "auto"
    """Kernels, as in pre-training."""
    activation_checkpointing: bool = False
    """Keep each block's input only and compute the rest again in the backward."""


class Augment(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True):
    """What is done to training clips; every draw is a function of (seed, epoch, place in the epoch)."""

    mixup: Share = 0.5
    """Share of clips mixed with a second one; 0: none."""
    mixup_alpha: float = Field(10.0, gt=0)
    """Both parameters of the beta distribution of the first clip's weight (10: near one half)."""
    frequency_mask: int = Field(0, ge=0)
    """SpecAugment: mel bands of the widest frequency mask; 0: none."""
    time_mask: int = Field(0, ge=0)
    """SpecAugment: frames of the widest time mask; 0: none."""
    frequency_drop: float = Field(0.0, ge=0, lt=1)
    """Structured patch drop: share of the grid's rows that the encoder doesn't get to see."""
    time_drop: float = Field(0.0, ge=0, lt=1)
    """Structured patch drop: share of the grid's columns."""


class FinetuneOptim(Optim, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True):
    """AdamW with layer-wise decay of the learning rate, linear warm-up and a half-cycle cosine to zero, per step."""

    base_lr: float | None = Field(None, gt=0)
    """Learning rate of the head per 256 clips of global batch (default 1e-3)."""
    layer_decay: float = Field(0.75, gt=0, le=1)
    """Factor of the learning rate from each block to the one below it; 1: the same for all."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay rates of AdamW's moments."""


class FinetuneTrain(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True):
    """Length, batch, precision and what is written when."""

    steps: int | None = Field(None, ge=1)
    """Length of the run in steps."""
    epochs: float | None = Field(None, gt=0)
    """Length of the run in epochs (as many draws as there are training clips)."""
    global_batch: int = Field(64, ge=1)
    """Clips in one optimiser step, over all ranks and accumulation."""
    micro_batch: int = Field(16, ge=1)
    """Clips in one forward pass of one rank."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Arithmetic of the model; masters, gradients' sums, statistics and loss are fp32 in all. fp16 needs a GPU."""
    log_every: int = Field(20, ge=1)
    """Steps between metric lines."""
    valid_every: int = Field(500, ge=1)
    """Steps between validations."""
    valid_clips: int = Field(4096, ge=1)
    """Validation clips that are used, taken evenly from among them."""


class FinetuneConfig(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True):
    """A whole fine-tuning run."""

    run: Run = Run()
    """Where it lives."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Key of the head's initial weights, the order, and all augmentation."""
    weights: str
    """A pre-training run's folder, exported weights, or hf://owner/name."""
    # The task has no default: `read_config` always gives it.
    data: FinetuneData = FinetuneData.model_construct()
    """Clips and labels."""
    model: FinetuneModel = FinetuneModel()
    """Encoder and head."""
    augment: Augment = Augment()
    """Augmentation."""
    optim: FinetuneOptim = FinetuneOptim()
    """Optimiser and schedule."""
    train: FinetuneTrain = FinetuneTrain()
    """Length and batch."""
    checkpoint: Checkpoint = Checkpoint()
    """Saving."""
    engine: Engine = Engine()
    """DeepSpeed."""

    @property
    def peak_lr(self) -> float:
        """Learning rate of the head after warm-up."""
        if self.optim.lr is not None:
            return self.optim.lr
        return (self.optim.base_lr or 1e-3) * self.train.global_batch / 256


MAY_CHANGE = (
    "run.dir",
    # Their contents are compared: plan.json has the digests of weights and task.
    "weights",
    "data.task",
    "data.audio",
    "data.valid",
    "data.test",
    "data.num_workers",
    "model.backend",
    "model.activation_checkpointing",
    "optim.max_skipped_updates",
    "train.steps",
    "train.epochs",
    "train.micro_batch",
    "train.log_every",
    "train.valid_every",
    "train.valid_clips",
    "checkpoint.",
    "engine.",
)
"""What may differ between two starts of one run: see engine.runfolder."""


def read_config(weights: str, task: str, words: Sequence[str]) -> FinetuneConfig:
    """The configuration behind `RUN DATA [CONFIG.yaml] [section.key=value ...]`. Raises ConfigError.

    A run without a name is called after the weights, the data and the fold.
    """
    files = [word for word in words if "=" not in word]
    if len(files) > 1:
        raise ConfigError(f"{files[1]!r}: after RUN and DATA come one YAML file at most and section.key=value settings")
    overrides = [word for word in words if "=" in word]
    values = read_settings(files[0] if files else None, overrides)
    data = values.get("data")
    values |= {"weights": weights, "data": {**(data if isinstance(data, dict) else {}), "task": task}}
    run = values.get("run")
    if run is None or (isinstance(run, dict) and "name" not in run):
        values["run"] = {**(run or {}), "name": _name(weights, task, values["data"].get("fold"))}
    return validated(FinetuneConfig, values, files[0] if files else "msm-dist finetune", _conflicts)


def batch_layout(train: FinetuneTrain, world_size: int) -> BatchLayout:
    """How a global batch is spread over ranks. Raises ConfigError with the valid choices."""
    batch, micro = train.global_batch, train.micro_batch
    if batch % (world_size * micro):
        fits = [m for m in range(1, batch // world_size + 1) if batch % (world_size * m) == 0]
        remedy = f"choose train.micro_batch from {', '.join(map(str, fits))}"
        raise ConfigError(
            f"train.global_batch = {batch}: must be a multiple of {world_size} processes x train.micro_batch {micro} = "
            f"{world_size * micro}; {remedy if fits else f'make it a multiple of {world_size}'}"
        )
    # There are no blocks here: a clip is drawn, read and counted by itself.
    return BatchLayout(world_size, micro, batch // (world_size * micro), batch, micro)


def _conflicts(cfg: FinetuneConfig) -> Iterable[str]:
    """Every impossible combination that needs neither task, weights nor world size."""
    if cfg.train.global_batch % cfg.train.micro_batch:
        micro = cfg.train.micro_batch
        batch = max(1, cfg.train.global_batch // micro) * micro
        yield (
            f"train.global_batch = {cfg.train.global_batch}: must be a multiple of train.micro_batch = {micro}; "
            f"choose {batch} or {batch + micro}"
        )
    if cfg.data.valid is not None and cfg.data.test is None:
        yield f"data.valid = {cfg.data.valid}: is for labelled shards, which need data.test too; give data.test"
    yield from length_conflicts(cfg.train, cfg.optim)
    yield from engine_conflicts(cfg.engine, cfg.train.precision)
    yield from bound_conflicts(cfg.optim, cfg.train.precision)


def _name(weights: str, task: str, fold: Any) -> str:
    """A run's name after what it is made of, in the letters that a name may have."""
    data = task.partition(":")[0] if re.match(r"\w+:", task) else Path(task).name.removesuffix(".csv")
    folder = Path(weights).resolve()
    parts = [
        folder.parent.name if folder.name == "export" else folder.name,
        data,
        *([] if fold is None else [f"fold-{fold}"]),
    ]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(parts)).strip("-._") or "finetune"
