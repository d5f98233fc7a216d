"""The model of a run: the configuration's, or one that a `build_model` of yours makes (docs/extend.md).

In: `build_model(cfg) -> nn.Module`, whose forward(spectrogram, sample_ids=...) returns loss, prediction and masking as
`model.mae.Output` does, and `target` where it is not the spectrogram. Out: the model, once what a run promises is known
to hold for it: an exact resume needs a forward that is a function of its arguments and the trainable parameters, as
checkpoints hold nothing else. Whoever doesn't keep to that gets a ConfigError before step 1. `<run>/model.json` records
who built the model: another builder is another run.
"""

import contextlib
import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from msm_dist.config import Config
from msm_dist.errors import ConfigError
from msm_dist.files import write_atomically
from msm_dist.model.mae import Decoder, Encoder, MaskedSpectrogramModel
from msm_dist.model.patches import PatchGrid

BuildModel = Callable[[Config], nn.Module]
RECORD = "model.json"
CPU_GENERATOR, GPU_GENERATOR = "torch's random generator", "torch's random generator of the GPU"


def configured_model(cfg: Config) -> MaskedSpectrogramModel:
    """The masked autoencoder that the configuration describes, with seeded weights."""
    return MaskedSpectrogramModel(cfg.model, cfg.features.n_mels, cfg.data.crop_frames, cfg.seed)


def build_seeded(build_model: BuildModel, cfg: Config) -> nn.Module:
    """The builder's model; what it draws from torch's generator on the way is a function of the run's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(cfg.seed)
        model = build_model(cfg)
    if not isinstance(model, nn.Module):
        raise _error(f"{_name(build_model)} gave a {type(model).__name__}: build_model(cfg) must return an nn.Module")
    return model


def has_configured_parameters(model: nn.Module, cfg: Config) -> bool:
    """Whether names and shapes are those of the configuration's model: what MFU counts and an export is read by."""
    grid = PatchGrid(cfg.features.n_mels, cfg.data.crop_frames, cfg.model.patch)
    with torch.device("meta"):
        parts = nn.ModuleDict({"encoder": Encoder(cfg.model, grid), "decoder": Decoder(cfg.model, grid)})
    expected = {name: parameter.shape for name, parameter in parts.named_parameters()}
    return {name: parameter.shape for name, parameter in model.named_parameters()} == expected


@contextlib.contextmanager
def held_to_contract(model: nn.Module, cfg: Config, device: torch.device, build_model: BuildModel) -> Iterator[None]:
    """Watch the training step inside: what the forward returns, and whether it changes what no checkpoint holds.

    The configuration's model is not watched. Raises ConfigError on all ranks.
    """
    if build_model is configured_model:
        yield
        return
    hook = model.register_forward_hook(lambda module, arguments, output: _check_output(output, cfg))
    before = _unsaved_state(model, device)
    try:
        yield
    finally:
        hook.remove()
    after = _unsaved_state(model, device)
    changed = [name for name, value in before.items() if not torch.equal(value, after[name])]
    if changed:
        raise _error(
            f"the model changes {', '.join(changed)} in a training step: checkpoints hold trainable parameters only, "
            "so that a resumed run would differ. Draw at random as a function of (cfg.seed, sample_ids), as "
            "msm_kernels.patch_masking.random_masking does, go without dropout, keep buffers constant"
        )


def compare_builder(folder: Path, build_model: BuildModel) -> str | None:
    """A word for the user when the builder's file has changed; ConfigError when the run has another builder."""
    if not (folder / "config.yaml").exists():
        return None
    recorded, mine = _recorded(folder / RECORD), _identity(build_model)
    if recorded.get("build_model") != mine.get("build_model"):
        theirs, own = (record.get("build_model", "the configuration") for record in (recorded, mine))
        raise ConfigError(
            f"{folder} holds a run whose model comes from {theirs}, this one's comes from {own}: start it as it was "
            "started, or start a new run with run.name=NAME"
        )
    if recorded.get("sha256") != mine.get("sha256"):
        return f"{mine['build_model']} has changed since the run began; the run goes on with what it is now"
    return None


def record_builder(folder: Path, build_model: BuildModel) -> None:
    """Write what `compare_builder` compares with, at a run's first start; nothing for the configuration's model."""
    if (folder / "config.yaml").exists():
        return
    if identity := _identity(build_model):
        write_atomically(folder / RECORD, json.dumps(identity, indent=1))
    else:
        (folder / RECORD).unlink(missing_ok=True)


def describe(build_model: BuildModel, cfg: Config, num_parameters: int) -> str:
    """The model in a line, as a run announces it."""
    size = f"{num_parameters / 1e6:.2f} M parameters"
    if build_model is configured_model:
        return f"{size}, {cfg.num_keep} of {cfg.num_patches} patches visible"
    return f"{size}, from {_name(build_model)}: how it masks and what it predicts is its own, whatever model.* says"


def _check_output(output: Any, cfg: Config) -> None:
    if lacking := [name for name in ("loss", "prediction", "masking") if not hasattr(output, name)]:
        raise _error(f"the model's forward returns {type(output).__name__} without {', '.join(lacking)}; see Output")
    if not isinstance(output.loss, Tensor) or output.loss.ndim or not output.loss.is_floating_point():
        raise _error("the model's loss must be one floating-point number, a tensor of no dimensions")
    masking, num_patches = output.masking, cfg.num_patches
    shapes = {name: list(getattr(masking, name).shape) for name in ("ids_keep", "ids_masked", "ids_restore")}
    batch, num_keep = cfg.train.micro_batch, shapes["ids_keep"][-1]
    expected = ([batch, num_keep], [batch, num_patches - num_keep], [batch, num_patches])
    if tuple(shapes.values()) != expected:
        raise _error(
            f"the model's masking is {shapes}: of the {num_patches} patches of a crop, each of the {batch} clips of a "
            "batch must have the same number visible and all others masked; masking_from_keep completes such a choice"
        )
    target = getattr(output, "target", None)
    shape = [batch, 1, cfg.features.n_mels, cfg.data.crop_frames]
    if target is not None and list(target.shape) != shape:
        raise _error(f"the model's target is {list(target.shape)}: must be {shape}, as the spectrogram")


def _unsaved_state(model: nn.Module, device: torch.device) -> Mapping[str, Tensor]:
    """All a forward pass could depend on that checkpoints leave out."""
    state = {f"the buffer {name}": value.clone() for name, value in model.named_buffers()}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            # At stage 3 the parameter itself comes and goes; this rank's part of it stays.
            state[f"the frozen {name}"] = getattr(parameter, "ds_tensor", parameter).detach().clone()
    state[CPU_GENERATOR] = torch.get_rng_state()
    if device.type == "cuda":
        state[GPU_GENERATOR] = torch.cuda.get_rng_state(device)
    return state


def _identity(build_model: BuildModel) -> dict[str, str]:
    """Who built the model, and the digest of the file it is written in; empty for the configuration's."""
    if build_model is configured_model:
        return {}
    source = _source(build_model)
    identity = {"build_model": _name(build_model)}
    return identity | ({"sha256": hashlib.sha256(source.read_bytes()).hexdigest()} if source else {})


def _name(build_model: BuildModel) -> str:
    source, function = _source(build_model), _function(build_model)
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{source.name}:{name}" if source else name


def _source(build_model: BuildModel) -> Path | None:
    try:
        path = inspect.getsourcefile(_function(build_model))
    except (TypeError, OSError):  # built in, or typed at a prompt
        return None
    return Path(path) if path and Path(path).is_file() else None


def _function(build_model: BuildModel) -> Any:
    return _function(build_model.func) if isinstance(build_model, partial) else inspect.unwrap(build_model)


def _recorded(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{path}: can't be read ({error}); restore it, or start a new run with run.name=NAME"
        ) from None


def _error(message: str) -> ConfigError:
    error = ConfigError(message)
    error.on_all_ranks = True
    return error
