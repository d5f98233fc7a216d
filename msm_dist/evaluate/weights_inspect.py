"""`msm-dist weights inspect`: what a folder of weights, a run, a checkpoint or a published file holds.

In: a path. Out: text: origin, geometry, parameters, statistics, digest and every tensor, blocks of equal shape in one
line. Nothing is written, nothing of a file is executed. Fails with CheckpointError.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from msm_dist.config import Features
from msm_dist.engine.stored import digest
from msm_dist.evaluate.model_card import facts, other_model, parameter_counts
from msm_dist.evaluate.weights_export import find, weights_of
from msm_dist.evaluate.weights_import import converted
from msm_dist.model.origin import chain, told
from msm_dist.model.published import read_file, statistics_of
from msm_dist.model.weights import WEIGHTS_FILE, WeightsInfo

BLOCK = re.compile(r"^(.*blocks\.)(\d+)(\..*)$")


def inspect(path: Path) -> str:
    """Describe weights in any of the forms that exist. Raises CheckpointError, ConfigError."""
    if path.is_file() and path.name != WEIGHTS_FILE:
        return _published(path)
    source = find(path)
    state, info = weights_of(source)
    if source.saved:
        place, digests = source.saved.folder, {name: e["sha256"] for name, e in source.saved.meta["files"].items()}
    else:
        place, digests = source.exported, {WEIGHTS_FILE: digest(source.exported / WEIGHTS_FILE)}
    words = {"weights": str(place), "origin": _origin(info)} | facts(info)
    words["parameters"] = parameter_counts(state)
    if found := other_model(state, info):
        words["other model"] = found
    words |= {f"sha256 {name}": value for name, value in digests.items()}
    return _text(words, state)


def _published(path: Path) -> str:
    """A published checkpoint, in its own names."""
    content = read_file(path)
    conversion = converted(content, strict=False, label=str(path))
    model = conversion.model
    mean, std = statistics_of(content.state, str(path)) or (None, None)
    # A place for statistics is needed to describe the rest; what the file lacks is said in their stead.
    features = Features(n_mels=model.grid.n_mels, mean=mean or 0.0, std=std or 1.0)
    words = {"published": str(path), "epoch": "not told" if content.epoch is None else str(content.epoch)}
    words |= {} if content.origin is None else {"origin": f"written by msm-dist, {told(content.origin)}"}
    words |= facts(WeightsInfo(model.config, features, model.grid.frames, {"published_file": path.name}))
    if mean is None:
        words["statistics"] = "not in the file"
    if not conversion.has_decoder:
        words["decoder"] = "another one than the published layout has: --encoder-only"
    words["parameters"] = f"{sum(tensor.numel() for tensor in content.state.values()):,}, tables included"
    words["beside"] = ", ".join(content.beside) or "nothing"
    if conversion.notes:
        words["note"] = "; ".join(conversion.notes)
    words[f"sha256 {path.name}"] = digest(path)
    return _text(words, content.state)


def _origin(info: WeightsInfo) -> str:
    kept = ("run", "step", "task", "published_file", "epoch", "statistics", "untrained")
    said = [f"{name} {info.origin[name]}" for name in kept if info.origin.get(name)]
    names = [str(source.get("name")) for source in info.origin.get("corpus") or ()]
    before = [f"made from {told(one)}" for one in list(chain(info.origin))[1:]]
    return ", ".join([*said, *(f"corpus {name}" for name in names), *before]) or "not told"


def _text(words: Mapping[str, str], state: Mapping[str, Tensor]) -> str:
    lines = [f"{name:<12} {value}" for name, value in words.items()]
    return "\n".join([*lines, f"{'tensors':<12} {len(state)}", *_tensors(state)])


def _tensors(state: Mapping[str, Tensor]) -> list[str]:
    """A line for each tensor; of blocks with equal names and shapes, one for all."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for name, tensor in state.items():
        kind = f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        match = BLOCK.match(name)
        head, number, tail = match.groups() if match else (name, "-1", "")
        groups.setdefault((head, tail, kind), []).append(int(number))
    lines = []
    for (head, tail, kind), numbers in groups.items():
        low, high = min(numbers), max(numbers)
        middle = "" if low < 0 else str(low) if low == high else f"{{{low}..{high}}}"
        if len(numbers) != high - low + 1:
            middle = "{" + ",".join(map(str, sorted(numbers))) + "}"
        lines.append(f"  {head}{middle}{tail} {kind}")
    return lines
