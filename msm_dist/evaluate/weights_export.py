"""`msm-dist weights export`: weights of runs to folders that `Encoder.load` reads, and to the published layout.

In: a run folder, one of its checkpoints, or a folder with exported weights. Out: a folder with model.safetensors,
config.json and README.md, of a fine-tuned run the files of its head too, each there whole or not at all; a .pth; and a
report. No DeepSpeed: a checkpoint holds the whole fp32 masters by name, whatever ZeRO stage and offload trained them.
Fails with CheckpointError and ConfigError.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from msm_dist.config import Config, is_finetuning, load_config
from msm_dist.engine.stored import (
    Saved,
    checkpoint_name,
    digest,
    folders,
    newest_complete,
    open_checkpoint,
    read_masters,
)
from msm_dist.errors import CheckpointError, ConfigError
from msm_dist.evaluate.classifier import HEAD_CONFIG_FILE, HEAD_FILE
from msm_dist.evaluate.model_card import parameter_counts
from msm_dist.evaluate.weights_card import write_card
from msm_dist.files import write_atomically
from msm_dist.model.origin import is_published, is_trained, of_run
from msm_dist.model.published import write_file
from msm_dist.model.tensors import some
from msm_dist.model.weights import (
    CLASSIFIER_FOLDER,
    INTERPOLATED,
    WEIGHTS_FILE,
    WeightsInfo,
    model_of,
    read,
    save,
    weights_folder,
)

UNTRAINED_NOTE = (
    "the decoder is left out: it was not trained with this encoder. A strict reader misses its tensors; "
    "msm-dist weights import takes the file with --encoder-only"
)
PLACES_NOTE = (
    "without a CLS token the published decoder drops the first visible token and shifts the others; these weights "
    "learnt from every token at its place, so the published code reconstructs wrongly with them. The encoder is the "
    "same in both"
)


@dataclass(frozen=True)
class Source:
    """Where weights are taken from: exported ones, or a checkpoint of a run."""

    run: Path | None
    exported: Path | None
    saved: Saved | None


def export(
    run: Path,
    step: int | None = None,
    out: Path | None = None,
    published: Path | None = None,
    overwrite: bool = False,
) -> str:
    """Write a run's weights to a folder, and what was done as text.

    Of a run's export and its checkpoints the latest is taken, or that of `step`. `out` is RUN/export unless given.
    `published` is a file to write them to in the published layout; without `out` nothing else is written then. What is
    there is replaced where `overwrite` says so, and in RUN/export. Raises CheckpointError, ConfigError.
    """
    source = find(run, step)
    for path in (out, published):
        if path is not None and not _is_same(path, source.exported):
            refuse_taken(path, overwrite)
    state, info = weights_of(source)
    lines = []
    if out is not None or published is None:
        lines += _write_folder(out or source.exported or _own_export(run, info), source, state, info)
    if published is not None:
        lines += _write_published(published, source, state, info)
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
        is_classifier = (run / HEAD_CONFIG_FILE).is_file()
        return Source(None, run if is_classifier else weights_folder(run), None)
    if is_finetuning(run / "config.yaml"):
        return _finetuned(run, step)
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
        return read(source.exported, any_positions=True)
    cfg, meta = _config(source.run), source.saved.meta
    origin = of_run(source.run, cfg.run.name, source.saved.step, _index_digest(source.run), meta.get("corpus"))
    try:
        features = cfg.features.model_copy(update={"mean": float(meta["mean"]), "std": float(meta["std"])})
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{source.saved.folder}: its meta.json has no mean and std; use another one") from None
    # How they were trained is no property of the weights.
    model = cfg.model.model_copy(update={"backend": "auto", "activation_checkpointing": False})
    return read_masters(source.saved), WeightsInfo(model, features, cfg.data.crop_frames, origin)


def refuse_taken(path: Path, overwrite: bool) -> None:
    """Raise ConfigError for a file that is there, or a folder with anything in it, unless it may be replaced."""
    if overwrite:
        return
    if path.is_dir() and (names := sorted(entry.name for entry in path.iterdir())):
        raise ConfigError(
            f"{path}: holds {some(names)}; name a new folder, or give --overwrite to replace weights that are in it"
        )
    if path.is_file():
        raise ConfigError(f"{path}: is there; name another file, or give --overwrite to replace it")


def _write_folder(folder: Path, source: Source, state: dict[str, Tensor], info: WeightsInfo) -> list[str]:
    """Weights, head and card; the lines of the report."""
    if not _is_same(folder, source.exported):
        _write_head(folder, source.exported)
        save(folder, state, info)
    taken = source.saved.folder if source.saved else source.exported
    return [
        f"{folder}: {len(state)} tensors from {taken}" + _step(info),
        *([f"  head         {folder / HEAD_FILE}"] if (folder / HEAD_FILE).is_file() else []),
        f"  parameters   {parameter_counts(state)}",
        f"  sha256       {digest(folder / WEIGHTS_FILE)}",
        f"  model card   {write_card(folder, state, info, source.run)}",
    ]


def _write_head(folder: Path, exported: Path | None) -> None:
    """The head that stands beside exported weights, if any. Raises CheckpointError, ConfigError."""
    if exported is None or not (exported / HEAD_CONFIG_FILE).is_file():
        if (folder / HEAD_CONFIG_FILE).is_file():
            raise ConfigError(f"{folder}: holds the head of a classifier, of other weights; name another folder")
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (HEAD_FILE, HEAD_CONFIG_FILE):
            write_atomically(folder / name, (exported / name).read_bytes())
    except OSError as error:
        raise CheckpointError(f"{folder}: can't write the head ({error}); check space and permissions") from None


def _write_published(path: Path, source: Source, state: dict[str, Tensor], info: WeightsInfo) -> list[str]:
    """The file in the published layout; the lines of the report. Raises CheckpointError."""
    place = str(source.saved.folder if source.saved else source.exported)
    if info.origin.get("positions") == "interpolated":
        raise CheckpointError(f"{place}: {INTERPOLATED}")
    model, has_decoder = model_of(state, info, place), is_trained(info.origin, "decoder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(model, info.features.mean, info.features.std, path, info.origin, encoder_only=not has_decoder)
    except OSError as error:
        raise CheckpointError(f"{path}: can't be written ({error.strerror}); check space and permissions") from None
    notes = [] if has_decoder else [UNTRAINED_NOTE]
    if has_decoder and not info.model.cls_token and not is_published(info.origin):
        notes.append(PLACES_NOTE)
    return [
        f"{path}: {place}{_step(info)}, in the layout of the published checkpoints",
        *(f"  note         {note}" for note in notes),
    ]


def _finetuned(run: Path, step: int | None) -> Source:
    """The export of a fine-tuned run: nothing else has its labels. Raises CheckpointError."""
    places = (run / "export", run / "export" / CLASSIFIER_FOLDER)
    exported = next((folder for folder in places if (folder / WEIGHTS_FILE).is_file()), None)
    if exported is None:
        raise CheckpointError(
            f"{run}: a fine-tuned run without its export, which it writes when it finishes; start it again to finish it"
        )
    if step is not None and step != (there := _exported_step(exported)):
        raise CheckpointError(f"--step {step}: of a fine-tuned run there is the export alone, of step {there}")
    return Source(run, exported, None)


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
    step = read(folder, any_positions=True)[1].origin.get("step")
    return step if isinstance(step, int) else 0


def _config(run: Path) -> Config:
    path = run / "config.yaml"
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; a checkpoint needs the run's settings beside it")
    if is_finetuning(path):
        raise CheckpointError(f"{run}: a fine-tuned run, whose checkpoints lack its labels; take its export")
    return load_config(path)


def _index_digest(run: Path) -> Any:
    try:
        return json.loads((run / "plan.json").read_text(encoding="utf-8")).get("index_digest")
    except (OSError, ValueError, AttributeError):
        return None


def _is_same(path: Path, exported: Path | None) -> bool:
    return exported is not None and path.resolve() == exported.resolve()


def _step(info: WeightsInfo) -> str:
    return f", step {info.origin['step']}" if "step" in info.origin else ""
