"""The kernels compile ahead of time for GPUs that this machine need not have, within the bounds stated here.

A plain test run compiles one variant per kernel and shape class for an H100 or H200; `make test-aot` does the same
for the other targets, and every variant for all of them.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from msm_kernels import configurations
from tests import aot

ROOT = Path(__file__).resolve().parent.parent
KIB = 1024


class Target(NamedTuple):
    """What a program may take on a GPU."""

    shared: int  # bytes of shared memory
    registers: int  # of a thread


TARGETS = {
    "cuda:80": Target(163 * KIB, 255),
    "cuda:90": Target(227 * KIB, 255),
    "cuda:100": Target(227 * KIB, 255),
    "hip:gfx942": Target(64 * KIB, 512),  # vector registers of both kinds
}
NVIDIA_REGISTERS = 65536  # of a multiprocessor
NVIDIA_WARP = 32


class Kernel(NamedTuple):
    """What is promised of a kernel."""

    wide: float
    """Least share of the bytes that it reads from global memory by instructions of 16 bytes a thread, in 16-bit types
    on sm_90, under Triton 3.6 as under 3.9. The rest are row indices, statistics and positions in float32."""
    narrow: float
    """The same for patches of one or two frames and with key masks, which are read byte by byte."""
    tensor_core: bool
    """Its products run on tensor cores."""


KERNELS = {
    "attention_short.short_forward": Kernel(0.75, 0.6, True),
    "attention_short.short_backward": Kernel(0.75, 0.6, True),
    "attention_tiled.tiled_forward": Kernel(0.95, 0.6, True),
    "attention_tiled.tiled_backward_queries": Kernel(0.95, 0.6, True),
    "attention_tiled.tiled_backward_keys": Kernel(0.55, 0.5, True),
    "masked_loss.loss_forward_kernel": Kernel(0.75, 0.25, False),
    "masked_loss.loss_backward_kernel": Kernel(0.75, 0.25, False),
    "patch_embedding.embed_forward_kernel": Kernel(0.7, 0.4, True),
    "patch_embedding.embed_backward_kernel": Kernel(0.7, 0.1, True),
    "patch_rows.restore_forward_kernel": Kernel(0.6, 0.6, False),
    "patch_rows.restore_backward_kernel": Kernel(0.6, 0.6, False),
    "patch_rows.select_forward_kernel": Kernel(0.6, 0.6, False),
    "patch_rows.select_backward_kernel": Kernel(0.6, 0.6, False),
    "chunked_sums.sum_chunks_kernel": Kernel(0.9, 0.9, False),
    "patch_drawing.mask_kernel": Kernel(0, 0, False),  # reads three numbers a clip
}
NARROW = ("masked", "80x2", "80x1")

# Bytes that a thread may spill, by target, kernel and bits of the type; none where not listed.
SPILLS = {
    "cuda:90": {
        # Three tf32 products of heads 80 and 128 wide hold more than 255 registers at the smallest tile.
        ("attention_short.short_backward", 32): 200,
        ("attention_tiled.tiled_forward", 32): 120,
        ("attention_tiled.tiled_backward_queries", 32): 904,
        # The assembler stops at 168 and 56 registers by itself, for more programs at a time.
        ("attention_short.short_backward", 16): 8,
        ("attention_tiled.tiled_backward_keys", 32): 8,
        ("patch_rows.restore_backward_kernel", 32): 8,
    },
    # The default tiles were chosen for sm_90, with its larger shared memory and its products out of it.
    "cuda:80": {
        ("attention_short.short_backward", 32): 144,
        ("attention_short.short_backward", 16): 152,
        ("attention_tiled.tiled_forward", 32): 120,
        ("attention_tiled.tiled_forward", 16): 424,
        ("attention_tiled.tiled_backward_queries", 32): 1456,
        ("attention_tiled.tiled_backward_queries", 16): 1264,
        ("attention_tiled.tiled_backward_keys", 16): 48,
    },
    "cuda:100": {
        ("attention_short.short_backward", 32): 200,
        ("attention_short.short_backward", 16): 32,
        ("attention_tiled.tiled_forward", 32): 128,
        ("attention_tiled.tiled_backward_queries", 32): 928,
        ("masked_loss.loss_backward_kernel", 32): 8,
        ("patch_embedding.embed_forward_kernel", 16): 8,
        ("patch_embedding.embed_backward_kernel", 16): 8,
    },
    "hip:gfx942": {
        ("attention_short.short_backward", 16): 84,
        ("attention_tiled.tiled_backward_queries", 16): 504,
        ("attention_tiled.tiled_backward_keys", 16): 700,
        ("patch_embedding.embed_backward_kernel", 16): 8,
    },
}

# Kernels that Triton can't compile for a target, and why.
CAN_NOT_COMPILE: dict[tuple[str, str], str] = {}


def compiled(folder: Path, *arguments: str) -> list[aot.Compiled]:
    """What `python -m tests.aot` finds, in a process without the interpreter."""
    table, cache = folder / "table.json", folder / "cache"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.aot", "--json", str(table), *arguments],
        cwd=ROOT,
        env=environment | {"TRITON_CACHE_DIR": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout)
    assert table.exists()
    assert not cache.exists(), "compiled into a cache that outlives the run, and may have read from it"
    results = [aot.Compiled(**fields) for fields in json.loads(table.read_text(encoding="utf-8"))]
    assert done.returncode == int(any(result.error for result in results))
    return results


def check(results: list[aot.Compiled]) -> None:
    """Every promise of this file for these results, all that is broken told at once."""
    broken = [f"{named(result)}: {fault}" for result in results for fault in faults(result)]
    broken += untrue_exceptions(results)
    broken += [f"{name}: no variant launches it" for name in sorted(KERNELS.keys() - {one.kernel for one in results})]
    assert not broken, "\n".join(["", *broken])


def named(result: aot.Compiled) -> str:
    return f"{result.kernel} {result.variants[0]} {result.dtype} {result.target}"


def faults(result: aot.Compiled) -> list[str]:
    """Every promise that a result breaks."""
    if result.kernel not in KERNELS:
        return ["not in KERNELS: nothing is promised of it"]
    if result.error:
        return [] if (result.kernel, result.target) in CAN_NOT_COMPILE else [result.error]
    target, kernel = TARGETS[result.target], KERNELS[result.kernel]
    found = []
    if result.atomics:
        found.append(f"{', '.join(sorted(set(result.atomics)))}: a sum would depend on the order of programs")
    if result.shared > target.shared:
        found.append(f"{result.shared} bytes of shared memory of {target.shared}")
    if result.registers > target.registers:
        found.append(f"{result.registers} registers of {target.registers}")
    if "cuda" in result.target and result.registers * result.warps * NVIDIA_WARP > NVIDIA_REGISTERS:
        found.append(f"{result.warps} warps of {result.registers} registers do not fit a multiprocessor")
    bits = 32 if result.dtype == "float32" else 16
    spills = SPILLS[result.target].get((result.kernel, bits), 0)
    wide = kernel.narrow if any(word in result.variants[0] for word in NARROW) else kernel.wide
    # Signs of a slow kernel: where its launch parameters were measured, the clock has the last word.
    if result.spills > spills and not result.measured:
        found.append(f"spills {result.spills} bytes, {spills} allowed")
    if result.wide_loads < wide and (result.target, bits) == ("cuda:90", 16) and not result.measured:
        found.append(f"{result.wide_loads:.0%} of the bytes in loads of 16, {wide:.0%} promised")
    if kernel.tensor_core and not result.tensor_core:
        found.append("its products are not on tensor cores")
    return found


def untrue_exceptions(results: list[aot.Compiled]) -> list[str]:
    """Entries of CAN_NOT_COMPILE for the targets of these results that compile after all."""
    failed = {(result.kernel, result.target) for result in results if result.error}
    targets = {result.target for result in results}
    return [
        f"{kernel} compiles for {target}: take it out of CAN_NOT_COMPILE"
        for kernel, target in CAN_NOT_COMPILE
        if target in targets and (kernel, target) not in failed
    ]


def test_one_variant_of_each_kernel_and_shape_class_for_hopper(tmp_path):
    check(compiled(tmp_path))


@pytest.fixture
def asked_for(request: pytest.FixtureRequest) -> None:
    if "aot" not in request.config.option.markexpr:
        pytest.skip("takes minutes: make test-aot")


@pytest.mark.aot
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("target", ["cuda:80", "cuda:100", "hip:gfx942"])
def test_one_variant_of_each_kernel_and_shape_class_for_other_gpus(asked_for, tmp_path, target):
    check(compiled(tmp_path, "--target", target))


@pytest.mark.aot
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("target", list(TARGETS))
def test_every_variant(asked_for, tmp_path, target):
    results = compiled(tmp_path, "--all", "--target", target)
    check(results)
    # Nothing in the committed table for this GPU is left uncompiled.
    asked = {name for result in results for name in result.configurations}
    kernels = configurations.table().get(aot.capability_of(target), {})
    committed = {
        f"{kernel}: {shape_class}: {dtype}"
        for kernel, shape_classes in kernels.items()
        if kernel != "measured"
        for shape_class, dtypes in shape_classes.items()
        for dtype in dtypes
    }
    assert committed <= asked


GOOD = aot.Compiled(
    "attention_short.short_forward",
    "bfloat16",
    "cuda:90",
    measured=False,
    variants=["N=66 D=64"],
    warps=8,
    registers=200,
    shared=200 * KIB,
    wide_loads=1.0,
    tensor_core=8,
)


@pytest.mark.parametrize(
    "change, fault",
    [
        ({"error": "CompilationError: no"}, "CompilationError: no"),
        ({"kernel": "attention_short.unheard_of"}, "not in KERNELS"),
        ({"atomics": ["atom.global.add.f32"]}, "atom.global.add.f32"),
        ({"shared": 228 * KIB}, "bytes of shared memory"),
        ({"target": "hip:gfx942"}, f"{200 * KIB} bytes of shared memory of {64 * KIB}"),
        ({"registers": 256}, "256 registers of 255"),
        ({"warps": 16}, "16 warps of 200 registers do not fit"),
        ({"spills": 8}, "spills 8 bytes, 0 allowed"),
        ({"wide_loads": 0.74}, "74% of the bytes in loads of 16, 75% promised"),
        ({"tensor_core": 0}, "not on tensor cores"),
    ],
)
def test_every_bound_can_be_broken(change, fault):
    assert faults(GOOD) == []
    (found,) = faults(replace(GOOD, **change))
    assert fault in found


def test_a_measured_configuration_may_spill_and_load_as_it_likes():
    assert faults(replace(GOOD, spills=8, wide_loads=0.1, measured=True)) == []
    assert faults(replace(GOOD, shared=228 * KIB, measured=True))


def test_masks_and_narrow_patches_have_a_bound_of_their_own():
    masked = replace(GOOD, variants=["N=66 D=64 masked"], wide_loads=0.7)
    assert faults(masked) == []
    assert faults(replace(masked, wide_loads=0.5))


def test_an_exception_excuses_and_must_stay_true(monkeypatch):
    monkeypatch.setitem(CAN_NOT_COMPILE, (GOOD.kernel, GOOD.target), "some reason")
    assert faults(replace(GOOD, error="CompilationError: no")) == []
    assert untrue_exceptions([replace(GOOD, error="CompilationError: no")]) == []
    assert untrue_exceptions([GOOD])


def test_what_is_read_from_the_assembly():
    ptx = """
        @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
        @%p1 ld.global.L1::evict_last.L2::cache_hint.v2.b64 { %rd2, %rd3 }, [ %rd1 + 16 ], %rd9;
        @%p2 ld.global.b16 %rs1, [ %rd4 + 0 ];
        ld.global.nc.v2.f32 {%f1, %f2}, [%rd5];
        cp.async.cg.shared.global [ %r6 + 0 ], [ %rd6 + 0 ], 0x10, %r7;
        cp.async.ca.shared.global [ %r6 + 0 ], [ %rd6 + 0 ], 4;
        ld.param.b64 %rd7, [kernel_param_0];
        ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r8];
    """
    assert aot.wide_share(ptx) == pytest.approx(48 / (48 + 2 + 8 + 4))
    assert aot.wide_share("") == 0


@pytest.mark.parametrize(
    "instruction, is_atomic",
    [
        ("atom.global.gpu.acq_rel.add.f32 %f1, [%rd1], %f2;", True),
        ("red.global.add.f32 [%rd1], %f2;", True),
        ("atom.add.f32 %f1, [%rd1], %f2;", True),
        ("global_atomic_add_f32 v0, v1, s[0:1]", True),
        ("buffer_atomic_add v0, v1, s[0:3], 0", True),
        ("atom.shared.add.u32 %r1, [%r2], 1;", False),
        ("redux.sync.add.s32 %r1, %r2, -1;", False),
        ("ld.global.b32 %r1, [%rd1];", False),
    ],
)
def test_atomics_on_global_memory_are_found(instruction, is_atomic):
    assert bool(aot.ATOMIC.findall(instruction)) == is_atomic


@pytest.mark.parametrize(
    "instruction, is_tensor_core",
    [
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", True),
        ("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16", True),
        ("tcgen05.mma.cta_group::1.kind::f16", True),
        ("v_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1], v[2:3], a[0:15]", True),
        ("wgmma.fence.sync.aligned;", False),
        ("fma.rn.f32 %f1, %f2, %f3, %f4;", False),
    ],
)
def test_tensor_core_instructions_are_found(instruction, is_tensor_core):
    assert bool(aot.TENSOR_CORE.findall(instruction)) == is_tensor_core


def test_resources_of_an_amd_kernel_are_those_of_its_notes():
    notes = "    .private_segment_fixed_size: 12\n    .vgpr_count:     142\n    .vgpr_spill_count: 3\n"
    assert aot.amd_resources(notes) == (142, 12)


def test_the_interpreter_compiles_nothing_and_is_refused():
    done = subprocess.run(
        [sys.executable, "-m", "tests.aot"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].endswith(
        "TRITON_INTERPRET is set, and the interpreter compiles nothing: unset it"
    )
