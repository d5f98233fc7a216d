"""Rank, size and device from what launchers set."""

import subprocess
import sys

import pytest
import torch

from msm_dist.engine import world
from msm_dist.errors import ConfigError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SLURM = ("SLURM_STEP_ID", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID")
MASTER = {"MASTER_ADDR": "n1", "MASTER_PORT": "29500"}


@pytest.fixture
def launched(monkeypatch):
    for name in (*NAMES, *SLURM):
        monkeypatch.delenv(name, raising=False)

    def placement(**environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return world._placement()

    return placement


def test_plain_process_is_rank_0_of_1(launched):
    assert launched() == (0, 1, 0, 1)


def test_deepspeed_launcher_and_torchrun(launched):
    common = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"} | MASTER
    assert launched(**common, LOCAL_SIZE="4") == (5, 8, 1, 4)


def test_srun_on_nodes_with_different_numbers_of_tasks(launched, monkeypatch):
    srun = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "9", "SLURM_NTASKS": "11", "SLURM_LOCALID": "1"} | MASTER
    assert launched(**srun, SLURM_STEP_TASKS_PER_NODE="4(x2),3", SLURM_NODEID="2") == (9, 11, 1, 3)
    assert world.os.environ["RANK"] == "9"
    for name in NAMES[:3]:
        monkeypatch.delenv(name)
    assert launched(**srun, SLURM_STEP_TASKS_PER_NODE="4(x2),3", SLURM_NODEID="1")[3] == 4


def test_half_an_environment_names_what_is_missing(launched):
    with pytest.raises(ConfigError, match="MASTER_ADDR is not set although RANK is"):
        launched(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0")


@pytest.mark.parametrize(("visible", "local_rank", "local_size", "device"), [(8, 3, 8, "cuda:3"), (1, 3, 8, "cuda:0")])
def test_rank_takes_its_gpu_or_the_only_one_it_sees(monkeypatch, visible, local_rank, local_size, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    assert world._device(local_rank, local_size) == torch.device(device)


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="4 processes on a machine with 2 GPUs"):
        world._device(0, 4)


def test_gpus_that_slurm_gave_and_torch_does_not_see_are_missed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert world._device(0, 1).type == "cpu"
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    with pytest.raises(ConfigError, match="Slurm gave 2 GPUs, but torch sees none"):
        world._device(0, 1)
    monkeypatch.setenv("MSM_DIST_DEVICE", "cpu")
    assert world._device(0, 1).type == "cpu"


def test_every_group_has_the_time_limit_of_the_configuration():
    # In a process of its own: DeepSpeed starts its groups once per process.
    program = """
import torch.distributed as dist, deepspeed, torch
from msm_dist.engine.world import join_world
join_world(0.25)
model = torch.nn.Linear(2, 2)
config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}}
deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)
groups = list(dist.distributed_c10d._world.pg_map)
print(len(groups), {group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups})
"""
    done = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True)
    count, limits = done.stdout.splitlines()[-1].split(maxsplit=1)
    assert int(count) > 2 and limits == "{15.0}", done.stderr
