"""Who takes part in a run: rank, size and device, and the few things that ranks agree on.

In: the environment of the deepspeed launcher, torchrun or srun, or none of them (one process).
Out: a `World`. Agreement travels over a gloo group of its own, so that it never waits for the device.
"""

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import TypeVar

import deepspeed
import torch
import torch.distributed as dist

from msm_dist.engine.preempt import watch_launcher
from msm_dist.errors import ConfigError, DataError, MsmError, PeerLost

T = TypeVar("T")

# How gloo's plain RuntimeErrors say it; NCCL's are DistErrors.
SIGNS_OF_A_LOST_PEER = ("closed by peer", "reset by peer", "Broken pipe", "Timed out waiting", "Connection refused")


@dataclass(frozen=True)
class World:
    """One rank's view of all ranks."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    has_launcher: bool
    """Whether another program started this process as a rank and ends with it."""
    control: dist.ProcessGroup
    """gloo group for agreement between hosts."""

    @property
    def is_main(self) -> bool:
        """Rank 0 writes files and speaks to the user."""
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Sums over ranks, in float64."""
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return total.tolist()

    def mean(self, values: list[float]) -> list[float]:
        """Means over ranks, in float64."""
        return [value / self.size for value in self.sum(values)]

    def agree_any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. Waits for all of them."""
        return self.sum([float(flag)])[0] > 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.agree_any(False)

    def gather(self, value: T) -> list[T]:
        """Every rank's plain value, by rank."""
        values = [value] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def beside(self, timeout_minutes: float) -> "World":
        """The same ranks with a control group of its own, for one other thread of each; a collective."""
        return replace(self, control=dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes)))

    def on_main(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 and give its result, or its MsmError, to all ranks."""
        outcome: list[object] = [None, None]
        if self.is_main:
            try:
                outcome[0] = action()
            except MsmError as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=self.control)
        if isinstance(outcome[1], MsmError):
            outcome[1].on_all_ranks = True
            raise outcome[1]
        return outcome[0]  # type: ignore[return-value]

    def together(self, action: Callable[[], T], kind: type[MsmError]) -> T:
        """Run `action` on every rank; when it raises an MsmError on any, all raise `kind` with its message.

        A DataError names the shards that changed under any rank.
        """
        result, fault, changed = None, "", ()
        try:
            result = action()
        except MsmError as error:
            fault = f"rank {self.rank}: {error}" if self.size > 1 else str(error)
            changed = error.changed if isinstance(error, DataError) else ()
        if found := [(fault, changed) for fault, changed in self.gather((fault, changed)) if fault]:
            error = kind(found[0][0])
            error.on_all_ranks = True
            if isinstance(error, DataError):
                error.changed = tuple(sorted({shard for _, shards in found for shard in shards}))
            raise error
        return result  # type: ignore[return-value]


def join_world(timeout_minutes: float) -> World:
    """Start the process groups. Raises ConfigError when the launcher's environment is incomplete."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    has_launcher = "RANK" in os.environ or "SLURM_STEP_ID" in os.environ
    rank, size, local_rank, local_size = _placement()
    if has_launcher:
        # Before the wait for the other ranks: a start that a host is missing from must not outlive its command.
        watch_launcher()
    device = _device(local_rank, local_size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    _leave_out_shared_memory_collectives()
    timeout = timedelta(minutes=timeout_minutes)
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)
    # The groups that DeepSpeed makes for itself would wait for as long as torch thinks fit.
    deepspeed.comm.comm.cdb.new_group = partial(dist.new_group, timeout=timeout)
    control = dist.new_group(backend="gloo", timeout=timeout)
    return World(rank, size, local_rank, local_size, device, has_launcher, control)


@contextlib.contextmanager
def noticing_lost_peers(rank: int) -> Iterator[None]:
    """Turn the error of a collective that another process has left into PeerLost."""
    try:
        yield
    except RuntimeError as error:
        said = str(error)
        if not isinstance(error, dist.DistError) and not any(sign in said for sign in SIGNS_OF_A_LOST_PEER):
            raise
        raise PeerLost(
            f"rank {rank}: another process of the run ended or stopped answering ({said.splitlines()[0][:200]}); its "
            "own last message says why, unless it was killed (out of memory?). The same command continues from the "
            "newest checkpoint"
        ) from None


def leave_world() -> None:
    """End the process groups."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _device(local_rank: int, local_size: int) -> torch.device:
    """This rank's GPU, or the CPU where there is none. Raises ConfigError when there are fewer GPUs than ranks, or
    when Slurm has given GPUs that torch does not see."""
    if os.environ.get("MSM_DIST_DEVICE") == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        if gpus := os.environ.get("SLURM_GPUS_ON_NODE"):
            raise ConfigError(
                f"{socket.gethostname()}: Slurm gave {gpus} GPUs, but torch sees none: a CPU build, or the driver? "
                "Look with `msm-dist doctor` on that node; MSM_DIST_DEVICE=cpu in the environment trains on the CPU"
            )
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if visible == 1:
        # Slurm can show each task its own GPU only, as number 0.
        return torch.device("cuda", 0)
    if local_size > visible:
        raise ConfigError(f"{local_size} processes on a machine with {visible} GPUs: start one process per GPU")
    return torch.device("cuda", local_rank)


def _placement() -> tuple[int, int, int, int]:
    """rank, size, local rank and local size, exported in the launcher's common names."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    else:
        env.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
        return 0, 1, 0, 1
    if missing := [name for name in (*names, "MASTER_ADDR", "MASTER_PORT") if name not in env]:
        raise ConfigError(
            f"{missing[0]} is not set although {names[0]} is: start with the deepspeed launcher, torchrun or "
            "slurm/pretrain.sh, which set it"
        )
    rank, size, local_rank = (int(env[name]) for name in names)
    local_size = int(env.get("LOCAL_SIZE") or env.get("LOCAL_WORLD_SIZE") or _slurm_local_size() or size)
    env.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(local_rank))
    return rank, size, local_rank, local_size


def _slurm_local_size() -> int | None:
    """Tasks on this node, from a list such as `4(x2),3`."""
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE")
    if tasks is None:
        return None
    counts: list[int] = []
    for part in tasks.split(","):
        count, _, repeat = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(repeat or 1)
    return counts[int(os.environ.get("SLURM_NODEID", "0"))]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _leave_out_shared_memory_collectives() -> None:
    """Keep DeepSpeed from building its own all-reduce for CPUs at the start of several processes.

    Only tensor-parallel inference calls it; it would need a C++ compiler and 66 MB of /dev/shm per rank.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
