"""Published MSM-MAE checkpoints: their layout to our models and back.

In: a file (a pickle, read by torch's weights-only loader with argparse.Namespace allowed: none of its code runs), or
its state_dict. Out: a model whose geometry is inferred from the tensors alone (published_settings.py), and what became
of every tensor. Two generations exist: the paper's has query and value biases and a 1-D decoder table, the later
re-run's has full biases, a 2-D decoder table and `norm_stats`. Position tables are compared with ours, not read. A file
that we write has beside its tensors an entry `msm_dist`, JSON, which other readers overlook: where the weights come
from. Everything that doesn't fit raises CheckpointError.
"""

import json
import math
import os
import re
import struct
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from msm_dist.config import Model
from msm_dist.errors import CheckpointError, ConfigError
from msm_dist.model.mae import MaskedSpectrogramModel
from msm_dist.model.published_settings import WEIGHT_TYPES, decoder_settings, encoder_settings
from msm_dist.model.tensors import built

TABLES = ("pos_embed", "decoder_pos_embed")
STATISTICS = "norm_stats"
MARK = "msm_dist"
DECODER = ("decoder_", "mask_token")
# What torch raises for files of other kinds, damaged files, and pickles that would run something.
UNREADABLE = (
    *(OSError, RuntimeError, UnpicklingError, EOFError, ValueError, LookupError, TypeError, AttributeError),
    *(AssertionError, ArithmeticError, MemoryError, RecursionError, NotImplementedError),
    *(struct.error, zipfile.BadZipFile),
)
# How torch names what a pickle would import.
FORBIDDEN = re.compile(r"\bGLOBAL ([\w.]+)")
NO_CLS_NOTE = (
    "trained without a CLS token: the published decoder then drops the first visible token and shifts the others, so "
    "this decoder learnt from misplaced tokens; ours keeps every token at its place, and will reconstruct worse with "
    "these decoder weights than the training loss says. The encoder is as it was trained"
)

# Our prefixes beside the published ones; a block's own names differ in the two biases only.
PREFIXES = {
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
class PublishedFile:
    """What a published file holds."""

    state: dict[str, Tensor]
    beside: tuple[str, ...]
    """Names of its other entries, such as optimizer, scaler and args; none of them is used."""
    epoch: int | None
    origin: dict[str, Any] | None = None
    """Where the weights come from, in a file that this program wrote; None in all others."""


@dataclass(frozen=True)
class Conversion:
    """A model with published weights, and what became of the tensors, by their published names."""

    model: MaskedSpectrogramModel
    unused: tuple[str, ...]
    """Tensors of the file that the model did not take."""
    missing: tuple[str, ...]
    """Parameters that the model has no value for: those of the decoder or none. They keep their initial values."""
    notes: tuple[str, ...]

    @property
    def has_decoder(self) -> bool:
        """Whether the decoder's weights are the file's."""
        return not self.missing


def read_file(path: str | Path) -> PublishedFile:
    """Read a published checkpoint, its state_dict bare or under "model". Raises CheckpointError."""
    try:
        size = _checked_size(path)
        with torch.serialization.safe_globals([Namespace]), warnings.catch_warnings(action="ignore"):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise CheckpointError(f"{path}: {_unreadable(error)}") from None
    wrapped = isinstance(content, dict) and "model" in content
    state = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise CheckpointError(f"{path}: holds no state_dict of tensors, bare or under 'model'")
    state = dict(state)
    beside = [str(name) for name in content if name != "model"] if wrapped else []
    if wrapped and isinstance(content.get(STATISTICS), Tensor):
        # Where `write_file` puts them for the generation whose state_dict has no place for them.
        state.setdefault(STATISTICS, content[STATISTICS])
        beside.remove(STATISTICS)
    if strange := next((name for name, value in state.items() if not _is_plain(value, size)), None):
        raise CheckpointError(
            f"{path}: {strange} is no plain tensor of values that are in the file; take a state_dict that torch.save "
            "wrote"
        )
    origin = _origin(content.get(MARK)) if wrapped else None
    if origin is not None:
        beside.remove(MARK)
    epoch = content.get("epoch") if wrapped else None
    if type(epoch) is not int:
        return PublishedFile(state, tuple(beside), None, origin)
    beside.remove("epoch")
    return PublishedFile(state, tuple(beside), epoch, origin)


def read_published(path: str | Path) -> dict[str, Tensor]:
    """The state_dict in a published checkpoint file. Raises CheckpointError."""
    return read_file(path).state


def from_published(source: Mapping[str, Tensor] | str | Path, encoder_only: bool = False) -> MaskedSpectrogramModel:
    """A model with the weights of a published checkpoint; every tensor must have its place (see `convert`).

    mask_ratio and normalize_targets are not in such files: they take their defaults. Keeps the dtype of the tensors.
    Raises CheckpointError.
    """
    if isinstance(source, str | Path):
        return convert(read_published(source), encoder_only, label=str(source)).model
    return convert(source, encoder_only).model


def convert(
    state: Mapping[str, Tensor],
    encoder_only: bool = False,
    strict: bool = True,
    label: str = "published state_dict",
    keeps_places: bool = False,
) -> Conversion:
    """A model with these weights, and a report. The encoder is taken whole, or CheckpointError.

    strict: the decoder too, and nothing may be left over. Else what has no place is left out, and a decoder that is not
    whole keeps its initial values as a whole. `encoder_only` leaves the decoder out, for files with another one.
    `keeps_places`: these weights were trained by a decoder without the published one's flaw, see NO_CLS_NOTE.
    """
    try:
        values, grid = encoder_settings(state, label)
        try:
            values |= {} if encoder_only else decoder_settings(state, grid, values["cls_token"], label)
        except (KeyError, CheckpointError):
            if strict:
                raise
            encoder_only = True
    except KeyError as error:
        name = error.args[0]
        remedy = "--encoder-only takes the encoder alone" if _in_decoder(name) else "not a published MSM-MAE"
        raise CheckpointError(f"{label}: tensor {name} is missing; {remedy}") from None
    except ConfigError as error:
        raise CheckpointError(f"{label}: {error}") from None
    model = built(Model(**values), grid.n_mels, grid.frames, label).to(state["patch_embed.proj.weight"].dtype)
    expected = to_published(model)
    fits = {name: value for name, value in expected.items() if name in state and value.shape == state[name].shape}
    faults = _faults(state, expected, [name for name in expected if not _in_decoder(name)])
    if faults:
        raise CheckpointError(f"{label}: its encoder is not whole:\n{faults}")
    known = [name for name in state if name in expected or name == STATISTICS]
    of_decoder = [name for name in {**expected, **state} if _in_decoder(name)]
    if strict and not encoder_only:
        faults = _faults(state, expected, [name for name in expected if _in_decoder(name)])
    left_over = [name for name in state if name not in known and not (encoder_only and _in_decoder(name))]
    if strict and (faults or left_over):
        lines = [*([faults] if faults else []), *(f"  unused   {name}" for name in left_over)]
        raise CheckpointError(
            f"{label}: not all of it has a place in the model that its tensors describe (--no-strict leaves out what "
            "has none, --encoder-only the decoder):\n" + "\n".join(lines)
        )
    takes_decoder = not encoder_only and all(name in fits for name in expected)
    taken = [name for name in fits if takes_decoder or not _in_decoder(name)]
    _take(model, state, [name for name in taken if name not in TABLES], label)
    missing = () if takes_decoder else tuple(n for n in of_decoder if n in expected and n not in TABLES)
    unused = tuple(name for name in state if name not in taken and name != STATISTICS)
    notes = (NO_CLS_NOTE,) if takes_decoder and not values["cls_token"] and not keeps_places else ()
    return Conversion(model, unused, missing, notes)


def to_published(model: MaskedSpectrogramModel) -> dict[str, Tensor]:
    """The state_dict of a model under published names, tables included; the inverse of `from_published`."""
    state = {_published_name(name): value for name, value in model.state_dict().items()}
    weight = state["patch_embed.proj.weight"]
    state["patch_embed.proj.weight"] = weight.reshape(-1, 1, *model.grid.patch)
    state["pos_embed"] = model.encoder.positions().unsqueeze(0)
    state["decoder_pos_embed"] = model.decoder.positions().unsqueeze(0)
    return state


def write_file(
    model: MaskedSpectrogramModel,
    mean: float,
    std: float,
    path: Path,
    origin: Mapping[str, Any] | None = None,
    encoder_only: bool = False,
) -> None:
    """Write a model in the published layout, there whole or not at all. Raises OSError.

    `norm_stats` (float32) lies among the tensors where keys have a bias, as in that generation, and else beside them,
    where readers of the paper's layout overlook it and `read_file` finds it, as it finds `origin`. `encoder_only`
    leaves the decoder out.
    """
    published = to_published(model)
    names = [name for name in published if not (encoder_only and _in_decoder(name))]
    state = {name: published[name].detach().clone().contiguous() for name in names}
    statistics = {STATISTICS: torch.tensor([mean, std], dtype=torch.float32)}
    content: dict[str, Any] = {"model": state | statistics} if model.config.key_bias else {"model": state} | statistics
    content[MARK] = json.dumps({"origin": dict(origin or {})})
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def statistics_of(state: Mapping[str, Tensor], label: str = "published state_dict") -> tuple[float, float] | None:
    """Mean and deviation that the training normalised with, where the file has them. Raises CheckpointError."""
    if STATISTICS not in state:
        return None
    values = state[STATISTICS].flatten()
    # By their digits: a float32 of -7.1 is meant as -7.1, not as -7.099999904632568.
    numbers = [float(str(value)) for value in (values if values.dtype == torch.float64 else values.float()).numpy()]
    if len(numbers) != 2 or not all(map(math.isfinite, numbers)) or numbers[1] <= 0:
        raise CheckpointError(
            f"{label}: {STATISTICS} is {numbers[:4]}: must be a mean and a deviation above 0; give --mean and --std"
        )
    return numbers[0], numbers[1]


def _take(model: MaskedSpectrogramModel, state: Mapping[str, Tensor], names: Iterable[str], label: str) -> None:
    """Lay tensors into a model. Raises CheckpointError for values that are no weights."""
    names = list(names)
    if wrong := [n for n in names if state[n].dtype not in WEIGHT_TYPES or not state[n].isfinite().all()]:
        raise CheckpointError(f"{label}: not finite floating-point numbers:\n" + "\n".join(f"  {n}" for n in wrong))
    own = model.state_dict()
    for name in names:
        ours = _our_name(name)
        own[ours] = state[name].reshape(own[ours].shape).to(own[ours].dtype)
    model.load_state_dict(own)


def _checked_size(path: str | Path) -> int:
    """Bytes of a file, none of which are compressed: torch stores, and a bomb would inflate. Raises ValueError."""
    size = os.stat(path).st_size
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts) or sum(p.file_size for p in parts) > size:
            raise ValueError("compressed")
    return size


def _is_plain(value: Tensor, size: int) -> bool:
    """Whether a tensor lies in memory as it is, no view that repeats few bytes of a file of `size` bytes."""
    if type(value) not in (Tensor, torch.nn.Parameter) or value.layout != torch.strided or value.is_quantized:
        return False
    return value.device.type == "cpu" and value.numel() * value.element_size() <= size


def _unreadable(error: Exception) -> str:
    """Why torch does not load a file; of its words, which advise to run the code of a pickle, a forbidden name."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, OSError):
        return f"can't be read ({error.strerror})"
    if isinstance(error, UnpicklingError) and (name := FORBIDDEN.search(str(error))):
        return (
            f"not a checkpoint that can be loaded without running its code: it calls for {name[1]}, which is no part "
            "of a state_dict; take a file of tensors and plain values"
        )
    return "no checkpoint at all, or a damaged one: torch.save writes no such file; fetch it again"


def _origin(mark: Any) -> dict[str, Any] | None:
    """What a file of ours says of itself; None where there is no such entry, or another program's."""
    try:
        return dict(json.loads(mark)["origin"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _faults(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], names: Iterable[str]) -> str:
    """A line for every one of `names` that the file lacks or has in another shape; empty where there is none."""
    lines = []
    for name in names:
        if name not in state:
            lines.append(f"  missing  {name} {list(expected[name].shape)}")
        elif state[name].shape != expected[name].shape:
            lines.append(f"  shape    {name} {list(state[name].shape)}, expected {list(expected[name].shape)}")
    return "\n".join(lines)


def _in_decoder(published: str) -> bool:
    return published.startswith(DECODER)


def _our_name(published: str) -> str:
    ours, theirs = next((o, t) for o, t in PREFIXES.items() if published.startswith(t))
    name = ours + published.removeprefix(theirs)
    return name.replace(".attn.q_bias", ".attn.qkv.q_bias").replace(".attn.v_bias", ".attn.qkv.v_bias")


def _published_name(ours: str) -> str:
    prefix = next(prefix for prefix in PREFIXES if ours.startswith(prefix))
    name = PREFIXES[prefix] + ours.removeprefix(prefix)
    return name.replace(".qkv.q_bias", ".q_bias").replace(".qkv.v_bias", ".v_bias")
