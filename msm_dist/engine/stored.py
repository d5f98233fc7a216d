"""Checkpoints as they lie on the disk: which there are, which are whole, and the weights in them.

    checkpoints/step-00000100/
        state-00000-of-00002.safetensors ...  per parameter: fp32 master, exp_avg, exp_avg_sq
        meta.json                             step, cursor, loss scale, counters, sizes and digests of the files
        complete                              digest of meta.json, written last

In: a run's folder of checkpoints. Out: `Saved`, and tensors by name, whatever ZeRO stage, offload and world size they
were trained at. No DeepSpeed, no process group, no pickle: `engine.checkpoint` writes them and reads them back into an
engine. Fails with CheckpointError; with `Torn`, one of its kind, where an older checkpoint serves. What meta.json must
hold is in `engine.meta`.
"""

import hashlib
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from msm_dist.engine.meta import Meta, read_meta
from msm_dist.errors import CheckpointError
from msm_dist.files import sync
from msm_dist.plain import MAX_JSON

COMPLETE = "complete"
PARTIAL = ".partial"
DAMAGED = ".damaged"
MAX_META_BYTES = MAX_JSON
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

    @property
    def skipped_updates(self) -> tuple[int, ...]:
        """Steps whose updates were left out; of a `RunMeta`."""
        return tuple(self.meta.get("skipped_updates", ()))

    @property
    def bad_samples(self) -> int:
        """Samples filled, on all ranks, for clips that could not be decoded; of a `PretrainingMeta`."""
        return self.meta["bad_samples"]

    @property
    def missing_samples(self) -> int:
        """Samples filled, on all ranks, for clips of missing shards; of a `PretrainingMeta`."""
        return self.meta.get("missing_samples", 0)


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


def open_checkpoint(folder: Path, kind: type[Meta] = Meta) -> Saved:
    """Read and check a checkpoint's meta.json, which must be of that kind, and the sizes of its files.

    Raises Torn where something is not as it was saved. Raises CheckpointError when it can't be read, and where a
    meta.json with a true digest is of another format, not of that kind, or of another step than the folder's name says.
    """
    path = folder / "meta.json"
    text = _read_small(path)
    marker = _read_small(folder / COMPLETE)
    if marker.strip() != hashlib.sha256(text).hexdigest().encode():
        raise Torn(f"{folder}: meta.json is not the one that was completed; use an older checkpoint")
    meta = read_meta(text, path, kind)
    name = checkpoint_name(meta["step"])
    if re.fullmatch(r"step-\d{8}", folder.name) and name != folder.name:
        raise CheckpointError(f"{folder}: is the checkpoint of step {meta['step']}; call it {name}, or move it away")
    for name, entry in meta["files"].items():
        _check_size(folder / name, entry["bytes"])
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


def _check_size(path: Path, size: int) -> None:
    """Raise Torn for a file of another size, CheckpointError for one that can't be seen."""
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise Torn(f"{path}: is no longer there; use an older checkpoint") from None
    except OSError as error:
        raise _unreadable(path, error) from None
    if found != size:
        raise Torn(f"{path}: {found} bytes, {size} were written; use an older checkpoint")


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    """An I/O error is no proof of damage: on a machine with a broken mount every good checkpoint looks like that."""
    return CheckpointError(
        f"{path}: can't be read ({error.strerror}); mend that (access, mount, disk) and start again, or move "
        f"{path.parent} away to go on from the one before"
    )
