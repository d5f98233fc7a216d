"""Checkpoints as they lie on the disk: which there are, which are whole, and the weights in them.

    checkpoints/step-00000100/
        state-00000-of-00002.safetensors ...  per parameter: fp32 master, exp_avg, exp_avg_sq
        meta.json                             step, cursor, loss scale, counters, sizes and digests of the files
        complete                              digest of meta.json, written last

In: a run's folder of checkpoints. Out: `Saved`, and tensors by name, whatever ZeRO stage, offload and world size they
were trained at. No DeepSpeed, no process group, no pickle: `engine.checkpoint` writes them and reads them back into an
engine. Fails with CheckpointError; with `Torn`, one of its kind, where an older checkpoint serves.
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
from msm_dist.files import sync

FORMAT = 1
COMPLETE = "complete"
PARTIAL = ".partial"
DAMAGED = ".damaged"
MAX_META_BYTES = 64 * 2**20
MASTER = "param"
PARTS = (MASTER, "exp_avg", "exp_avg_sq")
"""What the tensors of a parameter are called in the files: part/name."""

log = logging.getLogger(__name__)


class Torn(CheckpointError):
    """A checkpoint that is not whole, or whose bytes are not those that were saved.

    One that can't be read is not of this kind: it may be whole, and read on another machine, or later.
    """


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint on disk."""

    folder: Path
    meta: dict[str, Any]
    verified: bool = False
    """Whether the files' bytes have been compared with their digests."""

    @property
    def step(self) -> int:
        """Updates done when it was saved."""
        return self.meta["step"]


def checkpoint_name(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def newest_complete(root: Path) -> Saved | None:
    """The newest checkpoint that is whole by its sizes; torn ones are named in a warning. Raises CheckpointError."""
    for folder in reversed(folders(root)):
        try:
            return open_checkpoint(folder)
        except Torn as error:
            log.warning("skipped %s", error)
    return None


def open_checkpoint(folder: Path) -> Saved:
    """Read and check a checkpoint's meta.json, and the sizes of its files.

    Raises Torn, and CheckpointError when it can't be read, is of another format or of another step than its name says.
    """
    text = _read_small(folder / "meta.json")
    marker = _read_small(folder / COMPLETE)
    if marker.strip() != hashlib.sha256(text).hexdigest().encode():
        raise Torn(f"{folder}: meta.json is not the one that was completed; use an older checkpoint")
    try:
        meta = json.loads(text)
        if meta["format"] != FORMAT:
            raise CheckpointError(
                f"{folder}: format {meta['format']}, this version reads {FORMAT}; use the version that wrote it"
            )
        name = checkpoint_name(meta["step"])
        if re.fullmatch(r"step-\d{8}", folder.name) and name != folder.name:
            raise CheckpointError(
                f"{folder}: is the checkpoint of step {meta['step']}; call it {name}, or move it away"
            )
        for name, entry in meta["files"].items():
            _check_file(folder, name, entry["bytes"], entry["sha256"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Torn(f"{folder}: incomplete ({type(error).__name__}: {error}); use an older checkpoint") from None
    return Saved(folder, meta)


def is_complete(folder: Path) -> bool:
    """Whether a folder holds a checkpoint that is whole by its sizes."""
    try:
        open_checkpoint(folder)
    except CheckpointError:
        return False
    return True


def folders(root: Path) -> list[Path]:
    """The checkpoints of a run, whole or torn, by step. Raises CheckpointError."""
    try:
        return sorted(folder for folder in root.iterdir() if re.fullmatch(r"step-\d{8}", folder.name))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{root}: can't be read ({error.strerror}); mend that and start again") from None


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
    """Compare a file with the digest that was noted when it was written. Raises Torn, CheckpointError."""
    try:
        found = digest(path)
    except FileNotFoundError:
        raise Torn(f"{path}: is no longer there; remove its folder to use the one before") from None
    except OSError as error:
        raise _unreadable(path, error) from None
    if found != entry["sha256"]:
        raise Torn(f"{path}: its bytes are not those that were saved; remove its folder to use the one before")


def wrong_files(saved: Saved, rank: int = 0, world_size: int = 1) -> list[str]:
    """Those of this rank's share of the files that are not as they were saved. Raises CheckpointError."""
    wrong = []
    for name in list(saved.meta["files"])[rank::world_size]:
        try:
            verify_file(saved.folder / name, saved.meta["files"][name])
        except Torn:
            wrong.append(name)
    return wrong


def put_aside(folder: Path) -> Path:
    """Give a damaged checkpoint a name under which it never counts again; where it is now. Raises CheckpointError."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}{DAMAGED}{'' if number == 1 else f'-{number}'}")).exists():
        number += 1
    try:
        folder.rename(aside)
        sync(aside.parent)
    except OSError as error:
        raise CheckpointError(
            f"{folder}: is damaged and can't be renamed to {aside.name} ({error.strerror}); give write access, or move "
            "it away"
        ) from None
    return aside


def digest(path: Path) -> str:
    """sha256 of a file's bytes. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_small(path: Path) -> bytes:
    """A file of at most MAX_META_BYTES. Raises Torn, CheckpointError."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_META_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise Torn(f"{path.parent}: incomplete ({path.name}: {error.strerror}); use an older checkpoint") from None
    except OSError as error:
        raise _unreadable(path, error) from None
    if len(content) > MAX_META_BYTES:
        raise Torn(f"{path}: more than {MAX_META_BYTES} bytes, which none of ours has; use an older checkpoint")
    return content


def _check_file(folder: Path, name: str, size: int, sha256: str) -> None:
    """Raise Torn for a file of another size, or that is none of a checkpoint's; CheckpointError: it can't be seen."""
    if not re.fullmatch(r"state-\d{5,}-of-\d{5,}\.safetensors", name) or not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise Torn(f"{folder}: meta.json lists {name!r}, which is no file of a checkpoint; use an older checkpoint")
    try:
        found = (folder / name).stat().st_size
    except FileNotFoundError:
        raise Torn(f"{folder / name}: is no longer there; use an older checkpoint") from None
    except OSError as error:
        raise _unreadable(folder / name, error) from None
    if found != size:
        raise Torn(f"{folder / name}: {found} bytes, {size} were written; use an older checkpoint")


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    """An I/O error is no proof of damage: on a machine with a broken mount every good checkpoint looks like that."""
    return CheckpointError(
        f"{path}: can't be read ({error.strerror}); mend that (access, mount, disk) and start again, or move "
        f"{path.parent} away to go on from the one before"
    )
