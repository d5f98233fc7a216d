"""One rank of tests/test_kernels_in_model.py: the model on Triton kernels under DeepSpeed ZeRO-3, fp32.

Argument: a folder, where rank 0 leaves results.json with the distance to plain AdamW on one process.
"""

import copy
import json
import sys
from pathlib import Path

import deepspeed
import torch

from msm_dist.engine.world import join_world, leave_world
from tests.test_kernels_in_model import LONG, batch, build

STEPS, LR, MICRO = 3, 1e-3, 2


def main(folder: Path) -> None:
    world = join_world(timeout_minutes=10)
    model = build("triton", **LONG)
    plain = copy.deepcopy(model)
    config = {
        "train_micro_batch_size_per_gpu": MICRO,
        "train_batch_size": MICRO * world.size,
        # No parameter is small enough to stay whole.
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # DeepSpeed clips at 1 unless told, plain AdamW does not
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=adamw(model), config=config)
    partitioned = sum(parameter.numel() == 0 for parameter in engine.module.parameters())
    reference = adamw(plain)
    spectrogram, sample_ids = batch(MICRO * world.size)
    share = slice(world.rank * MICRO, (world.rank + 1) * MICRO)
    loss_error = 0.0
    for _ in range(STEPS):
        loss = engine(spectrogram[share], sample_ids=sample_ids[share]).loss
        engine.backward(loss)
        engine.step()
        expected = plain(spectrogram, sample_ids).loss
        reference.zero_grad()
        expected.backward()
        reference.step()
        mean = loss.detach().clone()
        deepspeed.comm.all_reduce(mean)
        loss_error = max(loss_error, abs(mean.item() / world.size / expected.item() - 1))
    distances = []
    for parameter, exact in zip(engine.module.parameters(), plain.parameters(), strict=True):
        with deepspeed.zero.GatheredParameters([parameter]):
            distances.append(((parameter - exact).norm() / exact.norm().clamp_min(1e-9)).item())
    if world.is_main:
        results = {"partitioned": partitioned, "loss_error": loss_error, "weight_error": max(distances)}
        (folder / "results.json").write_text(json.dumps(results))
    leave_world()


def adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=LR)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
