"""One rank of tests/test_compile.py: three compiled blocks under DeepSpeed, beside eager ones.

Arguments: a folder and `start` or `resume`. The first trains, saving on the way; the second goes on from there in new
processes. Rank 0 leaves <phase>.json.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
from torch import nn
from torch._dynamo.utils import counters

from msm_dist.config import batch_layout, parse_config
from msm_dist.engine import checkpoint, state, zero
from msm_dist.engine.world import join_world, leave_world
from msm_dist.model.transformer import Block
from tests.checkpointing_worker import RELEASED_AT_ONCE

STEPS, SAVED, MICRO, TOKENS, WIDTH = 8, 4, 4, 7, 32
PRECISIONS = {1: "fp32", 3: "bf16"}  # by ZeRO stage
RESUMED = 3


class Loss(tuple):
    @property
    def loss(self):
        return self[0]


class Blocks(nn.Module):
    """Tokens through blocks of one shape, so that there is one graph to compile."""

    def __init__(self, checkpointing):
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.Sequential(*(Block(WIDTH, 2, False, "reference", checkpointing) for _ in range(3)))
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.2, generator=generator)

    def forward(self, x, sample_ids=None):
        prediction = self.blocks(self.embed(x.to(self.embed.weight.dtype)))
        return Loss([(prediction.float() - x).square().mean()])


def build(folder, world, stage, compiled, checkpointing=False):
    path = folder / f"zero{stage}.json"
    content = {"zero_optimization": {"stage": stage} | (RELEASED_AT_ONCE if stage == 3 else {})}
    world.on_main(lambda: path.write_text(json.dumps(content)))
    cfg = parse_config(
        {
            "data": {"block": MICRO},
            "train": {
                "steps": STEPS,
                "global_batch": MICRO * world.size,
                "micro_batch": MICRO,
                "precision": PRECISIONS[stage],
            },
            "engine": {"deepspeed": str(path), "compile": compiled},
        },
        "test",
    )
    model = Blocks(checkpointing)
    initial = {name: value.detach().clone() for name, value in model.named_parameters()}
    engine = zero.build_engine(model, cfg, batch_layout(cfg, world.size), world.device)
    zero.dry_run(engine, torch.ones(MICRO, TOKENS, WIDTH), torch.zeros(1))
    state.reset(engine, initial)
    return engine


def train(engine, world, start, stop):
    """The losses of steps `start` to `stop`, with a look at two batches of other sizes after each."""
    losses = []
    for step in range(start, stop):
        zero.set_lr(engine, 1e-3)
        x = torch.randn(MICRO, TOKENS, WIDTH, generator=torch.Generator().manual_seed(10 * step + world.rank))
        loss = engine(x).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        engine.eval()
        with torch.no_grad():
            for clips in (MICRO, MICRO - 1):
                engine(x[:clips])
        engine.train()
    return losses


def digest(engine):
    """Of all weights, to compare them to the bit."""
    weights = b"".join(value.contiguous().numpy().tobytes() for _, value in state.full_weights(engine))
    return hashlib.sha256(weights).hexdigest()


def started(folder, world, stage):
    eager = train(build(folder, world, stage, compiled=False), world, 0, STEPS)
    torch.compiler.reset()
    counters.clear()
    engine = build(folder, world, stage, compiled=True)
    names = [name for name, _ in engine.module.named_parameters()]
    losses = train(engine, world, 0, SAVED)
    checkpoint.save(engine, folder / f"stage{stage}", SAVED, {"cursor": 0}, world)
    losses += train(engine, world, SAVED, STEPS)
    result = {
        "eager": eager,
        "compiled": losses,
        "weights": digest(engine),
        "renamed": names != [name for name, _ in Blocks(False).named_parameters()],
    }
    thrifty = build(folder, world, stage, compiled=True, checkpointing=True)
    result["thrifty"] = train(thrifty, world, 0, STEPS)
    result["thrifty_weights"] = digest(thrifty)
    result["graphs"] = counters["stats"]["unique_graphs"]
    return result


def resumed(folder, world, stage):
    engine = build(folder, world, stage, compiled=True)
    checkpoint.load(engine, checkpoint.newest_complete(folder / f"stage{stage}"), world)
    return {"compiled": train(engine, world, SAVED, STEPS), "weights": digest(engine)}


def main(folder, phase):
    world = join_world(10)
    if phase == "start":
        results = {stage: started(folder, world, stage) for stage in PRECISIONS}
    else:
        results = {RESUMED: resumed(folder, world, RESUMED)}
    if world.is_main:
        (folder / f"{phase}.json").write_text(json.dumps(results))
    leave_world()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
