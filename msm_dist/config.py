"""The configuration of a run: typed, frozen, with its defaults here and nowhere else.

In: a YAML file (`extends:` names another one to start from) and `a.b=c` overrides. Out: a `Config`.
Everything wrong with a file is reported at once, as one ConfigError. What depends on the number of
processes is checked by `batch_layout`, what depends on the corpus by `msm_dist.data.plan`.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import BaseModel, Field, field_validator, model_validator

from msm_dist.errors import ConfigError
from msm_dist.settings import flat_items, read_settings, validated

PROFILED_AT_MOST = 100
MAX_RATE = 768_000
MOST_STEPS = 2**40
Beta = Annotated[float, Field(ge=0, lt=1)]


class Geometry(NamedTuple):
    """Widths, depths and head counts of encoder and decoder."""

    embed_dim: int
    depth: int
    num_heads: int
    decoder_embed_dim: int
    decoder_depth: int
    decoder_num_heads: int


MODEL_SIZES = {
    "tiny": Geometry(192, 4, 3, 96, 2, 3),
    "base": Geometry(768, 12, 12, 384, 4, 6),
    "large": Geometry(1024, 24, 16, 512, 8, 16),
    "huge": Geometry(1280, 32, 16, 512, 8, 16),
    "giant": Geometry(1536, 40, 24, 512, 8, 16),
}


class Run(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True):
    """Where a run lives. The folder dir/name is the run's identity: the same command again continues it."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run folder: letters, digits, '.', '_' and '-'."""
    dir: str = "runs"
    """Folder that holds the run folders."""

    @field_validator("name", mode="before")
    @classmethod
    def _name(cls, value: Any) -> Any:
        # YAML reads `name: 2024` as a number.
        return str(value) if isinstance(value, int | float | date) else value

    @property
    def folder(self) -> Path:
        return Path(self.dir) / self.name


class Data(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True):
    """The corpus, the order in which it is served and how a clip is cut."""

    shards: str | list[str] | None = "data/audioset"
    """Folder with index.json, or tar shards as a path, a brace pattern or a list of them; none: data.mix instead."""
    mix: dict[str, Annotated[float, Field(gt=0)]] | None = Field(None, min_length=1)
    """Several corpora instead of data.shards, as folder: weight; a weight is that folder's share of the crops."""
    valid_shards: str | list[str] | None = None
    """Held-out shards for validation; none: no validation."""
    lanes: int | None = Field(None, ge=1, le=2**24)
    """Parallel streams the corpus is cut into; none: as many as the corpus allows."""
    block: int = Field(8, ge=1, le=2**20)
    """Consecutive crops taken from one lane."""
    num_workers: int = Field(4, ge=0, le=1024)
    """Loader processes per rank; 0 loads in the training process."""
    shuffle_window: int = Field(1024, ge=1, le=2**30)
    """Clips within which a lane is permuted."""
    crop_frames: int = Field(208, ge=1, le=2**20)
    """Length of a crop in log-mel frames (208 = 2.08 s)."""
    crops_per_clip: int = Field(1, ge=1, le=2**20)
    """Crops cut from a clip each time it is served."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Share of clips that may fail to decode before the run stops."""
    allow_pipe: bool = False
    """Permit shards behind `pipe:COMMAND`: each loader process runs that shell command, with your rights."""
    allow_missing_shards: bool = False
    """Start although shards of the index are missing or cut off; their slots are filled from neighbours."""
    read_timeout_seconds: float = Field(30.0, gt=0, le=3600)
    """How long a remote read may go without a byte before it is tried again."""
    read_retries: int = Field(10, ge=0, le=100)
    """How often a remote read that failed is tried again, after growing pauses, before the run stops."""
    connections: int = Field(8, ge=1, le=256)
    """Parallel requests of each loader process to a remote store."""
    verify: Literal["size", "digest"] = "size"
    """What of each shard is compared with the index at the start: its size, or its sha256 (reads all of it)."""

    @model_validator(mode="before")
    @classmethod
    def _no_default_beside_mix(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("mix") is not None and "shards" not in values:
            return values | {"shards": None}
        return values


class Features(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True):
    """The log-mel front end (RECIPE of the method: 16 kHz, 25 ms window, 10 ms hop, 80 Slaney mels)."""

    sample_rate: int = Field(16000, ge=1, le=MAX_RATE)
    """Samples per second."""
    n_fft: int = Field(400, ge=2, le=2**18)
    """Points of the Fourier transform."""
    win: int = Field(400, ge=2, le=2**18)
    """Window length in samples."""
    hop: int = Field(160, ge=1, le=2**18)
    """Step between frames in samples."""
    n_mels: int = Field(80, ge=1, le=2**12)
    """Mel bands."""
    fmin: float = Field(50.0, ge=0)
    """Lowest frequency in Hz."""
    fmax: float = Field(8000.0, gt=0)
    """Highest frequency in Hz."""
    mean: float | None = None
    """Mean of the corpus' log-mel; none: from the index."""
    std: float | None = Field(None, ge=1e-3)
    """Standard deviation of the corpus' log-mel; none: from the index."""

    def num_frames(self, num_samples: int) -> int:
        """Frames of a waveform: 1 + samples // hop."""
        return 1 + num_samples // self.hop

    def crop_samples(self, num_frames: int) -> int:
        """Samples that `num_frames` uncentred windows read: hop * (frames - 1) + n_fft."""
        return self.hop * (num_frames - 1) + self.n_fft

    def front_end(self) -> dict[str, Any]:
        """What must agree for two log-mels to be comparable (everything but mean and std)."""
        return self.model_dump(exclude={"mean", "std"})


class Model(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True):
    """The masked autoencoder. Either `size`, or all of embed_dim, depth, num_heads; none of them is base."""

    size: Literal["tiny", "base", "large", "huge", "giant"] | None = None
    """A named geometry."""
    embed_dim: int | None = Field(None, ge=1, le=2**16)
    """Encoder width."""
    depth: int | None = Field(None, ge=1, le=256)
    """Encoder blocks."""
    num_heads: int | None = Field(None, ge=1, le=2**16)
    """Encoder heads."""
    decoder_embed_dim: int | None = Field(None, ge=1, le=2**16)
    """Decoder width; none: that of the size (of base for a custom encoder)."""
    decoder_depth: int | None = Field(None, ge=1, le=256)
    """Decoder blocks; none: likewise."""
    decoder_num_heads: int | None = Field(None, ge=1, le=2**16)
    """Decoder heads; none: likewise."""
    patch_size: str = "16x16"
    """Patch as frequency x time, in mel bands and frames."""
    mask_ratio: float = Field(0.75, gt=0, lt=1)
    """Share of patches hidden from the encoder."""
    cls_token: bool = True
    """Prefix the encoder's sequence with a learnt CLS token."""
    key_bias: bool = False
    """Give the keys of the attention a bias too (the paper has query and value biases only)."""
    decoder_positions: Literal["1d", "2d"] = "1d"
    """Position table of the decoder: 1-D over the flat patch index (the paper), or 2-D as in the encoder."""
    normalize_targets: bool = False
    """Normalise each target patch by its own mean and deviation."""
    backend: Literal["auto", "triton", "reference"] = "auto"
    """Kernels: auto takes Triton on a GPU where it exists, the reference on a CPU; logged at the start."""
    activation_checkpointing: bool = False
    """Keep each block's input only and compute the rest again in the backward: less memory, a third more work."""

    @field_validator("patch_size", mode="before")
    @classmethod
    def _patch_size(cls, value: Any) -> Any:
        if isinstance(value, list | tuple) and len(value) == 2:
            value = f"{value[0]}x{value[1]}"
        if not re.fullmatch(r"[1-9][0-9]{0,5}x[1-9][0-9]{0,5}", str(value)):
            raise ValueError("a patch is bands x frames, such as 16x16")
        return value

    @property
    def patch(self) -> tuple[int, int]:
        """Patch height (bands) and width (frames)."""
        bands, frames = self.patch_size.split("x")
        return int(bands), int(frames)

    @property
    def geometry(self) -> Geometry:
        """The resolved widths, depths and heads."""
        base = MODEL_SIZES[self.size or "base"]
        return Geometry(*(getattr(self, name) or default for name, default in base._asdict().items()))


class Optim(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True):
    """AdamW with linear warm-up and a half-cycle cosine to zero, per step."""

    base_lr: float | None = Field(None, gt=0)
    """Learning rate per 256 clips of global batch (default 3e-4, which is the paper's 1.5e-4 per 128)."""
    lr: float | None = Field(None, gt=0)
    """The peak learning rate itself, instead of base_lr."""
    warmup_steps: int | None = Field(None, ge=0, le=MOST_STEPS)
    """Warm-up in steps."""
    warmup_epochs: float | None = Field(None, ge=0)
    """Warm-up in epochs."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay rates of AdamW's moments."""
    weight_decay: float = Field(0.05, ge=0)
    """Decoupled weight decay; none on 1-D tensors and biases."""
    clip_norm: float | None = Field(None, gt=0)
    """Largest global gradient norm; none: no clipping."""
    max_skipped_updates: int = Field(0, ge=0)
    """Updates of a run that may be left out as their loss or gradient is not finite or past a bound; then it stops."""
    skip_loss_above: float | None = Field(None, gt=0)
    """Leave out an update whose loss, the mean of the global batch, is above this; none: no such bound."""
    skip_norm_above: float | None = Field(None, gt=0)
    """Leave out an update whose global gradient norm, before clipping, is above this; none: no such bound."""


class Train(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True):
    """Length, batch, precision and what is written when."""

    steps: int | None = Field(None, ge=1, le=MOST_STEPS)
    """Length of the run in steps."""
    epochs: float | None = Field(None, gt=0)
    """Length of the run in epochs (passes over the clips)."""
    global_batch: int = Field(512, ge=1, le=2**24)
    """Crops in one optimiser step, over all ranks and accumulation."""
    micro_batch: int = Field(64, ge=1, le=2**24)
    """Crops in one forward pass of one rank."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Arithmetic of the model; masters, gradients' sums, statistics and loss are fp32 in all. fp16 needs a GPU."""
    init_from: str | None = None
    """Folder of exported weights to start from instead of seeded ones; optimiser, step and order start anew."""
    log_every: int = Field(20, ge=1, le=MOST_STEPS)
    """Steps between metric lines."""
    valid_every: int = Field(1000, ge=1, le=MOST_STEPS)
    """Steps between validations."""
    valid_clips: int = Field(512, ge=1, le=MOST_STEPS)
    """Clips of the validation set that are used, from its beginning."""
    pictures_every: int = Field(1000, ge=0, le=MOST_STEPS)
    """Steps between reconstruction pictures; 0: only at the end."""
    trace: bool = False
    """Write a record per sample: the evidence of what was trained on."""
    profile: str | None = None
    """Steps START to STOP - 1 to record with torch's profiler, as START:STOP, such as 20:25; none: no profile."""

    @field_validator("profile", mode="before")
    @classmethod
    def _profile(cls, value: Any) -> Any:
        # YAML 1.1 takes 20:25 for minutes and seconds, in seconds: unquoted it arrives as the integer 1225.
        return f"{value // 60}:{value % 60}" if type(value) is int else value


class Checkpoint(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True):
    """When to save and what to keep."""

    every: int = Field(1000, ge=1, le=MOST_STEPS)
    """Steps between checkpoints."""
    keep: int = Field(3, ge=1, le=MOST_STEPS)
    """Newest checkpoints kept."""
    keep_every: int = Field(0, ge=0, le=MOST_STEPS)
    """Also keep, for good, the checkpoints whose step is a multiple of this; 0: none."""


class Engine(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True):
    """DeepSpeed and the process group."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """ZeRO stage: what is spread over ranks (1 optimiser, 2 gradients too, 3 weights too; 0 nothing, fp32 only)."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What lives in host memory: the optimiser (stages 1 to 3), or the parameters too (stage 3)."""
    compile: bool = False
    """Compile each transformer block with torch.compile: a slower start, a faster step."""
    deepspeed: str | None = None
    """A DeepSpeed JSON file of your own instead; what this configuration decides may not be set in it."""
    timeout_minutes: float = Field(30.0, gt=0, le=100_000)
    """How long a collective may wait for a rank before the run ends."""


class Probe(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True):
    """Scores of the encoder on labelled clips of your own while it is trained; they change nothing of the training."""

    every: int = Field(0, ge=0, le=MOST_STEPS)
    """Steps between probes, with one more at the end; 0: none."""
    data: str | list[str] | None = None
    """Labelled clips: a HEAR task folder, a CSV of file,label,split (or fold), or a list of them."""
    clips: int = Field(1000, ge=4, le=5000)
    """Clips of each of them that are used, as far as they go, drawn with a fixed key; of each the first 10 s."""


class Config(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True):
    """A whole run."""

    run: Run = Run()
    """Where it lives."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Key of the initial weights, the order, the crops and the masks."""
    data: Data = Data()
    """Corpus and order."""
    features: Features = Features()
    """Log-mel front end."""
    model: Model = Model()
    """Masked autoencoder."""
    optim: Optim = Optim()
    """Optimiser and schedule."""
    train: Train = Train()
    """Length and batch."""
    checkpoint: Checkpoint = Checkpoint()
    """Saving."""
    engine: Engine = Engine()
    """DeepSpeed."""
    probe: Probe = Probe()
    """Scores on labelled clips."""

    @property
    def num_patches(self) -> int:
        """Patches of one crop."""
        height, width = self.model.patch
        return (self.features.n_mels // height) * (self.data.crop_frames // width)

    @property
    def num_keep(self) -> int:
        """Patches the encoder sees: int(L * (1 - ratio)), as the published code has it."""
        return int(self.num_patches * (1 - self.model.mask_ratio))

    @property
    def profiled_steps(self) -> tuple[int, int] | None:
        """First step to profile and the one to stop before; none without train.profile."""
        if self.train.profile is None:
            return None
        start, stop = self.train.profile.split(":")
        return int(start), int(stop)

    @property
    def peak_lr(self) -> float:
        """Learning rate after warm-up."""
        if self.optim.lr is not None:
            return self.optim.lr
        return (self.optim.base_lr or 3e-4) * self.train.global_batch / 256


@dataclass(frozen=True)
class BatchLayout:
    """How a global batch is spread: global_batch = world_size * micro_batch * accumulation."""

    world_size: int
    micro_batch: int
    accumulation: int
    blocks_per_step: int
    blocks_per_micro_batch: int


def batch_layout(cfg: Config, world_size: int) -> BatchLayout:
    """The layout of a global batch over `world_size` ranks. Raises ConfigError with the valid choices."""
    batch, micro, block = cfg.train.global_batch, cfg.train.micro_batch, cfg.data.block
    if batch % (world_size * micro):
        per_rank = batch // world_size
        choices = [m for m in range(block, per_rank + 1, block) if batch % (world_size * m) == 0]
        remedy = (
            f"with {world_size} processes choose train.micro_batch from {_some(choices)}"
            if choices
            else f"make train.global_batch a multiple of {world_size} processes x data.block {block}"
        )
        raise ConfigError(
            f"train.global_batch = {batch}: must be a multiple of {world_size} processes x "
            f"train.micro_batch {micro} = {world_size * micro}; {remedy}"
        )
    return BatchLayout(world_size, micro, batch // (world_size * micro), batch // block, micro // block)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `a.b=c` overrides and check everything. Raises ConfigError."""
    # Of two values the later wins, but a brace pattern that the shell has taken apart means all its tars.
    for name in ("data.shards", "data.valid_shards"):
        tars = [text for text in overrides if text.startswith(f"{name}=") and text.endswith(".tar")]
        if len(tars) > 1:
            raise ConfigError(f"{name} is given {len(tars)} times; quote its pattern: '{name}=...{{0..9}}.tar'")
    return parse_config(read_settings(path, overrides), source=str(path))


def is_finetuning(path: Path) -> bool:
    """Whether a config.yaml is that of a fine-tuning run, which has other settings. False where it can't be read."""
    try:
        data = read_settings(path, ()).get("data")
    except ConfigError:
        return False
    return isinstance(data, dict) and "task" in data


def parse_config(values: dict[str, Any], source: str) -> Config:
    """Build a Config from plain values, all faults in one ConfigError that names `source`."""
    return validated(Config, values, source, _conflicts)


def dump_config(cfg: BaseModel) -> str:
    """The resolved configuration as YAML; `load_config` reads a Config back to an equal one."""
    # A DeepSpeed file of one's own decides these two; beside it they are refused.
    decided = {"engine": {"zero_stage", "offload"}} if cfg.engine.deepspeed else None
    return yaml.safe_dump(cfg.model_dump(mode="json", exclude=decided), sort_keys=False)


def flat_settings(values: dict[str, Any]) -> dict[str, Any]:
    """The same of a whole configuration for comparing: of data.mix the weights alone, as its folders may move."""
    data = values.get("data")
    if isinstance(data, dict) and isinstance(data.get("mix"), dict):
        values = values | {"data": data | {"mix": list(data["mix"].values())}}
    return flat_items(values)


def _conflicts(cfg: Config) -> Iterable[str]:
    """Every impossible combination that needs neither corpus nor world size."""
    if cfg.data.mix is not None and cfg.data.shards is not None:
        yield f"data.shards = {cfg.data.shards} and data.mix: give one of them, the other is to be null"
    if cfg.data.mix is None and cfg.data.shards is None:
        yield "data.shards is missing: give data.shards, or data.mix for several corpora"
    height, width = cfg.model.patch
    mels, frames = cfg.features.n_mels, cfg.data.crop_frames
    if mels % height:
        fits = [h for h in range(1, mels + 1) if mels % h == 0]
        yield (
            f"model.patch_size = {cfg.model.patch_size}: its height must divide features.n_mels = {mels}; "
            f"choose a height from {_some(fits)}"
        )
    if frames % width:
        below, above = frames // width * width, (frames // width + 1) * width
        nearest = f"{below} or {above}" if below else str(above)
        yield (
            f"data.crop_frames = {frames}: must be a multiple of the patch width {width} "
            f"(model.patch_size = {cfg.model.patch_size}); choose {nearest}"
        )
    if not (mels % height or frames % width) and not 0 < cfg.num_keep < cfg.num_patches:
        yield (
            f"model.mask_ratio = {cfg.model.mask_ratio}: of {cfg.num_patches} patches {cfg.num_keep} stay "
            "visible; at least one must be visible and one hidden"
        )
    yield from geometry_conflicts(cfg.model)
    features = cfg.features
    if features.n_fft % 2:
        yield f"features.n_fft = {features.n_fft}: must be even, for windows to be centred on whole samples"
    if features.win > features.n_fft:
        yield f"features.win = {features.win}: must not exceed features.n_fft = {features.n_fft}"
    if not features.fmin < features.fmax <= features.sample_rate / 2:
        yield (
            f"features.fmin, fmax = {features.fmin}, {features.fmax}: must rise and end at or below half of "
            f"features.sample_rate = {features.sample_rate}"
        )
    if (features.mean is None) != (features.std is None):
        yield "features.mean and features.std go together: set both, or neither to take the index's"
    block, crops = cfg.data.block, cfg.data.crops_per_clip
    if block % crops:
        yield f"data.block = {block}: must be a multiple of data.crops_per_clip = {crops}; choose {crops} or 2x"
    if cfg.train.micro_batch % block:
        micro = max(1, cfg.train.micro_batch // block) * block
        yield (
            f"train.micro_batch = {cfg.train.micro_batch}: must be a multiple of data.block = {block}; "
            f"choose {micro} or {micro + block}"
        )
    if cfg.train.global_batch % cfg.train.micro_batch:
        micro = cfg.train.micro_batch
        batch = max(1, cfg.train.global_batch // micro) * micro
        yield (
            f"train.global_batch = {cfg.train.global_batch}: must be a multiple of train.micro_batch = {micro}; "
            f"choose {batch} or {batch + micro}"
        )
    yield from length_conflicts(cfg.train, cfg.optim)
    if cfg.train.profile is not None and not re.fullmatch(r"[0-9]{1,12}:[0-9]{1,12}", cfg.train.profile):
        yield f"train.profile = {cfg.train.profile!r}: must be START:STOP in steps, such as 20:25"
    elif cfg.profiled_steps is not None and not 0 < cfg.profiled_steps[0] < cfg.profiled_steps[1]:
        yield f"train.profile = {cfg.train.profile}: must start at step 1 or later and stop after its start"
    elif cfg.profiled_steps is not None and cfg.profiled_steps[1] - cfg.profiled_steps[0] > PROFILED_AT_MOST:
        yield (
            f"train.profile = {cfg.train.profile}: at most {PROFILED_AT_MOST} steps, whose ops are all kept in memory; "
            f"ten tell as much: {cfg.profiled_steps[0]}:{cfg.profiled_steps[0] + 10}"
        )
    if cfg.probe.every and not cfg.probe.data:
        yield f"probe.every = {cfg.probe.every}: needs labelled clips, probe.data=FOLDER; probe.every=0 goes without"
    yield from engine_conflicts(cfg.engine, cfg.train.precision)
    yield from bound_conflicts(cfg.optim, cfg.train.precision)


def length_conflicts(train: BaseModel, optim: BaseModel) -> Iterable[str]:
    """What is wrong with steps or epochs, warm-up, and learning rate: of each exactly, or at most, one may be given."""
    yield from _exclusive(train, "train", "steps", "epochs", required=True)
    yield from _exclusive(optim, "optim", "base_lr", "lr")
    yield from _exclusive(optim, "optim", "warmup_steps", "warmup_epochs")
    steps, warmup = train.steps, optim.warmup_steps
    if steps is not None and warmup is not None and warmup >= steps:
        yield f"optim.warmup_steps = {warmup}: must be below train.steps = {steps}; optim.warmup_steps=0 goes without"
    epochs, warmup_epochs = train.epochs, optim.warmup_epochs
    if epochs is not None and warmup_epochs is not None and warmup_epochs >= epochs:
        yield f"optim.warmup_epochs = {warmup_epochs}: must be below train.epochs = {epochs}"


def geometry_conflicts(model: Model) -> Iterable[str]:
    """What is wrong with widths, depths and heads."""
    custom = {name: getattr(model, name) for name in ("embed_dim", "depth", "num_heads")}
    given = [name for name, value in custom.items() if value is not None]
    if given and model.size:
        yield (
            f"model.{given[0]} = {custom[given[0]]} beside model.size = {model.size}: give a size, or all of "
            "embed_dim, depth and num_heads, not both"
        )
    elif given and len(given) < 3:
        missing = [name for name in custom if name not in given]
        yield f"model.{missing[0]} is missing: a custom model needs embed_dim, depth and num_heads together"
    for prefix in ("", "decoder_"):
        width = getattr(model.geometry, f"{prefix}embed_dim")
        heads = getattr(model.geometry, f"{prefix}num_heads")
        if width % heads:
            fits = [h for h in range(1, width + 1) if width % h == 0]
            yield (
                f"model.{prefix}num_heads = {heads}: must divide model.{prefix}embed_dim = {width}; choose from "
                f"{_some(fits)}"
            )
        if width % 4:
            yield f"model.{prefix}embed_dim = {width}: must be a multiple of 4 for the 2-D position table"


def engine_conflicts(engine: Engine, precision: str) -> Iterable[str]:
    """What of the engine's settings contradicts another one, or can't be done."""
    # Earlier versions have recorded both beside the file, at their defaults.
    both = {"zero_stage", "offload"}
    recorded = both <= engine.model_fields_set and engine == Engine(**engine.model_dump(exclude=both))
    for name in ("zero_stage", "offload"):
        if engine.deepspeed and name in engine.model_fields_set and not recorded:
            yield (
                f"engine.deepspeed = {engine.deepspeed} and engine.{name} = {getattr(engine, name)}: give one of "
                "them; stage and offload of your own file are read from it"
            )
    if engine.deepspeed:
        return
    yield from stage_conflicts(engine.zero_stage, engine.offload, precision)


def bound_conflicts(optim: Optim, precision: str) -> Iterable[str]:
    """Bounds on an update that the precision has no place for."""
    for name in ("skip_loss_above", "skip_norm_above"):
        if precision == "fp16" and getattr(optim, name) is not None:
            yield (
                f"optim.{name} = {getattr(optim, name)}: with train.precision = fp16 an update left out halves the "
                "loss scale, which is for overflows; take bf16, or leave the bound out"
            )


def stage_conflicts(stage: int, offload: str, precision: str) -> Iterable[str]:
    """What DeepSpeed can't do, or would do wrongly."""
    if stage == 0 and precision != "fp32":
        yield (
            f"engine.zero_stage = 0: with train.precision = {precision} there are no fp32 masters at stage 0; take "
            "stage 1, or train.precision=fp32"
        )
    if offload == "optimizer" and stage == 0:
        yield "engine.offload = optimizer: needs engine.zero_stage 1, 2 or 3"
    if offload == "optimizer" and stage in (1, 2) and precision == "fp16":
        yield (
            f"engine.offload = optimizer: with train.precision = fp16 at stage {stage} DeepSpeed never gets over the "
            "first overflow; take engine.zero_stage=3, or bf16"
        )
    if offload == "parameters" and stage != 3:
        yield f"engine.offload = parameters: needs engine.zero_stage 3, not {stage}"


def _exclusive(part: BaseModel, section: str, one: str, other: str, required: bool = False) -> Iterable[str]:
    first, second = getattr(part, one), getattr(part, other)
    if first is not None and second is not None:
        yield f"{section}.{one} = {first} and {section}.{other} = {second}: give one of them, not both"
    if required and first is None and second is None:
        yield f"{section}.{one} is missing: give {section}.{one} or {section}.{other}"


def _some(values: Sequence[int], limit: int = 12) -> str:
    text = ", ".join(str(value) for value in values[:limit])
    return text + (", ..." if len(values) > limit else "")
