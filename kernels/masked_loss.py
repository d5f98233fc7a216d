"""The loss of the masked autoencoder: mean squared error on the masked patches only.

Legend: B clips, M masked patches, ph x pw a patch. Malformed arguments raise ValueError; a backend that
can't run raises BackendUnavailable.
"""

from torch import Tensor

from . import reference
from .backend import Backend, resolve
from .patch_masking import check_patches, check_shape
from .reference import Masking


def masked_patch_loss(
    prediction: Tensor,
    spectrogram: Tensor,
    masking: Masking,
    patch_size: tuple[int, int],
    normalize: bool,
    backend: Backend = "auto",
) -> Tensor:
    """Mean over pixels of the squared error of a patch, averaged over the masked patches of the batch.

    prediction [B, M, ph * pw] in the order of ids_masked, spectrogram [B, 1, F, T] -> scalar, float32 or, if
    an operand is, float64. With `normalize` a target patch is (x - mean) / sqrt(unbiased variance + 1e-6).
    Source: Niizumi et al. 2022; normalised targets: He et al. 2022.
    """
    check_patches(spectrogram, masking, patch_size)
    pixels = patch_size[0] * patch_size[1]
    check_shape("prediction", prediction, (*masking.ids_masked.shape, pixels))
    if not prediction.numel():
        raise ValueError("masking hides no patch of the batch: the loss needs at least one")
    if normalize and pixels < 2:
        raise ValueError(f"patch_size = {patch_size}: the variance of a normalised target needs 2 pixels or more")
    resolve(backend, prediction.device)
    return reference.masked_patch_loss(prediction, spectrogram, masking, patch_size, normalize)
