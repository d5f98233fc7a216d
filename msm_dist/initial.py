"""The weights a run starts from: `train.init_from` laid over the seeded ones, with a report of what went where.

In: exported weights (a finished run, or a folder that `model.weights.save` wrote) and the seeded parameters of the
run's model. Out: those parameters, the same on all ranks, and a `Report`. Rank 0 alone reads the file. The encoder is
taken whole or not at all: other weights than the run's settings ask for are a ConfigError that names all differences.
Any other part, such as the decoder, is taken where all its names and shapes agree and else keeps its seeded values.
Files that can't be read, or whose tensors are not what they say, are a CheckpointError.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from msm_dist.config import Config, Features, Model
from msm_dist.engine.world import World
from msm_dist.errors import CheckpointError, ConfigError, MsmError
from msm_dist.model.patches import PatchGrid
from msm_dist.model.weights import WEIGHTS_FILE, WeightsInfo, differences, read, some, weights_folder

ENCODER, DECODER = "encoder", "decoder"
ENCODER_SETTINGS = ("embed_dim", "depth", "num_heads", "patch_size", "cls_token", "key_bias")
DECODER_SETTINGS = ("decoder_embed_dim", "decoder_depth", "decoder_num_heads", "decoder_positions")
TASK_SETTINGS = ("mask_ratio", "normalize_targets")


@dataclass(frozen=True)
class Report:
    """What became of every parameter of the model and of every tensor of the file."""

    source: str
    sha256: str
    """Of the file with the tensors."""
    origin: dict[str, Any]
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    """Parameters of the model that the file has no value for; they keep their seeded ones."""
    unused: tuple[str, ...]
    """Tensors of the file without a place in the model."""
    resized: dict[str, str]
    """Position tables that are computed for another grid than the weights were trained on."""
    notes: tuple[str, ...]

    def json(self) -> str:
        """All of it, every name included."""
        return json.dumps(asdict(self), indent=1)

    def text(self) -> str:
        """The lines for the console, long lists of names cut short."""
        where = "".join(f", {key} {self.origin[key]!r}" for key in ("run", "step") if key in self.origin)
        total = len(self.loaded) + len(self.missing)
        lines = [f"weights    {self.source}{where}: {len(self.loaded)} of {total} parameters loaded"]
        if self.missing:
            lines.append(f"missing    {len(self.missing)} keep their seeded values: {some(self.missing)}")
        if self.unused:
            lines.append(f"unused     {len(self.unused)} of the file: {some(self.unused)}")
        lines += [f"resized    {name}: {how}" for name, how in self.resized.items()]
        return "\n".join([*lines, *(f"note       {note}" for note in self.notes)])


def load_initial(cfg: Config, features: Features, initial: Mapping[str, Tensor], world: World) -> Report:
    """Overwrite `initial`, the model's seeded parameters by name on the CPU, with the weights of train.init_from.

    `features` is the run's front end with its statistics. A collective. Raises ConfigError, CheckpointError on all
    ranks; then nothing is changed.
    """
    weights: dict[str, Tensor] = {}

    def read_file() -> Report:
        try:
            state, info = read(cfg.train.init_from)
            folder = weights_folder(cfg.train.init_from)
            with (folder / WEIGHTS_FILE).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            report = _match(cfg, features, initial, state, info, str(folder), digest)
        except OSError as error:
            raise CheckpointError(f"train.init_from = {cfg.train.init_from}: can't be read ({error})") from None
        except MsmError as error:
            raise type(error)(f"train.init_from = {cfg.train.init_from}: {error}") from None
        weights.update({name: state[name] for name in report.loaded})
        return report

    report = world.on_main(read_file)
    with torch.no_grad():
        for name in report.loaded:
            if world.is_main:
                initial[name].copy_(weights[name])
            torch.distributed.broadcast(initial[name], src=0, group=world.control)
    return report


def _match(
    cfg: Config,
    features: Features,
    initial: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    info: WeightsInfo,
    source: str,
    digest: str,
) -> Report:
    """Which tensors go where. Raises ConfigError for settings, CheckpointError for tensors that don't fit."""
    if faults := list(_conflicts(cfg.model, features, info)):
        lines = "\n".join(f"  {fault}" for fault in faults)
        raise ConfigError(f"{source} doesn't fit this run; give its values, or take other weights:\n{lines}")
    other_decoder = [name for name in DECODER_SETTINGS if _setting(cfg.model, name) != _setting(info.model, name)]
    loaded: list[str] = []
    missing: list[str] = []
    unused: list[str] = []
    for part in dict.fromkeys(name.partition(".")[0] for name in [ENCODER, *initial, *state]):
        mine = {name: value for name, value in initial.items() if name.partition(".")[0] == part}
        theirs = {name: value for name, value in state.items() if name.partition(".")[0] == part}
        found = differences(theirs, mine)
        if part == ENCODER and found:
            raise CheckpointError(f"{source}/{WEIGHTS_FILE}: its encoder is not the model's; {found}")
        if found or (part == DECODER and other_decoder):
            missing += mine
            unused += theirs
        else:
            loaded += mine
    if not loaded:
        raise CheckpointError(f"{source}/{WEIGHTS_FILE}: no tensor of it is a parameter of the model")
    if wrong := [name for name in loaded if not _is_usable(state[name])]:
        raise CheckpointError(f"{source}/{WEIGHTS_FILE}: not finite floating-point numbers: {some(wrong)}")
    resized = _resized(cfg, info, {name.partition(".")[0] for name in loaded}, source)
    notes = tuple(_notes(cfg.model, features, info, other_decoder))
    return Report(source, digest, info.origin, tuple(loaded), tuple(missing), tuple(unused), resized, notes)


def _conflicts(model: Model, features: Features, info: WeightsInfo) -> Iterator[str]:
    """Settings under which the encoder's weights mean something else, or have no place."""
    for name in ENCODER_SETTINGS:
        mine, theirs = _setting(model, name), _setting(info.model, name)
        if mine != theirs:
            yield f"model.{name} = {mine}: the weights' is {theirs}"
    front_end, theirs = features.front_end(), info.features.front_end()
    for name, value in front_end.items():
        if name != "n_mels" and value != theirs[name]:
            yield f"features.{name} = {value}: the weights' log-mels were made with {theirs[name]}"


def _resized(cfg: Config, info: WeightsInfo, parts: set[str], source: str) -> dict[str, str]:
    """What happens to the position tables of the loaded parts; they are functions of the grid, not in the file."""
    patch = cfg.model.patch
    try:
        before = PatchGrid(info.features.n_mels, info.crop_frames, patch)
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error}") from None
    after = PatchGrid(cfg.features.n_mels, cfg.data.crop_frames, patch)
    if before == after:
        return {}
    sizes = "{}x{} -> {}x{} patches (bands x time), recomputed; ".format(*before.shape, *after.shape)
    same = "a patch that both grids have keeps its code"
    moved = "numbered along the flat patch index, so that patches past the first band have other codes"
    flat = cfg.model.decoder_positions == "1d" and before.shape[1] != after.shape[1]
    tables = {ENCODER: same, DECODER: moved if flat else same}
    return {f"{part}.positions": sizes + how for part, how in tables.items() if part in parts}


def _notes(model: Model, features: Features, info: WeightsInfo, other_decoder: list[str]) -> Iterator[str]:
    theirs = info.features
    if (features.mean, features.std) != (theirs.mean, theirs.std):
        yield (
            f"features.mean, std = {features.mean}, {features.std}, the weights' {theirs.mean}, {theirs.std}: the same "
            f"sound reaches the model on another scale; features.mean={theirs.mean} features.std={theirs.std} keeps "
            "theirs"
        )
    if features.n_mels != theirs.n_mels:
        yield (
            f"features.n_mels = {features.n_mels}, the weights' {theirs.n_mels}: a patch covers other frequencies than "
            "those it was trained on"
        )
    for name in (*other_decoder, *TASK_SETTINGS):
        mine, before = _setting(model, name), _setting(info.model, name)
        if mine != before:
            yield f"model.{name} = {mine}, the weights' {before}"


def _setting(model: Model, name: str) -> Any:
    """A setting of the model, with named sizes spelt out."""
    return getattr(model.geometry, name) if name in model.geometry._fields else getattr(model, name)


def _is_usable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.isfinite().all())
