"""What torch.compile does for the base model's blocks on one GPU: `python -m benchmarks.compile`.

In: synthetic spectrograms that lie on the device already, 80x208, bfloat16. Timed, A B A B: blocks as written; as
engine.compile compiles them (`msm_dist.engine.compilation.COMPILER`); with kernels that Inductor chooses by timing
them; with CUDA graphs. Each in the bare model (forward and backward) and in the whole step of the engine that
`msm_dist.pretrain` builds (DeepSpeed, ZeRO-1); and the seconds of each one's first step, with an empty cache. Losses
and gradients are compared with the blocks as written first, in float32; a wrong variant is named and ends the script
with exit code 1. Writes benchmarks/results/compile-<device>.json.
"""

import argparse
import gc
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

from benchmarks import step
from benchmarks.measure import RESULTS, Budget, Check, relative_error, say_no_gpu, table, write_results
from msm_dist.config import Config
from msm_dist.engine.compilation import COMPILER
from msm_dist.model.mae import MaskedSpectrogramModel
from msm_dist.model.transformer import Block

MINUTES = 6.0
SIZE, FRAMES = "base", 208
MICRO_BATCHES = (2048, 256)
VARIANT_SECONDS = 60.0
"""What a variant may take in one subject, compiling included."""
EAGER, AS_TRAINED = "as written", "engine.compile"
COMPILERS: dict[str, dict[str, Any] | None] = {
    EAGER: None,
    AS_TRAINED: COMPILER,
    "kernels chosen by timing": {"backend": "inductor"},
    "CUDA graphs": {"backend": "inductor", "options": COMPILER["options"] | {"triton.cudagraphs": True}},
}


def main(arguments: Sequence[str]) -> int:
    """The exit code: 0 also where there is no GPU, 1 where a variant is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"time allowed ({MINUTES:g})")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args(arguments)
    if say_no_gpu("benchmarks.compile"):
        return 0
    device = torch.device("cuda")
    with step.joined_world():
        return compare(Budget(options.minutes), options.out, device)


def compare(budget: Budget, folder: Path, device: torch.device) -> int:
    """Check, measure, print, write."""
    cfg = step.config(SIZE, FRAMES)
    checks = check_all(cfg, device)
    wrong = [check for check in checks if check.wrong]
    for check in wrong:
        print(f"WRONG: {check.what}: error {check.error:.2e}, tolerance {check.tolerance:.1e}: nothing is timed")
    if wrong:
        return 1
    rows: list[dict[str, Any]] = []
    for subject, make in (("model", model_step), ("engine", step.engine_step)):
        rows += measure(subject, make, cfg, budget, device)
        content = {"checks": [check._asdict() for check in checks], "left_out": budget.left_out, "rows": rows}
        path = write_results(folder, "compile", content)
    print(f"\n{rows_table(rows)}\nwritten: {path}")
    return 0


def check_all(cfg: Config, device: torch.device) -> list[Check]:
    """Loss and gradients of every compiled variant against the blocks as written, in float32."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, compiler in COMPILERS.items():
        with fresh_compiler():
            model = model_of(cfg, compiler).to(device)
            loss = model(*step.draw(cfg, step.CHECK_CLIPS, 0, device)).loss
            loss.backward()
            gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
            found[name] = loss.detach().clone(), gradients
    exact = found.pop(EAGER)
    return [
        Check(f"{name}: {what}", relative_error(ours, theirs), step.FULL_TOLERANCE)
        for name, values in found.items()
        for what, ours, theirs in zip(("loss", "gradients"), values, exact, strict=True)
    ]


def measure(
    subject: str,
    make: Callable[[MaskedSpectrogramModel, Config, torch.device], Callable[[Tensor, Tensor], Any]],
    cfg: Config,
    budget: Budget,
    device: torch.device,
) -> list[dict[str, Any]]:
    """A row per micro-batch and variant: ms a step, peak memory, seconds of the first step."""
    rows = []
    for micro_batch in MICRO_BATCHES:
        variants, seconds = {}, {}
        batches = [step.draw(cfg, micro_batch, seed, device) for seed in range(2)]
        with fresh_compiler():
            for name, compiler in COMPILERS.items():
                if budget.allows(f"{subject}, micro-batch {micro_batch}, {name}", VARIANT_SECONDS):
                    before = torch.cuda.memory_allocated()
                    variants[name] = step.Variant(marked(make(model_of(cfg, compiler), cfg, device)))
                    variants[name].static_bytes = torch.cuda.memory_allocated() - before
                    seconds[name] = step.run_steps(variants[name], batches, 1)
            for name, found in step.take_turns(variants, batches).items():
                row = {"subject": subject, "micro_batch": micro_batch, "blocks": name, "first_step_s": seconds[name]}
                rows.append(row | found)
                print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
        del variants
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def model_of(cfg: Config, compiler: dict[str, Any] | None) -> MaskedSpectrogramModel:
    """The model of seed 0 with its blocks compiled so."""
    model = step.our_model(cfg, "auto")
    for block in [part for part in model.modules() if isinstance(part, Block)]:
        if compiler:
            block.in_training = torch.compile(block.in_training, fullgraph=True, dynamic=False, **compiler)
    return model


def model_step(model: MaskedSpectrogramModel, cfg: Config, device: torch.device) -> Callable[[Tensor, Tensor], Any]:
    """Forward and backward of the bare model in bfloat16."""
    model.to(device, torch.bfloat16)

    def forward_backward(spectrogram: Tensor, sample_ids: Tensor) -> None:
        model.zero_grad()
        model(spectrogram, sample_ids).loss.backward()

    return forward_backward


def marked(function: Callable[[Tensor, Tensor], Any]) -> Callable[[Tensor, Tensor], Any]:
    """The same step, telling CUDA graphs that what the one before has left in their memory is no longer needed."""

    def marked_step(spectrogram: Tensor, sample_ids: Tensor) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return function(spectrogram, sample_ids)

    return marked_step


@contextmanager
def fresh_compiler() -> Iterator[None]:
    """Nothing is compiled yet, on the disk neither; all variants of a subject may be."""
    with tempfile.TemporaryDirectory() as folder:
        before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        torch.compiler.reset()
        try:
            with torch._dynamo.config.patch(recompile_limit=4 * len(COMPILERS)):
                yield
        finally:
            if before is None:
                del os.environ["TORCHINDUCTOR_CACHE_DIR"]
            else:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


def rows_table(rows: Sequence[dict[str, Any]]) -> str:
    """All rows, and how many times faster each is than the blocks as written."""
    eager = {(row["subject"], row["micro_batch"]): row["ms"] for row in rows if row["blocks"] == EAGER and "ms" in row}
    lines = []
    for row in rows:
        what = (f"{row['subject']}, B = {row['micro_batch']}", row["blocks"], f"{row['first_step_s']:.1f}")
        if "ms" not in row:
            lines.append((*what, row["note"], "", ""))
            continue
        base = eager.get((row["subject"], row["micro_batch"]))
        speed_up = f"{base / row['ms']:.2f}" if base else ""
        lines.append((*what, f"{row['ms']:.1f}", f"{row['peak_bytes'] / 2**30:.1f}", speed_up))
    return table(("subject", "blocks", "first step s", "ms", "peak GiB", "times faster"), lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
