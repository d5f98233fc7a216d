"""Compile every Triton kernel ahead of time, for GPUs that this machine need not have, and tell what came out.

`python -m tests.aot` compiles one variant per kernel and shape class for an H100 or H200 (cuda:90); `--all` every
variant; `--target cuda:80 hip:gfx942` others; `--json FILE` writes the table as it is checked by test_aot.py. A
variant is a call of a launcher with tensors that have shapes and no memory; the committed configurations of the
target are those it compiles under. Fails (exit 1) where a kernel does not compile.

Each distinct kernel is compiled once, in two processes, with a fresh cache: nothing that Triton kept from an
earlier run hides a failure. Must run without TRITON_INTERPRET, under which there is nothing to compile.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from msm_kernels import (
    attention,
    attention_short,
    attention_tiled,
    backend,
    configurations,
    masked_loss,
    patch_drawing,
    patch_embedding,
    patch_rows,
)

TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
PROCESSES = 2

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BANDS, FRAMES, BATCH = 80, 208, 2048
PATCH_SIZES = ((16, 16), (16, 8), (16, 4), (8, 16), (8, 8), (80, 4), (80, 2), (80, 1))
WIDTHS = (192, 384, 512, 768, 1024, 1280, 1536)
HEAD_WIDTHS = (32, 64, 80, 128)
SEQUENCES = (16, 17, 32, 48, 64, 66, 96, 103, 128, 191, 256, 261, 512, 513, 1024)


class Variant(NamedTuple):
    """One call of a launcher."""

    shape: str
    dtype: torch.dtype
    call: Callable[[], object]
    quick: bool
    """One of those that stand for their kernel and shape class in a plain test run."""


@dataclass
class Compiled:
    """What came out for one kernel."""

    kernel: str
    dtype: str
    target: str
    measured: bool
    """Whether its launch parameters come from the committed table."""
    variants: list[str] = field(default_factory=list)
    """The calls that launch it."""
    configurations: list[str] = field(default_factory=list)
    """What they asked the table for, as "kernel: shape class: dtype"."""
    error: str | None = None
    seconds: float = 0.0
    warps: int = 0
    registers: int = 0
    spills: int = 0
    """Bytes a thread, in NVIDIA's stack frame or AMD's scratch: these kernels keep nothing else there."""
    shared: int = 0
    """Bytes of shared memory (AMD: LDS) of a program."""
    wide_loads: float = 0.0
    """Share of the bytes read from global memory by instructions of 16 bytes a thread or more; NVIDIA only."""
    tensor_core: int = 0
    """Instructions for the tensor (AMD: matrix) cores."""
    atomics: list[str] = field(default_factory=list)
    """Atomic instructions on global memory."""


# --- variants


def variants() -> list[Variant]:
    """Every variant, the same list in every process."""
    return [*_loss_variants(), *_attention_variants(), *_patch_variants()]


def _loss_variants() -> Iterator[Variant]:
    d_loss = _empty(dtype=torch.float32)
    for patch_size, normalize, dtype in itertools.product(PATCH_SIZES, (False, True), DTYPES):
        spectrogram, _, ids_masked, _ = _patches(patch_size)
        prediction = _empty(*ids_masked.shape, patch_size[0] * patch_size[1], dtype=dtype)
        arguments = (prediction, spectrogram, ids_masked, patch_size, normalize)
        quick = dtype == torch.bfloat16 and normalize or patch_size == (16, 16) and not normalize
        shape = f"{_times(patch_size)}{' normalized' if normalize else ''}"
        yield Variant(shape, dtype, partial(masked_loss.launch_forward, *arguments), quick)
        yield Variant(shape, dtype, partial(masked_loss.launch_backward, d_loss, *arguments), quick)


def _attention_variants() -> Iterator[Variant]:
    H = 12
    for num_tokens, width, masked, dtype in itertools.product(SEQUENCES, HEAD_WIDTHS, (False, True), DTYPES):
        qkv = _empty(BATCH, num_tokens, 3 * H * width, dtype=dtype)
        out = _empty(BATCH, num_tokens, H * width, dtype=dtype)
        lse = _empty(BATCH, H, num_tokens, dtype=torch.float32)
        mask = _empty(BATCH, num_tokens, dtype=torch.bool) if masked else None
        shape = f"N={num_tokens} D={width}{' masked' if masked else ''}"
        # All lengths and widths plainly, masks and float32 once in each regime.
        quick = (dtype == torch.bfloat16 and not masked) or (
            width == 64
            and (
                (dtype == torch.bfloat16 and num_tokens in (66, 1024))
                or (dtype == torch.float32 and not masked and num_tokens in (17, 1024))
            )
        )
        yield Variant(shape, dtype, partial(attention.launch_forward, qkv, H, mask), quick)
        yield Variant(shape, dtype, partial(attention.launch_backward, out, qkv, out, lse, H, mask), quick)


def _patch_variants() -> Iterator[Variant]:
    sample_ids = _empty(BATCH, 3, dtype=torch.int64)
    for num_patches in (65, 104, 208, 260, 512, 1024):
        call = partial(patch_drawing.launch_random_masking, 7, sample_ids, num_patches, num_patches // 4)
        yield Variant(f"L={num_patches}", torch.int64, call, num_patches in (65, 512))
    for patch_size, width, dtype in itertools.product(PATCH_SIZES, WIDTHS, DTYPES):
        yield from _embedding_variants(patch_size, width, dtype)
    for width, dtype in itertools.product(WIDTHS, DTYPES):
        yield from _row_variants((16, 16), width, dtype)
    for patch_size in PATCH_SIZES[1:]:
        yield from _row_variants(patch_size, 384, torch.bfloat16)


def _embedding_variants(patch_size: tuple[int, int], width: int, dtype: torch.dtype) -> Iterator[Variant]:
    pixels = patch_size[0] * patch_size[1]
    spectrogram, ids_keep, _, ids_restore = _patches(patch_size)
    weight, bias = _empty(width, pixels, dtype=dtype), _empty(width, dtype=dtype)
    positions = _empty(ids_restore.shape[1], width, dtype=torch.float32)
    forward = partial(patch_embedding.launch_embed_forward, spectrogram, ids_keep, weight, bias, positions, patch_size)
    few = partial(
        patch_embedding.launch_embed_forward, spectrogram[:8], ids_keep[:8], weight, bias, positions, patch_size
    )
    d_tokens = _empty(*ids_keep.shape, width, dtype=dtype)
    backward = partial(patch_embedding.launch_embed_backward, d_tokens, spectrogram, ids_keep, patch_size, dtype)
    shape = f"{_times(patch_size)} D={width}"
    base = width == 768
    quick = base and (dtype == torch.bfloat16 or patch_size == (16, 16))
    yield Variant(shape, dtype, forward, quick)
    yield Variant(shape, dtype, backward, quick)
    if base:
        yield Variant(f"{shape} few clips", dtype, few, quick and patch_size == (16, 16))


def _row_variants(patch_size: tuple[int, int], width: int, dtype: torch.dtype) -> Iterator[Variant]:
    """Restoring and selecting, with a CLS token."""
    _, ids_keep, ids_masked, ids_restore = _patches(patch_size)
    num_keep, num_tokens = ids_keep.shape[1], ids_restore.shape[1] + 1
    tokens, mask_token = _empty(BATCH, num_keep + 1, width, dtype=dtype), _empty(1, 1, width, dtype=dtype)
    positions = _empty(num_tokens, width, dtype=torch.float32)
    restored = _empty(BATCH, num_tokens, width, dtype=dtype)
    selected = _empty(*ids_masked.shape, width, dtype=dtype)
    calls = (
        partial(patch_rows.launch_restore_forward, tokens, ids_restore, mask_token, positions, 1),
        partial(patch_rows.launch_restore_backward, restored, ids_restore, num_keep, 1, dtype),
        partial(patch_rows.launch_select_forward, restored, ids_masked, 1),
        partial(patch_rows.launch_select_backward, selected, ids_restore, 1),
    )
    quick = patch_size == (16, 16) and dtype == torch.bfloat16
    for call in calls:
        yield Variant(f"{_times(patch_size)} D={width}", dtype, call, quick)


def _patches(patch_size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Spectrogram, ids_keep, ids_masked and ids_restore of the base recipe."""
    num_patches = (BANDS // patch_size[0]) * (FRAMES // patch_size[1])
    num_keep = num_patches // 4
    ids = (_empty(BATCH, size, dtype=torch.int64) for size in (num_keep, num_patches - num_keep, num_patches))
    return _empty(BATCH, 1, BANDS, FRAMES, dtype=torch.float32), *ids


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _times(patch_size: tuple[int, int]) -> str:
    return "{}x{}".format(*patch_size)


# --- compiling


def capability_of(target: str) -> str:
    """How the table of configurations writes a target: "9.0", "gfx942"."""
    name, _, arch = target.partition(":")
    return f"{arch[:-1]}.{arch[-1]}" if name == "cuda" else arch


class Driver:
    """What Triton asks of a driver where nothing is launched."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Launch(NamedTuple):
    """A kernel that a variant launches."""

    kernel: str
    key: str
    configuration: str
    measured: bool


class Compiler:
    """Turns launches into compilations for one target, of chosen kernels only."""

    def __init__(self, target: str):
        name, _, arch = target.partition(":")
        cuda = name == "cuda"
        self.target = target
        self.wanted: str | None = None  # the key of the kernel to compile; none: none
        self.found: list[Launch] = []
        self.kernel = None  # what came out
        self.asked, self.measured = "", False
        triton.runtime.driver.set_active(Driver(GPUTarget(name, int(arch) if cuda else arch, 32 if cuda else 64)))
        triton.knobs.runtime.jit_cache_hook = self._skip
        # The table's entries for the target are those that a launcher finds, whatever device it asks about.
        backend.capability = configurations.capability = lambda device: capability_of(target)
        for module in (attention_short, attention_tiled, masked_loss, patch_drawing, patch_embedding, patch_rows):
            module.configuration = self._configuration
        run = JITFunction.run

        def compile_only(function, *args, grid, warmup, **kwargs):
            num_found = len(self.found)
            kernel = run(function, *args, grid=grid, warmup=True, **kwargs)
            # Triton asks nothing about a kernel that this process has compiled before.
            if len(self.found) > num_found and self.found[-1].key == self.wanted:
                self.kernel = kernel

        JITFunction.run = compile_only

    def plan(self, variant: Variant) -> list[Launch]:
        """The kernels that a variant launches."""
        self.found, self.wanted = [], None
        variant.call()
        return self.found

    def compile(self, variant: Variant, wanted: str):
        """One kernel of a variant, by its key."""
        self.wanted, self.kernel = wanted, None
        variant.call()
        if self.kernel is None:
            raise LookupError("the variant launches another kernel than when it was planned")
        return self.kernel

    def _skip(self, *, key: str, fn, **_) -> bool:
        """Called by Triton where it is about to compile; true keeps it from that."""
        name = f"{fn.module.rpartition('.')[2]}.{fn.name}"
        self.found.append(Launch(name, f"{name} {key}", self.asked, self.measured))
        return self.found[-1].key != self.wanted

    def _configuration(self, kernel: str, shape_class: str, dtype: torch.dtype, device: torch.device, default):
        found = configurations.configuration(kernel, shape_class, dtype, device, default)
        self.asked, self.measured = f"{kernel}: {shape_class}: {_name(dtype)}", found != default
        return found


def compile_all(target: str, quick: bool, progress: Callable[[Compiled], None]) -> list[Compiled]:
    """Every distinct kernel of the variants, or of the quick ones, in the order of the variants."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, spawn, initializer=_start_worker, initargs=(target,)) as pool:
        futures = [pool.submit(_compile, *job) for job in pool.submit(_plan, quick).result()]
        for future in futures:
            progress(future.result())
        return [future.result() for future in futures]


def _start_worker(target: str) -> None:
    global _compiler, _variants
    _compiler, _variants = Compiler(target), variants()


def _plan(quick: bool) -> list[tuple[int, str, Compiled]]:
    """The kernels to compile: index of the first variant that launches it, key, and the result to fill."""
    jobs: dict[str, tuple[int, str, Compiled]] = {}
    for index, variant in enumerate(_variants):
        if quick and not variant.quick:
            continue
        for launch in _compiler.plan(variant):
            result = Compiled(launch.kernel, _name(variant.dtype), _compiler.target, launch.measured)
            _, _, result = jobs.setdefault(launch.key, (index, launch.key, result))
            result.variants.append(variant.shape)
            result.configurations.append(launch.configuration)
    return list(jobs.values())


def _compile(index: int, key: str, result: Compiled) -> Compiled:
    start = time.perf_counter()
    try:
        kernel = _compiler.compile(_variants[index], key)
    except Exception as error:  # whatever the compiler raises is this kernel's result
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        result.error = f"{type(error).__name__}: {lines[-1]}"
        return result
    result.seconds = time.perf_counter() - start
    result.warps = kernel.metadata.num_warps
    result.shared = kernel.metadata.shared
    text = kernel.asm["ptx" if "ptx" in kernel.asm else "amdgcn"]
    if "ptx" in kernel.asm:
        result.registers, result.spills = nvidia_resources(kernel.asm["cubin"])
        result.wide_loads = wide_share(text)
    else:
        result.registers, result.spills = amd_resources(text)
    result.tensor_core, result.atomics = len(TENSOR_CORE.findall(text)), ATOMIC.findall(text)
    return result


def nvidia_resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"\b{word}:(\d+)", text)[1]) for word in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def amd_resources(text: str) -> tuple[int, int]:
    """Vector registers, with those of the matrix cores, and bytes of scratch a thread."""
    registers, scratch = (
        int(re.search(rf"\.{word}:\s+(\d+)", text)[1]) for word in ("vgpr_count", "private_segment_fixed_size")
    )
    return registers, scratch


TENSOR_CORE = re.compile(r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma\b|v_mfma)[\w.:]*")
ATOMIC = re.compile(r"\b(?:(?:atom|red)\.(?!\S*shared)\S+|(?:global|flat|buffer)_atomic_\w+)")
LOAD = re.compile(r"\bld\.global(?:\.(?!v\d|[bfsu]\d)[\w:]+)*(?:\.v(\d))?\.[bfsu](\d+)")
COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global\S* *\[[^]]*\], *\[[^]]*\], *(0x[0-9a-f]+|\d+)")


def wide_share(ptx: str) -> float:
    """Share of the bytes read from global memory in PTX by instructions of 16 bytes a thread."""
    sizes = [int(number or 1) * int(bits) // 8 for number, bits in LOAD.findall(ptx)]
    sizes += [int(size, 0) for size in COPY.findall(ptx)]
    return sum(size for size in sizes if size >= 16) / max(sum(sizes), 1)


# --- the table


HEADER = ("kernel", "variant", "dtype", "target", "warps", "regs", "spills", "shared", "wide", "mma", "s")
WIDTHS_OF_COLUMNS = (38, 26, 9, 11, 5, 4, 6, 7, 5, 5, 5)


def row(result: Compiled) -> tuple:
    first, *others = result.variants
    named = (result.kernel, f"{first} (+{len(others)})" if others else first, result.dtype, result.target)
    if result.error:
        return *named, result.error
    resources = (result.warps, result.registers, result.spills, result.shared)
    return *named, *resources, f"{result.wide_loads:.0%}", result.tensor_core, f"{result.seconds:.1f}"


def show(values: tuple) -> None:
    print(*(f"{value:<{width}}" for value, width in zip(values, WIDTHS_OF_COLUMNS, strict=False)), flush=True)


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.aot", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--target", nargs="+", default=["cuda:90"], help=f"of {', '.join(TARGETS)}, or like them")
    parser.add_argument("--all", action="store_true", help="every variant, not one per kernel and shape class")
    parser.add_argument("--json", type=Path, help="write the table there")
    arguments = parser.parse_args()
    if backend.INTERPRETED:
        print("TRITON_INTERPRET is set, and the interpreter compiles nothing: unset it", file=sys.stderr)
        return 2
    results = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        show(HEADER)
        for target in arguments.target:
            results += compile_all(target, not arguments.all, lambda result: show(row(result)))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(result) for result in results]), encoding="utf-8")
    failed = sum(result.error is not None for result in results)
    print(f"{len(results)} kernels, {failed} of them do not compile")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
