"""Trained weights on disk: our own format, and conversion from and to published MSM-MAE checkpoints.

Our format is a folder with model.safetensors (float32, the parameters by name) and config.json (everything
needed to rebuild the model and its front end: geometry, features, mean and std). Nothing is unpickled. A
published checkpoint is a pickle, read by torch's weights-only loader with argparse.Namespace allowed.
Everything that doesn't fit raises CheckpointError.
"""

import json
import os
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from msm_dist.config import MODEL_SIZES, Features, Model
from msm_dist.errors import CheckpointError, ConfigError
from msm_dist.model.mae import MaskedSpectrogramModel
from msm_dist.model.patches import PatchGrid, sincos_1d, sincos_2d

FORMAT = "msm-dist weights"
VERSION = 1
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
TABLE_TOLERANCE = 1e-4  # between float32 tables computed in different orders
NAMES_SHOWN = 4

# Our prefixes beside the published ones; a block's own names differ in the two biases only.
PUBLISHED_PREFIXES = {
    "encoder.cls_token": "cls_token",
    "encoder.patch_embed.": "patch_embed.proj.",
    "encoder.blocks.": "blocks.",
    "encoder.norm.": "norm.",
    "decoder.mask_token": "mask_token",
    "decoder.embed.": "decoder_embed.",
    "decoder.blocks.": "decoder_blocks.",
    "decoder.norm.": "decoder_norm.",
    "decoder.pred.": "decoder_pred.",
}


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
    try:
        folder.mkdir(parents=True, exist_ok=True)
        weights_part, config_part = folder / f"{WEIGHTS_FILE}.part", folder / f"{CONFIG_FILE}.part"
        save_file(tensors, weights_part)
        # safetensors lets nobody else read its files; the folder's mode says who may.
        weights_part.chmod(folder.stat().st_mode & 0o666)
        config_part.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        os.replace(weights_part, folder / WEIGHTS_FILE)
        os.replace(config_part, folder / CONFIG_FILE)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: can't write the weights ({error}); check space and permissions") from None
    return folder


def load(path: str | Path) -> tuple[MaskedSpectrogramModel, WeightsInfo]:
    """Rebuild a model, on the CPU, from weights on disk (see `read`).

    Strict: every parameter must be there, with its shape, and nothing else. Raises CheckpointError.
    """
    state, info = read(path)
    source = str(weights_folder(path))
    model = _build(info.model, info.features.n_mels, info.crop_frames, source)
    _check_names(state, model.state_dict(), source=f"{source}/{WEIGHTS_FILE}")
    model.load_state_dict(state)
    return model, info


def read(path: str | Path) -> tuple[dict[str, Tensor], WeightsInfo]:
    """The tensors by name, on the CPU, and what stands beside them; no model is built. Raises CheckpointError.

    `path` is anything `weights_folder` takes.
    """
    folder = weights_folder(path)
    info = _read_info(folder / CONFIG_FILE)
    try:
        return load_file(folder / WEIGHTS_FILE), info
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / WEIGHTS_FILE}: not readable weights ({error})") from None


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
            f"{folder}: a run without exported weights, which it writes when it finishes; start it again to finish it"
        )
    return folder


def read_published(path: str | Path) -> dict[str, Tensor]:
    """The state_dict in a published checkpoint file, bare or under "model". Raises CheckpointError."""
    try:
        with torch.serialization.safe_globals([Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, UnpicklingError, EOFError) as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(
            f"{path}: not a checkpoint that can be loaded without running its code ({reason})"
        ) from None
    state = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: holds no state_dict of tensors, bare or under 'model'")
    return state


def from_published(source: Mapping[str, Tensor] | str | Path, encoder_only: bool = False) -> MaskedSpectrogramModel:
    """A model with the weights of a published checkpoint, its geometry inferred from the tensors.

    Both generations: query and value biases with a 1-D decoder table, full biases with a 2-D one. Tables are
    compared with ours, not read. `encoder_only` leaves the decoder freshly initialised, for files whose
    decoder is another one. mask_ratio and normalize_targets are not in such files: they take their defaults.
    Keeps the dtype of the tensors. Raises CheckpointError.
    """
    state = dict(read_published(source) if isinstance(source, str | Path) else source)
    label = str(source) if isinstance(source, str | Path) else "published state_dict"
    try:
        config, grid = _published_geometry(state, encoder_only, label)
    except KeyError as error:
        raise CheckpointError(f"{label}: tensor {error.args[0]} is missing; not a published MSM-MAE") from None
    model = _build(config, grid.n_mels, grid.frames, source=label).to(state["patch_embed.proj.weight"].dtype)
    own = model.state_dict()
    converted = {_our_name(name): value for name, value in state.items() if name not in _NOT_PARAMETERS}
    if encoder_only:
        converted = {name: value for name, value in converted.items() if name.startswith("encoder.")}
        converted |= {name: value for name, value in own.items() if name.startswith("decoder.")}
    name = "encoder.patch_embed.weight"
    converted[name] = converted[name].flatten(1)
    _check_names(converted, own, source=label)
    model.load_state_dict(converted)
    return model


def to_published(model: MaskedSpectrogramModel) -> dict[str, Tensor]:
    """The state_dict of a model under published names, tables included; the inverse of `from_published`."""
    state = {_published_name(name): value for name, value in model.state_dict().items()}
    weight = state["patch_embed.proj.weight"]
    state["patch_embed.proj.weight"] = weight.reshape(-1, 1, *model.grid.patch)
    state["pos_embed"] = model.encoder.positions().unsqueeze(0)
    state["decoder_pos_embed"] = model.decoder.positions().unsqueeze(0)
    return state


def differences(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """How tensors differ in names and shapes from those expected, in one line; empty where they don't."""
    wrong = [
        f"{name} {list(state[name].shape)} (expected {list(expected[name].shape)})"
        for name in expected
        if name in state and state[name].shape != expected[name].shape
    ]
    faults = {
        "missing": [name for name in expected if name not in state],
        "unknown": [name for name in state if name not in expected],
        "wrong shape": wrong,
    }
    return "; ".join(f"{kind}: {some(names)}" for kind, names in faults.items() if names)


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


_NOT_PARAMETERS = ("pos_embed", "decoder_pos_embed", "norm_stats")


def _our_name(published: str) -> str:
    for ours, theirs in PUBLISHED_PREFIXES.items():
        if published.startswith(theirs):
            name = ours + published.removeprefix(theirs)
            return name.replace(".attn.q_bias", ".attn.qkv.q_bias").replace(".attn.v_bias", ".attn.qkv.v_bias")
    return published


def _published_name(ours: str) -> str:
    prefix = next(prefix for prefix in PUBLISHED_PREFIXES if ours.startswith(prefix))
    name = PUBLISHED_PREFIXES[prefix] + ours.removeprefix(prefix)
    return name.replace(".qkv.q_bias", ".q_bias").replace(".qkv.v_bias", ".v_bias")


def _published_geometry(state: Mapping[str, Tensor], encoder_only: bool, source: str) -> tuple[Model, PatchGrid]:
    """The configuration and grid behind the tensors. Raises KeyError for a missing one, CheckpointError."""
    width, _, *patch = state["patch_embed.proj.weight"].shape
    num_prefix = int("cls_token" in state)
    grid = _published_grid(state["pos_embed"][0], num_prefix, (patch[0], patch[1]))
    if not _equal(state["pos_embed"][0], sincos_2d(grid, width, num_prefix)):
        raise CheckpointError(f"{source}: pos_embed is not the fixed 2-D table of {grid}")
    encoder = _heads(width, _num_blocks(state, "blocks."), decoder=False, source=source)
    values = dict(zip(("embed_dim", "depth", "num_heads"), encoder, strict=True))
    if not encoder_only:
        values |= _published_decoder(state, grid, num_prefix, source)
    config = Model(
        patch_size=f"{patch[0]}x{patch[1]}",
        cls_token=bool(num_prefix),
        key_bias="blocks.0.attn.qkv.bias" in state,
        **values,
    )
    return config, grid


def _published_decoder(state: Mapping[str, Tensor], grid: PatchGrid, num_prefix: int, source: str) -> dict[str, Any]:
    width = state["decoder_embed.weight"].shape[0]
    table = state["decoder_pos_embed"][0]
    tables = {"1d": sincos_1d(grid.num_patches, width, num_prefix), "2d": sincos_2d(grid, width, num_prefix)}
    positions = next((name for name, ours in tables.items() if _equal(table, ours)), None)
    if positions is None:
        raise CheckpointError(
            f"{source}: decoder_pos_embed is neither the 1-D nor the 2-D table; take the encoder alone with "
            "encoder_only=True"
        )
    _, depth, heads = _heads(width, _num_blocks(state, "decoder_blocks."), decoder=True, source=source)
    return {
        "decoder_embed_dim": width,
        "decoder_depth": depth,
        "decoder_num_heads": heads,
        "decoder_positions": positions,
    }


def _published_grid(table: Tensor, num_prefix: int, patch: tuple[int, int]) -> PatchGrid:
    """The grid behind a table [P + L, D]: the time half of a row repeats after Tg patches."""
    time = table[num_prefix:, : table.shape[1] // 2]
    repeats = (time - time[0]).abs().amax(dim=1)[1:] < TABLE_TOLERANCE
    columns = int(repeats.nonzero()[0]) + 1 if repeats.any() else len(time)
    return PatchGrid(len(time) // columns * patch[0], columns * patch[1], patch)


def _heads(width: int, depth: int, decoder: bool, source: str) -> tuple[int, int, int]:
    """Width, depth, heads; the heads leave no trace in the tensors and come from the named sizes."""
    for size in MODEL_SIZES.values():
        known = size[3:] if decoder else size[:3]
        if known[:2] == (width, depth):
            return known
    part = "decoder" if decoder else "encoder"
    raise CheckpointError(
        f"{source}: {part} of width {width} with {depth} blocks is no published geometry, so its number of "
        f"heads is not known; known: {', '.join(MODEL_SIZES)}"
    )


def _num_blocks(state: Iterable[str], prefix: str) -> int:
    return len({name.split(".")[1] for name in state if name.startswith(prefix)})


def _equal(table: Tensor, ours: Tensor) -> bool:
    return table.shape == ours.shape and bool((table.double() - ours).abs().max() < TABLE_TOLERANCE)


def _build(model: Model, n_mels: int, crop_frames: int, source: str) -> MaskedSpectrogramModel:
    try:
        return MaskedSpectrogramModel(model, n_mels, crop_frames)
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error}") from None


def _check_names(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    """Every expected tensor with its shape, and nothing else; all faults in one CheckpointError."""
    if found := differences(state, expected):
        raise CheckpointError(f"{source}: its tensors are not those of its configuration; {found}")


def _read_info(path: Path) -> WeightsInfo:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if config["format"] != FORMAT or config["version"] != VERSION:
            raise CheckpointError(
                f"{path}: format {config['format']!r} version {config['version']!r}; this program reads "
                f"{FORMAT!r} version {VERSION}"
            )
        info = WeightsInfo(
            Model.model_validate(config["model"]),
            Features.model_validate(config["features"]),
            int(config["crop_frames"]),
            dict(config["origin"]),
        )
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: no such file; weights are a folder with {WEIGHTS_FILE} and {CONFIG_FILE}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not the configuration of saved weights ({error})") from None
    return info
