"""The whole training step of the base model on one GPU: `python -m benchmarks.step`.

In: synthetic spectrograms that lie on the device already. Timed: forward, backward and update, bfloat16, under the
engine that `msm_dist.pretrain` builds (DeepSpeed, ZeRO-1), with the Triton kernels, with the reference, with torch's
attention under torch.compile, and beside them the usual eager autoencoder (benchmarks/eager.py) under float16 autocast
with a GradScaler. All have the same weights; losses and gradients are compared first, and a wrong one is named and
ends the script with exit code 1. Writes benchmarks/results/step-<device>.json. MFU counts the FLOPs of
`forward_flops`, three times for the backward, against the rate of a matrix product measured in the same run.

`--profile` prints, in the end, which kernels a step of ours consists of.
"""

import argparse
import importlib.util
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.eager import EagerMae
from benchmarks.measure import (
    RESULTS,
    Budget,
    Ceilings,
    Check,
    Target,
    ceilings_line,
    environment,
    measure_ceilings,
    relative_error,
    say_no_gpu,
    slug,
    summarize,
    table,
    targets_table,
    write_results,
)
from msm_dist.config import Config, Geometry, Model, batch_layout, parse_config
from msm_dist.engine.optim import build_optimizer, parameter_groups
from msm_dist.model.mae import MaskedSpectrogramModel
from msm_dist.model.transformer import Attention, Block
from msm_dist.model.weights import to_published

MINUTES = 2.4
SIZE = "base"
N_MELS = 80
LR = 1e-4
TURN_SECONDS, TURNS, WARM_UP_STEPS = 0.6, 2, 3
COMPILE_SECONDS, SETTING_SECONDS = 45.0, 20.0
"""What compiling a variant, and what a setting with its models, may take: else it is left out, and said to be."""
CHECK_CLIPS = 32
FULL_TOLERANCE = 1e-3
"""float32, loss and gradients: summed in another order through 16 blocks."""
OTHERS_TOLERANCE = 1e-2
"""The same for what ours is compared with, which may use tf32."""
HALF_TOLERANCE = 2e-2
"""bfloat16 and float16 against float32, the loss alone."""
OURS, OURS_COMPILED, REFERENCE = "triton", "triton, blocks compiled", "reference"
SDPA_COMPILED, EAGER = "SDPA, model compiled", "eager fp16 autocast"
WANTED_MFU, WANTED_EAGER, WANTED_SDPA = 0.5, 3.0, 1.25


class Setting(NamedTuple):
    """Crop and micro-batches; the first is the one that targets are about, and where compiled models run too."""

    frames: int
    micro_batches: tuple[int, ...]
    compiled: bool


SETTINGS = (Setting(208, (2048, 1024, 512, 256), True), Setting(608, (512,), False))


@dataclass
class Variant:
    """A way to train: a whole step, and the memory that parameters, gradients and optimiser take."""

    step: Callable[[Tensor, Tensor], Any]
    static_bytes: int = 0  # as far as it has been seen: the optimiser makes its state in the first step


def main(arguments: Sequence[str]) -> int:
    """The exit code: 0 also where there is no GPU, 1 where a variant is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.partition("\n")[0])
    parser.add_argument("--profile", action="store_true", help="print the kernels of our step too")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"time allowed ({MINUTES:g})")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args(arguments)
    if say_no_gpu("benchmarks.step"):
        return 0
    budget = Budget(options.minutes)
    device = torch.device("cuda")
    with joined_world():
        wrong = [check for check in check_all(device, config(SIZE, 208)) if check.wrong]
        for check in wrong:
            print(f"WRONG: {check.what}: error {check.error:.2e}, tolerance {check.tolerance:.1e}: nothing is timed")
        if wrong:
            return 1
        code = compare(budget, options.out, device)
        if options.profile:
            profile(options.out, device)
        return code


def compare(budget: Budget, folder: Path, device: torch.device) -> int:
    """Measure, print, write."""
    ceilings = measure_ceilings()
    print(ceilings_line(ceilings), flush=True)
    rows: list[dict[str, Any]] = []

    def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["frames"], row["micro_batch"], row["implementation"]

    def save(finished: bool) -> Path:
        content = {
            "finished": finished,
            "engine": "DeepSpeed ZeRO-1" if has_deepspeed() else "plain AdamW",
            "ceilings": ceilings._asdict(),
            "forward_gflop_per_clip": {f"80x{s.frames}": gflop_parts(config(SIZE, s.frames)) for s in SETTINGS},
            "targets": [target.record() for target in all_targets(rows)],
            "left_out": budget.left_out,
            "rows": rows,
        }
        return write_results(folder, "step", content)

    for setting in SETTINGS:
        if budget.allows(f"80x{setting.frames}", SETTING_SECONDS):
            for found in measure(setting, ceilings, budget, device):
                # What is measured again, beside more variants, takes the place of what was.
                keys = {key_of(row) for row in found}
                rows = [row for row in rows if key_of(row) not in keys] + found
                save(finished=False)
            torch.cuda.empty_cache()
    path = save(finished=True)
    print(f"\n{rows_table(rows)}\n\n{ceilings_line(ceilings)}\n{targets_table(all_targets(rows))}\nwritten: {path}")
    return 0


def measure(
    setting: Setting, ceilings: Ceilings, budget: Budget, device: torch.device
) -> Iterator[list[dict[str, Any]]]:
    """For each micro-batch a row for every variant, timed in turn; then the first again, with the compiled ones."""
    cfg = config(SIZE, setting.frames)
    variants = {name: build(name, cfg, device) for name in (OURS, REFERENCE, EAGER)}

    def timed(micro_batch: int) -> list[dict[str, Any]]:
        found = take_turns(variants, [draw(cfg, micro_batch, seed, device) for seed in range(2)])
        rows = [row_of(setting.frames, micro_batch, name, found[name], cfg, ceilings) for name in found]
        for row in rows:
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        return rows

    for number, micro_batch in enumerate(setting.micro_batches):
        what = f"80x{setting.frames}, micro-batch {micro_batch}"
        if number == 0 or budget.allows(what, TURN_SECONDS * (TURNS + 1) * len(variants)):
            yield timed(micro_batch)
    if setting.compiled:
        slow = [name for name in (SDPA_COMPILED, OURS_COMPILED) if budget.allows(name, COMPILE_SECONDS)]
        variants |= {name: build(name, cfg, device) for name in slow}
        if slow:
            yield timed(setting.micro_batches[0])


def row_of(
    frames: int, micro_batch: int, name: str, found: dict[str, Any], cfg: Config, ceilings: Ceilings
) -> dict[str, Any]:
    """What was found, with the rates that follow."""
    row = {"subject": "step", "frames": frames, "micro_batch": micro_batch, "implementation": name, **found}
    if "ms" in found:
        row["clips_per_second"] = 1e3 * micro_batch / found["ms"]
        row["mfu"] = 3 * forward_flops(cfg) * row["clips_per_second"] / ceilings.matrix
    return row


def take_turns(variants: dict[str, Variant], batches: Sequence[tuple[Tensor, Tensor]]) -> dict[str, dict[str, Any]]:
    """ms a step (the median of the turns, A B A B), spread and peak memory of each variant; or why there is none."""
    found: dict[str, dict[str, Any]] = {}
    turns: dict[str, list[float]] = {}
    for name, variant in variants.items():
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        try:
            run_steps(variant, batches, WARM_UP_STEPS)
            variant.static_bytes += torch.cuda.memory_allocated() - before
            torch.cuda.reset_peak_memory_stats()
            run_steps(variant, batches, 1)
        except torch.OutOfMemoryError:
            found[name] = {"note": "does not fit the memory"}
            continue
        others = torch.cuda.memory_allocated() - variant.static_bytes
        found[name] = {"peak_bytes": torch.cuda.max_memory_allocated() - others}
        turns[name] = []
    for _ in range(TURNS):
        for name, times in turns.items():
            seconds = run_steps(variants[name], batches, 2)
            steps = max(4, round(TURN_SECONDS / seconds))
            times.append(1e3 * run_steps(variants[name], batches, steps))
    for name, times in turns.items():
        found[name] |= summarize(times)._asdict()
    return found


def run_steps(variant: Variant, batches: Sequence[tuple[Tensor, Tensor]], steps: int) -> float:
    """Seconds a step."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for number in range(steps):
        variant.step(*batches[number % len(batches)])
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def build(name: str, cfg: Config, device: torch.device) -> Variant:
    """A variant with the weights of seed 0."""
    before = torch.cuda.memory_allocated()
    if name == EAGER:
        variant = Variant(eager_step(eager_model(cfg).to(device), cfg))
    else:
        backend = "triton" if name in (OURS, OURS_COMPILED) else "reference"
        model = our_model(cfg, backend)
        if name == SDPA_COMPILED:
            use_sdpa(model)
            model.compile(dynamic=False)
        if name == OURS_COMPILED:
            for block in [part for part in model.modules() if isinstance(part, Block)]:
                block.compile(dynamic=False)
        variant = Variant(engine_step(model, cfg, device))
    variant.static_bytes = torch.cuda.memory_allocated() - before
    return variant


def engine_step(model: MaskedSpectrogramModel, cfg: Config, device: torch.device) -> Callable[[Tensor, Tensor], Any]:
    """A step as `msm_dist.pretrain` does it. With one micro-batch a step, its size may be any."""
    if not has_deepspeed():
        return plain_step(model.to(device), cfg)
    from msm_dist.engine.zero import build_engine, set_lr

    engine = build_engine(model, cfg, batch_layout(cfg, 1), device)
    set_lr(engine, LR)

    def step(spectrogram: Tensor, sample_ids: Tensor) -> None:
        loss = engine(spectrogram, sample_ids=sample_ids).loss
        engine.backward(loss * (loss.detach() * 0 + 1))
        engine.step()

    return step


def has_deepspeed() -> bool:
    """Whether steps of ours run under the engine of `msm_dist.pretrain`."""
    return importlib.util.find_spec("deepspeed") is not None


@contextmanager
def joined_world() -> Iterator[None]:
    """The process group of one rank that DeepSpeed needs."""
    if not has_deepspeed():
        print("benchmarks.step: deepspeed is not installed: plain AdamW with float32 masters takes its place")
        yield
        return
    from msm_dist.engine.world import join_world, leave_world

    join_world(timeout_minutes=5)
    try:
        yield
    finally:
        leave_world()


def plain_step(model: MaskedSpectrogramModel, cfg: Config) -> Callable[[Tensor, Tensor], Any]:
    """bfloat16 parameters, float32 masters, AdamW: what the engine does, on one GPU without DeepSpeed."""
    held = nn.ParameterList(parameter.detach().clone() for parameter in model.parameters())
    masters = list(held)
    optimizer = build_optimizer(held, cfg.optim.betas, cfg.optim.weight_decay, masters[0].device)
    for group in optimizer.param_groups:
        group["lr"] = LR
    model.to(torch.bfloat16)
    parameters = list(model.parameters())

    def step(spectrogram: Tensor, sample_ids: Tensor) -> None:
        model(spectrogram, sample_ids).loss.backward()
        for master, parameter in zip(masters, parameters, strict=True):
            master.grad, parameter.grad = parameter.grad.float(), None
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(parameters, masters)

    return step


def eager_step(model: EagerMae, cfg: Config) -> Callable[[Tensor, Tensor], Any]:
    """The usual loop: float16 autocast, GradScaler, AdamW."""
    groups = parameter_groups(model, cfg.optim.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=cfg.optim.betas)
    scaler = torch.amp.GradScaler("cuda")
    num_patches = model.pos_embed.shape[1] - 1

    def step(spectrogram: Tensor, sample_ids: Tensor) -> None:
        with torch.autocast("cuda", torch.float16):
            loss = model(spectrogram, torch.rand(spectrogram.shape[0], num_patches, device=spectrogram.device))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


def config(size: str, frames: int) -> Config:
    """A run of the named size, with one micro-batch a step."""
    values = {
        "data": {"crop_frames": frames},
        "model": {"size": size},
        "optim": {"lr": LR},
        "train": {"steps": 1, "global_batch": 64, "micro_batch": 64, "precision": "bf16"},
    }
    return parse_config(values, "benchmarks.step")


def our_model(cfg: Config, backend: str) -> MaskedSpectrogramModel:
    """The model of seed 0."""
    model = Model.model_validate(cfg.model.model_dump() | {"backend": backend})
    return MaskedSpectrogramModel(model, N_MELS, cfg.data.crop_frames, seed=0)


def eager_model(cfg: Config) -> EagerMae:
    """The usual autoencoder with the weights of `our_model`."""
    ours = our_model(cfg, "reference")
    model = EagerMae(cfg.model.geometry, ours.grid, ours.num_keep)
    model.load_state_dict(to_published(ours))
    return model


def use_sdpa(model: nn.Module) -> None:
    """Give every attention of a model torch's own, whichever back-end that takes."""

    def forward(self: Attention, x: Tensor) -> Tensor:
        parts = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        return self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    for part in model.modules():
        if isinstance(part, Attention):
            part.forward = types.MethodType(forward, part)


def draw(cfg: Config, clips: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random spectrograms [B, 1, F, T] and sample_ids [B, 3]."""
    generator = torch.Generator(device).manual_seed(seed)
    spectrogram = torch.randn(clips, 1, N_MELS, cfg.data.crop_frames, generator=generator, device=device)
    return spectrogram, torch.randint(0, 2**23, (clips, 3), generator=generator, device=device)


def check_all(device: torch.device, cfg: Config) -> list[Check]:
    """Losses and gradients of the models that are timed, before any step, against the reference in float32."""
    spectrogram, sample_ids = draw(cfg, CHECK_CLIPS, torch.seed() % 2**31, device)
    exact = our_model(cfg, "reference").to(device)
    output = exact(spectrogram, sample_ids)
    output.loss.backward()
    gradients = dict(exact.named_parameters())
    noise = output.masking.ids_restore.float()
    ours, sdpa = our_model(cfg, "triton").to(device), our_model(cfg, "reference").to(device)
    use_sdpa(sdpa)
    checks = []
    for name, model, tolerance in ((OURS, ours, FULL_TOLERANCE), ("SDPA", sdpa, OTHERS_TOLERANCE)):
        loss = model(spectrogram, sample_ids).loss
        loss.backward()
        worst = max(relative_error(p.grad, gradients[key].grad) for key, p in model.named_parameters())
        checks.append(Check(f"{name}: loss in float32", relative_error(loss, output.loss), tolerance))
        checks.append(Check(f"{name}: gradients in float32", worst, tolerance))
    if device.type == "cuda":  # Triton's interpreter can't multiply in bfloat16
        half = ours.to(torch.bfloat16)(spectrogram, sample_ids).loss
        checks.append(Check(f"{OURS}: loss in bfloat16", relative_error(half, output.loss), HALF_TOLERANCE))
    model = eager_model(cfg).to(device)
    checks.append(
        Check("eager: loss in float32", relative_error(model(spectrogram, noise), output.loss), OTHERS_TOLERANCE)
    )
    if device.type == "cuda":
        with torch.autocast("cuda", torch.float16):
            half = model(spectrogram, noise)
        checks.append(Check("eager: loss under autocast", relative_error(half, output.loss), HALF_TOLERANCE))
    return checks


def block_flops(num_tokens: int, width: int) -> float:
    """Linear maps 24 D^2 a token (qkv 6, projection 2, MLP 16), attention 4 N D a token."""
    return num_tokens * (24.0 * width**2 + 4.0 * num_tokens * width)


def forward_flops(cfg: Config) -> float:
    """Of one clip: encoder, decoder, embeddings and head."""
    return 1e9 * sum(gflop_parts(cfg).values())


def gflop_parts(cfg: Config) -> dict[str, float]:
    """Forward GFLOP of one clip, 2 for each multiplication of a matrix product; the encoder sees visible patches."""
    geometry: Geometry = cfg.model.geometry
    width, narrow = geometry.embed_dim, geometry.decoder_embed_dim
    prefix, pixels = int(cfg.model.cls_token), cfg.model.patch[0] * cfg.model.patch[1]
    visible, every = cfg.num_keep + prefix, cfg.num_patches + prefix
    embedding = 2.0 * cfg.num_keep * pixels * width
    bridge = 2.0 * visible * width * narrow
    head = 2.0 * (cfg.num_patches - cfg.num_keep) * narrow * pixels
    return {
        "encoder": geometry.depth * block_flops(visible, width) / 1e9,
        "decoder": geometry.decoder_depth * block_flops(every, narrow) / 1e9,
        "embeddings and head": (embedding + bridge + head) / 1e9,
    }


def all_targets(rows: Sequence[dict[str, Any]]) -> list[Target]:
    """What is promised for base at 80x208, at the largest micro-batch measured; ours also with compiled blocks."""
    timed = [row for row in rows if row["frames"] == 208 and "ms" in row]
    largest = max((row["micro_batch"] for row in timed), default=0)
    by_name = {row["implementation"]: row for row in timed if row["micro_batch"] == largest}
    result = []
    for name in (OURS, OURS_COMPILED):
        ours = by_name.get(name)
        for what, wanted, other in (("eager fp16", WANTED_EAGER, EAGER), ("SDPA compiled", WANTED_SDPA, SDPA_COMPILED)):
            there = ours and other in by_name
            reached = by_name[other]["ms"] / ours["ms"] if there else None
            result.append(Target(f"step, B = {largest}, {name}: {what} / ours", wanted, reached))
        result.append(Target(f"step, B = {largest}, {name}: MFU", WANTED_MFU, ours["mfu"] if ours else None))
    return result


def rows_table(rows: Sequence[dict[str, Any]]) -> str:
    """All rows, and how many times faster ours is at the same size."""
    ours = {
        (row["frames"], row["micro_batch"]): row["ms"] for row in rows if row["implementation"] == OURS and "ms" in row
    }
    lines = []
    for row in rows:
        place = f"80x{row['frames']} B = {row['micro_batch']}"
        if "ms" not in row:
            lines.append((place, row["implementation"], row["note"], *[""] * 4))
            continue
        base = ours.get((row["frames"], row["micro_batch"]))
        lines.append(
            (
                place,
                row["implementation"],
                f"{row['ms']:.1f}",
                f"{row['clips_per_second']:,.0f}",
                f"{row['mfu']:.1%}",
                f"{row['peak_bytes'] / 2**30:.1f}",
                f"{row['ms'] / base:.2f}" if base else "",
            )
        )
    return table(("step", "", "ms", "clips/s", "MFU", "peak GiB", "time / triton's"), lines)


def profile(folder: Path, device: torch.device, steps: int = 3, longest: int = 25) -> None:
    """Print and write the kernels that take most of our step."""
    cfg = config(SIZE, 208)
    variant = build(OURS, cfg, device)
    batches = [draw(cfg, 1024, 0, device)]
    run_steps(variant, batches, WARM_UP_STEPS)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        run_steps(variant, batches, steps)
    events = sorted(recorded.key_averages(), key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in events)
    lines = [
        (event.key[:90], event.count // steps, event.self_device_time_total / 1e3 / steps,
         f"{event.self_device_time_total / total:.1%}")
        for event in events[:longest]
    ]  # fmt: skip
    text = table(("kernel, base 80x208, micro-batch 1024", "calls a step", "ms a step", "share"), lines)
    text += f"\nall kernels: {total / 1e3 / steps:.2f} ms a step"
    print(text, flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"profile-{slug(environment()['device'])}.txt").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
