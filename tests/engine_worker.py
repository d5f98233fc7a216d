"""One rank of tests/test_engine.py: a small model under DeepSpeed beside a plain AdamW loop.

Arguments: a folder, where rank 0 leaves results.json.
"""

import copy
import json
import sys
from pathlib import Path

import torch
from torch import nn

from msm_dist.config import batch_layout, parse_config
from msm_dist.engine import checkpoint, state, zero
from msm_dist.engine.optim import lr_at, parameter_groups
from msm_dist.engine.world import join_world, leave_world

STEPS, WARMUP, MICRO = 20, 3, 16


class Loss(tuple):
    @property
    def loss(self):
        return self[0]


class Small(nn.Module):
    """A regression that has matrices, biases, norms and a 3-D token."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.net = nn.Sequential(nn.Linear(16, 33), nn.LayerNorm(33), nn.GELU(), nn.Linear(33, 8))

    def forward(self, x, sample_ids=None):
        x, y = x[..., :16], x[..., 16:]
        weight = self.net[0].weight
        prediction = self.net((x + self.token[0].float()).to(weight.dtype)).float()
        return Loss([(prediction - y).square().mean()])


def config(precision, clip, accumulation, world):
    return parse_config(
        {
            "train": {
                "steps": STEPS,
                "global_batch": MICRO * accumulation * world.size,
                "micro_batch": MICRO,
                "precision": precision,
            },
            "optim": {"lr": 1e-2, "clip_norm": clip},
        },
        "test",
    )


def case(world, folder, precision, clip, accumulation):
    cfg = config(precision, clip, accumulation, world)
    layout = batch_layout(cfg, world.size)
    model = Small()
    initial = {name: value.detach().clone() for name, value in model.named_parameters()}
    data = torch.randn(STEPS, layout.accumulation, world.size, MICRO, 24, generator=torch.Generator().manual_seed(1))
    engine = zero.build_engine(model, cfg, layout, world.device)

    def train(start, stop):
        for step in range(start, stop):
            zero.set_lr(engine, lr_at(step, cfg.peak_lr, WARMUP, STEPS))
            for micro in range(layout.accumulation):
                engine.backward(engine(data[step, micro, world.rank].to(world.device)).loss)
                engine.step()

    noise = torch.randn(MICRO, 24, generator=torch.Generator().manual_seed(2))
    rng = torch.get_rng_state()
    zero.dry_run(engine, noise.to(world.device), torch.zeros(1))
    state.reset(engine, initial)
    result = {
        "rng_untouched": torch.equal(rng, torch.get_rng_state()),
        "start_exact": all(torch.equal(value, initial[name]) for name, value in state.full_weights(engine)),
    }
    root = folder / f"{precision}-{clip}-{accumulation}"
    train(0, 10)
    checkpoint.save(engine, root, 10, {"cursor": 7}, world)
    train(10, STEPS)
    trained = dict(state.full_weights(engine))
    saved = checkpoint.newest_complete(root)
    checkpoint.load(engine, saved, world)
    train(10, STEPS)
    again = dict(state.full_weights(engine))
    result["resumed_exact"] = all(torch.equal(trained[name], again[name]) for name in trained)
    result["cursor"] = saved.meta["cursor"]
    result["files"] = sorted(path.name for path in saved.folder.iterdir())
    reference = plain(initial, data, cfg, precision, clip)
    result["error"] = max(((trained[name] - value).norm() / value.norm()).item() for name, value in reference.items())
    poison = torch.full((MICRO, 24), float("nan") if world.rank == 0 else 1.0, device=world.device)
    engine.backward(engine(poison).loss)
    engine.step()
    for _ in range(layout.accumulation - 1):
        engine.backward(engine(data[0, 0, world.rank].to(world.device)).loss)
        engine.step()
    after = dict(state.full_weights(engine))
    result["skipped"] = engine.skipped_steps
    result["unchanged_by_nan"] = all(torch.equal(after[name], again[name]) for name in again)
    return result


def plain(initial, data, cfg, precision, clip):
    """The same run in a plain loop: fp32 masters, gradients of the model's precision summed in fp32."""
    model = Small()
    masters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=0.0, betas=(0.9, 0.95), eps=1e-8)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, cfg.peak_lr, WARMUP, STEPS)
        batches = data[step].flatten(0, 1)
        sums = {name: torch.zeros_like(value) for name, value in masters.items()}
        for batch in batches:
            low = copy.deepcopy(model).to(torch.bfloat16 if precision == "bf16" else torch.float32)
            (low(batch).loss / len(data[step])).backward()
            for name, parameter in low.named_parameters():
                sums[name] += parameter.grad.float() / data.shape[2]
        for name, parameter in masters.items():
            parameter.grad = sums[name]
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return {name: value.detach() for name, value in masters.items()}


def main():
    folder = Path(sys.argv[1])
    world = join_world(2)
    cases = [("fp32", None, 1), ("fp32", 0.1, 2), ("bf16", None, 2), ("bf16", 0.1, 1)]
    results = {"/".join(map(str, args)): case(world, folder, *args) for args in cases}
    if world.is_main:
        (folder / "results.json").write_text(json.dumps(results))
    leave_world()


main()
