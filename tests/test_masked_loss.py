import pytest
import torch

from msm_kernels.masked_loss import masked_patch_loss
from msm_kernels.patch_masking import masking_from_keep

PATCH = (4, 2)


@pytest.fixture
def example():
    """Prediction and spectrogram of 3 clips, 2 x 3 patches of 4 x 2, four of six masked, float64."""
    generator = torch.Generator().manual_seed(0)
    spectrogram = torch.randn(3, 1, 8, 6, generator=generator, dtype=torch.float64)
    prediction = torch.randn(3, 4, 8, generator=generator, dtype=torch.float64)
    return prediction, spectrogram, masking_from_keep(torch.tensor([[0, 4], [2, 3], [1, 5]]), 6)


def target_patch(spectrogram, clip, patch):
    row, column = divmod(patch, 3)
    return spectrogram[clip, 0, 4 * row : 4 * row + 4, 2 * column : 2 * column + 2].reshape(-1).tolist()


@pytest.mark.parametrize("normalize", [False, True])
def test_loss_is_the_mean_over_masked_patches_of_the_mean_over_pixels(example, normalize):
    prediction, spectrogram, masking = example
    errors = []
    for clip, masked in enumerate(masking.ids_masked.tolist()):
        for place, patch in enumerate(masked):
            pixels = target_patch(spectrogram, clip, patch)
            if normalize:
                mean = sum(pixels) / 8
                variance = sum((x - mean) ** 2 for x in pixels) / 7
                pixels = [(x - mean) / (variance + 1e-6) ** 0.5 for x in pixels]
            guess = prediction[clip, place].tolist()
            errors.append(sum((p - x) ** 2 for p, x in zip(guess, pixels, strict=True)) / 8)
    loss = masked_patch_loss(prediction, spectrogram, masking, PATCH, normalize)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(sum(errors) / 12, rel=1e-12)


@pytest.mark.parametrize("normalize", [False, True])
def test_gradients_are_right(example, normalize):
    prediction, spectrogram, masking = example
    leaves = prediction.requires_grad_(), spectrogram.requires_grad_()
    assert torch.autograd.gradcheck(lambda *leaves: masked_patch_loss(*leaves, masking, PATCH, normalize), leaves)


def test_constant_patches_normalise_to_zero(example):
    prediction, spectrogram, masking = example
    loss = masked_patch_loss(torch.zeros_like(prediction), torch.full_like(spectrogram, 3.0), masking, PATCH, True)
    assert loss.item() == 0


def test_visible_pixels_do_not_matter(example):
    prediction, spectrogram, masking = example
    poisoned = spectrogram.clone()
    poisoned[0, 0, :4, :2] = float("nan")  # patch 0 of clip 0 is visible
    assert torch.equal(
        masked_patch_loss(prediction, poisoned, masking, PATCH, False),
        masked_patch_loss(prediction, spectrogram, masking, PATCH, False),
    )


def test_loss_of_a_bfloat16_prediction_is_float32(example):
    prediction, spectrogram, masking = example
    low, target = prediction.bfloat16().requires_grad_(), spectrogram.float()
    loss = masked_patch_loss(low, target, masking, PATCH, True)
    exact = masked_patch_loss(low.double(), target.double(), masking, PATCH, True)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    loss.backward()
    assert low.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prediction": torch.zeros(3, 6, 8)}, "prediction is"),
        ({"spectrogram": torch.zeros(3, 1, 9, 6)}, "9 bands x 6 frames"),
    ],
)
def test_shapes_that_disagree_are_refused(example, change, message):
    prediction, spectrogram, masking = example
    arguments = {"prediction": prediction, "spectrogram": spectrogram} | change
    with pytest.raises(ValueError, match=message):
        masked_patch_loss(**arguments, masking=masking, patch_size=PATCH, normalize=False)


def test_no_masked_patch_is_refused(example):
    everything = masking_from_keep(torch.arange(6).repeat(3, 1), 6)
    with pytest.raises(ValueError, match="hides no patch"):
        masked_patch_loss(torch.zeros(3, 0, 8), example[1], everything, PATCH, False)


def test_one_pixel_has_no_variance():
    masking = masking_from_keep(torch.tensor([[0]]), 4)
    with pytest.raises(ValueError, match="2 pixels or more"):
        masked_patch_loss(torch.zeros(1, 3, 1), torch.zeros(1, 1, 2, 2), masking, (1, 1), True)
