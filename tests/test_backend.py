import pytest
import torch

from msm_dist.config import Model
from msm_dist.errors import ConfigError
from msm_dist.model.mae import MaskedSpectrogramModel
from msm_kernels.attention import attention
from msm_kernels.backend import BackendUnavailable, require, resolve
from msm_kernels.masked_loss import masked_patch_loss
from msm_kernels.patch_masking import embed_visible_patches, random_masking, restore_tokens


@pytest.mark.parametrize("wish", ["auto", "reference"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_reference_runs_on_every_device(wish, device):
    assert resolve(wish, torch.device(device)) == "reference"


def test_asking_for_triton_says_why_it_can_not_be():
    with pytest.raises(BackendUnavailable, match="no Triton kernels yet; use 'auto' or 'reference'"):
        require("triton")


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="'cutlass': must be"):
        resolve("cutlass", torch.device("cpu"))


def test_no_op_falls_back_silently():
    ids = torch.zeros(1, 3, dtype=torch.int64)
    masking = random_masking(0, ids, 4, 2)
    spectrogram, weight = torch.zeros(1, 1, 4, 4), torch.zeros(6, 4)
    calls = [
        lambda: random_masking(0, ids, 4, 2, backend="triton"),
        lambda: embed_visible_patches(
            spectrogram, masking, weight, torch.zeros(6), torch.zeros(4, 6), (2, 2), backend="triton"
        ),
        lambda: restore_tokens(
            torch.zeros(1, 2, 6), masking, torch.zeros(1, 1, 6), torch.zeros(4, 6), 0, backend="triton"
        ),
        lambda: masked_patch_loss(torch.zeros(1, 2, 4), spectrogram, masking, (2, 2), False, backend="triton"),
        lambda: attention(torch.zeros(1, 2, 6), 1, backend="triton"),
    ]
    for call in calls:
        with pytest.raises(BackendUnavailable):
            call()


def test_a_model_that_asks_for_triton_is_a_config_error():
    with pytest.raises(ConfigError, match="model.backend"):
        MaskedSpectrogramModel(Model(size="tiny", backend="triton"), 80, 208)
