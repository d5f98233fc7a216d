"""Checkpoints as they lie on the disk: which there are, which are whole, and the weights in them.

    checkpoints/step-00000100/
        state-00000-of-00002.safetensors ...  per parameter: fp32 master, exp_avg, exp_avg_sq
        meta.json                             step, cursor, loss scale, counters, sizes and digests of the files
        complete                              digest of meta.json, written last

In: a run's folder of checkpoints. Out: `Saved`, and tensors by name, whatever ZeRO stage, offload and world size they
were trained at. No DeepSpeed, no process group, no pickle: `engine.checkpoint` writes them and reads them back into an
engine. Fails with CheckpointError.
"""

import hashlib
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from msm_dist.errors import CheckpointError

FORMAT = 1
COMPLETE = "complete"
MASTER = "param"
PARTS = (MASTER, "exp_avg", "exp_avg_sq")
"""What the tensors of a parameter are called in the files: part/name."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint on disk."""

    folder: Path
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        """Updates done when it was saved."""
        return self.meta["step"]


def checkpoint_name(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def newest_complete(root: Path) -> Saved | None:
    """The newest checkpoint that is whole; torn ones are named in a warning and skipped."""
    for folder in reversed(folders(root)):
        try:
            return open_checkpoint(folder)
        except CheckpointError as error:
            log.warning("skipped %s", error)
    return None


def open_checkpoint(folder: Path) -> Saved:
    """Read and check a checkpoint's meta.json. Raises CheckpointError when it is torn or of another format."""
    try:
        text = (folder / "meta.json").read_bytes()
        marker = (folder / COMPLETE).read_text(encoding="utf-8").strip()
        if marker != hashlib.sha256(text).hexdigest():
            raise CheckpointError(f"{folder}: meta.json is not the one that was completed; use an older checkpoint")
        meta = json.loads(text)
        if meta["format"] != FORMAT:
            raise CheckpointError(f"{folder}: format {meta['format']}, this version reads {FORMAT}")
        for name, entry in meta["files"].items():
            size = (folder / name).stat().st_size
            if size != entry["bytes"]:
                raise CheckpointError(f"{folder / name}: {size} bytes, {entry['bytes']} were written")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: incomplete ({error!r}); use an older checkpoint") from None
    return Saved(folder, meta)


def is_complete(folder: Path) -> bool:
    """Whether a folder holds a whole checkpoint."""
    try:
        open_checkpoint(folder)
    except CheckpointError:
        return False
    return True


def folders(root: Path) -> list[Path]:
    """The checkpoints of a run, whole or torn, by step."""
    return sorted(folder for folder in root.glob("step-*") if re.fullmatch(r"step-\d{8}", folder.name))


def read_masters(saved: Saved) -> dict[str, Tensor]:
    """The fp32 master of every parameter, by name, once the files' bytes are those that were saved.

    Raises CheckpointError.
    """
    masters: dict[str, Tensor] = {}
    for name, entry in saved.meta["files"].items():
        path = saved.folder / name
        verify_file(path, entry)
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                keys = [key for key in file.keys() if key.startswith(f"{MASTER}/")]  # noqa: SIM118 - no dictionary
                masters |= {key.removeprefix(f"{MASTER}/"): file.get_tensor(key) for key in keys}
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"{path}: can't be read ({error}); use another checkpoint") from None
    if not masters:
        raise CheckpointError(f"{saved.folder}: holds no weights; use another checkpoint")
    return masters


def verify_file(path: Path, entry: dict[str, Any]) -> None:
    """Compare a file with the digest that was noted when it was written. Raises CheckpointError."""
    try:
        found = digest(path)
    except OSError as error:
        raise CheckpointError(
            f"{path}: can't be read ({error.strerror}); remove its folder to use the one before"
        ) from None
    if found != entry["sha256"]:
        raise CheckpointError(
            f"{path}: its bytes are not those that were saved; remove its folder to use the one before"
        )


def digest(path: Path) -> str:
    """sha256 of a file's bytes. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
