"""The exported weights of a run as `msm-dist doctor` sees them: readable, and those of the last checkpoint.

In: a run folder and the checkpoint that the next start takes. Out: findings. With `quick` no tensor is
compared.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file

from msm_dist.doctor.checkpoints import Seen
from msm_dist.doctor.files import check_folder, is_there, names_in, plain_size, read_record
from msm_dist.doctor.findings import Finding, word
from msm_dist.engine.stored import MASTER, Saved
from msm_dist.errors import CheckpointError, DataError
from msm_dist.evaluate.classifier import HEAD_CONFIG_FILE, HEAD_FILE
from msm_dist.model.weights import CLASSIFIER_FOLDER, read


def export_findings(folder: Path, start: Seen | None, total_steps: int | None, quick: bool) -> Iterator[Finding]:
    """What is to say of RUN/export; nothing where the run has not come so far."""
    export = folder / "export"
    is_due = start is not None and start.step == total_steps
    remedy = f"start the run again: it exports the weights of its last step; rm -r {word(export)} first"
    if not is_there(export):
        if is_due:
            yield Finding("export", "fail", "all steps are done, but no weights are exported", remedy.partition(";")[0])
        return
    try:
        check_folder(export)
        place = export / CLASSIFIER_FOLDER if CLASSIFIER_FOLDER in names_in(export) else export
        for name in ("config.json", "model.safetensors"):
            plain_size(place / name)
        # By its file, as the search in the folder above it would follow a link.
        state, info = read(place / "model.safetensors", any_positions=True)
        if HEAD_FILE in names_in(place):
            state |= _head(place)
    except (DataError, CheckpointError) as error:
        yield Finding("export", "fail" if is_due else "warn", str(error), remedy)
        return
    told = f"{len(state)} tensors, {sum(value.numel() for value in state.values()):,} numbers"
    step = info.origin.get("step")
    if not is_due or start is None or start.saved is None or step != start.step:
        status = "fail" if is_due else "warn"
        detail = f"{told}, of step {step}; the run is at step {start.step if start else 0}"
        yield Finding("export", status, detail, remedy if is_due else "nothing: a run that finishes replaces it")
    elif quick:
        yield Finding("export", "ok", f"{told}, of step {step}")
    elif differing := _differing(state, start.saved, _untrained(info.origin)):
        detail = f"{told}, but {differing} is not as in {start.folder.name}"
        yield Finding("export", "fail", detail, remedy)
    else:
        yield Finding("export", "ok", f"{told}, each as in {start.folder.name}")


def _head(place: Path) -> dict[str, torch.Tensor]:
    """The head of a classifier, by the names that it has in checkpoints. Raises DataError, CheckpointError."""
    read_record(place / HEAD_CONFIG_FILE)
    plain_size(place / HEAD_FILE)
    try:
        return {f"head.{name}": value for name, value in load_file(place / HEAD_FILE).items()}
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{place / HEAD_FILE}: not a readable head ({error})") from None


def _untrained(origin: dict[str, Any]) -> tuple[str, ...]:
    """Beginnings of the names of tensors that are beside the trained ones, and in no checkpoint."""
    parts = origin.get("untrained")
    return tuple(f"{part}." for part in parts if isinstance(part, str)) if isinstance(parts, list) else ()


def _differing(state: dict[str, torch.Tensor], saved: Saved, untrained: tuple[str, ...]) -> str | None:
    """The first exported tensor that is not the checkpoint's fp32 master of that name."""
    found = set()
    for name in saved.meta["files"]:
        with safetensors.safe_open(saved.folder / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - no dictionary
                part, _, parameter = key.partition("/")
                if part != MASTER:
                    continue
                found.add(parameter)
                if parameter not in state or not torch.equal(state[parameter], file.get_tensor(key)):
                    return parameter
    return min((name for name in state if name not in found and not name.startswith(untrained)), default=None)
