"""Trained weights on disk, in our own format; model/published.py converts published MSM-MAE checkpoints.

A folder with model.safetensors (float32, the parameters by name) and config.json (everything needed to rebuild the
model and its front end: geometry, features, mean and std). Nothing is unpickled. Everything that doesn't fit raises
CheckpointError.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from msm_dist.config import Data, Features, Model
from msm_dist.errors import CheckpointError
from msm_dist.files import check_regular, read_small, write_atomically
from msm_dist.model.mae import MaskedSpectrogramModel
from msm_dist.model.published import from_published, read_published, to_published
from msm_dist.model.tensors import built, differences, parameters_of, some
from msm_dist.plain import MAX_JSON, parse_json

__all__ = [
    "WeightsInfo",
    "differences",
    "from_published",
    "load",
    "model_of",
    "read",
    "read_published",
    "save",
    "some",
    "to_published",
    "weights_folder",
]

FORMAT = "msm-dist weights"
VERSION = 1
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
CLASSIFIER_FOLDER = "classifier"
"""In an export: where fine-tuning puts weights whose position table is interpolated, so that nobody takes them."""
INTERPOLATED = (
    "a classifier fine-tuned with model.positions=interpolated: its encoder computes with a stretched position table, "
    "which only msm_dist.evaluate.classifier.Tagger has; fine-tune with model.positions=computed for weights that can "
    "be embedded with"
)


@dataclass(frozen=True)
class WeightsInfo:
    """What weights need beside themselves. `features` must hold mean and std."""

    model: Model
    features: Features
    crop_frames: int
    origin: dict[str, Any] = field(default_factory=dict)  # free: run, step, seed, version


def save(path: str | Path, state: Mapping[str, Tensor], info: WeightsInfo) -> Path:
    """Write parameters (a model's `state_dict()`, or float32 masters by the same names) to a folder.

    Stored float32. Each file is complete or absent; equal parameters give equal bytes. Returns the folder.
    Raises CheckpointError if statistics are missing or the folder can't be written.
    """
    if info.features.mean is None or info.features.std is None:
        raise CheckpointError("features.mean and features.std: weights are saved with the statistics of their corpus")
    folder = Path(path)
    geometry = info.model.geometry._asdict()
    config = {
        "format": FORMAT,
        "version": VERSION,
        # Widths and depths are spelt out: the meaning of a named size may not change under old weights.
        "model": info.model.model_dump(mode="json") | geometry | {"size": None},
        "features": info.features.model_dump(mode="json"),
        "crop_frames": info.crop_frames,
        "origin": info.origin,
    }
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in state.items()}
    temporary = folder / f"{WEIGHTS_FILE}.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary)
        # safetensors lets nobody else read its files; the folder's mode says who may.
        temporary.chmod(folder.stat().st_mode & 0o666)
        temporary.replace(folder / WEIGHTS_FILE)
        write_atomically(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{folder}: can't write the weights ({error}); check space and permissions") from None
    return folder


def load(path: str | Path) -> tuple[MaskedSpectrogramModel, WeightsInfo]:
    """Rebuild a model, on the CPU, from weights on disk (see `read`).

    Strict: every parameter must be there, with its shape, and nothing else. Raises CheckpointError.
    """
    state, info = read(path)
    return model_of(state, info, str(weights_folder(path))), info


def model_of(state: Mapping[str, Tensor], info: WeightsInfo, source: str) -> MaskedSpectrogramModel:
    """A model, on the CPU, with these weights, from the folder `source`. Raises CheckpointError as `load` does."""
    # At first: a few bytes of config.json may ask for a model of any size.
    _check_names(state, parameters_of(info.model, source), source=f"{source}/{WEIGHTS_FILE}")
    model = built(info.model, info.features.n_mels, info.crop_frames, source)
    model.load_state_dict(dict(state))
    return model


def read(path: str | Path, any_positions: bool = False) -> tuple[dict[str, Tensor], WeightsInfo]:
    """The tensors by name, on the CPU, and what stands beside them; no model is built. Raises CheckpointError.

    `path` is anything `weights_folder` takes. `any_positions`: the caller minds a position table that is stretched,
    as the models built here do not; else such weights are refused.
    """
    folder = weights_folder(path)
    info = _read_info(folder / CONFIG_FILE)
    if info.origin.get("positions") == "interpolated" and not any_positions:
        raise CheckpointError(f"{folder}: {INTERPOLATED}")
    try:
        check_regular(folder / WEIGHTS_FILE)
        return load_file(folder / WEIGHTS_FILE), info
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{folder / WEIGHTS_FILE}: not readable weights ({reason})") from None


def weights_folder(path: str | Path) -> Path:
    """The folder that holds the weights: of a run, of a folder that `save` wrote, or of its model.safetensors.

    Raises CheckpointError for a run that has not exported any.
    """
    folder = Path(path)
    if folder.name == WEIGHTS_FILE:
        return folder.parent
    if (folder / "export").is_dir():
        return folder / "export"
    if (folder / "config.yaml").is_file():
        raise CheckpointError(
            f"{folder}: a run without exported weights, which it writes when it finishes; start it again to finish it, "
            f"or take those of its newest checkpoint: msm-dist weights export {folder}"
        )
    if folder.is_file():
        raise CheckpointError(
            f"{folder}: a file; weights are a folder with {WEIGHTS_FILE} and {CONFIG_FILE}, which `msm-dist weights "
            "import` makes of a published checkpoint"
        )
    return folder


def _check_names(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    """Every expected tensor with its shape, and nothing else; all faults in one CheckpointError."""
    if found := differences(state, expected):
        raise CheckpointError(f"{source}: its tensors are not those of its configuration; {found}")


def _read_info(path: Path) -> WeightsInfo:
    try:
        config = parse_json(read_small(path, MAX_JSON))
        if config["format"] != FORMAT or config["version"] != VERSION:
            raise CheckpointError(
                f"{path}: format {config['format']!r} version {config['version']!r}; this program reads "
                f"{FORMAT!r} version {VERSION}"
            )
        info = WeightsInfo(
            Model.model_validate(config["model"]),
            Features.model_validate(config["features"]),
            Data(crop_frames=config["crop_frames"]).crop_frames,
            dict(config["origin"]),
        )
    except FileNotFoundError:
        if (path.parent / CLASSIFIER_FOLDER / CONFIG_FILE).is_file():
            raise CheckpointError(f"{path}: no such file; {CLASSIFIER_FOLDER}/ beside it is {INTERPOLATED}") from None
        raise CheckpointError(
            f"{path}: no such file; weights are a folder with {WEIGHTS_FILE} and {CONFIG_FILE}"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not the configuration of saved weights ({error})") from None
    return info
