"""What only a GPU can show: the numbers of the CPU, bfloat16 and large tensors in the compiled kernels, whole runs."""

import copy
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from msm_dist.config import Features, Model
from msm_dist.engine.optim import build_optimizer, lr_at
from msm_dist.features import LogMel
from msm_dist.model.mae import MaskedSpectrogramModel
from msm_kernels import reference
from msm_kernels.attention import attention
from msm_kernels.backend import describe
from msm_kernels.masked_loss import masked_patch_loss
from msm_kernels.patch_masking import (
    Masking,
    embed_visible_patches,
    random_masking,
    restore_tokens,
    select_masked_tokens,
)
from tests.kernel_checks import draw, poison_new_tensors, relative_error
from tests.processes import HERE

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
SANITIZER_SECONDS = 90
SANITIZER_EXIT_CODE = 9

# --- first, since they take longest: compute-sanitizer on every op


def sanitize(tool: str, *arguments: str) -> subprocess.Popen[str]:
    """Start `python -m tests.every_op` under a tool of compute-sanitizer; skips where there is none."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on the PATH: the kernels' memory accesses were not checked")
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(SANITIZER_EXIT_CODE), sys.executable]
    return subprocess.Popen(
        [*command, "-m", "tests.every_op", *arguments],
        cwd=HERE.parent,
        # Without torch's caching every tensor is an allocation of its own, whose end the tool knows.
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def said(child: subprocess.Popen[str], tool: str) -> str:
    """All it says. Skips, with the reason, when it takes too long or the machine does not let it look at the device."""
    try:
        output, _ = child.communicate(timeout=SANITIZER_SECONDS)
    except subprocess.TimeoutExpired:
        pytest.skip(f"compute-sanitizer --tool {tool} did not finish in {SANITIZER_SECONDS} s: nothing is shown")
    finally:
        child.kill()
        child.wait()
    for sign in ("Device not supported", "Unable to", "Internal Sanitizer Error", "Failed to initialize"):
        if sign in output and "every op ran" not in output:
            pytest.skip(f"compute-sanitizer refuses this machine: {output.strip().splitlines()[-1]}")
    return output


def test_memcheck_finds_nothing_in_any_op():
    planted, child = sanitize("memcheck", "planted"), sanitize("memcheck")
    try:
        fault = said(planted, "memcheck")
        if planted.returncode != SANITIZER_EXIT_CODE or "Invalid __global__ write" not in fault:
            pytest.skip(f"compute-sanitizer does not see a planted fault on this machine: {fault[-500:]}")
        output = said(child, "memcheck")
    finally:
        child.kill()
    assert child.returncode == 0, output[-4000:]
    assert "every op ran" in output
    assert "ERROR SUMMARY: 0 errors" in output


def test_racecheck_finds_nothing_in_any_op():
    child = sanitize("racecheck")
    output = said(child, "racecheck")
    assert child.returncode == 0, output[-4000:]
    assert "every op ran" in output
    assert "RACECHECK SUMMARY: 0 hazards" in output


# --- the numbers of the CPU


def relative(value: Tensor, reference: Tensor) -> float:
    reference = reference.double()
    return ((value.cpu().double() - reference).norm() / reference.norm()).item()


def test_log_mel_is_that_of_the_cpu():
    waveform = (torch.randn(4, 33520, generator=torch.Generator().manual_seed(0)) * 3000).to(torch.int16)
    on_cpu = LogMel(Features())(waveform)
    on_gpu = LogMel(Features()).cuda()(waveform.cuda())
    assert on_gpu.dtype == torch.float32
    assert relative(on_gpu, on_cpu) < 1e-6


def model_and_input(seed: int = 0) -> tuple[MaskedSpectrogramModel, Tensor, Tensor]:
    """A tiny model whose back-end is "auto": the reference on the CPU, Triton on a GPU."""
    model = MaskedSpectrogramModel(Model(size="tiny"), 80, 208, seed)
    spectrogram = torch.randn(8, 1, 80, 208, generator=torch.Generator().manual_seed(seed))
    sample_ids = torch.stack([torch.full((8,), 3), torch.arange(8) * 1000, torch.zeros(8, dtype=torch.int64)], dim=1)
    return model, spectrogram, sample_ids


def test_auto_is_triton_here():
    assert describe("auto", CUDA).startswith("Triton")


def test_masks_are_those_of_the_cpu_bit_for_bit():
    model, _, sample_ids = model_and_input()
    for on_cpu, on_gpu in zip(model.draw_masking(sample_ids), model.draw_masking(sample_ids.cuda()), strict=True):
        assert torch.equal(on_cpu, on_gpu.cpu())


def test_loss_and_gradients_are_those_of_the_cpu():
    model, spectrogram, sample_ids = model_and_input()
    on_cpu = model(spectrogram, sample_ids)
    on_cpu.loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    twin = model_and_input()[0].cuda()
    on_gpu = twin(spectrogram.cuda(), sample_ids.cuda())
    on_gpu.loss.backward()
    assert relative(on_gpu.loss, on_cpu.loss.detach()) < 1e-5
    for name, parameter in twin.named_parameters():
        assert relative(parameter.grad, expected[name]) < 1e-4, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_backward_passes_give_the_same_bits(dtype):
    gradients = []
    for _ in range(2):
        model, spectrogram, sample_ids = model_and_input()
        model = model.to("cuda", dtype)
        model(spectrogram.cuda(), sample_ids.cuda()).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_engine_on_a_gpu_starts_resumes_and_refuses_as_on_the_cpu(tmp_path):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed: the engine is not tested")
    from tests.engine_matrix import CASES, name_of, on_one_process

    # A GPU's products and its fused AdamW sum in other orders, and 16-bit roundings may then fall the other way.
    bounds = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}
    for case, result in zip(CASES, on_one_process(CASES, tmp_path), strict=True):
        for promise in ("rng_untouched", "start_exact", "resumed_exact"):
            assert result[promise], (name_of(case), promise)
        assert result.get("unchanged_by_nan", case[1] == "fp16"), name_of(case)
        assert result["error"] < bounds[case[1]], name_of(case)


def test_gradients_of_the_base_model_are_the_same_bits_again():
    model = MaskedSpectrogramModel(Model(size="base", backend="triton"), 80, 208, 0).to(CUDA, torch.bfloat16)
    spectrogram = torch.randn(512, 1, 80, 208, device=CUDA)
    sample_ids = torch.randint(0, 1000, (512, 3), device=CUDA)
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(spectrogram, sample_ids).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_never_waits_for_the_device(dtype):
    model, spectrogram, sample_ids = model_and_input()
    model, spectrogram, sample_ids = model.to(CUDA, dtype), spectrogram.to(CUDA), sample_ids.to(CUDA)
    model(spectrogram, sample_ids).loss.backward()  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(spectrogram, sample_ids).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- 200 steps of training

STEPS, WINDOW = 200, 20
CURVES = [
    # Largest relative difference of the loss of any step, and of its mean over 20 steps: (dtype, both, reason). On a
    # CPU initial weights that differ by 1e-6 (float32) and 2e-3 (bfloat16) gave 7e-6 and 2e-6, 1.3e-2 and 4e-3.
    (torch.float32, 1e-3, 3e-4, "sums in another order, and products of three tf32 ones each"),
    (torch.bfloat16, 5e-2, 1.5e-2, "each kernel rounds to 8 bits in its own places"),
]


def sounds(step: int) -> tuple[Tensor, Tensor]:
    """A batch of 32, a pure function of the step: planes over band and frame, each clip its own, in noise.

    What is hidden follows from what is visible elsewhere in the clip: only attention can bring it over.
    """
    generator = torch.Generator().manual_seed(step)
    level, slope, drift = torch.randn(3, 32, 1, 1, generator=generator)
    frame, band = torch.linspace(-1, 1, 208), torch.linspace(-1, 1, 80)[:, None]
    noise = 0.1 * torch.randn(32, 80, 208, generator=generator)
    clips = torch.arange(32)
    sample_ids = torch.stack([torch.full_like(clips, step), clips, torch.zeros_like(clips)], dim=1)
    return (level + slope * band + drift * frame + noise).unsqueeze(1).to(CUDA), sample_ids.to(CUDA)


def loss_curve(backend: str, dtype: torch.dtype) -> Tensor:
    """The losses of a tiny model in `dtype`, trained by AdamW on float32 masters."""
    masters = MaskedSpectrogramModel(Model(size="tiny", backend=backend), 80, 208, 0).to(CUDA)
    model = copy.deepcopy(masters).to(dtype)
    optimizer = build_optimizer(masters, (0.9, 0.95), 0.05, CUDA)
    pairs = list(zip(masters.parameters(), model.parameters(), strict=True))
    losses = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, 5e-4, 20, STEPS)
        loss = model(*sounds(step)).loss
        loss.backward()
        losses.append(loss.detach())
        for master, parameter in pairs:
            master.grad, parameter.grad = parameter.grad.float(), None
        optimizer.step()
        with torch.no_grad():
            for master, parameter in pairs:
                parameter.copy_(master)
    return torch.stack(losses).cpu()


@pytest.mark.parametrize("dtype, any_step, mean_of_steps, reason", CURVES)
def test_training_under_triton_and_reference_gives_one_loss_curve(dtype, any_step, mean_of_steps, reason):
    ours, expected = loss_curve("triton", dtype), loss_curve("reference", dtype)
    means, expected_means = (losses.view(-1, WINDOW).mean(dim=1) for losses in (ours, expected))
    assert expected_means[-1] < 0.5 * expected_means[0], "little was learnt: the curves show little"
    assert ((ours - expected).abs() / expected).max() < any_step, reason
    assert ((means - expected_means).abs() / expected_means).max() < mean_of_steps, reason


# --- bfloat16, which the interpreter can't multiply

BF16_TOLERANCE = 8e-3
"""Weights of the softmax, gradients of the scores and the result are each rounded to 8 bits."""


def attention_errors(qkv: Tensor, grad: Tensor, num_heads: int, clips: Tensor) -> tuple[float, float]:
    """Forward and backward against float64, at some clips; all values must be finite."""
    out = attention(qkv, num_heads, None, "triton")
    (d_qkv,) = torch.autograd.grad(out, qkv, grad)
    assert all(part.isfinite().all() for tensor in (out, d_qkv) for part in tensor.split(4096))
    exact_qkv = qkv.detach()[clips].double().requires_grad_()
    exact = reference.attention(exact_qkv, num_heads, None)
    exact.backward(grad[clips].double())
    return relative_error(out[clips], exact), relative_error(d_qkv[clips], exact_qkv.grad)


@pytest.mark.parametrize("head_dim", [32, 64, 80, 128])
@pytest.mark.parametrize(
    "tokens", [1, 16, 17, 32, 33, 48, 64, 66, 80, 103, 128, 129, 191, 261, 513, 1024]
)  # fmt: skip
def test_attention_in_bfloat16(tokens, head_dim, monkeypatch):
    clips, num_heads = 7, 3
    qkv = draw(clips, tokens, 3 * num_heads * head_dim, dtype=torch.bfloat16).requires_grad_()
    grad = draw(clips, tokens, num_heads * head_dim, seed=1, dtype=torch.bfloat16)
    poison_new_tensors(monkeypatch)
    forward, backward = attention_errors(qkv, grad, num_heads, torch.arange(clips, device=CUDA))
    assert forward < BF16_TOLERANCE
    assert backward < BF16_TOLERANCE


# --- tensors with more than 2**31 elements, whose ends 32 bits can't address

BEYOND = 2**31
PATCH, BANDS, FRAMES, PATCHES, KEPT = (16, 16), 80, 208, 65, 16
PIXELS = PATCH[0] * PATCH[1]


@pytest.fixture
def room() -> Iterator[Callable[[int], None]]:
    """A function that skips, with the number, where so many GB of device memory are not free.

    One such test at a time on this machine: others may run in parallel processes.
    """

    def need(gigabytes: int) -> None:
        free = torch.cuda.mem_get_info()[0] / 1e9
        if free < gigabytes:
            pytest.skip(f"needs {gigabytes} GB of device memory, {free:.0f} GB are free")

    with (Path(tempfile.gettempdir()) / "msm_dist-large-tests.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        torch.cuda.empty_cache()
        yield need
        torch.cuda.empty_cache()


def some_clips(count: int) -> Tensor:
    """The first, the last, and a few between."""
    return torch.cat([torch.arange(3), torch.linspace(3, count - 4, 10).long(), torch.arange(count - 3, count)]).to(
        CUDA
    )


def normal(*shape: int, leaf: bool = False) -> Tensor:
    return torch.randn(*shape, device=CUDA, dtype=torch.bfloat16).requires_grad_(leaf)


def masks(count: int) -> Masking:
    ids = torch.arange(count, device=CUDA)
    return random_masking(5, torch.stack([ids % 7, ids, ids % 3], dim=1), PATCHES, KEPT, "triton")


def at(masking: Masking, clips: Tensor) -> Masking:
    return Masking(*(ids[clips] for ids in masking))


@pytest.mark.parametrize("tokens, num_heads, head_dim", [(17, 12, 64), (66, 6, 64), (513, 16, 32)])
def test_attention_beyond_32_bits(tokens, num_heads, head_dim, room):
    room(24)
    width = num_heads * head_dim
    count = BEYOND // (tokens * 3 * width) + 37
    qkv, grad = normal(count, tokens, 3 * width, leaf=True), normal(count, tokens, width)
    assert qkv.numel() > BEYOND
    assert max(attention_errors(qkv, grad, num_heads, some_clips(count))) < BF16_TOLERANCE


def test_masks_beyond_32_bits(room):
    room(60)
    count = BEYOND // PATCHES + 37
    masking = masks(count)
    assert masking.ids_restore.numel() > BEYOND
    clips = some_clips(count)
    ids = torch.stack([clips % 7, clips, clips % 3], dim=1)
    expected = reference.random_masking(5, ids, PATCHES, KEPT)
    assert all(torch.equal(one, other) for one, other in zip(at(masking, clips), expected, strict=True))


def test_restored_tokens_beyond_32_bits(room):
    room(32)
    width = 384
    count = BEYOND // ((1 + PATCHES) * width) + 37
    masking, clips = masks(count), some_clips(count)
    tokens, mask_token = normal(count, 1 + KEPT, width, leaf=True), normal(1, 1, width, leaf=True)
    positions = torch.randn(1 + PATCHES, width, device=CUDA)
    restored = restore_tokens(tokens, masking, mask_token, positions, 1, "triton")
    assert restored.numel() > BEYOND
    grad = normal(*restored.shape)
    restored.backward(grad)
    exact = reference.restore_tokens(tokens[clips].double(), at(masking, clips), mask_token.double(), positions, 1)
    assert relative_error(restored[clips], exact) < 4e-3
    rows = reference.select_rows(grad[clips][:, 1:], masking.ids_keep[clips])
    assert torch.equal(tokens.grad[clips], torch.cat([grad[clips][:, :1], rows], dim=1))
    parts = zip(grad[:, 1:].split(4096), masking.ids_masked.split(4096), strict=True)
    total = sum(reference.select_rows(part, ids).double().sum((0, 1)) for part, ids in parts)
    assert relative_error(mask_token.grad.flatten(), total) < 4e-3


def test_selected_tokens_beyond_32_bits(room):
    room(32)
    width = 384
    count = BEYOND // ((1 + PATCHES) * width) + 37
    masking, clips = masks(count), some_clips(count)
    tokens = normal(count, 1 + PATCHES, width, leaf=True)
    assert tokens.numel() > BEYOND
    selected = select_masked_tokens(tokens, masking, 1, "triton")
    grad = normal(*selected.shape)
    selected.backward(grad)
    some = tokens.detach()[clips].requires_grad_()
    expected = reference.select_masked_tokens(some, at(masking, clips), 1)
    expected.backward(grad[clips])
    assert torch.equal(selected[clips], expected)
    assert torch.equal(tokens.grad[clips], some.grad)


def test_embedded_patches_beyond_32_bits(room):
    room(40)
    width = 768
    count = BEYOND // (KEPT * width) + 37
    masking, clips = masks(count), some_clips(count)
    spectrogram = torch.randn(count, 1, BANDS, FRAMES, device=CUDA)
    weight, bias = normal(width, PIXELS, leaf=True), normal(width, leaf=True)
    positions = torch.randn(PATCHES, width, device=CUDA)
    tokens = embed_visible_patches(spectrogram, masking, weight, bias, positions, PATCH, "triton")
    assert min(tokens.numel(), spectrogram.numel()) > BEYOND
    grad = normal(*tokens.shape)
    tokens.backward(grad)
    operands = (weight.double(), bias.double(), positions, PATCH)
    exact = reference.embed_visible_patches(spectrogram[clips].double(), at(masking, clips), *operands)
    assert relative_error(tokens[clips], exact) < BF16_TOLERANCE
    d_weight, d_bias = 0, 0
    for x, ids, d in zip(spectrogram.split(4096), masking.ids_keep.split(4096), grad.split(4096), strict=True):
        pixels = reference.select_rows(reference.patchify(x, PATCH), ids).flatten(0, 1).double()
        d_weight = d_weight + d.flatten(0, 1).double().T @ pixels
        d_bias = d_bias + d.double().sum((0, 1))
    assert relative_error(weight.grad, d_weight) < BF16_TOLERANCE
    assert relative_error(bias.grad, d_bias) < BF16_TOLERANCE


@pytest.mark.parametrize("normalize", [False, True])
def test_loss_beyond_32_bits(normalize, room):
    room(40)
    count = BEYOND // ((PATCHES - KEPT) * PIXELS) + 37
    masking, clips = masks(count), some_clips(count)
    spectrogram = torch.randn(count, 1, BANDS, FRAMES, device=CUDA)
    prediction = normal(count, PATCHES - KEPT, PIXELS, leaf=True)
    assert min(prediction.numel(), spectrogram.numel()) > BEYOND
    loss = masked_patch_loss(prediction, spectrogram, masking, PATCH, normalize, "triton")
    (loss * count).backward()  # the gradients of a mean over so many would be subnormal
    total = 0.0
    for start in range(0, count, 4096):
        part = slice(start, start + 4096)
        chosen = Masking(*(ids[part] for ids in masking))
        exact = reference.masked_patch_loss(prediction[part].double(), spectrogram[part], chosen, PATCH, normalize)
        total += exact.item() * chosen.ids_keep.shape[0] / count
    assert abs(loss.item() - total) < 1e-5 * total
    some = prediction.detach()[clips].double().requires_grad_()
    exact = reference.masked_patch_loss(some, spectrogram[clips], at(masking, clips), PATCH, normalize)
    (exact * len(clips)).backward()
    assert relative_error(prediction.grad[clips], some.grad) < BF16_TOLERANCE
