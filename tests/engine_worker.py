"""One rank of tests/engine_matrix.py: a narrow model under DeepSpeed at every stage, precision and offload.

Arguments: a folder and a phase: `train`, `move`, `defaults` ... The arguments of each call of it are read from
<phase>-<world size>.json there, and rank 0 leaves <phase>-<world size>-results.json.
"""

import contextlib
import copy
import json
import sys
import warnings
from pathlib import Path
from unittest import mock

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from safetensors.torch import load_file, save_file

from msm_dist.config import batch_layout, parse_config
from msm_dist.engine import checkpoint, state, zero
from msm_dist.engine.optim import lr_at, parameter_groups
from msm_dist.engine.world import join_world, leave_world
from msm_dist.errors import CheckpointError
from msm_dist.model.mae import MaskedSpectrogramModel
from tests.engine_matrix import name_of

STEPS, SAVED, DEEP_STEPS, WARMUP, MICRO, GLOBAL = 20, 10, 10, 3, 4, 24
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def clip_norm(stage, precision, offload):
    """What a case is clipped to, also where its checkpoint is continued by another one."""
    return None if offload == "none" and stage in (1, 3) else 0.5


def config(stage, precision, offload, clip=0.5, depth=2, decoder_depth=1, checkpointing=False):
    """Few of this model's parameters are divided by 2 or by 3 ranks without a rest."""
    return parse_config(
        {
            "data": {"block": MICRO, "crop_frames": 12},
            "features": {"n_mels": 15},
            "model": {
                "embed_dim": 20,
                "depth": depth,
                "num_heads": 2,
                "decoder_embed_dim": 12,
                "decoder_depth": decoder_depth,
                "decoder_num_heads": 1,
                "patch_size": "5x3",
                "activation_checkpointing": checkpointing,
            },
            "train": {"steps": STEPS, "global_batch": GLOBAL, "micro_batch": MICRO, "precision": precision},
            "optim": {"lr": 1e-2, "clip_norm": clip},
            "engine": {"zero_stage": stage, "offload": offload},
        },
        "test",
    )


def new_model(cfg):
    return MaskedSpectrogramModel(cfg.model, cfg.features.n_mels, cfg.data.crop_frames, cfg.seed)


def micro_batch(step, number):
    """Micro-batch `number` of the step's six: spectrogram and sample ids."""
    ids = torch.tensor([[0, step * GLOBAL + number * MICRO + row, 0] for row in range(MICRO)])
    generator = torch.Generator().manual_seed(step * 1000 + number)
    return torch.randn(MICRO, 1, 15, 12, generator=generator).cumsum(-1), ids


class Case:
    """An engine of a configuration that has made its dry run."""

    def __init__(self, world, cfg):
        self.world, self.cfg = world, cfg
        self.layout = batch_layout(cfg, world.size)
        model = new_model(cfg)
        self.initial = {name: value.detach().clone() for name, value in model.named_parameters()}
        self.engine = zero.build_engine(model, cfg, self.layout, world.device)
        spectrogram, ids = micro_batch(STEPS, 0)
        rng = torch.get_rng_state()
        zero.dry_run(self.engine, spectrogram.to(world.device), ids.to(world.device))
        state.reset(self.engine, self.initial)
        self.rng_untouched = torch.equal(rng, torch.get_rng_state())

    def train(self, start, stop, poison=False):
        for step in range(start, stop):
            zero.set_lr(self.engine, lr_at(step, self.cfg.peak_lr, WARMUP, STEPS))
            for micro in range(self.layout.accumulation):
                spectrogram, ids = micro_batch(step, micro * self.world.size + self.world.rank)
                if poison and self.world.is_main:
                    spectrogram = spectrogram * float("nan")
                loss = self.engine(spectrogram.to(self.world.device), sample_ids=ids.to(self.world.device)).loss
                self.engine.backward(loss * (loss.detach() * 0 + 1))
                self.engine.step()

    def loss(self):
        """Of this rank's share of the first step's clips, with the weights as they are."""
        spectrogram, ids = micro_batch(0, self.world.rank)
        with torch.no_grad():
            return self.engine(spectrogram.to(self.world.device), sample_ids=ids.to(self.world.device)).loss.item()

    def everything(self):
        whole = {f"{part}/{name}": value.clone() for name, parts in self.parts() for part, value in parts.items()}
        counters = {"step": state.optimizer_step(self.engine), "loss_scale": state.loss_scale(self.engine)}
        return whole, counters

    def parts(self):
        return state.full_state(self.engine)

    def weights(self):
        return dict(state.full_weights(self.engine))


def train(world, folder, case):
    """Twenty steps, the last ten twice, then an update that must be refused."""
    cfg = config(*case, clip_norm(*case))
    run = Case(world, cfg)
    root = folder / name_of(case)
    result = {"rng_untouched": run.rng_untouched, "start_exact": same(run.weights(), run.initial)}
    run.train(0, SAVED)
    checkpoint.save(run.engine, root, SAVED, {"cursor": 7}, world)
    run.train(SAVED, STEPS)
    first, counters = run.everything()
    run.engine.destroy()
    run = Case(world, cfg)
    checkpoint.load(run.engine, checkpoint.newest_complete(root), world)
    run.train(SAVED, STEPS)
    again, counters_again = run.everything()
    result["resumed_exact"] = same(first, again) and counters == counters_again
    result["counters"] = counters
    trained = run.weights()
    if world.is_main:
        save_file(trained, root / "final.safetensors")
    result["error"] = distance(trained, plain(run.cfg, run.initial, world))
    if case[1] != "fp16":
        run.train(STEPS, STEPS + 1, poison=True)
        result["refused"] = state.was_refused(run.engine)
        result["unchanged_by_nan"] = same(run.everything()[0], again)
    run.engine.destroy()
    return result


def move(world, folder, source, target):
    """A checkpoint of one configuration read and continued in another one, at this world size."""
    root = folder / name_of(source)
    saved = checkpoint.open_checkpoint(root / checkpoint.checkpoint_name(SAVED))
    run = Case(world, config(*target, clip_norm(*source)))
    checkpoint.load(run.engine, saved, world)
    found, counters = run.everything()
    stored = {}
    for name in saved.meta["files"]:
        stored |= load_file(saved.folder / name)
    result = {
        "state_exact": same(found, stored) and counters["step"] == saved.meta["optimizer_step"],
        "scale_exact": counters["loss_scale"] == saved.meta["loss_scale"] or source[1] != target[1],
        "world": world.size,
    }
    run.train(SAVED, STEPS)
    result["error"] = distance(run.weights(), load_file(root / "final.safetensors"))
    run.engine.destroy()
    return result


def defaults(world, folder, case):
    """The distance to plain AdamW where DeepSpeed's own choices of dtypes stand for gradients."""
    ours = zero.deepspeed_config

    def without_dtypes(*args):
        values = ours(*args)
        return {name: values[name] for name in values if name not in ("data_types", "communication_data_type")}

    with mock.patch.object(zero, "deepspeed_config", without_dtypes):
        run = Case(world, config(*case, clip_norm(*case)))
    run.train(0, STEPS)
    error = distance(run.weights(), plain(run.cfg, run.initial, world))
    run.engine.destroy()
    return {"error": error}


def deep(world, folder, depth, decoder_depth):
    """Ten steps of a deep model at stage 3 with activation checkpointing: its loss before and after, its
    distance to plain AdamW."""
    run = Case(world, config(3, "bf16", "none", 0.5, depth, decoder_depth, checkpointing=True))
    whole = sum(value.numel() for value in run.initial.values())
    held = sum(value.ds_tensor.numel() for value in run.engine.module.parameters())
    losses = [run.loss()]
    run.train(0, DEEP_STEPS)
    losses.append(run.loss())
    error = distance(run.weights(), plain(run.cfg, run.initial, world, DEEP_STEPS))
    run.engine.destroy()
    return {"losses": losses, "error": error, "share": held / whole}


def unreadable(world, folder, case):
    """What each rank says when rank 1 can't open a checkpoint that the others can."""
    run = Case(world, config(*case))
    checkpoint.save(run.engine, folder / "unreadable", 1, {}, world)
    saved = checkpoint.newest_complete(folder / "unreadable")
    failing = mock.patch.object(checkpoint.safetensors, "safe_open", side_effect=OSError("stale file handle"))
    with failing if world.rank == 1 else contextlib.nullcontext():
        try:
            checkpoint.load(run.engine, saved, world)
            said = "nothing"
        except CheckpointError as error:
            said = str(error)
    run.engine.destroy()
    return world.gather(said)


def plain(cfg, initial, world, steps=STEPS):
    """The same run in a plain loop: fp32 masters, gradients of the model's precision summed in fp32."""
    dtype = DTYPES[cfg.train.precision]
    model = new_model(cfg).to(world.device)
    masters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in masters.items():
            value.copy_(initial[name])
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=0.0, betas=(0.9, 0.95), eps=1e-8)
    scaler = DynamicLossScaler(2.0**16, 1000, 1, 2, False) if dtype == torch.float16 else None
    number = GLOBAL // MICRO
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, cfg.peak_lr, WARMUP, STEPS)
        scale = scaler.cur_scale if scaler else 1.0
        sums = {name: torch.zeros_like(value) for name, value in masters.items()}
        for micro in range(number):
            low = copy.deepcopy(model).to(dtype)
            spectrogram, ids = micro_batch(step, micro)
            loss = low(spectrogram.to(world.device), sample_ids=ids.to(world.device)).loss
            # A rank divides its loss by the accumulation; the mean over ranks comes after.
            (loss * (scale * world.size / number)).backward()
            for name, parameter in low.named_parameters():
                sums[name] += parameter.grad.float() / world.size / scale
        overflow = not all(value.isfinite().all() for value in sums.values())
        if scaler:
            scaler.update_scale(overflow)
        if overflow:
            continue
        for name, parameter in masters.items():
            parameter.grad = sums[name]
        if cfg.optim.clip_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.optim.clip_norm)
        optimizer.step()
    return {name: value.detach().cpu() for name, value in masters.items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name].cpu(), right[name].cpu()) for name in left)


def distance(found, expected):
    """The largest relative distance of a parameter."""
    return max(((found[name] - value).norm() / value.norm().clamp_min(1e-9)).item() for name, value in expected.items())


@contextlib.contextmanager
def fp16_on_cpu():
    """torch computes fp16 on a CPU, slowly; what must hold of it can be tried there all the same."""
    accelerator = get_accelerator()
    with (
        mock.patch.object(type(accelerator), "is_fp16_supported", lambda self: True),
        mock.patch.object(zero, "check_precision", lambda *_: None),
    ):
        yield


PHASES = {"train": train, "move": move, "defaults": defaults, "deep": deep, "unreadable": unreadable}


def main():
    folder, phase = Path(sys.argv[1]), sys.argv[2]
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    world = join_world(10)
    work = json.loads((folder / f"{phase}-{world.size}.json").read_text())
    with fp16_on_cpu() if world.device.type == "cpu" else contextlib.nullcontext():
        results = [PHASES[phase](world, folder, *args) for args in work]
    if world.is_main:
        (folder / f"{phase}-{world.size}-results.json").write_text(json.dumps(results))
    leave_world()


if __name__ == "__main__":
    main()
