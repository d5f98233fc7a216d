"""`msm-dist weights export` and `import`: checkpoints of runs and published files to folders that `Encoder.load` reads.

In: a run folder, a folder with exported weights, or a published checkpoint. Out: a folder with model.safetensors,
config.json and README.md, each there whole or not at all, and a report. No DeepSpeed: a checkpoint holds the whole fp32
masters by name, whatever ZeRO stage and offload trained them. Fails with CheckpointError and ConfigError.
"""

import json
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from msm_dist.config import Config, Features, load_config
from msm_dist.engine.stored import (
    Saved,
    checkpoint_name,
    digest,
    folders,
    newest_complete,
    open_checkpoint,
    read_masters,
)
from msm_dist.errors import CheckpointError, ConfigError, DataError
from msm_dist.evaluate.model_card import model_card, parameter_counts
from msm_dist.files import write_atomically
from msm_dist.model.published import PublishedFile, convert, read_file, statistics_of, write_file
from msm_dist.model.weights import WEIGHTS_FILE, WeightsInfo, load, read, save, weights_folder
from msm_dist.monitor import read_metrics

CARD_FILE = "README.md"
AUDIOSET = (-7.1, 4.2)
"""Mean and deviation of AudioSet's log-mel, with which the paper's models were trained."""


@dataclass(frozen=True)
class Source:
    """Where weights are taken from: exported ones, or a checkpoint of a run."""

    run: Path | None
    exported: Path | None
    saved: Saved | None


def export(run: Path, step: int | None = None, out: Path | None = None, published: Path | None = None) -> str:
    """Write a run's weights to a folder, and what was done as text.

    Of a run's export and its checkpoints the latest is taken, or that of `step`. `out` is RUN/export unless given.
    `published` is a file to write them to in the published layout too. Raises CheckpointError, ConfigError.
    """
    source = find(run, step)
    state, info = weights_of(source)
    folder = out or source.exported or _own_export(run, info)
    if source.exported is None or folder.resolve() != source.exported.resolve():
        save(folder, state, info)
    _write_card(folder, state, info, source.run)
    taken = source.saved.folder if source.saved else source.exported
    lines = [
        f"{folder}: {len(state)} tensors from {taken}" + _step(info),
        f"  parameters   {parameter_counts(state)}",
        f"  sha256       {digest(folder / WEIGHTS_FILE)}",
        f"  model card   {folder / CARD_FILE}; its licence is yours to state",
    ]
    if published:
        model, _ = load(folder)
        _writing(published, lambda: write_file(model, info.features.mean, info.features.std, published))
        lines.append(f"  published    {published}, in the layout of the published checkpoints")
    return "\n".join(lines)


def import_published(
    file: Path,
    out: Path,
    statistics: tuple[float | None, float | None] = (None, None),
    encoder_only: bool = False,
    strict: bool = True,
) -> str:
    """Convert a published checkpoint to a folder, and what became of everything in it as text.

    `statistics` (mean, std) go before the file's own; without either, those of AudioSet are taken, and said.
    Raises CheckpointError, ConfigError.
    """
    if (statistics[0] is None) != (statistics[1] is None):
        raise ConfigError("--mean and --std: one of them is given; give both, or neither for those of the file")
    content = read_file(file)
    conversion = convert(content.state, encoder_only, strict, label=str(file))
    (mean, std), told = _statistics(content, statistics, str(file))
    model = conversion.model
    origin: dict[str, Any] = {
        "published_file": file.name,
        "sha256": digest(file),
        "epoch": content.epoch,
        "statistics": told,
        "notes": list(conversion.notes),
        "untrained": [] if conversion.has_decoder else ["decoder"],
    }
    try:
        features = Features(n_mels=model.grid.n_mels, mean=mean, std=std)
    except ValidationError as error:
        fault = error.errors()[0]
        raise ConfigError(f"--{fault['loc'][0]} {fault['input']}: {fault['msg'].lower()}") from None
    info = WeightsInfo(model.config, features, model.grid.frames, origin)
    state = {name: tensor.float() for name, tensor in model.state_dict().items()}
    save(out, state, info)
    _write_card(out, state, info, None)
    taken = len(content.state) - len(conversion.unused)
    lines = [
        f"{out}: {taken} of {len(content.state)} tensors of {file} taken"
        + (f", epoch {content.epoch}" if content.epoch is not None else ""),
        f"  parameters   {parameter_counts(state)}",
        f"  statistics   mean {mean:g}, deviation {std:g}: {told}",
        f"  sha256       {digest(out / WEIGHTS_FILE)}",
        *_names("unused", [*conversion.unused, *(f"{name} (beside the tensors)" for name in content.beside)]),
        *_names("missing", list(conversion.missing), "the decoder has random values; its reconstructions mean nothing"),
        *(f"  note         {note}" for note in conversion.notes),
        "  licence      that of the published weights; see its terms before you pass them on",
    ]
    return "\n".join(lines)


def find(run: Path, step: int | None = None) -> Source:
    """Where the weights of a run, of an export or of a checkpoint's own folder lie. Raises CheckpointError."""
    if (run / "meta.json").is_file():
        if step is not None:
            raise ConfigError(f"--step {step}: {run} is one checkpoint; name the run instead")
        return Source(run.resolve().parent.parent, None, open_checkpoint(run))
    if not (run / "config.yaml").is_file():
        if step is not None:
            raise ConfigError(f"--step {step}: {run} is no run folder, so it has no steps to choose from")
        return Source(None, weights_folder(run), None)
    root, exported = run / "checkpoints", run / "export"
    exported_step = _exported_step(exported)
    if step is not None:
        folder = root / checkpoint_name(step)
        if not folder.is_dir():
            if step == exported_step:
                return Source(run, exported, None)
            steps = ", ".join(str(int(path.name.removeprefix("step-"))) for path in folders(root)) or "none"
            raise CheckpointError(f"--step {step}: {run} has no checkpoint of it; it has {steps}")
        return Source(run, None, open_checkpoint(folder))
    saved = newest_complete(root)
    if exported_step is not None and (saved is None or saved.step <= exported_step):
        return Source(run, exported, None)
    if saved is None:
        raise CheckpointError(
            f"{run}: has neither exported weights nor a complete checkpoint; a run writes one every checkpoint.every "
            "steps, and when it is stopped"
        )
    return Source(run, None, saved)


def weights_of(source: Source) -> tuple[dict[str, Tensor], WeightsInfo]:
    """The tensors by name and what stands beside them. Raises CheckpointError, ConfigError."""
    if source.saved is None:
        return read(source.exported)
    cfg, meta = _config(source.run), source.saved.meta
    origin = {"run": cfg.run.name, "step": source.saved.step, "index_digest": _index_digest(source.run)}
    if "corpus" in meta:
        origin["corpus"] = meta["corpus"]
    try:
        features = cfg.features.model_copy(update={"mean": float(meta["mean"]), "std": float(meta["std"])})
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{source.saved.folder}: its meta.json has no mean and std; use another one") from None
    # How they were trained is no property of the weights.
    model = cfg.model.model_copy(update={"backend": "auto", "activation_checkpointing": False})
    return read_masters(source.saved), WeightsInfo(model, features, cfg.data.crop_frames, origin)


def _own_export(run: Path, info: WeightsInfo) -> Path:
    """RUN/export, unless it holds weights of a later step. Raises ConfigError."""
    folder = run / "export" if (run / "config.yaml").is_file() else run.resolve().parent.parent / "export"
    there, step = _exported_step(folder), info.origin.get("step")
    if there is not None and isinstance(step, int) and there > step:
        raise ConfigError(f"{folder} holds the weights of step {there}: give --out a folder for those of step {step}")
    return folder


def _exported_step(folder: Path) -> int | None:
    """The step of exported weights; None where there are none. Raises CheckpointError for damaged ones."""
    if not (folder / WEIGHTS_FILE).is_file():
        return None
    step = read(folder)[1].origin.get("step")
    return step if isinstance(step, int) else 0


def _config(run: Path) -> Config:
    if not (run / "config.yaml").is_file():
        raise CheckpointError(f"{run / 'config.yaml'}: no such file; a checkpoint needs the run's settings beside it")
    return load_config(run / "config.yaml")


def _index_digest(run: Path) -> Any:
    try:
        return json.loads((run / "plan.json").read_text(encoding="utf-8")).get("index_digest")
    except (OSError, ValueError, AttributeError):
        return None


def _write_card(folder: Path, state: dict[str, Tensor], info: WeightsInfo, run: Path | None) -> None:
    """README.md with what the run, where there is one, tells of its training."""
    cfg, records = None, []
    if run is not None:
        cfg = _config(run)
        try:
            records = read_metrics(run / "metrics.jsonl")
        except DataError:
            records = []  # a run without figures, or with damaged ones, is no reason to keep its weights back
    text = model_card(state, info, digest(folder / WEIGHTS_FILE), cfg, records)
    _writing(folder / CARD_FILE, lambda: write_atomically(folder / CARD_FILE, text))


def _writing(path: Path, action: Callable[[], None]) -> None:
    """Write a file, its folder made first. Raises CheckpointError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        action()
    except OSError as error:
        raise CheckpointError(f"{path}: can't be written ({error.strerror}); check space and permissions") from None


def _statistics(
    content: PublishedFile, given: tuple[float | None, float | None], label: str
) -> tuple[tuple[float, float], str]:
    """Mean and deviation, and where they are from."""
    if given[0] is not None and given[1] is not None:
        return (given[0], given[1]), "as given"
    if found := statistics_of(content.state, label):
        return found, "the file's norm_stats"
    return AUDIOSET, (
        "assumed, as the file has none: AudioSet's, for weights that were trained on it; --mean and --std for others"
    )


def _names(kind: str, names: Sequence[str], meaning: str = "") -> list[str]:
    """Every name, in lines of a terminal's width."""
    if not names:
        return []
    lead = f"  {kind:<12} {len(names)}" + (f" ({meaning}): " if meaning else ": ")
    return textwrap.wrap(
        lead + ", ".join(names), 110, subsequent_indent=" " * 15, break_long_words=False, break_on_hyphens=False
    )


def _step(info: WeightsInfo) -> str:
    return f", step {info.origin['step']}" if "step" in info.origin else ""
