"""GPUs, their driver, NCCL, and the variables of the environment that steer them.

In: the machine, its environment, torch if it is installed. Out: findings. Needs the standard library only; asks
nvidia-smi and torch where they are there.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata, util
from pathlib import Path
from typing import Any

from msm_dist.doctor.findings import Finding

NETWORK_CARDS = Path("/sys/class/net")
OLDEST_DRIVERS = {11: (450, 80, 2), 12: (525, 60, 13), 13: (580, 65, 6)}
"""By CUDA's major version, NVIDIA's own table of the oldest Linux driver that runs all its minor ones."""
HURTING: Mapping[str, tuple[Callable[[str], bool], str]] = {
    "NCCL_P2P_DISABLE": (lambda value: value == "1", "GPUs exchange through the host's memory"),
    "NCCL_SHM_DISABLE": (lambda value: value == "1", "GPUs of one host exchange over the network"),
    "NCCL_IB_DISABLE": (lambda value: value == "1", "hosts exchange by TCP even where there is InfiniBand"),
    "NCCL_ALGO": (bool, "sums are rounded in another order than NCCL's own choice: not bit-equal to runs without"),
    "NCCL_PROTO": (bool, "pins NCCL's protocol; LL128 corrupts data where the hardware does not allow it"),
    "NCCL_DEBUG": (lambda value: value.upper() in ("INFO", "TRACE"), "fills the log"),
    "NCCL_LAUNCH_MODE": (bool, "changes how kernels of several GPUs are started"),
    "TORCH_NCCL_BLOCKING_WAIT": (lambda value: value == "1", "the host waits for every collective"),
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": (lambda value: value == "0", "a lost GPU hangs the run for ever"),
    "TORCH_DISTRIBUTED_DEBUG": (lambda value: value.upper() == "DETAIL", "checks every collective, slowly"),
    "CUDA_LAUNCH_BLOCKING": (lambda value: value == "1", "the host waits for every kernel"),
    "CUDA_VISIBLE_DEVICES": (lambda value: not value.strip() or value.strip() == "-1", "hides all GPUs"),
}
"""Variables, the values of them that hurt, and what those do."""
CARD_VARIABLES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


def check_gpu() -> Iterator[Finding]:
    """GPUs, their driver, and the library through which they talk."""
    if util.find_spec("torch") is None:
        return
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding("torch", "fail", f"can't be imported: {error}", "make setup")
        return
    driver = driver_version()
    if torch.cuda.is_available():
        count, name = torch.cuda.device_count(), torch.cuda.get_device_name()
        told = f", driver {driver}" if driver else ""
        yield Finding("gpu", "ok", f"{count} x {name}, CUDA {torch.version.cuda}{told}")
        yield from check_nccl(torch, count)
    elif driver:
        yield _unseen(torch.__version__, torch.version.cuda, driver)
    elif shutil.which("nvidia-smi"):
        detail = "nvidia-smi is here but finds no driver: a run would use the CPU"
        yield Finding("gpu", "warn", detail, "nvidia-smi says why; load the driver (modprobe nvidia), or reboot")
    else:
        yield Finding("gpu", "ok", "none: runs use the CPU")


def _unseen(torch_version: str, cuda: str | None, driver: str) -> Finding:
    """Why torch sees no GPU although a driver answers."""
    other_torch = "make setup TORCH_INDEX=<index with the torch for your driver>"
    detail = f"driver {driver} is here, but torch {torch_version} sees no GPU"
    if cuda is None:
        return Finding("gpu", "warn", f"{detail}: it is a build without CUDA", other_torch)
    oldest = OLDEST_DRIVERS.get(int(cuda.partition(".")[0]))
    if oldest and numbers(driver) < oldest:
        needed = f"CUDA {cuda} needs driver {'.'.join(map(str, oldest))} or newer"
        return Finding("gpu", "warn", f"{detail}: {needed}", f"a newer driver, or {other_torch}")
    remedy = "look at CUDA_VISIBLE_DEVICES, at nvidia-smi, and in a container at its --gpus"
    return Finding("gpu", "warn", detail, remedy)


def check_nccl(torch: Any, count: int) -> Iterator[Finding]:
    """Whether torch has NCCL, and the one it was built with."""
    if not torch.distributed.is_nccl_available():
        status = "fail" if count > 1 else "warn"
        remedy = "install a torch with NCCL: GPUs can't train together without"
        yield Finding("nccl", status, "this torch has none", remedy)
        return
    loaded, wanted = ".".join(map(str, torch.cuda.nccl.version())), wanted_nccl()
    if wanted is None:
        yield Finding("nccl", "ok", f"{loaded}; which one torch was built with can't be found out")
    elif numbers(wanted[1])[:3] == numbers(loaded)[:3]:
        yield Finding("nccl", "ok", loaded)
    else:
        name, version = wanted
        detail = f"{loaded} is loaded, torch was built with {version}"
        remedy = f"take other folders with libnccl.so.2 out of LD_LIBRARY_PATH and LD_PRELOAD, or pip install {name}=="
        yield Finding("nccl", "warn", detail, f"{remedy}{version}")


def wanted_nccl() -> tuple[str, str] | None:
    """The NCCL package that torch asks for, and its version; None where torch brings its own."""
    try:
        lines = metadata.requires("torch") or []
    except metadata.PackageNotFoundError:
        return None
    found = (re.match(r"(nvidia-nccl-cu\d+)\s*==\s*([\d.]+)", line) for line in lines)
    return next((match.groups() for match in found if match), None)


def driver_version() -> str | None:
    """The version of NVIDIA's driver as nvidia-smi tells it."""
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    version = (done.stdout.strip().splitlines() or [""])[0].strip()
    return version if done.returncode == 0 and re.fullmatch(r"[\d.]+", version) else None


def check_variables(environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Variables that are set to what often hurts; nothing is said where there is none."""
    for name, (hurts, effect) in HURTING.items():
        value = environment.get(name)
        if value is not None and hurts(value):
            yield Finding("variables", "warn", f"{name}={value}: {effect}", f"unset {name}, unless you want that")
    try:
        cards = {path.name for path in NETWORK_CARDS.iterdir()}
    except OSError:
        return
    for name in CARD_VARIABLES:
        value = environment.get(name, "")
        if value and (lacking := _lacking_cards(name, value, cards)):
            detail = f"{name}={value}: no network card here is called {', '.join(lacking)}: processes can't connect"
            yield Finding("variables", "fail", detail, f"export {name}=<one of {', '.join(sorted(cards))}>")


def _lacking_cards(name: str, value: str, cards: set[str]) -> list[str]:
    """The named cards that are not here. NCCL takes a card's beginning, =exact, or ^not; gloo whole names."""
    if name.startswith("NCCL") and value.startswith("^"):
        return []
    exact = not name.startswith("NCCL") or value.startswith("=")
    wanted = [card for card in value.removeprefix("=").split(",") if card]
    # Of NCCL's list one that is here is enough.
    here = [card for card in wanted if any(c == card if exact else c.startswith(card) for c in cards)]
    lacking = [card for card in wanted if card not in here]
    return [] if here and name.startswith("NCCL") else lacking


def numbers(version: str) -> tuple[int, ...]:
    """The numbers of a version: 580.65.06 is (580, 65, 6)."""
    return tuple(int(part) for part in re.findall(r"\d+", version))
