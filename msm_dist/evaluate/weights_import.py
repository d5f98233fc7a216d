"""`msm-dist weights import`: published checkpoints to folders that `Encoder.load` reads.

In: a file in the published layout, from its authors or from `msm-dist weights export --published`. Out: a folder with
model.safetensors, config.json and README.md, each there whole or not at all, and a report in which every tensor is
accounted for. Fails with CheckpointError and ConfigError.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from msm_dist.config import Features
from msm_dist.engine.stored import digest
from msm_dist.errors import ConfigError
from msm_dist.evaluate.model_card import parameter_counts
from msm_dist.evaluate.weights_card import write_card
from msm_dist.evaluate.weights_export import refuse_taken
from msm_dist.model.origin import is_published, published_ancestor, told
from msm_dist.model.published import STATISTICS, Conversion, PublishedFile, convert, read_file, statistics_of
from msm_dist.model.weights import WEIGHTS_FILE, WeightsInfo, save

AUDIOSET = (-7.1, 4.2)
"""Mean and deviation of AudioSet's log-mel, with which the paper's models were trained."""
Statistics = tuple[float | None, float | None]


def import_published(
    file: Path,
    out: Path,
    statistics: Statistics = (None, None),
    encoder_only: bool = False,
    strict: bool = True,
    overwrite: bool = False,
) -> str:
    """Convert a published checkpoint to a folder, and what became of everything in it as text.

    `statistics` (mean, std) go before the file's own; without either, those of AudioSet are taken, and said.
    Raises CheckpointError, ConfigError.
    """
    if (statistics[0] is None) != (statistics[1] is None):
        raise ConfigError("--mean and --std: one of them is given; give both, or neither for those of the file")
    refuse_taken(out, overwrite)
    content = read_file(file)
    conversion = converted(content, encoder_only, strict, label=str(file))
    (mean, std), source = _statistics(content, statistics, str(file))
    model = conversion.model
    origin: dict[str, Any] = {
        "published_file": file.name,
        "sha256": digest(file),
        "epoch": content.epoch,
        "statistics": source,
        "notes": list(conversion.notes),
        "untrained": [] if conversion.has_decoder else ["decoder"],
    }
    if content.origin is not None:
        origin["exported_from"] = content.origin
    try:
        features = Features(n_mels=model.grid.n_mels, mean=mean, std=std)
    except ValidationError as error:
        fault = error.errors()[0]
        raise ConfigError(f"--{fault['loc'][0]} {fault['input']}: {fault['msg'].lower()}") from None
    info = WeightsInfo(model.config, features, model.grid.frames, origin)
    state = {name: tensor.float() for name, tensor in model.state_dict().items()}
    save(out, state, info)
    card = write_card(out, state, info)
    replaced = _replaced(content, statistics)
    unused = [*conversion.unused, *replaced, *(f"{name} (beside the tensors)" for name in content.beside)]
    taken = len(content.state) - len(conversion.unused) - len(replaced)
    is_foreign = published_ancestor(origin) is not None
    lines = [
        f"{out}: {taken} of {len(content.state)} tensors of {file} taken"
        + (f", epoch {content.epoch}" if content.epoch is not None else ""),
        *([] if content.origin is None else [f"  written by   msm-dist, from {told(content.origin)}"]),
        f"  parameters   {parameter_counts(state)}",
        f"  statistics   mean {mean:g}, deviation {std:g}: {source}",
        f"  sha256       {digest(out / WEIGHTS_FILE)}",
        f"  model card   {card}",
        *_names("unused", unused),
        *_names("missing", list(conversion.missing), "the decoder has random values; its reconstructions mean nothing"),
        *(f"  note         {note}" for note in conversion.notes),
        *(["  licence      see the terms of the published weights before you pass these on"] if is_foreign else []),
    ]
    return "\n".join(lines)


def converted(content: PublishedFile, encoder_only: bool = False, strict: bool = True, label: str = "") -> Conversion:
    """The model in a file, and what became of its tensors. Raises CheckpointError."""
    # Weights of our own have learnt from tokens at their places, CLS or none.
    keeps_places = content.origin is not None and not is_published(content.origin)
    return convert(content.state, encoder_only, strict, label, keeps_places)


def _statistics(content: PublishedFile, given: Statistics, label: str) -> tuple[tuple[float, float], str]:
    """Mean and deviation, and where they are from."""
    if given[0] is not None and given[1] is not None:
        return (given[0], given[1]), "as given"
    if found := statistics_of(content.state, label):
        return found, "the file's norm_stats"
    return AUDIOSET, (
        "assumed, as the file has none: AudioSet's, for weights that were trained on it; --mean and --std for others"
    )


def _replaced(content: PublishedFile, given: Statistics) -> list[str]:
    """The file's statistics with their values, where others were given."""
    if given[0] is None or STATISTICS not in content.state:
        return []
    values = content.state[STATISTICS].flatten()[:4].tolist()
    return [f"{STATISTICS} ({', '.join(f'{value:g}' for value in values)}: --mean and --std were given)"]


def _names(kind: str, names: Sequence[str], meaning: str = "") -> list[str]:
    """Every name, in lines of a terminal's width."""
    if not names:
        return []
    lead = f"  {kind:<12} {len(names)}" + (f" ({meaning}): " if meaning else ": ")
    return textwrap.wrap(
        lead + ", ".join(names), 110, subsequent_indent=" " * 15, break_long_words=False, break_on_hyphens=False
    )
