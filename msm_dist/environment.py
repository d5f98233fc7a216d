"""What a run runs on: machine, versions, processes. Recorded in the run folder, compared by `msm-dist compare`."""

import importlib.metadata
import os
import platform
import time
from typing import Any

import torch

from msm_dist.engine.world import World

PACKAGES = ("msm-dist", "torch", "torchaudio", "deepspeed", "triton", "webdataset", "numpy", "soundfile")


def environment(world: World) -> dict[str, Any]:
    """Plain JSON values: versions, device, world."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "job": os.environ.get("SLURM_JOB_ID"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in PACKAGES},
        "device": device_name(world.device),
        "cuda": torch.version.cuda,
        "world_size": world.size,
        "local_size": world.local_size,
        "threads": torch.get_num_threads(),
    }


def device_name(device: torch.device) -> str:
    """A device as its maker calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
