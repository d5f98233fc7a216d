"""One rank of tests/test_activation_checkpointing.py: the model under DeepSpeed, blocks kept whole and recomputed.

Argument: a folder, where rank 0 leaves results.json.
"""

import json
import sys
from functools import partial
from pathlib import Path

import deepspeed
import torch
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

from msm_dist.config import batch_layout, parse_config
from msm_dist.engine import state, zero
from msm_dist.engine.world import join_world, leave_world
from msm_dist.model.mae import MaskedSpectrogramModel
from msm_dist.model.transformer import Block

STEPS, ACCUMULATION, MICRO, FRAMES = 4, 2, 2, 48
SMALL = {
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 2,
    "decoder_embed_dim": 16,
    "decoder_depth": 2,
    "decoder_num_heads": 1,
}
RELEASED_AT_ONCE = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_max_live_parameters": 0,
    "stage3_prefetch_bucket_size": 0,
}


def config(folder, world, stage, checkpointing):
    """Stage 3 keeps no weight a moment longer than its module runs."""
    path = folder / f"zero{stage}.json"
    world.on_main(
        lambda: path.write_text(
            json.dumps({"zero_optimization": {"stage": stage} | (RELEASED_AT_ONCE if stage == 3 else {})})
        )
    )
    return parse_config(
        {
            "model": SMALL | {"activation_checkpointing": checkpointing},
            "data": {"crop_frames": FRAMES, "block": MICRO},
            "train": {
                "steps": STEPS,
                "global_batch": MICRO * ACCUMULATION * world.size,
                "micro_batch": MICRO,
                "precision": "bf16" if stage else "fp32",
            },
            "optim": {"lr": 1e-2},
            "engine": {"deepspeed": str(path)},
        },
        "test",
    )


def counting_gathers():
    """A list that grows with every gather of ZeRO-3 by the size of what it gathers."""
    gathered, gather = [], deepspeed.comm.allgather_fn

    def counting(output, *rest, **options):
        gathered.append(output.numel())
        return gather(output, *rest, **options)

    deepspeed.comm.allgather_fn = counting
    return gathered


def held_in_views(run, parameters):
    """What `run` gives, and the numbers of whole weights that views keep in memory until the backward."""
    held = {}

    def note(tensor):
        pointer = tensor.untyped_storage().data_ptr()
        weights = {parameter.untyped_storage().data_ptr(): parameter for parameter in parameters if parameter.numel()}
        if pointer in weights and not isinstance(tensor, torch.nn.Parameter):
            held[id(weights[pointer])] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        return run(), sum(held.values())


def train(folder, world, stage, checkpointing, gathered):
    """Losses of all micro-batches, the weights after them, and what ZeRO-3 did meanwhile."""
    gathered.clear()
    cfg = config(folder, world, stage, checkpointing)
    model = MaskedSpectrogramModel(cfg.model, cfg.features.n_mels, FRAMES, seed=5)
    engine = zero.build_engine(model, cfg, batch_layout(cfg, world.size), world.device)
    parameters = [parameter for part in model.modules() if isinstance(part, Block) for parameter in part.parameters()]
    generator = torch.Generator().manual_seed(world.rank)
    losses, nested = [], len(FWD_MODULE_STACK)
    for step in range(STEPS):
        zero.set_lr(engine, cfg.peak_lr)
        for micro in range(ACCUMULATION):
            spectrogram = torch.randn(MICRO, 1, cfg.features.n_mels, FRAMES, generator=generator)
            sample_ids = torch.tensor([[step, micro, clip] for clip in range(MICRO)])
            output, held = held_in_views(partial(engine, spectrogram, sample_ids=sample_ids), parameters)
            loss = output.loss
            whole = held + sum(parameter.numel() for parameter in parameters)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    facts = {
        "whole": whole,  # numbers of the blocks' weights that this rank has between forward and backward
        "left_on_stack": len(FWD_MODULE_STACK) - nested,
        "gathers": len(gathered),
        "gathered": sum(gathered),
    }
    return losses, dict(state.full_weights(engine)), facts


def main():
    folder = Path(sys.argv[1])
    world = join_world(10)
    gathered = counting_gathers()
    results = {}
    for stage in range(4):
        losses, weights, facts = train(folder, world, stage, False, gathered)
        thrifty_losses, thrifty_weights, thrifty_facts = train(folder, world, stage, True, gathered)
        results[stage] = {
            "same_losses": losses == thrifty_losses,
            "different": [name for name in weights if not torch.equal(weights[name], thrifty_weights[name])],
            "moved": losses[-1] != losses[0],
            "plain": facts,
            "thrifty": thrifty_facts,
        }
    if world.is_main:
        (folder / "results.json").write_text(json.dumps(results))
    leave_world()


if __name__ == "__main__":
    main()
