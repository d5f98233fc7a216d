"""Checkpoints: our own format, the same at any ZeRO stage and world size; no pickle, nothing to convert.

    checkpoints/step-00000100/
        state-00000-of-00002.safetensors ...  per parameter: fp32 master, exp_avg, exp_avg_sq
        meta.json                             step, cursor, loss scale, counters, sizes and digests of the files
        complete                              digest of meta.json, written last

A checkpoint is written under another name, flushed to the disk, marked complete, and only then renamed; which one a
start takes is in engine/resume.py. A failure to write raises CheckpointError on all ranks and leaves the others as they
were.
Saving is two collectives, which may run on two threads: `copy_state` to host memory, then `write`; a run's are
ordered by `engine.saving`.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepspeed
import safetensors
import safetensors.torch
import torch

from msm_dist.engine import state
from msm_dist.engine.meta import FORMAT
from msm_dist.engine.stored import (
    COMPLETE,
    PARTIAL,
    Saved,
    Torn,
    checkpoint_name,
    digest,
    folders,
    is_complete,
    newest_complete,
    open_checkpoint,
    verify_file,
)
from msm_dist.engine.world import World
from msm_dist.errors import CheckpointError
from msm_dist.files import sync, write_durably

__all__ = [
    "Saved",
    "checkpoint_name",
    "copy_state",
    "is_complete",
    "load",
    "newest_complete",
    "open_checkpoint",
    "rotate",
    "save",
    "write",
]

log = logging.getLogger(__name__)


def save(engine: deepspeed.DeepSpeedEngine, root: Path, step: int, extra: dict[str, Any], world: World) -> Path:
    """Write the engine's state after `step` updates, now; a collective. Raises CheckpointError on all ranks.

    `extra` (plain JSON values) comes back in `Saved.meta`.
    """
    folder = root / checkpoint_name(step)
    if not world.agree_any(world.is_main and is_complete(folder)):
        tensors: dict[str, torch.Tensor] = {}
        counters = copy_state(engine, tensors, world)
        write(folder, tensors, {"step": step} | counters | extra, world)
    return folder


def copy_state(engine: deepspeed.DeepSpeedEngine, into: dict[str, torch.Tensor], world: World) -> dict[str, Any]:
    """Copy the tensors this rank writes into host memory and give the counters beside them; a collective.

    `into` is filled by name, in memory that is allocated (page-locked beside a GPU) where it lacks one.
    """
    on_gpu = world.device.type == "cuda"
    owners = _owners(state.shapes(engine), world.size)
    for name, parts in state.full_state(engine):
        if owners[name] != world.rank:
            continue
        for part, value in parts.items():
            key = f"{part}/{name}"
            if key not in into:
                into[key] = torch.empty(value.shape, pin_memory=on_gpu)
            # A copy even of what is on the host already: training goes on.
            into[key].copy_(value, non_blocking=True)
    if on_gpu:
        torch.cuda.current_stream(world.device).synchronize()
    return {"optimizer_step": state.optimizer_step(engine), "loss_scale": state.loss_scale(engine)}


def write(folder: Path, tensors: dict[str, torch.Tensor], meta: dict[str, Any], world: World) -> None:
    """Write a checkpoint of every rank's `tensors` and of `meta`; a collective. Raises CheckpointError on all ranks."""
    partial = folder.with_name(folder.name + PARTIAL)
    name = f"state-{world.rank:05d}-of-{world.size:05d}.safetensors"
    try:
        world.on_main(lambda: _start_folder(partial))
        entry = world.together(lambda: _write_state(partial / name, tensors), CheckpointError)
        files = dict(world.gather((name, entry)))
        world.on_main(lambda: _complete(partial, folder, {"format": FORMAT, "files": files} | meta))
    except CheckpointError:
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def load(engine: deepspeed.DeepSpeedEngine, saved: Saved, world: World) -> None:
    """Set the engine's weights, moments and step to a checkpoint's; a collective. Raises CheckpointError."""

    def verify() -> None:
        for name in list(saved.meta["files"])[world.rank :: world.size]:
            verify_file(saved.folder / name, saved.meta["files"][name])

    if not saved.verified:
        world.together(verify, CheckpointError)
    # No collective in here: a rank that can't read must not leave the others waiting in one.
    world.together(lambda: _load_state(engine, saved), CheckpointError)
    state.refresh_weights(engine)


def rotate(root: Path, keep: int, keep_every: int) -> None:
    """Delete all but the newest `keep` whole checkpoints and those whose step is a multiple of `keep_every`.

    Torn checkpoints and unfinished ones of earlier starts go too; what can't be read, and a folder of another name,
    stay. Raises CheckpointError.
    """
    for folder in root.glob(f"step-*{PARTIAL}"):
        shutil.rmtree(folder, ignore_errors=True)
    whole, torn = [], []
    for folder in folders(root):
        try:
            whole.append(open_checkpoint(folder).folder)
        except Torn:
            torn.append(folder)
        except CheckpointError as error:
            log.warning("not deleted: %s", error)
    for folder in whole + torn:
        step = int(folder.name.removeprefix("step-"))
        if folder not in whole[-keep:] and not (folder in whole and keep_every and step % keep_every == 0):
            try:
                # Without its marker a half-deleted checkpoint can't be taken for a whole one.
                (folder / COMPLETE).unlink(missing_ok=True)
            except OSError as error:
                raise CheckpointError(f"{folder}: can't be deleted ({error.strerror}); give write access") from None
            shutil.rmtree(folder, ignore_errors=True)


def _owners(shapes: Mapping[str, torch.Size], size: int) -> dict[str, int]:
    """Which rank writes which parameter: the largest first, each to the rank with the least so far."""
    load = [0] * size
    owners = {}
    for name, shape in sorted(shapes.items(), key=lambda item: (-item[1].numel(), item[0])):
        owners[name] = load.index(min(load))
        load[owners[name]] += shape.numel()
    return owners


def _load_state(engine: deepspeed.DeepSpeedEngine, saved: Saved) -> None:
    where: dict[str, Any] = {}
    try:
        for name in saved.meta["files"]:
            file = safetensors.safe_open(saved.folder / name, framework="pt")
            where |= dict.fromkeys(file.keys(), file)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{saved.folder}: can't be read ({error})") from None
    shapes = state.shapes(engine)
    expected = {f"{part}/{name}" for part in state.PARTS for name in shapes}
    if different := sorted(expected ^ set(where)):
        raise CheckpointError(f"{saved.folder}: {different[0]} is in only one of checkpoint and model")

    def read(part: str, name: str) -> torch.Tensor:
        try:
            return where[f"{part}/{name}"].get_tensor(f"{part}/{name}")
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"{saved.folder}: {part} of {name} can't be read ({error})") from None

    for key, file in where.items():
        part, _, name = key.partition("/")
        found = file.get_slice(key).get_shape()
        if found != list(shapes[name]):
            raise CheckpointError(f"{saved.folder}: {part} of {name} is {found}, the model's is {list(shapes[name])}")
    state.set_state(engine, read, saved.meta["optimizer_step"], saved.meta["loss_scale"])


def _start_folder(partial: Path) -> None:
    """An empty folder to write into."""
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise _cannot_write(partial, error) from None


def _write_state(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    try:
        # Not `save`: it would hold Python's lock, and training with it, for seconds.
        safetensors.torch.save_file(tensors, path)
        # safetensors lets nobody else read its files; the folder's mode says who may.
        path.chmod(path.parent.stat().st_mode & 0o666)
        sync(path)
        return {"bytes": path.stat().st_size, "sha256": digest(path)}
    except (OSError, safetensors.SafetensorError) as error:
        raise _cannot_write(path, error) from None


def _complete(partial: Path, folder: Path, meta: dict[str, Any]) -> None:
    """Mark a written checkpoint complete and give it its name."""
    text = json.dumps(meta, indent=1).encode()
    _write_durably(partial / "meta.json", text)
    _write_durably(partial / COMPLETE, hashlib.sha256(text).hexdigest().encode())
    try:
        sync(partial)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
        sync(folder.parent)
    except OSError as error:
        raise _cannot_write(folder, error) from None


def _write_durably(path: Path, data: bytes) -> None:
    try:
        write_durably(path, data)
    except OSError as error:
        raise _cannot_write(path, error) from None


def _cannot_write(path: Path, error: OSError | safetensors.SafetensorError) -> CheckpointError:
    reason = getattr(error, "strerror", None) or error
    return CheckpointError(
        f"{path}: can't be written ({reason}); the checkpoints before it are untouched. Make room or give write "
        "access, then start the same command again"
    )
