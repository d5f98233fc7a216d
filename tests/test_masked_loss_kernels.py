"""The kernels of the loss against the reference in float64."""

# Marked pytest.mark.gpu where there is one: see MARKS.
import pytest
import torch

from msm_kernels import masked_loss, reference
from msm_kernels.backend import BackendUnavailable
from msm_kernels.masked_loss import LossConfig, default_config, launch_backward, launch_forward, masked_patch_loss
from tests.kernel_checks import (
    BATCH,
    DEVICE,
    DTYPES,
    MARKS,
    ON_GPU,
    PATCHES,
    draw,
    masking_of,
    name_of,
    poison_new_tensors,
    relative_error,
)

pytestmark = MARKS

# Error by norm against float64: (dtype of the prediction, loss, gradient, reason). The loss is a sum of squares in
# float32 in every dtype; a gradient in 16 bits is rounded once, by half a unit of its last place at most.
TOLERANCES = [
    (torch.float32, 1e-6, 1e-6, "a few roundings of float32"),
    (torch.float16, 1e-6, 3e-4, "gradients rounded to 11 bits, from 1e-4 on as subnormals"),
    (torch.bfloat16, 1e-6, 2e-3 if ON_GPU else 4e-3, "gradients rounded to 8 bits, by the interpreter towards zero"),
]


def example(shape, dtype=torch.float32, spectrogram_dtype=torch.float32):
    """Prediction and spectrogram, of another mean and scale in each clip, both wanting gradients; masking."""
    (ph, pw), bands, frames, visible = shape
    masking = masking_of((bands // ph) * (frames // pw), visible)
    prediction = draw(*masking.ids_masked.shape, ph * pw, seed=2, dtype=dtype)
    level = torch.arange(BATCH, device=DEVICE).view(-1, 1, 1, 1)
    spectrogram = (draw(BATCH, 1, bands, frames, seed=3) * (1 + level) - level).to(spectrogram_dtype)
    return prediction.requires_grad_(), spectrogram.requires_grad_(), masking


def exact(prediction, spectrogram, masking, patch_size, normalize, d_loss=1.0):
    """Loss and gradients of the reference in float64."""
    operands = [operand.detach().double().requires_grad_() for operand in (prediction, spectrogram)]
    loss = reference.masked_patch_loss(*operands, masking, patch_size, normalize)
    return loss, *torch.autograd.grad(loss * d_loss, operands)


@pytest.mark.parametrize("shape", PATCHES, ids=name_of)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype, loss_tolerance, gradient_tolerance, reason", TOLERANCES)
def test_loss_and_gradients_are_the_references(
    monkeypatch, shape, normalize, dtype, loss_tolerance, gradient_tolerance, reason
):
    prediction, spectrogram, masking = example(shape, dtype)
    expected = exact(prediction, spectrogram, masking, shape[0], normalize, d_loss=3.0)
    poison_new_tensors(monkeypatch)
    loss = masked_patch_loss(prediction, spectrogram, masking, shape[0], normalize, "triton")
    gradients = torch.autograd.grad(loss * 3.0, (prediction, spectrogram))
    assert (loss.dtype, gradients[0].dtype, gradients[1].dtype) == (torch.float32, dtype, torch.float32)
    assert relative_error(loss, expected[0]) < loss_tolerance, reason
    assert relative_error(gradients[0], expected[1]) < gradient_tolerance, reason
    assert relative_error(gradients[1], expected[2]) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spectrogram_dtype", [torch.float16, torch.bfloat16])
def test_spectrograms_of_16_bits_are_read_as_they_are(dtype, spectrogram_dtype):
    prediction, spectrogram, masking = example(PATCHES[0], dtype, spectrogram_dtype)
    expected = exact(prediction, spectrogram, masking, (16, 16), True)
    loss = masked_patch_loss(prediction, spectrogram, masking, (16, 16), True, "triton")
    gradients = torch.autograd.grad(loss, (prediction, spectrogram))
    assert loss.dtype == torch.float32
    assert gradients[1].dtype == spectrogram_dtype
    assert relative_error(loss, expected[0]) < 1e-6
    assert relative_error(gradients[0], expected[1]) < 4e-3
    assert relative_error(gradients[1], expected[2]) < 4e-3


@pytest.mark.parametrize("shape", [PATCHES[0], PATCHES[5], PATCHES[7]], ids=name_of)
def test_every_configuration_gives_the_same_result(shape):
    prediction, spectrogram, masking = (value.detach() if torch.is_tensor(value) else value for value in example(shape))
    arguments = (prediction, spectrogram, masking.ids_masked, shape[0], True)
    expected = exact(prediction, spectrogram, masking, shape[0], True)
    for rows in (1, 4, 64):
        config = LossConfig(rows, num_warps=2)
        assert relative_error(launch_forward(*arguments, config), expected[0]) < 1e-6, rows
        gradient = launch_backward(torch.ones((), device=DEVICE), *arguments, config)
        assert relative_error(gradient, expected[1]) < 1e-6, rows


def test_programs_take_4096_pixels_or_a_warp_of_rows():
    assert default_config((16, 16)) == LossConfig(16, 4)
    assert default_config((80, 4)) == LossConfig(8, 4)
    assert default_config((80, 2)) == LossConfig(32, 8)
    assert default_config((1, 1)) == LossConfig(4096, 4)
    assert default_config((128, 128)) == LossConfig(1, 8)


def test_each_kernel_runs_under_the_configuration_of_its_name(monkeypatch):
    asked = []
    configurations = {"masked_loss_forward": LossConfig(4, 1), "masked_loss_backward": LossConfig(2, 1)}

    def configuration(kernel, shape_class, dtype, device, default):
        asked.append((kernel, shape_class, dtype, default))
        return configurations[kernel]

    programs = []
    launch = masked_loss.launch
    monkeypatch.setattr(masked_loss, "configuration", configuration)
    monkeypatch.setattr(
        masked_loss, "launch", lambda *args, **kwargs: (programs.append(args[1]), launch(*args, **kwargs))
    )
    prediction, spectrogram, masking = example(PATCHES[1], torch.float16)
    masked_patch_loss(prediction, spectrogram, masking, (16, 8), False, "triton").backward()
    assert asked == [(kernel, "16x8", torch.float16, default_config((16, 8))) for kernel in configurations]
    rows = masking.ids_masked.numel()
    assert programs == [-(-rows // 4), -(-rows // 2)]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("shape", [PATCHES[0], PATCHES[7]], ids=name_of)
def test_what_the_visible_pixels_hold_touches_nothing(shape, normalize):
    prediction, spectrogram, masking = example(shape)
    (ph, pw), bands, frames, _ = shape
    poison = torch.full((bands // ph * (frames // pw), ph * pw), float("nan"), device=DEVICE)
    patches = reference.patchify(spectrogram.detach(), shape[0])
    ids = masking.ids_keep.unsqueeze(-1).expand(-1, -1, ph * pw)
    poisoned = patches.scatter(1, ids, poison.expand_as(patches))
    poisoned = poisoned.view(BATCH, bands // ph, frames // pw, ph, pw).transpose(2, 3).reshape(spectrogram.shape)
    assert poisoned.isnan().any()
    results = []
    for operand in (spectrogram.detach(), poisoned):
        loss = masked_patch_loss(prediction, operand.requires_grad_(), masking, shape[0], normalize, "triton")
        results.append((loss, *torch.autograd.grad(loss, (prediction, operand))))
    assert results[0][0].isfinite()
    assert all(torch.equal(clean, dirty) for clean, dirty in zip(*results, strict=True))


def test_a_poisoned_masked_pixel_shows():
    prediction, spectrogram, masking = example(PATCHES[0])
    row, column = divmod(int(masking.ids_masked[1, 2]), 3)
    with torch.no_grad():
        spectrogram[1, 0, 16 * row + 15, 16 * column + 15] = float("nan")
    assert masked_patch_loss(prediction, spectrogram, masking, (16, 16), False, "triton").isnan()


@pytest.mark.parametrize("normalize", [False, True])
def test_strided_operands_and_gradients_are_taken_as_they_come(normalize):
    prediction, spectrogram, masking = example(PATCHES[0])
    expected = exact(prediction, spectrogram, masking, (16, 16), normalize)
    tall = prediction.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    wide = torch.stack([spectrogram.detach(), -spectrogram.detach()], dim=-1)[..., 0].requires_grad_()
    ids = torch.stack([masking.ids_masked, masking.ids_masked.flip(1)], dim=-1)[..., 0]
    assert not tall.is_contiguous() and not wide.is_contiguous() and not ids.is_contiguous()
    loss = masked_patch_loss(tall, wide, masking._replace(ids_masked=ids), (16, 16), normalize, "triton")
    gradients = torch.autograd.grad(loss, (tall, wide))
    for value, other in zip((loss, *gradients), expected, strict=True):
        assert relative_error(value, other) < 1e-5


def test_constant_patches_normalise_to_nothing():
    prediction, spectrogram, masking = example(PATCHES[7])
    with torch.no_grad():
        prediction.zero_()
        spectrogram.fill_(-7.3)
    assert masked_patch_loss(prediction, spectrogram, masking, (80, 1), True, "triton") == 0


def test_float16_predictions_at_their_end_do_not_overflow():
    prediction, spectrogram, masking = example(PATCHES[0], torch.float16)
    with torch.no_grad():
        prediction.fill_(65504)
    expected = exact(prediction, spectrogram, masking, (16, 16), False)
    loss = masked_patch_loss(prediction, spectrogram, masking, (16, 16), False, "triton")
    loss.backward()
    assert relative_error(loss, expected[0]) < 1e-6
    assert relative_error(prediction.grad, expected[1]) < 3e-4


def test_a_loss_scale_reaches_float16_gradients_before_they_are_rounded():
    """Gradients of about 1e-9 are nothing in float16; times 2**20 they are not."""
    prediction, spectrogram, masking = example(PATCHES[0], torch.float16)
    expected = exact(prediction, spectrogram, masking, (16, 16), False, d_loss=1e-6 * 2**20)
    loss = masked_patch_loss(prediction, spectrogram, masking, (16, 16), False, "triton")
    (loss * 1e-6 * 2**20).backward()
    assert relative_error(prediction.grad, expected[1]) < 3e-4


def test_only_the_gradients_asked_for_are_computed(monkeypatch):
    calls = []
    for name in ("launch_forward", "launch_backward", "_spectrogram_gradient"):
        function = getattr(masked_loss, name)
        monkeypatch.setattr(
            masked_loss, name, lambda *args, name=name, function=function: (calls.append(name), function(*args))[1]
        )
    prediction, spectrogram, masking = example(PATCHES[0])
    # Who wants gradients, and what runs for it.
    cases = [
        ((), []),
        ((prediction,), ["launch_backward"]),
        ((spectrogram,), ["_spectrogram_gradient"]),
        ((prediction, spectrogram), ["launch_backward", "_spectrogram_gradient"]),
    ]
    for wanting, expected in cases:
        calls.clear()
        for operand in (prediction, spectrogram):
            operand.requires_grad_(any(operand is one for one in wanting))
        loss = masked_patch_loss(prediction, spectrogram, masking, (16, 16), False, "triton")
        assert loss.requires_grad == bool(wanting)
        if wanting:
            loss.backward()
        assert calls == ["launch_forward", *expected]


def test_two_runs_give_the_same_bits():
    runs = []
    for _ in range(2):
        prediction, spectrogram, masking = example(PATCHES[1], torch.float16)
        loss = masked_patch_loss(prediction, spectrogram, masking, (16, 8), True, "triton")
        runs.append((loss, *torch.autograd.grad(loss, (prediction, spectrogram))))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_differentiating_twice_is_refused():
    prediction, spectrogram, masking = example(PATCHES[0])
    loss = masked_patch_loss(prediction, spectrogram.detach(), masking, (16, 16), False, "triton")
    (gradient,) = torch.autograd.grad(loss, prediction, create_graph=True)
    with pytest.raises(RuntimeError, match="masked_loss_backward"):
        gradient.sum().backward()


@pytest.mark.parametrize("normalize", [False, True])
def test_operators_are_registered_completely(normalize):
    prediction, spectrogram, masking = example(PATCHES[3])
    tensors = (prediction, spectrogram, masking.ids_masked)
    settings = (8, 16, normalize)
    torch.library.opcheck(masked_loss._forward_op, (*tensors, *settings))
    torch.library.opcheck(
        masked_loss._backward_op, (torch.ones((), device=DEVICE), *(one.detach() for one in tensors), *settings)
    )


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_the_loss_compiles_into_one_graph(backend):
    prediction, spectrogram, masking = example(PATCHES[0])

    def step(prediction, spectrogram, masking):
        return masked_patch_loss(prediction, spectrogram, masking, (16, 16), True, backend) * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (step, compiled):
        loss = function(prediction, spectrogram, masking)
        results.append((loss, *torch.autograd.grad(loss, (prediction, spectrogram))))
    for value, other in zip(*results, strict=True):
        torch.testing.assert_close(value, other)


def test_float64_is_the_references_alone():
    prediction, spectrogram, masking = example(PATCHES[0])
    with pytest.raises(BackendUnavailable, match="not float64"):
        masked_patch_loss(prediction, spectrogram.double(), masking, (16, 16), False, "triton")
